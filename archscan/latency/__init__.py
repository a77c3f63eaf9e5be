"""Measured time of networks, of their modules and of layers that do not exist yet.

`timing` measures whole networks, `modules` their parts, `roofline` what the machine can do at all, `replay` and
`model` price widths by the clock, `steps` finds the widths at which the hardware has its steps. Times are in
milliseconds, of one forward pass of a whole batch in eval mode. The decision that is not obvious: everything that is
compared is measured in turns, so that whatever else the machine does meanwhile hits all of it alike.
"""

from archscan.latency.model import LatencyModel, latency_model
from archscan.latency.modules import ModuleTime, module_times
from archscan.latency.pairs import Timing, measure_pair
from archscan.latency.roofline import Roofline, measured_roofline
from archscan.latency.steps import width_steps
from archscan.latency.timing import (
    Comparison,
    Latency,
    LatencySetup,
    compare,
    compare_latency,
    measure,
    measure_latency,
)

__all__ = [
    "Comparison",
    "Latency",
    "LatencyModel",
    "LatencySetup",
    "ModuleTime",
    "Roofline",
    "Timing",
    "compare",
    "compare_latency",
    "latency_model",
    "measure",
    "measure_latency",
    "measure_pair",
    "measured_roofline",
    "module_times",
    "width_steps",
]
