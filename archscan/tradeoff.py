"""What every budget would lose: groups, saliency, costs → the curve of loss against cost, and the uniform plan's.

The decision that is not obvious: the curve is not a plan for each of many budgets. The Lagrangian of the planner is
minimised at rising prices of cost, each time from where the last price left it (Shoham and Gersho 1988), which walks
along the lower hull of all plans in the time of a few. Prices are quantiles of what single steps lose per cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from archscan.costs import CostKind, CostModel
from archscan.groups import ChannelGroup
from archscan.knapsack import Problem, State
from archscan.search import descend, uniform
from archscan.widths import WidthRule, choices

PRICES = 24
UNIFORM_POINTS = 12


@dataclass(frozen=True)
class TradeoffPoint:
    """One plan: its cost as a fraction of the dense network's, and the saliency that it loses."""

    kept: float
    lost: float


def tradeoff(
    groups: Sequence[ChannelGroup], saliency_U: np.ndarray, costs: CostModel, kind: CostKind, rule: WidthRule
) -> tuple[tuple[TradeoffPoint, ...], tuple[TradeoffPoint, ...]]:
    """Walk from the dense network to the narrowest one.

    Args:
        groups: All channel groups, in the order of the cost model's widths.
        saliency_U: Saliency of each unit; finite for groups that are not frozen.
        costs: Costs as a function of the groups' kept steps.
        kind: The cost of the horizontal axis.
        rule: Which widths are allowed.

    Returns:
        The best plans and the uniform ones, both from the dense network down; empty where the network costs nothing.

    Raises:
        BadInput: A group that could be cut has a saliency that is not finite.
    """
    dense = costs.evaluate(kind, costs.full_widths_G)
    if dense == 0 or not groups:
        return (), ()
    problem = Problem(choices(groups, np.asarray(saliency_U, np.float64), rule), (costs.quadratic(kind),), (dense,))
    state = State(problem, problem.choices.last_G)
    states = [state]
    for price in _prices(state):
        state = state.copy()
        descend(state, float(price))
        states.append(state)
    return _points(states, dense), _points(_uniform_states(problem, float(states[-1].cost_K[0])), dense)


def _prices(dense: State) -> np.ndarray:
    """Spread prices over what single steps of the dense network lose per cost that they save."""
    steps_GN, losses_GN = dense.steps_GN, dense.losses_GN
    inside_GN = np.arange(steps_GN.shape[1] - 1)[None] < dense.last_G[:, None]
    saved_GN = np.diff(steps_GN, axis=1) * dense.slope_KG[0][:, None]
    usable_GN = inside_GN & (saved_GN > 0)
    lost_GN = np.where(inside_GN, losses_GN[:, :-1], 0.0) - np.where(inside_GN, losses_GN[:, 1:], 0.0)
    if not usable_GN.any():
        return np.zeros(0)
    first = np.quantile(lost_GN[usable_GN] / saved_GN[usable_GN], np.linspace(0, 1, PRICES))
    if first[-1] <= 0:
        return first[-1:]
    least = first[first > 0][0]
    # as other groups shrink a step saves less, so that it goes at a higher price than at first: some prices more
    return np.unique(np.concatenate([first, np.geomspace(least, 64 * first[-1], PRICES)]))


def _uniform_states(problem: Problem, narrowest: float) -> list[State]:
    limits = np.linspace(problem.limits[0], max(narrowest, 1.0), UNIFORM_POINTS)
    posed = [replace(problem, limits=(int(limit),)) for limit in limits]
    return [State(each, uniform(each)) for each in posed]


def _points(states: Sequence[State], dense: int) -> tuple[TradeoffPoint, ...]:
    """Keep the dense network, and the states of which none is both cheaper and better, by falling cost."""
    found: list[TradeoffPoint] = []
    for state in sorted(states, key=lambda state: (-state.cost_K[0], state.loss)):
        point = TradeoffPoint(float(state.cost_K[0]) / dense, max(state.loss, 0.0))
        while len(found) > 1 and found[-1].lost >= point.lost:
            found.pop()
        if not found or point.kept < found[-1].kept:
            found.append(point)
    return tuple(found)
