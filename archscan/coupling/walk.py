"""The table: ATen op → rule on label planes, and the walk that applies it to a recorded run.

A rule gets the label planes of the op's tensor arguments, records what the op couples (see `labels.Record`), and
returns the planes of its outputs. View and layout ops need no rule of their own: they are executed verbatim on the
planes. An op without a row raises `UnsupportedOp`, because a wrong guess is worse than a refusal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from archscan.coupling import planes
from archscan.coupling.labels import Planes, Record
from archscan.errors import UnsupportedOp
from archscan.graph import Graph, Node, Ref

Count = tuple[
    int, Tensor | None
]  # an integer argument; labels [row, index] that it counts, None where it stays as it is
Rule = Callable[["Walk", Node], Sequence[Planes]]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen ops by name, in-place variants (``relu_``) included; registering one twice raises."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"a coupling rule for aten.{name} is registered twice")
            RULES[name] = function
        return function

    return register


def op_name(node: Node) -> str:
    """Name of the op without namespace, overload and the underscore of an in-place variant."""
    namespace, name = str(node.op).split(".")[:2]
    name = name if namespace == "aten" else f"{namespace}.{name}"
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


@dataclass
class Walk:
    """One pass over a recorded run, carrying the label planes of every value.

    Attributes:
        graph: The run.
        record: Where rules write what they find; shared by the runs in train and in eval mode.
        planes: Label planes by value number.
        counts: Node number → its integer arguments that count channels, one after the other.
    """

    graph: Graph
    record: Record
    planes: list[Planes] = field(default_factory=list)
    counts: dict[int, list[Count]] = field(default_factory=dict)
    at: int = 0

    def run(self) -> "Walk":
        """Apply the table to every node, then freeze what the model returns."""
        self._label_sources()
        for number, node in enumerate(self.graph.nodes):
            self.at = number
            name = op_name(node)
            if name not in RULES:
                raise UnsupportedOp(
                    f"no coupling rule for the op aten.{name} at {node.where()}; "
                    "leave that layer out of the network or report the op so that a rule can be added"
                )
            for output, result in zip(node.outputs, RULES[name](self, node), strict=False):
                if output is not None:
                    self.planes[output] = result
        for number in self.graph.outputs:
            for plane in self.planes[number]:
                self.record.freeze(plane, "network output")
        return self

    def _label_sources(self) -> None:
        groups = _convolution_groups(self.graph)
        for number, value in enumerate(self.graph.values):
            self.planes.append(())
            if value.name:
                self.planes[number] = self.record.tensor_planes(value.name, value.shape, groups.get(value.name))
            elif value.kind == "input" and len(value.shape) > 1 and value.shape[1] > 1:
                labels = self.record.fresh(value.shape[1])
                self.record.freeze(labels, "network input")
                self.planes[number] = (planes.along(labels, value.shape, 1),)

    def shape(self, ref: Ref | int) -> tuple[int, ...]:
        """Size of a value."""
        return self.graph.values[ref.value if isinstance(ref, Ref) else ref].shape

    def of(self, ref: Any) -> Planes:
        """Planes of an argument; none for what is no tensor."""
        return self.planes[ref.value] if isinstance(ref, Ref) else ()

    def out_shape(self, node: Node, index: int = 0) -> tuple[int, ...]:
        """Size of an output."""
        number = node.outputs[index]
        return self.graph.values[number].shape if number is not None else ()

    def where(self, node: Node) -> str:
        """Name an op and its place for a reason or a message."""
        return f"{op_name(node)} at {node.where()}"


def _convolution_groups(graph: Graph) -> dict[str, int]:
    """Number of groups of every parameter that is a convolution's weight, straight or through ops of its size."""
    producer = {number: node for node in graph.nodes for number in node.outputs if number is not None}
    groups: dict[str, int] = {}
    for node in graph.nodes:
        if op_name(node) != "convolution" or not isinstance(node.args[1], Ref):
            continue
        size = 1
        for extent in graph.values[node.args[1].value].shape:
            size *= extent
        pending, seen = [node.args[1].value], set()
        while pending:
            number = pending.pop()
            value = graph.values[number]
            if number in seen or value.per_sample or torch.Size(value.shape).numel() != size:
                continue
            seen.add(number)
            if value.name:
                groups[value.name] = node.args[8]
            elif number in producer:
                pending.extend(producer[number].tensors)
    return groups


def _match(found: list[Tensor], plane: Tensor) -> int | None:
    """Which of the planes found so far runs along the same axes; the exact match first, then any overlap."""
    axes = set(planes.varying(plane))
    overlap = None
    for index, other in enumerate(found):
        others = set(planes.varying(other))
        if others == axes:
            return index
        if others & axes:
            overlap = index if overlap is None else overlap
    return overlap


def unite_all(walk: Walk, shape: Sequence[int], operands: Sequence[tuple[Planes, Sequence[int]]], where: str) -> Planes:
    """Unite labels place by place through broadcasting, and freeze those that meet an unlabelled extent.

    Args:
        walk: The pass.
        shape: Size of the result.
        operands: Planes and size of each tensor argument.
        where: Place, for the reason of what is frozen.

    Returns:
        Planes of the result.
    """
    found: list[Tensor] = []
    for own, _ in operands:
        earlier = len(found)  # planes of one operand run along different axes of it, and do not meet each other
        for plane in own:
            wide = planes.broadcast(plane, shape)
            if not planes.varying(wide):
                continue
            index = _match(found[:earlier], wide)
            if index is None:
                found.append(wide)
                continue
            walk.record.unite(found[index], wide)
            found[index] = _overlay(found[index], wide)
    for plane in found:
        axes = planes.varying(plane)
        for own, size in operands:
            extents = [size[axis - len(shape)] if len(size) >= len(shape) - axis else 1 for axis in axes]
            covered = any(set(planes.varying(planes.broadcast(other, shape))) & set(axes) for other in own)
            if any(extent > 1 for extent in extents) and not covered:
                walk.record.freeze(plane, f"meets an unlabelled tensor of its size ({where})")
    return tuple(found)


def _overlay(under: Tensor, over: Tensor) -> Tensor:
    """Labels of `under`, and those of `over` where `under` has none."""
    axes = sorted({*planes.varying(under), *planes.varying(over)})
    small_under, small_over = planes.compress(under, axes), planes.compress(over, axes)
    if bool((small_under > 0).all()) and planes.varying(under) == tuple(axes):
        return under
    return torch.where(small_under > 0, small_under, small_over).expand(under.shape)
