"""Widths at which the hardware has its steps: coupling, share → what widths of each group are multiples of.

Around the share of its width that a group is to keep, all convolutions and products that read or write its channels are
measured at a width that is a multiple of 32, and at widths that are smaller by q = 16, 8, 4, 2, 1 and so multiples of q
only. Widths may be multiples of q as long as time per channel there is no more than that of the best. The decision that
is not obvious: q goes from coarse to fine and stops at the first that costs more, so that noise, which only ever adds
time, leaves widths too coarse, which costs little, and not odd, which may cost half of the time again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from archscan.graph import Node
from archscan.groups import ChannelGroup, Coupling
from archscan.latency.model import replayed_ms
from archscan.latency.replay import Shaped, shaped, timed_nodes
from archscan.latency.timing import LatencySetup, Step

FINER = (1, 2, 4, 8, 16)
"""Channels by which widths are made narrower."""

LEAST_WIDTHS = 8
"""A group keeps at least so many widths to choose from."""

TOLERANCE = 0.01
"""What time per channel may exceed that of the best width by, and half of what padding q channels would add."""

_PRODUCTS = frozenset(
    {
        torch.ops.aten.convolution.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.mm.default,
        torch.ops.aten.bmm.default,
    }
)


@dataclass(frozen=True)
class _Probe:
    """The layers around one group at one of its widths.

    Attributes:
        group: Number of the group.
        finer: Channels below the width that it starts from; 0 for that itself.
        channels: Its width.
        ops: The layers.
    """

    group: int
    finer: int
    channels: int
    ops: tuple[Shaped, ...]


def width_steps(coupling: Coupling, setup: LatencySetup, share: float, step: Step | None = None) -> Mapping[str, int]:
    """Measure which widths are worth having.

    Args:
        coupling: Groups, the recorded run and its sizes.
        setup: Batch, threads, memory format and device.
        share: Kept share of the widths around which to look.
        step: Told how many of how many layers are done.

    Returns:
        By name of each group that may be slimmed, the number of channels that its widths are to be multiples of.
    """
    graph, size_of = coupling.graph, coupling.sizes
    assert graph is not None
    assert size_of is not None
    nodes = [graph.nodes[place] for place in timed_nodes(graph) if graph.nodes[place].op in _PRODUCTS]
    start_G = np.array([_start(group, share) // group.channels_per_step for group in coupling.groups], dtype=np.int64)
    probes = []
    for place, group in enumerate(coupling.groups):
        if group.frozen is not None:
            continue
        around = [node for node in nodes if _depends(coupling, node, place)]
        for finer in (0, *_finer(group, share)):
            widths_G = start_G.copy()
            widths_G[place] -= finer // group.channels_per_step
            ops = tuple(shaped(graph, size_of, node, widths_G.tolist(), setup.batch) for node in around)
            probes.append(_Probe(place, finer, _start(group, share) - finer, ops))
    taken = replayed_ms({op.key: op for probe in probes for op in probe.ops}, setup, step)
    found = {}
    for place, group in enumerate(coupling.groups):
        times = {
            probe.finer: sum(taken.get(op.key, 0.0) for op in probe.ops) for probe in probes if probe.group == place
        }
        if times:
            found[group.name] = _multiple(group, _start(group, share), times)
    return found


def _start(group: ChannelGroup, share: float) -> int:
    """Choose the width to start from, in channels: a multiple of what is not finer than any step that is tried."""
    if group.frozen is not None:
        return group.channels
    coarse = next((2 * finer for finer in FINER[::-1] if group.channels >= 2 * finer * 2), 1)
    coarse = max(coarse, group.channels_per_step)
    return min(max(round(share * group.channels / coarse), 1) * coarse, group.channels)


def _finer(group: ChannelGroup, share: float) -> Sequence[int]:
    """List by how many channels the group is made narrower."""
    start = _start(group, share)
    return [
        finer
        for finer in FINER
        if finer % group.channels_per_step == 0 and finer < start and group.channels >= 2 * finer * LEAST_WIDTHS
    ]


def _multiple(group: ChannelGroup, start: int, times: Mapping[int, float]) -> int:
    """Go from coarse to fine until a width costs more per channel; `times` are by channels below the start."""
    per_channel = {finer: time / (start - finer) for finer, time in times.items()}
    finest = max(group.channels_per_step, 2 * max(times))
    for finer in sorted(times, reverse=True)[:-1]:
        tolerance = min(TOLERANCE, 0.5 * finer / start)
        if per_channel[finer] > (1 + tolerance) * min(per_channel.values()):
            return finest
        finest = finer
    return finest


def _depends(coupling: Coupling, node: Node, place: int) -> bool:
    assert coupling.sizes is not None
    numbers = (*node.tensors, *(number for number in node.outputs if number is not None))
    return any(place in size.per_step for number in numbers for size in coupling.sizes(number))
