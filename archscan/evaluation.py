"""Top-1 accuracy: a classifier and labelled batches → `TopOne`."""

from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from archscan.capture import train_mode
from archscan.errors import BadInput
from archscan.losses import logits_of


@dataclass(frozen=True)
class TopOne:
    """How many samples a classifier got right."""

    correct: int
    samples: int

    @property
    def accuracy(self) -> float:
        """Fraction of the samples, in [0, 1]."""
        return self.correct / self.samples


def require_classes(classes: Sequence[str], num_classes: int, source: str, why: str) -> None:
    """See that images have as many classes as a network has outputs, so that their labels can be its classes.

    Args:
        classes: Of the images.
        num_classes: Of the network.
        source: Where the images are from, as typed.
        why: What is impossible otherwise, and the remedy, as clauses.

    Raises:
        BadInput: They have not.
    """
    if len(classes) != num_classes:
        raise BadInput(f"{source} has {len(classes)} classes and the model {num_classes}, so that {why}")


def top_one(model: nn.Module, batches: Iterable[Any], progress: Callable[[int, int], None] | None = None) -> TopOne:
    """Measure top-1 accuracy in eval mode; the model is left unchanged.

    Args:
        model: A classifier, on any device.
        batches: Pairs of images and class numbers.
        progress: Called with batches done and in all.

    Raises:
        BadInput: There is no batch, or a label is not among the classifier's classes.
    """
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    correct = samples = 0
    with train_mode(model, False), torch.inference_mode():
        for done, (images, labels) in enumerate(batches, start=1):
            logits = logits_of(model(images.to(device)))
            if int(labels.max()) >= logits.shape[1]:
                raise BadInput(
                    f"label {int(labels.max())} is not among the model's {logits.shape[1]} classes; "
                    "evaluate on images of the classes that it was trained for"
                )
            correct += int((logits.argmax(1).cpu() == labels).sum())
            samples += len(labels)
            if progress is not None:
                progress(done, len(batches) if isinstance(batches, Sized) else 0)
    if samples == 0:
        raise BadInput("there is no image to measure accuracy on; pass at least one batch")
    return TopOne(correct, samples)
