"""The commands: options → stages → `Report`. Everything between the command line and the Python API."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from archscan import saving
from archscan.audit import Choice, choose_criterion
from archscan.criteria import criterion
from archscan.data import ImageSet, calibration_images, evaluation_images
from archscan.errors import BadInput
from archscan.evaluation import top_one
from archscan.exporters import Pair, check_formats, export_pair
from archscan.heldout import LEAST_SAMPLES
from archscan.losses import classification_loss, sampled_label_loss
from archscan.options import (
    DEFAULT_CRITERION,
    REAL_SAMPLES,
    SYNTHETIC_SAMPLES,
    EvaluateOptions,
    ModelOptions,
    ProgressFactory,
    RunOptions,
    ScanOptions,
    SlimOptions,
    default_criterion,
)
from archscan.planner import Budget, Plan
from archscan.processes import Place, joined
from archscan.recipes import split_file_name
from archscan.remarks import Images, data_of, notes_of, warnings_of, weights_of
from archscan.report import model as numbers
from archscan.report.model import Evaluation, Report, Saved
from archscan.results import Context, SlimResult, SlimSettings, report_of, report_of_scan, save_result
from archscan.saved import is_saved, open_original, open_saved, read_result
from archscan.slimming import Stopwatch, analyse, has_batchnorm, reads_images, slim
from archscan.sources import Subject, list_networks, open_subject
from archscan.widths import WidthRule

SYNTHETIC = "synthetic"
AUTO = "auto"
"""The name that lets a short audit choose the criterion."""

CANDIDATES = ("obd", "obs", "taylor-so", "taylor-fo", "taylor-abs", "mfac", "cbs", "sosp-h")
"""What it chooses from: everything that scored within its own uncertainty of the best on the CIFAR ResNets, and costs
little."""

Recovery = Literal["none", "bn", "bias", "ls"]

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def refusing_bad_files(command: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Turn what the system says of a file (a name too long, no permission, no space) into a refusal."""

    @wraps(command)
    def run(*arguments: _Given.args, **keywords: _Given.kwargs) -> _Result:
        try:
            return command(*arguments, **keywords)
        except BrokenPipeError:  # says that nobody reads any more, and nothing of a file
            raise
        except OSError as error:
            name = str(error.filename or "a file")
            short = name if len(name) <= 80 else f"{name[:77]}…"
            raise BadInput(f"{short} cannot be used ({error.strerror or error}); give another") from error

    return run


@dataclass(frozen=True)
class Batches:
    """An image set as an iterable that knows its length and starts anew each time."""

    images: ImageSet

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels)."""
        return self.images.batches()

    def __len__(self) -> int:
        """Count the batches."""
        return -(-len(self.images) // self.images.batch_size)


# --- archscan MODEL -------------------------------------------------------------------------------------------------


@refusing_bad_files
def slim_command(options: SlimOptions, progress: ProgressFactory) -> Saved:
    """Run ``archscan MODEL``: open, score, plan, rebuild, prove, repair, measure, save.

    Under ``torchrun`` all processes do the same, but that they share the scoring and that the first one writes.

    Raises:
        ArchscanError: Something asked for cannot be had; nothing is written then.
    """
    with joined(use_machine(options.run)) as place, place.together():
        return _slim_and_save(options, place, progress)


def _slim_and_save(options: SlimOptions, place: Place, progress: ProgressFactory) -> Saved:
    _check_options(options)
    watch, device = Stopwatch(), place.device
    with watch.stage("open"), progress(f"Opening {options.model.name}") as step:
        step(0, 0)
        subject = _open(options.model, options)
        history = saving.read_history(options.model.name) if is_saved(options.model.name) else ()
    folder = options.output.folder or _default_folder(subject, options)
    saving.check_target(folder, overwrite=options.output.overwrite)
    recover = _recovery(options, subject)
    with watch.stage("data"):
        images = _read_images(options, subject, recover, progress)
    if options.recover is None and recover == "ls" and len(images.calibration or ()) < LEAST_SAMPLES:
        recover = "bn"
    model = subject.model.to(device)
    notes = list(notes_of(options, images, _named(options, recover)))
    if options.criterion == AUTO:
        with watch.stage("audit"):
            choice = place.share(_choice(options, replace(subject, model=model), images, progress))[0]
        options = replace(options, criterion=choice.name)
        notes.append(choice.sentence())
    result = _slim(options, replace(subject, model=model), images, recover, place, progress)
    result = replace(result, plan=_with_source(result, subject, images, options), history=history)
    accuracy = _accuracy(model, result.model, images.evaluation, watch, progress)
    context = Context(
        model=subject.name,
        input_shape=tuple(subject.example_input.shape[1:]),
        weights=weights_of(subject.weights),
        data=data_of(images),
        accuracy=accuracy,
        warnings=tuple(warnings_of(subject.weights, images)),
        notes=tuple(notes),
        device=device.type,
        command_line=options.command_line,
    )
    result = replace(result, model=result.model.cpu(), seconds={**watch.seconds, **result.seconds})
    report = report_of(result, context)
    place.share(None)  # nobody writes before all have come this far
    if place.is_first:
        report = _write(options, subject, result, report, folder, progress)
    place.share(None)
    return Saved(report, folder.expanduser())


def _write(
    options: SlimOptions, subject: Subject, result: SlimResult, report: Report, folder: Path, progress: ProgressFactory
) -> Report:
    save_result(result, report, folder, overwrite=options.output.overwrite)
    if options.exports:
        pair = Pair(subject.model.cpu(), result.model, report)
        report = export_pair(folder.expanduser(), pair, subject.example_input, options.exports, progress=progress)
    return report


def _check_options(options: SlimOptions) -> None:
    """Refuse, before anything is opened, what is unknown and what would have no effect."""
    named = DEFAULT_CRITERION if options.criterion in (None, AUTO) else options.criterion
    criterion(named)
    Budget(options.budget.kind, options.budget.ratio)
    if options.exports:
        check_formats(options.exports)
    synthetic = options.data.source == SYNTHETIC
    if synthetic and options.criterion == AUTO:
        raise BadInput(f"--criterion {AUTO} measures what removals do to the loss on real images; pass --data")
    if synthetic and options.recover not in (None, "none"):
        raise BadInput(f"--recover {options.recover} needs real images, noise would mislead it; pass --data")
    if not synthetic and options.recover == "none" and not reads_images(named):
        raise BadInput(
            f"--criterion {named} looks at weights only, so that --data would have no effect; "
            "leave it out, or let --recover ls use it"
        )


def _default_folder(subject: Subject, options: SlimOptions) -> Path:
    kind = "flops" if options.budget.kind == "macs" else "params"
    return Path("reports") / f"{subject.name}-{kind}{options.budget.ratio:g}"


def _recovery(options: SlimOptions, subject: Subject) -> Recovery:
    """Decide on the repair: by default, least squares where there is BatchNorm and the images are real."""
    if options.recover == "bn" and not has_batchnorm(subject.model):
        raise BadInput(f"{subject.name} has no BatchNorm to recalibrate; leave out --recover bn")
    useful = options.data.source != SYNTHETIC and has_batchnorm(subject.model)
    enough = (options.data.samples or REAL_SAMPLES) >= LEAST_SAMPLES
    return options.recover or ("none" if not useful else "ls" if enough else "bn")


def _named(options: SlimOptions, recover: Recovery) -> str:
    return default_criterion(recover) if options.criterion in (None, AUTO) else options.criterion


def _choice(options: SlimOptions, subject: Subject, images: Images, progress: ProgressFactory) -> Choice:
    """Let a short audit on the calibration images choose the criterion."""
    if images.calibration is None or not images.labels_fit:
        raise BadInput(
            f"--criterion {AUTO} needs images with the labels that the model was trained for; name a criterion instead"
        )
    analysis = analyse(subject.model, subject.example_input, options.budget.protect)
    batches = list(Batches(images.calibration))
    with progress("Auditing criteria") as step:
        return choose_criterion(
            subject.model, analysis.coupling, batches, classification_loss, CANDIDATES, options.run.seed, step
        )


def _read_images(options: SlimOptions, subject: Subject, recover: Recovery, progress: ProgressFactory) -> Images:
    data = options.data
    synthetic = data.source == SYNTHETIC
    calibration = evaluation = None
    if reads_images(_named(options, recover)) or recover != "none":
        with progress("Reading calibration images") as step:
            calibration = calibration_images(
                data.source,
                subject.preprocessing,
                samples=data.samples or (SYNTHETIC_SAMPLES if synthetic else REAL_SAMPLES),
                batch_size=data.batch_size,
                seed=options.run.seed,
                progress=step,
            )
    elif not synthetic:
        raise BadInput(
            f"nothing looks at --data: --criterion {_named(options, recover)} reads weights only, and {subject.name} "
            "has no BatchNorm to recalibrate; leave it out"
        )
    if data.eval_source is not None:
        with progress("Reading evaluation images") as step:
            evaluation = evaluation_images(
                data.eval_source, subject.preprocessing, batch_size=data.batch_size, progress=step
            )
        _require_labels(evaluation, subject.num_classes, f"--eval-data {data.eval_source}")
    return Images(calibration, evaluation, calibration is not None and calibration.labels_fit(subject.num_classes))


def _require_labels(images: ImageSet, num_classes: int, source: str) -> None:
    if not images.labels_fit(num_classes):
        raise BadInput(
            f"{source} has {len(images.classes)} classes and the model {num_classes}, so that no accuracy can be "
            "measured; evaluate on the classes that the model was trained for"
        )


def _slim(
    options: SlimOptions,
    subject: Subject,
    images: Images,
    recover: Recovery,
    place: Place,
    progress: ProgressFactory,
) -> SlimResult:
    budget, seed = options.budget, options.run.seed
    calibration = images.calibration
    drawn = calibration is not None and not images.labels_fit
    rule = WidthRule(budget.round_to, budget.min_width)
    return slim(
        subject.model,
        subject.example_input,
        target_flops=budget.ratio if budget.kind == "macs" else None,
        target_params=budget.ratio if budget.kind == "params" else None,
        data=None if calibration is None else Batches(calibration),
        criterion=options.criterion,
        loss_fn=sampled_label_loss(seed) if drawn else None,
        settings=SlimSettings(rule, budget.protect, recover, seed, options.rounds, options.set_effects),
        recipe=subject.recipe,
        progress=progress,
        place=place,
    )


def _with_source(result: SlimResult, subject: Subject, images: Images, options: SlimOptions) -> Plan:
    """Add to a plan what makes its folder open again by itself."""
    provenance = {
        **result.plan.provenance,
        "data": None if images.calibration is None else options.data.source,
        "samples": 0 if images.calibration is None else len(images.calibration),
        "weights": subject.weights.to_json(),
        "preprocessing": subject.preprocessing.to_json(),
    }
    return replace(result.plan, provenance=provenance)


def _accuracy(
    dense: nn.Module, slim_model: nn.Module, images: ImageSet | None, watch: Stopwatch, progress: ProgressFactory
) -> numbers.Accuracy | None:
    if images is None:
        return None
    with watch.stage("evaluate"):
        with progress("Evaluating the original") as step:
            before = top_one(dense, Batches(images), step)
        with progress("Evaluating the slim network") as step:
            after = top_one(slim_model, Batches(images), step)
    return numbers.Accuracy(before.accuracy, after.accuracy, after.samples)


# --- the other commands ---------------------------------------------------------------------------------------------


@refusing_bad_files
def scan_command(options: ScanOptions, progress: ProgressFactory) -> Report:
    """Run ``archscan scan MODEL``: costs, groups, coupling; weights play no part."""
    watch = Stopwatch()
    name = options.model.name
    with watch.stage("open"), progress(f"Opening {name}") as step:
        step(0, 0)
        own = is_saved(name) or split_file_name(name) is not None
        subject = _open(replace(options.model, weights="auto" if own else "random"))
    with watch.stage("capture"):
        analysis = analyse(subject.model, subject.example_input, options.protect)
    shape = tuple(subject.example_input.shape[1:])
    # The name as typed, so that what is printed to be run next opens the same network.
    context = Context(model=name, input_shape=shape, command_line=options.command_line)
    return report_of_scan(analysis, context, watch.seconds)


def list_command(pattern: str | None) -> list[str]:
    """Run ``archscan list``: names with their source.

    Raises:
        BadInput: Nothing matches.
    """
    found = [f"{name.source}:{name.name}" for name in list_networks(pattern)]
    if not found:
        raise BadInput(f"no network matches {pattern!r}; try a shell pattern such as '*resnet*'")
    return found


@refusing_bad_files
def show_command(folder: Path) -> Report:
    """Run ``archscan show DIR``: read the numbers of a saved result."""
    return read_result(folder)[0]


@refusing_bad_files
def evaluate_command(options: EvaluateOptions, progress: ProgressFactory) -> Evaluation:
    """Run ``archscan evaluate DIR``: accuracy of a saved result, and of the original where its weights are at hand."""
    device = use_machine(options.run)
    report = show_command(options.folder)
    subject = open_saved(options.folder)
    with progress("Reading images") as step:
        images = evaluation_images(
            options.source,
            subject.preprocessing,
            samples=options.samples,
            batch_size=options.batch_size,
            progress=step,
        )
    _require_labels(images, subject.num_classes, f"--data {options.source}")
    with progress("Evaluating the slim network") as step:
        after = top_one(subject.model.to(device), Batches(images), step)
    notes, before = [], None
    try:
        dense = open_original(options.folder).to(device)
    except BadInput as error:
        notes.append(f"The dense original was not evaluated: {error}.")
    else:
        with progress("Evaluating the original") as step:
            before = top_one(dense, Batches(images), step).accuracy
    accuracy = numbers.Accuracy(before, after.accuracy, after.samples)
    return Evaluation(report.model, str(options.folder), accuracy, images.skipped, tuple(notes))


def use_machine(options: RunOptions) -> torch.device:
    """Set the number of threads and choose the device.

    Raises:
        BadInput: CUDA is asked for and there is none.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("there is no CUDA device that this PyTorch can use; pass --device cpu")
    use_cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")


def _open(model: ModelOptions, options: SlimOptions | None = None) -> Subject:
    return open_subject(
        model.name,
        weights=model.weights,
        input_size=model.input_size,
        num_classes=model.num_classes,
        mean=options.data.mean if options else None,
        std=options.data.std if options else None,
        seed=options.run.seed if options else 0,
        open_saved=open_saved,
    )
