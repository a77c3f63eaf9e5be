"""The report of `reproduce_expand_prune`: measured points → paired differences between seeds, Markdown."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from benchmarking import origin, table
from scipy import stats

CONTROL, WIDE, EVEN = "first network", "wider bottlenecks", "evenly wider"
METRICS: Mapping[str, str] = {"trained": "trained", "slim": "slimmed to the first network's MACs"}
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Point:
    """One network of one seed.

    Attributes:
        seed: Of weights, images and their order.
        way: How it came about.
        start: Whether it was trained from ``scratch``, or ``grown``: on from the copies of trained weights.
        params: Before it was slimmed.
        macs: Likewise, for one image.
        widened: Group → its width in steps, where it got wider.
        dense: Top-1 in [0, 1] of the first network.
        trained: Top-1 after training.
        slim: Top-1 after slimming and fine-tuning; of the first network after fine-tuning alone.
        slim_params: After slimming.
        slim_macs: Likewise.
        seconds: For all of it.
    """

    seed: int
    way: str
    start: str
    params: int
    macs: int
    widened: dict[str, int]
    dense: float
    trained: float
    slim: float
    slim_params: int
    slim_macs: int
    seconds: float

    @property
    def key(self) -> tuple[int, str, str]:
        """What tells points apart."""
        return self.seed, self.way, self.start


@dataclass(frozen=True)
class Difference:
    """Top-1 of wider bottlenecks minus that of the evenly wider network, over seeds.

    Attributes:
        metric: When it was measured.
        start: How both began.
        points: One difference per seed, in percentage points.
        mean: Their mean.
        half_width: Half of the 95% interval of the mean by Student's t; None for a single seed.
    """

    metric: str
    start: str
    points: tuple[float, ...]
    mean: float
    half_width: float | None

    @property
    def verdict(self) -> Literal["better", "worse", "not told apart", "one seed tells nothing"]:
        """What the interval allows to say."""
        if self.half_width is None:
            return "one seed tells nothing"
        if abs(self.mean) <= self.half_width:
            return "not told apart"
        return "better" if self.mean > 0 else "worse"


def differences(points: Sequence[Point]) -> list[Difference]:
    """Compare the two ways seed by seed, for each start and metric that both have."""
    found = {point.key: point for point in points}
    starts = dict.fromkeys(point.start for point in points if point.way == WIDE)
    result = []
    for start in starts:
        seeds = [seed for seed, way, begun in found if (way, begun) == (WIDE, start) and (seed, EVEN, start) in found]
        for metric in METRICS if seeds else ():
            pairs = [(found[seed, WIDE, start], found[seed, EVEN, start]) for seed in seeds]
            gaps = [100 * (getattr(wide, metric) - getattr(even, metric)) for wide, even in pairs]
            result.append(Difference(metric, start, tuple(gaps), float(np.mean(gaps)), _half_width(gaps)))
    return result


def _half_width(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    quantile = stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1)
    return float(quantile * np.std(values, ddof=1) / math.sqrt(len(values)))


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def markdown(points: Sequence[Point], setting: Mapping[str, Any], made: dict[str, Any]) -> str:
    """Write what was measured and what follows from it."""
    seeds = sorted({point.seed for point in points})
    arms = dict.fromkeys((point.way, point.start) for point in points)
    rows = []
    for way, start in arms:
        own = [point for point in points if (point.way, point.start) == (way, start)]
        params, macs = (np.mean([getattr(point, name) for point in own]) for name in ("params", "macs"))
        slim_params, slim_macs = (
            np.mean([getattr(point, name) for point in own]) for name in ("slim_params", "slim_macs")
        )
        rows.append(
            (
                f"{way}, {'trained on' if start == 'grown' else 'from scratch'}",
                f"{params / 1e3:,.0f}",
                f"{macs / 1e6:.1f}",
                _spread([point.trained for point in own]),
                f"{slim_params / 1e3:,.0f}",
                f"{slim_macs / 1e6:.1f}",
                _spread([point.slim for point in own]),
            )
        )
    header = ("network", "params, k", "MACs, M", "top-1, %", "slim: params, k", "MACs, M", "top-1, %")
    lines = [_sentence(found) for found in differences(points)]
    wide = next((point for point in points if point.way == WIDE), None)
    names = ", ".join(f"{name} to {steps}" for name, steps in wide.widened.items()) if wide else "none"
    dense = _spread([point.dense for point in points if point.way == CONTROL] or [point.dense for point in points])
    asked = ", ".join(f"{key} {value}" for key, value in setting.items() if value is not None)
    return "\n\n".join(
        [
            "# Wider bottlenecks against evenly wider networks",
            "Expand-prune (Nonnenmacher et al. 2022) in small, on CIFAR-10. Capacity bottlenecks of a trained network "
            "are widened, and beside that all channel groups by one factor that needs about as many parameters. Both "
            "are trained like the first network, slimmed to its MACs, and fine-tuned; it is trained on and tuned too.",
            f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} ({', '.join(map(str, seeds))}); the first network alone "
            f"reaches {dense}% top-1. Widened, in steps, for seed {seeds[0] if seeds else '-'}: {names}. ± is the "
            f"standard deviation over seeds. Setting: {asked}.",
            table(header, rows),
            "\n".join(f"- {line}" for line in lines),
            origin(made),
        ]
    )


def _sentence(found: Difference) -> str:
    interval = "" if found.half_width is None else f" ± {found.half_width:.2f} (95% interval, paired by seed)"
    start = "on from the copies" if found.start == "grown" else "from scratch"
    gaps = ", ".join(f"{gap:+.1f}" for gap in found.points)
    return (
        f"Trained {start}, {METRICS[found.metric]}: wider bottlenecks minus evenly wider {found.mean:+.2f} points"
        f"{interval}, by seed {gaps}: **{found.verdict}**."
    )
