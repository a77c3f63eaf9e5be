"""Which widths a group may have, and what each loses: groups, saliency, `WidthRule` → `Choices`.

Data format: widths are counted in steps of a group (`ChannelGroup.steps`), rounding and floors in channels. Row g of
a `Choices` table lists the widths of group g in ascending order; short rows are padded on the right with the full
width and an infinite loss.

Units that an earlier round of slimming removed are `gone`: they go first and cost nothing more, and a group gets no
wider than they leave it. So rounding and floors refer to the widths of the original network in every round.

The decision that is not obvious: the loss of a width is the sum of the lowest saliencies *of each fibre*, not of the
lowest steps: fibres (the groups of a grouped convolution) must keep equal counts, but each may keep other units.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from archscan.errors import BadInput
from archscan.groups import ChannelGroup

AUTO_ROUNDING = (8, 4, 2, 1)
"""What ``auto`` rounds to, in channels: the first that leaves a group at least `AUTO_WIDTHS` widths."""

AUTO_WIDTHS = 8

DEFAULT_FLOOR = 0.0
"""Fraction of its full width that a group keeps at least, beside one rounding step, where no minimum width is given."""


@dataclass(frozen=True)
class WidthRule:
    """Which widths are allowed.

    Attributes:
        round_to: Widths are multiples of this many channels (or the full width); None chooses 8, 4, 2 or 1 by group.
        min_width: Fewest channels that a group keeps; None keeps one rounding step.
        measured: What widths are multiples of where `round_to` is None, by name of the group, for groups of which that
            was measured (see `latency.steps`).
    """

    round_to: int | None = None
    min_width: int | None = None
    measured: Mapping[str, int] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name, value in (("rounding", self.round_to), ("minimum width", self.min_width)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise BadInput(f"the {name} is {value!r}; it must be a whole number of channels, 1 or more")


@dataclass(frozen=True, eq=False)
class Choices:
    """Widths to choose from, and the saliency that each loses.

    Attributes:
        steps_GN: Allowed widths of each group in steps, ascending, padded with the full width.
        losses_GN: Summed saliency of the units that the width removes, padded with infinity.
        last_G: Column of the full width.
    """

    steps_GN: np.ndarray
    losses_GN: np.ndarray
    last_G: np.ndarray


def allowed_steps(group: ChannelGroup, rule: WidthRule) -> list[int]:
    """List the widths that a group may have, in steps, ascending; the full width is always the last."""
    if group.frozen is not None:
        return [group.steps]
    multiple = _steps_per_multiple(group, rule.round_to or rule.measured.get(group.name))
    if rule.min_width is None:
        floor = max(multiple, math.ceil(DEFAULT_FLOOR * group.steps))
    else:
        floor = math.ceil(rule.min_width / group.channels_per_step)
    below_full = range(multiple, group.steps, multiple)
    return [*(steps for steps in below_full if steps >= floor), group.steps]


def _steps_per_multiple(group: ChannelGroup, round_to: int | None) -> int:
    """Fewest steps whose channels are a multiple of the rounding."""
    for multiple in AUTO_ROUNDING if round_to is None else (round_to,):
        steps = math.lcm(multiple, group.channels_per_step) // group.channels_per_step
        if round_to is not None or group.steps // steps >= AUTO_WIDTHS:
            return steps
    return 1


def choices(
    groups: Sequence[ChannelGroup], saliency_U: np.ndarray, rule: WidthRule, gone_U: np.ndarray | None = None
) -> Choices:
    """Tabulate the allowed widths of all groups and what each loses.

    Args:
        groups: Channel groups.
        saliency_U: Saliency of each unit.
        rule: Which widths are allowed.
        gone_U: Which units are gone, boolean; None where all are there. A frozen group gets them back.

    Raises:
        BadInput: A group that could be cut has a saliency that is not finite.
    """
    rows = [_up_to(allowed_steps(group, rule), _ceiling(group, gone_U)) for group in groups]
    longest = max((len(row) for row in rows), default=1)
    steps_GN = np.zeros((len(rows), longest), dtype=np.int64)
    losses_GN = np.full((len(rows), longest), np.inf)
    for number, (group, row) in enumerate(zip(groups, rows, strict=True)):
        steps_GN[number] = row[-1]
        steps_GN[number, : len(row)] = row
        losses_GN[number, : len(row)] = _losses(group, saliency_U, gone_U)[group.steps - np.array(row)]
    return Choices(steps_GN, losses_GN, np.array([len(row) - 1 for row in rows], dtype=np.int64))


def _ceiling(group: ChannelGroup, gone_U: np.ndarray | None) -> int:
    """Count the steps that every fibre still has."""
    if gone_U is None or group.frozen is not None:
        return group.steps
    return int((~gone_U[np.array(group.units)]).sum(1).min())


def _up_to(widths: list[int], ceiling: int) -> list[int]:
    """Leave out the widths above a ceiling; where all are, the narrowest stays."""
    return [width for width in widths if width <= ceiling] or widths[:1]


def _losses(group: ChannelGroup, saliency_U: np.ndarray, gone_U: np.ndarray | None) -> np.ndarray:
    """Least summed saliency by the number of removed steps, 0 to all."""
    if group.frozen is not None:
        return np.zeros(group.steps + 1)
    saliency_FP = saliency_U[np.array(group.units)]
    if not np.isfinite(saliency_FP).all():
        bad = int((~np.isfinite(saliency_FP)).sum())
        raise BadInput(
            f"the saliency of {bad} of {saliency_FP.size} units of group {group.name} is not finite; look for "
            "NaN or huge values in its weights, or choose another criterion"
        )
    sorted_FP = np.sort(_gone_first(saliency_FP, group, gone_U), axis=1)
    lost_FP = np.cumsum(np.where(np.isfinite(sorted_FP), sorted_FP, 0.0), axis=1)
    return np.concatenate([[0.0], lost_FP.sum(axis=0)])


def _gone_first(saliency_FP: np.ndarray, group: ChannelGroup, gone_U: np.ndarray | None) -> np.ndarray:
    return saliency_FP if gone_U is None else np.where(gone_U[np.array(group.units)], -np.inf, saliency_FP)


def best_steps(
    group: ChannelGroup, saliency_U: np.ndarray, steps: int, gone_U: np.ndarray | None = None
) -> tuple[tuple[int, ...], ...]:
    """Choose the steps of highest saliency within each fibre, sorted by index; among equals the lower index is kept."""
    if steps == group.steps:
        return (tuple(range(steps)),) * len(group.units)
    saliency_FP = _gone_first(saliency_U[np.array(group.units)], group, gone_U)
    order_FP = np.argsort(-saliency_FP, axis=1, kind="stable")
    return tuple(tuple(row) for row in np.sort(order_FP[:, :steps], axis=1).tolist())
