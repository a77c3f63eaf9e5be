"""Rules for reductions, pooling and normalisation: channels pass through, and what mixes them is noted."""

from collections.abc import Sequence
from typing import Any

from archscan.coupling import planes
from archscan.coupling.labels import Planes
from archscan.coupling.walk import Walk, op_name, rule, unite_all
from archscan.graph import Node, Ref

_REDUCTIONS = """mean sum amax amin max min prod any all logsumexp linalg_vector_norm
    norm var std var_mean std_mean"""


def axis_argument(name: str) -> int:
    """Place of the axes among the arguments of a reduction; a norm's order comes before them."""
    return 2 if name in ("linalg_vector_norm", "norm") else 1


@rule(*_REDUCTIONS.split())
def reduction(walk: Walk, node: Node) -> Sequence[Planes]:
    """Unite what is reduced to one element; a statistic over the channel axis alone is noted, for it mixes channels."""
    shape, out = walk.shape(node.args[0]), walk.out_shape(node)
    position = axis_argument(op_name(node))
    axes = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    reduced = (
        {axis % len(shape) for axis in ([axes] if isinstance(axes, int) else axes or range(len(shape)))}
        if shape
        else set()
    )
    per_sample = walk.graph.values[node.args[0].value].per_sample
    results = []
    for plane in walk.of(node.args[0]):
        over = set(planes.varying(plane)) & reduced
        if over and (over == set(planes.varying(plane)) or not per_sample):
            walk.record.mix(f"{op_name(node)} over channels at {node.where()}", plane, over)
            continue
        for axis in over:  # stacked branches, reduced to one: an addition place by place
            walk.record.unite(plane, plane.narrow(axis, 0, 1))
        for axis in sorted(reduced, reverse=True):
            plane = plane.narrow(axis, 0, 1) if len(out) == len(shape) else plane.select(axis, 0)
        results.append(plane.expand(out))
    return [tuple(results)] * len(node.outputs)


@rule("_softmax", "_safe_softmax", "_log_softmax", "cumsum", "cumprod", "argmax", "argmin", "topk", "sort")
def along_axis(walk: Walk, node: Node) -> Sequence[Planes]:
    """Pass channels through along other axes; channels that compete along the axis itself are frozen."""
    results = []
    for plane in walk.of(node.args[0]):
        axis, varies = node.args[1], planes.varying(plane)
        if axis is None or (axis % plane.ndim in varies and len(varies) == 1):
            walk.record.freeze(plane, f"normalised over channels ({walk.where(node)})")
            continue
        if axis % plane.ndim in varies:  # branches that compete for each channel, as in selective kernels
            walk.record.unite(plane, plane.narrow(axis, 0, 1))
        if tuple(plane.shape) == walk.out_shape(node):
            results.append(plane)
    return [tuple(results)] * len(node.outputs)


_POOLING = """max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d max_pool2d
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d"""
_RESIZING = """upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d
    upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler_2d"""
_BORDERS = (
    """reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d"""
)


@rule(*_POOLING.split(), *_RESIZING.split(), *_BORDERS.split())
def spatial(walk: Walk, node: Node) -> Sequence[Planes]:
    """Pass channels through; only axes without labels may change size."""
    shape, out = walk.shape(node.args[0]), walk.out_shape(node)
    results = []
    for plane in walk.of(node.args[0]):
        axes = planes.varying(plane)
        if any(shape[axis] != out[axis] or axis > 1 for axis in axes):
            walk.record.freeze(plane, f"pooled or resized over channels ({walk.where(node)})")
            continue
        results.append(planes.compress(plane).expand(out))
    return [tuple(results)] * len(node.outputs)


def _affine(walk: Walk, node: Node, refs: Sequence[Any], axes: Sequence[int]) -> Planes:
    """Unite per-channel parameters and statistics with the channel axes of the normalised value."""
    shape = walk.shape(node.args[0])
    operands: list[tuple[Planes, Sequence[int]]] = [(walk.of(node.args[0]), shape)]
    for ref in refs:
        if isinstance(ref, Ref):
            size = [shape[axis] if axis in axes else 1 for axis in range(len(shape))]
            operands.append((tuple(plane.reshape(size) for plane in walk.of(ref)), size))
    return unite_all(walk, shape, operands, walk.where(node))


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_batch_norm_with_update"
)
def batch_norm(walk: Walk, node: Node) -> Sequence[Planes]:
    """Unite affine parameters and running statistics with the channel."""
    result = _affine(walk, node, [ref for ref in node.args[1:5] if isinstance(ref, Ref)], [1])
    for plane in result:
        walk.record.mix(f"statistics over channels in {walk.where(node)}", plane, {*range(plane.ndim)} - {1})
    per_channel = [planes.vector(plane, 1) for plane in result if 1 in planes.varying(plane)]
    statistics = [
        tuple(labels for labels in per_channel if tuple(labels.shape) == walk.out_shape(node, i)) for i in (1, 2)
    ]
    return [result, *statistics, *[()] * (len(node.outputs) - 3)]


@rule("cudnn_batch_norm")
def cudnn_batch_norm(walk: Walk, node: Node) -> Sequence[Planes]:
    """See `batch_norm`."""
    return batch_norm(walk, node)


@rule("native_layer_norm")
def layer_norm(walk: Walk, node: Node) -> Sequence[Planes]:
    """Unite the affine parameters with the channels; its statistics mix them."""
    first = len(walk.shape(node.args[0])) - len(node.args[1])
    normalised = range(first, len(walk.shape(node.args[0])))
    result = _affine(walk, node, node.args[2:4], normalised)
    for plane in result:
        walk.record.mix(f"LayerNorm at {node.where()}", plane, normalised)
    return [result, *[()] * (len(node.outputs) - 1)]


@rule("native_group_norm")
def group_norm(walk: Walk, node: Node) -> Sequence[Planes]:
    """Unite the affine parameters with the channels; every group must keep an equal number of them."""
    groups = node.args[6]
    result = _affine(walk, node, node.args[1:3], [1])
    statistics: list[Planes] = [(), ()]
    for plane in result:
        if 1 in planes.varying(plane):
            grid = planes.vector(plane, 1).reshape(groups, -1)
            walk.record.balance(grid, walk.where(node), rows_may_go=True)
            walk.record.mix(f"GroupNorm at {node.where()}", grid, {1})
            statistics = [(grid[:, 0].expand(walk.out_shape(node, i)),) for i in (1, 2)]
    return [result, *statistics, *[()] * (len(node.outputs) - 3)]


@rule("_weight_norm_interface")
def weight_norm(walk: Walk, node: Node) -> Sequence[Planes]:
    """Unite magnitudes with the channels; a norm over what a weight reads is the same with zeros as without them."""
    weight, magnitude = node.args[:2]
    operands = [(walk.of(ref), walk.shape(ref)) for ref in (weight, magnitude)]
    result = unite_all(walk, walk.shape(weight), operands, walk.where(node))
    axes = [axis for axis, size in enumerate(walk.shape(magnitude)) if size == 1]
    for plane in result:
        walk.record.mix(f"{op_name(node)} over channels at {node.where()}", plane, axes, if_written=True)
    return [result, walk.of(magnitude)]
