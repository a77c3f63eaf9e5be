"""The commands: options → stages → `Report`. Everything between the command line and the Python API."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from archscan import saving
from archscan.audit import Choice, choose_criterion
from archscan.closing import Origin, conclude, write_result
from archscan.criteria import criterion
from archscan.data import calibration_images, evaluation_images
from archscan.errors import BadInput
from archscan.evaluation import require_classes, top_one
from archscan.exporters import check_formats
from archscan.heldout import LEAST_SAMPLES
from archscan.latency import LatencySetup
from archscan.losses import classification_loss, sampled_label_loss
from archscan.opening import Batches, open_model, open_timed, refusing_bad_files, use_machine
from archscan.options import (
    DEFAULT_CRITERION,
    REAL_SAMPLES,
    SYNTHETIC,
    SYNTHETIC_SAMPLES,
    EvaluateOptions,
    ProgressFactory,
    Recovery,
    ScanOptions,
    SlimOptions,
    TargetKind,
    default_criterion,
)
from archscan.planner import Budget
from archscan.processes import Place, joined
from archscan.recipes import split_file_name
from archscan.remarks import Images, notes_of, warnings_of
from archscan.report import model as numbers
from archscan.report.model import Evaluation, Report, Saved
from archscan.results import Context, SlimResult, SlimSettings, report_of_scan
from archscan.retraining import Finetuning, asked_for, check_asked
from archscan.saved import is_saved, open_original, open_saved, read_result
from archscan.slimming import Stopwatch, analyse, has_batchnorm, reads_images, slim_each
from archscan.sources import Subject, list_networks
from archscan.widths import WidthRule

AUTO = "auto"
"""The name that lets a short audit choose the criterion."""

CANDIDATES = ("obd", "obs", "taylor-so", "taylor-fo", "taylor-abs", "mfac", "cbs", "sosp-h")
"""What it chooses from: everything that scored within its own uncertainty of the best on the CIFAR ResNets, and costs
little."""

_NO_ACCURACY = "no accuracy can be measured; evaluate on the classes that the model was trained for"

# --- archscan MODEL -------------------------------------------------------------------------------------------------


@refusing_bad_files
def slim_command(options: SlimOptions, progress: ProgressFactory) -> Saved:
    """Run ``archscan MODEL``: open, score, plan, rebuild, prove, repair, measure, save.

    Under ``torchrun`` all processes do the same, but that they share the scoring and that the first one writes.

    Raises:
        ArchscanError: Something asked for cannot be had; nothing is written then.
    """
    with joined(use_machine(options.run)) as place, place.together():
        return next(slim_and_save((options,), lambda subject: [_default_folder(subject, options)], place, progress))


def slim_and_save(
    each: Sequence[SlimOptions],
    folders_of: Callable[[Subject], Sequence[Path]],
    place: Place,
    progress: ProgressFactory,
) -> Iterator[Saved]:
    """Slim one network in ways that differ in their budget only: it is opened, scored and measured once.

    Args:
        each: What is asked for, one for each result.
        folders_of: Says where they go, once the network is known.
        place: Which process this is.
        progress: Opens progress bars.

    Yields:
        What was saved, as soon as it is; an interruption leaves nothing but whole folders.

    Raises:
        ArchscanError: Something asked for cannot be had; where it is known before the work, nothing is written.
    """
    for options in each:
        _check_options(options)
    ready, folders = _ready(each[0], folders_of, place, progress)
    before = None
    for asked, folder, result in zip(each, folders, _slim(ready, each, place, progress), strict=True):
        _require_change(result)
        result, report = conclude(result, ready.origin, asked, Stopwatch(ready.seconds), progress, before)
        before = None if report.accuracy is None else report.accuracy.before
        saved = Saved(report, folder.expanduser())
        place.share(None)  # nobody writes before all have come this far
        if place.is_first:
            saved = write_result(result, report, ready.origin, asked, folder, progress)
            ready.origin.subject.model.to(place.device)
        place.share(None)
        yield saved


def _require_change(result: SlimResult) -> None:
    """Refuse a result that is the network that went in, as a target on time may leave it."""
    plan = result.plan
    if (plan.before.macs, plan.before.params) == (plan.after.macs, plan.after.params):
        raise BadInput("the network meets the target as it is, so that nothing was removed; ask for less")


@dataclass(frozen=True, eq=False)
class _Ready:
    """What a slimming starts from: a network on its device, images, and all that was left open decided."""

    origin: Origin
    criterion: str | None
    recover: Recovery
    seconds: Mapping[str, float]
    finetuning: Finetuning | None


def _ready(
    options: SlimOptions, folders_of: Callable[[Subject], Sequence[Path]], place: Place, progress: ProgressFactory
) -> tuple[_Ready, Sequence[Path]]:
    watch = Stopwatch()
    subject, history = open_timed(options, watch, progress)
    folders = folders_of(subject)
    for folder in folders:
        saving.check_target(folder, overwrite=options.output.overwrite)
    recover = _recovery(options, subject)
    with watch.stage("data"):
        images = read_images(options, subject, recover, progress)
    if options.recover is None and recover == "blocks" and len(images.calibration or ()) < LEAST_SAMPLES:
        recover = _with_few_images(subject)
    subject = replace(subject, model=subject.model.to(place.device))
    notes, named = list(notes_of(options, images, _named(options, recover))), options.criterion
    if options.criterion == AUTO:
        with watch.stage("audit"):
            choice = place.share(_choice(options, subject, images, progress))[0]
        named = choice.name
        notes.append(choice.sentence())
    with watch.stage("data"):
        finetuning = asked_for(options, subject, images.evaluation, place, progress)
    warnings = tuple(warnings_of(subject.weights, images))
    origin = Origin(subject, history, images, place.device, warnings, tuple(notes))
    return _Ready(origin, named, recover, watch.seconds, finetuning), folders


def _check_options(options: SlimOptions) -> None:
    """Refuse, before anything is opened, what is unknown and what would have no effect."""
    named = DEFAULT_CRITERION if options.criterion in (None, AUTO) else options.criterion
    criterion(named)
    _budget(options)
    if all(ratio == 1 and kind != "latency" for kind, ratio in _targets(options)):
        raise BadInput("a target of 1 keeps everything, so that nothing would be removed; ask for less, such as 0.6")
    check_asked(options)
    if options.exports:
        check_formats(options.exports)
    synthetic = options.data.source == SYNTHETIC
    if synthetic and options.criterion == AUTO:
        raise BadInput(f"--criterion {AUTO} measures what removals do to the loss on real images; pass --data")
    if synthetic and options.recover not in (None, "none"):
        raise BadInput(f"--recover {options.recover} needs real images, noise would mislead it; pass --data")
    trains = options.finetune_epochs is not None
    if not synthetic and not trains and options.recover == "none" and not reads_images(named):
        raise BadInput(
            f"--criterion {named} looks at weights only, so that --data would have no effect; "
            "leave it out, or let --recover blocks use it"
        )


def _default_folder(subject: Subject, options: SlimOptions) -> Path:
    return options.output.folder or Path("reports") / f"{subject.name}-{budget_name(options)}"


def budget_name(options: SlimOptions) -> str:
    """Name a budget as a part of a path: ``flops0.6``."""
    return "-".join(f"{'flops' if kind == 'macs' else kind}{ratio:g}" for kind, ratio in _targets(options))


def _targets(options: SlimOptions) -> tuple[tuple[TargetKind, float], ...]:
    return ((options.budget.kind, options.budget.ratio), *options.budget.also)


def _recovery(options: SlimOptions, subject: Subject) -> Recovery:
    """Decide on the repair: by default, all of it where the images are real and enough."""
    if options.recover == "bn" and not has_batchnorm(subject.model):
        raise BadInput(f"{subject.name} has no BatchNorm to recalibrate; leave out --recover bn")
    if options.recover is not None or options.data.source == SYNTHETIC:
        return options.recover or "none"
    enough = (options.data.samples or REAL_SAMPLES) >= LEAST_SAMPLES
    return "blocks" if enough else _with_few_images(subject)


def _with_few_images(subject: Subject) -> Recovery:
    """Decide on the repair where images are too few to fit anything to."""
    return "bn" if has_batchnorm(subject.model) else "none"


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


def read_images(options: SlimOptions, subject: Subject, recover: Recovery, progress: ProgressFactory) -> Images:
    """Read what to score, to repair and to measure on; refuse images that nothing would look at."""
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
    elif not synthetic and options.finetune_epochs is None:
        raise BadInput(
            f"nothing looks at --data: --criterion {_named(options, recover)} reads weights only, and nothing is "
            f"repaired with fewer than {LEAST_SAMPLES} images; leave it out"
        )
    if data.eval_source is not None:
        with progress("Reading evaluation images") as step:
            evaluation = evaluation_images(
                data.eval_source, subject.preprocessing, batch_size=data.batch_size, progress=step
            )
        require_classes(evaluation.classes, subject.num_classes, f"--eval-data {data.eval_source}", _NO_ACCURACY)
    return Images(calibration, evaluation, calibration is not None and calibration.labels_fit(subject.num_classes))


def _slim(ready: _Ready, each: Sequence[SlimOptions], place: Place, progress: ProgressFactory) -> Iterator[SlimResult]:
    options, subject, images = each[0], ready.origin.subject, ready.origin.images
    budget, seed = options.budget, options.run.seed
    drawn = images.calibration is not None and not images.labels_fit
    batch = options.latency_batch
    latency = None if batch is None else LatencySetup(batch, channels_last=options.channels_last)
    rule = WidthRule(budget.round_to, budget.min_width)
    return slim_each(
        subject.model,
        subject.example_input,
        [_budget(asked) for asked in each],
        data=None if images.calibration is None else Batches(images.calibration),
        criterion=ready.criterion,
        loss_fn=sampled_label_loss(seed) if drawn else None,
        settings=SlimSettings(rule, budget.protect, ready.recover, seed, options.rounds, options.set_effects, latency),
        recipe=subject.recipe,
        finetune=ready.finetuning,
        progress=progress,
        place=place,
    )


def _budget(options: SlimOptions) -> Budget:
    first, *further = (Budget(kind, ratio) for kind, ratio in _targets(options))
    return replace(first, also=tuple(further))


# --- the other commands ---------------------------------------------------------------------------------------------


@refusing_bad_files
def scan_command(options: ScanOptions, progress: ProgressFactory) -> Report:
    """Run ``archscan scan MODEL``: costs, groups, coupling; weights play no part."""
    watch = Stopwatch()
    name = options.model.name
    with watch.stage("open"), progress(f"Opening {name}") as step:
        step(0, 0)
        own = is_saved(name) or split_file_name(name) is not None
        subject = open_model(replace(options.model, weights="auto" if own else "random"))
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
        names = dict.fromkeys(network.name for network in list_networks())
        close = difflib.get_close_matches(str(pattern).strip("*").lower(), names, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "try a shell pattern such as '*resnet*'"
        raise BadInput(f"no network matches {pattern!r}; {hint}")
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
    require_classes(images.classes, subject.num_classes, f"--data {options.source}", _NO_ACCURACY)
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
