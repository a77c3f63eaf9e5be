"""Give a copy of a network values that hide nothing: network, seed → the copy.

A freshly initialised or a sparsely trained network is full of zeros and ones, among which a wrong index goes unseen.
"""

import copy

import torch
from torch import Tensor, nn


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


def _randomize_tensor(module: nn.Module, name: str, tensor: Tensor, generator: torch.Generator) -> None:
    def uniform() -> Tensor:
        return (torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5).to(tensor)

    def normal() -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    contracts = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear)) and name == "weight"
    one_axis = tensor.numel() == max(tensor.shape, default=1)
    if name == "running_var":
        tensor.mul_(uniform())
    elif name == "running_mean":
        variance = getattr(module, "running_var", None)
        scale = variance.detach().sqrt() if isinstance(variance, Tensor) else torch.ones_like(tensor)
        tensor.add_(0.3 * scale * normal())
    elif name in module._buffers:
        return
    elif one_axis and not contracts:
        if name.endswith("bias") or name == "beta":
            tensor.add_(0.3 * normal())
        else:
            tensor.copy_(uniform())
    elif not tensor.any():
        tensor.copy_(normal() / max(tensor[0].numel(), 1) ** 0.5)
