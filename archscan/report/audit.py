"""The numbers of one audit: `AuditReport`, its JSON form, and the sentences that say what they mean.

Numbers only, as in `report.model`: every field is the key of the same name in ``audit.json``. A number that does not
exist (the correlation of a constant) is None. Terminal and HTML print the same rows and sentences, which are made here.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from archscan.report.model import Environment, Weights, installed_version
from archscan.report.views import listed


@dataclass(frozen=True)
class Interval:
    """A statistic with its 95 % bootstrap interval; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Agreement:
    """Correlations of predicted with measured loss changes."""

    pearson: Interval
    spearman: Interval


@dataclass(frozen=True)
class OwnPlan:
    """What a criterion's own plan does to the loss, masked and not repaired.

    Attributes:
        kept: Fraction of the MACs that it keeps.
        loss_change: Measured; None where widths do not get there.
    """

    kept: float
    loss_change: float | None


@dataclass(frozen=True)
class AuditedCriterion:
    """What the audit says of one criterion.

    Attributes:
        name: As users type it.
        score: What it is ranked by.
        tied: Whether its score cannot be told from the winner's.
        units: Single units, over the whole network.
        within: Single units within their group, the mean over groups.
        sets: Sets of units, over the whole network; the prediction is the sum of saliencies.
        quadratic: The same sets predicted by the quadratic form; None where the criterion has none.
        ratio: Predicted over measured change, both summed over single units; None where that says nothing.
        spread: How far that ratio differs between groups: the 90th over the 10th percentile; None where too few
            groups have one.
        plans: Loss changes by its own plans.
        predicted: Sum of saliencies of each ablation, in the order of the report's.
    """

    name: str
    score: float
    tied: bool
    units: Agreement
    within: Agreement
    sets: Agreement
    quadratic: Agreement | None
    ratio: float | None
    spread: float | None
    plans: tuple[OwnPlan, ...]
    predicted: tuple[float, ...]


@dataclass(frozen=True)
class MeasuredAblation:
    """Units that were removed at once, and what that did.

    Attributes:
        kind: ``unit``, ``set of one group`` or ``set of several groups``.
        units: Their numbers.
        groups: Names of the groups that they come from.
        loss_change: On the held-out images.
        standard_error: Of the loss change, from how batches differ; None where there is one batch.
    """

    kind: str
    units: tuple[int, ...]
    groups: tuple[str, ...]
    loss_change: float
    standard_error: float | None


@dataclass(frozen=True)
class Reliability:
    """How well the measurement agrees with itself: split-half correlations stepped up to all images.

    The square root is the most that a perfect prediction can be expected to reach. None where it cannot be estimated.

    Attributes:
        units_pearson: Of single units.
        units_spearman: Of single units, by rank.
        sets_pearson: Of sets.
        sets_spearman: Of sets, by rank.
        within_noise: Share of the single units whose loss change is less than two standard errors from 0.
    """

    units_pearson: float | None
    units_spearman: float | None
    sets_pearson: float | None
    sets_spearman: float | None
    within_noise: float | None


@dataclass(frozen=True)
class Images:
    """A set of images that an audit ran on."""

    source: str
    images: int
    skipped: int = 0


@dataclass(frozen=True)
class AuditReport:
    """One audit.

    Attributes:
        model: Name of the network.
        dense_loss: On the held-out images, with nothing removed.
        free_units: Units that are free to be slimmed, of which a sample was removed.
        free_groups: Groups that they lie in.
        criteria: The best first.
        ablations: Units, then sets.
        winner: Name of the first criterion.
        unscored: Criteria that could not be scored, with the reason.
        exact: Whether the masked network is the rebuilt one.
    """

    model: str
    weights: Weights | None
    calibration: Images | None
    held_out: Images | None
    seed: int
    dense_loss: float
    free_units: int
    free_groups: int
    winner: str
    criteria: tuple[AuditedCriterion, ...]
    reliability: Reliability
    ablations: tuple[MeasuredAblation, ...]
    unscored: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    environment: Environment | None = None
    command_line: str = ""
    command: Literal["audit"] = "audit"
    archscan: str = field(default_factory=installed_version)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    def of_kind(self, *kinds: str) -> tuple[int, ...]:
        """Places of the ablations of these kinds."""
        return tuple(place for place, ablation in enumerate(self.ablations) if ablation.kind in kinds)


def json_text(report: AuditReport) -> str:
    """Return the text of ``audit.json``, newline at the end."""
    return json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


# Sentences and cells --------------------------------------------------------------------------------------------------

SCORE_NOTE = (
    "score: mean of the rank correlations (Spearman) over units and over sets; in brackets 95% bootstrap intervals; "
    "* cannot be told from the first; last: what the loss rises by when slimmed to that part of the MACs, unrepaired"
)
SCALE_NOTE = (
    "Pearson's r, which a few large loss changes decide; ratio: predicted over measured, summed over units; spread: "
    "how much that ratio differs between groups (90th over 10th percentile), 1 x being ideal for sums over layers"
)


MOST_NAMED = 4
"""Ties that a verdict lists by name."""


def number(value: float | None) -> str:
    """Return two decimals, or a dash for None."""
    return "-" if value is None else f"{value:.2f}"


def cell(interval: Interval) -> str:
    """Return ``0.86 [.80 .91]``, or a dash for what is not defined."""
    if interval.value is None or interval.low is None or interval.high is None:
        return number(interval.value)
    low, high = (f"{bound:.2f}".replace("0.", ".", 1) for bound in (interval.low, interval.high))
    return f"{interval.value:.2f} [{low} {high}]"


def factor(value: float | None) -> str:
    """Return three significant digits, or a dash for None."""
    return "-" if value is None else f"{value:.3g}"


def change(value: float | None) -> str:
    """Return a loss change with its sign, in two significant digits, or a dash for None."""
    return "-" if value is None else f"{value:+.2g}"


def tied_with_winner(report: AuditReport) -> tuple[str, ...]:
    """Name the criteria that cannot be told from the winner."""
    return tuple(row.name for row in report.criteria if row.tied and row.name != report.winner)


def verdict(report: AuditReport) -> str:
    """Say in one sentence which criterion is right about this network."""
    best = report.criteria[0]
    tied = tied_with_winner(report)
    if not tied:
        rest = f", ahead of the other {len(report.criteria) - 1}" if len(report.criteria) > 1 else ""
    elif len(tied) == len(report.criteria) - 1:
        rest = ", but none of the others can be told from it"
    elif len(tied) > MOST_NAMED:
        rest = f", but {len(tied)} of the other {len(report.criteria) - 1} cannot be told from it"
    else:
        rest = f", but {listed(tied)} cannot be told from it"
    return (
        f"{report.winner} predicts best what removing channels does to {report.model} (score {best.score:.2f}){rest}."
    )


def measured_line(report: AuditReport) -> str:
    """Say what was removed and what it was measured on."""
    units, everything = len(report.of_kind("unit")), len(report.ablations)
    images = "" if report.held_out is None else f" on {report.held_out.images:,} held-out images"
    return (
        f"{units:,} of {report.free_units:,} free units one at a time, and {everything - units:,} sets, over "
        f"{report.free_groups:,} groups{images}; dense loss {report.dense_loss:.4f}"
    )


def scored_line(report: AuditReport) -> str | None:
    """Say what the criteria scored on; None where that is not known."""
    found = report.calibration
    return None if found is None else f"{found.images:,} images of {found.source}"


def own_line(report: AuditReport) -> str | None:
    """Say whose own plan loses least at the smallest budget; None where no plan was made."""
    last = [(row.plans[-1].loss_change, row.name) for row in report.criteria if row.plans]
    known = [(loss, name) for loss, name in last if loss is not None]
    if not known:
        return None
    least, name = min(known)
    of_winner = report.criteria[0].plans[-1].loss_change
    than = "" if name == report.winner else f", by {report.winner} {change(of_winner)}"
    kept = report.criteria[0].plans[-1].kept
    return (
        f"slimmed to {100 * kept:g}% of the MACs without repair, the loss rises least by {name} ({change(least)}{than})"
    )


def ceiling_line(report: AuditReport) -> str:
    """Say what bounds every correlation: how well the measurement agrees with itself."""
    bounds = {
        "units": (report.reliability.units_spearman, report.reliability.units_pearson),
        "sets": (report.reliability.sets_spearman, report.reliability.sets_pearson),
    }
    known = [
        f"{ceiling(rank):.2f} by rank and {ceiling(linear):.2f} by Pearson for {kind}"
        for kind, (rank, linear) in bounds.items()
        if rank is not None and linear is not None
    ]
    if not known:
        return "not known: that takes at least two held-out batches and three removals"
    noise = report.reliability.within_noise
    lost = "" if noise is None else f"; {100 * noise:.0f}% of the units change it by less than 2 standard errors"
    return f"a perfect prediction would reach {'; '.join(known)}, since the held-out images are a sample{lost}"


def basis_rows(report: AuditReport) -> list[tuple[str, str]]:
    """Return, by name, what the correlations rest on, and why criteria are missing."""
    rows = [
        ("Measured", measured_line(report)),
        ("Scored on", scored_line(report)),
        ("Ceiling", ceiling_line(report)),
        ("Own plans", own_line(report)),
        *((f"No {name}", reason) for name, reason in report.unscored.items()),
    ]
    return [(name, line) for name, line in rows if line]


def ceiling(reliability: float) -> float:
    """Turn a reliability into the most that a perfect prediction can be expected to correlate."""
    return math.sqrt(max(0.0, reliability))
