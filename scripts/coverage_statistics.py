"""A second proof, for networks in which statistics are taken over channels (LayerNorm, GroupNorm, channel means).

Such a network changes when channels go, so that the slim one is not the masked original. But with the *statistics* of
the masked original in the places of its own, the slim network must be the masked original again: every mean and
variance is recorded in the one and played back in the other.

The decision that is not obvious: a statistic that itself has a channel axis that was cut (of a standardised weight, one
for each output channel) cannot be played back; it is replaced by a constant, 0 or 1, in both networks.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from archscan.groups import Coupling
from archscan.rebuild import apply
from archscan.surgery import Kept, Surgery
from archscan.verify import masked_original, output_tensors, randomize

_NORMS = {"LayerNorm": "native_layer_norm", "GroupNorm": "native_group_norm"}
_SPREADS = {"var", "std", "linalg_vector_norm", "rsqrt", "prod"}
"""Reductions that are divided by: their constant is 1."""


def mixing_places(mixing: Iterable[str]) -> set[tuple[str, str]]:
    """Read what `Coupling.mixing` says as (ATen op, module path) pairs."""
    places = set()
    for text in mixing:
        found = re.fullmatch(r"(?:statistics over channels in )?(\w+)(?: over channels)? at (.*)", text)
        if found is None:
            raise ValueError(f"what {text!r} means is not known here")
        path = "" if found[2] == "the model's own forward" else found[2]
        places.add((_NORMS.get(found[1], found[1]), path))
    return places


@contextmanager
def _paths(model: nn.Module) -> Iterator[list[str]]:
    """Yield a stack whose top is the path of the module whose forward is running."""
    stack = [""]
    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_args, path=path: stack.append(path)))
        handles.append(module.register_forward_hook(lambda *_args: (stack.pop(), None)[1], always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _affine(data: Tensor, scale: Tensor | None, shift: Tensor | None, axis: int | None) -> Tensor:
    """Apply scale and shift along an axis, or along the last ones."""
    shape = [-1 if i == axis else 1 for i in range(data.ndim)]
    for tensor, combine in ((scale, torch.mul), (shift, torch.add)):
        if tensor is not None:
            data = combine(data, tensor if axis is None else tensor.view(shape))
    return data


def _normalised(name: str, args: Sequence[Any], mean: Tensor, rstd: Tensor) -> Tensor:
    """Normalise by statistics that are given."""
    data = args[0]
    if name == "native_layer_norm":
        return _affine((data - mean) * rstd, args[2], args[3], None)
    if name == "native_group_norm":
        grouped = data.reshape(*mean.shape, -1)
        return _affine(((grouped - mean[..., None]) * rstd[..., None]).reshape(data.shape), args[1], args[2], 1)
    shape = (1, -1, *(1,) * (data.ndim - 2))
    return _affine((data - mean.view(shape)) * rstd.view(shape), args[1], args[2], 1)


Statistics = list[tuple[Tensor, ...] | None]
"""What each mixing op found, in the order of execution; None where constants stand for it."""


class _Mixing(TorchDispatchMode):
    """Hand the outputs of every mixing op to `treat`, which returns the statistics to use."""

    def __init__(
        self,
        places: set[tuple[str, str]],
        paths: list[str],
        treat: Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...]],
    ) -> None:
        super().__init__()
        self.places, self.paths, self.treat, self.count = places, paths, treat, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).split(".")[1]
        if (name, self.paths[-1]) not in self.places:
            return result
        number, self.count = self.count, self.count + 1
        if "norm" in name and name.startswith("native"):
            mean, rstd = self.treat(number, (result[1], result[2]))
            return (_normalised(name, args, mean, rstd), *result[1:])
        if not isinstance(result, (tuple, list)):
            return self.treat(number, (result,))[0]
        return self.treat(number, tuple(result))


def _constants(values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Zeros for what is subtracted or added, and for the last of several (a variance, a scale) ones."""
    if len(values) == 1:
        return (torch.zeros_like(values[0]),)
    return (*(torch.zeros_like(value) for value in values[:-1]), torch.ones_like(values[-1]))


def _run(
    model: nn.Module,
    example: Tensor,
    places: set[tuple[str, str]],
    treat: Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...]],
) -> list[Tensor]:
    with torch.no_grad(), _paths(model) as paths, _Mixing(places, paths, treat):
        return output_tensors(model(example))


def error_with_same_statistics(
    model: nn.Module, surgery: Surgery, coupling: Coupling, kept: Kept, example: Tensor
) -> tuple[float, int, int]:
    """Compare the slim network, given the masked original's statistics, with the masked original, in float64.

    Args:
        model: The original; a randomised copy of it is compared.
        surgery: What makes the slim network.
        coupling: What coupling said about the original.
        kept: Kept steps of every channel group, per fibre.
        example: An input of the network.

    Returns:
        Largest difference relative to the largest output, how many statistics were played back, and how many were
        replaced by constants.
    """
    places = mixing_places(coupling.mixing)
    random = randomize(model, 0).double().eval()
    slim, reference = apply(random, surgery).eval(), masked_original(random, coupling, kept).eval()
    example = example.double()
    shapes: list[list[torch.Size]] = []
    recorded: Statistics = []

    def look(_number: int, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shapes.append([value.shape for value in values])
        return values

    def record(number: int, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        same = [value.shape for value in values] == shapes[number]
        recorded.append(tuple(value.clone() for value in values) if same else None)
        return values if same else _constants(values)

    def play_back(number: int, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return recorded[number] or _constants(values)

    _run(slim, example, places, look)
    expected = _run(reference, example, places, record)
    found = _run(slim, example, places, play_back)
    if len(recorded) != len(shapes):
        raise ValueError(f"{len(recorded)} statistics in the original, {len(shapes)} in the slim network")
    scale = max(float(tensor.abs().max()) for tensor in expected)
    error = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
    constants = sum(values is None for values in recorded)
    return error / scale, len(recorded) - constants, constants
