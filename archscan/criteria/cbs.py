"""The combinatorial brain surgeon on gates (Yu et al. 2022): gate statistics → saliency [U].

Removing a set M of units costs ½ 1ᵀ F_MM 1 = ½ E_n[s_n²], with s_n = Σ_{u∈M} g_nu what the set does to sample n. So two
units that do the same cost four times what one does, and two that cancel cost nothing.

A ranking of all units is a chain of nested sets. Greedy selection makes it: the next unit is the one that adds least,
½ F_uu + E_n[g_nu s_n]. At some sizes of the set, swaps improve what was added since the last such size.

The decision that is not obvious: one product Gᵀs gives what every unit would add, and is made anew after some tens of
picks only; between two, the picks come from the cheapest candidates, among which F is held. Up to `_REFRESHES` units,
that is exact greedy selection.

Shape suffixes: N samples, U units, C candidates, A units that were added.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

from archscan.criteria.factors import diagonal
from archscan.gate_statistics import GateStatistics

_REFRESHES = 512
"""How often, at most, the price of every unit is computed anew while all units are ranked."""

_CANDIDATES = 16
"""Candidates for each pick between two refreshes."""

_LEVELS, _SWAPS, _PAIRS = 16, 32, 64
"""Sizes of the set at which swaps are tried, most swaps at each, and how many units of either side are looked at."""


def cbs(statistics: GateStatistics) -> np.ndarray:
    """Give each unit the price at which it joins the cheapest sets that are nested in one another.

    Prices along the chain are made to rise by isotonic regression, which keeps their sum over all units, and then by
    a billionth of the mean at each rank, so that sorting by saliency gives the chain.

    Returns:
        Saliency of shape [U], in units of the loss.
    """
    factors_NU = statistics.require("sample_gradient")
    chain, prices_U = nested_sets(factors_NU)
    rising_U = isotonic_regression(prices_U).x.clip(0.0)
    saliency_U = np.empty(len(chain))
    saliency_U[chain] = rising_U + rising_U.mean() * 1e-9 * np.arange(len(chain))
    return saliency_U


def nested_sets(factors_NU: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank all units: the first k are a cheap set of size k.

    Returns:
        The units in the order in which they go, and what each adds to the cost of those before it, both of shape [U].
    """
    units = factors_NU.shape[1]
    chosen = _Set.empty(factors_NU)
    chain: list[int] = []
    for level in range(1, _LEVELS + 1):
        start, before_N = len(chain), chosen.total_N.copy()
        chain.extend(_add(chosen, units * level // _LEVELS - start))
        if _swap(chosen, np.array(chain[start:], dtype=np.int64)):
            added = np.setdiff1d(np.flatnonzero(chosen.inside_U), chain[:start])
            chain[start:] = added[_order(factors_NU[:, added], before_N)]
    order = np.array(chain, dtype=np.int64)
    return order, _prices(factors_NU, order)


def cost(factors_NU: np.ndarray, inside_U: np.ndarray) -> float:
    """Compute ½ 1ᵀ F_MM 1 of a set."""
    return 0.5 * float(np.square(factors_NU[:, inside_U].sum(1, dtype=np.float64)).mean())


# Mechanics ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Set:
    """A set of units while it grows.

    Attributes:
        factors_NU: Per-sample gradients.
        diagonal_U: F_uu.
        inside_U: Whether each unit is in the set.
        total_N: s, the sum of the set's columns.
    """

    factors_NU: np.ndarray
    diagonal_U: np.ndarray
    inside_U: np.ndarray
    total_N: np.ndarray

    @classmethod
    def empty(cls, factors_NU: np.ndarray) -> "_Set":
        samples, units = factors_NU.shape
        return cls(factors_NU, diagonal(factors_NU), np.zeros(units, dtype=bool), np.zeros(samples))

    def pull(self) -> np.ndarray:
        """Compute F 1_M, shape [U], in the gradients' own precision."""
        total_N = (self.total_N / len(self.total_N)).astype(self.factors_NU.dtype)
        return (total_N @ self.factors_NU).astype(np.float64)

    def move(self, unit: int, sign: int) -> None:
        """Put a unit in (1) or out (−1)."""
        self.inside_U[unit] = sign > 0
        self.total_N += sign * self.factors_NU[:, unit]


def _add(chosen: _Set, count: int) -> list[int]:
    """Put `count` units in, each the cheapest at its turn; give them in their order."""
    picks_between = -(-chosen.factors_NU.shape[1] // _REFRESHES)
    added: list[int] = []
    while len(added) < count:
        picks = min(picks_between, count - len(added))
        prices_U = np.where(chosen.inside_U, np.inf, chosen.diagonal_U / 2 + chosen.pull())
        candidates = _smallest(prices_U, 1 if picks == 1 else min(_CANDIDATES * picks, int(np.sum(~chosen.inside_U))))
        prices_C = prices_U[candidates]
        columns_NC = chosen.factors_NU[:, candidates]
        for _ in range(picks):
            pick = int(np.argmin(prices_C))
            chosen.move(int(candidates[pick]), 1)
            added.append(int(candidates[pick]))
            prices_C += columns_NC[:, pick] @ columns_NC / len(columns_NC)
            prices_C[pick] = np.inf
    return added


def _swap(chosen: _Set, added: np.ndarray) -> int:
    """Exchange units of `added` for units outside while that makes the set cheaper; give the number of exchanges.

    Taking i out and j in changes the cost by −r_i + ½ F_ii + r_j + ½ F_jj − F_ij, with r = F 1_M.
    """
    added = added.copy()
    least = 1e-9 * float(chosen.diagonal_U.mean())
    for swaps in range(_SWAPS):
        outside = np.flatnonzero(~chosen.inside_U)
        if not len(outside) or not len(added):
            return swaps
        pull_U = chosen.pull()
        leave_A = chosen.diagonal_U[added] / 2 - pull_U[added]
        enter = chosen.diagonal_U[outside] / 2 + pull_U[outside]
        places, joiners = _smallest(leave_A, _PAIRS), _smallest(enter, _PAIRS)
        leavers, joining = added[places], outside[joiners]
        shared = chosen.factors_NU[:, leavers].T @ chosen.factors_NU[:, joining] / len(chosen.total_N)
        change = leave_A[places][:, None] + enter[joiners] - shared
        i, j = np.unravel_index(int(np.argmin(change)), change.shape)
        if change[i, j] > -least:
            return swaps
        chosen.move(int(leavers[i]), -1)
        chosen.move(int(joining[j]), 1)
        added[places[i]] = joining[j]
    return _SWAPS


def _order(factors_NA: np.ndarray, before_N: np.ndarray) -> np.ndarray:
    """Order units that join a set, whose columns sum to `before_N`, by greedy selection."""
    factors_NA = factors_NA.astype(np.float64)
    samples, count = factors_NA.shape
    fisher_AA = factors_NA.T @ factors_NA / samples
    prices_A = np.diag(fisher_AA) / 2 + before_N @ factors_NA / samples
    order = np.empty(count, dtype=np.int64)
    for place in range(count):
        pick = int(np.argmin(prices_A))
        order[place] = pick
        prices_A += fisher_AA[pick]
        prices_A[pick] = np.inf
    return order


def _prices(factors_NU: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Compute what each unit adds to the cost of those before it, in float64, shape [U]."""
    prices_U, total_N = np.empty(len(order)), np.zeros(len(factors_NU))
    for start in range(0, len(order), _PAIRS):
        block_NA = factors_NU[:, order[start : start + _PAIRS]].astype(np.float64)
        sums_NA = total_N[:, None] + np.cumsum(block_NA, 1)
        prices_U[start : start + _PAIRS] = (block_NA * (sums_NA - block_NA / 2)).mean(0)
        total_N = sums_NA[:, -1]
    return prices_U


def _smallest(values: np.ndarray, count: int) -> np.ndarray:
    """Give the places of the smallest values, in their order."""
    some = count < len(values)
    found = np.argpartition(values, count - 1)[:count] if some else np.arange(len(values))
    return found[np.argsort(values[found], kind="stable")]
