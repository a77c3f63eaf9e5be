"""Where the time of a forward pass goes: model, example input, `LatencySetup` → `ModuleTime` by module path.

The clock is read whenever a module's forward begins or ends, and what passed since the last reading is charged to the
module that was running: so every moment is charged once, ops in a module's own forward to that module, and the sum is
the time of the whole pass. The decision that is not obvious: paths are those that `capture` gives, a module that is
used under several names goes under the first, so that times and counted costs are about the same modules.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from archscan.capture import module_paths
from archscan.latency.timing import WARM_UPS, LatencySetup, Step, device_of, ready, threads

RUNS = 15
"""Forward passes that are measured where no number is asked for."""


@dataclass(frozen=True)
class ModuleTime:
    """Time of one module's own ops in one forward pass of a batch, measured.

    Attributes:
        path: Module path; empty for the network itself.
        self_ms: Median over the runs, its children not included.
    """

    path: str
    self_ms: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def module_times(
    model: nn.Module, example_input: Any, setup: LatencySetup, step: Step | None = None
) -> tuple[ModuleTime, ...]:
    """Measure the time of every module that ran, in the order of execution; the model is left unchanged.

    Raises:
        BadInput: The model cannot take such a batch.
    """
    runs = setup.repeats or RUNS
    device = device_of(model, setup)
    times: dict[str, list[float]] = defaultdict(list)
    with ready(model, example_input, setup) as run, threads(setup):
        for _ in range(WARM_UPS):
            run()
        for number in range(runs):
            with _marked(run.model, device) as marks:
                run()
            for path, milliseconds in _by_path(marks).items():
                times[path].append(milliseconds)
            if step is not None:
                step(number + 1, runs)
    return tuple(ModuleTime(path, float(np.median(found))) for path, found in times.items())


Mark = tuple[str, Any]
"""Which module was running until a moment, and the moment: nanoseconds, or an event on the CUDA stream."""


@contextmanager
def _marked(model: nn.Module, device: torch.device) -> Iterator[list[Mark]]:
    """Yield a list that fills with a mark at the begin and end of every forward; it begins and ends outside of all."""
    marks: list[Mark] = []
    with module_paths(model, lambda path: marks.append((path, _now(device)))):
        yield marks


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter_ns()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _by_path(marks: list[Mark]) -> dict[str, float]:
    """Charge the time between two marks to the module that ran until the later one; milliseconds."""
    if marks and not isinstance(marks[-1][1], int):
        marks[-1][1].synchronize()
    total: dict[str, float] = defaultdict(float)
    for (_, start), (path, end) in pairwise(marks):
        total[path] += (end - start) / 1e6 if isinstance(end, int) else start.elapsed_time(end)
    return total
