"""Which steps of a channel group a wider one copies: group, factor, saliency → the source of each new step.

Data format: as in `surgery.Kept`, a group that gets wider keeps all its steps, some of them more than once, side by
side. The decision that is not obvious: where a width is no multiple of the old one, the steps of highest saliency get
one copy more, since they are what there is too little of.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np

from archscan.costs import CostModel
from archscan.errors import BadInput
from archscan.groups import ChannelGroup
from archscan.surgery import MAX_REPEATS

Sources = Mapping[str, tuple[tuple[int, ...], ...]]
"""Name of a group that gets wider → per fibre, the source of each step."""

ROUNDING = 8
"""Widths are multiples of this many channels, or of its largest divisor that the old width is a multiple of."""

WIDENED = "widened"
"""Why a group gives nothing up while others pay."""


@dataclass(frozen=True)
class Stretched:
    """A network as the planner has to see it while some of its groups are wider.

    Attributes:
        groups: All groups; the wider ones have their new steps, and are frozen.
        costs: The cost model with their widths as the full ones.
    """

    groups: tuple[ChannelGroup, ...]
    costs: CostModel


def wider_steps(group: ChannelGroup, factor: float, rounding: int = ROUNDING) -> int:
    """Say how many steps a group has after widening, at least one more than before."""
    multiple = math.gcd(group.channels, rounding)
    steps = math.lcm(multiple, group.channels_per_step) // group.channels_per_step
    wider = round(factor * group.steps / steps) * steps
    return min(wider if wider > group.steps else group.steps + steps, MAX_REPEATS * group.steps)


def sources_of(
    group: ChannelGroup, factor: float, saliency_U: np.ndarray, rounding: int = ROUNDING
) -> tuple[tuple[int, ...], ...]:
    """List the source of each step of a group that gets wider, per fibre.

    Args:
        group: One that is not frozen.
        factor: New width over old.
        saliency_U: Saliency of each unit.
        rounding: The new width is a multiple of this, as far as the old one is.
    """
    often, more = divmod(wider_steps(group, factor, rounding), group.steps)
    saliency_FP = saliency_U[np.array(group.units)]
    ranks_FP = np.argsort(np.argsort(-saliency_FP, axis=1, kind="stable"), axis=1)
    return tuple(tuple(np.repeat(np.arange(group.steps), often + (ranks < more)).tolist()) for ranks in ranks_FP)


def named(groups: Sequence[ChannelGroup], patterns: Sequence[str]) -> list[ChannelGroup]:
    """List the groups whose names match one of `patterns`; a path stands for all below it too.

    Raises:
        BadInput: A pattern matches no group, or none that may change.
    """
    found: dict[str, ChannelGroup] = {}
    for pattern in patterns:
        hits = [group for group in groups if any(fnmatchcase(group.name, p) for p in (pattern, f"{pattern}.*"))]
        if not hits:
            close = difflib.get_close_matches(pattern, [group.name for group in groups], n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "look at the groups that a scan lists"
            raise BadInput(f"no channel group is called {pattern!r}; {hint}")
        free = [group for group in hits if group.frozen is None]
        if not free:
            meant = next((group for group in hits if group.name == pattern), hits[0])
            raise BadInput(f"{meant.name} cannot get wider: {meant.frozen}; name another group")
        found.update((group.name, group) for group in free)
    return [group for group in groups if group.name in found]


def all_sources(groups: Sequence[ChannelGroup], sources: Sources) -> dict[str, tuple[tuple[int, ...], ...]]:
    """List the source of every step of all groups; those that stay as they are in full."""
    return {group.name: sources.get(group.name, (tuple(range(group.steps)),) * len(group.units)) for group in groups}


def evenly(fibres: Sequence[Sequence[int]]) -> bool:
    """Say whether every step of a group has equally many copies."""
    return len({count for steps in fibres for count in np.bincount(steps).tolist()}) == 1


def stretched(groups: Sequence[ChannelGroup], costs: CostModel, sources: Sources) -> Stretched:
    """Show the planner a network in which some groups are wider, and stay so."""
    shown = []
    for group in groups:
        if group.name in sources:
            rows = zip(group.units, sources[group.name], strict=True)
            wider = tuple(tuple(units[step] for step in steps) for units, steps in rows)
            group = replace(group, units=wider, frozen=WIDENED)
        shown.append(group)
    full_G = np.array([group.steps for group in shown], dtype=np.int64)
    return Stretched(tuple(shown), replace(costs, full_widths_G=full_G))
