"""Put an audit in numbers: `Audit` → the rows of an `AuditReport`, ranked.

A criterion's score is the mean of its Spearman correlations over the whole network, for single units and for sets;
where one kind was not drawn, the other's alone. A tie is a difference that the paired bootstrap cannot tell from none.
"""

from dataclasses import dataclass

import numpy as np

from archscan.audit.agreement import (
    Correlate,
    Estimate,
    agreement,
    agreement_within,
    clearly_better,
    draws,
    pearson,
    reliability,
    spearman,
    standard_error,
)
from archscan.audit.run import Audit, Prediction
from archscan.groups import Coupling
from archscan.report.audit import (
    Agreement,
    AuditedCriterion,
    Interval,
    MeasuredAblation,
    OwnPlan,
    Reliability,
)

LEAST_RATIOS = 3
"""Groups with a ratio from which on their spread is worth a number."""


@dataclass(frozen=True, eq=False)
class _Sample:
    """What was measured of one kind of ablation, and the draws that all criteria are resampled by."""

    places: np.ndarray
    change_A: np.ndarray
    draws_RA: np.ndarray

    @classmethod
    def of(cls, audit: Audit, places: np.ndarray) -> "_Sample":
        return cls(places, audit.losses.change_A[places], draws(len(places), audit.settings.seed))

    def agree(self, correlate: Correlate, predicted_A: np.ndarray) -> Estimate:
        return agreement(correlate, predicted_A[self.places], self.change_A, self.draws_RA)

    def agreement(self, predicted_A: np.ndarray) -> Agreement:
        return Agreement(*(interval(self.agree(way, predicted_A)) for way in (pearson, spearman)))


def rank(audit: Audit) -> tuple[AuditedCriterion, ...]:
    """Rank the audited criteria, the best first."""
    units, sets = samples_of(audit)
    ranked = {
        each.name: [found for sample in (units, sets) if not np.isnan((found := _ranking(sample, each)).value)]
        for each in audit.predictions
    }
    scores = {name: float(np.mean([each.value for each in found])) if found else 0.0 for name, found in ranked.items()}
    order = sorted(audit.predictions, key=lambda each: -scores[each.name])
    best = ranked[order[0].name]
    rows = []
    for each in order:
        tied = each is order[0] or not clearly_better(best, ranked[each.name])
        rows.append(_row(audit, each, scores[each.name], tied, units, sets))
    return tuple(rows)


def _ranking(sample: _Sample, prediction: Prediction) -> Estimate:
    """Give the rank correlation that counts; that of a constant prediction is 0 where there is something to predict."""
    found = sample.agree(spearman, prediction.summed_A)
    if np.isnan(found.value) and len(sample.change_A) >= 3 and np.ptp(sample.change_A) > 0:
        return Estimate(0.0, np.zeros(len(sample.draws_RA)))
    return found


def samples_of(audit: Audit) -> tuple[_Sample, _Sample]:
    """Tell single units from sets."""
    single_A = np.array([ablation.kind == "unit" for ablation in audit.drawn])
    return _Sample.of(audit, np.flatnonzero(single_A)), _Sample.of(audit, np.flatnonzero(~single_A))


def _row(
    audit: Audit, prediction: Prediction, score: float, tied: bool, units: _Sample, sets: _Sample
) -> AuditedCriterion:
    group_A = np.array([audit.drawn[place].groups[0] for place in units.places], dtype=np.int64)
    predicted_A = prediction.summed_A[units.places]
    within = [
        interval(agreement_within(way, predicted_A, units.change_A, group_A, audit.settings.seed))
        for way in (pearson, spearman)
    ]
    ratio, spread = scale(predicted_A, units.change_A, group_A)
    change_A = audit.losses.change_A
    return AuditedCriterion(
        name=prediction.name,
        score=score,
        tied=tied,
        units=units.agreement(prediction.summed_A),
        within=Agreement(*within),
        sets=sets.agreement(prediction.summed_A),
        quadratic=None if prediction.quadratic_A is None else sets.agreement(prediction.quadratic_A),
        ratio=ratio,
        spread=spread,
        plans=tuple(
            OwnPlan(kept, None if place is None else float(change_A[place]))
            for kept, place in zip(audit.settings.kept, prediction.own_plans, strict=True)
        ),
        predicted=tuple(prediction.summed_A.tolist()),
    )


def scale(predicted_A: np.ndarray, change_A: np.ndarray, group_A: np.ndarray) -> tuple[float | None, float | None]:
    """Compare the size of predictions with that of loss changes, over all ablations and group by group.

    Returns:
        Sum of predictions over sum of changes, and the 90th over the 10th percentile of the same ratio by group. A
        group whose changes or predictions do not sum to more than 0 has no ratio.
    """
    groups = [(predicted_A[group_A == g].sum(), change_A[group_A == g].sum()) for g in np.unique(group_A)]
    ratios = [predicted / change for predicted, change in groups if predicted > 0 and change > 0]
    total = change_A.sum()
    ratio = float(predicted_A.sum() / total) if total > 0 else None
    if len(ratios) < LEAST_RATIOS:
        return ratio, None
    low, high = np.percentile(ratios, (10, 90))
    return ratio, float(high / low)


def interval(estimate: Estimate) -> Interval:
    """Put an estimate in JSON values; None for NaN."""
    return Interval(*(None if np.isnan(number) else float(number) for number in (estimate.value, *estimate.bounds)))


def reliability_of(audit: Audit) -> Reliability:
    """Say how far the measurement itself can be trusted."""
    losses, seed = audit.losses, audit.settings.seed
    found: list[float | None] = []
    for sample in samples_of(audit):
        change_AB = losses.change_AB[sample.places]
        for way in (pearson, spearman):
            value = reliability(way, change_AB, losses.sizes_B, seed)
            found.append(None if np.isnan(value) else value)
    units = samples_of(audit)[0].places
    errors_A = standard_error(losses.change_AB[units], losses.sizes_B)
    unknown = not len(units) or bool(np.isnan(errors_A).any())
    noise = None if unknown else float(np.mean(np.abs(losses.change_A[units]) < 2 * errors_A))
    units_pearson, units_spearman, sets_pearson, sets_spearman = found
    return Reliability(units_pearson, units_spearman, sets_pearson, sets_spearman, noise)


def measured_rows(audit: Audit, coupling: Coupling) -> tuple[MeasuredAblation, ...]:
    """List what was drawn and what it did."""
    count = len(audit.drawn)
    errors_A = standard_error(audit.losses.change_AB[:count], audit.losses.sizes_B)
    return tuple(
        MeasuredAblation(
            kind=ablation.kind,
            units=ablation.units,
            groups=tuple(coupling.groups[number].name for number in ablation.groups),
            loss_change=float(change),
            standard_error=None if np.isnan(error) else float(error),
        )
        for ablation, change, error in zip(audit.drawn, audit.losses.change_A[:count], errors_A, strict=True)
    )
