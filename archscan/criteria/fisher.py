"""Criteria from the Fisher information of the gates: gate statistics → saliency [U]."""

import numpy as np

from archscan.gate_statistics import GateStatistics


def obd(statistics: GateStatistics) -> np.ndarray:
    """Estimate the loss change of removing each unit alone, at a minimum of the loss.

    s_u = ½ F_uu with F = E_n[g_n g_nᵀ], the Fisher information in place of the Hessian (LeCun et al. 1990; Theis et
    al. 2018). The gradients are those of the calibration loss: of the true labels where there are any (the
    empirical Fisher), of drawn labels where the loss draws them (the true one).

    Returns:
        Saliency of shape [U], in units of the loss.
    """
    return 0.5 * np.square(statistics.require("sample_gradient"), dtype=np.float64).mean(0)
