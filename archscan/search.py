"""Choose the widths that lose least within a cost: `Problem` → one column of its choices per group.

    minimise  sum over g of loss_g(w_g)   subject to   C(w) <= limit,   C(w) = c + b·w + w' M w

Losses are convex in each width, the cost is bilinear in coupled widths, so this is a knapsack with coupled prices.
Several starts are each made feasible, filled up and improved: the uniform plan; the Lagrangian, minimised by
coordinate descent over groups at a fixed price of cost, which is bisected (Everett 1963; Shoham and Gersho 1988 for
bit allocation); and random restarts from the best so far.

The decision that is not obvious: because the cost is a quadratic form, the gradient of the cost is kept up to date in
one vector, so that the price of any change of one or two groups is a few multiplications, exact in float64 below
2^53.
"""

import copy
from dataclasses import dataclass, replace

import numpy as np

from archscan.costs import Quadratic
from archscan.widths import Choices

BISECTIONS = 24
SWEEPS = 20
EXCHANGES = 400
PAIRED_MOVES = 192
"""Changes of one group that an exchange pairs with each other, roughly; more would cost time quadratically."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What to choose from, what it costs, and what it may cost.

    Attributes:
        choices: Allowed widths and their losses.
        price: The cost as a function of the widths.
        limit: The cost that must not be exceeded.
    """

    choices: Choices
    price: Quadratic
    limit: int


class State:
    """A choice of widths with its cost and the cost's gradient; `move` keeps all three in step."""

    def __init__(self, problem: Problem, column_G: np.ndarray) -> None:
        self.steps_GN, self.losses_GN = problem.choices.steps_GN, problem.choices.losses_GN
        self.last_G, self.limit = problem.choices.last_G, problem.limit
        matrix_GG = problem.price.matrix_GG.astype(np.float64)
        self.curvature_G = np.ascontiguousarray(np.diag(matrix_GG))
        self.coupling_GG = matrix_GG + matrix_GG.T
        self.rows = np.arange(len(column_G))
        self.column_G = column_G.copy()
        width_G = self.width_G.astype(np.float64)
        self.slope_G = problem.price.linear_G + self.coupling_GG @ width_G
        self.cost = float(problem.price.constant + problem.price.linear_G @ width_G + width_G @ matrix_GG @ width_G)

    def copy(self) -> "State":
        """Make an independent state; the problem's tables are shared."""
        twin = copy.copy(self)
        twin.column_G, twin.slope_G = self.column_G.copy(), self.slope_G.copy()
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
    def slack(self) -> float:
        """What may still be spent; negative where the limit is exceeded."""
        return self.limit - self.cost

    def move(self, group: int, column: int) -> None:
        """Give one group another of its widths."""
        steps = float(self.steps_GN[group, column] - self.steps_GN[group, self.column_G[group]])
        self.cost += steps * (self.slope_G[group] + steps * self.curvature_G[group])
        self.slope_G += steps * self.coupling_GG[group]
        self.column_G[group] = column

    def changes(self, offset: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """For a move by `offset` columns: the groups that can, and their changes of steps, loss and cost."""
        target_G = self.column_G + offset
        groups = np.flatnonzero((target_G >= 0) & (target_G <= self.last_G))
        now, then = self.column_G[groups], target_G[groups]
        steps = (self.steps_GN[groups, then] - self.steps_GN[groups, now]).astype(np.float64)
        loss = self.losses_GN[groups, then] - self.losses_GN[groups, now]
        return groups, steps, loss, steps * (self.slope_G[groups] + steps * self.curvature_G[groups])


def fill(state: State) -> None:
    """Widen one step at a time, most loss recovered per cost first, until no step of any group fits."""
    while True:
        groups, _, loss, cost = state.changes(+1)
        fits = cost <= state.slack
        if not fits.any():
            return
        groups, gain = groups[fits], -loss[fits] / np.maximum(cost[fits], 0.5)
        best = groups[gain == gain.max()]
        group = best[np.argmin(state.width_G[best] / state.steps_GN[best, -1])]
        state.move(int(group), int(state.column_G[group]) + 1)


def shrink(state: State) -> None:
    """Narrow one step at a time, least loss per cost saved first, until the limit is met, which it can be."""
    while state.slack < 0:
        groups, _, loss, cost = state.changes(-1)
        saves = cost < 0
        group = groups[saves][np.argmin(loss[saves] / -cost[saves])]
        state.move(int(group), int(state.column_G[group]) - 1)


def uniform(problem: Problem) -> np.ndarray:
    """Choose the widths nearest to one keep ratio, the largest that the limit allows, then fill evenly."""
    steps_GN = problem.choices.steps_GN
    full_G = steps_GN[:, -1:]
    even = replace(problem, choices=replace(problem.choices, losses_GN=np.zeros(steps_GN.shape)))

    def at(ratio: float) -> State:
        return State(even, np.argmin(np.abs(steps_GN - ratio * full_G), axis=1))

    low, high, state = 0.0, 1.0, at(0.0)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        trial = at(middle)
        if trial.slack >= 0:
            low, state = middle, trial
        else:
            high = middle
    fill(state)
    return state.column_G


def descend(state: State, price: float) -> None:
    """Minimise loss + price · cost over one group at a time until no group gains."""
    for _ in range(SWEEPS):
        moved = False
        for group in range(len(state.column_G)):
            last, column = state.last_G[group], state.column_G[group]
            if last == 0:
                continue
            steps_N = state.steps_GN[group, : last + 1] - state.steps_GN[group, column]
            cost_N = steps_N * (state.slope_G[group] + steps_N * state.curvature_G[group])
            best = int(np.argmin(state.losses_GN[group, : last + 1] + price * cost_N))
            if best != column:
                state.move(group, best)
                moved = True
        if not moved:
            return


def lagrangian(start: State) -> list[State]:
    """Bisect the price of cost; return the last states on either side of the limit, both made feasible."""
    finite = np.where(np.isfinite(start.losses_GN), start.losses_GN, 0.0)
    high = max(float(np.abs(finite).sum()), 1e-300) / max(start.cost, 1.0)
    low, over, under = 0.0, start, None
    for _ in range(BISECTIONS):
        price = high if under is None else high / 16 if low == 0 else (low * high) ** 0.5
        trial = start.copy()
        descend(trial, price)
        if trial.slack >= 0:
            high, under = price, trial
        else:
            low, over = price, trial
            high = price * 16 if under is None else high
    found = [over.copy()] if under is None else [under, over.copy()]
    for state in found:
        shrink(state)
        fill(state)
    return found


def exchange(state: State) -> State:
    """Narrow one group to widen another where that recovers loss within the limit, until no exchange does."""
    movable = max(int((state.last_G > 0).sum()), 1)
    reach = min(max(PAIRED_MOVES // movable, 1), state.steps_GN.shape[1] - 1)
    for _ in range(EXCHANGES):
        trial = state.copy()
        if not _best_exchange(trial, reach):
            break
        fill(trial)
        if not trial.loss < state.loss:
            break
        state = trial
    return state


def _best_exchange(state: State, reach: int) -> bool:
    """Do the exchange that recovers most loss, of moves of up to `reach` columns; whether there was one."""
    if reach < 1:
        return False
    down = [np.concatenate(parts) for parts in zip(*(_labelled(state, -n) for n in range(1, reach + 1)), strict=True)]
    up = [np.concatenate(parts) for parts in zip(*(_labelled(state, n) for n in range(1, reach + 1)), strict=True)]
    loss = down[2][:, None] + up[2][None]
    loss[~(loss < -1e-12 * (abs(state.loss) + 1e-300))] = np.inf
    cost = down[3][:, None] + up[3][None] + np.outer(down[1], up[1]) * state.coupling_GG[np.ix_(down[0], up[0])]
    loss[(cost > state.slack) | (down[0][:, None] == up[0][None])] = np.inf
    if loss.size == 0 or not np.isfinite(loss.min()):
        return False
    narrowed, widened = np.unravel_index(int(np.argmin(loss)), loss.shape)
    for side, row in ((down, narrowed), (up, widened)):
        group = int(side[0][row])
        state.move(group, int(state.column_G[group] + side[4][row]))
    return True


def _labelled(state: State, offset: int) -> tuple[np.ndarray, ...]:
    changes = state.changes(offset)
    return (*changes, np.full(len(changes[0]), offset))


def search(problem: Problem, *, seed: int, restarts: int) -> np.ndarray:
    """Choose widths; the result loses no more than `uniform`, and no single step of any group still fits.

    Args:
        problem: Must be feasible at the narrowest widths.
        seed: Of the random restarts.
        restarts: How many.

    Returns:
        Column of `problem.choices` for each group.
    """
    narrow = State(problem, np.zeros_like(problem.choices.last_G))
    wide = State(problem, problem.choices.last_G)
    best = exchange(State(problem, uniform(problem)))
    for candidate in (*lagrangian(wide), *lagrangian(narrow)):
        best = min(best, exchange(candidate), key=_loss_rounded)
    generator = np.random.default_rng(seed)
    movable = np.flatnonzero(problem.choices.last_G > 0)
    for _ in range(restarts if len(movable) > 1 else 0):
        candidate = best.copy()
        for group in generator.choice(movable, size=min(2, len(movable)), replace=False):
            candidate.move(int(group), int(generator.integers(problem.choices.last_G[group] + 1)))
        shrink(candidate)
        fill(candidate)
        best = min(best, exchange(candidate), key=_loss_rounded)
    return best.column_G


def _loss_rounded(state: State) -> float:
    """A loss to eleven digits: the order of summation must not decide between equals."""
    return float(f"{state.loss:.11g}")
