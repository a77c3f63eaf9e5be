"""Which indices of every parameter and buffer stay: coupling, kept steps → `Surgery`, and its JSON.

Data format: a `Surgery` lists, per tensor path, the kept indices of each axis that is cut, and per module path the
integer attributes that a forward hard-codes. Everything that follows from a tensor's new shape (``in_channels``,
``groups``, ``num_features`` …) is not listed: `rebuild.apply` derives it. In JSON, indices are runs ``[start, stop]``.

The decision that is not obvious: the input axis of a grouped convolution means other channels in every output row, so
its cut holds one row of indices per kept row of axis 0, and is made by a gather after axis 0 has been cut.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from archscan.errors import BadInput, RebuildMismatch
from archscan.groups import AxisUnits, Coupling

Kept = Mapping[str, Sequence[Sequence[int]]]
"""Group name → per fibre, the sorted numbers of the steps that stay."""


@dataclass(frozen=True)
class Cut:
    """The indices of one axis that stay.

    Attributes:
        axis: The axis.
        kept: Sorted indices; or one row of them per kept index of axis 0 (input axis of a grouped convolution).
    """

    axis: int
    kept: tuple[int, ...] | tuple[tuple[int, ...], ...]

    @property
    def by_row(self) -> bool:
        """Whether every row of axis 0 keeps its own indices."""
        return isinstance(self.kept[0], tuple)


@dataclass(frozen=True)
class Surgery:
    """All that turns the original network into the slim one.

    Attributes:
        cuts: Path of a parameter or buffer → its cuts, by rising axis.
        attributes: Module path → attribute → its new value, for sizes that a forward hard-codes.
    """

    cuts: Mapping[str, tuple[Cut, ...]]
    attributes: Mapping[str, Mapping[str, int | tuple[int, ...]]] = field(default_factory=dict)

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

        Nothing is allocated before its size is known to be at most the model's own.

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
        attributes: dict[str, Mapping[str, int | tuple[int, ...]]] = {}
        for path, values in data["attributes"].items():
            _require(path in modules, f"the model has no module {path!r}")
            _require(isinstance(values, dict), f"the attributes of {path!r} are not a table")
            attributes[path] = {
                name: _attribute_from_json(modules[path], path, name, new) for name, new in values.items()
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
    if cut.by_row:
        return {"axis": cut.axis, "rows": [[len(list(same)), _runs(row)] for row, same in groupby(cut.kept)]}  # type: ignore[arg-type]
    return {"axis": cut.axis, "kept": _runs(cut.kept)}  # type: ignore[arg-type]


def _indices(runs: Any, size: int, where: str) -> tuple[int, ...]:
    complaint = f"{where} needs rising runs [start, stop] of indices below {size}"
    _require(isinstance(runs, list) and len(runs) > 0, complaint)
    last = -1
    for run in runs:
        _require(isinstance(run, list) and len(run) == 2 and all(type(end) is int for end in run), complaint)
        _require(last < run[0] < run[1] <= size, complaint)
        last = run[1]
    return tuple(index for start, stop in runs for index in range(start, stop))


def _cuts_from_json(listed: Any, shape: tuple[int, ...], name: str) -> tuple[Cut, ...]:
    _require(isinstance(listed, list) and len(listed) > 0, f"the cuts of {name!r} are not a list")
    cuts: list[Cut] = []
    rows = shape[0] if shape else 0
    for entry in listed:
        _require(
            isinstance(entry, dict) and set(entry) in ({"axis", "kept"}, {"axis", "rows"}),
            f"a cut of {name!r} is malformed",
        )
        axis = entry["axis"]
        last = cuts[-1].axis if cuts else -1
        _require(
            type(axis) is int and last < axis < len(shape), f"{name!r} has no axis {axis!r} to cut after axis {last}"
        )
        where = f"axis {axis} of {name!r}"
        if "kept" in entry:
            cuts.append(Cut(axis, _indices(entry["kept"], shape[axis], where)))
            rows = len(cuts[-1].kept) if axis == 0 else rows
            continue
        _require(
            axis > 0 and isinstance(entry["rows"], list) and len(entry["rows"]) > 0, f"{where} cannot be cut row by row"
        )
        cuts.append(Cut(axis, _rows(entry["rows"], shape[axis], rows, where)))
    return tuple(cuts)


def _rows(listed: list[Any], size: int, rows: int, where: str) -> tuple[tuple[int, ...], ...]:
    kept: list[tuple[int, ...]] = []
    for entry in listed:
        good = (
            isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is int and 0 < entry[0] <= rows - len(kept)
        )
        _require(good, f"{where} needs one row of indices for each of its {rows} kept rows")
        kept.extend([_indices(entry[1], size, where)] * entry[0])
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


def _attribute_from_json(module: nn.Module, path: str, name: str, new: Any) -> int | tuple[int, ...]:
    old = sizes_of(module, name)
    _require(old is not None, f"{path!r} has no integer attribute {name!r}")
    sizes = new if isinstance(new, list) else [new]
    _require(
        old is not None
        and isinstance(new, list) == (type(vars(module)[name]) is not int)
        and len(sizes) == len(old)
        and all(type(size) is int and 0 <= size <= before for size, before in zip(sizes, old, strict=True)),
        f"{name!r} of {path!r} can only shrink from {old}",
    )
    return tuple(sizes) if isinstance(new, list) else new


def set_sizes(module: nn.Module, name: str, value: int | tuple[int, ...]) -> None:
    """Set an integer attribute, or one that holds several in the kind of sequence that it is."""
    setattr(module, name, type(vars(module)[name])(value))


def kept_units(coupling: Coupling, kept: Kept) -> np.ndarray:
    """Say of every unit whether it stays; shape [units], and one more True so that unit -1 (no unit) stays.

    Raises:
        BadInput: `kept` does not fit the channel groups.
    """
    groups = {group.name: group for group in coupling.groups}
    if set(kept) != set(groups):
        odd = sorted(set(kept) ^ set(groups))[0]
        raise BadInput(
            f"the plan and the network disagree on channel group {odd!r}; make the plan again for this network"
        )
    stays = np.ones(coupling.unit_count + 1, dtype=bool)
    for name, fibres in kept.items():
        group = groups[name]
        fits = len(fibres) == len(group.units) and len({len(steps) for steps in fibres}) == 1
        fits = fits and all(
            len(steps) > 0 and list(steps) == sorted(set(steps)) and steps[0] >= 0 and steps[-1] < group.steps
            for steps in fibres
        )
        if not fits:
            raise BadInput(
                f"channel group {name!r} needs, for each of its {len(group.units)} fibres, equally many rising step "
                f"numbers below {group.steps}; make the plan again"
            )
        if group.frozen is not None and len(fibres[0]) < group.steps:
            raise BadInput(
                f"channel group {name!r} is frozen ({group.frozen}) and must keep all its {group.steps} steps"
            )
        for units, steps in zip(group.units, fibres, strict=True):
            stays[list(units)] = False
            stays[[units[step] for step in steps]] = True
    return stays


def _cut_rows(name: str, owners: AxisUnits, stays: np.ndarray, rows: np.ndarray) -> Cut | None:
    """Cut an axis whose owners depend on the row: every kept row keeps its own columns, equally many."""
    mask = stays[owners.units][rows]
    counts = mask.sum(axis=1)
    if (counts != counts[0]).any() or counts[0] == 0:
        raise RebuildMismatch(
            f"rows of {name} would keep between {counts.min()} and {counts.max()} inputs, which no weight tensor can "
            "hold; the plan is not balanced over the groups of this convolution"
        )
    if counts[0] == mask.shape[1]:
        return None
    columns = np.nonzero(mask)[1].reshape(len(rows), counts[0])
    if (columns == columns[0]).all():
        return Cut(owners.axis, tuple(columns[0].tolist()))
    return Cut(owners.axis, tuple(tuple(row) for row in columns.tolist()))


def surgery_for(coupling: Coupling, kept: Kept) -> Surgery:
    """Translate kept steps into kept indices of every parameter and buffer axis.

    Args:
        coupling: What coupling said about the network.
        kept: Kept steps of every channel group, per fibre.

    Returns:
        A surgery without attributes; axes that lose nothing are not listed.

    Raises:
        BadInput: `kept` does not fit the channel groups.
        RebuildMismatch: A tensor would lose everything, or would become ragged.
    """
    stays = kept_units(coupling, kept)
    cuts: dict[str, tuple[Cut, ...]] = {}
    for name, axes in coupling.tensors.items():
        found: list[Cut] = []
        rows: np.ndarray | None = None
        for owners in sorted(axes, key=lambda axis: axis.axis):
            if owners.units.ndim == 2:
                rows = np.arange(len(owners.units)) if rows is None else rows
                cut = _cut_rows(name, owners, stays, rows)
                found.extend([cut] if cut else [])
                continue
            indices = np.flatnonzero(stays[owners.units])
            rows = indices if owners.axis == 0 else rows
            if len(indices) == 0:
                raise RebuildMismatch(
                    f"the plan removes all of axis {owners.axis} of {name}; keep at least one step there"
                )
            if len(indices) < len(owners.units):
                found.append(Cut(owners.axis, tuple(indices.tolist())))
        if found:
            cuts[name] = tuple(found)
    return Surgery(cuts)
