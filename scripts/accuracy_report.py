"""Write what `bench_accuracy.py` measured as a page and a plot for each network: points → tables, verdicts, curves."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarking import origin, table

DEFAULT = "default"
"""The method that is archscan with no options but the data and the target."""

AIMS = {0.7: 0.4, 0.6: 0.8, 0.5: 1.5, 0.4: 3.0}
"""Points of accuracy that ResNet-56 may lose at a fraction of the MACs, as the project has set itself."""

WORDS = {"none": "as slimmed", "bn": "BatchNorm recalibrated", "bias": "mean outputs", "ls": "least squares"} | {
    "blocks": "least squares, then block by block"
}
PEER_USE = """Torch-Pruning is used through its documented `BasePruner` with global ranking, one channel at a time and
400 steps, scored anew before each, with fresh gradients (of the same images, in eval mode) for each 2.5 % of the MACs
that are gone (10 % for `hessian` and `obdc`). `kept` protects the first convolution and every block's second one: its
index mapping takes a shortcut that pads channels for an identity, and its results are worse or it crashes without."""


@dataclass(frozen=True)
class Setting:
    """What all points share; a cached point of another setting is not used."""

    samples: int
    recalibrated: int
    evaluated: int | None
    batch_size: int


@dataclass(frozen=True)
class Point:
    """One network that was slimmed, with its accuracy after each repair.

    Attributes:
        network: A reference network.
        side: ``archscan`` or ``torch-pruning``.
        method: `DEFAULT`, a criterion, or importance/shortcuts/schedule of the peer.
        ratio: Of MACs that may be kept.
        seed: Of the calibration images.
        macs: What was kept, as a fraction, counted by fvcore; None where it failed.
        accuracy: In [0, 1], by recovery.
        seconds: To slim, without evaluation; what all ratios share is in that of the first, or evenly in the peer's.
        failure: Why there is no network.
    """

    network: str
    side: str
    method: str
    ratio: float
    seed: int
    macs: float | None = None
    accuracy: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    failure: str | None = None

    @property
    def key(self) -> tuple[str, str, str, float, int]:
        """What names a point."""
        return self.network, self.side, self.method, self.ratio, self.seed


@dataclass(frozen=True)
class Summary:
    """A method with one recovery at one ratio, over seeds: mean, least and largest accuracy."""

    side: str
    method: str
    recovery: str
    ratio: float
    macs: float
    mean: float
    least: float
    most: float
    seeds: int

    def __str__(self) -> str:
        mean, least, most = (f"{100 * value:.1f}" for value in (self.mean, self.least, self.most))
        return mean if self.seeds == 1 else f"{mean} ({least}–{most})"  # noqa: RUF001


def summarised(network: str, points: Sequence[Point]) -> list[Summary]:
    """Take the mean over seeds, leaving out what failed."""
    together: dict[tuple[str, str, str, float], list[tuple[float, float]]] = defaultdict(list)
    for point in points:
        for recovery, accuracy in point.accuracy.items() if point.network == network else ():
            together[point.side, point.method, recovery, point.ratio].append((point.macs or 0.0, accuracy))
    return [
        Summary(*key, fmean(macs for macs, _ in found), fmean(values), min(values), max(values), len(found))
        for key, found in together.items()
        for values in [[accuracy for _, accuracy in found]]
    ]


def _tables(summaries: Sequence[Summary]) -> str:
    """Write a row for each method and recovery, the best at the middle ratio first."""
    ratios = sorted({entry.ratio for entry in summaries}, reverse=True)
    by_key = {(entry.side, entry.method, entry.recovery, entry.ratio): entry for entry in summaries}
    rows_of = sorted(
        {key[:3] for key in by_key},
        key=lambda row: -fmean(by_key[(*row, ratio)].mean if (*row, ratio) in by_key else 0.0 for ratio in ratios),
    )
    rows = []
    for side, method, recovery in rows_of:
        name = ("Torch-Pruning " if side == "torch-pruning" else "") + method
        cells = [by_key.get((side, method, recovery, ratio)) for ratio in ratios]
        rows.append([name, WORDS[recovery], *(str(cell) if cell else "" for cell in cells)])
    return table(["method", "repair", *(f"{ratio:g}" for ratio in ratios)], rows)


def _verdict(network: str, summaries: Sequence[Summary], dense: float) -> str:
    """Compare the default with the peer's best and with the aims, ratio by ratio."""
    rows = []
    for ratio in sorted({entry.ratio for entry in summaries}, reverse=True):
        here = [entry for entry in summaries if entry.ratio == ratio]
        ours = next((entry for entry in here if entry.method == DEFAULT), None)
        peers = [entry for entry in here if entry.side == "torch-pruning"]
        best = max(peers, key=lambda entry: entry.mean, default=None)
        if ours is None:
            continue
        lost, aim = 100 * (dense - ours.mean), AIMS.get(ratio) if network == "resnet56_cifar" else None
        ahead = f"{100 * (ours.mean - best.mean):+.1f}" if best else ""
        spread = f"{100 * max(ours.most - ours.least, best.most - best.least):.1f}" if best and ours.seeds > 1 else ""
        aimed = "" if aim is None else f"{aim:g} ({'met' if lost <= aim else f'missed by {lost - aim:.2f}'})"
        rows.append([f"{ratio:g}", f"{ours.macs:.3f}", str(ours), f"{lost:.2f}", aimed])
        rows[-1] += [f"{best.method}, {WORDS[best.recovery]}: {best}" if best else "", ahead, spread]
    header = ["MACs asked for", "kept", "default", "points lost", "aim", "peer's best", "ahead by", "largest spread"]
    return table(header, rows)


def markdown(points: Sequence[Point], setting: Setting, dense: Mapping[str, float], made: Mapping[str, Any]) -> str:
    """Write the report."""
    evaluated = "all 5,000" if setting.evaluated is None else f"{setting.evaluated:,}"
    seeds = sorted({point.seed for point in points})
    parts = [
        "# Accuracy without training",
        f"Top-1 accuracy in percent on {evaluated} test images, nothing fine-tuned. Scores and repairs use the same "
        f"{setting.samples} calibration images on both sides, BatchNorm recalibration {setting.recalibrated:,}. MACs "
        f"are counted by fvcore on the slim network. Seeds of the calibration images: {', '.join(map(str, seeds))}; "
        "with several, the mean, and the least and largest in brackets. `default` is what archscan does when it is "
        "given data and a target; the other rows score once and are repaired once, as the second column says.",
        PEER_USE,
        origin(made),
    ]
    for network, accuracy in dense.items():
        summaries = summarised(network, points)
        parts += [
            f"## {network}",
            f"The dense network has {100 * accuracy:.2f} %.",
            _verdict(network, summaries, accuracy),
        ]
        parts += [f"![Accuracy against MACs](accuracy-{network}.svg)", _tables(summaries)]
        failed = sorted(
            {
                f"- {point.side} {point.method}: {point.failure}"
                for point in points
                if point.network == network and point.failure
            }
        )
        parts += ["What failed:", "\n".join(failed)] if failed else []
    return "\n\n".join(part for part in parts if part)


def plot(network: str, points: Sequence[Point], dense: float, path: Path) -> None:
    """Draw accuracy against kept MACs: the default, every criterion's best repair, and the peer's importances."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "archscan", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    from matplotlib import pyplot

    curves: dict[tuple[str, str, str], list[Summary]] = defaultdict(list)
    for entry in summarised(network, points):
        curves[entry.side, entry.method, entry.recovery].append(entry)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    axes.axhline(100 * dense, color="0.6", linewidth=0.8, linestyle=":")
    named = set()
    for (side, method, recovery), found in sorted(curves.items(), key=lambda item: item[0][1] == DEFAULT):
        kind, colour = _kind(side, method, recovery)
        if kind is None:
            continue
        found.sort(key=lambda entry: entry.macs)
        label = None if kind in named else kind
        named.add(kind)
        xs, ys = [entry.macs for entry in found], [100 * entry.mean for entry in found]
        axes.plot(xs, ys, color=colour, marker=".", linewidth=2.2 if method == DEFAULT else 1, label=label)
    axes.set(xlabel="MACs kept (counted)", ylabel="top-1 accuracy in %", title=f"{network}, nothing fine-tuned")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _kind(side: str, method: str, recovery: str) -> tuple[str | None, str]:
    """Name the family of a curve, with a colour that colour-blind readers tell apart (Okabe and Ito 2008)."""
    if method == DEFAULT:
        return "archscan, default", "#D55E00"
    if side == "archscan" and recovery in ("ls", "blocks"):
        return "archscan, each criterion, least squares or block by block", "#E69F00"
    if side == "archscan" and recovery == "bn":
        return "archscan, each criterion, BatchNorm recalibrated", "#56B4E9"
    if side == "torch-pruning" and recovery == "bn":
        return "Torch-Pruning, each importance, BatchNorm recalibrated", "#0072B2"
    return None, ""
