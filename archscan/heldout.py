"""Set calibration images apart: batches → images to fit to, images to check on; how far two networks are apart on them.

The decision that is not obvious: what is checked on is never augmented, so that augmentation itself is checked too.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from archscan.errors import BadInput

HOLDOUT_SHARE = 1 / 8
LEAST_SAMPLES = 16
MIRROR_AGREEMENT = 0.8
"""Share of images whose mirror images the original has to put into the same class, for mirror images to be used."""

MIRROR_SAMPLES = 16
"""Fewer images say too little about that."""

STANDARD_ERRORS = 2.0
"""By how many of them a mean has to grow for chance not to explain it."""

_CHUNKS = 16


def gathered(batches: Iterable[Any]) -> Tensor:
    """Join batches of images, or of tuples that start with them.

    Raises:
        BadInput: They are of several sizes, or fewer than `LEAST_SAMPLES`.
    """
    parts = [batch[0] if isinstance(batch, (tuple, list)) and batch else batch for batch in batches]
    if not all(isinstance(part, Tensor) and part.shape[1:] == parts[0].shape[1:] for part in parts):
        raise BadInput("repair needs batches of images of one size; pass tensors, or (images, labels) pairs")
    images = sum(len(part) for part in parts)
    if images < LEAST_SAMPLES:
        raise BadInput(
            f"repair needs at least {LEAST_SAMPLES} calibration images, to fit to and to check on, not {images}; "
            "pass more, or choose BatchNorm recalibration"
        )
    return torch.cat(parts)


def minds_no_mirror(model: nn.Module, batches: Sequence[Tensor]) -> bool:
    """Say whether a network of class scores puts mirror images into the classes of the images."""
    same = total = 0
    with torch.no_grad():
        for images in batches:
            scores, mirrored = model(images), model(images.flip(-1)) if images.ndim == 4 else None
            if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[1] < 2 or mirrored is None:
                return False
            same += int((scores.argmax(1) == mirrored.argmax(1)).sum())
            total += len(images)
    return total >= MIRROR_SAMPLES and same >= MIRROR_AGREEMENT * total


def split(images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Set the last images apart; both parts in chunks of equal size, each of which runs as one batch."""
    held = max(1, round(len(images) * HOLDOUT_SHARE))
    size = max(2, -(-len(images) // _CHUNKS))
    return list(images[:-held].split(size)), list(images[-held:].split(size))


def count(batches: Sequence[Tensor]) -> int:
    """Count images."""
    return sum(len(batch) for batch in batches)


def distances(original: nn.Module, model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """Measure how far a network's outputs are from the original's; both have to be in eval mode.

    The Kullback-Leibler divergence of the class probabilities where the output is [samples, classes]; otherwise the
    squared error of all outputs, relative to their mean squares.

    Returns:
        The distance for each image; float64, shape [images].
    """
    found: list[Tensor] = []
    squares: list[Tensor] = []
    with torch.no_grad():
        for images in batches:
            right, own = (
                [leaf for leaf in tree_flatten(net(images))[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
                for net in (original, model)
            )
            if len(right) == 1 and right[0].ndim == 2 and right[0].shape[1] > 1:
                log_q, log_p = (output[0].double().log_softmax(1) for output in (own, right))
                found.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1))
            else:
                errors = [_by_image(a.double() - b.double(), len(images)) for a, b in zip(right, own, strict=True)]
                found.append(sum(errors, torch.zeros(len(images), dtype=torch.float64, device=images.device)))
                squares += [_by_image(a.double(), len(images)) for a in right]
    by_image, weight = torch.cat(found), sum(float(values.sum()) for values in squares)
    return by_image * len(by_image) / weight if weight else by_image


def _by_image(values: Tensor, images: int) -> Tensor:
    """Sum squares over all but the axis of images; where there is none, all images have their share."""
    if values.ndim and len(values) == images:
        return values.square().reshape(images, -1).sum(1)
    return (values.square().sum() / images).expand(images)


def shown_to_hurt(before: Tensor, after: Tensor) -> bool:
    """Say whether distances have grown by more than chance explains, in the mean, or are no numbers any more."""
    growth = after - before
    error = growth.std() / len(growth) ** 0.5 if len(growth) > 1 else torch.zeros(())
    return not bool(growth.mean() <= STANDARD_ERRORS * error)
