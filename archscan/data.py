"""Images for calibration and evaluation: a folder, a zip, ``digits`` or ``synthetic`` → `ImageSet`.

Data format: `ImageSet.pixels_NCHW` holds images of the model's input size as bytes; `ImageSet.batches` yields them as
float32, scaled to [0, 1] and normalised, with int64 labels. Folders and zips have the ImageFolder layout: one folder
per class, at the top or below a single folder; classes are numbered in the order of their names. A zip stays as it is,
nothing is extracted: the paths in it are names and no more.

The decision that is not obvious: every image is decoded once, when the set is made, so that what cannot be read is
counted and named before anything is computed from the rest, and each later pass over the images costs next to nothing.
A set too large for memory lies in a nameless temporary file.

The digits are split: calibration draws from the first 1,297 of scikit-learn's 1,797, evaluation sees the last 500.
"""

import os
import shutil
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from archscan.errors import BadInput
from archscan.sources import Preprocessing

SetKind = Literal["folder", "zip", "digits", "synthetic"]

DIGITS_CALIBRATION = 1297
_MEMORY_BYTES = 1 << 30
_LARGEST_FILE_BYTES = 1 << 28
_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "eval"})
UNREADABLE = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, SyntaxError, RuntimeError, OverflowError),
    *(struct.error, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError),
)
"""What Pillow and zipfile raise on damaged, encrypted or oversized images; Pillow's PNG reader raises SyntaxError."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Decoded images with labels.

    Attributes:
        spec: What was asked for.
        kind: What it turned out to be.
        pixels_NCHW: Images of the model's input size, uint8.
        labels_N: Class numbers, int64; 0 where there are no classes.
        classes: Names of the classes by number; empty for synthetic images.
        available: Number of images that there were to draw from.
        skipped: Names of images that could not be read.
        preprocessing: How the model wants its images.
        batch_size: Images per batch; the last one may be smaller.
    """

    spec: str
    kind: SetKind
    pixels_NCHW: np.ndarray
    labels_N: Tensor
    classes: tuple[str, ...]
    available: int
    skipped: tuple[str, ...]
    preprocessing: Preprocessing
    batch_size: int

    def __len__(self) -> int:
        return len(self.pixels_NCHW)

    @property
    def is_synthetic(self) -> bool:
        """Whether the images are noise."""
        return self.kind == "synthetic"

    def labels_fit(self, num_classes: int) -> bool:
        """Say whether the labels can be the model's: there are as many classes as it has outputs."""
        return len(self.classes) == num_classes

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images, float32 of shape [B, C, H, W], and labels, int64 of shape [B]; every pass yields the same."""
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.preprocessing.mean, self.preprocessing.std))
        for start in range(0, len(self), self.batch_size):
            part = slice(start, start + self.batch_size)
            pixels = torch.from_numpy(np.array(self.pixels_NCHW[part]))
            yield pixels.to(torch.float32).div_(255).sub_(mean).div_(std), self.labels_N[part]

    def to_json(self) -> dict[str, Any]:
        """Describe the set in JSON values; unreadable images by number and by the first few names."""
        return {
            "source": self.spec,
            "kind": self.kind,
            "samples": len(self),
            "available": self.available,
            "classes": len(self.classes),
            "skipped": len(self.skipped),
            "skipped_names": list(self.skipped[:5]),
        }


@dataclass(frozen=True)
class _Source:
    """Images before they are decoded; `read` decodes one by its number, and may fail as `UNREADABLE` says."""

    kind: SetKind
    names: Sequence[str]
    labels: Sequence[int]
    classes: tuple[str, ...]
    read: Callable[[int], Image.Image]
    close: Callable[[], None] = lambda: None


def calibration_images(
    spec: str | os.PathLike[str],
    preprocessing: Preprocessing,
    *,
    samples: int,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ImageSet:
    """Draw images to calibrate on, equally many of each class as far as they go, in mixed order.

    Args:
        spec: A folder, a zip, ``digits`` or ``synthetic``.
        preprocessing: How the model wants its images.
        samples: How many to draw; fewer where there are no more.
        batch_size: Images per batch.
        seed: Of the draw.
        progress: Called with the number of images decoded and of all to decode.

    Raises:
        BadInput: There is nothing to read, or none of it can be read.
    """
    _check_counts(samples, batch_size)
    if str(spec) == "synthetic":
        return _synthetic(preprocessing, samples, batch_size, seed)
    source = _open(spec, preprocessing, range(DIGITS_CALIBRATION))
    order = _balanced_order(source.labels, len(source.classes), seed)
    return _decoded(str(spec), source, order, samples, preprocessing, batch_size, progress)


def evaluation_images(
    spec: str | os.PathLike[str],
    preprocessing: Preprocessing,
    *,
    samples: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ImageSet:
    """Read images to measure accuracy on: all, in order, or `samples` of them drawn as `calibration_images` does.

    Raises:
        BadInput: There is nothing to read, none of it can be read, or it has no labels.
    """
    _check_counts(samples or 1, batch_size)
    if str(spec) == "synthetic":
        raise BadInput("synthetic images have no labels to measure accuracy with; pass a folder, a zip or digits")
    source = _open(spec, preprocessing, range(DIGITS_CALIBRATION, 1797))
    everything = samples is None or samples >= len(source.names)
    order = list(range(len(source.names))) if everything else _balanced_order(source.labels, len(source.classes), seed)
    wanted = len(order) if samples is None else samples
    return _decoded(str(spec), source, order, wanted, preprocessing, batch_size, progress)


def training_images(
    spec: str | os.PathLike[str], preprocessing: Preprocessing, *, samples: int | None = None, seed: int = 0
) -> _Source:
    """Open images to train on without decoding any, those that `calibration_images` draws from: all, or `samples`."""
    source = _open(spec, preprocessing, range(DIGITS_CALIBRATION))
    drawn = _balanced_order(source.labels, len(source.classes), seed)[:samples]
    names, labels = [source.names[index] for index in drawn], [source.labels[index] for index in drawn]
    return replace(source, names=names, labels=labels, read=lambda place: source.read(drawn[place]))


def _check_counts(samples: int, batch_size: int) -> None:
    if samples < 1 or batch_size < 1:
        raise BadInput(f"samples ({samples}) and batch size ({batch_size}) must be at least 1")


def _open(spec: str | os.PathLike[str], preprocessing: Preprocessing, digits: range) -> _Source:
    if preprocessing.channels not in (1, 3):
        raise BadInput(f"the model takes {preprocessing.channels} channels, images have 1 or 3; pass --data synthetic")
    if str(spec) == "digits":
        return _digits(digits)
    path = Path(spec)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise BadInput(f"there is no folder or zip {path}; pass one, or digits or synthetic")
    return _zip(path)


def _digits(part: range) -> _Source:
    """scikit-learn's handwritten digits: 8 x 8 pixels of 0 to 16 (Alpaydin and Kaynak 1998)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    return _Source(
        "digits",
        [f"digits {number}" for number in part],
        [int(data.target[number]) for number in part],
        tuple(str(name) for name in data.target_names),
        lambda index: Image.fromarray(images[part[index]]),
    )


def _folder(path: Path) -> _Source:
    files: list[str] = []

    def refuse(error: OSError) -> None:
        raise BadInput(f"{error.filename} cannot be read ({error.strerror}); check its permissions") from error

    for folder, folders, names in os.walk(path, onerror=refuse, followlinks=True):
        folders.sort()
        inner = Path(folder).relative_to(path)
        files += [(inner / name).as_posix() for name in names]
    names, labels, classes = _classes(files, str(path))

    def read(index: int) -> Image.Image:
        with (path / names[index]).open("rb") as file:
            return _loaded(file)

    return _Source("folder", names, labels, classes, read)


def _zip(path: Path) -> _Source:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise BadInput(f"{path} cannot be read as a zip ({error}); pass a folder or a sound zip of images") from error
    infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    try:
        names, labels, classes = _classes(infos, str(path))
    except BadInput:
        archive.close()
        raise

    def read(index: int) -> Image.Image:
        info = infos[names[index]]
        if info.file_size > _LARGEST_FILE_BYTES:
            raise ValueError(f"{info.filename} unpacks to {info.file_size} bytes")
        with archive.open(info) as file:
            return _loaded(file)

    return _Source("zip", names, labels, classes, read, archive.close)


def _loaded(file: IO[bytes]) -> Image.Image:
    image = Image.open(file)
    image.load()
    return image


def _classes(files: Sequence[str] | Mapping[str, Any], where: str) -> tuple[list[str], list[int], tuple[str, ...]]:
    """Sort image files into classes by their first folder, below what all of them share."""
    parts = {name: PurePosixPath(name).parts for name in files if name.lower().endswith(IMG_EXTENSIONS)}
    images = sorted(name for name in parts if not _is_hidden(parts[name]))
    if not images:
        raise BadInput(
            f"{where} holds no images ({', '.join(IMG_EXTENSIONS[:4])} …); put them into one folder per class"
        )
    depth = 0
    while len({parts[name][depth] for name in images}) == 1 and all(len(parts[name]) > depth + 2 for name in images):
        depth += 1
    flat = [name for name in images if len(parts[name]) < depth + 2]
    if flat:
        raise BadInput(f"{where} has images outside class folders ({flat[0]}); put each into the folder of its class")
    classes = tuple(sorted({parts[name][depth] for name in images}))
    if {name.lower() for name in classes} <= _SPLIT_NAMES:
        raise BadInput(f"{where} holds splits ({', '.join(classes)}), not classes; pass the folder of one split")
    numbers = {name: number for number, name in enumerate(classes)}
    return images, [numbers[parts[name][depth]] for name in images], classes


def _is_hidden(parts: tuple[str, ...]) -> bool:
    return any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in parts)


def _balanced_order(labels: Sequence[int], class_count: int, seed: int) -> list[int]:
    """Order all images so that every beginning has each class about equally often.

    Each round takes one image of every class that has some left, the classes in a new random order.
    """
    rng = np.random.default_rng(seed)
    by_class: list[list[int]] = [[] for _ in range(class_count)]
    for index, label in enumerate(labels):
        by_class[label].append(index)
    shuffled = [rng.permutation(np.array(indices, dtype=np.int64)).tolist() for indices in by_class]
    order: list[int] = []
    for turn in range(max(len(indices) for indices in shuffled)):
        left = [indices[turn] for indices in shuffled if len(indices) > turn]
        order += rng.permutation(np.array(left, dtype=np.int64)).tolist()
    return order


def _decoded(
    spec: str,
    source: _Source,
    order: Sequence[int],
    samples: int,
    preprocessing: Preprocessing,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> ImageSet:
    """Decode images in `order` until there are `samples`."""
    samples = min(samples, len(order))
    to_pixels = _to_pixels(preprocessing, crop=source.kind != "digits")
    pixels = _storage((samples, preprocessing.channels, *preprocessing.input_size))
    mode = "L" if preprocessing.channels == 1 else "RGB"
    kept: list[int] = []
    skipped: list[str] = []
    with warnings.catch_warnings(action="ignore"):  # Pillow warns of damaged metadata, which nobody reads here
        try:
            for index in order:
                try:
                    image = source.read(index).convert(mode)
                except UNREADABLE:
                    skipped.append(source.names[index])
                    continue
                pixels[len(kept)] = to_pixels(image)
                kept.append(index)
                if progress is not None:
                    progress(len(kept), samples)
                if len(kept) == samples:
                    break
        finally:
            source.close()
    if not kept:
        raise BadInput(f"none of the {len(order)} images in {spec} can be read ({skipped[0]} …); pass sound ones")
    labels = torch.tensor([source.labels[index] for index in kept], dtype=torch.int64)
    names, bad = source.names, tuple(skipped)
    return ImageSet(
        spec, source.kind, pixels[: len(kept)], labels, source.classes, len(names), bad, preprocessing, batch_size
    )


def _storage(shape: tuple[int, ...]) -> np.ndarray:
    """Make room for bytes: in memory, or in a nameless temporary file where they are too many."""
    size = int(np.prod(shape, dtype=np.int64))
    if size <= _MEMORY_BYTES:
        return np.empty(shape, dtype=np.uint8)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if size > 0.9 * free:
        raise BadInput(
            f"{shape[0]} images need {size / 1e9:.1f} GB of temporary space, which has {free / 1e9:.1f}; pass fewer"
        )
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)


def _to_pixels(preprocessing: Preprocessing, crop: bool) -> Callable[[Image.Image], np.ndarray]:
    """Return what makes an image bytes of the model's size; an image that has that size already is not touched.

    Images are resized and cropped as the network's own evaluation does; without `crop` they are only resized.
    """
    height, width = preprocessing.input_size
    resize = create_transform(
        (preprocessing.channels, height, width),
        is_training=False,
        use_prefetcher=True,  # bytes, which `ImageSet.batches` normalises
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop_pct if crop else 1.0,
        crop_mode=preprocessing.crop_mode if crop else "squash",
    )

    def to_pixels(image: Image.Image) -> np.ndarray:
        if image.size == (width, height):
            pixels_HW = np.asarray(image)
            return pixels_HW[None] if pixels_HW.ndim == 2 else pixels_HW.transpose(2, 0, 1)
        return np.asarray(resize(image))

    return to_pixels


def _synthetic(preprocessing: Preprocessing, samples: int, batch_size: int, seed: int) -> ImageSet:
    """Draw Gaussian noise with the mean and the deviation of the model's images, clipped to [0, 1]."""
    rng = np.random.default_rng(seed)
    pixels = _storage((samples, preprocessing.channels, *preprocessing.input_size))
    mean, std = (np.array(v, dtype=np.float32)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    for number in range(samples):
        noise = rng.standard_normal(pixels.shape[1:], dtype=np.float32)
        pixels[number] = np.clip(np.round(255 * (mean + std * noise)), 0, 255)
    labels = torch.zeros(samples, dtype=torch.int64)
    return ImageSet("synthetic", "synthetic", pixels, labels, (), samples, (), preprocessing, batch_size)
