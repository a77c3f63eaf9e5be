"""What every command that makes a network ends with: result → accuracies, report, and a folder with all of it.

The decision that is not obvious: the report is made before anything is written, and writing is a step of its own, since
of several processes only the first one writes, once all have come that far.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from archscan import saving
from archscan.data import ImageSet
from archscan.evaluation import top_one
from archscan.exporters import Pair, export_pair
from archscan.opening import Batches
from archscan.options import ProgressFactory, SlimOptions, WidenOptions
from archscan.planner import Plan
from archscan.remarks import Images, data_of, qualified, weights_of
from archscan.report import model as numbers
from archscan.report.model import Report
from archscan.results import Context, SlimResult, report_of, save_result
from archscan.sources import Subject
from archscan.stages import Stopwatch

ResultT = TypeVar("ResultT", bound=SlimResult)


@dataclass(frozen=True, eq=False)
class Origin:
    """What a network was made from.

    Attributes:
        subject: The original, on the device where all was computed.
        history: How it had come about, where it was itself a saved result.
        images: What it was scored and measured on.
        device: Where all was computed.
        warnings: Sentences that must not be overlooked.
        notes: Sentences to know.
    """

    subject: Subject
    history: tuple[saving.Step, ...]
    images: Images
    device: torch.device
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def conclude(
    result: ResultT,
    origin: Origin,
    options: SlimOptions | WidenOptions,
    watch: Stopwatch,
    progress: ProgressFactory,
    before: float | None = None,
) -> tuple[ResultT, Report]:
    """Measure a new network, and tell of it all that can be told.

    Args:
        result: The network; it is moved to the CPU.
        origin: What it was made from.
        options: What was asked for.
        watch: Times what comes before and after the stages of the result.
        progress: Opens progress bars.
        before: Accuracy of the original, where it was measured already.

    Returns:
        The result, complete, and its report.
    """
    subject, images = origin.subject, origin.images
    findings = qualified(result.findings, subject.weights)
    result = replace(result, plan=_with_source(result, origin, options), history=origin.history, findings=findings)
    context = Context(
        model=subject.name,
        input_shape=tuple(subject.example_input.shape[1:]),
        weights=weights_of(subject.weights),
        data=data_of(images),
        accuracy=_accuracies(subject.model, result.model, images.evaluation, watch, progress, before),
        warnings=origin.warnings,
        notes=origin.notes,
        device=origin.device.type,
        command_line=options.command_line,
    )
    result = replace(result, model=result.model.cpu(), seconds={**watch.seconds, **result.seconds})
    return result, report_of(result, context)


def write_result(
    result: SlimResult,
    report: Report,
    origin: Origin,
    options: SlimOptions | WidenOptions,
    folder: Path,
    progress: ProgressFactory,
) -> numbers.Saved:
    """Save a result, and export it in the formats that were asked for.

    Raises:
        ArchscanError: The disk refuses, or the network cannot be exported; the result is saved in the second case.
    """
    save_result(result, report, folder, overwrite=options.output.overwrite)
    if options.exports:
        pair = Pair(origin.subject.model.cpu(), result.model, report)
        example = origin.subject.example_input
        report = export_pair(folder.expanduser(), pair, example, options.exports, progress=progress)
    return numbers.Saved(report, folder.expanduser())


def _with_source(result: SlimResult, origin: Origin, options: SlimOptions | WidenOptions) -> Plan:
    """Add to a plan what makes its folder open again by itself."""
    calibration, subject = origin.images.calibration, origin.subject
    provenance = {
        **result.plan.provenance,
        "data": None if calibration is None else options.data.source,
        "samples": 0 if calibration is None else len(calibration),
        "weights": subject.weights.to_json(),
        "preprocessing": subject.preprocessing.to_json(),
    }
    return replace(result.plan, provenance=provenance)


def _accuracies(
    dense: nn.Module,
    slim_model: nn.Module,
    images: ImageSet | None,
    watch: Stopwatch,
    progress: ProgressFactory,
    before: float | None,
) -> numbers.Accuracy | None:
    """Measure the original, unless it was before, and the new network on the same images; None where there are none."""
    if images is None:
        return None
    with watch.stage("evaluate"):
        if before is None:
            with progress("Evaluating the original") as step:
                before = top_one(dense, Batches(images), step).accuracy
        with progress("Evaluating the slim network") as step:
            after = top_one(slim_model, Batches(images), step)
    return numbers.Accuracy(before, after.accuracy, after.samples)
