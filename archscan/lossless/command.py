"""``archscan MODEL --lossless``: options → dead channels removed → a saved folder and its `Report`."""

from dataclasses import replace
from pathlib import Path

from archscan import saving
from archscan.exporters import check_formats
from archscan.lossless import remove_dead
from archscan.opening import SYNTHETIC, Batches, open_model, refusing_bad_files, use_machine
from archscan.options import ProgressFactory, SlimOptions
from archscan.pipeline import accuracies, read_images, with_source, write_result
from archscan.remarks import Images, data_of, weights_of
from archscan.report.model import Saved
from archscan.results import Context, SlimSettings, report_of
from archscan.saved import is_saved
from archscan.slimming import Stopwatch
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
    with watch.stage("open"), progress(f"Opening {options.model.name}") as step:
        step(0, 0)
        subject = open_model(options.model, options.data, options.run.seed)
        history = saving.read_history(options.model.name) if is_saved(options.model.name) else ()
    folder = options.output.folder or Path("reports") / f"{subject.name}-lossless"
    saving.check_target(folder, overwrite=options.output.overwrite)
    with watch.stage("data"):
        images = read_images(options, subject, "none", progress)
    if options.data.source == SYNTHETIC:
        images = Images(None, images.evaluation, False)
    model, budget = subject.model.to(device), options.budget
    result = remove_dead(
        model,
        subject.example_input,
        data=None if images.calibration is None else Batches(images.calibration),
        settings=SlimSettings(WidthRule(budget.round_to, budget.min_width), budget.protect, seed=options.run.seed),
        recipe=subject.recipe,
        progress=progress,
    )
    result = replace(result, plan=with_source(result, subject, images, options), history=history)
    context = Context(
        model=subject.name,
        input_shape=tuple(subject.example_input.shape[1:]),
        weights=weights_of(subject.weights),
        data=data_of(images),
        accuracy=accuracies(model, result.model, images.evaluation, watch, progress),
        device=device.type,
        command_line=options.command_line,
    )
    result = replace(result, model=result.model.cpu(), seconds={**watch.seconds, **result.seconds})
    report = write_result(options, subject, result, report_of(result, context), folder, progress)
    return Saved(report, folder.expanduser())
