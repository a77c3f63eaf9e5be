"""``archscan MODEL --lossless``: options → dead channels removed → a saved folder and its `Report`."""

from dataclasses import replace
from pathlib import Path

from archscan import saving
from archscan.closing import Origin, conclude, write_result
from archscan.exporters import check_formats
from archscan.lossless import remove_dead
from archscan.opening import Batches, open_timed, refusing_bad_files, use_machine
from archscan.options import SYNTHETIC, ProgressFactory, SlimOptions
from archscan.pipeline import read_images
from archscan.remarks import Images
from archscan.report.model import Saved
from archscan.results import SlimSettings
from archscan.stages import Stopwatch
from archscan.widths import WidthRule


@refusing_bad_files
def lossless_command(options: SlimOptions, progress: ProgressFactory) -> Saved:
    """Run ``archscan MODEL --lossless``: open, find dead channels, remove them, prove, save.

    Raises:
        ArchscanError: Something asked for cannot be had; nothing is written then.
    """
    if options.exports:
        check_formats(options.exports)
    watch, device = Stopwatch(), use_machine(options.run)
    subject, history = open_timed(options, watch, progress)
    folder = options.output.folder or Path("reports") / f"{subject.name}-lossless"
    saving.check_target(folder, overwrite=options.output.overwrite)
    with watch.stage("data"):
        images = read_images(options, subject, "none", progress)
    if options.data.source == SYNTHETIC:
        images = Images(None, images.evaluation, False)
    subject, budget = replace(subject, model=subject.model.to(device)), options.budget
    result = remove_dead(
        subject.model,
        subject.example_input,
        data=None if images.calibration is None else Batches(images.calibration),
        settings=SlimSettings(WidthRule(budget.round_to, budget.min_width), budget.protect, seed=options.run.seed),
        recipe=subject.recipe,
        progress=progress,
    )
    origin = Origin(subject, history, images, device)
    result, report = conclude(result, origin, options, watch, progress)
    return write_result(result, report, origin, options, folder, progress)
