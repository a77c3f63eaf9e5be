"""Time as a function of widths that do not exist yet: recorded run, sizes → `LatencyModel` → `Quadratic`.

Every distinct op of the run is measured by itself at a few widths of what it reads and of what it writes, and its time
is fitted, with coefficients that are not negative, by

    t = a + b · elements read + c · elements written + d · MACs:

overhead, memory traffic and arithmetic, a roofline of its own for each shape of layer. Elements are linear in a
group's width and MACs bilinear in two, so the sum over the run is a quadratic form in the widths, as other costs are,
that never grows where a width shrinks. The decision that is not obvious: coefficients belong to the ops of the run and
not to the groups, so that a model still holds when groups are frozen or tied after it was measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls

from archscan.costs import Quadratic
from archscan.errors import UnsupportedOp
from archscan.graph import Graph, Node
from archscan.groups import ChannelGroup, Coupling
from archscan.latency.cache import kept_table
from archscan.latency.replay import Shaped, replay_ms, shaped, timed_nodes
from archscan.latency.timing import LatencySetup, Step, threads, versions
from archscan.mac_table import MAC_HANDLES, Call
from archscan.sizes import Size, SizeOfValue

TICKS = 2.0**48
"""Units of the dense network's time: prices are whole numbers, and their sums exact in float64."""

BOTH = ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5), (0.75, 0.75), (0.5, 0.5), (0.25, 0.25))
ONE = ((1.0, 1.0), (0.75, 0.75), (0.5, 0.5), (0.25, 0.25))
"""Kept shares of what an op reads, and of what it writes, at which it is measured."""

PASSES = 3

GRAIN = 8
"""Measured widths are multiples of so many channels where a group is wide enough."""


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Fitted times of the ops of one run.

    Attributes:
        graph: The run.
        setup: How they were measured.
        coefficients: By node: milliseconds, and milliseconds per element read, per element written, per MAC.
        unmodelled: Ops that do not run by themselves, and count nothing, in the order of execution.
    """

    graph: Graph
    setup: LatencySetup
    coefficients: Mapping[int, tuple[float, float, float, float]]
    unmodelled: tuple[str, ...]

    def quadratic(self, size_of: SizeOfValue, full_widths_G: np.ndarray) -> Quadratic:
        """Price widths, in `TICKS` of the dense network's time by this model.

        Args:
            size_of: Size of each axis of each value of the run, for any groups.
            full_widths_G: Kept steps of every group in the dense network.

        Raises:
            UnsupportedOp: Some op's MACs are a product of three sizes that all depend on widths.
        """
        constant, linear_G = 0.0, np.zeros(len(full_widths_G))
        matrix_GG = np.zeros((len(full_widths_G),) * 2)
        for place, found in self.coefficients.items():
            node = self.graph.nodes[place]
            for slope, feature in zip(found, _features(self.graph, size_of, node, self.setup.batch), strict=True):
                for scale, sizes in feature if slope > 0 else ():
                    constant += _accumulate((slope * scale, sizes), linear_G, matrix_GG, node.where())
        dense = constant + linear_G @ full_widths_G + full_widths_G @ matrix_GG @ full_widths_G
        unit = TICKS / max(float(dense), 1e-12)
        whole = (np.rint(part * unit).astype(np.int64) for part in (linear_G, matrix_GG))
        return Quadratic(round(constant * unit), *whole)


Product = tuple[float, tuple[Size, ...]]
"""A number times the product of some sizes."""


def _features(graph: Graph, size_of: SizeOfValue, node: Node, batch: int) -> tuple[list[Product], ...]:
    """Write what an op's time depends on as sums of products: 1, elements read, elements written, MACs."""

    def grown(number: int) -> float:
        """Say by which factor the batch exceeds the recorded one."""
        return batch / graph.batch_size if graph.values[number].per_sample else 1.0

    first = next(number for number in node.outputs if number is not None)
    read = [(grown(number), size_of(number)) for number in node.tensors if graph.values[number].per_sample]
    handle = MAC_HANDLES.get(node.op._schema.name)
    factors = None if handle is None else handle(Call(node, size_of))
    macs = [] if factors is None else [(grown(first), tuple(_as_size(factor) for factor in factors))]
    return [(1.0, ())], read, [(grown(first), size_of(first))], macs


def _as_size(factor: int | Size) -> Size:
    return Size(factor, {}) if isinstance(factor, int) else factor


def _value(products: Sequence[Product], widths_G: np.ndarray) -> float:
    return sum(scale * math.prod(size.at(widths_G) for size in sizes) for scale, sizes in products)


def _accumulate(product: Product, linear_G: np.ndarray, matrix_GG: np.ndarray, where: str) -> float:
    """Add a product to a quadratic form in place; return what it adds to the constant."""
    scale, sizes = product
    varying = [size for size in sizes if size.per_step]
    scale *= math.prod(size.constant for size in sizes if not size.per_step)
    if len(varying) > 2:
        raise UnsupportedOp(f"{where} costs a product of three widths; protect one of its channel groups")
    rows = [(list(size.per_step), np.array(list(size.per_step.values()), dtype=np.float64)) for size in varying]
    for (groups, slope), other in zip(rows, varying[::-1], strict=True):
        linear_G[groups] += scale * slope * (other.constant if len(varying) == 2 else 1)
    if len(rows) == 2:
        matrix_GG[np.ix_(rows[0][0], rows[1][0])] += scale * np.outer(rows[0][1], rows[1][1])
    return scale * math.prod(size.constant for size in varying)


def latency_model(coupling: Coupling, setup: LatencySetup, step: Step | None = None) -> LatencyModel:
    """Measure the ops of a network at a few widths, but those that were measured before, and fit their times.

    Args:
        coupling: Groups, the recorded run and its sizes.
        setup: Batch, threads, memory format and device (the CPU where none is named).
        step: Told how many of how many ops are done.
    """
    graph, size_of = coupling.graph, coupling.sizes
    assert graph is not None
    assert size_of is not None
    places = timed_nodes(graph)
    variants = {place: _variants(coupling, graph, size_of, graph.nodes[place]) for place in places}
    needed = {
        op.key: op
        for place in places
        for op in (shaped(graph, size_of, graph.nodes[place], widths_G, setup.batch) for widths_G in variants[place])
    }
    taken = replayed_ms(needed, setup, step)
    coefficients: dict[int, tuple[float, float, float, float]] = {}
    unmodelled: dict[str, None] = {}
    for place in places:
        node = graph.nodes[place]
        features = _features(graph, size_of, node, setup.batch)
        points = [
            (taken[key], [_value(feature, widths_G) for feature in features])
            for widths_G in variants[place]
            if (key := shaped(graph, size_of, node, widths_G, setup.batch).key) in taken
        ]
        if points:
            coefficients[place] = _fit(points)
        else:
            unmodelled[node.op._schema.name] = None
    return LatencyModel(graph, setup, coefficients, tuple(unmodelled))


def replayed_ms(needed: Mapping[str, Shaped], setup: LatencySetup, step: Step | None = None) -> dict[str, float]:
    """Measure ops by themselves, but those that were measured before; what does not run is left out.

    All are measured in some passes, so that a busy moment of the machine does not hit all runs of one op.
    """
    device = torch.device(setup.device or "cpu")
    with threads(setup), kept_table("ops", {**versions(device), "format": setup.format}) as table:
        missing = [key for key in needed if key not in table]
        for number, key in enumerate(missing * PASSES, start=1):
            if (found := replay_ms(needed[key], setup, device)) is not None:
                table[key] = min(found, table.get(key, found))
            if step is not None:
                step(number, len(missing) * PASSES)
        return {key: table[key] for key in needed if key in table}


def _variants(coupling: Coupling, graph: Graph, size_of: SizeOfValue, node: Node) -> list[np.ndarray]:
    """List widths of all groups at which an op is measured: what it reads and what it writes get other shares."""
    read, written = (
        {group for number in numbers if number is not None for size in size_of(number) for group in size.per_step}
        for numbers in ([number for number in node.tensors if graph.values[number].per_sample], node.outputs[:1])
    )
    free = {place for place, group in enumerate(coupling.groups) if group.frozen is None}
    alone = (read - written) & free
    found = {}
    for share_read, share_written in BOTH if alone and written & free else ONE:
        widths_G = np.array([group.steps for group in coupling.groups], dtype=np.int64)
        for place in (read | written) & free:
            widths_G[place] = near(coupling.groups[place], share_read if place in alone else share_written)
        found[widths_G.tobytes()] = widths_G
    return list(found.values())


def near(group: ChannelGroup, share: float) -> int:
    """Choose a width near a share of a group's own, in steps: a multiple of `GRAIN` channels where it is wide."""
    grain = max(GRAIN // group.channels_per_step, 1)
    grain = grain if group.steps >= 4 * grain else 1
    return group.steps if share == 1 else max(round(share * group.steps / grain) * grain, 1)


def _fit(points: Sequence[tuple[float, Sequence[float]]]) -> tuple[float, float, float, float]:
    """Fit times by non-negative least squares of their relative errors (Lawson and Hanson 1974)."""
    time_V = np.array([time for time, _ in points])
    feature_VF = np.array([features for _, features in points], dtype=np.float64)
    scale_F = np.maximum(feature_VF.max(axis=0), 1e-300)
    found_F, _ = nnls(feature_VF / scale_F / time_V[:, None], np.ones(len(time_V)))
    overhead, read, written, macs = (found_F / scale_F).tolist()
    return overhead, read, written, macs
