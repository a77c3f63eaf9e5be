"""Which tensors are in memory at the same time: recorded run → the live values of each moment.

A tensor is held from the op that writes it to the last op that reads it, as a runtime with a memory plan holds it;
eager Python may hold one a little longer, as long as a name refers to it. The model's input and all that ops allocate
count, parameters and buffers do not. Views, and ops that write in place, hold the storage of what they were made of.
The decision that is not obvious: an output that nobody reads (the indices of a max pool, saved statistics) is left out,
since a runtime for inference does not write it.
"""

from dataclasses import dataclass

import torch

from archscan.graph import Graph, Node, Ref, leaves_of

_SHARING = frozenset(
    {
        torch.ops.aten._unsafe_view.default,
        torch.ops.aten.unsafe_split.Tensor,
        torch.ops.aten.unsafe_split_with_sizes.default,
        torch.ops.aten.unsafe_chunk.default,
    }
)
"""Ops whose outputs share their input's storage although their schema does not say so."""


@dataclass(frozen=True)
class Storages:
    """Which values share memory.

    Attributes:
        of: Number of the value whose storage each value lies in, by number of value.
        new: Numbers of the values that each node allocates, by node.
    """

    of: tuple[int, ...]
    new: tuple[tuple[int, ...], ...]


def storages(graph: Graph) -> Storages:
    """Follow views and in-place ops to what allocated the memory."""
    of = list(range(len(graph.values)))
    made: set[int] = set()
    seen = {number for node in graph.nodes for number in node.tensors}
    new = []
    for node in graph.nodes:
        source = shared_input(node)
        fresh = []
        for number in node.outputs:
            if number is None or number in made or number in node.tensors:
                continue
            made.add(number)
            if source is not None:
                of[number] = of[source]
            elif number in seen or number in graph.outputs:
                fresh.append(number)
        new.append(tuple(fresh))
    return Storages(tuple(of), tuple(new))


def shared_input(node: Node) -> int | None:
    """Return the value whose storage a node's outputs lie in; None where it allocates."""
    if node.op in _SHARING:
        return node.tensors[0]
    schema = node.op._schema
    if not any(returned.alias_info is not None for returned in schema.returns):
        return None
    for declared, argument in zip(schema.arguments, node.args, strict=False):
        refs = [leaf.value for leaf in leaves_of([argument]) if isinstance(leaf, Ref)]
        if declared.alias_info is not None and refs:
            return refs[0]
    return None


def may_copy_or_share(graph: Graph, place: int) -> bool:
    """Say whether it is all the same if what a node returns shares the memory of its input or is a copy of it.

    It is not where one of the two is written to in place, and the other one read later.

    Args:
        graph: A recorded run.
        place: Number of a node that returns its first input, or a copy of it, in whatever shape.
    """
    if not any(later.op._schema.is_mutable for later in graph.nodes[place + 1 :]):
        return True
    node = graph.nodes[place]
    of, derived = storages(graph).of, set(node.outputs)
    given = {number for number in range(len(graph.values)) if of[number] == of[node.tensors[0]]}
    stale: set[int | None] = set()
    for later in graph.nodes[place + 1 :]:
        if not stale.isdisjoint(later.tensors):
            return False
        written = shared_input(later)
        if written in derived:
            derived.update(later.outputs)
        if written is not None and later.op._schema.is_mutable:
            stale |= (given - derived) if written in derived else derived if written in given else set()
    return stale.isdisjoint(graph.outputs)


def moments(graph: Graph) -> tuple[frozenset[int], ...]:
    """List the sets of values that are held at the same time, by the number of the value that owns the storage.

    Sets that lie within another are left out, so that the largest of what is returned is the peak.
    """
    shared = storages(graph)
    last_use: dict[int, int] = {}
    for place, node in enumerate(graph.nodes):
        for number in (*node.tensors, *(number for number in node.outputs if number is not None)):
            last_use[shared.of[number]] = place
    for number in graph.outputs:
        last_use[shared.of[number]] = len(graph.nodes)
    inputs = (number for number, value in enumerate(graph.values) if value.kind == "input")
    held = {number for number in inputs if number in last_use}
    found: list[frozenset[int]] = []
    for place in range(len(graph.nodes)):
        if shared.new[place]:
            held.update(shared.new[place])
            _add(found, frozenset(held))
        held = {number for number in held if last_use[number] > place}
    return tuple(found)


def _add(found: list[frozenset[int]], now: frozenset[int]) -> None:
    """Keep only sets that lie in no other; neighbours in time are the ones that do."""
    if found and now <= found[-1]:
        return
    if found and found[-1] <= now:
        found.pop()
    found.append(now)
