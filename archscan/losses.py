"""Losses of calibration batches: model, batch → scalar, the mean over samples.

A loss calls the model itself, so that any model and any batch fit. Classification is what is here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from archscan.errors import BadInput

Batch = Any
LossFn = Callable[[nn.Module, Batch], Tensor]
"""Loss of a batch: a scalar, the mean over its samples, each of which depends on that sample alone."""


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the mean cross-entropy of an ``(images, labels)`` batch.

    Labels are class numbers or class probabilities; the model returns logits, or something that `logits_of` can read.

    Raises:
        BadInput: The batch is no such pair, or a label is not among the model's classes.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise BadInput("a calibration batch is not an (images, labels) pair; pass loss_fn for any other kind of batch")
    images, labels = batch
    logits = logits_of(model(images))
    if logits.ndim < 2:
        raise BadInput(
            f"the model's output has shape {tuple(logits.shape)}, without an axis of classes; pass a loss_fn"
        )
    if not labels.is_floating_point():
        outside = labels[(labels < 0) | (labels >= logits.shape[1])]
        if outside.numel():
            raise BadInput(
                f"label {int(outside.flatten()[0])} is not among the model's {logits.shape[1]} classes; use data of the"
                " classes that the model knows, or sampled_label_loss"
            )
    return cross_entropy(logits, labels)


@dataclass(frozen=True, eq=False)
class SampledLabelLoss:
    """See `sampled_label_loss`."""

    seed: int
    _draw: torch.Generator = field(default_factory=torch.Generator)

    def seek(self, sample: int) -> None:
        """Go to the numbers that are drawn for a sample and those after it, wherever the draws are."""
        self._draw.manual_seed(self.seed)
        torch.rand(sample, 1, dtype=torch.float64, generator=self._draw)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute the mean cross-entropy with drawn labels."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        return drawn_label_loss(logits_of(model(images)), self._draw)


def sampled_label_loss(seed: int) -> SampledLabelLoss:
    """Make a loss that ignores a batch's labels and draws them from the model's own predictions.

    Gate gradients of it are those of the true Fisher (Martens 2020, section 5), for data of classes that the model does
    not have. A batch is a tensor of images, or a tuple or list that starts with one.
    """
    loss = SampledLabelLoss(seed)
    loss.seek(0)
    return loss


def logits_of(output: Any) -> Tensor:
    """Read logits from a model's output: a tensor, its ``logits``, or the first item of a tuple or list.

    Raises:
        BadInput: There is no such tensor.
    """
    found = output
    if not isinstance(found, Tensor):
        found = (
            output["logits"]
            if isinstance(output, Mapping) and "logits" in output
            else getattr(output, "logits", output)
        )
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise BadInput(f"the model returned a {type(output).__name__} without logits; pass a loss_fn that reads it")
    return found


def drawn_label_loss(logits: Tensor, draw: torch.Generator) -> Tensor:
    """Cross-entropy with one label per sample from softmax(logits), by inverting its distribution function.

    One uniform number per sample makes the draws independent of how samples are split into batches.
    """
    if logits.ndim != 2:
        raise BadInput(
            f"the model's output has shape {tuple(logits.shape)}, not [samples, classes], so that no labels can be"
            " drawn from it; choose a criterion without drawn labels, such as obd"
        )
    below = logits.detach().double().softmax(1).cumsum(1).cpu()
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, generator=draw)
    labels = torch.searchsorted(below, uniform * below[:, -1:], right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
    return cross_entropy(logits, labels.to(logits.device))
