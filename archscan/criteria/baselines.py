"""Criteria that do not differentiate the loss: gate statistics → saliency [U]."""

import numpy as np

from archscan.errors import BadInput
from archscan.gate_statistics import GateStatistics


def random(statistics: GateStatistics) -> np.ndarray:
    """Draw saliencies at random, from the statistics' seed: what any criterion has to beat.

    Returns:
        Saliency of shape [U], uniform in [0, 1).
    """
    return np.random.default_rng(statistics.seed).random(statistics.unit_count)


def magnitude(statistics: GateStatistics) -> np.ndarray:
    """Take the L2 norm of a unit's weights, its producers' and its consumers' (Han et al. 2015, for units).

    Returns:
        Saliency of shape [U], in units of the weights.
    """
    return statistics.require("weight_norm").copy()


def bn_scale(statistics: GateStatistics) -> np.ndarray:
    """Take the mean abs(γ) of a unit's BatchNorm channels (Liu et al. 2017).

    A unit without a BatchNorm gets the largest scale of all: nothing is known against it, so that it goes last.

    Returns:
        Saliency of shape [U], in units of γ.
    """
    scale_U = statistics.require("bn_scale")
    known_U = ~np.isnan(scale_U)
    if not known_U.any():
        raise BadInput("no channel that could be removed has a BatchNorm; choose a criterion other than bn-scale")
    return np.where(known_U, scale_U, scale_U[known_U].max())
