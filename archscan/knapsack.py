"""A choice of widths and what it costs: `Problem` → `State`, which is moved from choice to choice; see `search`.

The decision that is not obvious: because a cost is a quadratic form, its gradient is kept up to date in one vector, so
that the price of any change of one or two groups is a few multiplications, exact in float64 below 2^53.
"""

import copy
from dataclasses import dataclass

import numpy as np

from archscan.costs import Quadratic
from archscan.widths import Choices

LANDING = 0.005
"""Share of the limit that may be left unspent where the width steps allow to spend it."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What to choose from, what it costs, and what it may cost.

    Attributes:
        choices: Allowed widths and their losses.
        prices: The costs as functions of the widths, at least one.
        limits: What each must not exceed.
    """

    choices: Choices
    prices: tuple[Quadratic, ...]
    limits: tuple[int, ...]


class State:
    """A choice of widths with its costs and their gradients; `move` keeps all three in step."""

    def __init__(self, problem: Problem, column_G: np.ndarray) -> None:
        self.steps_GN, self.losses_GN = problem.choices.steps_GN, problem.choices.losses_GN
        self.last_G = problem.choices.last_G
        self.limit_K = np.array(problem.limits, dtype=np.float64)
        # a cost counts as a share of its limit, in units of the first one: a single cost as it is
        self.weight_K = self.limit_K[0] / np.maximum(self.limit_K, 0.5) if len(self.limit_K) > 1 else np.ones(1)
        matrix_KGG = np.stack([price.matrix_GG for price in problem.prices]).astype(np.float64)
        self.curvature_KG = np.ascontiguousarray(np.diagonal(matrix_KGG, axis1=1, axis2=2))
        self.coupling_KGG = matrix_KGG + matrix_KGG.transpose(0, 2, 1)
        self.rows = np.arange(len(column_G))
        self.column_G = column_G.copy()
        width_G = self.width_G.astype(np.float64)
        linear_KG = np.stack([price.linear_G for price in problem.prices]).astype(np.float64)
        constant_K = np.array([price.constant for price in problem.prices], dtype=np.float64)
        self.slope_KG = linear_KG + self.coupling_KGG @ width_G
        self.cost_K = constant_K + linear_KG @ width_G + matrix_KGG @ width_G @ width_G

    def copy(self) -> "State":
        """Make an independent state; the problem's tables are shared."""
        twin = copy.copy(self)
        twin.column_G, twin.slope_KG, twin.cost_K = self.column_G.copy(), self.slope_KG.copy(), self.cost_K.copy()
        return twin

    @property
    def width_G(self) -> np.ndarray:
        """Chosen widths in steps."""
        return self.steps_GN[self.rows, self.column_G]

    @property
    def loss(self) -> float:
        """Saliency lost, summed over groups."""
        return float(self.losses_GN[self.rows, self.column_G].sum())

    @property
    def slack_K(self) -> np.ndarray:
        """What may still be spent; negative where a limit is exceeded."""
        return self.limit_K - self.cost_K

    @property
    def feasible(self) -> bool:
        """Whether no limit is exceeded."""
        return bool((self.cost_K <= self.limit_K).all())

    @property
    def gap(self) -> int:
        """How far the cost is below the limit, in whole multiples of `LANDING`; 0 where it landed, or need not."""
        return int(self.gaps(self.slack_K))

    def gaps(self, slack_K: np.ndarray) -> np.ndarray:
        """Count the same for any slacks; their first axis is that of the costs."""
        if len(self.limit_K) > 1:
            return np.zeros(slack_K.shape[1:])
        gaps: np.ndarray = np.floor(slack_K[0] / max(LANDING * float(self.limit_K[0]), 0.5))
        return gaps

    def move(self, group: int, column: int) -> None:
        """Give one group another of its widths."""
        steps = float(self.steps_GN[group, column] - self.steps_GN[group, self.column_G[group]])
        self.cost_K += steps * (self.slope_KG[:, group] + steps * self.curvature_KG[:, group])
        self.slope_KG += steps * self.coupling_KGG[:, group]
        self.column_G[group] = column

    def changes(self, offset: int) -> "Changes":
        """List the moves of one group by `offset` columns."""
        target_G = self.column_G + offset
        groups = np.flatnonzero((target_G >= 0) & (target_G <= self.last_G))
        now, then = self.column_G[groups], target_G[groups]
        steps = (self.steps_GN[groups, then] - self.steps_GN[groups, now]).astype(np.float64)
        loss = self.losses_GN[groups, then] - self.losses_GN[groups, now]
        cost_KC = steps * (self.slope_KG[:, groups] + steps * self.curvature_KG[:, groups])
        return Changes(groups, then, steps, loss, cost_KC)


@dataclass(frozen=True, eq=False)
class Changes:
    """Moves of one group each.

    Attributes:
        groups: Which group moves.
        columns: To which of its columns.
        steps: Change of its width.
        loss: Change of the loss.
        cost_KC: Change of each cost.
    """

    groups: np.ndarray
    columns: np.ndarray
    steps: np.ndarray
    loss: np.ndarray
    cost_KC: np.ndarray


def fill(state: State) -> None:
    """Widen one step at a time, most loss recovered per cost first, until no step of any group fits."""
    while True:
        wider = state.changes(+1)
        fits = (wider.cost_KC <= state.slack_K[:, None]).all(axis=0)
        if not fits.any():
            return
        groups = wider.groups[fits]
        gain = -wider.loss[fits] / np.maximum(state.weight_K @ wider.cost_KC[:, fits], 0.5)
        best = groups[gain == gain.max()]
        group = best[np.argmin(state.width_G[best] / state.steps_GN[best, -1])]
        state.move(int(group), int(state.column_G[group]) + 1)


def shrink(state: State, spared: int = -1) -> None:
    """Narrow one step at a time, least loss per cost saved first, until the limits are met or nothing saves.

    Args:
        state: Changed in place.
        spared: Group that keeps its width.
    """
    while not state.feasible:
        narrower = state.changes(-1)
        exceeded = state.slack_K < 0
        saved = -(state.weight_K[exceeded] @ narrower.cost_KC[exceeded])
        saves = (saved > 0) & (narrower.groups != spared)
        if not saves.any():
            return
        group = narrower.groups[saves][np.argmin(narrower.loss[saves] / saved[saves])]
        state.move(int(group), int(state.column_G[group]) - 1)
