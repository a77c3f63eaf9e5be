"""Criteria from Taylor expansions of the loss around all gates open: gate statistics → saliency [U].

Removing unit u changes the loss by −g_u + ½ H_uu + …, with g and H the loss's gradient and Hessian by the gates.
"""

import numpy as np

from archscan.gates import GateStatistics


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
