"""How far a finding depends on the images, the criterion and the budget: gate statistics → many plans → `Votes`.

One plan on one sample of images says little about a group that lies near a threshold. The plan is made again on
bootstrap samples of the calibration images (Efron 1979: their gate gradients are drawn anew, with replacement, and no
image is run again), by other criteria that read the same statistics, and for other budgets. A judge says of each of
these plans which groups stand out; the share of plans in which a group does is its vote.

The decision that is not obvious: confidence is the least of the three shares. They answer different questions (is the
sample large enough, does the criterion matter, does the budget), and a finding that fails one of them hangs on it.

Shape suffixes: G groups, R plans, U units.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from archscan.budgets import Budget
from archscan.costs import CostModel
from archscan.criteria import criterion as find_criterion
from archscan.criteria import score
from archscan.errors import BadInput, InfeasibleBudget
from archscan.gate_statistics import GateStatistics
from archscan.groups import ChannelGroup
from archscan.planner import planned_widths
from archscan.widths import WidthRule

RESAMPLES = 16
PANEL = ("obd", "taylor-fo", "taylor-abs", "loss-change", "mfac")
"""Criteria that read per-sample gate gradients and nothing else of the images, and differ in what they make of them."""

BUDGETS = (0.8, 0.6, 0.5)
STAND_IN = "obd"
"""What scores bootstrap samples where the run's own criterion reads more than can be drawn anew."""

UNKNOWN = 0.5
"""What a question counts that could not be asked, as for a criterion that reads weights only."""

_DRAWN = frozenset({"gradient", "sample_gradient", "fisher_gradient", "group"})
_FEWEST = 8
"""Fewer samples than this are not resampled."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Votes:
    """Share of plans in which a group stood out; None where there were no such plans.

    Attributes:
        resamples: Of those on bootstrap samples of the images.
        criteria: Of those by other criteria.
        budgets: Of those for other budgets.
    """

    resamples: float | None
    criteria: float | None
    budgets: float | None

    @property
    def confidence(self) -> float | None:
        """The least of the shares, `UNKNOWN` for one that is not there; None where none is."""
        shares = (self.resamples, self.criteria, self.budgets)
        if all(share is None for share in shares):
            return None
        return min(UNKNOWN if share is None else share for share in shares)


@dataclass(frozen=True, eq=False)
class Replans:
    """Kept fraction of each group in plans made in other ways, [R, G] for each way; R may be 0.

    Attributes:
        resampled_RG: On bootstrap samples.
        criteria_RG: By the criteria that `criteria` names.
        budgets_RG: For the kept fractions of the MACs that `budgets` names.
        criteria: Names.
        budgets: Ratios.
    """

    resampled_RG: np.ndarray
    criteria_RG: np.ndarray
    budgets_RG: np.ndarray
    criteria: tuple[str, ...]
    budgets: tuple[float, ...]

    def votes(self, judge: Callable[[np.ndarray], np.ndarray]) -> tuple[Votes, ...]:
        """Let a judge, kept fractions [G] → boolean [G], look at each plan; give the votes of each group."""
        shares = []
        for keep_RG in (self.resampled_RG, self.criteria_RG, self.budgets_RG):
            said_RG = np.array([judge(keep_G) for keep_G in keep_RG])
            shares.append(said_RG.mean(0).tolist() if len(said_RG) else [None] * self.budgets_RG.shape[1])
        return tuple(Votes(*column) for column in zip(*shares, strict=True))


@dataclass(frozen=True, eq=False)
class Planned:
    """A network whose plan is looked at.

    Attributes:
        groups: All channel groups.
        costs: Costs as a function of their kept steps.
        rule: Which widths are allowed.
        saliency_U: Saliency of each unit.
        criterion: What it was measured by.
        ratio: Kept fraction of the MACs that the plan came to.
    """

    groups: Sequence[ChannelGroup]
    costs: CostModel
    rule: WidthRule
    saliency_U: np.ndarray
    criterion: str
    ratio: float


def replan(planned: Planned, statistics: GateStatistics, seed: int, progress: Progress | None = None) -> Replans:
    """Plan again on other samples of the images, by other criteria, for other budgets.

    Args:
        planned: The network, and how its plan came about.
        statistics: What the saliency was computed from.
        seed: Of the bootstrap samples.
        progress: Reports plans done.
    """
    statistics = replace(statistics, group_U=_group_of_unit(planned.groups, statistics.unit_count))
    resample = list(_resampled(planned, statistics, seed))
    others = list(_panel(planned, statistics))
    ratios = [ratio for ratio in BUDGETS if abs(ratio - planned.ratio) > 0.02]
    total, done = len(resample) + len(others) + len(ratios), 0

    def keep(saliency: Callable[[], np.ndarray], ratio: float) -> np.ndarray | None:
        nonlocal done
        done += 1
        try:
            found = _keep(planned, saliency(), ratio)
        except (BadInput, InfeasibleBudget):  # a budget out of reach, or a score that is not finite: no vote
            found = None
        if progress is not None:
            progress(done, total)
        return found

    own = [keep(saliency, planned.ratio) for saliency in resample]
    by_name = {name: keep(saliency, planned.ratio) for name, saliency in others}
    by_ratio = {ratio: keep(lambda: planned.saliency_U, ratio) for ratio in ratios}
    count = len(planned.groups)
    return Replans(
        _stacked(own, count),
        _stacked(by_name.values(), count),
        _stacked(by_ratio.values(), count),
        tuple(name for name, plan in by_name.items() if plan is not None),
        tuple(ratio for ratio, plan in by_ratio.items() if plan is not None),
    )


def _stacked(plans: Iterable[np.ndarray | None], groups: int) -> np.ndarray:
    return np.array([plan for plan in plans if plan is not None]).reshape(-1, groups)


def _group_of_unit(groups: Sequence[ChannelGroup], unit_count: int) -> np.ndarray:
    group_U = np.full(unit_count, -1)
    for number, group in enumerate(groups):
        group_U[np.array(group.units)] = number
    return group_U


def _keep(planned: Planned, saliency_U: np.ndarray, ratio: float) -> np.ndarray:
    widths_G = planned_widths(planned.groups, saliency_U, planned.costs, Budget("macs", ratio), planned.rule)
    return np.asarray(widths_G / planned.costs.full_widths_G)


Saliency = Callable[[], np.ndarray]


def _resampled(planned: Planned, statistics: GateStatistics, seed: int) -> Iterator[Saliency]:
    """Score bootstrap samples of the images."""
    if statistics.sample_gradient_NU is None and statistics.fisher_gradient_NU is None:
        return
    if statistics.samples < _FEWEST:
        return
    needs = find_criterion(planned.criterion).needs
    name = planned.criterion if needs <= _DRAWN and needs - {"group"} else STAND_IN
    if not _has(statistics, name):
        return
    for number in range(RESAMPLES):
        draw = np.random.default_rng([seed, number]).integers(statistics.samples, size=statistics.samples)
        yield lambda draw=draw: score(name, _drawn(statistics, draw))  # type: ignore[misc]


def _drawn(statistics: GateStatistics, draw_N: np.ndarray) -> GateStatistics:
    """Take these samples in place of those that were there, in batches of the same sizes."""
    gradient_NU, fisher_NU = (
        None if rows_NU is None else rows_NU[draw_N]
        for rows_NU in (statistics.sample_gradient_NU, statistics.fisher_gradient_NU)
    )
    edges = np.cumsum(statistics.batch_sizes)[:-1]
    by_batch = None
    if gradient_NU is not None:
        by_batch = np.stack([part.mean(0, dtype=np.float64) for part in np.split(gradient_NU, edges)])
    return replace(statistics, gradient_BU=by_batch, sample_gradient_NU=gradient_NU, fisher_gradient_NU=fisher_NU)


def _panel(planned: Planned, statistics: GateStatistics) -> Iterator[tuple[str, Saliency]]:
    """Score by other criteria, on the statistics that are there."""
    if statistics.sample_gradient_NU is None:
        return
    every = _drawn(statistics, np.arange(statistics.samples))
    for name in PANEL:
        if name != planned.criterion:
            yield name, lambda name=name: score(name, every)  # type: ignore[misc]


def _has(statistics: GateStatistics, name: str) -> bool:
    gradient = statistics.sample_gradient_NU is not None
    known = {"group", "gradient", "sample_gradient"} if gradient else {"group"}
    if statistics.fisher_gradient_NU is not None:
        known.add("fisher_gradient")
    return find_criterion(name).needs <= known
