"""Largest Hessian eigenvalue of each channel group: products of the gates' Hessian with vectors → `sharpness`.

Gates are scaled so that a step of length 1 is a step of length 1 in the weights that read the unit: with D the norms
of these slices, D⁻¹ H D⁻¹ is the Hessian of the loss by the weights, restricted to one direction per unit.

Shape suffixes: N samples, U units, Q groups.

The decision that is not obvious: all groups share one product. Each sample's gates get their group's vector with a
random sign, group by group, and the product is read with the same sign, so that what other groups add to it averages
out over samples. Where there are few groups, each gets a product of its own, which is exact.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

POWER_STEPS = 6
"""Products, each of which takes one pass over all batches."""


def sharpness(product: Callable[[np.ndarray], np.ndarray], group_U: np.ndarray, norm_U: np.ndarray) -> np.ndarray:
    """Find the largest absolute eigenvalue of D⁻¹ H_gg D⁻¹ for each group g by power iteration.

    Args:
        product: Multiplies each group's block of H by that group's part of a vector of shape [U].
        group_U: Number of each unit's group.
        norm_U: D; units without weights that read them take no part.

    Returns:
        The eigenvalue of each unit's group, shape [U], in units of the loss over squared weights. It is approached from
        below: by the norm of the last product of a unit vector.
    """
    inverse_U = np.divide(1.0, norm_U, out=np.zeros(len(norm_U)), where=norm_U > 0)
    vector_U = (norm_U > 0).astype(np.float64)
    for _ in range(POWER_STEPS):
        length_U = group_norms(vector_U, group_U)
        vector_U = np.divide(vector_U, length_U, out=np.zeros(len(vector_U)), where=length_U > 0)
        vector_U = inverse_U * product(inverse_U * vector_U)
    return group_norms(vector_U, group_U)


def group_norms(vector_U: np.ndarray, group_U: np.ndarray) -> np.ndarray:
    """Give each unit the norm of its group's part of a vector."""
    _, number_U = np.unique(group_U, return_inverse=True)
    return np.sqrt(np.bincount(number_U, np.square(vector_U)))[number_U]


def groupwise_product(
    multiply: Callable[[Tensor], Tensor],
    vector_U: np.ndarray,
    group_U: np.ndarray,
    like_NU: Tensor,
    draw: torch.Generator,
    most: int,
) -> Tensor:
    """Multiply each group's block of every sample's Hessian by that group's part of a vector.

    Args:
        multiply: Multiplies every sample's Hessian by that sample's row.
        vector_U: One vector for all samples.
        group_U: Number of each unit's group.
        like_NU: A tensor of the shape, precision and device of the product.
        draw: Draws signs, on the CPU.
        most: Products to take for the exact result; where there are more groups, it is one product with random signs.

    Returns:
        One row per sample, shape [N, U].
    """
    groups, number_U = np.unique(group_U, return_inverse=True)
    vector = torch.from_numpy(vector_U).to(like_NU)
    number = torch.from_numpy(number_U).to(like_NU.device)
    if len(groups) <= most:
        masks = [(number == group).to(like_NU) for group in range(len(groups))]
        products = [mask * multiply((mask * vector).expand_as(like_NU).contiguous()) for mask in masks]
        return torch.stack(products).sum(0)
    signs_NQ = torch.rand(len(like_NU), len(groups), dtype=torch.float64, generator=draw).round().mul(2).sub(1)
    signs_NU = signs_NQ.to(like_NU)[:, number]
    return signs_NU * multiply(signs_NU * vector)
