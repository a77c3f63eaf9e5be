"""From recorded runs to channel groups: model, example input → `Coupling`.

The labels that the rules united are the *units*: connected components, the smallest things that can be removed. Units
whose slices lie in the same (tensor, axis) set form a *channel group*. Two constraints make it more than that: rows of
a grid that must keep equal counts become the fibres of one group; where grids disagree, their rows are tied place by
place, which is coarser but exact.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import networkx as nx
import numpy as np
from torch import Tensor, nn

from archscan.capture import capture
from archscan.coupling import Components, Record, Walk, marked, mixing_places, resolve
from archscan.errors import BadInput
from archscan.graph import Graph
from archscan.sizes import Owners, Size, SizeOfValue, ValueSizes
from archscan.streams import summed_groups

Role = Literal["out", "in", "affine"]
_ALL_OR_NONE = "its channels could only go all together"

Block = tuple[tuple[tuple[int, ...], ...], str | None]  # components of a group, [fibre][step], and why it is frozen


@dataclass(frozen=True)
class Member:
    """One axis of one parameter or buffer that a channel group cuts.

    Attributes:
        tensor: Path of the parameter or buffer.
        axis: The axis that is cut.
        role: ``out`` for a producer's output channels, ``in`` for a consumer's input channels, ``affine`` for
            everything that rides along (biases, normalisation, layer scale).
    """

    tensor: str
    axis: int
    role: Role

    @property
    def module(self) -> str:
        """Path of the module that owns the tensor."""
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True)
class ChannelGroup:
    """Units that lie in the same tensors' axes and are planned together.

    Attributes:
        name: Path of the first layer that produces the channels.
        units: Unit numbers, [fibre][step]. One step removes one unit from each fibre; all but grouped convolutions and
            splits have one fibre.
        channels_per_step: Width of the narrowest producing axis, in channels, that one step accounts for.
        members: The axes that it cuts.
        frozen: Why nothing may be removed; None where units may.
        summed: Whether sums write its channels, as those of a residual stream.
    """

    name: str
    units: tuple[tuple[int, ...], ...]
    channels_per_step: int
    members: tuple[Member, ...]
    frozen: str | None
    summed: bool = False

    def __repr__(self) -> str:
        """Name, width, layers; the units of a wide group would fill a page."""
        state = "" if self.frozen is None else f", frozen: {self.frozen}"
        return f"ChannelGroup({self.name!r}, width {self.channels:,}, tensor axes {len(self.members):,}{state})"

    @property
    def steps(self) -> int:
        """Full width in steps."""
        return len(self.units[0])

    @property
    def channels(self) -> int:
        """Full width in channels of its narrowest producing axis."""
        return self.steps * self.channels_per_step


@dataclass(frozen=True, eq=False)
class AxisUnits:
    """Which unit owns each index of one axis of a parameter or buffer.

    Attributes:
        axis: The axis.
        units: Unit numbers, -1 where an index belongs to no unit; shape [size], or [size of axis 0, size] where the
            owner depends on the output channel (input axis of a grouped convolution).
        role: What the axis is to the group.
    """

    axis: int
    units: np.ndarray
    role: Role


@dataclass(frozen=True, eq=False)
class Consumer:
    """One contraction that reads units: the place of their gates.

    Attributes:
        contraction: Its running number (see `capture.ContractionMode`).
        operand: Which positional argument of the call is the activation that is gated.
        axis: The channel axis of that argument, counted from the end (negative).
        units: Unit number of each index of that axis, -1 where it belongs to no unit or is merely passed on, as a
            depthwise convolution does; shape [size of the axis].
        weight: Path of the weight that multiplies the channels; empty where it is computed from several.
        module: Path of the module in whose forward the call is.
    """

    contraction: int
    operand: int
    axis: int
    units: np.ndarray
    weight: str
    module: str


@dataclass(frozen=True, eq=False)
class Count:
    """An integer argument of an op that counts channels: an amount of padding, a bound of a window.

    Attributes:
        node: Number of the op in the recorded run.
        value: The integer; below 0 where it counts from the end.
        units: Unit of each channel that it counts, -1 where one belongs to none; None where it does not change.
    """

    node: int
    value: int
    units: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Coupling:
    """All that coupling says about a network.

    Attributes:
        groups: Channel groups, in the order of their first producers.
        unit_count: Units are numbered from 0 below this.
        tensors: Per parameter or buffer path, the owners of its axes.
        consumers: Places of the gates, in the order of execution.
        counts: Integer arguments of ops that count channels, in the order of the ops and of their arguments.
        mixing: Places where statistics are taken over channels (LayerNorm, channel means), so that a slim network is
            not the masked original.
        graph: The recorded run in eval mode.
        sizes: Size of each axis of each of its values as a function of the widths.
        parameters: The same for the parameters, by path.
    """

    groups: tuple[ChannelGroup, ...]
    unit_count: int
    tensors: Mapping[str, tuple[AxisUnits, ...]]
    consumers: tuple[Consumer, ...]
    counts: tuple[Count, ...] = ()
    mixing: tuple[str, ...] = ()
    graph: Graph | None = None
    sizes: SizeOfValue | None = None
    parameters: Mapping[str, tuple[Size, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Give counts; what they count fills pages."""
        free = sum(group.frozen is None for group in self.groups)
        return f"Coupling({len(self.groups):,} channel groups, {free:,} of them free; {self.unit_count:,} units)"


def couple(model: nn.Module, example_input: Any) -> Coupling:
    """Find the channel groups of a network, which is left unchanged.

    Args:
        model: The network, on any device.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments; only sizes and types
            count.

    Raises:
        UnsupportedOp: The forward uses an op without a coupling rule.
        BadInput: The model cannot take the input.
    """
    record = Record()
    with _paused_garbage_collection():
        walk = Walk(capture(model, example_input), record).run()
        training = capture(model, example_input, training=True)
        if training.fingerprint() != walk.graph.fingerprint():
            Walk(training, record).run()
        return _assemble(record, walk, resolve(record), dict(model.named_parameters()))


@contextmanager
def _paused_garbage_collection() -> Iterator[None]:
    """Put off cyclic collections, each of which walks every module of the process and frees nothing here."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def channel_groups(model: nn.Module, example_input: Any) -> tuple[ChannelGroup, ...]:
    """List the channel groups of a network; see `couple`."""
    return couple(model, example_input).groups


def _assemble(record: Record, walk: Walk, units: Components, parameters: Mapping[str, Tensor]) -> Coupling:
    """Collect components into groups and express everything else by unit number."""
    blocks = _blocks(record, units)
    rows_by_group, unit_of_label, owners = _number(blocks, units.of_label)
    tensors, members, channels_per_step = _tensors(record, unit_of_label, owners)
    names = _names(members, len(blocks))
    sizes = ValueSizes([value.shape for value in walk.graph.values], walk.planes, owners)
    summed = summed_groups(walk.graph, sizes)
    groups = tuple(
        ChannelGroup(names[i], rows, channels_per_step.get(i, 1), tuple(members.get(i, ())), reason, i in summed)
        for i, (rows, (_, reason)) in enumerate(zip(rows_by_group, blocks, strict=True))
    )
    may_go = np.array([group.frozen is None for group in groups] + [False])  # the last entry: labels without a group
    counts = [
        Count(node, value, None if labels is None else _counted(unit_of_label[labels.numpy()]))
        for node, arguments in walk.counts.items()
        for value, labels in arguments
    ]
    return Coupling(
        groups,
        sum(len(row) for group in groups for row in group.units),
        tensors,
        _consumers(record, unit_of_label),
        tuple(counts),
        mixing_places(record, may_go[owners.group], unit_of_label),
        walk.graph,
        sizes,
        _parameter_sizes(record, parameters, owners, unit_of_label),
    )


def _counted(units: np.ndarray) -> np.ndarray | None:
    """Units that an integer counts, given for each row of a value; None where only whole rows may go."""
    whole_rows = len(units) > 1 and bool((units == units[:, :1]).all())
    return None if whole_rows else units[0] if len(units) else units.reshape(-1)


def _number(
    blocks: Sequence[Block], of_label: np.ndarray
) -> tuple[list[tuple[tuple[int, ...], ...]], np.ndarray, Owners]:
    """Number the units of each block in turn; also give the unit and the place in its group of each label."""
    size = int(of_label.max()) + 1
    unit, group, fibre, step = (np.full(size, -1, dtype=np.int64) for _ in range(4))
    rows_by_group: list[tuple[tuple[int, ...], ...]] = []
    count = 0
    for index, (rows, _) in enumerate(blocks):
        numbered = []
        for row_index, row in enumerate(rows):
            components = np.asarray(row)
            numbers = np.arange(count, count + len(row))
            unit[components], group[components], fibre[components] = numbers, index, row_index
            step[components] = np.arange(len(row))
            numbered.append(tuple(numbers.tolist()))
            count += len(row)
        rows_by_group.append(tuple(numbered))
    steps = np.array([len(rows[0]) for rows in rows_by_group], dtype=np.int64)
    owners = Owners(group[of_label], fibre[of_label], step[of_label], steps)
    unit_of_label = unit[of_label]
    return rows_by_group, unit_of_label, owners


def _blocks(record: Record, units: Components) -> list[Block]:
    """Components of each group, [fibre][step], and why it is frozen; in the order of first production."""
    written, consumed = (marked(units.of_label, vectors) for vectors in (record.written, record.consumed))
    is_unit = written | consumed
    is_unit[units.of_label[0]] = False
    in_fibres = {component for fibres in units.fibres for row in fibres.rows for component in row}
    first = np.full(len(is_unit), np.iinfo(np.int64).max)
    place, start = 0, dict.fromkeys((entry.tensor for entry in record.axes.values()), -1)
    for entry in record.axes.values():
        flat = units.of_label[entry.labels.reshape(-1).numpy()]
        if start[entry.tensor] < 0:
            start[entry.tensor] = place
        # What a layer reads comes before what it writes.
        ranks = (
            2 * (place + np.arange(len(flat))) + 1 if entry.axis == 0 else np.full(len(flat), 2 * start[entry.tensor])
        )
        np.minimum.at(first, flat, ranks)
        place += len(flat)
    members = np.array([c for c in np.flatnonzero(is_unit).tolist() if c not in in_fibres], dtype=np.int64)
    members = members[np.argsort(first[members], kind="stable")]
    reasons = {reason: number for number, reason in enumerate(dict.fromkeys(units.reason.values()), start=1)}
    why = np.zeros(len(first), dtype=np.uint64)
    for component, reason in units.reason.items():
        why[component] = reasons[reason]
    kind = units.signature[members] * np.uint64(2 * len(reasons) + 3) + why[members]
    _, inverse, counts = np.unique(kind, return_inverse=True, return_counts=True)
    parts = np.split(members[np.argsort(inverse, kind="stable")], np.cumsum(counts)[:-1]) if len(members) else []
    blocks: list[Block] = [((tuple(part.tolist()),), units.reason.get(int(part[0]))) for part in parts]
    blocks.extend((fibres.rows, None) for fibres in units.fibres)
    blocks = [(rows, _ALL_OR_NONE if reason is None and len(rows[0]) == 1 else reason) for rows, reason in blocks]
    return sorted(blocks, key=lambda block: int(first[block[0][0][0]]))


def _tensors(
    record: Record, unit_of_label: np.ndarray, owners: Owners
) -> tuple[dict[str, tuple[AxisUnits, ...]], dict[int, list[Member]], dict[int, int]]:
    """Owners of each tensor's axes, members of each group, and each group's channels per step."""
    written, consumed = record.written_marks().numpy(), np.zeros(record.next_label, dtype=bool)
    for vector in record.consumed:
        consumed[vector.numpy()] = True
    tensors: dict[str, list[AxisUnits]] = {}
    members: dict[int, list[Member]] = {}
    widths: dict[int, int] = {}
    for entry in record.axes.values():
        labels = entry.labels.numpy()
        owned = unit_of_label[labels]
        if not (owned >= 0).any():
            continue
        role: Role = "out" if written[labels].any() else "in" if consumed[labels].any() else "affine"
        tensors.setdefault(entry.tensor, []).append(AxisUnits(entry.axis, owned, role))
        group = owners.group[labels.reshape(-1)]
        counts = np.bincount(group[group >= 0], minlength=len(owners.steps))
        for index in np.flatnonzero(counts).tolist():
            members.setdefault(index, []).append(Member(entry.tensor, entry.axis, role))
            if role == "out" and labels.ndim == 1:
                per_step = int(counts[index]) // int(owners.steps[index])
                widths[index] = min(per_step, widths.get(index, per_step))
    return {name: tuple(axes) for name, axes in tensors.items()}, members, widths


def _names(members: Mapping[int, Sequence[Member]], count: int) -> list[str]:
    """Name each group after the first layer that produces it, numbered where a layer produces several."""
    names: list[str] = []
    taken: dict[str, int] = {}
    for index in range(count):
        own = members.get(index, ())
        first = next((member for member in own if member.role == "out"), next(iter(own), None))
        owner = first.module.partition(".parametrizations.")[0] if first is not None else ""
        name = (owner or first.tensor) if first is not None else "padding"
        if first is not None and first.role == "in":
            name = f"{name}.input"
        taken[name] = taken.get(name, 0) + 1
        names.append(name if taken[name] == 1 else f"{name}#{taken[name]}")
    return names


def _consumers(record: Record, unit_of_label: np.ndarray) -> tuple[Consumer, ...]:
    consumers = []
    for read in record.reads:
        units = unit_of_label[read.labels.numpy()]
        passed = unit_of_label[read.passed_to.numpy()]
        units = np.where(units == passed, -1, units)
        consumers.append(Consumer(read.contraction, read.operand, read.axis, units, read.weight, read.module))
    return tuple(consumers)


def _parameter_sizes(
    record: Record, parameters: Mapping[str, Tensor], owners: Owners, unit_of_label: np.ndarray
) -> dict[str, tuple[Size, ...]]:
    sizes = {name: [Size(extent, {}) for extent in tensor.shape] for name, tensor in parameters.items()}
    for entry in record.axes.values():
        if entry.tensor not in sizes:
            continue
        labels = entry.labels
        if labels.ndim == 2:
            labels = labels[0]
            rows = record.axes.get((entry.tensor, 0))
            if (
                rows is not None
                and (unit_of_label[labels.numpy()] == unit_of_label[int(rows.labels.reshape(-1)[0])]).all()
            ):
                continue
        sizes[entry.tensor][entry.axis] = owners.size(labels)
    return {name: tuple(axes) for name, axes in sizes.items()}


def freeze(coupling: Coupling, reasons: Mapping[str, str]) -> Coupling:
    """Return a coupling in which the named groups are frozen for the given reasons; the original is left unchanged.

    Raises:
        BadInput: A name is no group's.
    """
    unknown = sorted(reasons.keys() - {group.name for group in coupling.groups})
    if unknown:
        raise BadInput(f"no channel group is called {', '.join(unknown)}; `archscan scan` lists the groups")
    groups = tuple(
        replace(group, frozen=reasons[group.name]) if group.name in reasons and group.frozen is None else group
        for group in coupling.groups
    )
    return replace(coupling, groups=groups)


def coupling_graph(coupling: Coupling) -> nx.MultiGraph:
    """Draw the coupling as a graph: groups and layers as nodes, and an edge for each axis that a group cuts in a layer.

    Group nodes are ``("group", name)`` with ``channels``, ``steps`` and ``frozen``; layer nodes are ``("layer",
    path)``; edges carry ``tensor``, ``axis`` and ``role``.
    """
    graph = nx.MultiGraph()
    for group in coupling.groups:
        node = ("group", group.name)
        graph.add_node(node, kind="group", channels=group.channels, steps=group.steps, frozen=group.frozen)
        for member in group.members:
            layer = ("layer", member.module)
            graph.add_node(layer, kind="layer")
            graph.add_edge(node, layer, tensor=member.tensor, axis=member.axis, role=member.role)
    return graph
