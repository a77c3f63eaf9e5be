"""A second proof, for networks in which statistics are taken over channels (LayerNorm, GroupNorm, channel means).

Such a network changes when channels go, so that the slim one is not the masked original. But with the *statistics* of
the masked original in the places of its own, the slim network must be the masked original again: every mean and
variance is recorded in the one and played back in the other.

The decision that is not obvious: the statistics of a weight (a standardised convolution) cannot be played back: its
mean would be subtracted from the masked slices, which then are not zero any more. They are replaced by constants, 0 or
1, in both networks, as is every statistic that itself has an axis that was cut. So that this cannot hide everything,
the proof also says how much the removed channels would have changed.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from archscan.groups import Coupling
from archscan.rebuild import apply
from archscan.surgery import Kept, Surgery
from archscan.verify import masked_original, output_tensors, randomize

_NORMS = {"LayerNorm": "native_layer_norm", "GroupNorm": "native_group_norm"}
_SPREADS = {"var", "std", "var_mean", "std_mean", "linalg_vector_norm", "prod"}
"""Reductions whose (first) result is divided by: its constant is 1."""


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


Treat = Callable[[int, tuple[str, str], tuple[Tensor, ...]], tuple[Tensor, ...]]
"""Running number of a mixing op, its place, what it found → the statistics to use."""

Statistics = list[tuple[Tensor, ...] | None]
"""What each mixing op found, in the order of execution; None where constants stand for it."""


class _Mixing(TorchDispatchMode):
    """Hand the outputs of every mixing op to `treat`, which returns the statistics to use."""

    def __init__(
        self,
        places: set[tuple[str, str]],
        paths: list[str],
        treat: "Treat",
    ) -> None:
        super().__init__()
        self.places, self.paths, self.treat, self.count = places, paths, treat, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).split(".")[1]
        place = (name, self.paths[-1])
        if place not in self.places or (name == "native_batch_norm" and not args[5]):
            return result
        number, self.count = self.count, self.count + 1
        if "norm" in name and name.startswith("native"):
            mean, rstd = self.treat(number, place, (result[1], result[2]))
            return (_normalised(name, args, mean, rstd), *result[1:])
        if not isinstance(result, (tuple, list)):
            return self.treat(number, place, (result,))[0]
        return self.treat(number, place, tuple(result))


def _constants(name: str, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Give a mean of 0 and a spread of 1, in the order in which an op returns them."""
    spread = 0 if name in _SPREADS else 1 if name.startswith("native") else None
    return tuple(
        torch.ones_like(value) if place == spread else torch.zeros_like(value) for place, value in enumerate(values)
    )


def _of_weights(coupling: Coupling, places: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Say which places take statistics of weights, not of activations."""
    assert coupling.graph is not None
    of_samples = set()
    for node in coupling.graph.nodes:
        if any(number is not None and coupling.graph.values[number].per_sample for number in node.outputs):
            of_samples.add((str(node.op).split(".")[1], node.module))
    return places - of_samples


def _run(
    model: nn.Module,
    example: Tensor,
    places: set[tuple[str, str]],
    treat: "Treat",
) -> list[Tensor]:
    with torch.no_grad(), _paths(model) as paths, _Mixing(places, paths, treat):
        return output_tensors(model(example))


@dataclass(frozen=True)
class SameStatistics:
    """How far the slim network is from the masked original, given its statistics.

    Attributes:
        error: Largest difference, relative to the largest output.
        effect: The same between the masked and the unmasked original: where it is tiny, the proof proves nothing.
        played_back: Statistics that were played back.
        constants: Statistics that were replaced by constants.
    """

    error: float
    effect: float
    played_back: int
    constants: int


def _difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest output; not a number where an output is not finite."""
    scale = torch.stack([tensor.abs().max() for tensor in expected]).max()
    return float(torch.stack([(a - b).abs().max() for a, b in zip(expected, found, strict=True)]).max() / scale)


def compare_with_same_statistics(
    model: nn.Module, surgery: Surgery, coupling: Coupling, kept: Kept, example: Tensor
) -> SameStatistics:
    """Compare the slim network, given the masked original's statistics, with the masked original, in float64.

    Args:
        model: The original; a randomised copy of it is compared.
        surgery: What makes the slim network.
        coupling: What coupling said about the original.
        kept: Kept steps of every channel group, per fibre.
        example: An input of the network.
    """
    places = mixing_places(coupling.mixing)
    of_weights = _of_weights(coupling, places)
    random = randomize(model, 0).double().eval()
    slim, reference = apply(random, surgery).eval(), masked_original(random, coupling, kept).eval()
    example = example.double()
    shapes: list[list[torch.Size]] = []
    recorded: Statistics = []

    def look(_number: int, _place: tuple[str, str], values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shapes.append([value.shape for value in values])
        return values

    def record(number: int, place: tuple[str, str], values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        same = place not in of_weights and [value.shape for value in values] == shapes[number]
        recorded.append(tuple(value.clone() for value in values) if same else None)
        return values if same else _constants(place[0], values)

    def play_back(number: int, place: tuple[str, str], values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return recorded[number] or _constants(place[0], values)

    _run(slim, example, places, look)
    expected = _run(reference, example, places, record)
    found = _run(slim, example, places, play_back)
    if len(recorded) != len(shapes):
        raise ValueError(f"{len(recorded)} statistics in the original, {len(shapes)} in the slim network")
    constants = sum(values is None for values in recorded)
    effect = _difference(expected, _run(random, example, places, play_back))
    return SameStatistics(_difference(expected, found), effect, len(recorded) - constants, constants)
