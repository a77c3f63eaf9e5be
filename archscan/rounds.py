"""Slim in rounds: budget, number of rounds → a budget for each; a slim network's coupling in terms of the original's.

Every round plans part of the way, cuts, repairs, and scores what is left on the repaired network, so that the next one
knows what the first ones changed. Each round cuts the *original*, to what its plan and those before it keep, and is
repaired anew: so the last network is compared with the masked original and priced like any other, and is saved and
loaded as one slimming.

The decision that is not obvious: the slim network is not analysed again. Its units are the original's that stayed,
under their old numbers, so that saliencies of all rounds are about the same units, and widths keep the original's rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from archscan.errors import BadInput
from archscan.groups import AxisUnits, ChannelGroup, Consumer, Coupling
from archscan.planner import Budget
from archscan.surgery import Cut, Kept, kept_units, surgery_for

MAX_ROUNDS = 64


@dataclass(frozen=True)
class Round:
    """One round of a slimming.

    Attributes:
        ratio: Target of the round, as a fraction of the dense cost.
        macs: Cost of the network that it planned, per image.
        params: Likewise.
        units: How many units stay.
        saliency_lost: Summed saliency of the units that this round removed, as it scored them.
        max_abs_error: Largest difference between its network and the masked original, before repair; None where the
            comparison does not apply.
        recovery: What was repaired, as a clause; None where nothing was.
    """

    ratio: float
    macs: int
    params: int
    units: int
    saliency_lost: float
    max_abs_error: float | None
    recovery: str | None


def budgets(budget: Budget, rounds: int) -> tuple[Budget, ...]:
    """Divide the way to a budget into geometric steps of the dense cost; the last is the budget itself.

    Raises:
        BadInput: The number of rounds is not a whole number from 1 to `MAX_ROUNDS`.
    """
    if type(rounds) is not int or not 1 <= rounds <= MAX_ROUNDS:
        raise BadInput(f"the number of rounds is {rounds!r}; it must be a whole number from 1 to {MAX_ROUNDS}")
    parts = [replace(budget, ratio=budget.ratio ** (number / rounds)) for number in range(1, rounds)]
    return (*parts, budget)


def gone_units(coupling: Coupling, kept: Kept) -> np.ndarray:
    """Say of every unit whether a plan removes it; shape [U]."""
    return ~kept_units(coupling, kept)[: coupling.unit_count]


def remaining(coupling: Coupling, kept: Kept) -> Coupling:
    """Describe the slim network as the original's coupling describes the original, with the same unit numbers.

    What gates and weight statistics read is there: groups, consumers, owners of axes. The recorded run is not.

    Args:
        coupling: What coupling said about the original.
        kept: Kept steps of every channel group, per fibre.
    """
    stays = kept_units(coupling, kept)
    cuts = surgery_for(coupling, kept).cuts
    tensors = {name: tuple(axes) for name, axes in coupling.tensors.items()}
    for name, listed in cuts.items():
        tensors[name] = tuple(_cut_axis(axis, listed) for axis in tensors[name])
    return replace(
        coupling,
        groups=tuple(_cut_group(group, kept) for group in coupling.groups),
        consumers=tuple(_cut_consumer(consumer, stays) for consumer in coupling.consumers),
        tensors=tensors,
        graph=None,
        sizes=None,
        counts=(),
    )


def _cut_group(group: ChannelGroup, kept: Kept) -> ChannelGroup:
    fibres = zip(group.units, kept[group.name], strict=True)
    return replace(group, units=tuple(tuple(units[step] for step in steps) for units, steps in fibres))


def _cut_consumer(consumer: Consumer, stays: np.ndarray) -> Consumer:
    return replace(consumer, units=consumer.units[stays[consumer.units]])


def _cut_axis(owners: AxisUnits, cuts: Sequence[Cut]) -> AxisUnits:
    """Cut one axis; where its owners depend on the row, the rows that go are cut first."""
    units = owners.units
    for cut in sorted(cuts, key=lambda cut: cut.axis):
        index = np.array(cut.kept)
        if cut.axis == 0 and units.ndim == 2:
            units = units[index]
        elif cut.axis == owners.axis:
            units = np.take_along_axis(units, index, axis=1) if index.ndim == 2 else units[..., index]
    return replace(owners, units=units)
