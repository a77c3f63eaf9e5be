"""Find the sizes that a forward hard-codes: cut model, recorded run of the original, predicted shapes → attributes.

Examples are ``self.width`` of a split, the amounts of a padding, the groups of a blur kernel. The cut network runs on
the meta device, beside the recorded ops of the original.

The decision that is not obvious: nothing is guessed from attribute names. At the first op whose output has another
shape than predicted, those integers of its module that were read by then and equal a size which changed there are
tried, and a change is kept only if the run then gets past that op. What is kept is written into the surgery, so loading
a result needs no run.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice, product
from typing import Any, Literal

from torch import nn

from archscan.divergence import Divergence, Hints, Predicted, divergence, reads_values
from archscan.errors import RebuildMismatch
from archscan.graph import Graph, Node
from archscan.surgery import set_sizes, sizes_of

Attributes = Mapping[str, Mapping[str, int | tuple[int, ...]]]
"""Module path → attribute → its new value."""

_ATTEMPTS = 96
"""How many changes are tried at one op before giving up."""


class CannotFollow(RebuildMismatch):
    """A module whose forward hard-codes a size that cannot be changed from outside: freeze its groups and plan again.

    Attributes:
        module: Its path.
        detail: What was seen there.
        node: Number of the op of the recorded run; the count of all of them where only train mode fails.
        found: The attributes that were changed by then.
    """

    def __init__(self, module: str, detail: str, node: int, found: "Attributes | None" = None) -> None:
        where = module or "the model"
        super().__init__(f"the forward of {where} cannot run with fewer channels ({detail}); protect that module")
        self.module = module
        self.detail = detail
        self.node = node
        self.found: Attributes = found or {}


def _differing(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(old, new) for old, new in pairs if old != new]


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

Source = Literal["op", "module", "multiple"]
"""Where a new size was found: at the op, anywhere in the module, or as a factor or a multiple of one of those."""

_SOURCES: tuple[Source, ...] = ("op", "module", "multiple")

Reads = Mapping[str, set[str]]
"""Module path → names of the attributes that a forward read."""


@contextmanager
def _spied(model: nn.Module, possible: bool) -> Iterator[Reads]:
    """Note which attributes are read, by putting each module into a subclass of its class for a while.

    Nothing is noted where that is not possible, because a copy of the model runs.
    """
    reads: dict[str, set[str]] = {}
    spies: dict[type[nn.Module], type[nn.Module]] = {}
    names: dict[int, set[str]] = {}

    def spy(kind: type[nn.Module]) -> type[nn.Module]:
        def note(module: nn.Module, name: str) -> Any:
            if id(module) in names:
                names[id(module)].add(name)
            return kind.__getattribute__(module, name)

        return type(kind.__name__, (kind,), {"__getattribute__": note, "__module__": kind.__module__})

    before = [(path, module, type(module)) for path, module in model.named_modules() if possible]
    try:
        for path, module, kind in before:
            if kind not in spies:
                spies[kind] = spy(kind)
            module.__class__ = spies[kind]
            reads[path] = names[id(module)] = set()
        yield reads
    finally:
        names.clear()
        for _, module, kind in before:
            module.__class__ = kind


def _tries(module: nn.Module, pairs: Sequence[tuple[int, int]], read: Iterable[str] | None = None) -> Iterator[Change]:
    """Yield changes of the module's integers that equal an old size: one attribute at a time, and all together.

    All together comes first where one old size has several new ones (zeros put before and after), in the order in which
    the attributes were defined. Of several equal sizes in one attribute, some may stay as they are.
    """
    options: dict[str, list[int | tuple[int, ...]]] = {}
    for name in vars(module):
        old = sizes_of(module, name)
        if old is None or name == "training" or (read is not None and name not in read):
            continue
        stays = [[size] if len(old) > 1 else [] for size in old]
        news = ([new for before, new in pairs if before == size] for size in old)
        choices = product(*(new + same or [size] for new, same, size in zip(news, stays, old, strict=True)))
        is_int = type(vars(module)[name]) is int
        different = (choice for choice in choices if choice != old)
        values = [choice[0] if is_int else choice for choice in islice(different, _ATTEMPTS)]
        if values:
            options[name] = values
    single = (((name, value),) for name, values in options.items() for value in values)
    joint = (tuple(zip(options, values, strict=True)) for values in product(*options.values()) if len(options) > 1)
    yield from chain(joint, single) if len({old for old, _ in pairs}) < len(pairs) else chain(single, joint)


def _aligned(
    module: nn.Module, graph: Graph, predicted: Predicted, node: Node, read: Iterable[str] | None = None
) -> Iterator[Change]:
    """Yield changes of attributes that hold the sizes of all outputs of an op, as the sizes of a split do, in order."""
    numbers = [number for number in node.outputs if number is not None]
    shapes = [(graph.values[number].shape, predicted[number]) for number in numbers]
    rows = {tuple(zip(*row, strict=True)) for row in zip(*(zip(*pair, strict=True) for pair in shapes), strict=False)}
    for name in vars(module):
        old = sizes_of(module, name)
        if old is None or len(old) < 2 or (read is not None and name not in read):
            continue
        yield from (((name, new),) for before, new in sorted(rows) if before == old != new)


def _pairs_at(graph: Graph, predicted: Predicted, hints: Hints, at: int) -> list[tuple[int, int]]:
    """List the changed sizes of an op: its counts of channels, or those of its tensors; of a copy, its reader's too."""
    copies = str(graph.nodes[at].op) == "aten.clone.default"
    shown = graph.nodes[at : at + 2] if copies else graph.nodes[at : at + 1]
    sizes = dict.fromkeys(pair for node in shown for pair in _changes(graph, predicted, node))
    return _differing(hints.get(at, ())) or list(sizes)


def _candidates(
    model: nn.Module, graph: Graph, predicted: Predicted, hints: Hints, at: int, reads: Reads
) -> Iterator[tuple[str, Change, Source]]:
    """Yield changes that may let node `at` do what is predicted, the most likely first and each once.

    With each comes the path of the module, and where the sizes were found. Modules inside are asked for what was read
    of them, since a forward may call their methods.
    """
    node = graph.nodes[at]
    seen: set[tuple[str, Change]] = set()
    inner = [path for path in reads if path.startswith(f"{node.module}." if node.module else "") and path]
    for source, path in product(_SOURCES, (*_parents(node.module), *inner)):
        module, read = model.get_submodule(path), reads.get(path)
        if not _has_sizes(module, read):
            continue
        around = min(path, node.module, key=len)
        pairs = _pairs_from(source, module, graph, predicted, hints, at, around, read)
        for change in chain(_aligned(module, graph, predicted, node, read), _tries(module, pairs, read)):
            if (path, change) not in seen and (source != "multiple" or len(change) == 1):
                seen.add((path, change))
                yield path, change, source


def _pairs_from(
    source: Source,
    module: nn.Module,
    graph: Graph,
    predicted: Predicted,
    hints: Hints,
    at: int,
    around: str,
    read: Iterable[str] | None,
) -> list[tuple[int, int]]:
    """List the changed sizes that may be the new sizes of a module: of one op, or of all that are `around` it."""
    if source == "op":
        return _pairs_at(graph, predicted, hints, at)
    prefix = f"{around}." if around else ""
    inside = [node for node in graph.nodes if node.module == around or node.module.startswith(prefix)]
    pairs = list(dict.fromkeys(pair for node in inside for pair in _changes(graph, predicted, node)))
    return _multiples(module, pairs, read) if source == "multiple" else pairs


def _has_sizes(module: nn.Module, read: Iterable[str] | None) -> bool:
    return any(
        name != "training" and sizes_of(module, name) for name in vars(module) if read is None or name in set(read)
    )


def _multiples(
    module: nn.Module, pairs: Iterable[tuple[int, int]], read: Iterable[str] | None
) -> list[tuple[int, int]]:
    """Give the sizes of a module that a changed size is a multiple of, or which are one of it, with their new values.

    Heads, for one, may show only times the images of the batch or times their width.
    """
    names = (name for name in vars(module) if name != "training" and (read is None or name in read))
    sizes = {size for name in names for size in sizes_of(module, name) or () if size > 1}
    found = (
        (size, new * size // old)
        for old, new in pairs
        for size in sorted(sizes)
        if old > 1 and (old % size == 0 or size % old == 0) and new * size % old == 0
    )
    return list(dict.fromkeys(found))


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
    model: nn.Module,
    example_input: Any,
    graph: Graph,
    predicted: Predicted,
    hints: Hints,
    likely: Attributes | None = None,
) -> Attributes:
    """Change the hard-coded sizes of a cut model, in place, until it runs as predicted.

    Args:
        model: The cut network; its attributes are changed.
        example_input: What the original was captured with.
        graph: The original's recorded run.
        predicted: The shape of every value of `graph` in the slim network.
        hints: Integer arguments that must change where no shape tells.
        likely: What was found for much the same widths; it saves runs where it still holds.

    Returns:
        What was changed.

    Raises:
        CannotFollow: No change of an attribute gets past an op.
    """
    pursuit = _Pursuit(model, example_input, graph, predicted, hints)
    if likely and pursuit.stuck is not None:
        pursuit.advance(dict(_still_possible(model, graph, predicted, likely)), others=True)
    likewise: dict[str, Change] = {}
    while (stuck := pursuit.stuck) is not None:
        candidates = _candidates(model, graph, predicted, hints, stuck.index, pursuit.reads)
        for candidate in islice(candidates, _ATTEMPTS):
            if pursuit.advance(dict([candidate[:2]])):
                break
        else:
            raise CannotFollow(graph.nodes[stuck.index].module, stuck.detail, stuck.index, pursuit.found)
        for other, alike in _like(model, graph, predicted, hints, stuck.index, candidate).items():
            likewise[other] = (*likewise.get(other, ()), *alike)
        if pursuit.stuck is not None and likewise and pursuit.advance(likewise, others=True):
            likewise = {path: alike for path, alike in likewise.items() if path not in pursuit.found}
    return pursuit.found


def _still_possible(
    model: nn.Module, graph: Graph, predicted: Predicted, likely: Attributes
) -> Iterator[tuple[str, Change]]:
    """Yield the changes whose new sizes are found in their modules, with these widths too."""
    pairs: dict[str, set[tuple[int, int]]] = {path: set() for path in likely}
    for node in graph.nodes:
        for path in _parents(node.module):
            if path in pairs:
                pairs[path].update(_changes(graph, predicted, node))
    for path, values in likely.items():
        module = model.get_submodule(path)
        news = [(size, new) for name in values for size, new in _sizes_and(module, name, values[name]) if size != new]
        if pairs[path].issuperset(news):
            yield path, tuple(values.items())


def _sizes_and(module: nn.Module, name: str, new: int | tuple[int, ...]) -> list[tuple[int, int]]:
    return list(zip(sizes_of(module, name) or (), (new,) if isinstance(new, int) else new, strict=True))


class _Pursuit:
    """A cut model whose attributes change until it runs as predicted.

    Attributes:
        stuck: Where it departs from the prediction now.
        reads: The attributes that it read by then.
        found: Module path → attribute → the new value that was needed.
    """

    def __init__(self, model: nn.Module, example_input: Any, graph: Graph, predicted: Predicted, hints: Hints) -> None:
        self.model, self._graph = model, graph
        self._arguments = model, example_input, graph, predicted, hints
        self._can_be_spied_on = not reads_values(graph)  # else a copy runs
        self.found: dict[str, dict[str, int | tuple[int, ...]]] = {}
        self.stuck, self.reads = self._run()

    def _run(self) -> tuple[Divergence | None, Reads]:
        with _spied(self.model, self._can_be_spied_on) as reads:
            return divergence(*self._arguments), reads

    def advance(self, changes: Mapping[str, Change], others: bool = False) -> bool:
        """Make changes and keep them if the run gets further; say whether it does.

        Changes in other modules than the one that is stuck were not asked for: where the run gets stuck in one of
        those, only what it needed on the way there is kept.
        """
        assert self.stuck is not None
        if not changes:
            return False
        before = _set(self.model, changes)
        now, reads = self._run()
        if now is not None and now.index <= self.stuck.index:
            _set(self.model, before)
            return False
        culprit = self._graph.nodes[now.index].module if others and now is not None else None
        if now is not None and culprit in changes:
            _set(self.model, before)
            passed = {node.module for node in self._graph.nodes[: now.index]} - {culprit}
            return self.advance({path: change for path, change in changes.items() if path in passed}, others=True)
        for path, change in changes.items():
            self.found.setdefault(path, {}).update(change)
        self.stuck, self.reads = now, reads
        return True


def _like(
    model: nn.Module,
    graph: Graph,
    predicted: Predicted,
    hints: Hints,
    at: int,
    helped: tuple[str, Change, Source],
) -> dict[str, Change]:
    """Propose a change that helped at node `at` for every later module of the class, where one new value is possible.

    A deep network repeats one block many times; this saves a run for each.
    """
    path, change, source = helped
    home = graph.nodes[at].module
    kinds, names = (type(model.get_submodule(home)), type(model.get_submodule(path))), {name for name, _ in change}
    proposals: dict[str, Change] = {}
    for later in range(at + 1, len(graph.nodes)):
        node = graph.nodes[later]
        other = _counterpart(home, path, node.module)
        if other is None or other == path or other in proposals or node.op is not graph.nodes[at].op:
            continue
        if type(model.get_submodule(node.module)) is not kinds[0]:
            continue
        module = model.get_submodule(other)
        if type(module) is not kinds[1]:
            continue
        pairs = _pairs_from(source, module, graph, predicted, hints, later, min(other, node.module, key=len), names)
        tries = list(_aligned(module, graph, predicted, node)) or _tries(module, pairs)
        options = [tried for tried in tries if {name for name, _ in tried} == names]
        if len(options) == 1:
            proposals[other] = options[0]
    return proposals


def _counterpart(home: str, path: str, other_home: str) -> str | None:
    """Name the module that is to another one what a module around or inside `home` is to that; None if there is none.

    >>> _counterpart("a.attn", "a.attn.table", "b.attn"), _counterpart("a.attn", "a", "b.attn")
    ('b.attn.table', 'b')
    """
    if path == home or path.startswith(f"{home}."):
        return other_home + path.removeprefix(home)
    suffix = home.removeprefix(path)
    return other_home.removesuffix(suffix) if other_home.endswith(suffix) else None
