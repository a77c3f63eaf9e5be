"""The numbers of a training: `EpochRow` per epoch and `TrainingRun`, which ``summary.json`` keeps, and `Moment`.

Numbers only, as in `report.model`, which lists them under ``history``.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class EpochRow:
    """One epoch, measured.

    Attributes:
        epoch: Its number, from 1.
        lr: Learning rate at its last step.
        train_loss: Mean over its images.
        train_accuracy: Top-1 on its augmented images, in [0, 1]; None where images were mixed.
        eval_accuracy: Top-1 after it, in [0, 1]; None where there were no images to evaluate on.
        images_per_second: Of all processes, evaluation not counted.
        seconds: Evaluation included.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float | None
    eval_accuracy: float | None
    images_per_second: float
    seconds: float


@dataclass(frozen=True)
class TrainingRun:
    """One training of a network.

    Attributes:
        images: How many there were to learn from.
        batch_size: Images per step, over all processes.
        optimizer: Its name.
        lr: Peak of the learning rate.
        weight_decay: Of weights.
        teacher: What the network was distilled from, or why from nothing.
        processes: How many.
        ema: Whether the weights are a moving average.
        amp: Whether it was computed in half precision.
        seed: Of everything random.
        accuracy_before: Top-1 before the first epoch, in [0, 1]; None where there were no images to evaluate on.
        epochs: In order.
        command_line: As typed; empty where it was run from Python.
        round: Of a slimming, which it followed, from 1; None for a training of its own.
        macs_kept: Fraction of the MACs that the network has of what it was slimmed from; None where it was not told.
    """

    images: int
    batch_size: int
    optimizer: str
    lr: float
    weight_decay: float
    teacher: str
    processes: int
    ema: bool
    amp: bool
    seed: int
    accuracy_before: float | None
    epochs: tuple[EpochRow, ...]
    command_line: str = ""
    round: int | None = None
    macs_kept: float | None = None

    @property
    def seconds(self) -> float:
        """Time of all epochs."""
        return sum(row.seconds for row in self.epochs)


def told(run: TrainingRun, after: str = "") -> list[str]:
    """Say in sentences what a training was.

    Args:
        run: The training, or one of several that were alike.
        after: When it took place, such as `` after each of 4 rounds``; empty where that goes without saying.
    """
    count, untaught = len(run.epochs), run.teacher.startswith("none")
    taught = "" if untaught else f", taught by {run.teacher}"
    sentences = [f"Fine-tuned for {count} epoch{'s' * (count > 1)}{after} on {run.images:,} images{taught}."]
    if run.teacher.startswith("none, "):
        sentences.append(f"There was no teacher{run.teacher.removeprefix('none')}.")
    return sentences


@dataclass(frozen=True)
class Moment:
    """A run while it lasts, for whoever watches.

    Attributes:
        epoch: The present one, from 1.
        epochs: In all.
        step: Steps done in this epoch.
        steps: Per epoch.
        loss: Mean over the epoch so far.
        accuracy: Top-1 over the epoch so far, in [0, 1]; None where images are mixed.
        images_per_second: Of all processes, over the epoch so far.
        seconds_left: Estimated to the end of the last epoch; None before the first step.
        rows: Of the epochs that are done.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float | None
    images_per_second: float
    seconds_left: float | None
    rows: tuple[EpochRow, ...]
