"""Rules for ops that only move, join or make channels: most are executed verbatim on the planes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from archscan.coupling import planes
from archscan.coupling.labels import Grid, Planes, WholeRows
from archscan.coupling.products import cross
from archscan.coupling.walk import Count, Walk, op_name, rule, unite_all
from archscan.graph import Node, Ref


@rule(
    "clone",
    "detach",
    "alias",
    "contiguous",
    "lift_fresh",
    "_to_copy",
    "to",
    "bernoulli",
    "uniform",
    "normal",
    "dropout",
    "zero",
)
def passes(walk: Walk, node: Node) -> Sequence[Planes]:
    """Keep the channels of the first argument."""
    return [walk.of(node.args[0])]


@rule("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
def like(walk: Walk, node: Node) -> Sequence[Planes]:
    """Follow the size of the argument: a new tensor whose content is the same at every place."""
    return [walk.of(node.args[0])]


@rule(
    "empty", "zeros", "ones", "full", "new_empty", "new_zeros", "new_ones", "new_full", "rand", "randn", "scalar_tensor"
)
def factory(walk: Walk, node: Node) -> Sequence[Planes]:
    """Give a tensor whose content is the same at every place labels of its own: it may have any width that it meets."""
    shape = walk.out_shape(node)
    fresh = [planes.along(walk.record.fresh(size), shape, axis) for axis, size in enumerate(shape) if size > 1]
    return [tuple(fresh)]


@rule("arange", "eye", "linspace", "_assert_async", "_assert_tensor_metadata", "_local_scalar_dense", "randperm")
def unlabelled(walk: Walk, node: Node) -> Sequence[Planes]:
    """Make nothing that has channels."""
    return [()] * len(node.outputs)


@rule(*["permute", "transpose", "t", "unsqueeze", "squeeze", "movedim", "swapaxes", "numpy_T"])
def view(walk: Walk, node: Node) -> Sequence[Planes]:
    """Execute the op verbatim on each plane."""
    results = [_verbatim(node, plane) for plane in walk.of(node.args[0])]
    return [tuple(result[i] for result in results if planes.varying(result[i])) for i in range(len(node.outputs))]


@rule("expand")
def expand(walk: Walk, node: Node) -> Sequence[Planes]:
    """Execute verbatim, and give the axes along which a value is repeated labels of their own, as `factory` does.

    A weight that is repeated for each sample gets none for that.
    """
    out, shape = walk.out_shape(node), walk.shape(node.args[0])
    old = (1,) * (len(out) - len(shape)) + tuple(shape)
    axes = [axis for axis, size in enumerate(out) if size > 1 and old[axis] == 1]
    if not walk.graph.values[node.args[0].value].per_sample and out[0] == walk.graph.batch_size:
        axes = [axis for axis in axes if axis > 0]
    fresh = tuple(planes.along(walk.record.fresh(out[axis]), out, axis) for axis in axes)
    return [(*view(walk, node)[0], *fresh)]


def _verbatim(node: Node, plane: Tensor) -> list[Tensor]:
    """Run the op with its first tensor argument replaced by a plane."""
    args = tree_map(lambda leaf: leaf if not isinstance(leaf, Ref) else None, node.args[1:])
    result = node.op(plane, *args, **node.kwargs)
    return list(result) if isinstance(result, (tuple, list)) else [result]


@rule("select", "unbind", "diagonal")
def pick(walk: Walk, node: Node) -> Sequence[Planes]:
    """Execute verbatim; where one channel is picked by its number, its whole axis is frozen."""
    axis = node.args[1] if len(node.args) > 1 else 0
    for plane in walk.of(node.args[0]):
        if not any(planes.varying(result) for result in _verbatim(node, plane)):
            walk.record.freeze(plane, f"picked by number ({walk.where(node)})")
        elif op_name(node) != "diagonal" and axis % plane.ndim in planes.varying(plane):
            _pick_within_rows(walk, plane, axis % plane.ndim, walk.where(node))
    return view(walk, node)


def _pick_within_rows(walk: Walk, plane: Tensor, axis: int, where: str) -> bool:
    """Propose that rows go as a whole where places are picked within rows by number; say whether they are."""
    others = [other for other in planes.varying(plane) if other != axis]
    first, second = planes.vector(plane, axis)[:2].tolist()
    grids = (known.labels for known in walk.record.grids if others)
    if not any(((grid == first).any(-1) & (grid == second).any(-1)).any() for grid in grids):
        return False
    rows = planes.rows(plane, others[0])
    walk.record.whole_rows.append(WholeRows((rows,), (), (rows,), (), f"picked by number ({where})"))
    return True


@rule("repeat", "tile", "unfold", "roll")
def verbatim_in_space(walk: Walk, node: Node) -> Sequence[Planes]:
    """Execute verbatim on axes without labels; channels that would be repeated or rolled are frozen."""
    for plane in walk.of(node.args[0]):
        varies = planes.varying(plane)
        last = list(range(plane.ndim))
        if op_name(node) == "unfold":
            touched = {node.args[1] % plane.ndim}
        elif op_name(node) == "roll":
            touched = {axis % plane.ndim for axis in node.args[2]} if len(node.args) > 2 else set(last)
        else:
            extra = len(node.args[1]) - plane.ndim
            touched = {axis for axis in last if node.args[1][axis + extra] > 1}
        if touched & set(varies):
            walk.record.freeze(plane, f"moved along the channel axis ({walk.where(node)})")
            return [()]
    return view(walk, node)


@rule("index", "index_select", "gather")
def index(walk: Walk, node: Node) -> Sequence[Planes]:
    """Keep the labels of axes that no index runs along; what is picked by computed numbers is frozen."""
    shape, out = walk.shape(node.args[0]), walk.out_shape(node)
    if op_name(node) == "index":
        indexed = [axis for axis, given in enumerate(node.args[1]) if given is not None]
    else:
        indexed = [node.args[1] % len(shape)] if op_name(node) == "index_select" else list(range(len(shape)))
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    inserted = len(out) - (len(shape) - len(indexed))
    start = indexed[0] if adjacent else 0
    results = []
    for plane in walk.of(node.args[0]):
        if set(planes.varying(plane)) & set(indexed) or inserted < 0:
            walk.record.freeze(plane, f"picked by computed numbers ({walk.where(node)})")
            continue
        for axis in reversed(indexed):
            plane = plane.select(axis, 0)
        for _ in range(inserted):
            plane = plane.unsqueeze(start)
        results.append(plane.expand(out))
    return [tuple(results)]


@rule("pixel_shuffle", "pixel_unshuffle", "im2col", "col2im")
def fold_space(walk: Walk, node: Node) -> Sequence[Planes]:
    """Trade channels for places: the channels that make up one channel's places are one unit."""
    out, name = walk.out_shape(node), op_name(node)
    back = 2 if name == "col2im" else 3
    results = []
    for plane in walk.of(node.args[0]):
        if planes.varying(plane) != (plane.ndim - back,):
            walk.record.freeze(plane, f"channels lie along a spatial axis ({walk.where(node)})")
            continue
        labels = planes.vector(plane, plane.ndim - back)
        axis = len(out) - (2 if name == "im2col" else 3)
        if name in ("pixel_shuffle", "col2im"):
            grid = labels.reshape(out[axis], -1)
            walk.record.unite(grid, grid[:, :1])
            labels = grid[:, 0]
        else:
            labels = labels.repeat_interleave(out[axis] // len(labels))
        results.append(planes.along(labels, out, axis))
    return [tuple(results)]


@rule("slice")
def narrow(walk: Walk, node: Node) -> Sequence[Planes]:
    """Execute verbatim; the bounds of a window count channels. One picked channel, or every n-th, freezes its axis."""
    defaults: list[Any] = [0, None, None, 1]
    axis, start, end, step = [*node.args[1:], *defaults[len(node.args) - 1 :]]
    for plane in walk.of(node.args[0]):
        size = plane.shape[axis]
        first, last, _ = slice(start, end).indices(size)
        if axis % plane.ndim not in planes.varying(plane) or (step == 1 and (first, last) == (0, size)):
            continue
        if step != 1 or last - first == 1:
            if not _pick_within_rows(walk, plane, axis % plane.ndim, walk.where(node)):
                walk.record.freeze(plane, f"picked by number ({walk.where(node)})")
            continue
        labels = planes.rows(plane, axis).T
        bounds = [start or 0, size if end is None else end]
        counted = [
            labels[:, :bound] if 0 <= bound <= size else labels[:, bound:] if bound < 0 else None for bound in bounds
        ]
        counts: list[Count] = [(axis, None), (bounds[0], counted[0]), (bounds[1], counted[1])]
        walk.counts[walk.at] = counts
    return view(walk, node)


@rule("split", "split_with_sizes", "chunk")
def split(walk: Walk, node: Node) -> Sequence[Planes]:
    """Execute verbatim; pieces must keep equal numbers of channels, unless each has been given a size of its own."""
    axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    for plane in walk.of(node.args[0]) if op_name(node) != "split_with_sizes" else ():
        axis %= plane.ndim
        sizes = {walk.shape(number)[axis] for number in node.outputs if number is not None}
        if axis in planes.varying(plane) and len(sizes) == 1:
            walk.record.balance(planes.vector(plane, axis).reshape(len(node.outputs), -1), walk.where(node))
    return view(walk, node)


@rule("view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten")
def reshape(walk: Walk, node: Node) -> Sequence[Planes]:
    """Reshape the planes; see `resolve_merge` for flattened and `Record.balance` for unfolded channel axes."""
    out, where = walk.out_shape(node), walk.where(node)
    runs = [left for left, right in planes.axis_groups(walk.shape(node.args[0]), out) if len(left) > len(right)]
    results = []
    for plane in cross(walk, walk.of(node.args[0]), runs, where):
        done = planes.reshape(plane, out)
        for grid in done.merged:
            resolve_merge(walk, grid, where)
        for grid in done.split:
            walk.record.balance(grid, where, rows_may_go=True)
        results.append(done.plane)
    return [tuple(results)]


def resolve_merge(walk: Walk, axes: Tensor, where: str) -> None:
    """Decide what keeps flattened axes of labels [outer …, inner] in order when channels are removed.

    Where the rows are the fibres of an earlier split, removing equally many from each row keeps the order. Where the
    columns are (a channel shuffle), the k-th of every column end up side by side, so each row must go as a whole.
    Otherwise rows must keep equal numbers.
    """
    grid = axes.reshape(-1, axes.shape[-1])
    for known in reversed(walk.record.grids):
        rows_known = known.labels.reshape(-1, known.labels.shape[-1])
        row_of = {label: row for row, labels in enumerate(rows_known.tolist()) for label in labels}
        rows = [[row_of.get(label) for label in labels] for labels in grid.tolist()]
        if any(row is None for labels in rows for row in labels):
            continue
        if all(len(set(labels)) == 1 for labels in rows):
            return
        if all(len(set(labels)) == 1 for labels in zip(*rows, strict=True)):
            walk.record.keep_in_step(grid.T, where)
            return
    walk.record.balance(axes, where, rows_may_go=True)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(walk: Walk, node: Node) -> Sequence[Planes]:
    """Shuffle the labels; every group must lose the same places, for the op interleaves them and counts its groups."""
    groups, results = node.args[1], []
    for plane in walk.of(node.args[0]):
        if 1 not in planes.varying(plane):
            results.append(plane)
            continue
        grid = planes.vector(plane, 1).reshape(groups, -1)
        walk.record.grids.append(Grid(grid, walk.where(node), in_step=True))
        results.append(planes.along(grid.T.reshape(-1), walk.out_shape(node), 1))
    return [tuple(results)]


@rule("as_strided")
def restride(walk: Walk, node: Node) -> Sequence[Planes]:
    """Pass a change of memory layout through; freeze a change of size."""
    if walk.out_shape(node) == walk.shape(node.args[0]):
        return [walk.of(node.args[0])]
    for plane in walk.of(node.args[0]):
        walk.record.freeze(plane, f"viewed by strides ({walk.where(node)})")
    return [()]


@rule("flip")
def flip(walk: Walk, node: Node) -> Sequence[Planes]:
    """Execute verbatim on the axes that vary."""
    shape = walk.out_shape(node)
    return [tuple(torch.flip(planes.compress(plane), node.args[1]).expand(shape) for plane in walk.of(node.args[0]))]


@rule("cat")
def cat(walk: Walk, node: Node) -> Sequence[Planes]:
    """Concatenate planes along their own axis; along another, unite them place by place."""
    shape = walk.out_shape(node)
    axis = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(shape)
    refs = [ref for ref in node.args[0] if walk.shape(ref) != (0,)]
    across: list[tuple[Planes, Sequence[int]]] = []
    joined: list[Tensor] = []
    for ref in refs:
        size = walk.shape(ref)
        lying = [plane for plane in walk.of(ref) if axis in planes.varying(plane)]
        joined.append(lying[0] if lying else torch.zeros((), dtype=torch.int64).expand(size))
        standing = tuple(plane.narrow(axis, 0, 1) for plane in walk.of(ref) if axis not in planes.varying(plane))
        across.append((standing, tuple(1 if i == axis else extent for i, extent in enumerate(size))))
    flat = tuple(1 if i == axis else extent for i, extent in enumerate(shape))
    result = [plane.expand(shape) for plane in unite_all(walk, flat, across, walk.where(node))]
    axes = sorted({i for plane in joined for i in planes.varying(plane)} | {axis})
    if any(planes.varying(plane) for plane in joined):
        result.append(torch.cat([planes.compress(plane, axes) for plane in joined], dim=axis).expand(shape))
    return [tuple(result)]


@rule("stack")
def stack(walk: Walk, node: Node) -> Sequence[Planes]:
    """Stack planes along a new axis, each with its own labels."""
    shape = walk.out_shape(node)
    axis = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(shape)
    first = [
        walk.of(ref)[0] if walk.of(ref) else torch.zeros((), dtype=torch.int64).expand(walk.shape(ref))
        for ref in node.args[0]
    ]
    for ref in node.args[0]:
        for extra in walk.of(ref)[1:]:
            walk.record.freeze(extra, f"stacked with another channel axis ({walk.where(node)})")
    axes = sorted({i for plane in first for i in planes.varying(plane)})
    if not axes:
        return [()]
    result = torch.stack([planes.compress(plane, axes) for plane in first], dim=axis).expand(shape)
    for lying in axes:
        grid = planes.matrix(result, [axis, lying + (lying >= axis)])
        walk.record.balance(grid, walk.where(node))
    return [(result,)]


@rule("constant_pad_nd")
def pad(walk: Walk, node: Node) -> Sequence[Planes]:
    """Give padded places along a channel axis labels of their own; a padded border in space belongs to its channel."""
    shape, amounts = walk.out_shape(node), node.args[1]
    results = []
    for plane in walk.of(node.args[0]):
        axes = planes.varying(plane)
        small = planes.compress(plane)
        for pair in range(len(amounts) // 2):
            axis, before, after = plane.ndim - 1 - pair, amounts[2 * pair], amounts[2 * pair + 1]
            if axis not in axes or not (before or after):
                continue
            if before < 0 or after < 0:
                walk.record.freeze(plane, f"cropped by a negative padding ({walk.where(node)})")
                continue
            ends = [_fresh_like(walk, small, axis, amount) for amount in (before, after)]
            walk.counts.setdefault(walk.at, []).extend(
                (amount, end.movedim(axis, -1).reshape(math.prod(end.shape) // max(amount, 1), amount))
                for amount, end in zip((before, after), ends, strict=True)
            )
            small = torch.cat([ends[0], small, ends[1]], dim=axis)
        fits = all(small.shape[i] in (1, shape[i]) for i in range(len(shape)))
        if fits:
            results.append(small.expand(shape))
    return [tuple(results)]


def _fresh_like(walk: Walk, labels: Tensor, axis: int, count: int) -> Tensor:
    """Hand out labels of the shape of others, but so many along one axis."""
    shape = [count if i == axis else size for i, size in enumerate(labels.shape)]
    return walk.record.fresh(math.prod(shape)).reshape(shape)
