"""How long a forward pass takes: model, example input, `LatencySetup` → `Latency`; two models → `Comparison`.

Every network is run until it is warm, then many times; medians and interquartile ranges are reported. On CUDA the time
is between two events on the stream, on the CPU by its monotonic clock. The decision that is not obvious: two networks
are run in turns, the first one first in every other round, and the ratio is taken *within* each round; the median of
these ratios is fair on a machine that is busy with something else too, where the ratio of two medians is not.
"""

import copy
import gc
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from archscan.capture import split_input, train_mode, with_batch
from archscan.errors import BadInput

Step = Callable[[int, int], None]
Run = Callable[[], object]

WARM_UPS = 3
TARGET_SECONDS = 4.0
"""How long to measure where no number of runs is asked for."""

LEAST_RUNS, MOST_RUNS = 9, 200
RESAMPLES = 2000

_RUN_ERRORS = (RuntimeError, NotImplementedError, AssertionError, ValueError, TypeError, IndexError)
"""What a model that cannot take a batch may raise."""


class How(TypedDict, total=False):
    """The fields of `LatencySetup`, as keyword arguments."""

    batch: int
    threads: int | None
    channels_last: bool
    repeats: int | None
    device: str | None


@dataclass(frozen=True)
class LatencySetup:
    """How to run what is measured.

    Attributes:
        batch: Images per forward pass.
        threads: CPU threads; None leaves torch's own number.
        channels_last: Whether weights and images lie in memory with their channels last.
        repeats: Runs that are measured; None for as many as fit into some seconds.
        device: ``cpu`` or ``cuda``; None for where the model is.
    """

    batch: int = 1
    threads: int | None = None
    channels_last: bool = False
    repeats: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("batch", self.batch), ("threads", self.threads), ("repeats", self.repeats)):
            if not (value is None and name != "batch") and (type(value) is not int or value < 1):
                raise BadInput(f"{name} is {value!r}; it must be a whole number from 1 on")
        if self.device is not None and torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise BadInput("there is no CUDA device that this PyTorch can use; measure on 'cpu'")

    @property
    def format(self) -> Literal["contiguous", "channels_last"]:
        """Name of the memory format."""
        return "channels_last" if self.channels_last else "contiguous"


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass, measured.

    Attributes:
        median_ms: Median over the runs.
        iqr_ms: Interquartile range: what lies between the quarter of fastest and the quarter of slowest runs.
        runs: How many were measured, after the warm-up.
        batch: Images per forward pass.
        threads: CPU threads.
        format: Memory format of weights and images.
        device: Name of the processor.
    """

    median_ms: float
    iqr_ms: float
    runs: int
    batch: int
    threads: int
    format: Literal["contiguous", "channels_last"]
    device: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Two networks, measured in turns.

    Attributes:
        before: The first network.
        after: The second.
        ratio: Time of the second over that of the first: the median over rounds in which both ran.
        ratio_low: Lower end of the 95% bootstrap interval of that median.
        ratio_high: Upper end.
    """

    before: Latency
    after: Latency
    ratio: float
    ratio_low: float
    ratio_high: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name, those of the two networks nested."""
        return asdict(self)


def measure_latency(model: nn.Module, example_input: Any, **how: Unpack[How]) -> Latency:
    """Measure how long a forward pass takes; the model is left unchanged.

    >>> import archscan, torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    >>> latency = archscan.measure_latency(model, torch.zeros(1, 3, 32, 32), batch=4, repeats=5)
    >>> latency.batch, latency.runs, latency.format, latency.median_ms > 0
    (4, 5, 'contiguous', True)

    Args:
        model: Any network.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        how: Fields of `LatencySetup`, which has a default for each.

    Raises:
        BadInput: An argument makes no sense, or the model cannot take such a batch.
    """
    return measure(model, example_input, LatencySetup(**how))


def compare_latency(before: nn.Module, after: nn.Module, example_input: Any, **how: Unpack[How]) -> Comparison:
    """Measure two networks in turns; arguments and refusals as for `measure_latency`."""
    return compare(before, after, example_input, LatencySetup(**how))


def measure(model: nn.Module, example_input: Any, setup: LatencySetup, step: Step | None = None) -> Latency:
    """Measure one network; `step` is told how many of how many runs are done."""
    with ready(model, example_input, setup) as run, threads(setup):
        times_RK = timed_rounds([run], setup.repeats, device_of(model, setup), step)
    return _latency(times_RK[:, 0], setup, device_of(model, setup))


def compare(
    before: nn.Module, after: nn.Module, example_input: Any, setup: LatencySetup, step: Step | None = None
) -> Comparison:
    """Measure two networks in turns; `step` is told how many of how many rounds are done."""
    device = device_of(before, setup)
    if setup.device is None:
        setup = LatencySetup(setup.batch, setup.threads, setup.channels_last, setup.repeats, device.type)
    with ExitStack() as stack:
        runs = [stack.enter_context(ready(model, example_input, setup)) for model in (before, after)]
        stack.enter_context(threads(setup))
        times_RK = timed_rounds(runs, setup.repeats, device, step)
    first, second = (_latency(times_RK[:, column], setup, device) for column in (0, 1))
    return Comparison(first, second, *median_ratio(times_RK))


def median_ratio(times_RK: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """Take the median over rounds of second over first time, with the 95% interval of its bootstrap.

    Args:
        times_RK: Times of two networks by round; shape [rounds, 2].
        seed: Of the resampling of rounds.
    """
    ratio_R = times_RK[:, 1] / times_RK[:, 0]
    drawn_BR = np.random.default_rng(seed).integers(len(ratio_R), size=(RESAMPLES, len(ratio_R)))
    low, high = np.quantile(np.median(ratio_R[drawn_BR], axis=1), (0.025, 0.975))
    return float(np.median(ratio_R)), float(low), float(high)


def timed_rounds(
    runs: Sequence[Run], repeats: int | None, device: torch.device, step: Step | None = None
) -> np.ndarray:
    """Run all in turns, round by round; the order is reversed in every other round.

    Args:
        runs: What to time; each is run some times before.
        repeats: Rounds; None for as many as fit into `TARGET_SECONDS`.
        device: Whose clock to read.
        step: Told how many of how many rounds are done.

    Returns:
        Milliseconds, shape [rounds, runs].
    """
    for run in runs:
        for _ in range(WARM_UPS - 1):
            run()
    seconds = sum(milliseconds(run, device) for run in runs) / 1000
    rounds = repeats or min(max(int(TARGET_SECONDS / max(seconds, 1e-6)), LEAST_RUNS), MOST_RUNS)
    times_RK = np.zeros((rounds, len(runs)))
    with _no_garbage_collection():
        for number in range(rounds):
            for column in range(len(runs))[:: 1 if number % 2 == 0 else -1]:
                times_RK[number, column] = milliseconds(runs[column], device)
            if step is not None:
                step(number + 1, rounds)
    return times_RK


def milliseconds(run: Run, device: torch.device) -> float:
    """Time one run, by the clock of the device."""
    if device.type != "cuda":
        start = time.perf_counter_ns()
        run()
        return (time.perf_counter_ns() - start) / 1e6
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()
    run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last))


@dataclass(frozen=True, eq=False)
class Ready:
    """A model that was put where it is to be measured, with a batch; a call runs it."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self) -> object:
        """Run once, without gradients."""
        with torch.no_grad():
            return self.model(*self.args, **self.kwargs)


@contextmanager
def ready(model: nn.Module, example_input: Any, setup: LatencySetup) -> Iterator[Ready]:
    """Yield a model in eval mode, as the setup says, with its batch; it ran once. The one given is left unchanged.

    Raises:
        BadInput: The model cannot take such a batch.
    """
    device = device_of(model, setup)
    if setup.channels_last or any(tensor.device.type != device.type for tensor in model.parameters()):
        model = copy.deepcopy(model).to(device)
        if setup.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    inputs = with_batch(example_input, setup.batch, str(device))
    if setup.channels_last:
        inputs = tree_map(_channels_last, inputs)
    run = Ready(model, *split_input(inputs))
    with train_mode(model, False):
        try:
            run()
        except _RUN_ERRORS as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BadInput(
                f"the model cannot run a batch of {setup.batch} on {device.type}: {reason}; choose another batch size"
            ) from error
        yield run


@contextmanager
def threads(setup: LatencySetup) -> Iterator[None]:
    """Use so many CPU threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(setup.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_name(device: torch.device) -> str:
    """Name the processor as its maker does."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def versions(device: torch.device) -> Mapping[str, str | int]:
    """Say all that a measured time depends on beside the network, so that it can be kept."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "cores": os.cpu_count() or 0,
        "cuda": torch.version.cuda or "",
    }


def _channels_last(leaf: Any) -> Any:
    is_image = isinstance(leaf, torch.Tensor) and leaf.ndim == 4
    return leaf.contiguous(memory_format=torch.channels_last) if is_image else leaf


def device_of(model: nn.Module, setup: LatencySetup) -> torch.device:
    """Say where a model is to be measured."""
    if setup.device is not None:
        return torch.device(setup.device)
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def _latency(times_R: np.ndarray, setup: LatencySetup, device: torch.device) -> Latency:
    low, median, high = np.quantile(times_R, (0.25, 0.5, 0.75))
    used = setup.threads or torch.get_num_threads()
    return Latency(float(median), float(high - low), len(times_R), setup.batch, used, setup.format, device_name(device))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a run would be measured with it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
