"""``archscan widen MODEL``: options → images, widening → a saved folder and its `Report`."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from archscan import saving
from archscan.closing import Origin, conclude, write_result
from archscan.criteria import criterion
from archscan.errors import BadInput
from archscan.exporters import check_formats
from archscan.losses import sampled_label_loss
from archscan.opening import Batches, open_timed, refusing_bad_files, use_machine
from archscan.options import DEFAULT_CRITERION, SYNTHETIC, ProgressFactory, SlimOptions, WidenOptions
from archscan.pipeline import read_images
from archscan.remarks import Images, notes_of, warnings_of
from archscan.report.model import Saved
from archscan.slimming import has_batchnorm
from archscan.sources import Subject
from archscan.stages import Stopwatch
from archscan.widening import WidenResult, WidenSettings, widen
from archscan.widths import WidthRule


@refusing_bad_files
def widen_command(options: WidenOptions, progress: ProgressFactory) -> Saved:
    """Run ``archscan widen MODEL``: open, find bottlenecks, widen, let others pay, prove, measure, save.

    Raises:
        ArchscanError: Something asked for cannot be had; nothing is written then.
    """
    _check_options(options)
    watch, device = Stopwatch(), use_machine(options.run)
    subject, history = open_timed(options, watch, progress)
    folder = options.output.folder or Path("reports") / f"{subject.name}-wide{options.factor:g}"
    saving.check_target(folder, overwrite=options.output.overwrite)
    asked = _as_slim(options)
    recover = _recovery(options, subject)
    with watch.stage("data"):
        images = read_images(asked, subject, recover, progress)
    subject = replace(subject, model=subject.model.to(device))
    result = _widen(options, subject, images, recover, progress)
    notes = tuple(notes_of(asked, images, options.criterion or DEFAULT_CRITERION))
    origin = Origin(subject, history, images, device, tuple(warnings_of(subject.weights, images)), notes)
    result, report = conclude(result, origin, options, watch, progress)
    return write_result(result, report, origin, options, folder, progress)


def _check_options(options: WidenOptions) -> None:
    """Refuse, before anything is opened, what is unknown and what would have no effect."""
    criterion(options.criterion or DEFAULT_CRITERION)
    if options.exports:
        check_formats(options.exports)
    if options.recover is not None and not options.keep_flops:
        raise BadInput(
            f"a network that only gets wider computes what it did, so that --recover {options.recover} would have no "
            "effect; leave it out, or let others pay with --keep-flops"
        )
    if options.data.source == SYNTHETIC and options.recover == "bn":
        raise BadInput("--recover bn needs real images, noise would mislead it; pass --data")


def _recovery(options: WidenOptions, subject: Subject) -> Literal["none", "bn"]:
    """Decide on the repair: by default BatchNorm's where others pay and the images are real."""
    if options.recover == "bn" and not has_batchnorm(subject.model):
        raise BadInput(f"{subject.name} has no BatchNorm to recalibrate; leave out --recover bn")
    useful = options.keep_flops and options.data.source != SYNTHETIC and has_batchnorm(subject.model)
    return options.recover or ("bn" if useful else "none")


def _as_slim(options: WidenOptions) -> SlimOptions:
    """Say the same in the terms of a slimming, for what reads images and keeps records."""
    shared = (options.model, options.budget, options.data, options.run, options.output)
    return SlimOptions(*shared, criterion=options.criterion, command_line=options.command_line)


def _widen(
    options: WidenOptions,
    subject: Subject,
    images: Images,
    recover: Literal["none", "bn"],
    progress: ProgressFactory,
) -> WidenResult:
    budget, seed = options.budget, options.run.seed
    drawn = images.calibration is not None and not images.labels_fit
    return widen(
        subject.model,
        subject.example_input,
        data=None if images.calibration is None else Batches(images.calibration),
        criterion=options.criterion,
        loss_fn=sampled_label_loss(seed) if drawn else None,
        settings=WidenSettings(
            factor=options.factor,
            keep_flops=options.keep_flops,
            find_at=budget.ratio,
            only=options.only,
            rule=WidthRule(budget.round_to, budget.min_width),
            protect=budget.protect,
            recover=recover,
            seed=seed,
        ),
        recipe=subject.recipe,
        progress=progress,
    )
