"""What an audit removes: coupling → single units over all groups, sets of them drawn at random, and whole plans.

The decision that is not obvious: units are drawn group by group, the first unit of every group before the second of
any, so that a small sample still says something of each group; a large group is not drawn more than a small one until
the small one has no unit left. Sets come in two kinds, since a sum of saliencies fails in two ways: units of one group
replace each other, and layers in a row spoil each other's input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from archscan.errors import BadInput, InfeasibleBudget
from archscan.groups import ChannelGroup, Coupling
from archscan.planner import Budget, plan
from archscan.replan import priced
from archscan.widths import WidthRule

Kind = Literal["unit", "set of one group", "set of several groups", "own plan"]

LEAST_SHARE, MOST_SHARE = 0.05, 0.3
"""Of a group's units, what a set takes at least and at most."""


@dataclass(frozen=True)
class Ablation:
    """Units that are removed at once.

    Attributes:
        kind: How they were drawn.
        units: Their numbers, ascending.
        groups: Numbers of the groups that they come from, ascending.
    """

    kind: Kind
    units: tuple[int, ...]
    groups: tuple[int, ...]


def draw_units(coupling: Coupling, count: int, seed: int) -> tuple[Ablation, ...]:
    """Draw single units, group by group in turn; all of them where there are no more than `count`.

    Raises:
        BadInput: No group is free.
    """
    rng = np.random.default_rng([seed, 0])
    waiting = {number: rng.permutation(units).tolist() for number, units in free_units(coupling).items()}
    drawn: list[Ablation] = []
    while waiting and len(drawn) < count:
        # The last turn reaches some groups only; which ones is left to chance, not to their depth.
        for number in rng.permutation(sorted(waiting)).tolist():
            drawn.append(Ablation("unit", (waiting[number].pop(),), (number,)))
            if not waiting[number]:
                del waiting[number]
    return tuple(sorted(drawn[:count], key=lambda ablation: ablation.units))


def draw_sets(coupling: Coupling, count: int, seed: int) -> tuple[Ablation, ...]:
    """Draw sets of units, every second one of a single group, the others of two groups up to all of them.

    Of each group that a set touches it takes a share between `LEAST_SHARE` and `MOST_SHARE`, the same for all of them.
    Groups that have too few units for two to go are left out of the sets of one group.
    """
    rng = np.random.default_rng([seed, 1])
    free = free_units(coupling)
    wide = [number for number, units in free.items() if round(MOST_SHARE * len(units)) >= 2]
    drawn: list[Ablation] = []
    for turn in range(count):
        share = rng.uniform(LEAST_SHARE, MOST_SHARE)
        if (turn % 2 == 0 or len(free) < 2) and wide:
            number = wide[int(rng.integers(len(wide)))]
            drawn.append(_set("set of one group", free, [number], share, rng, least=2))
        elif len(free) >= 2:
            several = rng.choice(sorted(free), int(rng.integers(2, len(free) + 1)), replace=False).tolist()
            drawn.append(_set("set of several groups", free, several, share, rng, least=1))
    return tuple(drawn)


def own_plan(coupling: Coupling, saliency_U: np.ndarray, kept: float, seed: int) -> Ablation | None:
    """Take the units that slimming to a fraction of the MACs would remove by these saliencies.

    Returns:
        None where not even the narrowest widths get there.
    """
    if coupling.graph is None or coupling.sizes is None:
        raise BadInput("the coupling has no recorded run to price widths by; make it with archscan.couple")
    try:
        made = plan(coupling.groups, saliency_U, priced(coupling), Budget("macs", kept), WidthRule(), seed=seed)
    except InfeasibleBudget:
        return None
    gone: dict[int, list[int]] = {}
    for number, group in enumerate(coupling.groups):
        for fibre, steps in zip(group.units, made.kept[group.name], strict=True):
            gone.setdefault(number, []).extend(sorted(set(fibre) - {fibre[step] for step in steps}))
    units = sorted(unit for removed in gone.values() for unit in removed)
    return Ablation("own plan", tuple(units), tuple(number for number, removed in gone.items() if removed))


def free_units(coupling: Coupling) -> dict[int, list[int]]:
    """List the units of each group that may be slimmed and of which one can go, by the group's number.

    Raises:
        BadInput: There is none.
    """
    read = {unit for consumer in coupling.consumers for unit in consumer.units.tolist()}
    free = {
        number: sorted(units)
        for number, group in enumerate(coupling.groups)
        if group.frozen is None and len(units := [unit for unit in _units(group) if unit in read]) > 1
    }
    if not free:
        raise BadInput("no channel group of the model is free to be slimmed, so that there is nothing to audit")
    return free


def _units(group: ChannelGroup) -> list[int]:
    return [unit for fibre in group.units for unit in fibre]


def _set(
    kind: Kind, free: dict[int, list[int]], numbers: Sequence[int], share: float, rng: np.random.Generator, least: int
) -> Ablation:
    units: list[int] = []
    for number in numbers:
        take = min(len(free[number]) - 1, max(least, round(share * len(free[number]))))
        units += rng.choice(free[number], take, replace=False).tolist()
    return Ablation(kind, tuple(sorted(units)), tuple(sorted(numbers)))
