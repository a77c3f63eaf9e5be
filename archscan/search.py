"""Choose the widths that lose least within limits: `Problem` → one column of its choices per group.

    minimise  sum over g of loss_g(w_g)   subject to   C_k(w) <= limit_k,   C_k(w) = c_k + b_k·w + w' M_k w

Losses are convex in each width, costs are bilinear in coupled widths: a knapsack with coupled prices. Several starts
are each made feasible, filled up and improved: the uniform plan; the Lagrangian, minimised by coordinate descent
over groups at a fixed price of cost, which is bisected (Everett 1963; Shoham and Gersho 1988 for bit allocation); and
random restarts from the best so far. Where there are few combinations, all are tried instead. Where there are several
limits, one price is set on a weighted sum of the costs, and the weight of a cost that stays below its limit is lowered
until only those that bind have a say.

The least loss may lie well below the limit, where one more step of a costly group does not fit. A plan is then landed:
widths are exchanged at least loss until the cost is within `LANDING` of the limit, as long as no more is lost than by
the uniform plan. Of several limits most are not reached by any good plan, and there the loss alone decides.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from archscan.costs import Quadratic
from archscan.knapsack import Changes, Problem, State, fill, shrink

BISECTIONS = 24
SWEEPS = 20
EXCHANGES = 400
PAIRED_MOVES = 192
"""Changes of one group that an exchange pairs with each other, roughly; more would cost time quadratically."""

WEIGHINGS = 6
"""How often the weights of several costs are set anew."""

SHARPNESS = 4
"""Power of the unspent share of a limit by which the weight of its cost falls."""

ALL_COMBINATIONS = 20_000
"""Combinations of widths, up to which all are tried."""

RIPPLES = 6


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
        if trial.feasible:
            low, state = middle, trial
        else:
            high = middle
    fill(state)
    return state.column_G


def descend(state: State, price: float) -> None:
    """Minimise loss + price · weighted cost over one group at a time until no group gains."""
    for _ in range(SWEEPS):
        moved = False
        for group in range(len(state.column_G)):
            last, column = state.last_G[group], state.column_G[group]
            if last == 0:
                continue
            steps_N = state.steps_GN[group, : last + 1] - state.steps_GN[group, column]
            slope, curvature = state.weight_K @ state.slope_KG[:, group], state.weight_K @ state.curvature_KG[:, group]
            cost_N = steps_N * (slope + steps_N * curvature)
            best = int(np.argmin(state.losses_GN[group, : last + 1] + price * cost_N))
            if best != column:
                state.move(group, best)
                moved = True
        if not moved:
            return


def lagrangian(start: State) -> list[State]:
    """Bisect the price of cost, with weights of the costs that find out which limits bind; return feasible states."""
    found = _bisected(start)
    for _ in range(WEIGHINGS if len(start.limit_K) > 1 else 0):
        closest = min(found, key=lambda state: state.loss)
        start = start.copy()
        spent_K = np.maximum(closest.cost_K, 0.5) / np.maximum(closest.limit_K, 0.5)
        start.weight_K = start.weight_K * (spent_K / spent_K.max()) ** SHARPNESS
        again = _bisected(start)
        found = found + again
        if min(state.loss for state in again) >= closest.loss:
            break
    return found


def _bisected(start: State) -> list[State]:
    """Bisect the price of cost; return the last states on either side of the limits, both made feasible."""
    finite = np.where(np.isfinite(start.losses_GN), start.losses_GN, 0.0)
    high = max(float(np.abs(finite).sum()), 1e-300) / max(float(start.weight_K @ start.cost_K), 1.0)
    low, over, under = 0.0, start, None
    for _ in range(BISECTIONS):
        price = high if under is None else high / 16 if low == 0 else (low * high) ** 0.5
        trial = start.copy()
        descend(trial, price)
        if trial.feasible:
            high, under = price, trial
        else:
            low, over = price, trial
            high = price * 16 if under is None else high
    found = [over.copy()] if under is None else [under, over.copy()]
    for state in found:
        shrink(state)
        fill(state)
    return found


def exchange(state: State, *, landing: bool = False) -> State:
    """Narrow one group to widen another where that recovers loss within the limit, until no exchange does.

    Args:
        state: Left unchanged.
        landing: Prefer what lands closer to the limit to what loses less.
    """
    movable = max(int((state.last_G > 0).sum()), 1)
    reach = min(max(PAIRED_MOVES // movable, 1), state.steps_GN.shape[1] - 1)
    for _ in range(EXCHANGES):
        trial = state.copy()
        if not _best_exchange(trial, reach, landing=landing):
            break
        fill(trial)
        if not _rank(trial, landing=landing) < _rank(state, landing=landing):
            break
        state = trial
    return state


def _best_exchange(state: State, reach: int, *, landing: bool) -> bool:
    """Do the exchange that is best, of moves of up to `reach` columns; whether there was one."""
    if reach < 1:
        return False
    down, up = (_together([state.changes(sign * n) for n in range(1, reach + 1)]) for sign in (-1, +1))
    loss = down.loss[:, None] + up.loss[None]
    cost_KDU = down.cost_KC[:, :, None] + up.cost_KC[:, None]
    cost_KDU += np.outer(down.steps, up.steps) * state.coupling_KGG[:, down.groups[:, None], up.groups]
    slack_KDU = state.slack_K[:, None, None] - cost_KDU
    gap = state.gaps(slack_KDU) - state.gap if landing else np.zeros(loss.shape)
    gains = (gap < 0) | ((gap == 0) & (loss < -1e-12 * (abs(state.loss) + 1e-300)))
    gains &= (slack_KDU >= 0).all(axis=0) & (down.groups[:, None] != up.groups)
    if not gains.any():
        return False
    loss[~gains | (gap > gap[gains].min())] = np.inf
    narrowed, widened = np.unravel_index(int(np.argmin(loss)), loss.shape)
    state.move(int(down.groups[narrowed]), int(down.columns[narrowed]))
    state.move(int(up.groups[widened]), int(up.columns[widened]))
    return True


def _together(parts: list[Changes]) -> Changes:
    names = Changes.__dataclass_fields__
    return Changes(*(np.concatenate([getattr(part, name) for part in parts], axis=-1) for name in names))


def land(state: State) -> State:
    """Bring the cost close to the limit at least loss: by exchanges, and by changes of one group with others to match.

    Returns:
        A state with a gap that is no larger, and otherwise with a loss that is no larger.
    """
    for _ in range(RIPPLES):
        state = exchange(state, landing=True)
        if state.gap == 0:
            break
        best = min((exchange(trial, landing=True) for trial in _ripples(state)), key=_landing_rank, default=state)
        if not _landing_rank(best) < _landing_rank(state):
            break
        state = best
    return state


def _ripples(state: State) -> Iterator[State]:
    """Change one group by one step, and let the others give or take what that costs or saves."""
    for offset in (+1, -1):
        for group in state.changes(offset).groups.tolist():
            trial = state.copy()
            trial.move(group, int(state.column_G[group]) + offset)
            shrink(trial, spared=group)
            if trial.feasible:
                fill(trial)
                yield trial


def search(problem: Problem, *, seed: int, restarts: int) -> np.ndarray:
    """Choose widths; the result loses no more than `uniform`, and no single step of any group still fits.

    Args:
        problem: Must be feasible at the narrowest widths.
        seed: Of the random restarts.
        restarts: How many.

    Returns:
        Column of `problem.choices` for each group.
    """
    baseline = State(problem, uniform(problem))
    if math.prod((problem.choices.last_G + 1).tolist()) <= ALL_COMBINATIONS:
        return _best_of_all(problem, baseline)
    narrow = State(problem, np.zeros_like(problem.choices.last_G))
    wide = State(problem, problem.choices.last_G)
    found = [exchange(baseline), *(exchange(start) for state in (wide, narrow) for start in lagrangian(state))]
    best = min(found, key=_loss_rounded)
    generator = np.random.default_rng(seed)
    movable = np.flatnonzero(problem.choices.last_G > 0)
    for _ in range(restarts if len(movable) > 1 else 0):
        candidate = best.copy()
        for group in generator.choice(movable, size=min(2, len(movable)), replace=False):
            candidate.move(int(group), int(generator.integers(problem.choices.last_G[group] + 1)))
        shrink(candidate)
        fill(candidate)
        best = min(best, exchange(candidate), key=_loss_rounded)
    landed = [state for state in (land(best), land(baseline)) if _loss_rounded(state) <= _loss_rounded(baseline)]
    return min([best, *landed], key=_landing_rank).column_G


def _best_of_all(problem: Problem, baseline: State) -> np.ndarray:
    """Try every combination of widths that fits; among equals the most even one."""
    sizes = problem.choices.last_G + 1
    columns_BG = np.stack(np.unravel_index(np.arange(math.prod(sizes.tolist())), sizes.tolist()), axis=1)
    rows = np.arange(len(sizes))
    width_BG = problem.choices.steps_GN[rows, columns_BG].astype(np.float64)
    cost_KB = np.stack([_costs(price, width_BG) for price in problem.prices])
    slack_KB = baseline.limit_K[:, None] - cost_KB
    loss_B = problem.choices.losses_GN[rows, columns_BG].sum(1)
    rounded_B = np.round(loss_B / max(np.abs(loss_B).max(), 1e-300), 12)
    fits_B = (slack_KB >= 0).all(axis=0) & (loss_B <= baseline.loss + 1e-11 * abs(baseline.loss))
    uneven_B = np.ptp(width_BG / problem.choices.steps_GN[:, -1], axis=1)
    order = np.lexsort((uneven_B, rounded_B, baseline.gaps(slack_KB), ~fits_B))
    best = State(problem, columns_BG[order[0]])
    fill(best)
    return best.column_G


def _costs(price: Quadratic, width_BG: np.ndarray) -> np.ndarray:
    squares_B: np.ndarray = np.einsum("bg,gh,bh->b", width_BG, price.matrix_GG.astype(np.float64), width_BG)
    return price.constant + width_BG @ price.linear_G + squares_B


def _rank(state: State, *, landing: bool) -> tuple[int, float]:
    return (state.gap if landing else 0), state.loss


def _landing_rank(state: State) -> tuple[int, float]:
    return state.gap, _loss_rounded(state)


def _loss_rounded(state: State) -> float:
    """A loss to eleven digits: the order of summation must not decide between equals."""
    return float(f"{state.loss:.11g}")
