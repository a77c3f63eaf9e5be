"""Criteria from the posterior of the gates in Laplace's approximation: gate statistics → saliency [U].

Around the trained gates z = 1, the posterior is a normal distribution whose precision is N F plus that of the prior.

Shape suffixes: N samples, P units of one group, U all units.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from archscan.criteria.factors import dampening, dense, diagonal, gram, leverage
from archscan.criteria.mfac import groups_of
from archscan.gate_statistics import GateStatistics

PRIOR = 0.01
"""Precision of the prior of a gate as a fraction of what the samples give a gate on average: weak."""


@dataclass(frozen=True)
class GroupEvidence:
    """How far the calibration images determine the gates of a channel group (MacKay 1992).

    Attributes:
        group: Number of the group; -1 for units of no group.
        parameters: Number of gates, P.
        well_determined: γ, between 0 and P.
        prior_precision: α, at its most probable value; 0 where no gate has a gradient.
    """

    group: int
    parameters: int
    well_determined: float
    prior_precision: float

    @property
    def use(self) -> float:
        """Share of the group's gates that are determined, γ / P."""
        return self.well_determined / self.parameters


def laplace_snr(statistics: GateStatistics) -> np.ndarray:
    """Divide each gate by its posterior standard deviation.

    s_u = |μ_u| / σ_u with μ_u = 1 and σ_u² = 1 / (N F_uu + λ) (Graves 2011, on gates).

    Returns:
        Saliency of shape [U], a pure number.
    """
    factors_NU = statistics.require("sample_gradient")
    return np.sqrt(len(factors_NU) * (diagonal(factors_NU) + dampening(factors_NU, PRIOR)))


def evidence(statistics: GateStatistics) -> np.ndarray:
    """Take each gate's share of the number of well-determined parameters of its channel group.

    γ = Σ_i λ_i / (λ_i + α) = Σ_u [H (H + αI)⁻¹]_uu with H = N F_g and eigenvalues λ_i (MacKay 1992); s_u is the
    term of unit u.

    Returns:
        Saliency of shape [U], in parameters: 0 where the images say nothing about a gate, at most 1.
    """
    factors_NU = statistics.require("sample_gradient")
    saliency_U = np.zeros(statistics.unit_count)
    for members in groups_of(statistics):
        own_NP = factors_NU[:, members]
        precision = prior_precision(own_NP)
        if precision > 0:
            saliency_U[members] = leverage(own_NP, precision / len(own_NP))
    return saliency_U


def group_evidence(statistics: GateStatistics) -> tuple[GroupEvidence, ...]:
    """Count the well-determined parameters of each channel group, by rising number; needs what `evidence` needs."""
    group_U, saliency_U = statistics.require("group"), evidence(statistics)
    return tuple(
        GroupEvidence(
            int(group_U[members[0]]),
            len(members),
            float(saliency_U[members].sum()),
            prior_precision(statistics.require("sample_gradient")[:, members]),
        )
        for members in groups_of(statistics)
    )


def prior_precision(factors_NP: np.ndarray) -> float:
    """Find the most probable precision α of the prior of a group's gates.

    α = γ(α) / Σ_u z_u² with z = 1 (MacKay 1992): α is the mean of λ_i / (λ_i + α) over all P eigenvalues of
    N F_g. That falls as α rises, so that there is one solution; it lies between its own value at α = 1, and 1.

    Returns:
        α, between 0 and 1; 0 where every gradient is 0.
    """
    samples, units = factors_NP.shape
    small = gram(factors_NP) if samples < units else samples * dense(factors_NP)
    eigenvalues = np.clip(np.linalg.eigvalsh(small), 0.0, None)

    def share(precision: float) -> float:
        return float((eigenvalues / (eigenvalues + precision)).sum()) / units

    least = share(1.0)
    if least == 0.0:
        return 0.0
    return float(brentq(lambda precision: share(precision) - precision, least, 1.0, xtol=1e-15 * least))
