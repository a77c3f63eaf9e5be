"""Repair a slim network without labels: model, calibration batches → a new model.

BatchNorm's running statistics describe the activations of the network before it was slimmed; estimating them again on
calibration images costs some forward passes and gives back much of the accuracy that slimming took (Li et al. 2020,
"EagleEye", section 3.3, use this to rank pruned networks).

The decision that is not obvious: every call of a BatchNorm layer weighs as much as it has values per channel, so a last
small batch, or a layer that is called several times per pass, gives the mean over all values and not over calls.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from archscan.errors import BadInput

Progress = Callable[[int, int], None]
"""Called with (batches done, batches in all; 0 where the iterable has no length)."""


@dataclass(frozen=True, eq=False)
class Recalibrated:
    """A network with new running statistics.

    Attributes:
        model: The new network; the one that was given, where it has no running statistics.
        layers: How many BatchNorm layers were estimated anew; 0 where there was nothing to do.
        samples: How many images they saw.
    """

    model: nn.Module
    layers: int
    samples: int

    def clause(self) -> str:
        """Say what was done."""
        layers = f"{self.layers} layer{'' if self.layers == 1 else 's'}"
        return f"BatchNorm statistics of {layers} recalibrated on {self.samples} images"


@contextmanager
def _estimating(layers: list[_BatchNorm]) -> Iterator[None]:
    """Let layers average their statistics over all values that they see, and put back everything but the statistics."""
    values_seen = dict.fromkeys(layers, 0)
    before = [(layer, layer.momentum, layer.num_batches_tracked) for layer in layers]

    def weigh(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if not isinstance(layer, _BatchNorm):
            return
        values = args[0].numel() // args[0].shape[1]
        values_seen[layer] += values
        layer.momentum = values / values_seen[layer]  # the first call has weight 1 and forgets the old statistics

    handles = [layer.register_forward_pre_hook(weigh) for layer in layers]
    try:
        for layer in layers:
            layer.num_batches_tracked = None if layer.num_batches_tracked is None else layer.num_batches_tracked.clone()
            layer.train()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, momentum, tracked in before:
            layer.momentum, layer.num_batches_tracked = momentum, tracked


def _images(batch: Any) -> Tensor:
    """Take the images of a batch, which may be a tensor or start with one."""
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        raise BadInput(
            f"a calibration batch is {type(batch).__name__}; give tensors of images, or (images, labels) pairs"
        )
    return images


def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Any], progress: Progress | None = None) -> Recalibrated:
    """Estimate the running statistics of every BatchNorm layer anew; nothing else changes, and the original not at all.

    mean ← Σ_c n_c mean_c / Σ_c n_c over the calls c, with n_c values per channel; the same for the variance in calls.
    Only the BatchNorm layers run in train mode: dropout and the like stay off.

    Args:
        model: The network.
        batches: Tensors of images, or tuples that start with one. A batch of a single image is left out, since it may
            have no variance.
        progress: Called after every batch.

    Raises:
        BadInput: There is no batch of two or more images, or the statistics come out infinite or NaN.
    """
    result = copy.deepcopy(model)
    modes = {module: module.training for module in result.modules()}
    layers = [module for module in modes if isinstance(module, _BatchNorm) and module.track_running_stats]
    layers = [layer for layer in layers if layer.running_mean is not None]
    if not layers:
        return Recalibrated(model, 0, 0)
    result.eval()
    device = next(tensor.device for tensor in layers[0].buffers())
    samples = 0
    with torch.no_grad(), _estimating(layers):
        for done, batch in enumerate(batches, start=1):
            images = _images(batch)
            if len(images) > 1:
                result(images.to(device))
                samples += len(images)
            if progress is not None:
                progress(done, len(batches) if isinstance(batches, Sized) else 0)
    for module, training in modes.items():
        module.training = training
    if samples == 0:
        raise BadInput("BatchNorm recalibration needs at least one batch of two or more images; raise the batch size")
    for name, buffer in result.named_buffers():
        if buffer.is_floating_point() and not bool(buffer.isfinite().all()):
            raise BadInput(f"{name} is not finite after recalibration; look for NaN in the images or in the weights")
    return Recalibrated(result, len(layers), samples)
