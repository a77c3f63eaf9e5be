"""Run one recorded op by itself, at widths that need not exist: `Node`, sizes, widths → `Shaped`, milliseconds.

Tensors are made anew at the sizes that the widths give, on the device, for a batch of any size; what an op is told in
plain numbers of channels (groups of a convolution, the shape of a normalisation) follows. Views and ops that make
constants take no time here. The decision that is not obvious: weights are taken from memory in a network, activations
mostly from a cache, into which the op before has just written them. So a run is given another copy of its weights each
time, as many as fill `COLD_BYTES`, and the same activations.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from archscan.graph import Graph, Node, Ref, leaves_of
from archscan.latency.timing import LatencySetup, milliseconds
from archscan.liveness import shared_input
from archscan.sizes import SizeOfValue

Shape = tuple[int, ...]

COLD_BYTES = 2**25
MOST_COPIES = 16
WARM_UPS, RUNS, ENOUGH_MS = 1, 5, 30.0
"""An op is run so often, or until it took so long in all; once at least, beside the warm-up."""

_REPLAY_ERRORS = (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError)
"""What an op may raise that depends on more than the sizes of its arguments."""


@dataclass(frozen=True)
class Shaped:
    """An op with the shapes of its tensors, and whether each is a weight; enough to run it.

    Attributes:
        node: What was recorded.
        shapes: Of its tensor arguments, in order.
        weights: Whether each of them is the same for every batch.
        outputs: Of its outputs, without those that are none.
    """

    node: Node
    shapes: tuple[Shape, ...]
    weights: tuple[bool, ...]
    outputs: tuple[Shape, ...]

    @property
    def output(self) -> Shape:
        """Shape of the first output."""
        return self.outputs[0]

    @property
    def key(self) -> str:
        """Name what is measured: equal keys take equal time."""
        plain = [repr(leaf) for leaf in leaves_of((*self.node.args, *self.node.kwargs.values())) if _is_plain(leaf)]
        return f"{self.node.op} {self.shapes} {''.join('wa'[not weight] for weight in self.weights)} {' '.join(plain)}"


def timed_nodes(graph: Graph) -> tuple[int, ...]:
    """List the nodes that take time: those that read a tensor and write one of their own, or in place."""
    return tuple(
        place
        for place, node in enumerate(graph.nodes)
        if node.tensors and (shared_input(node) is None or node.op._schema.is_mutable) and node.outputs[0] is not None
    )


def shaped(graph: Graph, size_of: SizeOfValue, node: Node, widths_G: Sequence[int] | np.ndarray, batch: int) -> Shaped:
    """Evaluate the sizes of an op's tensors for given widths and a batch."""

    def shape(number: int) -> Shape:
        extents = [size.at(widths_G) for size in size_of(number)]
        if graph.values[number].per_sample and extents and extents[0] % graph.batch_size == 0:
            extents[0] = extents[0] * batch // graph.batch_size
        return tuple(extents)

    outputs = tuple(shape(number) for number in node.outputs if number is not None)
    weights = tuple(not graph.values[number].per_sample for number in node.tensors)
    shapes = [shape(number) for number in node.tensors]
    if node.op is torch.ops.aten.bmm.default:  # a weight that was expanded over the batch belongs to no sample
        shapes = [(max(every[0] for every in shapes), *each[1:]) for each in shapes]
    return Shaped(node, tuple(shapes), weights, outputs)


def replay_ms(of: Shaped, setup: LatencySetup, device: torch.device) -> float | None:
    """Measure an op by itself; None where it does not run on tensors of these sizes.

    The least of several runs counts: whatever else the machine does can only make one slower.
    """
    calls = [_call(of, setup, device)]
    weight_bytes = 4 * sum(math.prod(shape) for shape, weight in zip(of.shapes, of.weights, strict=True) if weight)
    copies = min(max(COLD_BYTES // max(weight_bytes, 1), 1), MOST_COPIES) if weight_bytes > 2**16 else 1
    calls += [_call(of, setup, device, like=calls[0]) for _ in range(copies - 1)]
    taken: list[float] = []
    try:
        with torch.no_grad():
            while len(taken) <= WARM_UPS or (len(taken) < WARM_UPS + RUNS and sum(taken) < ENOUGH_MS):
                args, kwargs = calls[len(taken) % len(calls)]
                taken.append(milliseconds(partial(of.node.op, *args, **kwargs), device))
    except _REPLAY_ERRORS:
        return None
    return min(taken[WARM_UPS:])


Arguments = tuple[list[Any], dict[str, Any]]


def _call(of: Shaped, setup: LatencySetup, device: torch.device, like: Arguments | None = None) -> Arguments:
    """Make arguments; of those of another call, activations are used again."""
    leaves = [] if like is None else leaves_of((*like[0], *like[1].values()))
    known = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    tensors = iter(
        known[place] if known and not weight else _tensor(shape, setup, device)
        for place, (shape, weight) in enumerate(zip(of.shapes, of.weights, strict=True))
    )

    def fill(argument: Any) -> Any:
        if isinstance(argument, Ref):
            return next(tensors)
        if isinstance(argument, (list, tuple)):
            return type(argument)(fill(part) for part in argument)
        return device if isinstance(argument, torch.device) else argument

    args = [fill(argument) for argument in of.node.args]
    kwargs = {name: fill(argument) for name, argument in of.node.kwargs.items()}
    return _with_counts(of, args), kwargs


def _tensor(shape: Shape, setup: LatencySetup, device: torch.device) -> Tensor:
    made = torch.rand(shape, device=device)
    return made.contiguous(memory_format=torch.channels_last) if setup.channels_last and made.ndim == 4 else made


def _with_counts(of: Shaped, args: list[Any]) -> list[Any]:
    """Adapt the plain numbers among the arguments that count channels."""
    adapt = _COUNTS.get(of.node.op)
    return args if adapt is None else [adapt(of, args).get(place, value) for place, value in enumerate(args)]


def _convolution(of: Shaped, args: list[Any]) -> Mapping[int, Any]:
    inputs, weight, transposed = of.shapes[0], of.shapes[1], args[6]
    return {8: of.output[1] // weight[1] if transposed else inputs[1] // weight[1]}


def _layer_norm(of: Shaped, args: list[Any]) -> Mapping[int, Any]:
    return {1: list(of.shapes[0][-len(args[1]) :])}


def _group_norm(of: Shaped, args: list[Any]) -> Mapping[int, Any]:
    samples, channels, *places = of.shapes[0]
    return {3: samples, 4: channels, 5: math.prod(places), 6: of.outputs[1][1]}


_COUNTS = {
    torch.ops.aten.convolution.default: _convolution,
    torch.ops.aten.native_layer_norm.default: _layer_norm,
    torch.ops.aten.native_group_norm.default: _group_norm,
}


def _is_plain(leaf: Any) -> bool:
    return leaf is not None and not isinstance(leaf, (Ref, torch.device))
