"""Images to train on: a folder, a zip or ``digits`` → batches of each epoch, augmented.

The decision that is not obvious: nothing here has a state. The order of an epoch follows from the seed and the epoch,
the augmentation of an image from the seed, the epoch and the image. So the batches are the same with any number of
workers or processes, and a run that is resumed sees what it would have seen.

Small images are decoded once, and shifted and flipped; large ones are decoded in every epoch, by timm's transforms.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

from archscan.data import UNREADABLE, ImageSet, calibration_images, training_images
from archscan.errors import BadInput
from archscan.options import ProgressCallback
from archscan.processes import Place
from archscan.sources import Preprocessing
from archscan.training.settings import SMALL_SIDE_PIXELS, TrainSettings, choose_batch_size

_CROP_AREA = (0.25, 1.0)
_MOST_WORKERS = 8
_TRIES = 8


class Epochs(Protocol):
    """What a training reads: the batches of each epoch."""

    @property
    def samples(self) -> int:
        """How many images there are."""
        ...

    @property
    def batch_size(self) -> int:
        """Images per step, over all processes."""
        ...

    @property
    def side_pixels(self) -> int:
        """Longer side of an image."""
        ...

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's part of every batch: images of shape [B, C, H, W], and labels of shape [B]."""
        ...


@contextmanager
def seeded_everywhere(*numbers: int) -> Iterator[None]:
    """Draw what is random inside, on the CPU, from these numbers; leave the generators as they were."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
    before = torch.default_generator.get_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - timm draws from the global generator
        yield
    finally:
        torch.default_generator.set_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])  # noqa: NPY002


@dataclass(frozen=True)
class _Wanted:
    """What to read, in values that can be sent to another process."""

    spec: str
    preprocessing: Preprocessing
    samples: int | None
    seed: int
    hflip: float


class _Decoded:
    """Small images, decoded once."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __call__(self, index: int) -> Image.Image:
        pixels_CHW = self.images.pixels_NCHW[index]
        return Image.fromarray(pixels_CHW[0] if len(pixels_CHW) == 1 else pixels_CHW.transpose(1, 2, 0))


class _Files:
    """Large images, decoded when they are asked for; each worker opens its own file, whose place is not shared."""

    def __init__(self, wanted: _Wanted) -> None:
        self.wanted = wanted
        self.opened: tuple[int, Any] | None = None

    def __call__(self, index: int) -> Image.Image:
        if self.opened is None or self.opened[0] != os.getpid():
            wanted = self.wanted
            source = training_images(wanted.spec, wanted.preprocessing, samples=wanted.samples, seed=wanted.seed)
            self.opened = os.getpid(), source
        mode = "L" if self.wanted.preprocessing.channels == 1 else "RGB"
        return self.opened[1].read(index).convert(mode)


class _Augmented(Dataset[tuple[Tensor, int, int]]):
    """Augmented images by (epoch, number); a damaged one is replaced by the next one, and its number told."""

    def __init__(
        self, read: Callable[[int], Image.Image], labels: Sequence[int], transform: Callable[[Any], Any], seed: int
    ) -> None:
        self.read, self.labels, self.transform, self.seed = read, labels, transform, seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, first = key
        damaged = -1
        for place in range(_TRIES):
            index = (first + place) % len(self.labels)
            try:
                image = self.read(index)
            except UNREADABLE:
                damaged = index
                continue
            with seeded_everywhere(self.seed, epoch, first):
                return self.transform(image), self.labels[index], damaged
        raise BadInput(f"{_TRIES} images in a row cannot be read, from number {first} on; pass sound ones")


class _Order(Sampler[list[tuple[int, int]]]):
    """The batches of an epoch, this process's part of each."""

    def __init__(self, samples: int, batch_size: int, seed: int, place: Place) -> None:
        self.samples, self.batch_size, self.seed, self.place = samples, batch_size, seed, place
        self.epoch = 0

    def __len__(self) -> int:
        return self.samples // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.samples).tolist()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            batch = order[start : start + self.batch_size]
            yield [(self.epoch, index) for index in batch[self.place.rank :: self.place.count]]


@dataclass(eq=False)
class AugmentedImages:
    """The epochs of a folder, a zip or the digits.

    Attributes:
        samples: How many images there are.
        batch_size: Images per step, over all processes.
        side_pixels: Longer side of an image as the network takes it.
        classes: Names of the classes by number.
        loader: Gives the batches.
        order: Tells it which.
        damaged: Numbers of images that could not be read, as far as they were tried.
    """

    samples: int
    batch_size: int
    side_pixels: int
    classes: tuple[str, ...]
    loader: DataLoader[Any]
    order: _Order
    damaged: set[int] = field(default_factory=set)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch."""
        self.order.epoch = number
        for images, labels, damaged in self.loader:
            self.damaged.update(damaged[damaged >= 0].tolist())
            yield images, labels


@dataclass(frozen=True, eq=False)
class LaterEpochs:
    """The epochs of some images from a later one on, for a training that continues another.

    Attributes:
        images: The images.
        first: Number of the epoch that is this one's 0.
    """

    images: Epochs
    first: int

    @property
    def samples(self) -> int:
        """How many images there are."""
        return self.images.samples

    @property
    def batch_size(self) -> int:
        """Images per step, over all processes."""
        return self.images.batch_size

    @property
    def side_pixels(self) -> int:
        """Longer side of an image."""
        return self.images.side_pixels

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's part of every batch."""
        return self.images.epoch(self.first + number)


def open_epochs(
    spec: str | os.PathLike[str],
    preprocessing: Preprocessing,
    settings: TrainSettings,
    place: Place,
    progress: ProgressCallback | None = None,
) -> AugmentedImages:
    """Open images to train on.

    Args:
        spec: A folder, a zip or ``digits``.
        preprocessing: How the network wants its images.
        settings: How many images, how many per batch, how they are augmented.
        place: Which part of a batch is this process's.
        progress: Called with images decoded and in all, where they are decoded once.

    Raises:
        BadInput: There is nothing to read, or the batch size does not fit.
    """
    if str(spec) == "synthetic":
        raise BadInput("noise has no classes to learn; train on a folder, a zip or digits")
    hflip = settings.hflip if settings.hflip is not None else 0.0 if str(spec) == "digits" else 0.5
    wanted = _Wanted(str(spec), preprocessing, settings.samples, settings.seed, hflip)
    side = max(preprocessing.input_size)
    read: Callable[[int], Image.Image]
    if side <= SMALL_SIDE_PIXELS:
        samples = settings.samples or np.iinfo(np.int64).max
        images = calibration_images(spec, preprocessing, samples=int(samples), seed=settings.seed, progress=progress)
        labels, classes = images.labels_N.tolist(), images.classes
        read, transform = _Decoded(images), _shifts(wanted)
    else:
        source = training_images(spec, preprocessing, samples=settings.samples, seed=settings.seed)
        labels, classes = list(source.labels), source.classes
        source.close()
        read, transform = _Files(wanted), _crops(wanted)
    batch_size = choose_batch_size(settings, len(labels), side, place.count)
    order = _Order(len(labels), batch_size, settings.seed, place)
    workers = _workers(settings, side, place)
    loader = DataLoader(
        _Augmented(read, labels, transform, settings.seed),
        batch_sampler=order,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=place.device.type == "cuda",
        generator=torch.Generator(),  # the loader would draw from the global one, with workers more often
    )
    return AugmentedImages(len(labels), batch_size, side, classes, loader, order)


def _workers(settings: TrainSettings, side_pixels: int, place: Place) -> int:
    """Choose how many processes prepare images: none where that costs little beside the training itself."""
    if settings.workers is not None:
        return settings.workers
    if place.device.type == "cpu" and side_pixels <= SMALL_SIDE_PIXELS:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_WORKERS, max(1, cores // place.count - 1))


def _shifts(wanted: _Wanted) -> Callable[[Any], Any]:
    """Shift by up to an eighth of the side and flip, as is usual for small images (He et al. 2015, section 4.2)."""
    height, width = wanted.preprocessing.input_size
    padding = "constant" if wanted.spec == "digits" else "reflect"
    return transforms.Compose(
        [
            transforms.RandomCrop((height, width), padding=(width // 8, height // 8), padding_mode=padding),
            transforms.RandomHorizontalFlip(wanted.hflip),
            transforms.ToTensor(),
            transforms.Normalize(wanted.preprocessing.mean, wanted.preprocessing.std),
        ]
    )


def _crops(wanted: _Wanted) -> Callable[[Any], Any]:
    """Crop, resize and flip at random, by timm."""
    preprocessing = wanted.preprocessing
    interpolation = preprocessing.interpolation
    return create_transform(
        (preprocessing.channels, *preprocessing.input_size),
        is_training=True,
        scale=_CROP_AREA,
        hflip=wanted.hflip,
        color_jitter=0.0,
        interpolation="nearest" if interpolation == "nearest-exact" else interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )


@dataclass(frozen=True, eq=False)
class GivenBatches:
    """The epochs of batches that the user made, such as a data loader's, which are the same or not as it pleases."""

    batches: Any
    samples: int
    batch_size: int
    side_pixels: int

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches as they are."""
        for batch in self.batches:
            yield _checked(batch)


def given_batches(batches: Any, place: Place) -> GivenBatches:
    """See that something is batches of images and labels that can be read again and again.

    Raises:
        BadInput: It is not, or there are several processes to share them.
    """
    if place.count > 1:
        raise BadInput("batches from Python cannot be shared among processes; pass a folder or a zip")
    if not hasattr(batches, "__len__") or not hasattr(batches, "__iter__") or isinstance(batches, Tensor):
        raise BadInput(
            f"the data is a {type(batches).__name__}, not batches that can be counted; pass a folder, a data loader, "
            "or a list of (images, labels)"
        )
    with seeded_everywhere(0):
        first = next(iter(batches), None)
    if first is None:
        raise BadInput("there is no batch to train on; pass at least one")
    images, _ = _checked(first)
    size = len(images)
    return GivenBatches(batches, len(batches) * size, size, max(images.shape[2:]))


def _checked(batch: Any) -> tuple[Tensor, Tensor]:
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    if not pair or batch[0].ndim != 4 or batch[1].ndim != 1 or batch[1].is_floating_point():
        raise BadInput("a batch is not a pair of images [B, C, H, W] and class numbers [B]; pass such pairs")
    return batch[0], batch[1]
