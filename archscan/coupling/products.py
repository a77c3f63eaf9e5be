"""Rules for matrix products: weights read channels, and activations meet each other, as in attention.

Channels that two activations sum over have no weight that reads them, so they stay as they are. But where the batch
axis of a product is labelled, as by the heads of an attention, whole heads may go, in the queries and keys as in the
values. Whether that leaves anything to choose from is seen at the end (see `components`); here it is proposed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

from torch import Tensor

from archscan.coupling import planes
from archscan.coupling.contractions import read, weight_name
from archscan.coupling.labels import Planes, WholeRows
from archscan.coupling.walk import Walk, op_name, rule, unite_all
from archscan.graph import Node, Ref


@dataclass
class _Operand:
    """What one operand of a product brings along.

    Attributes:
        weight: Whether it does not depend on the input.
        summed: Labels of the plane that runs along the summed axis alone.
        heads: Matrices of labels [head, everything else] of the planes that run along a batch axis.
        contracted: Such matrices [row, everything else] of the planes that run along the summed axis and another one.
        results: What is left of its planes in the product.
    """

    weight: bool
    summed: Tensor | None = None
    heads: list[Tensor] = field(default_factory=list)
    contracted: list[Tensor] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)


@rule("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "vdot")
def product(walk: Walk, node: Node) -> Sequence[Planes]:
    """Contract the last axis of the left with the first matrix axis of the right operand."""
    first = 1 if op_name(node).startswith(("add", "badd")) else 0
    refs, out, where = (node.args[first], node.args[first + 1]), walk.out_shape(node), walk.where(node)
    axes = len(walk.shape(refs[0])) - 1, max(len(walk.shape(refs[1])) - 2, 0)
    sides = _look(walk, refs[0], axes[0], -1, out), _look(walk, refs[1], axes[1], axes[1], out)
    _contract(walk, node, sides, refs)
    results = _distinct([plane for side in sides for plane in side.results])
    if first:
        operands: list[tuple[Planes, Sequence[int]]] = [
            (tuple(results), out),
            (walk.of(node.args[0]), walk.shape(node.args[0])),
        ]
        return [unite_all(walk, out, operands, where)]
    return [tuple(results)]


def _look(walk: Walk, ref: Ref, axis: int, gap: int, out: Sequence[int]) -> _Operand:
    """Sort the planes of an operand, which is summed over `axis`; the product has the other operand's axis at `gap`."""
    # A weight that is repeated for each sample grows with the batch, but does not depend on the input.
    side = _Operand(not walk.graph.values[ref.value].per_sample or bool(weight_name(walk, ref)))
    batch = 0 if len(walk.shape(ref)) == 3 else None
    for plane in walk.of(ref):
        varies = planes.varying(plane)
        if varies == (axis,):
            side.summed = planes.vector(plane, axis)
            continue
        if batch in varies:
            side.heads.append(planes.rows(plane, 0))
        if axis in varies:
            side.contracted.append(planes.rows(plane, next(other for other in varies if other != axis)))
        elif side.weight and batch not in varies:
            walk.record.written.append(planes.vector(plane, varies[0]))
        free = plane.select(axis, 0).unsqueeze(gap)
        side.results.append(free.expand(out) if len(out) == free.ndim else free.squeeze(-1).expand(out))
    return side


def _contract(walk: Walk, node: Node, sides: tuple[_Operand, _Operand], refs: tuple[Ref, Ref]) -> None:
    """Record what the summed axis and the batch axis couple."""
    ends = [side.summed for side in sides if side.summed is not None]
    rows = [matrix for side in sides for matrix in side.contracted]
    reason = f"contracted between activations ({walk.where(node)})"
    if sides[0].weight and sides[1].weight:
        reason = f"a weight is computed from a product over its channels ({walk.where(node)})"
    if sides[0].heads or sides[1].heads:
        _propose_heads(walk, sides, tuple([*rows, *ends] if rows else []), tuple(ends if rows else []), reason)
    elif rows:  # the rows of a matrix: all of them are read by one weight
        walk.record.whole_rows.append(WholeRows(tuple(rows), tuple(ends), (*rows, *ends), (), reason))
    if rows:
        return
    if sides[0].weight == sides[1].weight:
        for labels in ends:
            walk.record.freeze(labels, reason)
    else:
        weight = 0 if sides[0].weight else 1
        read(walk, node, sides[1 - weight].summed, sides[weight].summed, refs[weight])


def _propose_heads(
    walk: Walk, sides: tuple[_Operand, _Operand], stays: tuple[Tensor, ...], shared: tuple[Tensor, ...], reason: str
) -> None:
    """Propose that heads go as a whole, in both operands; where one of them has none, nothing may go."""
    heads = [matrix for side in sides for matrix in side.heads]
    alone = [matrix for matrix in heads if matrix.shape[1] == 1]
    if not (sides[0].heads and sides[1].heads):
        for labels in (*stays, *alone):
            walk.record.freeze(labels, reason)
        for matrix in heads:
            walk.record.balance(matrix, walk.where(walk.graph.nodes[walk.at]))
        return
    for matrix in alone[1:]:
        walk.record.unite(alone[0], matrix)
    otherwise = (*stays, *alone) if len(alone) < len(heads) else stays
    walk.record.whole_rows.append(WholeRows(tuple(heads), shared, otherwise, (), reason))


def _distinct(results: Sequence[Tensor]) -> list[Tensor]:
    """Leave out planes whose axes another plane runs along too: they have been united with it, or frozen."""
    kept: list[Tensor] = []
    for plane in sorted(results, key=lambda plane: -len(planes.varying(plane))):
        own = set(planes.varying(plane))
        if own and not any(own <= set(planes.varying(other)) for other in kept):
            kept.append(plane)
    return kept


def cross(walk: Walk, own: Planes, runs: Sequence[Sequence[int]], where: str) -> Planes:
    """Join planes along axes that are about to be flattened into one: places are told apart by both.

    The rows, of the outer axis, go as a whole, and what runs along the inner one stays as it is; or the other way
    round where no row could go. What no layer has written, such as windows and places, stays as it is.

    Args:
        walk: The pass.
        own: Planes of a value.
        runs: Axes that are flattened together.
        where: Place, for a reason.
    """
    for run in runs:
        lying = [plane for plane in own if set(planes.varying(plane)) & set(run)]
        apart = any(not set(planes.varying(one)) & set(planes.varying(other)) for one, other in combinations(lying, 2))
        if not apart:
            continue
        channels = [plane for plane in lying if _is_written(walk, plane)] or lying[:1]
        joined = channels[0]
        if [len(planes.varying(plane)) for plane in channels] == [1, 1]:
            outer, inner = sorted(channels, key=planes.varying)
            joined = _joined(walk, outer, inner, where)
        elif len(channels) > 1:
            channels = []
        for plane in lying:
            if not any(plane is other for other in channels):
                walk.record.freeze(plane, f"flattened with other channels ({where})")
        own = (joined, *(plane for plane in own if not any(plane is other for other in lying)))
    return tuple(own)


def _is_written(walk: Walk, plane: Tensor) -> bool:
    """Whether a layer writes the channels of a plane."""
    return bool(walk.record.written_marks()[planes.compress(plane)].any())


def _joined(walk: Walk, outer: Tensor, inner: Tensor, where: str) -> Tensor:
    """Give each pair of places along the one axis of two planes a label of its own."""
    axes = planes.varying(outer)[0], planes.varying(inner)[0]
    sizes = [outer.shape[axis] for axis in axes]
    labels = walk.record.fresh(sizes[0] * sizes[1]).reshape(sizes)
    row, column = planes.vector(outer, axes[0])[:, None], planes.vector(inner, axes[1])[None]
    reason = f"flattened with other channels ({where})"
    walk.record.whole_rows.append(
        WholeRows((row, labels), (column,), (row,), ((column.expand(sizes), labels),), reason)
    )
    shape = [extent if axis in axes else 1 for axis, extent in enumerate(outer.shape)]
    return labels.reshape(shape).expand(outer.shape)
