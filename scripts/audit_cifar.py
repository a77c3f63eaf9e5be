"""Audit all criteria on the CIFAR ResNets with real weights and images, and see what bounds their correlations.

Writes ``reports/audit-cifar.json`` and ``.md``. Each network is audited as ``archscan audit`` does it; the loss changes
of the same single units are then measured on the calibration images as well, which tells a criterion's own error from
what the sample of images costs. The first network is audited once more on ``--larger`` and as many other images.

python scripts/audit_cifar.py
python scripts/audit_cifar.py --networks resnet20 --units 140 --samples 2048 --held-out 2048 --larger 0
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmarking import (
    names,
    open_cifar,
    origin,
    parser_on_cifar,
    provenance,
    restart_with_quiet_memory,
    table,
    write,
)
from rich.console import Console

import archscan  # noqa: F401 - before timm, which brings torchvision
from archscan.audit import Audit, AuditSettings, audit, measure, rank, reliability_of
from archscan.audit.agreement import pearson, spearman
from archscan.data import calibration_images
from archscan.groups import Coupling, couple
from archscan.losses import classification_loss
from archscan.report.audit import AuditedCriterion, Reliability, ceiling, cell, change, factor, number
from archscan.report.progress import progress_on
from archscan.sources import Subject

SMALL = 0.5
"""Loss change from which on no expansion around the trained network can be asked to hold."""

FIRST_ORDER = ("obd", "loss-change", "taylor-abs", "taylor-fo")
"""What is audited on the larger sample: what one backward pass gives."""


@dataclass(frozen=True)
class SameImages:
    """Correlations for the same single units, by where the loss change is measured.

    Attributes:
        spearman: With the loss change on the calibration images.
        pearson: The same, linear.
        pearson_small: Linear, held-out, over the units whose removal changes the loss by less than `SMALL`.
    """

    spearman: float
    pearson: float
    pearson_small: float


@dataclass(frozen=True)
class Row:
    """One network on one sample of images."""

    network: str
    samples: int
    held_out: int
    units: int
    small_units: int
    sets: int
    dense_loss: float
    reliability: Reliability
    measured_twice: SameImages
    """The loss change itself, measured on the calibration images, as if it were a criterion."""
    criteria: tuple[AuditedCriterion, ...]
    same_images: dict[str, SameImages]
    unscored: dict[str, str]


def run(
    subject: Subject, coupling: Coupling, data: Path, names: Sequence[str] | None, given: argparse.Namespace
) -> Row:
    """Audit one network, and measure its single units on the calibration images too."""
    progress = progress_on(Console(stderr=True))
    images = list(
        calibration_images(
            data / "cifar10-train.zip",
            subject.preprocessing,
            samples=given.samples + given.held_out,
            batch_size=given.batch_size,
            seed=given.seed,
        ).batches()
    )
    split = given.samples // given.batch_size
    settings = AuditSettings(given.units, given.sets, (0.8,), given.seed)
    found = audit(
        subject.model,
        coupling,
        images[:split],
        images[split:],
        classification_loss,
        names,
        settings=settings,
        progress=progress,
    )
    single = [ablation for ablation in found.drawn if ablation.kind == "unit"]
    with progress("Removing, on the calibration images") as removing:
        again = measure(
            subject.model, coupling, single, images[:split], classification_loss, seed=given.seed, progress=removing
        )
    return row_of(subject.name, found, again.change_A)


def row_of(network: str, found: Audit, same_A: np.ndarray) -> Row:
    """Put an audit and the second measurement in numbers; units come first among the ablations."""
    units = len(same_A)
    held_A = found.losses.change_A[:units]
    small_A = held_A < SMALL

    def of(predicted_A: np.ndarray) -> SameImages:
        return SameImages(
            float(np.nan_to_num(spearman(predicted_A, same_A))),
            float(np.nan_to_num(pearson(predicted_A, same_A))),
            float(np.nan_to_num(pearson(predicted_A[small_A], held_A[small_A]))),
        )

    twice = SameImages(
        float(spearman(same_A, held_A)),
        float(pearson(same_A, held_A)),
        float(pearson(same_A[small_A], held_A[small_A])),
    )
    return Row(
        network,
        found.samples,
        found.losses.samples,
        units,
        int(small_A.sum()),
        len(found.drawn) - units,
        found.losses.dense,
        reliability_of(found),
        twice,
        rank(found),
        {each.name: of(each.summed_A[:units]) for each in found.predictions},
        dict(found.unscored),
    )


def section(row: Row) -> str:
    """Write one network's table and what bounds it."""
    header = (
        *("criterion", "score", "units", "same images", "Pearson", "Pearson, small", "in groups", "sets"),
        *("sets, Pearson", "at 0.8", "ratio", "spread"),
    )
    lines = []
    for each in row.criteria:
        same = row.same_images[each.name]
        name = f"{each.name} *" if each.tied else each.name
        lines.append(
            (
                *(name, number(each.score), cell(each.units.spearman), number(same.spearman)),
                *(cell(each.units.pearson), number(same.pearson_small), number(each.within.spearman.value)),
                *(cell(each.sets.spearman), number(each.sets.pearson.value), change(each.plans[0].loss_change)),
                *(factor(each.ratio), factor(each.spread)),
            )
        )
    return "\n\n".join(
        (
            f"## {row.network}: {row.samples:,} images to score on, {row.held_out:,} to measure on",
            table(header, lines),
            best(row),
            bounds(row),
        )
    )


def best(row: Row) -> str:
    """Name the criterion that is ahead by each measure."""
    measures: list[tuple[str, Callable[[AuditedCriterion], float | None]]] = [
        ("units", lambda each: each.units.spearman.value),
        ("units on the same images", lambda each: row.same_images[each.name].spearman),
        ("small units by Pearson", lambda each: row.same_images[each.name].pearson_small),
        ("sets", lambda each: each.sets.spearman.value),
    ]
    words = []
    for what, of in measures:
        known = [(value, each.name) for each in row.criteria if (value := of(each)) is not None]
        if known:
            value, name = max(known)
            words.append(f"{name} for {what} ({value:.2f})")
    planned = [(made.loss_change, each.name) for each in row.criteria for made in each.plans if made.loss_change]
    loss, name = min((change, name) for change, name in planned if change is not None)
    return f"Ahead: {', '.join(words)}; by its own plan, {name} ({loss:+.2f})."


def bounds(row: Row) -> str:
    """Say what bounds a network's correlations."""
    known, twice = row.reliability, row.measured_twice
    rank, linear = (ceiling(value or 0.0) for value in (known.units_spearman, known.units_pearson))
    sets = "" if known.sets_spearman is None else f", and {ceiling(known.sets_spearman):.2f} by rank for sets"
    return (
        f"{row.units} single units and {row.sets} sets; dense loss {row.dense_loss:.4f}. "
        f"{100 * (known.within_noise or 0.0):.0f} % of the units change the loss by less than two standard errors. "
        f"Even a perfect prediction would be expected to reach no more than {rank:.2f} by rank and {linear:.2f} by "
        f"Pearson for units{sets}, since the held-out images are a sample. Measuring instead of predicting, on the "
        f"calibration images, gives {twice.spearman:.2f} by rank and {twice.pearson:.2f} by Pearson. "
        f"{row.units - row.small_units} units change the loss by {SMALL} or more; on the others it gives a Pearson "
        f"correlation of {twice.pearson_small:.2f}."
    )


LEGEND = """`units`, `in groups`, `sets`: Spearman's rank correlation of predicted with measured loss change on held-out
training images, with 95 % bootstrap intervals; `score`: the mean of `units` and `sets`, by which criteria are ranked;
`*`: cannot be told from the first. `same images`: that of units with the loss change on the very images that were
scored on. `Pearson, small`: over the units whose removal changes the loss by less than 0.5. `at 0.8`: what the loss
rises by when the network is slimmed to 0.8 of its MACs by that criterion, unrepaired. `ratio`: predicted over measured,
summed over units; `spread`: how much that ratio differs between channel groups (90th over 10th percentile)."""


def main() -> None:
    """Audit and write the report."""
    parser = parser_on_cifar(__doc__, "reports/audit-cifar")
    parser.add_argument("--networks", type=names, default=["resnet20", "resnet56"])
    parser.add_argument("--units", type=int, default=90)
    parser.add_argument("--sets", type=int, default=24)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=512)
    parser.add_argument("--larger", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    restart_with_quiet_memory(given.threads)
    fewer = {"units": given.units // 2, "sets": 0, "samples": given.larger, "held_out": given.larger}
    jobs: list[tuple[str, Sequence[str] | None, argparse.Namespace]]
    jobs = [(network, None, given) for network in given.networks]
    if given.larger:
        jobs.insert(1, (given.networks[0], FIRST_ORDER, argparse.Namespace(**{**vars(given), **fewer})))
    made = provenance(given.threads)
    rows: list[Row] = []
    for network, criteria, wanted in jobs:  # written after each, since the last network takes the longest
        rows.append(_audited(network, criteria, wanted))
        data: dict[str, Any] = {"made": made, "rows": [asdict(row) for row in rows]}
        parts = ["# Which criterion is right about the CIFAR ResNets", LEGEND, *map(section, rows), origin(made)]
        write(given.output, data, "\n\n".join(parts))


def _audited(network: str, criteria: Sequence[str] | None, given: argparse.Namespace) -> Row:
    subject = open_cifar(given.data, f"{network}_cifar")
    return run(subject, couple(subject.model, subject.example_input), given.data, criteria, given)


if __name__ == "__main__":
    main()
