"""Quadratic costs of taking a unit's columns out of a layer: `InputBlock` → costs of shape [U].

What a layer's outputs lose without the columns J of a unit is tr(W_Jᵀ M W_J B), with M a metric of the outputs. Where
all else stays, B = A_JJ, A being the second moment of the inputs; where the weights on the other columns K are solved
for again, B = A_JJ − A_JK (A_KK + λI)⁻¹ A_KJ, the part of these columns that the others do not explain.

The decision that is not obvious: λ is what a change of the weights that stay costs, and nothing else, so that no unit
costs more with least squares than without. As one inverse serves all units, B is taken from [((A + λI)⁻¹)_JJ]⁻¹ − λI.

Shape suffixes: O outputs, K columns of a block, U units, M units that have J columns each.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg import lapack

from archscan.errors import BadInput
from archscan.layer_statistics import InputBlock, LayerMoments

DAMPENING = 1e-2
"""Added to the diagonal of A, as a fraction of its mean: what a change of a weight costs by itself."""

_ROUNDING = 1e-6
"""The same at least, as a fraction of the mean of the uncentred diagonal: the precision of float32."""

_ATTEMPTS = 4


@dataclass(frozen=True, eq=False)
class UnitColumns:
    """Units with equally many columns in a block: their numbers [M], and their columns [M, J]."""

    unit_M: np.ndarray
    column_MJ: np.ndarray


def unit_columns(unit_K: np.ndarray) -> Iterator[UnitColumns]:
    """Give the columns of each unit of a block; columns of no unit are left out."""
    order = np.argsort(unit_K, kind="stable")
    units, first, counts = np.unique(unit_K[order], return_index=True, return_counts=True)
    for size in np.unique(counts[units >= 0]):
        chosen = (counts == size) & (units >= 0)
        yield UnitColumns(units[chosen], order[first[chosen, None] + np.arange(size)])


def second_moment(block: InputBlock, layer: LayerMoments, *, centred: bool = False) -> np.ndarray:
    """Give A, the mean over samples of Σ x xᵀ over positions, about the mean of x where an intercept takes that up."""
    gram_KK = block.gram_KK
    if centred:
        gram_KK = gram_KK - np.outer(block.sum_K, block.sum_K) / (layer.samples * layer.positions)
    return gram_KK / layer.samples


def damped(moment_KK: np.ndarray, dampening: float) -> np.ndarray:
    """Add a fraction of its mean diagonal to a second moment."""
    return moment_KK + dampening * np.diagonal(moment_KK).mean() * np.eye(len(moment_KK))


def inverse(matrix_KK: np.ndarray, where: str) -> np.ndarray:
    """Invert a positive definite matrix.

    Raises:
        BadInput: It is not.
    """
    factor, failed = lapack.dpotrf(matrix_KK, lower=True)
    if not failed:
        lower, failed = lapack.dpotri(factor, lower=True)
    if failed:
        raise BadInput(
            f"the inputs of {where or 'the model'} have a second moment that cannot be inverted; give more images"
        )
    return np.tril(lower) + np.tril(lower, -1).T


def removal_costs(
    block: InputBlock, moment_KK: np.ndarray, unit_count: int, metric_OO: np.ndarray | None = None
) -> np.ndarray:
    """Compute tr(W_Jᵀ M W_J A_JJ) for the columns J of each unit: all else stays.

    Args:
        block: Some columns of a layer.
        moment_KK: A.
        unit_count: U.
        metric_OO: M; None for the identity.

    Returns:
        Costs of shape [U], 0 for units that have no columns here.
    """
    return _costs(block, unit_count, metric_OO, ((pair, _at(moment_KK, pair)) for pair in unit_columns(block.unit_K)))


def residual_costs(
    block: InputBlock,
    layer: LayerMoments,
    unit_count: int,
    metric_OO: np.ndarray | None = None,
    *,
    centred: bool = False,
) -> np.ndarray:
    """Compute tr(W_Jᵀ M W_J B) for the columns J of each unit: the weights on the others make up for it.

    λ is `DAMPENING` times the mean of A's diagonal, and more where rounding asks for it.

    Args:
        block: Some columns of a layer.
        layer: The layer.
        unit_count: U.
        metric_OO: M; None for the identity.
        centred: Whether A is about the mean, since an intercept takes that up.

    Returns:
        Costs of shape [U], 0 for units that have no columns here.

    Raises:
        BadInput: A is not a second moment.
    """
    if not block.gram_KK.any():
        return np.zeros(unit_count)
    moment_KK = second_moment(block, layer, centred=centred)
    least = _ROUNDING * np.diagonal(second_moment(block, layer)).mean()
    strength, inverse_KK = damped_inverse(moment_KK, least, layer.module)

    def left(pair: UnitColumns) -> np.ndarray:
        return np.linalg.inv(_at(inverse_KK, pair)) - strength * np.eye(pair.column_MJ.shape[1])

    costs_U = _costs(block, unit_count, metric_OO, ((pair, left(pair)) for pair in unit_columns(block.unit_K)))
    return costs_U.clip(min=0)


def damped_inverse(moment_KK: np.ndarray, least: float, where: str) -> tuple[float, np.ndarray]:
    """Choose λ, at least `least`, and invert A + λI; inputs that hardly vary leave nothing of A but rounding."""
    strength = max(DAMPENING * float(np.diagonal(moment_KK).mean()), least)
    for _ in range(_ATTEMPTS - 1):
        try:
            return strength, inverse(moment_KK + strength * np.eye(len(moment_KK)), where)
        except BadInput:
            strength *= 10
    return strength, inverse(moment_KK + strength * np.eye(len(moment_KK)), where)


def _at(matrix_KK: np.ndarray, pair: UnitColumns) -> np.ndarray:
    return matrix_KK[pair.column_MJ[:, :, None], pair.column_MJ[:, None, :]]


def _costs(
    block: InputBlock,
    unit_count: int,
    metric_OO: np.ndarray | None,
    parts: Iterable[tuple[UnitColumns, np.ndarray]],
) -> np.ndarray:
    weight_OK = block.weight_OK
    weighted_OK = weight_OK if metric_OO is None else metric_OO @ weight_OK
    costs_U = np.zeros(unit_count)
    for pair, part_MJJ in parts:
        # tr(W_Jᵀ M W_J B), for all units at once
        own, other = (values[:, pair.column_MJ].transpose(1, 2, 0) for values in (weight_OK, weighted_OK))
        products_MJJ = own @ other.transpose(0, 2, 1)
        costs_U[pair.unit_M] = (products_MJJ * part_MJJ).sum((1, 2))
    return costs_U
