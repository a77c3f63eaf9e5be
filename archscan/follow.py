"""Find the sizes that a forward hard-codes: cut model, recorded run of the original, predicted shapes → attributes.

Examples are ``self.width`` of a split, the amounts of a padding, the groups of a blur kernel. The cut network runs on
the meta device, beside the recorded ops of the original.

The decision that is not obvious: nothing is guessed from attribute names. At the first op whose output has another
shape than predicted, the integers of its module that equal a size which changed there are tried, and a change is kept
only if the run then gets past that op. What is kept is written into the surgery, so loading a result needs no run.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from archscan.capture import record_once
from archscan.errors import BadInput, RebuildMismatch
from archscan.graph import Graph, Node
from archscan.surgery import set_sizes, sizes_of

Hints = Mapping[int, Sequence[tuple[int, int]]]
"""Node number → (old, new) integers, in the order in which they stand beside each other in the op's arguments."""

Predicted = Sequence[tuple[int, ...]]
"""The shape of every value of a graph in the slim network."""

_ATTEMPTS = 96
"""How many changes are tried at one op before giving up."""


class CannotFollow(RebuildMismatch):
    """A module whose forward hard-codes a size that cannot be changed from outside: freeze its groups and plan again.

    Attributes:
        module: Its path.
        detail: What was seen there.
    """

    def __init__(self, module: str, detail: str) -> None:
        where = module or "the model"
        super().__init__(f"the forward of {where} cannot run with fewer channels ({detail}); protect that module")
        self.module = module
        self.detail = detail


class _Diverged(Exception):
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
        reads_values = any(node.op is torch.ops.aten._local_scalar_dense.default for node in graph.nodes)
        self.run_to_compare = 2 if reads_values else 1
        self.runs, self.index = 0, 0
        self.entered: nn.Module | None = None
        seen: set[int] = set()
        self.fresh: list[list[int | None]] = []  # per node, the outputs that are seen for the first time
        for node in graph.nodes:
            self.fresh.append([None if number in seen else number for number in node.outputs])
            seen.update(number for number in (*node.tensors, *node.outputs) if number is not None)

    def enter(self, module: nn.Module, _args: Any) -> None:
        """Notice that the model's forward begins: from here on, see its ops before `capture` does."""
        if self.entered is not None or type(module) is not self.root:
            return
        self.runs += 1
        if self.runs > self.run_to_compare:
            raise _Diverged(self.index, "it failed outside of any op")
        self.entered = module
        if self.runs == self.run_to_compare:
            self.__enter__()

    def leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        """Notice that the model's forward ends."""
        if module is not self.entered:
            return
        self.entered = None
        if self.runs == self.run_to_compare:
            self.__exit__(None, None, None)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        at = self.index
        if at >= len(self.graph.nodes) or self.graph.nodes[at].op is not func:
            raise _Diverged(min(at, len(self.graph.nodes) - 1), f"it ran {func} out of turn")
        self._check_integers(at, (args, kwargs or {}))
        _check_norm(at, func, args)
        try:
            result = func(*args, **(kwargs or {}))
        except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as error:
            raise _Diverged(at, str(error)) from error
        self._check_shapes(at, tree_flatten(result)[0])
        self.index += 1
        return result

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
            raise _Diverged(at, f"{node.op} needs other amounts")

    def _check_shapes(self, at: int, leaves: Sequence[Any]) -> None:
        if len(leaves) != len(self.fresh[at]):
            raise _Diverged(at, f"{self.graph.nodes[at].op} returned {len(leaves)} tensors, not {len(self.fresh[at])}")
        for leaf, number in zip(leaves, self.fresh[at], strict=True):
            if self.predicted is None or number is None or not isinstance(leaf, Tensor):
                continue
            if tuple(leaf.shape) != tuple(self.predicted[number]):
                shapes = f"{tuple(leaf.shape)}, not {tuple(self.predicted[number])}"
                raise _Diverged(at, f"{self.graph.nodes[at].op} returned {shapes}")


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
        raise _Diverged(at, f"{func} is of size {found[0]} on an activation of {tuple(args[0].shape)}")


def _put(hints: list[tuple[int, int]], pairs: list[tuple[int, int]], place: int) -> list[tuple[int, int]]:
    """Give what the integers of an op should be if the hints stand at a place and nothing else changes."""
    rest = [(old, old) for old, _ in pairs]
    return [*rest[:place], *hints, *rest[place + len(hints) :]]


def _differing(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(old, new) for old, new in pairs if old != new]


def _integers(arguments: Any) -> list[int]:
    return [leaf for leaf in tree_flatten(arguments)[0] if type(leaf) is int]


def divergence(
    model: nn.Module, example_input: Any, graph: Graph, predicted: Predicted | None, hints: Hints
) -> _Diverged | None:
    """Run the cut network beside the original's graph; return where it first departs from the prediction, or None."""
    comparison = _Comparison(type(model), graph, predicted, hints)
    handles = [
        nn.modules.module.register_module_forward_pre_hook(comparison.enter),
        nn.modules.module.register_module_forward_hook(comparison.leave, always_call=True),
    ]
    try:
        record_once(model, example_input, training=graph.training, batch_size=graph.batch_size)
    except _Diverged as diverged:
        return diverged
    except BadInput as error:
        return _Diverged(min(comparison.index, len(graph.nodes) - 1), str(error.__cause__ or error))
    finally:
        for handle in handles:
            handle.remove()
        if comparison.entered is not None:  # an interruption, after which no hook is called
            comparison.leave(comparison.entered, None, None)
    return None


def _changes(graph: Graph, predicted: Predicted, node: Node) -> list[tuple[int, int]]:
    """List the (old, new) sizes that differ in the tensors of a node."""
    found: dict[tuple[int, int], None] = {}
    for number in (*node.tensors, *node.outputs):
        if number is not None:
            found.update(dict.fromkeys(_differing(zip(graph.values[number].shape, predicted[number], strict=True))))
    return list(found)


def _parents(path: str) -> Iterator[str]:
    """Yield a module path and those of the modules around it, innermost first."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


Change = tuple[tuple[str, int | tuple[int, ...]], ...]
"""New values of some attributes of one module."""


def _tries(module: nn.Module, pairs: Sequence[tuple[int, int]]) -> Iterator[Change]:
    """Yield changes of the module's integers that equal an old size: one attribute at a time, and all together.

    All together comes first where one old size has several new ones (zeros put before and after), in the order in which
    the attributes were defined.
    """
    options: dict[str, list[int | tuple[int, ...]]] = {}
    for name in vars(module):
        old = sizes_of(module, name)
        if old is None or name == "training":
            continue
        choices = product(*([new for before, new in pairs if before == size] or [size] for size in old))
        is_int = type(vars(module)[name]) is int
        values = [choice[0] if is_int else choice for choice in choices if choice != old]
        if values:
            options[name] = values
    single = (((name, value),) for name, values in options.items() for value in values)
    joint = (tuple(zip(options, values, strict=True)) for values in product(*options.values()) if len(options) > 1)
    yield from chain(joint, single) if len({old for old, _ in pairs}) < len(pairs) else chain(single, joint)


def _pairs_at(graph: Graph, predicted: Predicted, hints: Hints, at: int) -> list[tuple[int, int]]:
    return _differing(hints.get(at, ())) or _changes(graph, predicted, graph.nodes[at])


def _candidates(
    model: nn.Module, graph: Graph, predicted: Predicted, hints: Hints, at: int
) -> Iterator[tuple[str, Change]]:
    """Yield changes that may let node `at` do what is predicted, the most likely first."""
    node, here = graph.nodes[at], _pairs_at(graph, predicted, hints, at)
    for path in _parents(node.module):
        yield from ((path, change) for change in _tries(model.get_submodule(path), here))
    for path in _parents(node.module):
        prefix = f"{path}." if path else ""
        inside = [other for other in graph.nodes if other.module == path or other.module.startswith(prefix)]
        pairs = dict.fromkeys(pair for other in inside for pair in _changes(graph, predicted, other))
        yield from ((path, change) for change in _tries(model.get_submodule(path), list(pairs)))


def _set(model: nn.Module, changes: Mapping[str, Change]) -> dict[str, Change]:
    """Make changes and return those that take them back."""
    before: dict[str, Change] = {}
    for path, change in changes.items():
        module = model.get_submodule(path)
        before[path] = tuple((name, vars(module)[name]) for name, _ in change)
        for name, value in change:
            set_sizes(module, name, value)
    return before


def follow(
    model: nn.Module, example_input: Any, graph: Graph, predicted: Predicted, hints: Hints
) -> dict[str, dict[str, int | tuple[int, ...]]]:
    """Change the hard-coded sizes of a cut model, in place, until it runs as predicted.

    Args:
        model: The cut network; its attributes are changed.
        example_input: What the original was captured with.
        graph: The original's recorded run.
        predicted: The shape of every value of `graph` in the slim network.
        hints: Integer arguments that must change where no shape tells.

    Returns:
        Module path → attribute → its new value.

    Raises:
        CannotFollow: No change of an attribute gets past an op.
    """
    found: dict[str, dict[str, int | tuple[int, ...]]] = {}

    def advance(changes: Mapping[str, Change], stuck: _Diverged) -> _Diverged | None:
        """Keep changes if the run gets further; return where it is stuck then."""
        before = _set(model, changes)
        now = divergence(model, example_input, graph, predicted, hints)
        if now is not None and now.index <= stuck.index:
            _set(model, before)
            return stuck
        for path, change in changes.items():
            found.setdefault(path, {}).update(change)
        return now

    stuck = divergence(model, example_input, graph, predicted, hints)
    while stuck is not None:
        at = stuck
        for path, change in islice(_candidates(model, graph, predicted, hints, at.index), _ATTEMPTS):
            stuck = advance({path: change}, at)
            if stuck is not at:
                break
        else:
            raise CannotFollow(graph.nodes[at.index].module, at.detail)
        likewise = _like(model, graph, predicted, hints, path, change, at.index)
        if stuck is not None and likewise:
            stuck = advance(likewise, stuck)
    return found


def _like(
    model: nn.Module, graph: Graph, predicted: Predicted, hints: Hints, path: str, change: Change, at: int
) -> dict[str, Change]:
    """Propose a change that helped at node `at` for every later module of the class, where one new value is possible.

    A deep network repeats one block many times; this saves a run for each.
    """
    kind, names = type(model.get_submodule(path)), {name for name, _ in change}
    proposals: dict[str, Change] = {}
    for later in range(at + 1, len(graph.nodes)):
        other = graph.nodes[later].module
        if other == path or other in proposals or graph.nodes[later].op is not graph.nodes[at].op:
            continue
        module = model.get_submodule(other)
        if type(module) is not kind:
            continue
        tries = _tries(module, _pairs_at(graph, predicted, hints, later))
        options = [tried for tried in tries if {name for name, _ in tried} == names]
        if len(options) == 1:
            proposals[other] = options[0]
    return proposals
