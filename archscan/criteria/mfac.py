"""Matrix-free inverse Fisher by the recursion of M-FAC (Frantar et al. 2021): gate statistics → saliency [U], update.

F = λI + Σ_i g_i g_iᵀ / N is inverted one gradient at a time by the formula of Sherman and Morrison: with F_i the sum up
to gradient i, v_i = F_{i−1}⁻¹ g_i and q_i = N + g_iᵀ v_i give F⁻¹ = I/λ − Σ_i v_i v_iᵀ / q_i. Nothing larger than the
gradients is held.

The decision that is not obvious: F is taken block by block, as in the paper, and a block is a channel group. Within a
group there are mostly more samples than units, so that the inverse is well determined where that of the whole is not.

Shape suffixes: N samples, P units of one group, U all units.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from archscan.criteria.factors import dampening
from archscan.criteria.obs import checked
from archscan.gate_statistics import GateStatistics

DAMPENING, UPDATE_DAMPENING = 1.0, 0.1
"""λ as a fraction of the mean F_uu, for the score and for the update."""

_ROWS = 64
"""Gradients that are brought up to date together, by one matrix product."""


@dataclass(frozen=True, eq=False)
class InverseFisher:
    """(λI + GᵀG / N)⁻¹ = I/λ − Vᵀ diag(1/q) V.

    Attributes:
        damping: λ.
        vectors_NP: v_i, one per row.
        scales_N: 1 / q_i.
    """

    damping: float
    vectors_NP: np.ndarray
    scales_N: np.ndarray

    @classmethod
    def of(cls, factors_NP: np.ndarray, damping: float) -> "InverseFisher":
        """Run the recursion over the rows of `factors_NP` (Frantar et al. 2021)."""
        factors_NP = factors_NP.astype(np.float64)
        samples = len(factors_NP)
        vectors_NP, scales_N = factors_NP / damping, np.empty(samples)
        for start in range(0, samples, _ROWS):
            new = slice(start, min(start + _ROWS, samples))
            before = vectors_NP[:start]
            vectors_NP[new] -= (factors_NP[new] @ before.T * scales_N[:start]) @ before
            for i in range(start, new.stop):
                scales_N[i] = 1 / (samples + factors_NP[i] @ vectors_NP[i])
                later = slice(i + 1, new.stop)
                vectors_NP[later] -= np.outer(factors_NP[later] @ vectors_NP[i] * scales_N[i], vectors_NP[i])
        return cls(damping, vectors_NP, scales_N)

    def diagonal(self) -> np.ndarray:
        """Give the diagonal of the inverse, shape [P]."""
        return 1 / self.damping - self.scales_N @ np.square(self.vectors_NP)

    def columns(self, chosen_P: np.ndarray) -> np.ndarray:
        """Give the columns of the inverse where `chosen_P` is true, shape [P, M]."""
        columns_PM = -(self.vectors_NP.T * self.scales_N) @ self.vectors_NP[:, chosen_P]
        columns_PM[np.flatnonzero(chosen_P), np.arange(columns_PM.shape[1])] += 1 / self.damping
        return columns_PM


def mfac(statistics: GateStatistics) -> np.ndarray:
    """Estimate the loss change of removing each unit when the others of its channel group make up for it.

    s_u = ½ / [(F_g + λI)⁻¹]_uu − ½ λ, F_g being the block of F of the unit's group (Frantar et al. 2021, on gates;
    `obs` says why ½ λ is left out).

    Returns:
        Saliency of shape [U], in units of the loss.
    """
    factors_NU = statistics.require("sample_gradient")
    damping = dampening(factors_NU, DAMPENING)
    saliency_U = np.empty(statistics.unit_count)
    for members in groups_of(statistics):
        saliency_U[members] = 0.5 * (1 / InverseFisher.of(factors_NU[:, members], damping).diagonal() - damping)
    return saliency_U.clip(0.0)


def mfac_update(statistics: GateStatistics, removed_U: np.ndarray) -> np.ndarray:
    """Set the remaining gates of each group to what makes up best for the units of that group that are removed.

    δ = −A⁻¹[:, M] (A⁻¹[M, M])⁻¹ 1_M within each group, with A = F_g + λI (Frantar et al. 2021; Hassibi and Stork 1993).

    Args:
        statistics: With per-sample gradients and groups.
        removed_U: Which units go.

    Returns:
        Gates of shape [U], 0 for the units that go.
    """
    factors_NU = statistics.require("sample_gradient")
    removed_U = checked(removed_U, statistics.unit_count)
    damping = dampening(factors_NU, UPDATE_DAMPENING)
    gates_U = np.ones(statistics.unit_count)
    for members in groups_of(statistics):
        gone_P = removed_U[members]
        if gone_P.any() and not gone_P.all():
            columns_PM = InverseFisher.of(factors_NU[:, members], damping).columns(gone_P)
            prices_M = cho_solve(cho_factor(columns_PM[gone_P]), np.ones(columns_PM.shape[1]))
            gates_U[members] -= columns_PM @ prices_M
    gates_U[removed_U] = 0.0
    return gates_U


def groups_of(statistics: GateStatistics) -> Iterator[np.ndarray]:
    """Yield the units of each channel group; those without a group count as one."""
    group_U = statistics.require("group")
    order = np.argsort(group_U, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(group_U[order])) + 1)
