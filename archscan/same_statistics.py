"""Run networks with the same statistics: masked original, slim network, coupling → outputs that must be equal.

Where statistics are taken over channels (LayerNorm, GroupNorm, channel means), they change when channels go, so that
the slim network is not the masked original. With the *statistics* of the masked original in the places of its own, it
must be the masked original again: every mean and variance is recorded in the one and played back in the other.

The decision that is not obvious: the statistics of a weight (a standardised convolution) cannot be played back: its
mean would be subtracted from the masked slices, which then are not zero any more. They are replaced by constants, 0 or
1, in both networks, as is every statistic that itself has an axis that was cut. So that this cannot hide everything,
the unmasked original is run likewise: what it differs by is what the removed channels would have changed.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from archscan.coupling.statistics import axis_argument
from archscan.graph import Node, leaves_of
from archscan.groups import Coupling

Place = tuple[str, str]
"""Name of an ATen op that takes a statistic, and path of the module in whose forward it is."""

Kind = Literal["played back", "constant", "left alone"]
"""What is done about what an op at such a place finds; it is left alone where it mixes no channels."""

Run = Callable[[nn.Module], list[Tensor]]
"""Runs a network on the inputs of the comparison and lists its outputs."""

_NORMS = {"LayerNorm": "native_layer_norm", "GroupNorm": "native_group_norm"}
_SPREADS = frozenset({"var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm", "prod"})
"""Reductions whose (first) result is divided by: its constant is 1."""


@dataclass(frozen=True, eq=False)
class Played:
    """What came of the runs.

    Attributes:
        expected: Outputs of the masked original.
        found: Outputs of the slim network, with the masked original's statistics.
        unmasked: Outputs of the original with them, where it was given.
        played_back: Statistics that were played back.
        constants: Statistics that were replaced by constants.
    """

    expected: list[Tensor]
    found: list[Tensor]
    unmasked: list[Tensor]
    played_back: int
    constants: int


def statistic_places(mixing: Iterable[str]) -> set[Place]:
    """Read `Coupling.mixing` as places; those that say something else are left out."""
    places = set()
    for text in mixing:
        found = re.fullmatch(r"(?:statistics over channels in )?(\w+)(?: over channels)? at (.*)", text)
        if found is not None:
            path = "" if found[2] == "the model's own forward" else found[2]
            places.add((_NORMS.get(found[1], found[1]), path))
    return places


def run_with_same_statistics(
    masked: nn.Module, slim: nn.Module, coupling: Coupling, run: Run, original: nn.Module | None = None
) -> Played | None:
    """Run the masked original, and the slim network with its statistics; both have to be in eval mode.

    Args:
        masked: The original with the removed units' consumer slices set to zero.
        slim: The slim network.
        coupling: What coupling said about the original.
        run: Runs one of them.
        original: The original, to see what the mask changes; None to leave that out.

    Returns:
        What came of it; None where a statistic cannot be caught, or is one that no constant can stand for.
    """
    places = statistic_places(coupling.mixing)
    if coupling.graph is None or len(places) < len(set(coupling.mixing)):
        return None
    kinds = [
        _kind(coupling, node) for node in coupling.graph.nodes if _is_at(places, _name(node.op), node.module, node.args)
    ]
    tape = _Tape(places, kinds)
    expected = tape.record(masked, run)
    found = tape.play(slim, run)
    if tape.differing:  # constants have to stand for these in the recording too
        tape = _Tape(places, ["constant" if i in tape.differing else kind for i, kind in enumerate(kinds)])
        expected, found = tape.record(masked, run), tape.play(slim, run)
    if not tape.complete or not all(bool(tensor.isfinite().all()) for tensor in expected):
        return None
    unmasked = [] if original is None else tape.play(original, run)
    counts = Counter(tape.kinds)
    return Played(expected, found, unmasked, counts["played back"], counts["constant"])


def _kind(coupling: Coupling, node: Node) -> Kind:
    """Say what is to be done about what an op at one of the places finds."""
    assert coupling.graph is not None
    assert coupling.sizes is not None
    if not any(number is not None and coupling.graph.values[number].per_sample for number in node.outputs):
        return "constant"
    name, data = _name(node.op), node.args[0]
    if name.startswith("native") or name == "convolution":
        return "played back"
    position = axis_argument(name)
    axes = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    sizes = coupling.sizes(data.value)
    over = range(len(sizes)) if axes is None or axes == [] else [axes] if isinstance(axes, int) else axes
    return "played back" if any(sizes[axis].per_step for axis in over) else "left alone"


def _name(op: Any) -> str:
    return str(op).split(".")[1]


def _is_at(places: set[Place], name: str, path: str, args: Sequence[Any]) -> bool:
    """Say whether an op is at one of the places; a BatchNorm with running statistics takes none."""
    return (name, path) in places and (name != "native_batch_norm" or bool(args[5]))


@dataclass(eq=False)
class _Tape:
    """Statistics in the order of execution, None where constants stand for them.

    Attributes:
        places: Where statistics are taken.
        kinds: What is to be done about each op at these places.
        statistics: What was recorded.
        differing: Running numbers of statistics of another shape in the slim network.
        seen: The places that the recording came by.
        complete: Whether every place was seen, and both networks had as many such ops as the recorded run.
    """

    places: set[Place]
    kinds: Sequence[Kind]
    statistics: list[tuple[Tensor, ...] | None] = field(default_factory=list)
    differing: frozenset[int] = frozenset()
    seen: set[Place] = field(default_factory=set)
    complete: bool = False

    def record(self, model: nn.Module, run: Run) -> list[Tensor]:
        """Run a model and keep its statistics."""

        def keep(number: int, place: Place, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            self.seen.add(place)
            kind = self._kind(number)
            self.statistics.append(tuple(value.clone() for value in values) if kind == "played back" else None)
            return _constants(place[0], values) if kind == "constant" else values

        with torch.no_grad(), _paths(model) as paths, _Mixing(self.places, paths, keep):
            return run(model)

    def play(self, model: nn.Module, run: Run) -> list[Tensor]:
        """Run a model with the statistics that were kept."""
        different: list[int] = []

        def replace(number: int, place: Place, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            kept = self.statistics[number] if number < len(self.statistics) else None
            if self._kind(number) == "left alone":
                return values
            if kept is not None and [value.shape for value in kept] == [value.shape for value in values]:
                return kept
            if kept is not None:
                different.append(number)
            return _constants(place[0], values)

        with torch.no_grad(), _paths(model) as paths, _Mixing(self.places, paths, replace) as mixing:
            outputs = run(model)
        self.differing = frozenset(different)
        self.complete = self.seen == self.places and mixing.count == len(self.statistics) == len(self.kinds)
        return outputs

    def _kind(self, number: int) -> Kind:
        return self.kinds[number] if number < len(self.kinds) else "left alone"


def _constants(name: str, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Give a mean of 0 and a spread of 1, in the order in which an op returns them."""
    spread = 0 if name in _SPREADS else 1 if name.startswith("native") else None
    return tuple(
        torch.ones_like(value) if place == spread else torch.zeros_like(value) for place, value in enumerate(values)
    )


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


_Treat = Callable[[int, Place, tuple[Tensor, ...]], tuple[Tensor, ...]]
"""Running number of a statistic, its place, what was found → what to use."""


class _Mixing(TorchDispatchMode):
    """Hand the outputs of every op that takes a statistic to `treat`, which returns what to use instead."""

    def __init__(self, places: set[Place], paths: list[str], treat: _Treat) -> None:
        super().__init__()
        self.places, self.paths, self.treat, self.count = places, paths, treat, 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = _name(func)
        place = (name, self.paths[-1])
        if not _is_at(self.places, *place, args):
            return result
        number, self.count = self.count, self.count + 1
        if name.startswith("native"):
            mean, rstd = self.treat(number, place, (result[1], result[2]))
            return (_normalised(name, args, mean, rstd), *result[1:])
        used = self.treat(number, place, tuple(leaves_of(result)))
        return used if isinstance(result, (tuple, list)) else used[0]


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
