"""The Fisher information of the gates as low-rank factors: per-sample gate gradients G → what needs F = GᵀG / N.

F is U × U and never held: everything goes through the N × N side, by blocks of columns, in float64. Where there are
fewer units than samples, F is the small side and is used as it is.

Shape suffixes: N samples, U units.
"""

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular

from archscan.errors import BadInput

_BLOCK_NUMBERS = 2**22
"""Numbers of G that exist in float64 at once, 32 MiB."""


def dampening(factors_NU: np.ndarray, relative: float) -> float:
    """Give λ, a fraction of the mean F_uu over the units whose gates have any gradient (frozen ones have none).

    Raises:
        BadInput: No gate has a gradient.
    """
    diagonal_U = diagonal(factors_NU)
    alive_U = diagonal_U > 0
    if not alive_U.any():
        raise BadInput(
            "every gate gradient is 0, so that no unit can be told from another; check that the loss depends on the"
            " images"
        )
    return relative * float(diagonal_U[alive_U].mean())


def diagonal(factors_NU: np.ndarray) -> np.ndarray:
    """Compute F_uu = E_n[g_nu²] in float64, shape [U]."""
    return np.square(factors_NU, dtype=np.float64).mean(0)


def leverage(factors_NU: np.ndarray, damping: float) -> np.ndarray:
    """Compute [F (F + λI)⁻¹]_uu, between 0 and 1: how far the samples determine gate u; shape [U].

    By Woodbury's identity it is ‖L⁻¹ g_u‖² with L Lᵀ = G Gᵀ + N λ I, g_u being column u of G.
    """
    factors_NU, samples = _few_rows(factors_NU), len(factors_NU)
    root_NN = np.linalg.cholesky(gram(factors_NU) + samples * damping * np.eye(len(factors_NU)))
    share_U = np.empty(factors_NU.shape[1])
    for block in _blocks(factors_NU):
        solved = solve_triangular(root_NN, factors_NU[:, block].astype(np.float64), lower=True, check_finite=False)
        share_U[block] = np.square(solved).sum(0)
    return share_U


def conditional(factors_NU: np.ndarray, damping: float) -> np.ndarray:
    """Compute the curvature that is left of each gate when the others follow it, shape [U].

    1 / [(F + λI)⁻¹]_uu − λ = F_uu − F_uK (F_KK + λI)⁻¹ F_Ku, K being all other units: λ holds them back, and is not
    charged to the unit itself. In terms of the leverage h it is λ h / (1 − h).
    """
    samples, units = factors_NU.shape
    if units > samples:
        share_U = leverage(factors_NU, damping)
        return damping * share_U / (1 - share_U)
    root = cho_factor(dense(factors_NU) + damping * np.eye(units), lower=True)
    return np.clip(1 / np.diag(cho_solve(root, np.eye(units))) - damping, 0.0, None)


def ridge(factors_NU: np.ndarray, target_N: np.ndarray, damping: float) -> np.ndarray:
    """Solve (F + λI) x = Gᵀ t / N: the ridge regression of `target_N` on the columns of G; shape [U]."""
    samples, units = factors_NU.shape
    if units > samples:
        kernel_NN = gram(factors_NU) + samples * damping * np.eye(samples)
        weights_N = cho_solve(cho_factor(kernel_NN, lower=True), target_N)
        return _transposed_times(factors_NU, weights_N)
    root = cho_factor(dense(factors_NU) + damping * np.eye(units), lower=True)
    return cho_solve(root, _transposed_times(factors_NU, target_N) / samples)


def gram(factors_NU: np.ndarray) -> np.ndarray:
    """Compute G Gᵀ in float64, shape [N, N]."""
    total_NN = np.zeros((len(factors_NU), len(factors_NU)))
    for block in _blocks(factors_NU):
        part = factors_NU[:, block].astype(np.float64)
        total_NN += part @ part.T
    return total_NN


def dense(factors_NU: np.ndarray) -> np.ndarray:
    """Compute F itself in float64, shape [U, U]; for few units only."""
    factors_NU = factors_NU.astype(np.float64)
    return factors_NU.T @ factors_NU / len(factors_NU)


def _few_rows(factors_NU: np.ndarray) -> np.ndarray:
    """Give factors with the same GᵀG and no more rows than columns."""
    samples, units = factors_NU.shape
    return np.asarray(np.linalg.qr(factors_NU.astype(np.float64), mode="r")) if samples > units else factors_NU


def _transposed_times(factors_NU: np.ndarray, vector_N: np.ndarray) -> np.ndarray:
    """Compute Gᵀ v in float64, by blocks."""
    product_U = np.empty(factors_NU.shape[1])
    for block in _blocks(factors_NU):
        product_U[block] = factors_NU[:, block].astype(np.float64).T @ vector_N
    return product_U


def _blocks(factors_NU: np.ndarray) -> list[slice]:
    samples, units = factors_NU.shape
    width = max(1, _BLOCK_NUMBERS // max(1, samples))
    return [slice(start, min(start + width, units)) for start in range(0, units, width)]
