"""What became of a network after it was cut: trainings and exports of a `Report` → lines, points of learning curves.

The decision that is not obvious: trainings between the rounds of one slimming are one episode. They are told in one
line and drawn in one curve, on which a fall is what a round cost and the rise after it what training gave back.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from archscan.report import views
from archscan.report.model import Exported, Report
from archscan.report.training import EpochRow, TrainingRun

MOST_ROUNDS_TOLD = 4


class EpochLine(NamedTuple):
    """One epoch, with the name of the training that it belongs to."""

    training: str
    row: EpochRow


def episodes(history: Sequence[TrainingRun]) -> tuple[tuple[TrainingRun, ...], ...]:
    """Divide trainings into those of one slimming in rounds, and single ones."""
    found: list[list[TrainingRun]] = []
    for run in history:
        if found and run.round is not None and found[-1][-1].round == run.round - 1:
            found[-1].append(run)
        else:
            found.append([run])
    return tuple(map(tuple, found))


def training_lines(report: Report) -> tuple[str, ...]:
    """Say of each episode what was trained how, and what it gave."""
    return tuple(_line(runs) for runs in episodes(report.history))


def _line(runs: Sequence[TrainingRun]) -> str:
    run, count = runs[-1], len(runs)
    epochs = views.plural(len(run.epochs), "epoch")
    what = f"{count} rounds of {epochs}" if count > 1 else epochs
    taught = ", no teacher" if run.teacher.startswith("none") else f", taught by {run.teacher}"
    lr = f"{run.optimizer} with a learning rate up to {run.lr:.2g}"
    how = f"{what} on {views.plural(run.images, 'image')}, {lr}{taught}"
    gave = [part for part in (_accuracies(runs), _loss(run) if count == 1 else "") if part]
    return f"{how}: {', '.join([*gave, f'{sum(each.seconds for each in runs):.3g} s'])} (measured)"


def _accuracies(runs: Sequence[TrainingRun]) -> str:
    pairs = [(run.accuracy_before, run.epochs[-1].eval_accuracy) for run in runs if run.epochs]
    told = [f"{views.percent(before)} to {views.percent(after)}" for before, after in pairs if after is not None]
    if not told:
        return ""
    if len(told) > MOST_ROUNDS_TOLD:
        return f"accuracy {told[0]} in the first round, {told[-1]} in the last"
    return f"accuracy {', then '.join(told)}"


def _loss(run: TrainingRun) -> str:
    losses = [row.train_loss for row in run.epochs]
    if not losses:
        return ""
    return f"loss {losses[0]:.3g}" + (f" to {losses[-1]:.3g}" if len(losses) > 1 else "")


def export_line(entry: Exported) -> str:
    """Say of a file how large it is, and how far from PyTorch it was."""
    opset = "" if entry.opset is None else f"opset {entry.opset}, "
    batch = "any batch size" if entry.batch_size is None else f"batch size {entry.batch_size}"
    size = f"{views.si(entry.file_bytes, 'B')}, {views.si(entry.parameters)} parameters"
    return f"{opset}{size}, {batch}, off by at most {entry.max_abs_error:.2g} (measured)"


def epoch_lines(report: Report) -> tuple[EpochLine, ...]:
    """List all epochs, in order."""
    return tuple(EpochLine(name, row) for name, run in _named(report) for row in run.epochs)


def learning_curves(report: Report) -> dict[str, Any] | None:
    """Give what the page draws; None where nothing was trained.

    Returns:
        ``dense``, the accuracy of the dense original, and of each training its ``name``, its accuracy ``before``, and
        of each epoch the loss, the accuracy in training and the one after it; None for what was not measured.
    """
    if not any(run.epochs for run in report.history):
        return None
    runs = [
        {
            "name": name,
            "before": run.accuracy_before,
            "epochs": [[row.train_loss, row.train_accuracy, row.eval_accuracy] for row in run.epochs],
        }
        for name, run in _named(report)
    ]
    return {"dense": None if report.accuracy is None else report.accuracy.before, "runs": runs}


def _named(report: Report) -> list[tuple[str, TrainingRun]]:
    names = []
    for runs in episodes(report.history):
        alone = len(runs) == 1
        names += ["fine-tuning" if alone else f"round {place}" for place, _ in enumerate(runs, start=1)]
    return list(zip(names, report.history, strict=True))
