"""The loss's own expansion, sign included: gate statistics → saliency [U].

Removing unit u changes the loss by −E[g_u] + ½ H_uu + …; with the empirical Fisher for the Hessian, both terms come
from the per-sample gradients of one backward pass. Published criteria drop the first term (near a minimum it should
vanish) or square it away. On a finite set of images it does not vanish: it is what removal does to *these* images.
"""

import numpy as np

from archscan.gate_statistics import GateStatistics


def loss_change(statistics: GateStatistics) -> np.ndarray:
    """Estimate the loss change of removing each unit alone, to second order, with the sign of the first.

    s_u = max(0, −E[g_u] + ½ E[g_u²]): the expansion of LeCun et al. (1990, eq. 1) with its first-order term kept, as
    WoodTaylor keeps it (Singh and Alistarh 2020), and the Fisher's diagonal for the Hessian's. A unit whose removal is
    estimated to help counts as free.

    Returns:
        Saliency of shape [U], in units of the loss.
    """
    gradient_NU = statistics.require("sample_gradient")
    second_U = 0.5 * np.square(gradient_NU, dtype=np.float64).mean(0)
    return np.maximum(0.0, second_U - gradient_NU.mean(0, dtype=np.float64))
