"""Train between the rounds of a slimming: the network that a round left, images → the same network, better weights.

The decision that is not obvious: the rounds go through the epochs of one training. The order and the augmentation of
the images go on where the round before stopped, so that none sees the same again; the learning rate starts anew, since
every round does new damage.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from archscan.data import ImageSet
from archscan.errors import BadInput
from archscan.evaluation import require_classes
from archscan.options import SYNTHETIC, ProgressFactory, SlimOptions
from archscan.processes import Place
from archscan.report.training import TrainingRun, told
from archscan.saved import is_saved, open_original
from archscan.saving import distinct_tensors
from archscan.sources import Preprocessing, Subject
from archscan.training import Epochs, LaterEpochs, Teacher, TrainSettings, open_epochs, open_evaluation, open_images
from archscan.training.trainer import Job, Trained, hyperparameters, run

__all__ = ["Finetuning", "Retraining", "asked_for", "check_asked", "notes_of_training", "opened", "train_round"]


@dataclass(frozen=True, eq=False)
class Finetuning:
    """How a network is trained after every round of its slimming; the last round's training gives the result.

    Attributes:
        data: Labelled images to learn from, as for `archscan.finetune`.
        preprocessing: How the network wants its images, unless they come as batches.
        eval_data: A folder, a zip or ``digits``, for the accuracy after every epoch.
        teacher: Who teaches; None for the network that is slimmed, as it was.
        settings: How to train each time.
    """

    data: Any
    preprocessing: Preprocessing | None = None
    eval_data: str | os.PathLike[str] | ImageSet | None = None
    teacher: nn.Module | Teacher | None = None
    settings: TrainSettings = field(default_factory=TrainSettings)


@dataclass(frozen=True, eq=False)
class Retraining:
    """A `Finetuning` with its images opened and its teacher at hand."""

    images: Epochs
    evaluation: ImageSet | None
    teacher: Teacher
    settings: TrainSettings


def opened(asked: Finetuning, model: nn.Module, place: Place) -> Retraining:
    """Open images, and choose the teacher.

    Args:
        asked: What was asked for.
        model: The network that is slimmed, which teaches where nobody else is to.
        place: Which process this is.

    Raises:
        BadInput: There is nothing to learn from.
    """
    if not isinstance(asked, Finetuning):
        raise BadInput(f"finetune is a {type(asked).__name__}; pass archscan.Finetuning(data, …)")
    if asked.data is None:
        raise BadInput("fine-tuning needs labelled images to learn from; pass Finetuning(data=…)")
    evaluation = open_evaluation(asked.eval_data, asked.preprocessing)
    images = open_images(asked.data, asked.preprocessing, asked.settings, place, evaluates=evaluation is not None)
    teacher = asked.teacher
    if not isinstance(teacher, Teacher):
        teacher = Teacher(model, "the dense original") if teacher is None else Teacher(teacher, "a given network")
    return Retraining(images, evaluation, teacher, asked.settings)


def train_round(
    retraining: Retraining,
    model: nn.Module,
    number: int,
    macs_kept: float,
    place: Place,
    step: Callable[[int, int], None],
) -> Trained:
    """Train what a round left; it stays as it is.

    Args:
        retraining: On what, and how.
        model: The network.
        number: Of the round, from 1.
        macs_kept: Of the dense network, for the record.
        place: Which process this is; all end with the same network.
        step: Called with training steps done and in all.

    Raises:
        BadInput: See `training.trainer.run`.
    """
    home = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    at_home = replace(place, device=home)
    job = Job(model, retraining.images, retraining.settings, retraining.teacher, retraining.evaluation, at_home)
    epochs = hyperparameters(job).epochs
    job = replace(job, images=LaterEpochs(retraining.images, (number - 1) * epochs))

    trained = run(job, watch=lambda now: step((now.epoch - 1) * now.steps + now.step, now.epochs * now.steps))
    with torch.no_grad():
        for tensor in distinct_tensors(trained.model).values() if place.count > 1 else ():
            tensor.copy_(at_home.first(tensor))
    return replace(trained, history=replace(trained.history, round=number, macs_kept=macs_kept))


def notes_of_training(runs: Sequence[TrainingRun]) -> list[str]:
    """Say what a user has to know of the trainings of a slimming, a sentence each."""
    if not runs:
        return []
    proof = "The proof was made before the network was fine-tuned"
    if len(runs) > 1:
        proof = (
            "Each round was proven and repaired, before it was fine-tuned, against the network with the weights that "
            "the round before had learned"
        )
    return [*told(runs[-1], after=f" after each of {len(runs)} rounds" if len(runs) > 1 else ""), f"{proof}."]


# --- the command line -----------------------------------------------------------------------------------------------


def check_asked(options: SlimOptions) -> None:
    """Refuse, before anything is opened, a fine-tuning that has nothing to learn from.

    Raises:
        BadInput: It has not, or an option would have no effect.
    """
    if options.finetune_epochs is None:
        if options.finetune_samples is not None:
            raise BadInput("--finetune-samples has no effect where nothing is trained; add --finetune-epochs")
    elif options.data.source == SYNTHETIC:
        raise BadInput("--finetune-epochs needs labelled images, noise has no classes to learn; pass --data")


def asked_for(
    options: SlimOptions, subject: Subject, evaluation: ImageSet | None, place: Place, progress: ProgressFactory
) -> Finetuning | None:
    """Read the images of ``--finetune-epochs``; None where it is not asked for.

    Raises:
        BadInput: Their labels are not the network's classes.
    """
    if options.finetune_epochs is None:
        return None
    settings = TrainSettings(epochs=options.finetune_epochs, samples=options.finetune_samples, seed=options.run.seed)
    with progress("Reading training images") as step:
        images = open_epochs(options.data.source, subject.preprocessing, settings, place, step)
    why = "it cannot learn them; leave out --finetune-epochs, or pass images of its classes"
    require_classes(images.classes, subject.num_classes, f"--data {options.data.source}", why)
    return Finetuning(images, None, evaluation, _teacher(options, subject), settings)


def _teacher(options: SlimOptions, subject: Subject) -> Teacher | None:
    """Let the dense original teach, unless it knows nothing; None where it is the network that is slimmed."""
    if subject.weights.kind == "random":
        return Teacher(None, "none, since the weights of the dense original were random")
    if not is_saved(options.model.name):
        return None
    try:
        return Teacher(open_original(Path(options.model.name)), "the dense original")
    except BadInput:
        return Teacher(subject.model, f"{options.model.name} as it was")
