"""What least squares on the readers of a unit cannot make up for: moments of layers → saliency [U].

A layer that reads a unit computes W X, X being its im2col matrix. Without the unit's columns J, the weights on the
others can be solved for again, so that the outputs come as close as they can; what is left of the error is
tr(W_J [(A⁻¹)_JJ]⁻¹ W_Jᵀ), A = E[X Xᵀ] (Hassibi and Stork 1993 for weights, Frantar and Alistarh 2022 for layers).
"""

import numpy as np

from archscan.criteria.columns import DAMPENING, damped, inverse, removal_costs, residual_costs, second_moment
from archscan.criteria.fisher import obd
from archscan.errors import BadInput
from archscan.gate_statistics import GateStatistics
from archscan.layer_statistics import InputBlock, LayerMoments


def obc(statistics: GateStatistics) -> np.ndarray:
    """Compute the error that removing each unit leaves in the outputs of its readers after least squares.

    s_u = Σ over layers that read it of ½ tr(W_J [(H⁻¹)_JJ]⁻¹ W_Jᵀ), H = 2 E[X Xᵀ], damped as `columns` says (Frantar
    and Alistarh 2022, "Optimal Brain Compression", with a unit's columns as one block).

    Returns:
        Saliency of shape [U]: squared output error per sample, which no layer's part in the loss weighs.
    """
    saliency_U = np.zeros(statistics.unit_count)
    for layer in statistics.require_layers("layer_inputs"):
        for block in layer.blocks:
            saliency_U += residual_costs(block, layer, statistics.unit_count)
    return saliency_U


def obd_ls(statistics: GateStatistics) -> np.ndarray:
    """Estimate the loss change of removing each unit that least squares on its readers cannot repair.

    s_u = ½ F_uu · Σ tr(W_J [(C⁻¹)_JJ]⁻¹ W_Jᵀ) / Σ tr(W_J A_JJ W_Jᵀ), summed over the layers that read it, A = E[X Xᵀ]
    and C the same about the mean, which the layers' biases take up: `obd`, times the share of what the readers get from
    the unit that they could not get from other channels.

    Returns:
        Saliency of shape [U], in units of the loss.
    """
    return obd(statistics) * unexplained_share(statistics)


def unexplained_share(statistics: GateStatistics) -> np.ndarray:
    """Compute which share of what a unit gives to its readers the other channels cannot give; in [0, 1], shape [U].

    Units whose readers get nothing from them have 0.
    """
    count = statistics.unit_count
    left_U, all_U = np.zeros(count), np.zeros(count)
    for layer in statistics.require_layers("layer_inputs"):
        for block in layer.blocks:
            left_U += residual_costs(block, layer, count, centred=True)
            all_U += removal_costs(block, second_moment(block, layer), count)
    return np.divide(left_U, all_U, out=np.zeros(count), where=all_U > 0)


def obc_update(
    block: InputBlock, layer: LayerMoments, removed_U: np.ndarray, dampening: float = DAMPENING
) -> np.ndarray:
    """Solve for the weights on the columns that are kept, so that the outputs come closest to what they were.

    Ŵ_K = W_K + W_R A_RK (A_KK)⁻¹, with A the damped second moment, R the columns of the units that go and K the others:
    exact for the whole set at once, in whatever order the units were chosen. It minimises E‖W x − Ŵ x_K‖² +
    λ ‖Ŵ − W_K‖², which is what the repair by least squares (`reconstruct`) solves with the hold-out's λ, on inputs that
    the layers before it have changed, and with an intercept.

    Args:
        block: All columns of a group of a layer.
        layer: The layer.
        removed_U: Which units go.
        dampening: λ as a fraction of the mean diagonal of E[X Xᵀ].

    Returns:
        New weights of shape [O, K], 0 on the columns that go.

    Raises:
        BadInput: All columns would go.
    """
    gone_K = (block.unit_K >= 0) & removed_U[block.unit_K]
    if gone_K.all():
        raise BadInput(f"{layer.module or 'the model'} would read no channel any more; keep some")
    moment_KK = damped(second_moment(block, layer), dampening)
    weight_OK = np.where(gone_K, 0.0, block.weight_OK)
    if gone_K.any() and moment_KK.any():
        kept_KK = moment_KK[~gone_K][:, ~gone_K]
        given_OK = block.weight_OK[:, gone_K] @ moment_KK[gone_K][:, ~gone_K]
        weight_OK[:, ~gone_K] += given_OK @ inverse(kept_KK, layer.module)
    return weight_OK
