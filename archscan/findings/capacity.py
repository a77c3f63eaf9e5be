"""Where a network is too narrow for what it has learned: widths before and after planning → `Bottleneck`s.

Everything here is plain numbers; the plan has already been made over all groups at once. A group that keeps nearly
all its units while the network as a whole gives many up could not give any: that is a capacity bottleneck (SOSP,
Nonnenmacher et al. 2022, fig. 3). The decision that is not obvious: "nearly all" is relative to what the network gave.
A group stands out when it lost at most a third of the network's loss, so that one rule holds for gentle and for hard
budgets. Frozen groups, groups of few channels and cheap ones are not called bottlenecks, and neither are groups that
stand out in this plan but not in most plans made in other ways (see `confidence`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STANDS_OUT = 1 / 3
"""A bottleneck lost at most this fraction of what the network lost."""

TINY = 1 / 4
"""A group whose MAC share is below this fraction of an even share over all free groups is too cheap to matter."""

FEW = 8
"""A group of fewer channels is too narrow for its keep ratio to say anything."""

SURE = 0.5
"""A bottleneck stands out in at least this share of the plans made in other ways."""

GAVE_ENOUGH = 0.02
"""Below this fraction of lost units a network was hardly slimmed, and keeping everything says nothing about a group."""


@dataclass(frozen=True)
class GroupUse:
    """What the plan did with one channel group.

    Attributes:
        name: Path of the first layer that produces the channels.
        units: Full width.
        kept: Width after planning.
        floor: The narrowest width that the rules allow.
        frozen: Whether nothing could be removed, whatever its saliency.
        macs_share: Fraction of the dense network's MACs in layers that read or write the group's channels.
    """

    name: str
    units: int
    kept: int
    floor: int
    frozen: bool
    macs_share: float


@dataclass(frozen=True)
class Bottleneck:
    """A group that could not give up capacity while the network could.

    Attributes:
        group: Its name.
        keep_ratio: Fraction of its units that the plan keeps.
        network_keep_ratio: The same over all groups that were free to shrink.
        macs_share: Fraction of the dense network's MACs in layers that read or write its channels.
        sentence: What was seen, why it matters, what to do.
        confidence: Share of the plans made in other ways in which it stands out, see `confidence`; None where there
            were none.
    """

    group: str
    keep_ratio: float
    network_keep_ratio: float
    macs_share: float
    sentence: str
    confidence: float | None = None


def network_keep_ratio(groups: Sequence[GroupUse]) -> float:
    """Return the kept fraction of the units of all groups that were free to shrink; 1 where there are none."""
    free = [group for group in groups if not group.frozen]
    units = sum(group.units for group in free)
    return sum(group.kept for group in free) / units if units else 1.0


def stands_out(keep: float, network_keep_ratio: float) -> bool:
    """Say whether a kept fraction is far above the network's; False where the network hardly gave anything."""
    loss = 1 - network_keep_ratio
    return loss >= GAVE_ENOUGH and 1 - keep <= STANDS_OUT * loss


def standing_out(keeps: Sequence[float], network_keep_ratio: float) -> list[bool]:
    """Say of each free group whether it stands out; where more than half would, it is the others that are odd."""
    found = [stands_out(keep, network_keep_ratio) for keep in keeps]
    return found if 2 * sum(found) <= len(found) else [False] * len(found)


def capacity_bottlenecks(
    groups: Sequence[GroupUse], network_keep_ratio: float, confidence: Mapping[str, float] | None = None
) -> tuple[Bottleneck, ...]:
    """Rank the groups that kept far more than the network did.

    Args:
        groups: Every group of the network, frozen ones included.
        network_keep_ratio: Kept fraction over all free groups (see the function of that name).
        confidence: Group name → share of the plans made in other ways in which it stands out; those below `SURE` are
            left out. Groups that it lacks are taken as they are.

    Returns:
        The bottlenecks, those that stand farthest above the network first; among equals, the costliest first.
    """
    confidence = confidence or {}
    free = [group for group in groups if not group.frozen]
    odd = [
        group
        for group in free
        if group.units > group.floor
        and group.units >= FEW
        and stands_out(group.kept / group.units, network_keep_ratio)
        and group.macs_share * len(free) >= TINY
    ]
    if 2 * len(odd) > len(free):
        return ()
    found = [group for group in odd if confidence.get(group.name, 1.0) >= SURE]
    found.sort(key=lambda group: (-group.kept / group.units, -group.macs_share, group.name))
    return tuple(_bottleneck(group, network_keep_ratio, confidence.get(group.name)) for group in found)


def what_was_seen(group: str, units: int, kept: int, network: float) -> str:
    """Say as a clause what a group gave up."""
    gave = "gave up none" if kept == units else f"gave up only {units - kept:,}"
    return f"{group} {gave} of its {units:,} channels while the network kept {100 * network:.1f}% of its own"


def why_it_matters(macs_share: float) -> str:
    """Say as a sentence what hangs on a group."""
    return (
        f"By their saliency its channels are the hardest to spare, and the layers around them do "
        f"{100 * macs_share:.1f}% of the MACs, so it limits both accuracy and any smaller budget."
    )


def _bottleneck(group: GroupUse, network: float, confidence: float | None) -> Bottleneck:
    seen, matters = what_was_seen(group.name, group.units, group.kept, network), why_it_matters(group.macs_share)
    remedy = f"Try widening it to {2 * group.units:,} channels, and pay for that with the groups that gave most."
    keep_ratio, sentence = group.kept / group.units, f"{seen}. {matters} {remedy}"
    return Bottleneck(group.name, keep_ratio, network, group.macs_share, sentence, confidence)
