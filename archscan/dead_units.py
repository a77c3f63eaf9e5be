"""Units that change nothing for any input: coupling, tensors → which may go without any loss.

A unit is dead where every layer that reads it multiplies it by weights that are all 0, or reads 0 from it whatever the
input (`ranges`): a BatchNorm with γ = 0 and β <= 0 before a ReLU, a filter of zeros without bias. The masked original
then *is* the original. A unit that only happened to be silent on some images is not dead (see `activations`).

The decision that is not obvious: where statistics are taken over channels (LayerNorm), a dead channel still counts in
them, so that nothing there is called dead, and nothing at all where it cannot be told whose channels they are. A unit
is taken to be alive where its reader is neither a convolution nor a linear layer, or has a weight that is computed: a
normalised weight would be another without the channel.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from archscan.capture import CONTRACTIONS
from archscan.graph import Graph, Node, Ref
from archscan.groups import ChannelGroup, Consumer, Coupling
from archscan.ranges import Range, WritesParameter, ranges
from archscan.widths import WidthRule, allowed_steps

_LAYERS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
_PRODUCTS: Mapping[str, int] = {"aten::convolution": 0, "aten::mm": 0, "aten::addmm": 1}
"""Op of a layer → the place of its input among the arguments; its weight comes next."""


def dead_units(model: nn.Module, coupling: Coupling) -> np.ndarray:
    """Say of every unit whether it changes nothing for any finite input of the captured size; boolean of shape [U].

    Args:
        model: The network, left unchanged.
        coupling: What coupling said about it, with the recorded run. Units of frozen groups are never called dead.
    """
    assert coupling.graph is not None
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    readers: dict[int, list[Consumer]] = {}
    for consumer in coupling.consumers:
        readers.setdefault(consumer.contraction, []).append(consumer)
    alive_U = np.zeros(coupling.unit_count + 1, dtype=bool)  # the last entry: channels of no unit
    understood = _one_product_each(coupling.graph)
    for consumer in coupling.consumers:
        if consumer.contraction not in understood or consumer.operand != 0:
            alive_U[consumer.units] = True
    try:
        for node, look_up in ranges(coupling.graph, tensors):
            if node.contraction in understood and node.op._schema.name in _PRODUCTS:
                silent_C = _silent(node, look_up)
                for consumer in readers.get(node.contraction, ()):
                    fits = len(silent_C) == len(consumer.units)
                    alive_U[consumer.units[~silent_C] if fits else consumer.units] = True
    except WritesParameter:
        alive_U[:] = True
    mixed = [place.rpartition(" ")[2] for place in coupling.mixing]
    paths = [{member.module for member in group.members} for group in coupling.groups]
    anywhere = any(not any(place in own for own in paths) for place in mixed)
    for group, own in zip(coupling.groups, paths, strict=True):
        if group.frozen is not None or anywhere or not own.isdisjoint(mixed):
            alive_U[np.array(group.units)] = True
    return ~alive_U[:-1]


def _one_product_each(graph: Graph) -> set[int]:
    """List the contractions that are one layer each, so that what the layer reads is what the product reads."""
    products = Counter(node.contraction for node in graph.nodes if node.op._schema.name in _PRODUCTS)
    other = {
        node.contraction
        for node in graph.nodes
        if node.contraction is not None and (node.function in CONTRACTIONS and node.function not in _LAYERS)
    }
    return {number for number, count in products.items() if number is not None and count == 1} - other


def _silent(node: Node, look_up: Callable[[int], Range]) -> np.ndarray:
    """Say of each channel that a layer reads whether it is 0, or multiplied by 0 only; shape [C]."""
    place = _PRODUCTS[node.op._schema.name]
    given, weight = (look_up(ref.value) for ref in node.args[place : place + 2] if isinstance(ref, Ref))
    silent_C: Tensor = (given.fixed & (given.low == 0)).movedim(1, 0).flatten(1).all(1)
    if not weight.is_memory:  # computed: without a channel, its norm or its mean might be another
        return torch.zeros_like(silent_C).numpy()
    if node.op._schema.name != "aten::convolution":
        unread_C: Tensor = (weight.low == 0).all(1)
    elif node.args[6]:  # transposed: [C, O / groups, kernel …]
        unread_C = (weight.low == 0).flatten(1).all(1)
    else:
        zero_OC = (weight.low == 0).flatten(2).all(2)
        unread_C = zero_OC.reshape(int(node.args[8]), -1, zero_OC.shape[1]).all(1).flatten()
    return (silent_C | unread_C).numpy()


def lossless_kept(
    groups: Sequence[ChannelGroup], dead_U: np.ndarray, rule: WidthRule
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Keep what is alive, and so many of the dead as equal counts in all fibres and the allowed widths ask for.

    Returns:
        Group name → for each fibre the kept steps, sorted.
    """
    kept = {}
    for group in groups:
        dead_FP = dead_U[np.array(group.units)]
        alive = max(int((~dead_FP).sum(1).max()), 1)
        width = min(steps for steps in allowed_steps(group, rule) if steps >= alive)
        order_FP = np.argsort(dead_FP, axis=1, kind="stable")[:, :width]
        kept[group.name] = tuple(tuple(row) for row in np.sort(order_FP, axis=1).tolist())
    return kept
