"""Fine-tune a saved result: a folder, images → another folder like it, with new tensors and a history.

Beside the result lies ``NAME.training`` with ``checkpoint.safetensors`` while it runs, and ``log.jsonl``, one line per
epoch, for good. The decision that is not obvious: the result itself is written once, at the end, so that a folder which
exists is always one that was trained to the end.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from archscan import saving
from archscan.data import ImageSet, evaluation_images
from archscan.errors import BadInput
from archscan.evaluation import require_classes, top_one
from archscan.exporters import check_formats, export_pair
from archscan.exporters.folder import example_of, open_pair
from archscan.folders import write_whole
from archscan.options import ProgressFactory, silent
from archscan.processes import Place, joined
from archscan.report.html import render_html
from archscan.report.model import Accuracy, Report, Saved
from archscan.report.training import Moment, TrainingRun, told
from archscan.saved import open_original, open_saved, read_result
from archscan.sources import Subject
from archscan.training.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from archscan.training.distillation import open_teacher
from archscan.training.images import AugmentedImages, open_epochs
from archscan.training.settings import TrainSettings
from archscan.training.trainer import Job, Trained, run

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
_EVALUATION_BATCH = 128


@dataclass(frozen=True)
class Request:
    """What to fine-tune, on what, to where.

    Attributes:
        folder: A saved result.
        data: Images to learn from: a folder, a zip or ``digits``.
        eval_data: Images for the accuracy; None for no accuracy.
        output: Where to; None for the folder's name with ``-finetuned``.
        teacher: See `distillation.open_teacher`.
        settings: How to train.
        resume: Go on with the unfinished run that lies beside the output.
        overwrite: Replace a result that is there, and without `resume` an unfinished run too.
        device: Kind of device.
        exports: Formats to write besides: ``onnx``, ``pt2``, ``script``.
        command_line: As typed.
    """

    folder: Path
    data: str
    eval_data: str | None = None
    output: Path | None = None
    teacher: str | None = None
    settings: TrainSettings = field(default_factory=TrainSettings)
    resume: bool = False
    overwrite: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    exports: tuple[str, ...] = ()
    command_line: str = ""


RESUME = "go on from the last epoch with --resume"
"""What to do when a process of the run is lost."""


def finetune_folder(
    request: Request, progress: ProgressFactory = silent, watch: Callable[[Moment], None] = lambda _moment: None
) -> tuple[Saved, Trained]:
    """Fine-tune a saved result and save it as another one, under ``torchrun`` in all its processes.

    Raises:
        BadInput: Something asked for cannot be had; no result is written then.
    """
    with joined(request.device, RESUME) as place:
        target = (request.output or Path(f"{request.folder}-finetuned")).expanduser()
        saving.check_target(target, overwrite=request.overwrite)
        if request.exports:
            check_formats(request.exports)
        work = _Work(target.resolve())
        start = work.start(request)
        place.wait()  # nobody writes before all have looked
        with progress(f"Opening {request.folder}") as step:
            step(0, 0)
            report, recipe, _ = read_result(request.folder)
            subject, steps = open_saved(request.folder), saving.read_history(request.folder)
            teacher = open_teacher(request.folder, recipe, subject, request.teacher)
        images, evaluation = _images(request, subject, place, progress)
        job = Job(subject.model, images, request.settings, teacher, evaluation, place)
        trained = run(job, resume_from=start, save=work.save, watch=watch)
        kept = None if report.keep_ratio is None else report.keep_ratio.macs
        history = replace(trained.history, command_line=request.command_line, macs_kept=kept)
        if place.is_first:
            report = _report(request, report, history, evaluation, images, progress, place.device)
            page = render_html(report)
            saving.save(target, trained.model, steps, recipe, report.to_json(), page, overwrite=request.overwrite)
            work.finish()
            if request.exports:
                pair, example = open_pair(target, None), example_of(report)
                report = export_pair(target, pair, example, request.exports, progress=progress)
        place.wait()
    return Saved(report, target), replace(trained, history=history)


class _Work:
    """The folder of a run that is not finished."""

    def __init__(self, target: Path) -> None:
        self.folder = target.with_name(f"{target.name}.training")

    def start(self, request: Request) -> Checkpoint | None:
        """Say where to go on; None for the beginning.

        Raises:
            BadInput: There is an unfinished run and it is neither to be resumed nor replaced, or there is none.
        """
        file = self.folder / CHECKPOINT
        if request.resume:
            return read_checkpoint(file)
        if file.exists() and not request.overwrite:
            raise BadInput(
                f"{self.folder} holds an unfinished run; pass --resume to go on, or --overwrite to start anew"
            )
        return None

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint, and the log as far as it tells of it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{self.folder} cannot be written: {error.strerror or error}") from error
        write_checkpoint(self.folder / CHECKPOINT, checkpoint)
        write_whole(self.folder / LOG, "".join(f"{json.dumps(row)}\n" for row in checkpoint.state["history"]))

    def finish(self) -> None:
        """Remove the checkpoint; the log stays."""
        (self.folder / CHECKPOINT).unlink(missing_ok=True)


def _images(
    request: Request, subject: Subject, place: Place, progress: ProgressFactory
) -> tuple[AugmentedImages, ImageSet | None]:
    with progress("Reading training images") as step:
        images = open_epochs(request.data, subject.preprocessing, request.settings, place, step)
    evaluation = None
    if request.eval_data is not None:
        with progress("Reading evaluation images") as step:
            evaluation = evaluation_images(
                request.eval_data, subject.preprocessing, batch_size=_EVALUATION_BATCH, progress=step
            )
    named = {f"--data {request.data}": images.classes}
    if evaluation is not None:
        named[f"--eval-data {request.eval_data}"] = evaluation.classes
    for source, classes in named.items():
        require_classes(classes, subject.num_classes, source, "it cannot learn them; pass images of its classes")
    return images, evaluation


def _report(
    request: Request,
    report: Report,
    history: TrainingRun,
    evaluation: ImageSet | None,
    images: AugmentedImages,
    progress: ProgressFactory,
    device: torch.device,
) -> Report:
    """Change a report to that of the fine-tuned network; what was exported or measured of the other one goes."""
    accuracy, after = None, history.epochs[-1].eval_accuracy
    if evaluation is not None and after is not None:
        accuracy = Accuracy(_dense_accuracy(request.folder, evaluation, progress, device), after, len(evaluation))
    notes = [*report.notes, *told(history)]
    if images.damaged:
        notes.append(f"{len(images.damaged)} training images could not be read and were replaced by the next ones.")
    return replace(report, accuracy=accuracy, exports=(), notes=tuple(notes), history=(*report.history, history))


def _dense_accuracy(
    folder: Path, evaluation: ImageSet, progress: ProgressFactory, device: torch.device
) -> float | None:
    try:
        dense: nn.Module = open_original(folder)
    except BadInput:
        return None
    with progress("Evaluating the original") as step:
        step(0, 0)
        return top_one(dense.to(device), evaluation.batches()).accuracy


def finetune_saved(
    folder: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    eval_data: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    teacher: str | None = None,
    settings: TrainSettings | None = None,
    device: torch.device | None = None,
    overwrite: bool = False,
    resume: bool = False,
    watch: Callable[[Moment], None] = lambda _moment: None,
) -> Trained:
    """Fine-tune a saved result from Python; arguments as in `Request`."""
    request = Request(
        Path(folder),
        str(data),
        None if eval_data is None else str(eval_data),
        None if output is None else Path(output),
        teacher,
        settings or TrainSettings(),
        resume,
        overwrite,
        device or torch.device("cpu"),
    )
    return finetune_folder(request, watch=watch)[1]
