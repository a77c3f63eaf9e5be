"""Give a copy of a network values that hide nothing: network, seed → the copy.

A freshly initialised or a sparsely trained network is full of zeros and ones, among which a wrong index goes unseen.

The decision that is not obvious: running statistics that know nothing of the activations let them grow from layer to
layer, and a deep network that feeds them to sigmoids then magnifies the last digits by ten powers of ten (RepVGG-D2SE),
so that rounding looks like an error. `near_activations` keeps the statistics random and the activations in bounds; of
two networks that are to be compared, those of the masked original, which has no room for what was removed.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Copy a model and give it normalisation statistics, affine parameters, layer scales and biases that hide nothing.

    Scales are drawn from [0.5, 1.5], running variances multiplied by as much, running means and biases moved by a
    normal deviate; weights that are all zero (zero-initialised last layers) are drawn from a normal distribution.

    Args:
        model: The original, left unchanged.
        seed: Seed of the draws; the global generators are not touched.
    """
    result = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for module in result.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if id(tensor) in done or not tensor.is_floating_point():
                continue
            done.add(id(tensor))
            _randomize_tensor(module, name, tensor.detach(), generator)
    return result


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw from [0.5, 1.5]."""
    return (torch.rand(like.shape, generator=generator, dtype=torch.float64) + 0.5).to(like)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _randomize_tensor(module: nn.Module, name: str, tensor: Tensor, generator: torch.Generator) -> None:
    contracts = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear)) and name == "weight"
    one_axis = tensor.numel() == max(tensor.shape, default=1)
    if name == "running_var":
        tensor.mul_(_uniform(tensor, generator))
    elif name == "running_mean":
        variance = getattr(module, "running_var", None)
        scale = variance.detach().sqrt() if isinstance(variance, Tensor) else torch.ones_like(tensor)
        tensor.add_(0.3 * scale * _normal(tensor, generator))
    elif name in module._buffers:
        return
    elif one_axis and not contracts:
        if name.endswith("bias") or name == "beta":
            tensor.add_(0.3 * _normal(tensor, generator))
        else:
            tensor.copy_(_uniform(tensor, generator))
    elif not tensor.any():
        tensor.copy_(_normal(tensor, generator) / max(tensor[0].numel(), 1) ** 0.5)


def near_activations(
    model: nn.Module, run: Callable[[nn.Module], object], seed: int, twin: nn.Module | None = None
) -> None:
    """Draw the running statistics of every BatchNorm around those of what it reads, in place.

    Means are moved by 0.3 normal deviates. Variances are mean squares, at least the layer's, times a draw from [0.5,
    1.5]: what is still in the original, on small maps or behind a ReLU, need not be in one with masked channels. Layers
    that read one value per channel keep what they have.

    Args:
        model: A network in eval mode, or one that `run` takes there.
        run: Runs it once.
        seed: Seed of the draws; the global generators are not touched.
        twin: Another network of the same modules, which is given the same statistics.
    """
    generator, done = torch.Generator().manual_seed(seed), set[int]()

    def enter(module: Any, args: tuple[Any, ...]) -> None:
        if id(module) in done or module.training or module.running_mean is None or module.running_var is None:
            return
        done.add(id(module))
        values = args[0].detach().double().transpose(0, 1).flatten(1)
        if values.shape[1] < 2:
            return
        mean, square = values.mean(1), values.square().mean(1)
        square = square.clamp(min=float(square.mean()) + module.eps)
        module.running_var.copy_(square * _uniform(square, generator))
        module.running_mean.copy_(mean + 0.3 * square.sqrt() * _normal(mean, generator))

    handles = [module.register_forward_pre_hook(enter) for module in model.modules() if isinstance(module, _BatchNorm)]
    try:
        with torch.no_grad():
            run(model)
    finally:
        for handle in handles:
            handle.remove()
        if twin is not None:
            _copy_statistics(model, twin)


def _copy_statistics(model: nn.Module, twin: nn.Module) -> None:
    for own, other in zip(model.modules(), twin.modules(), strict=True):
        for name, tensor in own.named_buffers(recurse=False) if isinstance(own, _BatchNorm) else ():
            other.get_buffer(name).copy_(tensor)
