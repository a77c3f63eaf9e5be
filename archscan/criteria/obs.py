"""Optimal brain surgery on gates (Hassibi and Stork 1993): gate statistics → saliency [U], and what the others do then.

The loss near its minimum is taken as ½ δᵀ(F + λI) δ in the gates' changes δ, F being the Fisher information from
per-sample gradients. OBS removes a unit (δ_u = −1) and lets all the others move to make up for it; OBD lets none move.

The decision that is not obvious: with fewer samples than units F is singular, so that λ decides how freely the others
move. It is a fraction of the mean F_uu. The score leaves out ½ λ, what λ charges every unit for its own removal: ranks
are the same, but a sum of saliencies would mostly count units.
"""

import numpy as np

from archscan.criteria.factors import conditional, dampening, ridge
from archscan.errors import BadInput
from archscan.gate_statistics import GateStatistics

DAMPENING, UPDATE_DAMPENING = 0.001, 0.03
"""λ as a fraction of the mean F_uu, for the score and for the update."""


def obs(statistics: GateStatistics) -> np.ndarray:
    """Estimate the loss change of removing each unit when all others make up for it.

    s_u = ½ / [(F + λI)⁻¹]_uu − ½ λ (Hassibi and Stork 1993, eq. 5, for w_u = 1).

    Returns:
        Saliency of shape [U], in units of the loss.
    """
    factors_NU = statistics.require("sample_gradient")
    return 0.5 * conditional(factors_NU, dampening(factors_NU, DAMPENING))


def obs_update(statistics: GateStatistics, removed_U: np.ndarray) -> np.ndarray:
    """Set the remaining gates to what makes up best for a set of units that are removed together.

    z = 1 + δ with δ = −A⁻¹[:, M] (A⁻¹[M, M])⁻¹ 1_M and A = F + λI, M the removed set (Hassibi and Stork 1993, eq. 5,
    for sets). On what is kept, K, that is (F_KK + λI)⁻¹ F_KM 1: the ridge regression of the sum of what goes on what
    stays.

    Args:
        statistics: With per-sample gradients.
        removed_U: Which units go.

    Returns:
        Gates of shape [U], 0 for the units that go.
    """
    factors_NU = statistics.require("sample_gradient")
    removed_U = checked(removed_U, statistics.unit_count)
    target_N = factors_NU[:, removed_U].sum(1, dtype=np.float64)
    gates_U = np.zeros(statistics.unit_count)
    if not removed_U.all():
        gates_U[~removed_U] = 1 + ridge(factors_NU[:, ~removed_U], target_N, dampening(factors_NU, UPDATE_DAMPENING))
    return gates_U


def checked(removed_U: np.ndarray, unit_count: int) -> np.ndarray:
    """Check that `removed_U` says of every unit whether it goes.

    Raises:
        BadInput: It is not boolean, or has another shape.
    """
    removed_U = np.asarray(removed_U)
    if removed_U.dtype != np.bool_ or removed_U.shape != (unit_count,):
        raise BadInput(
            f"removed_U is {removed_U.dtype} of shape {removed_U.shape}; pass one truth value for each of the"
            f" {unit_count} units"
        )
    return removed_U
