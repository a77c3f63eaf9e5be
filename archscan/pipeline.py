"""The commands: options → stages → `Report`. Everything between the command line and the Python API."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from archscan import export
from archscan.criteria import criterion
from archscan.data import ImageSet, calibration_images, evaluation_images
from archscan.errors import BadInput
from archscan.evaluation import top_one
from archscan.losses import sampled_label_loss
from archscan.options import EvaluateOptions, ModelOptions, RunOptions, ScanOptions, SlimOptions
from archscan.planner import Budget
from archscan.report import model as numbers
from archscan.report.model import SUMMARY_FILE, Evaluation, Report, Saved, read_report
from archscan.slimming import Progress, SlimResult, SlimSettings, Stopwatch, analyse, slim
from archscan.sources import Preprocessing, Subject, WeightsInfo, list_networks, open_subject
from archscan.summary import Context, report_of, report_of_scan, save_result
from archscan.widths import WidthRule

SYNTHETIC_SAMPLES = 32
"""Images of noise to score on where no number is asked for: more of them say no more."""

REAL_SAMPLES = 256


@dataclass(frozen=True)
class Batches:
    """An image set as an iterable that knows its length and starts anew each time."""

    images: ImageSet

    def __iter__(self) -> Iterator[Any]:
        """Yield (images, labels)."""
        return self.images.batches()

    def __len__(self) -> int:
        """Count the batches."""
        return -(-len(self.images) // self.images.batch_size)


def slim_command(options: SlimOptions, progress: Progress) -> Saved:
    """Run ``archscan MODEL``: open, score, plan, rebuild, prove, repair, measure, save.

    Raises:
        ArchscanError: Something asked for cannot be had; nothing is written then.
    """
    criterion(options.criterion)
    budget = Budget(options.budget.kind, options.budget.ratio)
    synthetic = options.data.source == "synthetic"
    if synthetic and options.recover == "bn":
        raise BadInput("--recover bn needs real images, noise would spoil the statistics; pass --data")
    watch = Stopwatch()
    device = use_machine(options.run)
    with watch.stage("open"), progress(f"Opening {options.model.name}") as step:
        step(0, 0)
        subject, history = _open(options.model, options.run.seed, options.data.mean, options.data.std)
    folder = options.output.folder or _default_folder(subject, budget)
    export.check_target(folder, overwrite=options.output.overwrite)
    calibration, evaluation = _images(options, subject, watch, progress)
    model = subject.model.to(device)
    labels_fit = not synthetic and calibration.labels_fit(subject.num_classes)
    recover = options.recover or ("none" if synthetic else "bn")
    settings = SlimSettings(
        WidthRule(options.budget.round_to, options.budget.min_width), options.budget.protect, recover, options.run.seed
    )
    result = slim(
        model,
        subject.example_input.to(device),
        target_flops=budget.ratio if budget.kind == "macs" else None,
        target_params=budget.ratio if budget.kind == "params" else None,
        data=Batches(calibration),
        criterion=options.criterion,
        loss_fn=None if labels_fit else sampled_label_loss(options.run.seed),
        settings=settings,
        progress=progress,
    )
    result = _with_source(result, subject, history, options, watch)
    accuracy = _accuracy(model, result.model, evaluation, watch, progress)
    context = Context(
        model=subject.name,
        input_shape=tuple(subject.example_input.shape[1:]),
        weights=_weights(subject.weights),
        data=_data(calibration, labels_fit),
        accuracy=accuracy,
        warnings=tuple(_warnings(subject.weights, synthetic)),
        notes=tuple(_notes(options, calibration, evaluation, labels_fit)),
        device=str(device),
        command_line=options.command_line,
        rule=settings.rule,
    )
    result = replace(result, seconds={**watch.seconds, **result.seconds})
    report = report_of(replace(result, model=result.model.cpu()), context)
    return Saved(report, save_result(result, report, folder, overwrite=options.output.overwrite))


def scan_command(options: ScanOptions, progress: Progress) -> Report:
    """Run ``archscan scan MODEL``: costs, groups, coupling; weights play no part."""
    watch = Stopwatch()
    with watch.stage("open"), progress(f"Opening {options.model.name}") as step:
        step(0, 0)
        name, saved = options.model.name, _is_saved(options.model.name)
        wanted = options.model if saved or ":" in name else replace(options.model, weights="random")
        subject, _ = _open(wanted, 0, None, None)
    with watch.stage("capture"):
        analysis = analyse(subject.model, subject.example_input, options.protect)
    context = Context(
        model=subject.name, input_shape=tuple(subject.example_input.shape[1:]), command_line=options.command_line
    )
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


def show_command(folder: Path) -> Report:
    """Run ``archscan show DIR``: read the numbers of a saved result."""
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}; give one that archscan saved")
    return read_report(folder / SUMMARY_FILE)


def evaluate_command(options: EvaluateOptions, progress: Progress) -> Evaluation:
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
    _require_labels(images, subject.num_classes, options.source)
    with progress("Evaluating the slim network") as step:
        after = top_one(subject.model.to(device), Batches(images), step)
    notes, before = [], None
    try:
        dense = _dense_original(options.folder, report, subject)
        with progress("Evaluating the original") as step:
            before = top_one(dense.to(device), Batches(images), step).accuracy
    except BadInput as error:
        notes.append(f"the original was not evaluated: {error}")
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


def open_saved(folder: Path) -> Subject:
    """Open a saved result as a network to work on.

    Raises:
        BadInput: The folder is damaged or edited, or has no recipe.
    """
    report = show_command(folder)
    recipe, plans = export.read_steps(folder)
    model = export.load(folder)
    if recipe is None:
        raise BadInput(f"{folder} has no recipe of its architecture; slim it again from Python")
    recorded = plans[-1].provenance.get("preprocessing")
    preprocessing = _preprocessing(recorded, folder)
    example = torch.randn(1, preprocessing.channels, *preprocessing.input_size, generator=torch.Generator().manual_seed(0))
    classes = int(recipe.kwargs.get("num_classes", 0)) or _classes_of(model, example)
    name = Path(folder).resolve().name
    return Subject(model, example, recipe, name, WeightsInfo("saved", str(folder), report.model), preprocessing, classes)


def _preprocessing(recorded: Any, folder: Path) -> Preprocessing:
    names = {"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}
    if not isinstance(recorded, dict) or set(recorded) != names:
        raise BadInput(f"{folder} does not say how its images are prepared; it was not made by the archscan command")
    size, mean, std = (tuple(recorded[key]) for key in ("input_size", "mean", "std"))
    whole = len(size) == 2 and all(type(side) is int and 1 <= side <= 16_384 for side in size)
    if not whole or not mean or len(mean) != len(std):
        raise BadInput(f"{folder}/plan.json has an impossible input size, mean or std; it was edited")
    return Preprocessing(
        (size[0], size[1]), mean, std, recorded["interpolation"], recorded["crop_pct"], recorded["crop_mode"]
    )


def _classes_of(model: nn.Module, example: torch.Tensor) -> int:
    with torch.no_grad():
        return int(model.eval()(example).shape[1])


def _is_saved(name: str) -> bool:
    return (Path(name) / "plan.json").is_file()


def _open(
    options: ModelOptions, seed: int, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> tuple[Subject, tuple[export.Step, ...]]:
    subject = open_subject(
        options.name,
        weights=options.weights,
        input_size=options.input_size,
        num_classes=options.num_classes,
        mean=mean,
        std=std,
        seed=seed,
        open_saved=open_saved,
    )
    return subject, export.read_history(Path(options.name)) if _is_saved(options.name) else ()


def _default_folder(subject: Subject, budget: Budget) -> Path:
    kind = "flops" if budget.kind == "macs" else "params"
    return Path("reports") / f"{subject.name}-{kind}{budget.ratio:g}"


def _images(
    options: SlimOptions, subject: Subject, watch: Stopwatch, progress: Progress
) -> tuple[ImageSet, ImageSet | None]:
    data = options.data
    samples = data.samples or (SYNTHETIC_SAMPLES if data.source == "synthetic" else REAL_SAMPLES)
    with watch.stage("data"):
        with progress("Reading calibration images") as step:
            calibration = calibration_images(
                data.source,
                subject.preprocessing,
                samples=samples,
                batch_size=data.batch_size,
                seed=options.run.seed,
                progress=step,
            )
        if data.eval_source is None:
            return calibration, None
        with progress("Reading evaluation images") as step:
            evaluation = evaluation_images(
                data.eval_source, subject.preprocessing, batch_size=data.batch_size, progress=step
            )
    _require_labels(evaluation, subject.num_classes, data.eval_source)
    return calibration, evaluation


def _require_labels(images: ImageSet, num_classes: int, source: str) -> None:
    if not images.labels_fit(num_classes):
        raise BadInput(
            f"{source} has {len(images.classes)} classes and the model {num_classes}, so that no accuracy can be "
            "measured; evaluate on the classes that the model was trained for"
        )


def _with_source(
    result: SlimResult, subject: Subject, history: tuple[export.Step, ...], options: SlimOptions, watch: Stopwatch
) -> SlimResult:
    """Add to a result what makes its folder open again by itself."""
    provenance = {
        **result.plan.provenance,
        "data": options.data.source,
        "samples": options.data.samples,
        "weights": subject.weights.to_json(),
        "preprocessing": subject.preprocessing.to_json(),
    }
    plan = replace(result.plan, provenance=provenance)
    return replace(result, plan=plan, recipe=subject.recipe, history=history)


def _accuracy(
    dense: nn.Module, slim_model: nn.Module, images: ImageSet | None, watch: Stopwatch, progress: Progress
) -> numbers.Accuracy | None:
    if images is None:
        return None
    with watch.stage("evaluate"):
        with progress("Evaluating the original") as step:
            before = top_one(dense, Batches(images), step)
        with progress("Evaluating the slim network") as step:
            after = top_one(slim_model, Batches(images), step)
    return numbers.Accuracy(before.accuracy, after.accuracy, after.samples)


def _dense_original(folder: Path, report: Report, subject: Subject) -> nn.Module:
    """Build the original with its weights, where they are a file or pretrained."""
    recipe, weights = subject.recipe, report.weights
    if weights is None or weights.kind not in ("file", "pretrained"):
        raise BadInput("its weights were random, or came with the model")
    source = weights.source if weights.kind == "file" else "pretrained"
    classes = recipe.kwargs.get("num_classes")
    opened = open_subject(
        f"{recipe.source}:{recipe.name}", weights=source, num_classes=classes, input_size=subject.input_size
    )
    return opened.model


def _weights(info: WeightsInfo) -> numbers.Weights:
    return numbers.Weights(info.kind, info.origin, info.reason)


def _data(images: ImageSet, labels_fit: bool) -> numbers.Data:
    labels = "dataset" if labels_fit else "model"
    return numbers.Data(images.kind, len(images), len(images.classes), labels, images.skipped)


def _warnings(weights: WeightsInfo, synthetic: bool) -> Iterator[str]:
    if weights.kind == "random":
        yield f"The weights are random, so the scores reflect initialisation, not training ({weights.reason})."
    if synthetic:
        yield "The calibration images are synthetic noise, so the scores say little about real images; pass --data."


def _notes(
    options: SlimOptions, calibration: ImageSet, evaluation: ImageSet | None, labels_fit: bool
) -> Iterator[str]:
    if not labels_fit:
        yield "Labels were drawn from the model's own predictions (the true Fisher), since the data have none of its own."
    for what, images in (("calibration", calibration), ("evaluation", evaluation)):
        if images is not None and images.skipped:
            names = ", ".join(images.skipped[:3]) + (" …" if len(images.skipped) > 3 else "")
            yield f"{len(images.skipped)} {what} images could not be read and were skipped: {names}."
    if options.data.samples is not None and len(calibration) < options.data.samples:
        yield f"There were only {len(calibration)} of the {options.data.samples} calibration images asked for."
