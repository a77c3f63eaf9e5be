"""Kronecker-factored curvature of layers (Martens and Grosse 2015): moments of layers → saliency [U].

The Fisher information of a layer's weights is taken for A ⊗ Γ, with A = E[Σ_t x_t x_tᵀ] the second moment of its
inputs, summed over positions, and Γ = E[mean_t δ_t δ_tᵀ] that of the gradients of its outputs, averaged over them
(Grosse and Martens 2016, for convolutions). Removing a unit sets its columns J in every layer that reads it to zero;
each of these layers is taken for itself.
"""

from collections.abc import Iterator

import numpy as np

from archscan.criteria.columns import removal_costs, residual_costs, second_moment
from archscan.gate_statistics import GateStatistics
from archscan.layer_statistics import InputBlock, LayerMoments


def kfac(statistics: GateStatistics) -> np.ndarray:
    """Estimate the loss change of removing each unit alone.

    s_u = ½ Σ over layers that read it of tr(W_Jᵀ Γ W_J A_JJ), optimal brain damage with a Kronecker-factored Fisher
    information (cf. Wang et al. 2019, eq. 7).

    Returns:
        Saliency of shape [U], in units of the loss.
    """
    costs = (
        removal_costs(block, second_moment(block, layer), statistics.unit_count, metric_OO)
        for block, layer, metric_OO in _blocks(statistics)
    )
    return 0.5 * sum(costs, np.zeros(statistics.unit_count))


def kfac_obs(statistics: GateStatistics) -> np.ndarray:
    """Estimate the loss change of removing each unit when the other weights of its readers make up for it.

    s_u = ½ Σ over layers that read it of tr(W_Jᵀ Γ W_J [(A⁻¹)_JJ]⁻¹), with A damped as `columns` says: optimal brain
    surgery with a Kronecker-factored Fisher information (cf. Wang et al. 2019, eq. 8), since the block of (A ⊗ Γ)⁻¹ at
    these columns is (A⁻¹)_JJ ⊗ Γ⁻¹.

    Returns:
        Saliency of shape [U], in units of the loss.
    """
    costs = (
        residual_costs(block, layer, statistics.unit_count, metric_OO)
        for block, layer, metric_OO in _blocks(statistics)
    )
    return 0.5 * sum(costs, np.zeros(statistics.unit_count))


def _blocks(statistics: GateStatistics) -> Iterator[tuple[InputBlock, LayerMoments, np.ndarray]]:
    """Yield every block of columns with its layer and Γ, of shape [O, O]."""
    layers = zip(statistics.require_layers("layer_inputs"), statistics.require("layer_gradients"), strict=True)
    for layer, gradient_GOO in layers:
        for block in layer.blocks:
            yield block, layer, gradient_GOO[block.group] / layer.samples
