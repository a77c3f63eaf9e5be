"""Criteria from Taylor expansions of the loss around all gates open: gate statistics → saliency [U].

Removing unit u changes the loss by −g_u + ½ H_uu + …, with g and H the loss's gradient and Hessian by the gates.
"""

import numpy as np

from archscan.criteria.sosp import mean_gradient
from archscan.errors import BadInput
from archscan.gate_statistics import GateStatistics


def taylor_fo(statistics: GateStatistics) -> np.ndarray:
    """Estimate the squared loss change of removing each unit, to first order.

    s_u = Σ_b (g_bu)², with g_b the gate gradient of minibatch b (Molchanov et al. 2019, on gates).

    Returns:
        Saliency of shape [U], in squared units of the loss.
    """
    return np.square(statistics.require("gradient")).sum(0)


def taylor_so(statistics: GateStatistics) -> np.ndarray:
    """Estimate the squared loss change of removing each unit, to second order.

    s_u = Σ_b (g_bu − ½ H_uu)², with H the Hessian of the mean loss over all minibatches (Molchanov et al. 2019, on
    gates).

    Returns:
        Saliency of shape [U], in squared units of the loss.
    """
    change_BU = statistics.require("gradient") - 0.5 * statistics.require("hessian_diagonal")
    return np.square(change_BU).sum(0)


def taylor_abs(statistics: GateStatistics) -> np.ndarray:
    """Average the first-order loss change of single samples, regardless of its sign.

    s_u = E_n|g_nu|. The mean gradient of a trained network is near zero, and what is left of it is mostly noise; what
    removing a unit does to single samples is not (cf. Molchanov et al. 2017, who take it per activation map).

    Returns:
        Saliency of shape [U], in units of the loss.
    """
    return np.abs(statistics.require("sample_gradient")).mean(0, dtype=np.float64)


def taylor_activation(statistics: GateStatistics) -> np.ndarray:
    """Average the first-order change of single samples, relative to the other units of the channel group.

    s_u = E_n|g_nu| / sqrt(Σ_v E_n|g_nv|²), v running over the unit's group (Molchanov et al. 2017, eqs. 8 and 11). The
    gate gradient is the sum of a · dL/da over a feature map; the paper's mean over the map differs by a factor that the
    normalisation takes out again.

    Returns:
        Saliency of shape [U], between 0 and 1, without a unit.
    """
    mean_U, group_U = taylor_abs(statistics), statistics.require("group") + 1
    norm_G = np.sqrt(np.bincount(group_U, np.square(mean_U)))
    return np.divide(mean_U, norm_G[group_U], out=np.zeros_like(mean_U), where=norm_G[group_U] > 0)


def snip(statistics: GateStatistics) -> np.ndarray:
    """Take each gate's share of the connection sensitivity.

    s_u = |E[g_u]| / Σ_v |E[g_v]| (Lee et al. 2019, eq. 6, on gates); meant for networks before training.

    Returns:
        Saliency of shape [U], which sums to 1.

    Raises:
        BadInput: Every mean gradient is 0.
    """
    sensitivity_U = np.abs(mean_gradient(statistics))
    total = sensitivity_U.sum()
    if total == 0:
        raise BadInput("every mean gate gradient is 0, so that snip has nothing to share out; choose another criterion")
    return sensitivity_U / total
