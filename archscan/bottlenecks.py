"""Where a network is too narrow for what it has learned: widths before and after planning → ranked `Bottleneck`s.

Everything here is plain numbers; the plan has already been made over all groups at once. A group that keeps nearly
all its units while the network as a whole gives many up could not give any: that is a capacity bottleneck (SOSP,
Nonnenmacher et al. 2022, fig. 3). The decision that is not obvious: "nearly all" is relative to what the network gave.
A group stands out when it lost at most a third of the network's loss, so that one rule holds for gentle and for hard
budgets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

STANDS_OUT = 1 / 3
"""A bottleneck lost at most this fraction of what the network lost."""

TINY = 1 / 4
"""A group whose MAC share is below this fraction of an even share over all free groups is too cheap to matter."""

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
    """

    group: str
    keep_ratio: float
    network_keep_ratio: float
    macs_share: float
    sentence: str


def network_keep_ratio(groups: Sequence[GroupUse]) -> float:
    """Return the kept fraction of the units of all groups that were free to shrink; 1 where there are none."""
    free = [group for group in groups if not group.frozen]
    units = sum(group.units for group in free)
    return sum(group.kept for group in free) / units if units else 1.0


def capacity_bottlenecks(groups: Sequence[GroupUse], network_keep_ratio: float) -> tuple[Bottleneck, ...]:
    """Rank the groups that kept far more than the network did.

    Args:
        groups: Every group of the network, frozen ones included.
        network_keep_ratio: Kept fraction over all free groups (see the function of that name).

    Returns:
        The bottlenecks, those that stand farthest above the network first; among equals, the costliest first.
    """
    network_loss = 1 - network_keep_ratio
    if network_loss < GAVE_ENOUGH:
        return ()
    free = [group for group in groups if not group.frozen]
    found = [
        group
        for group in free
        if group.units > group.floor
        and 1 - group.kept / group.units <= STANDS_OUT * network_loss
        and group.macs_share * len(free) >= TINY
    ]
    found.sort(key=lambda group: (-group.kept / group.units, -group.macs_share, group.name))
    return tuple(_finding(group, network_keep_ratio) for group in found)


def _finding(group: GroupUse, network: float) -> Bottleneck:
    kept = group.kept / group.units
    gave = "gave up none" if group.kept == group.units else f"gave up only {group.units - group.kept}"
    seen = (
        f"{group.name} {gave} of its {group.units:,} channels while the network kept {100 * network:.1f}% of its own."
    )
    matters = (
        f"By their saliency its channels are the hardest to spare, and the layers around them do "
        f"{100 * group.macs_share:.1f}% of the MACs, so it limits both accuracy and any smaller budget."
    )
    remedy = f"Try widening it to {2 * group.units:,} channels, and pay for that with the groups that gave most."
    return Bottleneck(group.name, kept, network, group.macs_share, f"{seen} {matters} {remedy}")
