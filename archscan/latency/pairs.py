"""What a slimming is worth by the clock: dense and slim network → `Timing`: both in turns, and module by module."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from archscan.latency.modules import module_times
from archscan.latency.roofline import Roofline, measured_roofline
from archscan.latency.timing import Comparison, LatencySetup, Step, compare, device_of


@dataclass(frozen=True)
class Timing:
    """Two networks, measured.

    Attributes:
        comparison: Both as a whole, in turns.
        before_ms: Own time of each module of the first, by path.
        after_ms: The same of the second.
        roofline: What the machine can do.
    """

    comparison: Comparison
    before_ms: Mapping[str, float]
    after_ms: Mapping[str, float]
    roofline: Roofline


def measure_pair(
    before: nn.Module, after: nn.Module, example_input: Any, setup: LatencySetup, step: Step | None = None
) -> Timing:
    """Measure two networks; both are left unchanged.

    Args:
        before: The dense network.
        after: The slim one.
        example_input: What both take.
        setup: Batch, threads, memory format, repeats, device.
        step: Told how many of how many rounds of the comparison are done.

    Raises:
        BadInput: A model cannot take such a batch.
    """
    setup = replace(setup, device=device_of(before, setup).type)
    comparison = compare(before, after, example_input, setup, step)
    before_ms, after_ms = (
        {row.path: row.self_ms for row in module_times(model, example_input, setup)} for model in (before, after)
    )
    return Timing(comparison, before_ms, after_ms, measured_roofline(setup))
