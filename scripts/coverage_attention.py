"""Say how the attention of a network is treated: coupling → how many channels are slimmed by what, or kept and why.

Attention is where two activations are multiplied. The channels that are multiplied, and what a module with such a
product writes for itself alone (queries, keys, values), are its attention; what leaves it is the width of the stream,
and counts with the convolutions.
"""

import re
from collections import Counter

from archscan.graph import Node
from archscan.groups import ChannelGroup, Coupling

_PRODUCTS = re.compile(r"aten\.(bmm|baddbmm|mm|_scaled_dot_product\w*|_efficient_attention\w*|_flash_attention\w*)\.")


def _multiplies_activations(node: Node, coupling: Coupling) -> bool:
    assert coupling.graph is not None
    operands = [coupling.graph.values[number].per_sample for number in node.tensors]
    return _PRODUCTS.match(f"{node.op}") is not None and sum(operands) > 1


def without_place(reason: str) -> str:
    """Cut the place that a reason names."""
    return re.sub(r"^the forward of \S+ ", "a forward ", re.sub(r" \([^()]*\)$", "", reason))


def _treatment(group: ChannelGroup) -> str:
    """Say in a few words what becomes of a group; without the place that a reason names."""
    if group.frozen is not None:
        return f"kept: {without_place(group.frozen)}"
    if len(group.units) > 1:
        return "slimmed: as many channels of every part"
    return "slimmed: whole heads" if group.channels_per_step > 1 else "slimmed: channel by channel"


def describe_attention(coupling: Coupling) -> dict[str, int]:
    """Count the channels that are multiplied, or that attention modules write for themselves, by their treatment.

    Args:
        coupling: After whatever a forward could not follow has been frozen.

    Returns:
        Treatment → channels, most first; empty where nothing multiplies two activations.
    """
    assert coupling.graph is not None
    assert coupling.sizes is not None
    products = [node for node in coupling.graph.nodes if _multiplies_activations(node, coupling)]
    modules = {node.module for node in products if node.module}
    numbers = {number for node in products for number in node.tensors}
    multiplied = {group for number in numbers for size in coupling.sizes(number) for group in size.per_step}
    written = _written(coupling)
    found: Counter[str] = Counter()
    for index, group in enumerate(coupling.groups):
        paths = written.get(index, Counter())
        inside = [path for path in paths if any(path == module or path.startswith(f"{module}.") for module in modules)]
        if index in multiplied or len(inside) == len(paths) > 0:
            found[_treatment(group)] += sum(paths[path] for path in inside or paths)
    return dict(found.most_common())


def _written(coupling: Coupling) -> dict[int, Counter[str]]:
    """Count the channels of each group that each module writes."""
    group_of = {unit: index for index, group in enumerate(coupling.groups) for fibre in group.units for unit in fibre}
    found: dict[int, Counter[str]] = {}
    for name, axes in coupling.tensors.items():
        for axis in axes:
            for unit in axis.units.reshape(-1).tolist() if axis.role == "out" else ():
                if unit in group_of:
                    found.setdefault(group_of[unit], Counter())[name.rpartition(".")[0]] += 1
    return found
