"""The slow, obvious reference of a slimming: the original with the removed units' consumer slices set to zero."""

import copy
import random

import torch
from torch import Tensor, nn

from archscan.groups import Coupling
from archscan.surgery import Kept


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Copy to float64 with every parameter and running statistic drawn anew, so that no small gamma hides an error."""
    model = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            fan_in = max(1, tensor[0].numel()) if tensor.ndim > 1 else 1
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / fan_in**0.5)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(
                    torch.rand(buffer.shape, generator=generator) + (0.5 if "var" in name or "scale" in name else 0.0)
                )
    return model.eval()


def random_kept(coupling: Coupling, seed: int) -> Kept:
    """Keep a random number of steps of every live group, chosen anew in each fibre."""
    rng = random.Random(seed)
    kept: dict[str, tuple[tuple[int, ...], ...]] = {}
    for group in coupling.groups:
        count = group.steps if group.frozen else rng.randint(1, group.steps)
        kept[group.name] = tuple(tuple(sorted(rng.sample(range(group.steps), count))) for _ in group.units)
    return kept


def removed_units(coupling: Coupling, kept: Kept) -> set[int]:
    """Units that a plan removes."""
    removed: set[int] = set()
    for group in coupling.groups:
        for fibre, steps in zip(group.units, kept[group.name], strict=True):
            removed |= set(fibre) - {fibre[step] for step in steps}
    return removed


def masked(model: nn.Module, coupling: Coupling, kept: Kept) -> nn.Module:
    """Copy with zeros, element by element, wherever a weight reads a removed unit."""
    removed = removed_units(coupling, kept)
    model = copy.deepcopy(model)
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, axes in coupling.tensors.items():
            own = {axis.axis: axis.units for axis in axes}
            for axis in axes:
                if axis.role != "in":
                    continue
                moved = tensors[name].movedim(axis.axis, 1 if axis.axis else 0)
                if axis.units.ndim == 1:
                    for index, unit in enumerate(axis.units.tolist()):
                        if unit in removed:
                            (moved[:, index] if axis.axis else moved[index]).zero_()
                    continue
                for row, units in enumerate(axis.units.tolist()):
                    for column, unit in enumerate(units):
                        if unit in removed and own[0][row] != unit:
                            tensors[name][row, column] = 0
    return model
