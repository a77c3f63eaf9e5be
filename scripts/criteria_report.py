"""Write what `bench_criteria.py` measured as a page: points → a table and a paragraph made from its numbers."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarking import origin, table

from archscan.options import DEFAULT_CRITERION

CRITERIA_USE = """archscan scores once where nothing else is said; `/rounds` slims in steps of 5 % of the dense MACs and
scores anew before each, `/kept` protects the first convolution and every block's second one, so that only widths inside
blocks change."""
PEER_USE = """Torch-Pruning is used through its documented `BasePruner` with `global_pruning`, single channels and the
classifier ignored: `taylor` is its `GroupTaylorImportance` on gradients of the loss over all calibration images in eval
mode, `l2` its `GroupMagnitudeImportance(p=2)`. `one-shot` takes one step, its pruning ratio bisected to the largest
network that is not above the target; `iterative` takes steps of 1/400 of the channels with fresh scores (and fresh
gradients with every 2.5 % of the MACs) until the target is met. Its index mapping takes a shortcut that pads channels
for an identity, so that it is run in three ways: `as-is`; `kept`, with the first convolution and every block's second
one ignored, so that only widths inside blocks change; `conv`, with those shortcuts written as 1 x 1 convolutions that
compute the same, whose MACs are counted too."""


@dataclass(frozen=True)
class Setting:
    """What all points of one report share; a cached point of another setting is not used."""

    model: str
    scored: int
    recalibrated: int
    evaluated: int
    batch_size: int
    round_to: int | None


@dataclass(frozen=True)
class Point:
    """One network that was slimmed and evaluated.

    Attributes:
        side: ``archscan`` or ``torch-pruning``.
        method: A criterion, or importance/shortcuts/schedule of the peer.
        ratio: Of MACs that may be kept.
        seed: Of the calibration images.
        macs: What was kept, as a fraction, counted by fvcore; None where it failed.
        raw: Accuracy as slimmed, in [0, 1].
        recalibrated: Accuracy with BatchNorm recalibrated.
        seconds: To slim, without evaluation; shared evenly by the ratios that came out of one run.
        failure: Why there is no network.
    """

    side: str
    method: str
    ratio: float
    seed: int
    macs: float | None = None
    raw: float | None = None
    recalibrated: float | None = None
    seconds: float | None = None
    failure: str | None = None

    @property
    def key(self) -> tuple[str, str, float, int]:
        """What names a point."""
        return self.side, self.method, self.ratio, self.seed


@dataclass(frozen=True)
class Summary:
    """A method at one ratio, over seeds: mean, least and largest."""

    side: str
    method: str
    ratio: float
    macs: float
    raw: tuple[float, float, float]
    recalibrated: tuple[float, float, float]
    seeds: int


def summarised(points: Iterable[Point]) -> list[Summary]:
    """Take the mean over seeds, leaving out what failed."""
    together: dict[tuple[str, str, float], list[Point]] = defaultdict(list)
    for point in points:
        if point.recalibrated is not None:
            together[point.side, point.method, point.ratio].append(point)

    def spread(values: Iterable[float | None]) -> tuple[float, float, float]:
        known = [value for value in values if value is not None]
        return fmean(known), min(known), max(known)

    return [
        Summary(
            *key,
            spread(point.macs for point in found)[0],
            spread(point.raw for point in found),
            spread(point.recalibrated for point in found),
            len(found),
        )
        for key, found in together.items()
    ]


def _percent(value: tuple[float, float, float], seeds: int) -> str:
    mean, least, most = (100 * number for number in value)
    return f"{mean:.1f}" if seeds == 1 else f"{mean:.1f} ({least:.1f}–{most:.1f})"  # noqa: RUF001


def tables(summaries: Sequence[Summary], points: Sequence[Point], ratios: Sequence[float]) -> str:
    """Write one table: a row per method, for each ratio the kept MACs and both accuracies; the best come first."""
    by_key = {(entry.side, entry.method, entry.ratio): entry for entry in summaries}
    methods = list(dict.fromkeys((point.side, point.method) for point in points))
    lowest = min(ratios)

    def order(method: tuple[str, str]) -> float:
        found = by_key.get((*method, lowest))
        return -found.recalibrated[0] if found else 1.0

    rows = []
    for method in sorted(methods, key=order):
        row = [("Torch-Pruning " if method[0] == "torch-pruning" else "") + method[1]]
        for ratio in ratios:
            entry = by_key.get((*method, ratio))
            if entry is None:
                row += ["failed", "", ""]
            else:
                accuracies = (_percent(value, entry.seeds) for value in (entry.raw, entry.recalibrated))
                row += [f"{entry.macs:.3f}", *accuracies]
        rows.append(row)
    header = ["method"] + [text for ratio in ratios for text in (f"MACs at {ratio:g}", "raw", "recalibrated")]
    return table(header, rows)


def verdict(summaries: Sequence[Summary], ratios: Sequence[float], evaluated: int) -> str:
    """Say in words what the numbers say, and how sure they are."""
    sentences = []
    for ratio in ratios:
        here = [entry for entry in summaries if entry.ratio == ratio]
        sides = {side: [entry for entry in here if entry.side == side] for side in ("archscan", "torch-pruning")}
        best = {side: max(found, key=lambda entry: entry.recalibrated[0]) for side, found in sides.items() if found}
        said = []
        for side, entry in best.items():
            said.append(f"{side}'s best is {entry.method} with {100 * entry.recalibrated[0]:.1f} %")
        text = f"At {ratio:g} of the MACs, recalibrated, " + " and ".join(said)
        default = next((entry for entry in sides["archscan"] if entry.method == DEFAULT_CRITERION), None)
        if default is not None and "archscan" in best:
            place = 1 + sum(entry.recalibrated[0] > default.recalibrated[0] for entry in sides["archscan"])
            text += (
                f"; the default criterion, {DEFAULT_CRITERION}, has {100 * default.recalibrated[0]:.1f} %, "
                f"place {place} of {len(sides['archscan'])} criteria"
            )
        if len(best) == 2:
            ours, theirs = best["archscan"].recalibrated[0], best["torch-pruning"].recalibrated[0]
            error = math.sqrt((ours * (1 - ours) + theirs * (1 - theirs)) / evaluated)
            sure = "more" if abs(ours - theirs) > 2 * error else "less"
            text += (
                f". The two bests differ by {100 * (ours - theirs):+.1f} points, which is {sure} than twice the "
                f"standard error of the difference ({100 * error:.1f} points, as if of independent images)"
            )
        sentences.append(text + ".")
    return " ".join(sentences)


def markdown(
    points: Sequence[Point], ratios: Sequence[float], setting: Setting, dense: float, made: dict[str, Any]
) -> str:
    """Write the report."""
    summaries = summarised(points)
    seeds = sorted({point.seed for point in points})
    rounding = (
        "the default rounding of widths" if setting.round_to is None else f"widths in multiples of {setting.round_to}"
    )
    failures = [
        f"- {point.side} {point.method} at {point.ratio:g}: {point.failure}" for point in points if point.failure
    ]
    parts = [
        f"# Criteria on {setting.model}",
        f"Top-1 accuracy in percent on {setting.evaluated:,} images that took no part in training or calibration; the "
        f"dense network has {100 * dense:.1f}. Every method scores on the same {setting.scored} calibration images and "
        f"is then evaluated as it is (raw) and with BatchNorm statistics estimated anew on {setting.recalibrated:,} "
        "training images (recalibrated); nothing is fine-tuned. MACs are counted by fvcore on the slim network, as a "
        f"fraction of the dense one's. Seeds of the calibration images: {', '.join(map(str, seeds))}"
        + ("; the mean, with the least and the largest in brackets." if len(seeds) > 1 else "."),
        f"{CRITERIA_USE} Its plans have {rounding}. {PEER_USE}",
        origin(made),
        tables(summaries, points, ratios),
        verdict(summaries, ratios, setting.evaluated),
    ]
    if failures:
        parts += ["What failed:", "\n".join(failures)]
    return "\n\n".join(parts)
