"""Slim in rounds: budget, number of rounds → a budget for each; a slim network's coupling in terms of the original's.

Every round plans part of the way, cuts, repairs, and scores what is left on the repaired network, so that the next one
knows what the first ones changed. Each round cuts the *original*, to what its plan and those before it keep, and is
repaired anew: so the last network is compared with the masked original and priced like any other, and is saved and
loaded as one slimming. Where a network was trained after a round, the next one cuts the original with the trained
weights put back in their places, and repairs towards the trained network.

The decision that is not obvious: the slim network is not analysed again. Its units are the original's that stayed,
under their old numbers, so that saliencies of all rounds are about the same units, and widths keep the original's rule.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from archscan.errors import BadInput, RebuildMismatch
from archscan.groups import AxisUnits, ChannelGroup, Consumer, Coupling
from archscan.planner import Budget
from archscan.rebuild import sliced
from archscan.surgery import Cut, Kept, Surgery, kept_units, named_tensors, surgery_for

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


def check_rounds(rounds: int) -> None:
    """See that a number of rounds makes sense.

    Raises:
        BadInput: It is not a whole number from 1 to `MAX_ROUNDS`.
    """
    if type(rounds) is not int or not 1 <= rounds <= MAX_ROUNDS:
        raise BadInput(f"rounds is {rounds!r}; it must be a whole number from 1 to {MAX_ROUNDS}")


def budgets(budget: Budget, rounds: int) -> tuple[Budget, ...]:
    """Divide the way to a budget into geometric steps of the dense cost; the last is the budget itself.

    Raises:
        BadInput: See `check_rounds`.
    """
    check_rounds(rounds)

    def part(of: Budget, number: int) -> Budget:
        return replace(of, ratio=of.ratio ** (number / rounds), also=tuple(part(each, number) for each in of.also))

    return (*(part(budget, number) for number in range(1, rounds)), budget)


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


def put_back(original: nn.Module, slim: nn.Module, surgery: Surgery) -> nn.Module:
    """Copy a network, with the values of the slim one in the places that they came from; the rest stays.

    Args:
        original: The network that was cut.
        slim: What came of it, with other weights by now.
        surgery: What was cut, nothing repeated.

    Raises:
        RebuildMismatch: The slim network is not what the surgery gives.
    """
    result = copy.deepcopy(original)
    tensors, values = dict(named_tensors(result)), dict(named_tensors(slim))
    cuts = {id(tensors[name]): listed for name, listed in surgery.cuts.items()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            places = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
            places = sliced(places, cuts.get(id(tensor), ()), name)
            if name not in values or values[name].shape != places.shape:
                raise RebuildMismatch(f"{name} cannot be put back; the slim network was changed since it was cut")
            whole: Tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
            whole.view(-1)[places] = values[name].detach().to(whole)
            tensor.copy_(whole)
    return result


def rows_between(before: Surgery, after: Surgery) -> Surgery:
    """Say which rows of the tensors that one surgery left another one keeps, both being of the same original.

    Args:
        before: The one that kept more.
        after: The one that kept less.

    Returns:
        A surgery of the network that the first one left, with the cuts of axis 0 only.
    """
    cuts = {}
    for name in after.cuts:
        first, rows = before.kept_rows(name), after.kept_rows(name)
        if rows is not None:
            places = rows if first is None else np.searchsorted(first, rows).tolist()
            cuts[name] = (Cut(0, tuple(places)),)
    return Surgery(cuts)


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
