"""Find what bottlenecks a CNN, slim it to a budget, and prove that the slim network computes what the plan says.

The names below are imported when they are first used, so that ``import archscan`` and ``archscan --help`` take no time.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from archscan.torchvision_ops import watch_for_torchvision

if TYPE_CHECKING:
    from archscan.errors import (
        ArchscanError,
        BadInput,
        InfeasibleBudget,
        RebuildMismatch,
        UnsupportedOp,
    )
    from archscan.exporters import ExportSettings, export
    from archscan.groups import ChannelGroup, channel_groups, couple, coupling_graph
    from archscan.latency import LatencySetup, compare_latency, measure_latency
    from archscan.lossless import remove_dead
    from archscan.retraining import Finetuning
    from archscan.saving import load
    from archscan.slimming import SlimResult, SlimSettings, slim
    from archscan.training import TrainSettings, finetune
    from archscan.widening import WidenResult, WidenSettings, widen
    from archscan.widths import WidthRule

__all__ = [
    "ArchscanError",
    "BadInput",
    "ChannelGroup",
    "ExportSettings",
    "Finetuning",
    "InfeasibleBudget",
    "LatencySetup",
    "RebuildMismatch",
    "SlimResult",
    "SlimSettings",
    "TrainSettings",
    "UnsupportedOp",
    "WidenResult",
    "WidenSettings",
    "WidthRule",
    "__version__",
    "channel_groups",
    "compare_latency",
    "couple",
    "coupling_graph",
    "export",
    "finetune",
    "load",
    "measure_latency",
    "remove_dead",
    "slim",
    "widen",
]

_HOMES = {
    "archscan.errors": ("ArchscanError", "BadInput", "InfeasibleBudget", "RebuildMismatch", "UnsupportedOp"),
    "archscan.exporters": ("ExportSettings", "export"),
    "archscan.groups": ("ChannelGroup", "channel_groups", "couple", "coupling_graph"),
    "archscan.latency": ("LatencySetup", "compare_latency", "measure_latency"),
    "archscan.lossless": ("remove_dead",),
    "archscan.saving": ("load",),
    "archscan.slimming": ("SlimResult", "SlimSettings", "slim"),
    "archscan.retraining": ("Finetuning",),
    "archscan.training": ("TrainSettings", "finetune"),
    "archscan.widening": ("WidenResult", "WidenSettings", "widen"),
    "archscan.widths": ("WidthRule",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

try:
    __version__ = version("archscan")
except PackageNotFoundError:
    __version__ = "0+source"

watch_for_torchvision()


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'archscan' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
