"""Time Torch-Pruning on one network, for the table beside archscan's: build its dependency graph, list all groups.

Also whether its magnitude pruner, by its documented use and without any help for the network, gives a network that
runs.
"""

import time
from typing import Any

import torch
from torch import Tensor, nn

from archscan.groups import couple

PRUNING_RATIO = 0.3


def time_peer(model: nn.Module, example: Tensor) -> dict[str, Any]:
    """Run Torch-Pruning on a network, which is changed; errors pass through.

    Returns:
        ``groups_s``, the CPU seconds to trace and list all groups, ``groups``, ``kept`` of the parameters, and
        ``archscan_s``, what archscan takes for the same on the same machine.
    """
    import torch_pruning

    archscan_s = time_archscan(model, example)
    start = time.process_time()
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    groups = len(list(graph.get_all_groups()))
    seconds = time.process_time() - start
    before = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        outputs = model(example)
    classes = outputs.shape[-1] if isinstance(outputs, Tensor) else 0
    heads = [
        module
        for module in model.modules()
        if classes in (getattr(module, "out_features", None), getattr(module, "out_channels", None))
    ]
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        example_inputs=example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=PRUNING_RATIO,
        ignored_layers=heads,
    )
    pruner.step()
    with torch.no_grad():
        model(example)
    after = sum(parameter.numel() for parameter in model.parameters())
    return {"groups_s": seconds, "groups": groups, "kept": after / before, "archscan_s": archscan_s}


def time_archscan(model: nn.Module, example: Tensor) -> float:
    """Time capture and grouping, once, as the peer is timed; CPU seconds."""
    start = time.process_time()
    couple(model.eval(), example)
    return time.process_time() - start
