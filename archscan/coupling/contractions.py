"""Rules for convolutions: inputs unite with the weight's input channels, outputs are its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from archscan.coupling import planes
from archscan.coupling.labels import Planes, Read
from archscan.coupling.walk import Walk, op_name, rule
from archscan.graph import Node, Ref


def _axis_labels(walk: Walk, own: Planes, axis: int, where: str) -> Tensor | None:
    """Labels along the axis that a contraction sums over; they must be constant over all other axes."""
    found = None
    for plane in own:
        axes = planes.varying(plane)
        if axes == (axis,):
            found = planes.vector(plane, axis)
        else:
            walk.record.freeze(plane, f"channels lie along a spatial or batch axis ({where})")
    return found


TRANSPOSED = frozenset({"t", "transpose", "permute"})
"""Ops that hand a weight on to its contraction."""

REPEATED = frozenset({"expand", "view"})
"""The same in a product of stacks of matrices, which gives each sample the weight; the matrix stays what it is."""


def weight_name(walk: Walk, ref: Ref) -> str:
    """Path of a parameter that is used as it is, also transposed or repeated; empty for one that is computed."""
    value = walk.graph.values[ref.value]
    if value.name:
        return "" if value.per_sample else value.name
    for node in reversed(walk.graph.nodes[: walk.at]):
        if ref.value in node.outputs:
            source, name = node.args[0], op_name(node)
            repeated = name in REPEATED and walk.shape(source)[-2:] == walk.shape(ref)[-2:]
            return weight_name(walk, source) if repeated or name in TRANSPOSED else ""
    return ""


OPERANDS = dict.fromkeys(("linear", "matmul", "__matmul__", "mm", "bmm"), (0, 1)) | {"addmm": (1, 2), "baddbmm": (1, 2)}
"""Python-level matrix products → positions of their left and right operand."""


def read(
    walk: Walk, node: Node, given: Tensor | None, wanted: Tensor | None, weight: Ref, passed_to: Tensor | None = None
) -> None:
    """Unite an activation's channels with the weight's input channels that read them, and note the place of a gate."""
    if wanted is None:
        if given is not None:
            walk.record.freeze(given, f"read by an unlabelled weight ({walk.where(node)})")
        return
    if given is None:
        walk.record.freeze(wanted, f"reads channels that are not tracked ({walk.where(node)})")
        return
    walk.record.unite(given, wanted)
    walk.record.consumed.append(wanted)
    if walk.graph.training:
        return
    if node.function.startswith("conv"):
        place = (0, 1 - len(walk.out_shape(node)))
    elif node.function in OPERANDS:
        left = node.args[-1] is weight
        place = (OPERANDS[node.function][0 if left else 1], -1 if left else -2)
    else:
        walk.record.freeze(given, f"read inside {node.function or 'an unknown function'} ({walk.where(node)})")
        return
    assert node.contraction is not None
    passed = torch.zeros_like(given) if passed_to is None else passed_to
    walk.record.reads.append(Read(node.contraction, *place, given, passed, weight_name(walk, weight), node.module))


@rule("convolution")
def convolution(walk: Walk, node: Node) -> Sequence[Planes]:
    """Unite inputs with the weight's input channels; the output carries its output channels (and the bias's)."""
    data, weight, bias, transposed, groups = *node.args[:3], node.args[6], node.args[8]
    shape, out, where = walk.shape(weight), walk.out_shape(node), walk.where(node)
    if (passed := _along_channels(walk, node)) is not None:
        return [passed]
    given = _axis_labels(walk, walk.of(data), 1, where)
    inner, outer = _weight_labels(walk, weight, groups, bool(transposed))
    if walk.graph.values[weight.value].per_sample:
        for labels in (given, inner, outer):
            if labels is not None:
                walk.record.freeze(labels, f"weights computed from the input ({where})")
        inner = outer = None
    elif shape[0] and (inner is not None or given is not None):
        own = (
            outer.reshape(groups, -1)[:, :1].expand(-1, shape[0 if transposed else 1] // (groups if transposed else 1))
            if (groups > 1 and outer is not None)
            else None
        )
        read(walk, node, given, inner, weight, None if own is None else own.reshape(-1))
    if groups > 1 and inner is not None and outer is not None:
        _tie_conv_groups(walk, inner.reshape(groups, -1), outer.reshape(groups, -1), where)
    if outer is None:
        return [()]
    walk.record.written.append(outer)
    result = planes.along(outer, out, 1)
    if isinstance(bias, Ref):
        for plane in walk.of(bias):
            walk.record.unite(result, planes.along(planes.vector(plane, 0), out, 1))
    return [(result,) if out[1] > 1 else ()]


def _along_channels(walk: Walk, node: Node) -> Planes | None:
    """Pass channels through a convolution that slides *along* them, as channel attention does (Wang et al. 2020, ECA).

    It reads one feature and writes one, at every place of the axis; None where the op is anything else.
    """
    data, weight, out = node.args[0], node.args[1], walk.out_shape(node)
    own = [plane for plane in walk.of(data) if planes.varying(plane)]
    if walk.shape(weight)[:2] != (1, 1) or walk.shape(data) != out or not own:
        return None
    if any(set(planes.varying(plane)) <= {0, 1} for plane in own):
        return None
    for plane in own:
        walk.record.mix(f"convolution over channels at {node.where()}", plane, range(2, plane.ndim))
    return tuple(own)


def _weight_labels(walk: Walk, weight: Ref, groups: int, transposed: bool) -> tuple[Tensor | None, Tensor | None]:
    """Input and output labels of a convolution's weight, as vectors over all channels."""
    by_axis: list[Tensor | None] = [None, None]
    shape = walk.shape(weight)
    own = walk.of(weight)
    pair = len([plane for plane in own if set(planes.varying(plane)) <= {0, 1}])
    for order, plane in enumerate(own):
        axes = planes.varying(plane)
        if axes == (0,) and not (groups > 1 and pair == 2 and order == 1):
            by_axis[0] = planes.vector(plane, 0)
        elif set(axes) <= {0, 1}:
            rows = plane.reshape(*shape[:2], -1)[:: shape[0] // groups, :, 0]
            by_axis[1] = rows.reshape(-1)
        else:
            walk.record.freeze(plane, f"kernel axis ({walk.where(walk.graph.nodes[walk.at])})")
    return (by_axis[0], by_axis[1]) if transposed else (by_axis[1], by_axis[0])


def _tie_conv_groups(walk: Walk, inner: Tensor, outer: Tensor, where: str) -> None:
    """Keep a grouped convolution in equal groups: either whole groups go, or every group loses equally many channels.

    Whole groups where there are more groups than channels in one (depthwise is the extreme), else equal counts:
    whichever leaves more widths to choose from. Both are exact.
    """
    groups, places = inner.shape
    if places < groups or outer.shape[1] < 2:
        walk.record.unite(inner, inner[:, :1])
        walk.record.unite(outer, inner[:, :1])
    else:
        walk.record.balance_groups(inner, outer, where)
