"""How well predictions agree with what was measured: numbers by ablation → correlations with bootstrap intervals.

Everything here is arithmetic on arrays. The decision that is not obvious: all criteria are resampled by the same draws,
so that two of them can be compared on each draw; intervals of single criteria overlap long after a paired difference is
clear of zero, because what is hard to predict is hard for all of them.

Shape suffixes: A ablations, B held-out batches, R replicates of the bootstrap.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

REPLICATES = 1000
LOW, HIGH = 2.5, 97.5
"""Percentiles of the replicates that bound an interval."""

LEAST_IN_GROUP = 3
"""Ablations from which on a correlation within a group is worth computing."""

_HALVES = 50
"""Random splits of the held-out batches that a reliability is averaged over."""

Correlate = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Correlation along the last axis; NaN where one side is constant."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """A statistic and its replicates; NaN where it is not defined.

    Attributes:
        value: On what was measured.
        replicates_R: On each draw of the bootstrap.
    """

    value: float
    replicates_R: np.ndarray

    @property
    def bounds(self) -> tuple[float, float]:
        """The 95 % percentile interval (Efron 1979)."""
        known = self.replicates_R[np.isfinite(self.replicates_R)]
        if not len(known):
            return float("nan"), float("nan")
        low, high = np.percentile(known, (LOW, HIGH))
        return float(low), float(high)


def pearson(x_A: np.ndarray, y_A: np.ndarray) -> np.ndarray:
    """Correlate along the last axis (Pearson); NaN where one side is constant."""
    x_A, y_A = (np.asarray(side, dtype=np.float64) for side in (x_A, y_A))
    x_A, y_A = (side / np.maximum(np.abs(side).max(-1, keepdims=True), np.finfo(float).tiny) for side in (x_A, y_A))
    x_A, y_A = (side - side.mean(-1, keepdims=True) for side in (x_A, y_A))
    spread = np.sqrt(np.square(x_A).sum(-1) * np.square(y_A).sum(-1))
    flat = spread <= 1e-14 * x_A.shape[-1]
    return np.where(flat, np.nan, (x_A * y_A).sum(-1) / np.where(flat, 1.0, spread)).clip(-1, 1)


def spearman(x_A: np.ndarray, y_A: np.ndarray) -> np.ndarray:
    """Correlate ranks along the last axis (Spearman), ties sharing their mean rank; NaN where one side is constant."""
    return pearson(rankdata(x_A, axis=-1), rankdata(y_A, axis=-1))


def draws(count: int, seed: int) -> np.ndarray:
    """Draw `REPLICATES` times `count` of `count` things with replacement, shape [R, count]."""
    return np.random.default_rng([seed, 2]).integers(max(1, count), size=(REPLICATES, count))


def agreement(correlate: Correlate, predicted_A: np.ndarray, measured_A: np.ndarray, draws_RA: np.ndarray) -> Estimate:
    """Correlate predictions with measurements over all ablations; the bootstrap draws ablations."""
    if len(measured_A) < 3:
        return Estimate(float("nan"), np.empty(0))
    value = float(correlate(predicted_A, measured_A))
    return Estimate(value, correlate(predicted_A[draws_RA], measured_A[draws_RA]))


def agreement_within(
    correlate: Correlate, predicted_A: np.ndarray, measured_A: np.ndarray, group_A: np.ndarray, seed: int
) -> Estimate:
    """Correlate within each group and average over groups; the bootstrap draws groups.

    Groups with fewer than `LEAST_IN_GROUP` ablations are left out. A constant prediction says nothing about its group,
    and counts as 0.
    """
    found: list[float] = []
    for group in np.unique(group_A):
        inside_A = group_A == group
        if inside_A.sum() >= LEAST_IN_GROUP and np.ptp(measured_A[inside_A]) > 0:
            found.append(float(np.nan_to_num(correlate(predicted_A[inside_A], measured_A[inside_A]))))
    if not found:
        return Estimate(float("nan"), np.empty(0))
    values = np.array(found)
    return Estimate(float(values.mean()), values[draws(len(values), seed)].mean(1))


def reliability(correlate: Correlate, change_AB: np.ndarray, sizes_B: np.ndarray, seed: int) -> float:
    """Estimate how well the measurement would agree with itself on other images of the same number.

    The batches are split into halves at random, both halves' loss changes correlated, and the mean r over splits
    stepped up to the full number by 2 r / (1 + r) (Spearman 1910; Brown 1910). Its square root is the most that a
    perfect prediction could be expected to reach. NaN where there are fewer than 2 batches or 3 ablations.
    """
    ablations, batches = change_AB.shape
    if batches < 2 or ablations < 3:
        return float("nan")
    rng = np.random.default_rng([seed, 3])
    found = []
    for _ in range(_HALVES):
        order = rng.permutation(batches)
        halves = (order[: batches // 2], order[batches // 2 :])
        one, other = (np.average(change_AB[:, half], axis=1, weights=sizes_B[half]) for half in halves)
        found.append(float(correlate(one, other)))
    mean = float(np.mean(found))
    return 2 * mean / (1 + mean) if mean > -1 else float("nan")


def standard_error(change_AB: np.ndarray, sizes_B: np.ndarray) -> np.ndarray:
    """Estimate the standard error of each mean loss change from how batches differ, shape [A]; NaN for one batch."""
    ablations, batches = change_AB.shape
    if batches < 2:
        return np.full(ablations, np.nan)
    weights_B = sizes_B / sizes_B.sum()
    residual_AB = change_AB - (change_AB @ weights_B)[:, None]
    return np.sqrt((np.square(weights_B * residual_AB)).sum(1) * batches / (batches - 1))


def clearly_better(best: Sequence[Estimate], other: Sequence[Estimate]) -> bool:
    """Say whether the mean of `best` is above that of `other` on all but 2.5 % of the paired draws.

    Undefined correlations, those of a constant prediction, count as 0.
    """
    differences = [
        np.nan_to_num(one.replicates_R) - np.nan_to_num(two.replicates_R)
        for one, two in zip(best, other, strict=True)
        if len(one.replicates_R) and len(two.replicates_R)
    ]
    return bool(differences) and float(np.percentile(np.mean(differences, axis=0), LOW)) > 0
