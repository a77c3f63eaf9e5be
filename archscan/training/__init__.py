"""Train a network after it was slimmed: model or saved folder, images → the same network with better weights.

What flows through the files: `settings` and `images` say what is trained how, `distillation` who teaches, `trainer`
does it, in one process or many, `checkpoints` remember it, `folder` makes a saved result of it.

The decision that is not obvious: there is one function for a network and for a saved folder, since both are the same
work; the folder knows by itself how its images are prepared and which dense network taught it.
"""

from collections.abc import Callable
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import nn

from archscan.data import ImageSet, evaluation_images
from archscan.errors import BadInput
from archscan.processes import Place, joined
from archscan.report.training import EpochRow, Moment, TrainingRun
from archscan.sources import Preprocessing
from archscan.training.distillation import Teacher
from archscan.training.folder import RESUME, Request, finetune_folder, finetune_saved
from archscan.training.images import AugmentedImages, Epochs, LaterEpochs, given_batches, open_epochs
from archscan.training.settings import TrainSettings
from archscan.training.trainer import Job, Trained, run

__all__ = [
    "EpochRow",
    "Epochs",
    "LaterEpochs",
    "Moment",
    "Request",
    "Teacher",
    "TrainSettings",
    "Trained",
    "TrainingRun",
    "finetune",
    "finetune_folder",
    "open_epochs",
    "open_evaluation",
    "open_images",
    "train",
]


def finetune(
    model_or_folder: nn.Module | str | PathLike[str],
    data: Any,
    *,
    eval_data: str | PathLike[str] | None = None,
    preprocessing: Preprocessing | None = None,
    teacher: nn.Module | str | None = None,
    settings: TrainSettings | None = None,
    output: str | PathLike[str] | None = None,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    watch: Callable[[Moment], None] = lambda _moment: None,
) -> Trained:
    """Train a network, or a saved result; what is given is left unchanged.

    >>> import archscan
    >>> from archscan.sources import open_subject
    >>> lenet = open_subject("lenet5", weights="random")
    >>> asked = archscan.TrainSettings(epochs=2, samples=64, batch_size=16)
    >>> trained = archscan.finetune(lenet.model, "digits", preprocessing=lenet.preprocessing, settings=asked)
    >>> first, last = trained.history.epochs
    >>> last.train_loss < first.train_loss
    True

    Args:
        model_or_folder: A classifier, or a folder that archscan saved.
        data: A folder or a zip of images, or ``digits``; for a network also batches that can be counted, such as a data
            loader of (images, labels).
        eval_data: A folder, a zip or ``digits``, for the accuracy after every epoch.
        preprocessing: How a network wants its images, unless it is given batches; a folder knows.
        teacher: For a network, another one to learn from; for a folder see `distillation.open_teacher`.
        settings: How to train; the defaults follow the size of the data.
        output: Of a folder's result; None for its name with ``-finetuned``.
        overwrite: Replace a result that is there.
        device: Where to train; None for where the network is, which for a folder is the CPU.
        watch: Called some times a second with what is measured.

    Returns:
        The trained network, in eval mode, and its history.

    Raises:
        BadInput: Something asked for cannot be had.
    """
    where = None if device is None else torch.device(device)
    if isinstance(model_or_folder, nn.Module):
        if output is not None or isinstance(teacher, str):
            raise BadInput("a network is not saved and has no files; leave output out, and pass a teacher as a module")
        start = partial(train, model_or_folder, data, eval_data=eval_data, settings=settings, device=where)
        return start(preprocessing=preprocessing, teacher=teacher, watch=watch)
    if preprocessing is not None or isinstance(teacher, nn.Module):
        raise BadInput("a saved folder knows its images and names its teacher; pass archscan.load(folder) instead")
    begin = partial(finetune_saved, model_or_folder, data, eval_data=eval_data, settings=settings, device=where)
    return begin(output=output, teacher=teacher, overwrite=overwrite, watch=watch)


def train(
    model: nn.Module,
    data: Any,
    *,
    eval_data: str | PathLike[str] | ImageSet | None = None,
    preprocessing: Preprocessing | None = None,
    teacher: nn.Module | None = None,
    settings: TrainSettings | None = None,
    device: torch.device | None = None,
    watch: Callable[[Moment], None] = lambda _moment: None,
) -> Trained:
    """Train a network for some epochs, as between two rounds of a slimming; arguments and refusals as in `finetune`.

    The data may also be images that `images.open_epochs` opened, which need not be read again for every round.
    """
    settings = settings or TrainSettings()
    home = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    with joined(device or home, RESUME) as place:
        evaluation = open_evaluation(eval_data, preprocessing)
        named = Teacher(teacher, "none" if teacher is None else "a given network")
        images = open_images(data, preprocessing, settings, place, evaluates=evaluation is not None)
        return run(Job(model, images, settings, named, evaluation, place), watch=watch)


def open_images(
    data: Any, preprocessing: Preprocessing | None, settings: TrainSettings, place: Place, *, evaluates: bool
) -> Epochs:
    """Open what to learn from, as `finetune` takes it; `evaluates` says that there are images to evaluate on besides.

    Raises:
        BadInput: It is none of what `finetune` takes, or not all that is needed is known of it.
    """
    if isinstance(data, AugmentedImages):
        return data
    if isinstance(data, str | PathLike):
        if preprocessing is None:
            raise BadInput(f"how images of {data} are prepared is not known; pass preprocessing=, or batches")
        return open_epochs(data, preprocessing, settings, place)
    if preprocessing is not None and not evaluates:
        raise BadInput("batches are prepared already; leave preprocessing out, or pass a folder of images")
    if (settings.batch_size, settings.samples, settings.hflip, settings.workers) != (None, None, None, None):
        raise BadInput("batches have their own size, number and augmentation; leave those settings out")
    return given_batches(data, place)


def open_evaluation(
    data: str | PathLike[str] | ImageSet | None, preprocessing: Preprocessing | None
) -> ImageSet | None:
    """Open what to evaluate on, as `finetune` takes it; None for nothing.

    Raises:
        BadInput: It cannot be read, or how the network wants its images is not known.
    """
    if data is None or isinstance(data, ImageSet):
        return data
    if preprocessing is None:
        raise BadInput(f"how images of {data} are prepared is not known; pass preprocessing=")
    return evaluation_images(data, preprocessing, batch_size=128)
