"""Where a cut network departs from what is foretold: its run beside the recorded ops of the original → `Divergence`.

The cut network runs on the meta device under a dispatch mode that compares every op, its integers and the shapes of
what it returns with the prediction, and stops at the first that differs.

The decision that is not obvious: the mode lies above the recorder of `capture` and counts only the ops of the model's
own forward, so that both runs are numbered alike.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from archscan.capture import record_once
from archscan.errors import BadInput
from archscan.graph import Graph

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
    """Lies above the recorder of `capture` and compares every op of the model's forward with the prediction.

    Attributes:
        index: Number of the next node.
        runs: How often the model's forward was entered; `capture` enters it again where it cannot run on meta.
    """

    def __init__(self, root: type[nn.Module], graph: Graph, predicted: Predicted | None, hints: Hints) -> None:
        super().__init__()
        self.root, self.graph, self.predicted, self.hints = root, graph, predicted, hints
        self.run_to_compare = 2 if reads_values(graph) else 1
        self.runs, self.index = 0, 0
        self.failure = "it failed outside of any op"
        self.entered: nn.Module | None = None
        seen: set[int] = set()
        self.fresh: list[list[int | None]] = []  # per node, the outputs that are seen for the first time
        for node in graph.nodes:
            self.fresh.append([None if number in seen else number for number in node.outputs])
            seen.update(number for number in (*node.tensors, *node.outputs) if number is not None)

    def enter(self, module: nn.Module, _args: Any) -> None:
        """Notice that the model's forward begins: from here on, see its ops before `capture` does."""
        if self.entered is not None or not isinstance(module, self.root):
            return
        self.runs += 1
        if self.runs > self.run_to_compare:
            raise Divergence(self.index, self.failure)
        self.entered = module
        if self.runs == self.run_to_compare:
            self.__enter__()

    def leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        """Notice that the model's forward ends."""
        if module is not self.entered:
            return
        self.entered = None
        error = sys.exc_info()[1]  # this hook runs inside the handler of whatever the forward raised
        if error is not None:
            self.failure = str(error)
        if self.runs == self.run_to_compare:
            self.__exit__(None, None, None)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._is_extra_copy(func):
            return func(*args, **(kwargs or {}))
        if func.namespace == "profiler":  # a label, which `capture` does not record either
            return func(*args, **(kwargs or {}))
        at = self.index
        if at >= len(self.graph.nodes) or func not in (self.graph.nodes[at].op, _AS_WELL.get(self.graph.nodes[at].op)):
            raise Divergence(min(at, len(self.graph.nodes) - 1), f"it ran {func} out of turn")
        self._check_integers(at, (args, kwargs or {}))
        _check_norm(at, func, args)
        try:
            result = func(*args, **(kwargs or {}))
        except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as error:
            raise Divergence(at, str(error)) from error
        self._check_shapes(at, tree_flatten(result)[0])
        self.index += 1
        return result

    def _is_extra_copy(self, func: Any) -> bool:
        """See to it that copies need not agree: whether a reshape has to copy, an axis of 1 decides."""
        nodes = self.graph.nodes
        if func is _COPY:
            return self.index >= len(nodes) or nodes[self.index].op is not _COPY
        while self.index < len(nodes) - 1 and nodes[self.index].op is _COPY:
            self.index += 1
        return False

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
        if len(leaves) != len(self.fresh[at]):
            raise Divergence(at, f"{self.graph.nodes[at].op} returned {len(leaves)} tensors, not {len(self.fresh[at])}")
        for leaf, number in zip(leaves, self.fresh[at], strict=True):
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


def divergence(
    model: nn.Module, example_input: Any, graph: Graph, predicted: Predicted | None, hints: Hints
) -> Divergence | None:
    """Run the cut network beside the original's graph; return where it first departs from the prediction, or None."""
    comparison = _Comparison(type(model), graph, predicted, hints)
    handles = [
        nn.modules.module.register_module_forward_pre_hook(comparison.enter),
        nn.modules.module.register_module_forward_hook(comparison.leave, always_call=True),
    ]
    try:
        record_once(model, example_input, training=graph.training, batch_size=graph.batch_size)
    except Divergence as diverged:
        return diverged
    except BadInput as error:
        return Divergence(min(comparison.index, len(graph.nodes) - 1), str(error.__cause__ or error))
    finally:
        for handle in handles:
            handle.remove()
        if comparison.entered is not None:  # an interruption, after which no hook is called
            comparison.leave(comparison.entered, None, None)
    return None
