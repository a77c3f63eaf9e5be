"""Find the sizes that a forward hard-codes: cut model, recorded run of the original, predicted shapes → attributes.

Examples are ``self.width`` of a split, the amounts of a padding, the groups of a blur kernel. The cut network runs on
the meta device, beside the recorded ops of the original.

The decision that is not obvious: nothing is guessed from attribute names. At the first op whose output has another
shape than predicted, those integers of its module that were read by then and equal a size which changed there are
tried, and a change is kept only if the run then gets past that op. What is kept is written into the surgery, so loading
a result needs no run.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, product
from typing import Any, Literal

from torch import nn

from archscan.divergence import Divergence, Hints, Predicted, divergence, reads_values
from archscan.errors import RebuildMismatch
from archscan.graph import Graph
from archscan.spies import Reads, Spies
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
        clues: What had helped by then.
    """

    def __init__(self, module: str, detail: str, node: int, clues: "Sequence[Clue]" = ()) -> None:
        where = module or "the model"
        super().__init__(f"the forward of {where} cannot run with fewer channels ({detail}); protect that module")
        self.module = module
        self.detail = detail
        self.node = node
        self.clues = tuple(clues)


Change = tuple[tuple[str, int | tuple[int, ...]], ...]
"""New values of some attributes of one module."""

Source = Literal["op", "module", "multiple"]
"""Where a new size was found: at the op, anywhere in the module, or as a factor or a multiple of one of those."""

_SOURCES: tuple[Source, ...] = ("op", "module", "multiple")

Places = frozenset[tuple[str, int]]
"""Which elements of which attributes are changed."""


@dataclass(frozen=True)
class Clue:
    """A change that let a run get further.

    Attributes:
        node: Number of the op that it let the run get past.
        path: The module that was changed.
        change: Its new values.
        source: Where they were found.
        places: Which of its sizes they are.
    """

    node: int
    path: str
    change: Change
    source: Source
    places: Places


def attributes_of(clues: Iterable[Clue]) -> Attributes:
    """Collect the new values of all attributes."""
    found: dict[str, dict[str, int | tuple[int, ...]]] = {}
    for clue in clues:
        found.setdefault(clue.path, {}).update(clue.change)
    return found


def _places(module: nn.Module, change: Change) -> Places:
    """Say which sizes a change would change."""
    news = ((name, (value,) if isinstance(value, int) else value) for name, value in change)
    return frozenset(
        (name, place)
        for name, new in news
        for place, (old, size) in enumerate(zip(sizes_of(module, name) or (), new, strict=True))
        if old != size
    )


def _parents(path: str) -> Iterator[str]:
    """Yield a module path and those of the modules around it, innermost first."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _differing(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(old, new) for old, new in pairs if old != new]


@dataclass(frozen=True, eq=False)
class _Foretold:
    """A recorded run of the original and what is predicted of the slim network's; see `follow`."""

    graph: Graph
    predicted: Predicted
    hints: Hints

    @cached_property
    def changes(self) -> list[list[tuple[int, int]]]:
        """The (old, new) sizes that differ in the tensors of each node."""
        values, found = self.graph.values, []
        for node in self.graph.nodes:
            numbers = [number for number in (*node.tensors, *node.outputs) if number is not None]
            pairs = (zip(values[number].shape, self.predicted[number], strict=True) for number in numbers)
            found.append(list(dict.fromkeys(_differing(chain.from_iterable(pairs)))))
        return found

    def pairs_at(self, at: int) -> list[tuple[int, int]]:
        """List the changed sizes of an op, its counts of channels or its tensors'; of a copy, its reader's too."""
        copies = str(self.graph.nodes[at].op) == "aten.clone.default"
        shown = chain.from_iterable(self.changes[at : at + 2] if copies else self.changes[at : at + 1])
        return _differing(self.hints.get(at, ())) or list(dict.fromkeys(shown))

    def pairs_around(self, path: str) -> list[tuple[int, int]]:
        """List the changed sizes of all ops of a module and of those below it."""
        prefix = f"{path}." if path else ""
        nodes = zip(self.graph.nodes, self.changes, strict=True)
        inside = (pairs for node, pairs in nodes if pairs and (node.module == path or node.module.startswith(prefix)))
        return list(dict.fromkeys(chain.from_iterable(inside)))

    def pairs_from(
        self, source: Source, module: nn.Module, path: str, at: int, read: Iterable[str] | None
    ) -> list[tuple[int, int]]:
        """List the changed sizes that may be the new sizes of a module: of one op, or of all that are around it."""
        if source == "op":
            return self.pairs_at(at)
        pairs = self.pairs_around(min(path, self.graph.nodes[at].module, key=len))
        return _multiples(module, pairs, read) if source == "multiple" else pairs

    def aligned(self, module: nn.Module, at: int, read: Iterable[str] | None) -> Iterator[Change]:
        """Yield changes of attributes that hold the sizes of all outputs of an op, as those of a split do, in order."""
        numbers = [number for number in self.graph.nodes[at].outputs if number is not None]
        shapes = [(self.graph.values[number].shape, self.predicted[number]) for number in numbers]
        rows = {
            tuple(zip(*row, strict=True)) for row in zip(*(zip(*pair, strict=True) for pair in shapes), strict=False)
        }
        for name in vars(module):
            old = sizes_of(module, name)
            if old is None or len(old) < 2 or (read is not None and name not in read):
                continue
            yield from (((name, new),) for before, new in sorted(rows) if before == old != new)


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


def _candidates(model: nn.Module, told: _Foretold, at: int, reads: Reads, clues: Sequence[Clue]) -> Iterator[Clue]:
    """Yield changes that may let node `at` do what is predicted, the most likely first and each once.

    Modules inside are asked for what was read of them, since a forward may call their methods. Of the changes of one
    module, those come first that change what helped in another one of its class.
    """
    home = told.graph.nodes[at].module
    helped = {(type(model.get_submodule(clue.path)), clue.places) for clue in clues}
    seen: set[tuple[str, Change]] = set()
    inner = [path for path in reads if path.startswith(f"{home}." if home else "") and path]
    for source, path in product(_SOURCES, (*_parents(home), *inner)):
        module, read = model.get_submodule(path), reads.get(path)
        if not _has_sizes(module, read):
            continue
        pairs = told.pairs_from(source, module, path, at, read)
        tries = islice(chain(told.aligned(module, at, read), _tries(module, pairs, read)), _ATTEMPTS)
        found = [Clue(at, path, change, source, _places(module, change)) for change in tries]
        for clue in sorted(found, key=lambda clue: (type(module), clue.places) not in helped):
            if (path, clue.change) not in seen and (source != "multiple" or len(clue.change) == 1):
                seen.add((path, clue.change))
                yield clue


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


def _set(model: nn.Module, attributes: Attributes) -> Attributes:
    """Make changes and return those that take them back."""
    before: dict[str, dict[str, int | tuple[int, ...]]] = {}
    for path, values in attributes.items():
        module = model.get_submodule(path)
        before[path] = {name: vars(module)[name] for name in values}
        for name, value in values.items():
            set_sizes(module, name, value)
    return before


def follow(
    model: nn.Module,
    example_input: Any,
    graph: Graph,
    predicted: Predicted,
    hints: Hints,
    likely: Sequence[Clue] = (),
) -> tuple[Clue, ...]:
    """Change the hard-coded sizes of a cut model, in place, until it runs as predicted.

    Args:
        model: The cut network; its attributes are changed.
        example_input: What the original was captured with.
        graph: The original's recorded run.
        predicted: The shape of every value of `graph` in the slim network.
        hints: Integer arguments that must change where no shape tells.
        likely: What helped with other widths; it saves runs where the same attributes help again.

    Returns:
        What was changed; see `attributes_of`.

    Raises:
        CannotFollow: No change of an attribute gets past an op.
    """
    told = _Foretold(graph, predicted, hints)
    pursuit = _Pursuit(model, example_input, told)
    if likely and pursuit.stuck is not None:
        again = (_alike(model, told, clue, clue.node, clue.path) for clue in likely)
        pursuit.advance([clue for clue in again if clue is not None], others=True)
    likewise: list[Clue] = []
    while (stuck := pursuit.stuck) is not None:
        for clue in islice(_candidates(model, told, stuck.index, pursuit.reads, pursuit.clues), _ATTEMPTS):
            if pursuit.advance([clue]):
                break
        else:
            raise CannotFollow(graph.nodes[stuck.index].module, stuck.detail, stuck.index, pursuit.clues)
        likewise.extend(_like(model, told, clue))
        if pursuit.is_near(likewise) and pursuit.advance(likewise, others=True):
            changed = {clue.path for clue in pursuit.clues}
            likewise = [clue for clue in likewise if clue.path not in changed]
    return tuple(pursuit.clues)


class _Pursuit:
    """A cut model whose attributes change until it runs as predicted.

    Attributes:
        stuck: Where it departs from the prediction now.
        reads: The attributes that it read by then.
        clues: What was changed, since it was needed.
    """

    def __init__(self, model: nn.Module, example_input: Any, told: _Foretold) -> None:
        self.model, self._example_input, self._told = model, example_input, told
        self._spies = None if reads_values(told.graph) else Spies(model)  # a copy runs, on which nobody can spy
        self.clues: list[Clue] = []
        self.stuck, self.reads = self._run()

    def _run(self) -> tuple[Divergence | None, Reads]:
        told = self._told
        with nullcontext[Reads]({}) if self._spies is None else self._spies.watching() as reads:
            return divergence(self.model, self._example_input, told.graph, told.predicted, told.hints), reads

    def is_near(self, clues: Iterable[Clue]) -> bool:
        """Say whether a change is in the module that is stuck, around it or inside it."""
        if self.stuck is None:
            return False
        home = self._told.graph.nodes[self.stuck.index].module
        around = set(_parents(home))
        return any(clue.path in around or clue.path.startswith(f"{home}." if home else "") for clue in clues)

    def advance(self, clues: Sequence[Clue], others: bool = False) -> bool:
        """Make changes and keep them if the run gets further; say whether it does.

        Changes in other modules than the one that is stuck were not asked for: where the run gets stuck in one of
        those, only what it needed on the way there is kept.
        """
        assert self.stuck is not None
        if not clues:
            return False
        before = _set(self.model, attributes_of(clues))
        now, reads = self._run()
        if now is not None and now.index <= self.stuck.index:
            _set(self.model, before)
            return False
        culprit = self._told.graph.nodes[now.index].module if others and now is not None else None
        if now is not None and any(clue.path == culprit for clue in clues):
            _set(self.model, before)
            passed = [clue for clue in clues if clue.node < now.index and clue.path != culprit]
            return self.advance(passed, others=True)
        self.clues.extend(clues)
        self.stuck, self.reads = now, reads
        return True


def _alike(model: nn.Module, told: _Foretold, clue: Clue, at: int, path: str) -> Clue | None:
    """Propose a change that helped for another op and module; None where not just one new value is possible.

    Where several are, one may be at the same place in the attribute.
    """
    module, names = model.get_submodule(path), {name for name, _ in clue.change}
    pairs = told.pairs_from(clue.source, module, path, at, names)
    tries = list(told.aligned(module, at, names)) or _tries(module, pairs, names)
    options = [tried for tried in islice(tries, _ATTEMPTS) if {name for name, _ in tried} == names]
    if len(options) > 1:
        options = [tried for tried in options if _places(module, tried) == clue.places]
    if len(options) > 1 and (at, path) == (clue.node, clue.path):
        options = [tried for tried in options if tried == clue.change]
    return Clue(at, path, options[0], clue.source, _places(module, options[0])) if len(options) == 1 else None


def _like(model: nn.Module, told: _Foretold, clue: Clue) -> Iterator[Clue]:
    """Propose a change that helped for every later module of the class.

    A deep network repeats one block many times; this saves a run for each.
    """
    nodes, path = told.graph.nodes, clue.path
    home = nodes[clue.node].module
    kinds = type(model.get_submodule(home)), type(model.get_submodule(path))
    done = {path, None}
    for later in range(clue.node + 1, len(nodes)):
        other = _counterpart(home, path, nodes[later].module)
        if other is None or other in done or nodes[later].op is not nodes[clue.node].op:
            continue
        homes = type(model.get_submodule(nodes[later].module))
        if homes is not kinds[0] or type(model.get_submodule(other)) is not kinds[1]:
            continue
        proposal = _alike(model, told, clue, later, other)
        if proposal is not None:
            done.add(other)
            yield proposal


def _counterpart(home: str, path: str, other_home: str) -> str | None:
    """Name the module that is to another one what a module around or inside `home` is to that; None if there is none.

    >>> _counterpart("a.attn", "a.attn.table", "b.attn"), _counterpart("a.attn", "a", "b.attn")
    ('b.attn.table', 'b')
    """
    if path == home or path.startswith(f"{home}."):
        return other_home + path.removeprefix(home)
    suffix = home.removeprefix(path)
    return other_home.removesuffix(suffix) if other_home.endswith(suffix) else None
