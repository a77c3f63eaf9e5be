"""Rules for ops that only move, join or make channels: most are executed verbatim on the planes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from archscan.coupling import planes
from archscan.coupling.labels import Planes
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


@rule("arange", "linspace", "_assert_async", "_assert_tensor_metadata", "_local_scalar_dense", "randperm")
def unlabelled(walk: Walk, node: Node) -> Sequence[Planes]:
    """Make nothing that has channels."""
    return [()] * len(node.outputs)


@rule(*["permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "movedim", "swapaxes", "numpy_T"])
def view(walk: Walk, node: Node) -> Sequence[Planes]:
    """Execute the op verbatim on each plane."""
    results = [_verbatim(node, plane) for plane in walk.of(node.args[0])]
    return [tuple(result[i] for result in results if planes.varying(result[i])) for i in range(len(node.outputs))]


def _verbatim(node: Node, plane: Tensor) -> list[Tensor]:
    """Run the op with its first tensor argument replaced by a plane."""
    args = tree_map(lambda leaf: leaf if not isinstance(leaf, Ref) else None, node.args[1:])
    result = node.op(plane, *args, **node.kwargs)
    return list(result) if isinstance(result, (tuple, list)) else [result]


@rule("select", "unbind", "diagonal")
def pick(walk: Walk, node: Node) -> Sequence[Planes]:
    """Execute verbatim; where one channel is picked by its number, its whole axis is frozen."""
    for plane in walk.of(node.args[0]):
        if not any(planes.varying(result) for result in _verbatim(node, plane)):
            walk.record.freeze(plane, f"picked by number ({walk.where(node)})")
    return view(walk, node)


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


@rule("pixel_shuffle", "pixel_unshuffle", "im2col")
def fold_space(walk: Walk, node: Node) -> Sequence[Planes]:
    """Trade channels for places: the channels that make up one channel's places are one unit."""
    out = walk.out_shape(node)
    results = []
    for plane in walk.of(node.args[0]):
        axis = plane.ndim - 3
        if planes.varying(plane) != (axis,):
            walk.record.freeze(plane, f"channels lie along a spatial axis ({walk.where(node)})")
            continue
        labels = planes.vector(plane, axis)
        if op_name(node) == "pixel_shuffle":
            grid = labels.reshape(-1, node.args[1] ** 2)
            walk.record.unite(grid, grid[:, :1])
            labels = grid[:, 0]
        else:
            labels = labels.repeat_interleave(out[1 if op_name(node) == "im2col" else axis] // len(labels))
        results.append(planes.along(labels, out, 1 if op_name(node) == "im2col" else axis))
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
            walk.record.freeze(plane, f"picked by number ({walk.where(node)})")
            continue
        labels = planes.vector(plane, axis)
        bounds = [start or 0, size if end is None else end]
        counted = [labels[:bound] if 0 <= bound <= size else labels[bound:] if bound < 0 else None for bound in bounds]
        counts: list[Count] = [(axis, None), (bounds[0], counted[0]), (bounds[1], counted[1])]
        walk.counts[walk.at] = counts
    return view(walk, node)


@rule("split", "split_with_sizes", "chunk")
def split(walk: Walk, node: Node) -> Sequence[Planes]:
    """Execute verbatim; pieces of equal size must keep equal numbers of channels."""
    axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    for plane in walk.of(node.args[0]):
        axis %= plane.ndim
        sizes = {walk.shape(number)[axis] for number in node.outputs if number is not None}
        if axis in planes.varying(plane) and len(sizes) == 1:
            walk.record.balance(planes.vector(plane, axis).reshape(len(node.outputs), -1), walk.where(node))
    return view(walk, node)


@rule("view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten")
def reshape(walk: Walk, node: Node) -> Sequence[Planes]:
    """Reshape the planes; see `resolve_merge` for flattened and `Record.balance` for unfolded channel axes."""
    results = []
    for plane in walk.of(node.args[0]):
        done = planes.reshape(plane, walk.out_shape(node))
        for grid in done.merged:
            resolve_merge(walk, grid, walk.where(node))
        for grid in done.split:
            walk.record.balance(grid, walk.where(node))
        results.append(done.plane)
    return [tuple(results)]


def resolve_merge(walk: Walk, grid: Tensor, where: str) -> None:
    """Decide what keeps a flattened grid of labels [outer, inner] in order when channels are removed.

    Where the rows are the fibres of an earlier split, removing equally many from each row keeps the order. Where the
    columns are (a channel shuffle), the k-th of every column end up side by side, so each row must go as a whole.
    Otherwise rows must keep equal numbers.
    """
    for known, _ in reversed(walk.record.grids):
        row_of = {label: row for row, labels in enumerate(known.tolist()) for label in labels}
        rows = [[row_of.get(label) for label in labels] for labels in grid.tolist()]
        if any(row is None for labels in rows for row in labels):
            continue
        if all(len(set(labels)) == 1 for labels in rows):
            return
        if all(len(set(labels)) == 1 for labels in zip(*rows, strict=True)):
            walk.record.unite(grid, grid[:, :1])
            return
    walk.record.balance(grid, where)


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
    return [(torch.stack([planes.compress(plane, axes) for plane in first], dim=axis).expand(shape),)]


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
            if axis not in axes:
                continue
            if before < 0 or after < 0 or small.numel() != plane.shape[axis]:
                walk.record.freeze(plane, f"cropped by a negative padding ({walk.where(node)})")
                continue
            ends = walk.record.fresh(before), walk.record.fresh(after)
            walk.counts.setdefault(walk.at, []).extend([(before, ends[0]), (after, ends[1])])
            small = torch.cat([ends[0], small.reshape(-1), ends[1]]).reshape(
                [-1 if i == axis else 1 for i in range(plane.ndim)]
            )
        fits = all(small.shape[i] in (1, shape[i]) for i in range(len(shape)))
        if fits:
            results.append(small.expand(shape))
    return [tuple(results)]
