"""The sharpest direction of each group: gate statistics → saliency [U]."""

import numpy as np

from archscan.errors import BadInput
from archscan.gate_statistics import GateStatistics


def spectral(statistics: GateStatistics) -> np.ndarray:
    """Bound the second-order loss change of removing each unit by the sharpest direction of its group.

    s_u = ½ λ ‖w_u‖², w_u being the weights that read the unit, and λ the largest absolute eigenvalue of the Hessian by
    the weights, restricted to the directions of the w_u of its group: removing u is a step of length ‖w_u‖ (cf. Dong et
    al. 2019, who rank layers by λ).

    Returns:
        Saliency of shape [U], in units of the loss.

    Raises:
        BadInput: No weights that read a unit are known.
    """
    norm_U = statistics.require("read_norm")
    if not norm_U.any():
        raise BadInput("no weights are known that read a unit; choose a criterion other than spectral")
    return 0.5 * statistics.require("sharpness") * np.square(norm_U)
