"""Find the widths that a forward holds or ties: model, coupling → a coupling whose every width may be changed.

Some forwards cannot follow every change of widths: a size is written into the code, or one number stands for two
widths. A trial narrows the channel groups at random, on the meta device. Where no attribute lets the run get past an
op, groups near that op are tied (see `ties`), and if that does not help, frozen: as few of them as will do.

The decision that is not obvious: a remedy is accepted for what it does, that the trial gets further, so nothing has to
be known of why. What helped in one module is then proposed for all others of its class, since networks repeat blocks.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

from torch import nn

from archscan.follow import Clue, Places
from archscan.graph import Graph, Node
from archscan.groups import Coupling, freeze
from archscan.rebuild import CannotFollow, hollow, rehearsed
from archscan.surgery import Kept
from archscan.ties import can_be_tied, tie
from archscan.wording import enumerated

_CLOSE = 6
"""Up to this many groups near an op, every pair of them is tried as a tie."""

_REMEDIES = 200
"""How many modules may need a remedy before giving up."""

Draw = Callable[[Coupling], Kept]
"""What a trial keeps."""


@dataclass(frozen=True, eq=False)
class Settled:
    """A coupling whose every width may be changed, as far as trials showed.

    Attributes:
        coupling: The given one with groups tied and frozen.
        notes: What was tied or frozen and why, a sentence each.
    """

    coupling: Coupling
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Remedy:
    """What to do with some groups near an op.

    Attributes:
        names: The groups.
        ties: Whether they keep one width; else they keep the full one.
        scope: Path of the module in which they were found.
        module: Path of the module whose forward cannot follow.
    """

    names: tuple[str, ...]
    ties: bool
    scope: str
    module: str

    def fits(self, coupling: Coupling) -> bool:
        """Say whether the change can be made."""
        groups = [group for group in coupling.groups if group.name in self.names]
        return (len(groups) > 1 and can_be_tied(groups)) if self.ties else all(g.frozen is None for g in groups)

    def applied(self, coupling: Coupling) -> Coupling:
        """Make the change."""
        if self.ties:
            return tie(coupling, self.names)
        reason = f"the forward of {self.module or 'the model'} hard-codes a width"
        return freeze(coupling, dict.fromkeys(self.names, reason))


def narrowed(coupling: Coupling, seed: int, full: float = 0.0) -> Kept:
    """Keep between a half and all but one of the steps of every live group, at random in each fibre.

    Args:
        coupling: Which groups there are, and which are frozen.
        seed: Of the draws; what is drawn for a group depends on its name, not on the other groups.
        full: Share of the groups that keep all.
    """
    kept = {}
    for group in coupling.groups:
        draw, count = random.Random(f"{seed} {group.name}"), group.steps
        if group.frozen is None and group.steps > 1 and draw.random() >= full:
            count = draw.randint((group.steps + 1) // 2, group.steps - 1)
        kept[group.name] = tuple(tuple(sorted(draw.sample(range(group.steps), count))) for _ in group.units)
    return kept


def _as_planned(kept: Kept, coupling: Coupling) -> Kept:
    """Keep what a plan for an earlier coupling kept, and everything of the groups that changed since."""
    result = {}
    for group in coupling.groups:
        wanted = kept.get(group.name, ())
        same = group.frozen is None and len(wanted) == len(group.units) and wanted[0][-1] < group.steps
        result[group.name] = wanted if same else (tuple(range(group.steps)),) * len(group.units)
    return result


def settle(model: nn.Module, example_input: Any, coupling: Coupling, planned: Kept | None = None) -> Settled:
    """Tie and freeze the groups of a coupling until the forward can follow.

    Args:
        model: The original, left unchanged.
        example_input: What it was captured with.
        coupling: What coupling said about it.
        planned: A plan that has to be possible too, as far as its groups are not changed.

    Raises:
        CannotFollow: Nothing is left to freeze, and the forward still cannot follow.
    """
    assert coupling.graph is not None
    bench = _Bench(hollow(model, coupling.graph), example_input, coupling.graph)
    draws: list[Draw] = [partial(narrowed, seed=0), partial(narrowed, seed=1, full=0.3)]
    if planned is not None:
        draws.append(partial(_as_planned, planned))
    done: list[tuple[_Remedy, CannotFollow]] = []
    for draw in draws:
        if planned is not None and draw is draws[-1]:
            bench.clues.clear()  # nobody tells `rebuild` what helped
        stuck = bench.trial(coupling, draw)
        while stuck is not None and len(done) < _REMEDIES:
            step = bench.known(coupling, draw, stuck) or bench.search(coupling, draw, draws[:2], stuck)
            done.extend((remedy, stuck) for remedy in step.remedies)
            coupling, stuck = step.coupling, step.stuck
    return Settled(coupling, tuple(_notes(done)))


def _notes(done: Sequence[tuple[_Remedy, CannotFollow]]) -> Iterator[str]:
    """Say what came of all remedies, a sentence for each set of groups that ended up together."""
    joined: dict[str, list[str]] = {}
    causes: dict[int, tuple[_Remedy, CannotFollow]] = {}
    for remedy, stuck in done:
        names = list(dict.fromkeys(name for own in remedy.names for name in joined.get(own, [own])))
        cause = next((causes.pop(id(joined[own])) for own in remedy.names if id(joined.get(own)) in causes), None)
        joined |= dict.fromkeys(names, names)
        causes[id(names)] = cause if cause is not None and remedy.ties else (remedy, stuck)
    for names in {id(names): names for names in joined.values()}.values():
        remedy, stuck = causes[id(names)]
        listed = [*names[:3], f"{len(names) - 3} more"] if len(names) > 3 else names
        who = enumerated(listed)
        detail = f" ({stuck.detail})" if remedy.module == stuck.module else ""
        where = remedy.module or "the model"
        if remedy.ties:
            yield f"{who} are narrowed together, since the forward of {where} ties their widths{detail}."
        else:
            keep = "keep" if len(names) > 1 else "keeps"
            yield f"{who} {keep} the full width, since the forward of {where} hard-codes it{detail}."


@dataclass(frozen=True, eq=False)
class _Step:
    """What remedies led to: the coupling with them, and where the trial is stuck now."""

    remedies: tuple[_Remedy, ...]
    coupling: Coupling
    stuck: CannotFollow | None


@dataclass(frozen=True, eq=False)
class _Recipe:
    """A remedy in terms of a class of modules: where in its forward the widths are."""

    kind: type
    ops: list[Any]
    places: tuple["_Place | None", ...]
    ties: bool


@dataclass(frozen=True, eq=False)
class _Bench:
    """Where trials are made; `recipes` and `clues` grow with what helped."""

    model: nn.Module
    example_input: Any
    graph: Graph
    recipes: list[_Recipe] = field(default_factory=list)
    clues: dict[tuple[int, str, Places], Clue] = field(default_factory=dict)

    def trial(self, coupling: Coupling, draw: Draw, before: CannotFollow | None = None) -> CannotFollow | None:
        """Cut the model as drawn; return what it cannot follow.

        What helped in other trials most likely helps again, but in the module that was stuck `before`.
        """
        likely = [clue for clue in self.clues.values() if before is None or clue.path != before.module]
        try:
            _, clues = rehearsed(self.model, self.example_input, coupling, draw(coupling), likely)
        except CannotFollow as stuck:
            self._note(stuck.clues)
            return stuck
        self._note(clues)
        return None

    def _note(self, clues: Sequence[Clue]) -> None:
        self.clues.update(((clue.node, clue.path, clue.places), clue) for clue in clues)

    def _outcome(
        self, coupling: Coupling, remedies: Sequence[_Remedy], draw: Draw, stuck: CannotFollow
    ) -> _Step | None:
        """Apply remedies; return what comes of them if the trial gets further than it was."""
        for remedy in remedies:
            coupling = remedy.applied(coupling)
        now = self.trial(coupling, draw, stuck)
        return _Step(tuple(remedies), coupling, now) if now is None or now.node > stuck.node else None

    def known(self, coupling: Coupling, draw: Draw, stuck: CannotFollow) -> _Step | None:
        """Do what helped before in a module of this class, in all modules of the class or in this one alone."""
        for scope in (None, stuck.module):
            remedies = self._likewise(coupling, scope)
            if any(remedy.scope == stuck.module for remedy in remedies):
                found = self._outcome(coupling, remedies, draw, stuck)
                if found:
                    return found
        return None

    def _likewise(self, coupling: Coupling, scope: str | None) -> list[_Remedy]:
        """Translate the recipes into remedies for one module, or for all of their classes."""
        remedies: list[_Remedy] = []
        for path, kind in self.graph.module_types.items():
            if scope not in (None, path) or all(recipe.kind is not kind for recipe in self.recipes):
                continue
            nodes = _inside(self.graph, path)
            for recipe in self.recipes:
                if recipe.kind is not kind or recipe.ops != [node.op for node in nodes]:
                    continue
                names = dict.fromkeys(name for place in recipe.places for name in _names_at(coupling, nodes, place))
                remedy = _Remedy(tuple(names), recipe.ties, path, path)
                if names and remedy.fits(coupling):
                    remedies.append(remedy)
                    coupling = remedy.applied(coupling)
        return remedies

    def search(self, coupling: Coupling, draw: Draw, draws: Sequence[Draw], stuck: CannotFollow) -> _Step:
        """Find a tie that lets the trials get further, or the fewest groups that have to be frozen.

        Raises:
            CannotFollow: Nothing helps.
        """
        for scope, names in self._near(coupling, stuck):
            for remedy in _possible_ties(coupling, scope, names, stuck.module):
                found = self._outcome(coupling, [remedy], draw, stuck)
                if found and all(self._holds(found, other, stuck) for other in draws if other is not draw):
                    return self._remembered(coupling, found)
            found = self._outcome(coupling, [_Remedy(tuple(names), False, scope, stuck.module)], draw, stuck)
            if not found:
                continue
            for name in reversed(names):
                fewer = tuple(other for other in found.remedies[0].names if other != name)
                less = [_Remedy(fewer, False, scope, stuck.module)]
                found = (self._outcome(coupling, less, draw, stuck) if fewer else None) or found
            return self._remembered(coupling, found)
        raise stuck

    def _holds(self, step: _Step, draw: Draw, stuck: CannotFollow) -> bool:
        """Say whether another draw is not stuck at the same op; it may be elsewhere, for other reasons."""
        now = self.trial(step.coupling, draw)
        return now is None or now.node != stuck.node

    def _remembered(self, before: Coupling, step: _Step) -> _Step:
        """Write down as a recipe what helped."""
        remedy = step.remedies[0]
        nodes = _inside(self.graph, remedy.scope)
        places = tuple(_place(before, nodes, name) for name in remedy.names)
        kind = self.graph.module_types[remedy.scope]
        self.recipes.append(_Recipe(kind, [node.op for node in nodes], places, remedy.ties))
        return step

    def _near(self, coupling: Coupling, stuck: CannotFollow) -> Iterator[tuple[str, list[str]]]:
        """Yield the live groups in the module that is stuck, then in each module around it; the nearest first."""
        here = self.graph.nodes[stuck.node : stuck.node + 1]
        path, before = stuck.module, 0
        while True:
            nodes = [*here, *_inside(self.graph, path)]
            numbers = dict.fromkeys(group for node in nodes for group in _groups_of(coupling, node))
            names = [coupling.groups[number].name for number in numbers if _is_live(coupling, number)]
            if len(names) > before:
                yield path, names
            before = len(names)
            if not path:
                return
            path = path.rpartition(".")[0]


def _possible_ties(coupling: Coupling, scope: str, names: Sequence[str], module: str) -> Iterator[_Remedy]:
    pairs = combinations(names if len(names) <= _CLOSE else (), 2)
    remedies = (_Remedy(pair, True, scope, module) for pair in pairs)
    yield from (remedy for remedy in remedies if remedy.fits(coupling))


def _inside(graph: Graph, path: str) -> list[Node]:
    """List the ops of a module and of those below it."""
    prefix = f"{path}." if path else ""
    return [node for node in graph.nodes if node.module == path or node.module.startswith(prefix)]


def _groups_of(coupling: Coupling, node: Node) -> Iterator[int]:
    """Yield the numbers of the groups whose widths the tensors of an op have."""
    assert coupling.sizes is not None
    for number in (*node.tensors, *node.outputs):
        if number is not None:
            for size in coupling.sizes(number):
                yield from size.per_step


def _is_live(coupling: Coupling, number: int) -> bool:
    group = coupling.groups[number]
    return group.frozen is None and group.steps > 1


_Place = tuple[int, int, int]
"""Where a width is in a module: number of the op, of its tensor, of the axis."""


def _widths(coupling: Coupling, nodes: Sequence[Node]) -> Iterator[tuple[_Place, str]]:
    """Yield the places at which an axis has the width of a single group, and that group's name."""
    assert coupling.sizes is not None
    for at, node in enumerate(nodes):
        for which, number in enumerate((*node.tensors, *node.outputs)):
            for axis, size in enumerate(() if number is None else coupling.sizes(number)):
                if len(size.per_step) == 1:
                    yield (at, which, axis), coupling.groups[next(iter(size.per_step))].name


def _place(coupling: Coupling, nodes: Sequence[Node], name: str) -> _Place | None:
    return next((place for place, found in _widths(coupling, nodes) if found == name), None)


def _names_at(coupling: Coupling, nodes: Sequence[Node], wanted: _Place | None) -> list[str]:
    return [name for place, name in _widths(coupling, nodes) if place == wanted]
