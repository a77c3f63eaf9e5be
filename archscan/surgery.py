"""Where every index of every parameter and buffer comes from: coupling, kept steps → `Surgery`, and its JSON.

Data format: a `Surgery` lists, per tensor path, the source indices of each axis that changes, and per module path the
integer attributes that a forward hard-codes. Everything that follows from a tensor's new shape (``in_channels``,
``groups``, ``num_features`` …) is not listed: `rebuild.apply` derives it. In JSON, indices are runs ``[start, stop]``.

A network gets wider by steps that are kept more than once: what produces a unit is copied, and what reads it is split
among the copies (`Cut.repeats`), so that they add up to what the one unit was.

Two decisions are not obvious. The input axis of a grouped convolution means other channels in every output row, so its
cut holds one row of indices per kept row of axis 0, and is made by a gather after axis 0 has been cut. And neighbouring
indices of one unit are repeated as a block, since they are its inner places (the pixels of a flattened map, the width
of a head) and a forward that unfolds the axis must find them together.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from archscan.errors import BadInput, RebuildMismatch
from archscan.groups import AxisUnits, ChannelGroup, Coupling

Kept = Mapping[str, Sequence[Sequence[int]]]
"""Group name → per fibre, the sorted numbers of the steps that stay; or all of them, some more than once."""

Repeats = Literal["copied", "split", "whole"]
"""What repeated indices hold: copies; shares that add up to the original, as consumers of copies must; or copies of
whole groups of a grouped convolution, which has more groups then."""

MAX_REPEATS = 16
"""How often an axis may be as long as it was, in a surgery that is read from a file."""


@dataclass(frozen=True)
class Cut:
    """The indices of one axis that stay, or that are repeated.

    Attributes:
        axis: The axis.
        kept: Source of each index, sorted where none is repeated; or one row of sources per kept index of axis 0 (input
            axis of a grouped convolution).
        repeats: What repeated indices hold; None where there are none.
    """

    axis: int
    kept: tuple[int, ...] | tuple[tuple[int, ...], ...]
    repeats: Repeats | None = None

    @property
    def by_row(self) -> bool:
        """Whether every row of axis 0 keeps its own indices."""
        return isinstance(self.kept[0], tuple)


@dataclass(frozen=True)
class Surgery:
    """All that turns the original network into the slim or the widened one.

    Attributes:
        cuts: Path of a parameter or buffer → its cuts, by rising axis.
        attributes: Module path → attribute → its new value, for sizes that a forward hard-codes.
    """

    cuts: Mapping[str, tuple[Cut, ...]]
    attributes: Mapping[str, Mapping[str, int | tuple[int, ...]]] = field(default_factory=dict)

    def kept_rows(self, name: str) -> Any:
        """Return the source of each index of axis 0 of a tensor; None where all stay."""
        return next((cut.kept for cut in self.cuts.get(name, ()) if cut.axis == 0), None)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, indices as runs ``[start, stop]``."""
        return {
            "cuts": {name: [_cut_to_json(cut) for cut in cuts] for name, cuts in self.cuts.items()},
            "attributes": {
                path: {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
                for path, values in self.attributes.items()
            },
        }

    @classmethod
    def from_json(cls, data: Any, model: nn.Module) -> "Surgery":
        """Read what `to_json` wrote, checking every number against the model that it will be applied to.

        Nothing is allocated before its size is known to be at most the model's own, or a small multiple of it where
        the network gets wider.

        Raises:
            BadInput: It is nothing that `to_json` could have written for this model.
        """
        _require(isinstance(data, dict) and set(data) == {"cuts", "attributes"}, "it needs 'cuts' and 'attributes'")
        _require(
            isinstance(data["cuts"], dict) and isinstance(data["attributes"], dict),
            "'cuts' and 'attributes' are tables",
        )
        tensors = dict(named_tensors(model))
        modules = dict(model.named_modules(remove_duplicate=False))
        cuts = {}
        for name, listed in data["cuts"].items():
            _require(name in tensors, f"the model has no tensor {name!r}")
            cuts[name] = _cuts_from_json(listed, tuple(tensors[name].shape), name)
        growth = MAX_REPEATS if any(cut.repeats for found in cuts.values() for cut in found) else 1
        attributes: dict[str, Mapping[str, int | tuple[int, ...]]] = {}
        for path, values in data["attributes"].items():
            _require(path in modules, f"the model has no module {path!r}")
            _require(isinstance(values, dict), f"the attributes of {path!r} are not a table")
            attributes[path] = {
                name: _attribute_from_json(modules[path], path, name, new, growth) for name, new in values.items()
            }
        return cls(cuts, attributes)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer under every path that it is registered at."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _require(condition: bool, complaint: str) -> None:
    if not condition:
        raise BadInput(
            f"the plan does not fit this model: {complaint}; load the plan that archscan wrote for it, unedited"
        )


def _runs(indices: Sequence[int]) -> list[list[int]]:
    cuts = [i for i in range(1, len(indices)) if indices[i] != indices[i - 1] + 1]
    return [[indices[a], indices[b - 1] + 1] for a, b in zip([0, *cuts], [*cuts, len(indices)], strict=True)]


def _cut_to_json(cut: Cut) -> dict[str, Any]:
    repeats = {} if cut.repeats is None else {"repeats": cut.repeats}
    if cut.by_row:
        rows = [[len(list(same)), _runs(row)] for row, same in groupby(cut.kept)]  # type: ignore[arg-type]
        return {"axis": cut.axis, "rows": rows, **repeats}
    return {"axis": cut.axis, "kept": _runs(cut.kept), **repeats}  # type: ignore[arg-type]


def _indices(runs: Any, size: int, where: str, repeated: bool) -> tuple[int, ...]:
    """Read runs of indices; they rise, unless indices are repeated."""
    complaint = f"{where} needs {'' if repeated else 'rising '}runs [start, stop] of indices below {size}"
    _require(isinstance(runs, list) and len(runs) > 0, complaint)
    last, length = -1, 0
    for run in runs:
        _require(isinstance(run, list) and len(run) == 2 and all(type(end) is int for end in run), complaint)
        _require(last < run[0] < run[1] <= size, complaint)
        last, length = -1 if repeated else run[1], length + run[1] - run[0]
        _require(length <= MAX_REPEATS * size, f"{where} gets more than {MAX_REPEATS} times as long")
    return tuple(index for start, stop in runs for index in range(start, stop))


def _cuts_from_json(listed: Any, shape: tuple[int, ...], name: str) -> tuple[Cut, ...]:
    _require(isinstance(listed, list) and len(listed) > 0, f"the cuts of {name!r} are not a list")
    cuts: list[Cut] = []
    rows = shape[0] if shape else 0
    for entry in listed:
        _require(
            isinstance(entry, dict) and set(entry) - {"repeats"} in ({"axis", "kept"}, {"axis", "rows"}),
            f"a cut of {name!r} is malformed",
        )
        axis, repeats = entry["axis"], entry.get("repeats")
        _require(
            "repeats" not in entry or (isinstance(repeats, str) and repeats in get_args(Repeats)),
            f"{name!r} repeats indices in an unknown way",
        )
        last = cuts[-1].axis if cuts else -1
        _require(
            type(axis) is int and last < axis < len(shape), f"{name!r} has no axis {axis!r} to cut after axis {last}"
        )
        where = f"axis {axis} of {name!r}"
        if "kept" in entry:
            cuts.append(Cut(axis, _indices(entry["kept"], shape[axis], where, repeats is not None), repeats))
            rows = len(cuts[-1].kept) if axis == 0 else rows
            continue
        _require(
            axis > 0 and isinstance(entry["rows"], list) and len(entry["rows"]) > 0, f"{where} cannot be cut row by row"
        )
        cuts.append(Cut(axis, _rows(entry["rows"], shape[axis], rows, where, repeats is not None), repeats))
    return tuple(cuts)


def _rows(listed: list[Any], size: int, rows: int, where: str, repeated: bool) -> tuple[tuple[int, ...], ...]:
    kept: list[tuple[int, ...]] = []
    for entry in listed:
        good = (
            isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is int and 0 < entry[0] <= rows - len(kept)
        )
        _require(good, f"{where} needs one row of indices for each of its {rows} kept rows")
        kept.extend([_indices(entry[1], size, where, repeated)] * entry[0])
    _require(
        len(kept) == rows and len({len(row) for row in kept}) == 1, f"{where} needs {rows} rows of the same length"
    )
    return tuple(kept)


def sizes_of(module: nn.Module, name: str) -> tuple[int, ...] | None:
    """Return the integers that a plain attribute of a module holds, None where it is no size.

    Only the module's own public attributes are looked at: never properties, methods, or anything behind an underscore.
    """
    value = vars(module).get(name) if not name.startswith("_") else None
    if type(value) is int:
        return (value,)
    if type(value) in (tuple, list, torch.Size) and value and all(type(size) is int for size in value):
        return tuple(value)
    return None


def _attribute_from_json(module: nn.Module, path: str, name: str, new: Any, growth: int) -> int | tuple[int, ...]:
    old = sizes_of(module, name)
    _require(old is not None, f"{path!r} has no integer attribute {name!r}")
    sizes = new if isinstance(new, list) else [new]
    _require(
        old is not None
        and isinstance(new, list) == (type(vars(module)[name]) is not int)
        and len(sizes) == len(old)
        and all(type(size) is int and 0 <= size <= growth * before for size, before in zip(sizes, old, strict=True)),
        f"{name!r} of {path!r} can only {'grow so far' if growth > 1 else 'shrink'} from {old}",
    )
    return tuple(sizes) if isinstance(new, list) else new


def set_sizes(module: nn.Module, name: str, value: int | tuple[int, ...]) -> None:
    """Set an integer attribute, or one that holds several in the kind of sequence that it is."""
    setattr(module, name, type(vars(module)[name])(value))


def kept_units(coupling: Coupling, kept: Kept) -> np.ndarray:
    """Say of every unit whether it stays; boolean, as `times_kept` counts."""
    return np.asarray(times_kept(coupling, kept) > 0)


def times_kept(coupling: Coupling, kept: Kept) -> np.ndarray:
    """Count how often every unit is there; shape [units], and one more 1 so that unit -1 (no unit) stays.

    Raises:
        BadInput: `kept` does not fit the channel groups.
    """
    groups = {group.name: group for group in coupling.groups}
    if set(kept) != set(groups):
        odd = sorted(set(kept) ^ set(groups))[0]
        raise BadInput(
            f"the plan and the network disagree on channel group {odd!r}; make the plan again for this network"
        )
    times = np.ones(coupling.unit_count + 1, dtype=np.int64)
    for name, fibres in kept.items():
        group = groups[name]
        _check_fibres(group, fibres)
        for units, steps in zip(group.units, fibres, strict=True):
            times[list(units)] = np.bincount(np.asarray(steps, dtype=np.int64), minlength=group.steps)
    return times


def _check_fibres(group: ChannelGroup, fibres: Sequence[Sequence[int]]) -> None:
    """See that the steps of a group that stay, or that are repeated, can."""
    fits = len(fibres) == len(group.units) and len({len(steps) for steps in fibres}) == 1
    fits = fits and all(
        len(steps) > 0
        and list(steps) == sorted(steps)
        and steps[0] >= 0
        and steps[-1] < group.steps
        and len(set(steps)) in (len(steps), group.steps)
        for steps in fibres
    )
    if not fits:
        raise BadInput(
            f"channel group {group.name!r} needs, for each of its {len(group.units)} fibres, equally many rising step "
            f"numbers below {group.steps}, or all of them with some repeated; make the plan again"
        )
    if group.frozen is not None and len(fibres[0]) != group.steps:
        raise BadInput(
            f"channel group {group.name!r} is frozen ({group.frozen}) and must keep all its {group.steps} steps"
        )


def _sources(units: np.ndarray, times: np.ndarray) -> np.ndarray:
    """List the source of each index of an axis: runs of one unit, as often as it is there."""
    counts = times[units]
    if counts.max(initial=1) <= 1:
        return np.flatnonzero(counts)
    starts = np.flatnonzero(np.concatenate([[True], units[1:] != units[:-1]]))
    runs = np.split(np.arange(len(units)), starts[1:])
    return np.concatenate([np.tile(run, counts[run[0]]) for run in runs])


def _passing_rows(axes: Sequence[AxisUnits]) -> np.ndarray | None:
    """Say which rows of a grouped convolution read their own unit only, and so pass it on; None without such rows.

    A depthwise convolution is one; where its unit is repeated, the row is, and still reads one.
    """
    first = next((axis.units for axis in axes if axis.axis == 0 and axis.units.ndim == 1), None)
    inner = next((axis.units for axis in axes if axis.units.ndim == 2), None)
    if first is None or inner is None:
        return None
    passing = (inner == first[:, None]).all(axis=1) & (first >= 0)
    return passing if passing.any() else None


def _cut_rows(
    name: str, owners: AxisUnits, times: np.ndarray, rows: np.ndarray, passing: np.ndarray | None
) -> Cut | None:
    """Cut an axis whose owners depend on the row: every kept row keeps its own columns, equally many."""
    once = np.zeros(len(owners.units), dtype=bool) if passing is None else passing
    counts = times[owners.units][rows]
    counts = np.where(once[rows, None], np.minimum(counts, 1), counts)
    lengths = counts.sum(axis=1)
    if (lengths != lengths[0]).any() or lengths[0] == 0:
        raise RebuildMismatch(
            f"rows of {name} would keep between {lengths.min()} and {lengths.max()} inputs, which no weight tensor can "
            "hold; the plan is not balanced over the groups of this convolution"
        )
    if (counts == 1).all():
        return None
    repeats: Repeats | None = None
    if counts.max() > 1:
        repeats = "split" if owners.role == "in" else "copied"
        columns = np.stack(
            [_sources(owners.units[row], np.minimum(times, 1) if once[row] else times) for row in rows.tolist()]
        )
    else:
        columns = np.nonzero(counts)[1].reshape(len(rows), lengths[0])
    if (columns == columns[0]).all():
        return Cut(owners.axis, tuple(columns[0].tolist()), repeats)
    return Cut(owners.axis, tuple(tuple(row) for row in columns.tolist()), repeats)


def surgery_for(coupling: Coupling, kept: Kept) -> Surgery:
    """Translate kept steps into the source of every index of every parameter and buffer axis.

    Args:
        coupling: What coupling said about the network.
        kept: Kept steps of every channel group, per fibre.

    Returns:
        A surgery without attributes; axes that stay as they are are not listed.

    Raises:
        BadInput: `kept` does not fit the channel groups.
        RebuildMismatch: A tensor would lose everything, or would become ragged.
    """
    times = times_kept(coupling, kept)
    cuts = {name: tuple(_cuts_of(name, axes, times)) for name, axes in coupling.tensors.items()}
    return Surgery({name: found for name, found in cuts.items() if found})


def _cuts_of(name: str, axes: Sequence[AxisUnits], times: np.ndarray) -> Iterator[Cut]:
    """Yield the cuts of one tensor, by rising axis."""
    rows: np.ndarray | None = None
    passing = _passing_rows(axes)
    for owners in sorted(axes, key=lambda axis: axis.axis):
        if owners.units.ndim == 2:
            rows = np.arange(len(owners.units)) if rows is None else rows
            cut = _cut_rows(name, owners, times, rows, passing)
            if cut is not None:
                yield cut
            continue
        indices = _sources(owners.units, times)
        rows = indices if owners.axis == 0 else rows
        if len(indices) == 0:
            raise RebuildMismatch(f"the plan removes all of axis {owners.axis} of {name}; keep at least one step there")
        repeats: Repeats | None = None
        if len(np.unique(indices)) < len(indices):
            whole = owners.axis == 0 and passing is not None and bool(passing[indices].all())
            repeats = "whole" if whole else "split" if owners.role == "in" else "copied"
        if repeats or len(indices) < len(owners.units):
            yield Cut(owners.axis, tuple(indices.tolist()), repeats)
