"""Second-order structured pruning (Nonnenmacher et al. 2022) in gate space: gate statistics → saliency [U].

Saliencies of this family count how a unit's removal interacts with that of every other unit: a first-order term, and
½ |Σ_v H_uv| or ½ Σ_v |H_uv|. For H stands either the Gauss–Newton matrix G = E_n[f_n f_nᵀ], f_n being sample n's gate
gradient for a label drawn from the model's own predictions, or the Hessian itself, by its product with ones.

Shape suffixes: B calibration batches, N samples, U units.
"""

import numpy as np

from archscan.gate_statistics import GateStatistics

_BLOCK_NUMBERS = 2**23
"""Numbers of G that exist at once, 32 MiB in float32."""


def sosp_i(statistics: GateStatistics) -> np.ndarray:
    """Estimate saliency with all pairs of the Gauss–Newton matrix.

    s_u = |E[g_u]| + ½ Σ_v |G_uv| (SOSP-I of Nonnenmacher et al. 2022).

    Returns:
        Saliency of shape [U], in units of the loss.
    """
    return np.abs(mean_gradient(statistics)) + 0.5 * absolute_row_sums(statistics.require("fisher_gradient"))


def sosp_h(statistics: GateStatistics) -> np.ndarray:
    """Estimate saliency with the Hessian-vector product of ones.

    s_u = |E[g_u]| + ½ |E[H·1]_u| (SOSP-H of Nonnenmacher et al. 2022): as if all the other units went at once.

    Returns:
        Saliency of shape [U], in units of the loss.
    """
    return np.abs(mean_gradient(statistics)) + 0.5 * np.abs(mean_hessian_ones(statistics))


# Terms ----------------------------------------------------------------------------------------------------------------


def mean_gradient(statistics: GateStatistics) -> np.ndarray:
    """Average the gate gradient over samples, whatever the sizes of the batches; shape [U]."""
    return np.average(statistics.require("gradient"), axis=0, weights=statistics.batch_sizes)


def mean_hessian_ones(statistics: GateStatistics) -> np.ndarray:
    """Average H·1 over samples before any absolute value is taken; shape [U]."""
    return np.average(statistics.require("hessian_ones"), axis=0, weights=statistics.batch_sizes)


def absolute_row_sums(factors_NU: np.ndarray) -> np.ndarray:
    """Sum the absolute values in each row of G = FᵀF / N, F being `factors_NU`, without ever holding G; shape [U]."""
    samples, units = factors_NU.shape
    block = max(1, _BLOCK_NUMBERS // units)
    sums_U = np.empty(units)
    for start in range(0, units, block):
        rows = factors_NU[:, start : start + block].T @ factors_NU
        sums_U[start : start + block] = np.abs(rows, out=rows).sum(1, dtype=np.float64)
    return sums_U / samples
