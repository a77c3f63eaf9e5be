"""The numbers of several results side by side: `Report`s of one network → `Comparison`, and what to say of it.

Numbers and sentences without layout; terminal, page and JSON say the same. The decision that is not obvious: a quantity
is compared only where it means the same in every result. Accuracies on other images, saliencies by another criterion
and times on another machine are left out of plots and fronts, with a sentence that says why.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from archscan.budgets import NOUNS
from archscan.errors import BadInput
from archscan.report import views
from archscan.report.model import (
    Accuracy,
    CostTotals,
    KeepRatio,
    Latency,
    Report,
    SaliencyLost,
    Target,
    installed_version,
)
from archscan.report.plain import plain
from archscan.report.views import listed, percent, plural, si

CostKind = Literal["macs", "params", "memory", "latency"]
QualityKind = Literal["accuracy", "saliency"]

BY_TARGET_ALONE = ("target", "repair")
"""Settings that the saliency of a plan does not depend on, or only as it is meant to."""


class Given(NamedTuple):
    """One result to compare: its name, where it lies, its numbers, and what its plan says of how it was made."""

    name: str
    folder: str
    report: Report
    made: Mapping[str, Any]


@dataclass(frozen=True)
class Compared:
    """One result.

    Attributes:
        name: Short, and no other result's.
        folder: Where it lies.
        targets: What was asked for.
        settings: How it was made, a word or a clause each, by name.
        after: What it costs, counted.
        keep_ratio: Kept fractions of the dense costs.
        latency: Measured; None where it was not.
        accuracy: Measured; None where it was not.
        saliency_lost: Estimated by its criterion.
        verified: Whether its verification passed.
    """

    name: str
    folder: str
    targets: tuple[Target, ...]
    settings: Mapping[str, str]
    after: CostTotals
    keep_ratio: KeepRatio
    latency: Latency | None
    accuracy: Accuracy | None
    saliency_lost: SaliencyLost | None
    verified: bool


@dataclass(frozen=True)
class CostAxis:
    """A cost that every result has: the kept fraction of the dense network's, in the order of the results."""

    kind: CostKind
    name: str
    kept: tuple[float, ...]


@dataclass(frozen=True)
class QualityAxis:
    """How good each result is, comparably.

    Attributes:
        kind: ``accuracy`` (more is better) or ``saliency`` lost (less is better).
        name: In words.
        values: In the order of the results.
        dense: Of the dense network; None where it was not measured.
    """

    kind: QualityKind
    name: str
    values: tuple[float, ...]
    dense: float | None

    @property
    def losses(self) -> tuple[float, ...]:
        """The same with less being better."""
        return tuple(-value for value in self.values) if self.kind == "accuracy" else self.values


@dataclass(frozen=True)
class Front:
    """The results that no other beats: none costs no more and is no worse, and better in one of the two."""

    quality: QualityKind
    cost: CostKind
    results: tuple[str, ...]


@dataclass(frozen=True)
class GroupKept:
    """Channels of one group in each result, None where a result has no such group."""

    name: str
    units: int
    frozen: bool
    kept: tuple[int | None, ...]


@dataclass(frozen=True)
class Comparison:
    """Several results of one dense network.

    Attributes:
        archscan: Version that compared them.
        model: Name of the network.
        input_shape: Of the input that the costs are for.
        before: Costs of the dense network.
        results: In the order given.
        costs: What they can be compared by.
        qualities: The same.
        fronts: One for each quality and cost.
        groups: In the order of execution.
        shared: Settings that all results have in common.
        differing: Names of the settings that they do not.
        alarms: What changes what all the numbers mean, a sentence each.
        notes: What was not compared and why.
    """

    archscan: str
    model: str
    input_shape: tuple[int, ...]
    before: CostTotals
    results: tuple[Compared, ...]
    costs: tuple[CostAxis, ...]
    qualities: tuple[QualityAxis, ...]
    fronts: tuple[Front, ...]
    groups: tuple[GroupKept, ...]
    shared: Mapping[str, str]
    differing: tuple[str, ...]
    alarms: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and strings."""
        values: dict[str, Any] = plain(asdict(self))
        return values


def json_text(comparison: Comparison) -> str:
    """Return the comparison as JSON, newline at the end."""
    return json.dumps(comparison.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


# -------------------------------------------------------------- comparing


def compare(given: Sequence[Given]) -> Comparison:
    """Put results of one network side by side.

    Raises:
        BadInput: They are fewer than two, or of different networks.
    """
    if len(given) < 2:
        raise BadInput("one result alone cannot be compared; give two or more folders")
    first = given[0].report
    for other in given[1:]:
        _require_same_network(given[0], other)
    results = tuple(_compared(each) for each in given)
    names = list(dict.fromkeys(name for result in results for name in result.settings))
    values = {name: {result.settings.get(name, "") for result in results} for name in names}
    differing = tuple(name for name in names if len(values[name]) > 1)
    costs, no_costs = _costs(results, first.before)
    qualities, no_qualities = _qualities(results, differing)
    return Comparison(
        archscan=installed_version(),
        model=first.model,
        input_shape=first.input_shape,
        before=first.before,
        results=results,
        costs=costs,
        qualities=qualities,
        fronts=tuple(
            Front(quality.kind, cost.kind, tuple(results[place].name for place in front(cost.kept, quality.losses)))
            for quality in qualities
            for cost in costs
        ),
        groups=_groups(given),
        shared={name: values[name].pop() for name in names if name not in differing},
        differing=differing,
        alarms=_alarms(given),
        notes=(*no_costs, *no_qualities),
    )


def front(costs: Sequence[float], losses: Sequence[float]) -> tuple[int, ...]:
    """Find the points that no other beats, both numbers being better when less.

    Returns:
        Their places, by cost; of several equal points all.
    """
    points = list(zip(costs, losses, strict=True))

    def beaten(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)

    return tuple(sorted((place for place, point in enumerate(points) if not beaten(point)), key=lambda at: points[at]))


def _require_same_network(one: Given, other: Given) -> None:
    here, there = one.report, other.report
    if (here.input_shape, here.before.macs, here.before.params) != (
        there.input_shape,
        there.before.macs,
        there.before.params,
    ):
        raise BadInput(
            f"{one.name} is of {_network(here)} and {other.name} of {_network(there)}; compare results of one network "
            "at one input size"
        )


def _network(report: Report) -> str:
    sides = "x".join(map(str, report.input_shape[1:]))
    return f"{report.model} ({si(report.before.macs, 'MACs')} at {sides}, {si(report.before.params)} parameters)"


def _compared(given: Given) -> Compared:
    report = given.report
    assert report.after is not None
    assert report.keep_ratio is not None
    return Compared(
        name=given.name,
        folder=given.folder,
        targets=_targets(report),
        settings=_settings(given),
        after=report.after,
        keep_ratio=report.keep_ratio,
        latency=report.latency if report.latency is not None and report.latency.ratio is not None else None,
        accuracy=report.accuracy if report.accuracy is not None and report.accuracy.after is not None else None,
        saliency_lost=report.saliency_lost,
        verified=report.verification is not None and report.verification.passed,
    )


def _targets(report: Report) -> tuple[Target, ...]:
    return () if report.target is None else (report.target, *report.further_targets)


def _settings(given: Given) -> dict[str, str]:
    """Say in words how a result was made; what is not known is left out."""
    report, made = given.report, given.made
    asked = " and ".join(f"{percent(target.ratio)} of the {NOUNS[target.kind]}" for target in _targets(report))
    epochs = sum(len(run.epochs) for run in report.history)
    settings = {
        "target": "lossless" if report.lossless else asked if report.command == "slim" else report.command,
        "criterion": report.criterion,
        "scored on": views.data_line(report),
        "images": _word(made.get("data")),
        "rounds": _word(made.get("rounds")),
        "set effects": _word(made.get("set_effects")),
        "repair": _word(made.get("recover")),
        "fine-tuned": f"{plural(epochs, 'epoch')}" if epochs else None,
        "weights": views.weights_line(report),
        "seed": str(report.seed),
        "archscan": report.archscan,
        "torch": report.environment.torch if report.environment else None,
    }
    return {name: value for name, value in settings.items() if value}


def _word(value: object) -> str | None:
    """Read a setting from a plan, which may hold anything."""
    return str(value) if isinstance(value, str | int) and value != "" else None


def _costs(results: Sequence[Compared], dense: CostTotals) -> tuple[tuple[CostAxis, ...], list[str]]:
    axes = [
        CostAxis("macs", "MACs", tuple(result.keep_ratio.macs for result in results)),
        CostAxis("params", "parameters", tuple(result.keep_ratio.params for result in results)),
    ]
    peaks = [result.after.peak_bytes for result in results if result.after.peak_bytes is not None]
    if dense.peak_bytes and len(peaks) == len(results):
        axes.append(CostAxis("memory", "peak activation memory", tuple(peak / dense.peak_bytes for peak in peaks)))
    notes = []
    known = [result.latency for result in results if result.latency is not None]
    ratios = tuple(latency.ratio for latency in known if latency.ratio is not None)
    ways = {(latency.device, latency.batch, latency.threads, latency.format) for latency in known}
    if len(ratios) == len(results) and len(ways) == 1:
        axes.append(CostAxis("latency", "time", ratios))
    elif ratios and len(ways) > 1:
        notes.append("Times are not compared: they were measured on different devices, batches, threads or formats.")
    elif ratios:
        notes.append(f"Times are not compared: only {len(ratios)} of {len(results)} results have one.")
    return tuple(axes), notes


def _qualities(results: Sequence[Compared], differing: Sequence[str]) -> tuple[tuple[QualityAxis, ...], list[str]]:
    axes, notes = [], []
    known = [result.accuracy for result in results if result.accuracy is not None]
    after = tuple(accuracy.after for accuracy in known if accuracy.after is not None)
    dense = {accuracy.before for accuracy in known if accuracy.before is not None}
    samples = {accuracy.samples for accuracy in known}
    if len(after) == len(results) and len(samples) == 1 and len(dense) <= 1:
        name = f"top-1 accuracy on {plural(samples.pop(), 'image')}"
        axes.append(QualityAxis("accuracy", name, after, dense.pop() if dense else None))
    elif after and len(after) < len(results):
        notes.append(f"Accuracies are not compared: only {len(after)} of {len(results)} results have one.")
    elif after:
        notes.append("Accuracies are not compared: they were measured on different images, or of different weights.")
    lost = tuple(result.saliency_lost.plan for result in results if result.saliency_lost is not None)
    others = [name for name in differing if name not in (*BY_TARGET_ALONE, "fine-tuned", "archscan", "torch")]
    if len(lost) == len(results) and not others:
        axes.append(QualityAxis("saliency", f"saliency lost, by {results[0].settings.get('criterion')}", lost, 0.0))
    elif others:
        notes.append(f"Saliencies lost are not compared: the results differ by {listed(others)}.")
    elif lost:
        notes.append(f"Saliencies lost are not compared: only {len(lost)} of {len(results)} results have one.")
    if not axes:
        notes.append("There is nothing to compare quality by; slim again with --eval-data to measure accuracy.")
    return tuple(axes), notes


def _groups(given: Sequence[Given]) -> tuple[GroupKept, ...]:
    """List the groups of the first result, and after them what only others have: forwards may tie groups later."""
    rows = [{group.name: group for group in each.report.groups} for each in given]
    names = dict.fromkeys(
        group.name for each in given for group in sorted(each.report.groups, key=lambda group: group.depth)
    )
    found = []
    for name in names:
        known = [row[name] for row in rows if name in row]
        kept = tuple(row[name].kept if name in row else None for row in rows)
        found.append(GroupKept(name, known[0].units, all(group.frozen for group in known), kept))
    return tuple(found)


def _alarms(given: Sequence[Given]) -> tuple[str, ...]:
    """Collect the banners of the reports; each says how many results it holds for where that is not all."""
    texts: dict[str, str] = {}
    counts: dict[str, int] = {}
    for each in given:
        for banner in views.banners(each.report):
            texts.setdefault(banner.title, banner.text)
            counts[banner.title] = counts.get(banner.title, 0) + 1
    of = f" of {len(given)} results"
    return tuple(
        f"{title}: {text}" if counts[title] == len(given) else f"{title} in {counts[title]}{of}: {text}"
        for title, text in texts.items()
    )
