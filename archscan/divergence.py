"""Where a cut network departs from what is foretold: its run beside the recorded ops of the original → `Divergence`.

The cut network runs on the meta device under a dispatch mode that compares every op, its integers and the shapes of
what it returns with the prediction, and stops at the first that differs.

The decision that is not obvious: nothing is recorded of the cut network. Trials run it many times, and its ops are
counted as they come, as those of the original were numbered.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from archscan.capture import FORWARD_ERRORS, split_input, train_mode, with_batch
from archscan.graph import Graph, leaves_of
from archscan.liveness import may_copy_or_share
from archscan.meta_shapes import bare
from archscan.meta_shapes import run as run_op

Hints = Mapping[int, Sequence[tuple[int, int]]]
"""Node number → (old, new) integers, in the order in which they stand beside each other in the op's arguments."""

Predicted = Sequence[tuple[int, ...]]
"""The shape of every value of a graph in the slim network."""


_COPY, _VIEW, _VIEW_OF_COPY = (
    torch.ops.aten.clone.default,
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
)
_AS_WELL = {_VIEW: _VIEW_OF_COPY, _VIEW_OF_COPY: _VIEW}
"""Ops that do the same, and which stand for each other in a reshape."""


class Divergence(Exception):
    """The cut network stopped doing what was predicted, at node `index`."""

    def __init__(self, index: int, detail: str) -> None:
        super().__init__(detail)
        self.index = index
        self.detail = detail.strip().splitlines()[0] if detail.strip() else "it failed"


class _Comparison(TorchDispatchMode):
    """Compare every op of the model's forward with the prediction; `index` is the number of the next node."""

    def __init__(self, graph: Graph, predicted: Predicted | None, hints: Hints) -> None:
        super().__init__()
        self.graph, self.predicted, self.hints = graph, predicted, hints
        self.index = 0
        self.alive: list[Any] = []  # torch detaches what a factory made if it is held elsewhere, as `capture` does

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler" or self._is_extra_copy(func):  # a label, which `capture` does not record either
            return run_op(func, args, kwargs)
        at = self.index
        if at >= len(self.graph.nodes) or func not in (self.graph.nodes[at].op, _AS_WELL.get(self.graph.nodes[at].op)):
            raise Divergence(min(at, len(self.graph.nodes) - 1), f"it ran {func} out of turn")
        self._check_integers(at, (args, kwargs))
        _check_norm(at, func, args)
        try:
            result = run_op(func, args, kwargs)
        except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as error:
            raise Divergence(at, str(error)) from error
        self.alive.append(result)
        self._check_shapes(at, leaves_of(result))
        self.index += 1
        return result

    def _is_extra_copy(self, func: Any) -> bool:
        """See to it that copies need not agree: whether a reshape has to copy, an axis of 1 decides."""
        nodes = self.graph.nodes
        if func is _COPY:
            expected = nodes[self.index].op if self.index < len(nodes) else None
            if expected in _AS_WELL:
                self._check_memory(self.index)
            return expected is not _COPY
        while self.index < len(nodes) - 1 and nodes[self.index].op is _COPY:
            self._check_memory(self.index)
            self.index += 1
        return False

    def _check_memory(self, at: int) -> None:
        """See that it does not matter whether a reshape copies."""
        if not may_copy_or_share(self.graph, at):
            raise Divergence(at, "a reshape would share memory where it made a copy, or the other way round")

    def _check_integers(self, at: int, arguments: Any) -> None:
        if at not in self.hints:
            return
        node, hints = self.graph.nodes[at], list(self.hints[at])
        pairs = list(zip(_integers((node.args, dict(node.kwargs))), _integers(arguments), strict=False))
        places = [
            place
            for place in range(len(pairs) - len(hints) + 1)
            if all(pair[0] == hint[0] for pair, hint in zip(pairs[place:], hints, strict=False))
        ]
        if not any(pairs == _put(hints, pairs, place) for place in places):
            raise Divergence(at, f"{node.op} needs other amounts")

    def _check_shapes(self, at: int, leaves: Sequence[Any]) -> None:
        numbers = self.graph.first_seen[at]
        if len(leaves) != len(numbers):
            raise Divergence(at, f"{self.graph.nodes[at].op} returned {len(leaves)} tensors, not {len(numbers)}")
        for leaf, number in zip(leaves, numbers, strict=True):
            if self.predicted is None or number is None or not isinstance(leaf, Tensor):
                continue
            if tuple(leaf.shape) != tuple(self.predicted[number]):
                shapes = f"{tuple(leaf.shape)}, not {tuple(self.predicted[number])}"
                raise Divergence(at, f"{self.graph.nodes[at].op} returned {shapes}")


def _check_norm(at: int, func: Any, args: tuple[Any, ...]) -> None:
    """Check what `capture` does not: on meta it derives the outputs of a normalisation from its input alone."""
    if func is torch.ops.aten.native_layer_norm.default:
        expected = [tuple(args[0].shape[-len(args[1]) :])]
        found = [tuple(args[1]), *(tuple(tensor.shape) for tensor in args[2:4] if tensor is not None)]
    elif func is torch.ops.aten.native_batch_norm.default:
        expected = [(args[0].shape[1],)]
        found = [tuple(tensor.shape) for tensor in args[1:5] if tensor is not None]
    else:
        return
    if any(shape != expected[0] for shape in found):
        raise Divergence(at, f"{func} is of size {found[0]} on an activation of {tuple(args[0].shape)}")


def _put(hints: list[tuple[int, int]], pairs: list[tuple[int, int]], place: int) -> list[tuple[int, int]]:
    """Give what the integers of an op should be if the hints stand at a place and nothing else changes."""
    rest = [(old, old) for old, _ in pairs]
    return [*rest[:place], *hints, *rest[place + len(hints) :]]


_READS_A_VALUE = torch.ops.aten._local_scalar_dense.default


def reads_values(graph: Graph) -> bool:
    """Say whether the forward reads values of tensors, so that it cannot run on the meta device."""
    return any(node.op is _READS_A_VALUE for node in graph.nodes)


def value_reader(graph: Graph) -> str | None:
    """Say which module reads values that depend on the input, such as ``if x.sum() > 0``; None where none does."""
    readers = (node for node in graph.nodes if node.op is _READS_A_VALUE)
    found = (node for node in readers if any(graph.values[number].per_sample for number in node.tensors))
    return next((node.module or "the model itself" for node in found), None)


def _integers(arguments: Any) -> list[int]:
    return [leaf for leaf in tree_flatten(arguments)[0] if type(leaf) is int]


def run_under(
    mode: TorchDispatchMode, model: nn.Module, example_input: Any, *, on_meta: bool, training: bool, batch_size: int
) -> None:
    """Run one forward pass under a mode, as `record_once` does, and record nothing; raises what the forward raises."""
    if not on_meta:
        model = copy.deepcopy(model).cpu()
    args, kwargs = split_input(with_batch(example_input, batch_size, "meta" if on_meta else "cpu"))
    named = chain(model.named_parameters(), model.named_buffers()) if on_meta else ()
    # Whether a matmul is folded, torch decides by `requires_grad`, which what `record_once` runs on does not have.
    tensors = {name: bare(tensor) for name, tensor in named if not tensor.is_meta or tensor.requires_grad}
    device = torch.device("meta") if on_meta else nullcontext()
    with train_mode(model, training), _buffers_kept(model), torch.no_grad(), mode, device:
        if tensors:
            torch.func.functional_call(model, tensors, args, kwargs)
        else:
            model(*args, **kwargs)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put back the buffers that a forward replaces."""
    before = [(module._buffers, dict(module._buffers)) for module in model.modules() if module._buffers]
    try:
        yield
    finally:
        for buffers, tensors in before:
            buffers.update(tensors)


def divergence(
    model: nn.Module, example_input: Any, graph: Graph, predicted: Predicted | None, hints: Hints
) -> Divergence | None:
    """Run the cut network beside the original's graph; return where it first departs from the prediction, or None."""
    comparison = _Comparison(graph, predicted, hints)
    try:
        run_under(
            comparison,
            model,
            example_input,
            on_meta=not reads_values(graph),
            training=graph.training,
            batch_size=graph.batch_size,
        )
    except Divergence as diverged:
        return diverged
    except FORWARD_ERRORS as error:
        return Divergence(min(comparison.index, len(graph.nodes) - 1), str(error))
    return None
