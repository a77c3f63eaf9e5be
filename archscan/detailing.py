"""Numbers for the pictures of a report: coupling, costs, saliency, plan → layer links and `SaliencyDetail`.

Nothing here runs the network. The decision that is not obvious: where losses of sets do not add up (quadratic set
effects), there is no curve, since the plan's own point would not lie in the same units.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.stats import rankdata

from archscan.costs import CostModel
from archscan.criteria import CRITERIA, score
from archscan.errors import BadInput
from archscan.gate_statistics import GateStatistics, Need
from archscan.groups import ChannelGroup, Coupling
from archscan.planner import Plan
from archscan.report.details import QUANTILES, Agreement, CurvePoint, GroupSaliency, LayerLink, SaliencyDetail
from archscan.tradeoff import TradeoffPoint, tradeoff
from archscan.widths import WidthRule

COMPARED = ("obd", "obs", "taylor-fo", "taylor-abs", "taylor-activation", "evidence", "magnitude")
"""What a criterion is compared with: one of each idea, and none that ranks as another does or takes long to score."""

CHEAP_NEEDS: frozenset[Need] = frozenset({"group", "weight_norm"})
"""Statistics of the weights alone, collected beside what a criterion needs so that there is something to compare."""

DIGITS = 6
"""Significant digits that are kept of a saliency."""


def layer_links(groups: Sequence[ChannelGroup]) -> tuple[LayerLink, ...]:
    """List the layers that read or write channel groups, in the order in which groups name them."""
    reads: dict[str, dict[int, None]] = {}
    writes: dict[str, dict[int, None]] = {}
    for place, group in enumerate(groups):
        for member in group.members:
            if member.role != "affine":
                side = reads if member.role == "in" else writes
                side.setdefault(member.module, {})[place] = None
    paths = dict.fromkeys(member.module for group in groups for member in group.members)
    return tuple(
        LayerLink(path, tuple(reads.get(path, ())), tuple(writes.get(path, ())))
        for path in paths
        if path in reads or path in writes
    )


def saliency_detail(
    groups: Sequence[ChannelGroup],
    costs: CostModel,
    saliency_U: np.ndarray,
    plan: Plan,
    rule: WidthRule,
    agreement: Agreement | None = None,
) -> SaliencyDetail:
    """Spread the saliencies out by group, and price other budgets by them.

    Args:
        groups: All channel groups, in the order of the cost model's widths.
        costs: Costs as a function of the groups' kept steps.
        saliency_U: Saliency of each unit.
        plan: What was decided; its budget names the cost of the curve, MACs where it is on something measured.
        rule: Which widths are allowed.
        agreement: What `agreement_of` found.
    """
    quadratic = costs.quadratic("macs")
    slope_G = quadratic.linear_G + (quadratic.matrix_GG + quadratic.matrix_GG.T) @ costs.full_widths_G
    spread = tuple(_spread(group, saliency_U, float(slope)) for group, slope in zip(groups, slope_G, strict=True))
    if plan.provenance.get("set_effects", "additive") != "additive":
        return SaliencyDetail(spread, agreement=agreement)
    kind: Literal["macs", "params"] = "params" if plan.budget.kind == "params" else "macs"
    best, even = tradeoff(groups, saliency_U, costs, kind, rule)
    return SaliencyDetail(spread, _curve(best), _curve(even), agreement)


def agreement_of(
    used: str, saliency_U: np.ndarray, statistics: GateStatistics, needs: frozenset[Need], coupling: Coupling
) -> Agreement | None:
    """Correlate the ranks that criteria give to the units that may be removed, as far as what was collected allows.

    Args:
        used: The criterion that planned.
        saliency_U: Its saliency of each unit.
        statistics: What was collected.
        needs: What of them is there.
        coupling: Which units may be removed.
    """
    free_U = np.zeros(coupling.unit_count, dtype=bool)
    for group in coupling.groups:
        if group.frozen is None:
            free_U[np.array(group.units).ravel()] = True
    found = {used: saliency_U[free_U]}
    for name in COMPARED:
        if name not in found and CRITERIA[name].needs <= needs:
            try:
                found[name] = score(name, statistics)[free_U]
            except BadInput:  # not for what was collected, such as values that are not finite
                continue
    telling = {name: values for name, values in found.items() if values.size and np.ptp(values) > 0}
    if used not in telling or len(telling) < 2:
        return None
    ranks = np.stack([rankdata(values) for values in telling.values()])
    table = np.corrcoef(ranks)
    return Agreement(tuple(telling), tuple(tuple(round(float(value), 3) for value in row) for row in table))


def _spread(group: ChannelGroup, saliency_U: np.ndarray, slope: float) -> GroupSaliency:
    values_FP = saliency_U[np.array(group.units)]
    if not np.isfinite(values_FP).all():  # only a frozen group's may be
        return GroupSaliency(group.name, (), None)
    quantiles = tuple(_short(value) for value in np.quantile(values_FP, QUANTILES))
    dear = slope > 0 and group.frozen is None
    return GroupSaliency(group.name, quantiles, _short(values_FP.sum(0).mean() / slope) if dear else None)


def _curve(points: Sequence[TradeoffPoint]) -> tuple[CurvePoint, ...]:
    return tuple(CurvePoint(_short(point.kept), _short(point.lost)) for point in points)


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
