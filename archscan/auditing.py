"""``archscan audit``: options → images, audit → `AuditReport` → ``audit.json`` and ``audit.html``.

The decision that is not obvious: what criteria score on and what they are judged on never share an image. Without a
source of their own, the held-out ones are drawn from the same one, after the calibration images.
"""

import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from archscan.audit import AuditSettings, audit, measured_rows, rank, reliability_of
from archscan.audit.run import Audit, free_counts
from archscan.criteria import criterion
from archscan.data import ImageSet, calibration_images, evaluation_images
from archscan.errors import BadInput
from archscan.evaluation import require_classes
from archscan.folders import check_replaceable, replacing
from archscan.groups import Coupling
from archscan.losses import classification_loss
from archscan.opening import Batches, open_model, refusing_bad_files, use_machine
from archscan.options import AUDIT_SAMPLES, SYNTHETIC, AuditOptions, ProgressFactory
from archscan.remarks import weights_of
from archscan.report.audit import AuditReport, Images, json_text
from archscan.report.audit_html import render_html
from archscan.report.model import RANDOM_WEIGHTS, Environment
from archscan.slimming import Stopwatch, analyse
from archscan.sources import Subject

JSON_FILE, HTML_FILE = "audit.json", "audit.html"

_NO_LOSS = "no loss can be measured; audit on images of the classes that the model was trained for"


@dataclass(frozen=True, eq=False)
class SavedAudit:
    """An audit and the folder that it was written to."""

    report: AuditReport
    folder: Path


@dataclass(frozen=True, eq=False)
class _Images:
    """What to score on, what to measure on, and where the latter are from."""

    calibration: ImageSet
    held_out: ImageSet


@refusing_bad_files
def audit_command(options: AuditOptions, progress: ProgressFactory) -> SavedAudit:
    """Run ``archscan audit``: open, read images, score, remove, measure, rank, write.

    Raises:
        ArchscanError: Something asked for cannot be had; nothing is written then.
    """
    _check_options(options)
    watch = Stopwatch()
    device = use_machine(options.run)
    with watch.stage("open"), progress(f"Opening {options.model.name}") as step:
        step(0, 0)
        subject = open_model(options.model, options.data, options.run.seed)
        coupling = analyse(subject.model, subject.example_input).coupling
    folder = options.output.folder or Path("reports") / f"{subject.name}-audit"
    check_audit_folder(folder, overwrite=options.output.overwrite)
    with watch.stage("data"):
        images = _read_images(options, subject, progress)
    with watch.stage("audit"):
        found = audit(
            subject.model.to(device),
            coupling,
            Batches(images.calibration),
            Batches(images.held_out),
            classification_loss,
            options.criteria,
            settings=AuditSettings(options.units, options.sets, seed=options.run.seed),
            progress=progress,
        )
    report = replace(
        report_of(found, coupling, subject.name),
        weights=weights_of(subject.weights),
        calibration=_described(images.calibration),
        held_out=_described(images.held_out),
        warnings=tuple(_warnings(subject)),
        seconds=watch.seconds,
        environment=Environment(torch.__version__, str(device), torch.get_num_threads(), platform.python_version()),
        command_line=options.command_line,
    )
    write_audit(report, folder, overwrite=options.output.overwrite)
    return SavedAudit(report, folder)


def report_of(found: Audit, coupling: Coupling, model: str) -> AuditReport:
    """Put an audit in numbers; what only a command knows (weights, files, times) is left out."""
    rows = rank(found)
    units, groups = free_counts(coupling)
    notes = []
    if coupling.mixing:
        notes.append(
            f"Statistics are taken over channels ({coupling.mixing[0]}), so that removed units are masked here and the"
            " rebuilt network differs from that a little."
        )
    if not found.losses.skipped:
        notes.append(
            "Every removal ran the whole network, since its modules do not return the same when they are called again."
        )
    return AuditReport(
        model=model,
        weights=None,
        calibration=None,
        held_out=None,
        seed=found.settings.seed,
        dense_loss=found.losses.dense,
        free_units=units,
        free_groups=groups,
        winner=rows[0].name,
        criteria=rows,
        reliability=reliability_of(found),
        ablations=measured_rows(found, coupling),
        unscored=dict(found.unscored),
        notes=tuple(notes),
    )


# --- options and images ---------------------------------------------------------------------------------------------


def _check_options(options: AuditOptions) -> None:
    """Refuse, before anything is opened, what is unknown and what could measure nothing."""
    for name in options.criteria or ():
        criterion(name)
    for source in (options.data.source, options.data.eval_source):
        if source == SYNTHETIC:
            raise BadInput("noise has no labels to measure a loss with; give --data images, with a folder per class")


def _read_images(options: AuditOptions, subject: Subject, progress: ProgressFactory) -> _Images:
    data, seed = options.data, options.run.seed
    samples = data.samples or AUDIT_SAMPLES
    wanted = samples + (options.held_out if data.eval_source is None else 0)
    with progress("Reading calibration images") as step:
        found = calibration_images(
            data.source,
            subject.preprocessing,
            samples=wanted,
            batch_size=data.batch_size,
            seed=seed,
            progress=step,
        )
    require_classes(found.classes, subject.num_classes, f"--data {data.source}", _NO_LOSS)
    if data.eval_source is None:
        if len(found) < wanted:
            raise BadInput(
                f"--data {data.source} has {len(found)} images, and {samples} to score on and {options.held_out} to "
                "measure on were asked for; lower --samples or --held-out, or give --eval-data"
            )
        return _Images(_part(found, slice(samples)), _part(found, slice(samples, None)))
    with progress("Reading held-out images") as step:
        held_out = evaluation_images(
            data.eval_source,
            subject.preprocessing,
            samples=options.held_out,
            batch_size=data.batch_size,
            seed=seed,
            progress=step,
        )
    require_classes(held_out.classes, subject.num_classes, f"--eval-data {data.eval_source}", _NO_LOSS)
    return _Images(found, held_out)


def _part(images: ImageSet, part: slice) -> ImageSet:
    return replace(images, pixels_NCHW=images.pixels_NCHW[part], labels_N=images.labels_N[part])


def _described(images: ImageSet) -> Images:
    return Images(images.spec, len(images), len(images.skipped))


def _warnings(subject: Subject) -> Iterator[str]:
    if subject.weights.kind == "random":
        yield f"{RANDOM_WEIGHTS}, so this says nothing about the trained network ({subject.weights.reason})."


# --- writing --------------------------------------------------------------------------------------------------------


def check_audit_folder(folder: Path, *, overwrite: bool) -> Path:
    """See, before any work, that an audit can be written to a folder; return it, resolved.

    Raises:
        BadInput: It is a file, exists without `overwrite`, holds what no audit wrote, or cannot be written.
    """
    return check_replaceable(folder, (JSON_FILE, HTML_FILE), "which no audit wrote", overwrite=overwrite)


def write_audit(report: AuditReport, folder: Path, *, overwrite: bool = False) -> None:
    """Write ``audit.json`` and ``audit.html``; the folder appears at once and whole, or not at all.

    Raises:
        BadInput: See `check_audit_folder`; or the disk refuses.
    """
    with replacing(check_audit_folder(folder, overwrite=overwrite)) as partial:
        (partial / JSON_FILE).write_text(json_text(report), encoding="utf-8")
        (partial / HTML_FILE).write_text(render_html(report), encoding="utf-8")
