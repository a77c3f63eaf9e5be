"""Which groups can get wider and leave what the network computes: model, coupling, sources → proof and refusals.

Copies of a channel change what is taken over all channels: the statistics of a LayerNorm unless every channel is copied
equally often, the norm of a weight that is divided by it, a convolution that slides along channels, a plain sum.

The decision that is not obvious: no table says so. All groups are widened at once and compared with the original, in
float64, as it is and with randomised normalisation; only where that fails is each group tried alone. What went wrong
is then looked up in the coupling, for the sentence of the refusal.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from archscan.errors import RebuildMismatch
from archscan.groups import ChannelGroup, Coupling
from archscan.rebuild import CannotFollow, Rebuilt, rebuild
from archscan.replan import settled
from archscan.results import Analysis
from archscan.same_statistics import statistic_places
from archscan.verify import Verification, prove
from archscan.widening.copies import Sources, all_sources, evenly


@dataclass(frozen=True, eq=False)
class Trial:
    """What came of widening.

    Attributes:
        rebuilt: The wider network; the original's copy where no group can get wider.
        sources: The groups that do.
        verification: The comparison with the original.
        refused: The others → why they cannot.
        analysis: The one given, with groups tied or frozen where a forward holds their width.
        notes: What was tied or frozen and why, a sentence each.
    """

    rebuilt: Rebuilt
    sources: Sources
    verification: Verification
    refused: dict[str, str]
    analysis: Analysis
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Bench:
    """What is widened, and what it is run on."""

    model: nn.Module
    example_input: Any
    telling_input: Any
    seed: int

    def widen(self, coupling: Coupling, sources: Sources) -> tuple[Rebuilt, Verification]:
        """Widen and compare with the original itself, statistics over channels and all."""
        kept = all_sources(coupling.groups, sources)
        rebuilt = rebuild(self.model, self.example_input, coupling, kept)
        strict = replace(coupling, mixing=())
        proof = prove(self.model, rebuilt.model, rebuilt.surgery, strict, kept, self.telling_input, seed=self.seed)
        return rebuilt, proof


def try_wider(bench: Bench, analysis: Analysis, sources: Sources) -> Trial:
    """Widen as many of the groups as can be.

    Args:
        bench: The network.
        analysis: Its coupling and costs.
        sources: What each group would copy.

    Raises:
        RebuildMismatch: Groups that can be widened one by one cannot be together.
    """
    notes: tuple[str, ...] = ()
    refused: dict[str, str] = {}
    found = _outcome(bench, analysis.coupling, sources)
    if isinstance(found, CannotFollow):
        analysis, notes = settled(bench.model, bench.example_input, analysis)
        refused = dict(held(analysis.coupling, sources))
        sources = without(sources, refused)
        found = _outcome(bench, analysis.coupling, sources)
    if isinstance(found, RebuildMismatch):
        for name, steps in sources.items():
            alone = _outcome(bench, analysis.coupling, {name: steps})
            if isinstance(alone, RebuildMismatch):
                refused[name] = _why(analysis.coupling, name, sources, alone)
        sources = without(sources, refused)
        found = _outcome(bench, analysis.coupling, sources)
    if isinstance(found, RebuildMismatch):
        raise RebuildMismatch(
            f"the widened network is not the original ({found}), though each group alone can be widened, so that "
            "nothing was written; please report this network"
        )
    return Trial(found[0], sources, found[1], refused, analysis, notes)


def without(sources: Sources, refused: Iterable[str]) -> Sources:
    """Leave groups out."""
    return {name: steps for name, steps in sources.items() if name not in set(refused)}


def _outcome(bench: Bench, coupling: Coupling, sources: Sources) -> tuple[Rebuilt, Verification] | RebuildMismatch:
    """Widen and compare; return what failed where something did."""
    try:
        rebuilt, proof = bench.widen(coupling, sources)
    except RebuildMismatch as error:
        return error
    return (rebuilt, proof) if proof.passed else RebuildMismatch(proof.reason)


def held(coupling: Coupling, sources: Sources) -> Iterator[tuple[str, str]]:
    """Yield the groups whose width a forward holds or ties to that of others, and why they cannot get wider."""
    now = {group.name: group for group in coupling.groups}
    for name, steps in sources.items():
        group = now.get(name)
        if group is None or len(group.units) != len(steps) or group.steps != max(steps[0]) + 1:
            yield name, "the forward ties its width to that of other groups"
        elif group.frozen is not None:
            yield name, group.frozen


def _why(coupling: Coupling, name: str, sources: Sources, seen: RebuildMismatch) -> str:
    """Say why a group cannot get wider, as far as the coupling tells."""
    if isinstance(seen, CannotFollow):
        return f"the forward of {seen.module or 'the model'} hard-codes a width ({seen.detail})"
    number, group = next((i, group) for i, group in enumerate(coupling.groups) if group.name == name)
    places = [text for text in coupling.mixing if _touches(coupling, number, text)]
    if places and not evenly(sources[name]):
        return f"statistics over its channels ({places[0]}) stay the same only where each is copied equally often"
    if places:
        return f"its channels are taken together ({places[0]}), and copies would change what comes of that"
    computed = _computed_weight(coupling, group)
    if computed:
        return f"{computed} is not itself the weight that reads its channels, so that its shares would not add up"
    return f"copies of its channels change what the network computes ({seen})"


def _touches(coupling: Coupling, number: int, mixing: str) -> bool:
    """Say whether channels of a group are among those that an op takes together."""
    assert coupling.graph is not None
    assert coupling.sizes is not None
    for op, path in statistic_places([mixing]):
        for node in coupling.graph.nodes:
            if str(node.op).split(".")[1] == op and node.module == path:
                values = [value for value in (*node.tensors, *node.outputs) if value is not None]
                if any(number in size.per_step for value in values for size in coupling.sizes(value)):
                    return True
    return False


def _computed_weight(coupling: Coupling, group: ChannelGroup) -> str:
    """Name the first parameter that a weight is computed from which reads the group; empty where there is none."""
    weights = {consumer.weight for consumer in coupling.consumers}
    read = (member.tensor for member in group.members if member.role == "in")
    return next((tensor for tensor in read if tensor not in weights), "")
