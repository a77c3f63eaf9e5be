"""How to train: what a user asks for (`TrainSettings`) and what is done (`Hyperparameters`), by the size of the data.

The decision that is not obvious: the batch size is that of all processes together. So learning rate, number of steps
and order of the images are the same on one GPU and on eight.
"""

import math
from dataclasses import dataclass

from archscan.errors import BadInput

SMALL_SIDE_PIXELS = 64
"""Images up to this side are decoded once and shifted; larger ones are decoded and cropped anew in every epoch."""

_IMAGES_SEEN = 500_000
_LEAST_EPOCHS, _MOST_EPOCHS = 10, 50
_SGD_LR, _ADAMW_LR = 0.04, 1e-3
_REFERENCE_BATCH = 128
_WARMUP_SHARE = 0.1
_STEPS_TO_SETTLE = 1_000
"""A training of fewer steps cannot come back from as far as the full learning rate takes it."""


@dataclass(frozen=True)
class TrainSettings:
    """What can be asked for; None lets the data decide.

    Attributes:
        epochs: Passes over the images.
        lr: Peak of the learning rate, which rises linearly and falls as a cosine.
        batch_size: Images per step, over all processes.
        samples: How many of the images to use; None for all.
        optimizer: A name that timm knows; None for SGD with Nesterov momentum where there is BatchNorm, else AdamW.
        weight_decay: Of weights; biases and normalisations have none.
        smoothing: Share of the label's probability that is spread over all classes.
        mixup: Parameter of mixup's Beta distribution; 0 for none.
        cutmix: The same for CutMix.
        hflip: Probability of a horizontal flip; None for 0.5, and 0 on the digits.
        distill_weight: Share of the teacher in the loss; the labels have the rest.
        temperature: That softens the logits of both networks, where there is a teacher.
        ema: Return the exponential moving average of the weights instead of the last ones.
        amp: Compute in bfloat16 where that is safe (float16 on GPUs that have no bfloat16).
        workers: Processes that prepare images; None for as many as help.
        seed: Of the order of images, augmentation and dropout.
    """

    epochs: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    samples: int | None = None
    optimizer: str | None = None
    weight_decay: float | None = None
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    hflip: float | None = None
    distill_weight: float = 0.9
    temperature: float = 4.0
    ema: bool = False
    amp: bool = False
    workers: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "samples"):
            _require(name, getattr(self, name), whole=True, least=1)
        for name in ("workers", "seed"):
            _require(name, getattr(self, name), whole=True, least=0)
        for name in ("weight_decay", "mixup", "cutmix"):
            _require(name, getattr(self, name), least=0)
        for name in ("smoothing", "hflip", "distill_weight"):
            _require(name, getattr(self, name), least=0, most=1)
        for name in ("lr", "temperature"):
            _require(name, getattr(self, name), least=0)
            if getattr(self, name) == 0:
                raise BadInput(f"{name} is 0, which trains nothing; pass a number above 0")


def _require(name: str, value: float | None, *, whole: bool = False, least: float, most: float = math.inf) -> None:
    """Refuse a number of the wrong kind or out of bounds."""
    if value is None:
        return
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not least <= value <= most or not math.isfinite(value):
        bounds = f"from {least:g} to {most:g}" if math.isfinite(most) else f"from {least:g} on"
        raise BadInput(f"{name} is {value!r}; it must be a {'whole ' if whole else ''}number {bounds}")


@dataclass(frozen=True)
class Hyperparameters:
    """What is done.

    Attributes:
        epochs: Passes over the images.
        batch_size: Images per step, over all processes.
        steps: Steps per epoch; the images that do not fill a batch wait for another epoch.
        warmup_steps: Over which the learning rate rises.
        optimizer: A name that timm knows.
        lr: Peak of the learning rate.
        weight_decay: Of weights.
    """

    epochs: int
    batch_size: int
    steps: int
    warmup_steps: int
    optimizer: str
    lr: float
    weight_decay: float


def choose_batch_size(settings: TrainSettings, images: int, side_pixels: int, processes: int) -> int:
    """Choose the number of images per step.

    Args:
        settings: What was asked for.
        images: How many there are.
        side_pixels: Longer side of an image.
        processes: That share a batch evenly.

    Raises:
        BadInput: It does not divide, or is more than there are images, or leaves a process a single image.
    """
    wanted = settings.batch_size
    if wanted is None:
        usual = 32 if images < 2_000 else 64 if images < 10_000 or side_pixels > SMALL_SIDE_PIXELS else 128
        wanted = min(usual, images) // processes * processes
        if settings.mixup or settings.cutmix:
            wanted = wanted // (2 * processes) * 2 * processes
    if wanted > images:
        raise BadInput(f"a batch of {wanted} is more than the {images} images; pass a smaller batch size")
    if wanted % processes:
        raise BadInput(f"a batch of {wanted} does not divide among {processes} processes; pass a multiple of them")
    share = wanted // processes
    if share < 2:
        raise BadInput(
            f"each of {processes} processes has {share} images per step, and BatchNorm needs two; "
            "use more images, a larger batch size, or fewer processes"
        )
    if share % 2 and (settings.mixup or settings.cutmix):
        raise BadInput(f"mixup needs an even number of images per process, not {share}; pass another batch size")
    return wanted


def choose(
    settings: TrainSettings, images: int, batch_size: int, side_pixels: int, *, has_batchnorm: bool
) -> Hyperparameters:
    """Choose what was left open, by the size of the data.

    Small data is passed over more often, so that about half a million images are seen; the learning rate of SGD is
    proportional to the batch size (Goyal et al. 2017, section 2.1), that of AdamW to its square root. SGD takes
    smaller steps in a short training: networks whose weights were re-solved lose more by large ones at first than
    a few hundred steps give back.

    Args:
        settings: What was asked for.
        images: How many there are.
        batch_size: See `choose_batch_size`.
        side_pixels: Longer side of an image.
        has_batchnorm: Whether the network has BatchNorm.
    """
    small = side_pixels <= SMALL_SIDE_PIXELS
    epochs = settings.epochs or min(max(round(_IMAGES_SEEN / images), _LEAST_EPOCHS), _MOST_EPOCHS)
    optimizer = settings.optimizer or ("sgd" if has_batchnorm else "adamw")
    scale = batch_size / _REFERENCE_BATCH
    is_sgd = optimizer in ("sgd", "momentum", "sgdp", "sgdw")
    steps = images // batch_size
    lr = _SGD_LR * scale if is_sgd else _ADAMW_LR * math.sqrt(scale) * (1 if small else 0.1)
    if is_sgd:
        lr *= min(1.0, math.sqrt(epochs * steps / _STEPS_TO_SETTLE))
    decay = (5e-4 if small else 5e-5) if is_sgd else 0.02
    return Hyperparameters(
        epochs=epochs,
        batch_size=batch_size,
        steps=steps,
        warmup_steps=min(steps, round(_WARMUP_SHARE * epochs * steps)),
        optimizer=optimizer,
        lr=lr if settings.lr is None else settings.lr,
        weight_decay=decay if settings.weight_decay is None else settings.weight_decay,
    )
