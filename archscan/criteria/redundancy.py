"""How many directions the gradients of a group span: gate statistics → saliency [U].

A group's gradient matrix has one row per sample and one column per gate. Its effective rank (Roy and Vetterli 2007),
the exponential of the entropy of its singular values, says how many of the group's units the loss can tell apart
on these samples; the others repeat what is there.
"""

import numpy as np

from archscan.gate_statistics import GateStatistics


def gradient_rank(statistics: GateStatistics) -> np.ndarray:
    """Measure each unit's part in the directions that its group's gradients span.

    s_u = Σ_i≤r V_ui², the leverage of unit u in the r leading right singular vectors of the group's gradient matrix, r
    being its effective rank (of a broken direction, the fraction counts). Over a group it sums up to r, so that the
    mean saliency of a group is the share of its width that it uses.

    Returns:
        Saliency of shape [U], in [0, 1]; a share of a direction, not of the loss.
    """
    gradients_NU, group_U = statistics.require("sample_gradient"), statistics.require("group")
    saliency_U = np.zeros(statistics.unit_count)
    for group in np.unique(group_U):
        members = np.flatnonzero(group_U == group)
        _, singular, vectors_RU = np.linalg.svd(gradients_NU[:, members].astype(np.float64), full_matrices=False)
        counted_R = np.clip(effective_rank(singular) - np.arange(len(singular)), 0.0, 1.0)
        saliency_U[members] = counted_R @ np.square(vectors_RU)
    return saliency_U


def effective_rank(singular_R: np.ndarray) -> float:
    """Compute exp(−Σ p log p) with p the singular values over their sum (Roy and Vetterli 2007); 0 where all are 0."""
    total = singular_R.sum()
    if total <= 0:
        return 0.0
    p = singular_R[singular_R > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))
