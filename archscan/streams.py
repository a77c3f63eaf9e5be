"""Find the groups that sums write, as the stream of a residual network: recorded run, sizes → group numbers."""

import torch

from archscan.graph import Graph
from archscan.sizes import SizeOfValue

_SUMS = frozenset({torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor})


def summed_groups(graph: Graph, sizes: SizeOfValue) -> frozenset[int]:
    """Number the groups whose channels are written by a sum of two activations of one shape, over and over or once."""
    found: set[int] = set()
    for node in graph.nodes:
        if node.op not in _SUMS or len(node.tensors) != 2 or node.tensors[0] == node.tensors[1]:
            continue
        terms = [graph.values[number] for number in node.tensors]
        if all(term.per_sample for term in terms) and terms[0].shape == terms[1].shape:
            found.update(group for size in sizes(node.tensors[0]) for group in size.per_step)
    return frozenset(found)
