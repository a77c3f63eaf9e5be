"""What the machine can do at best: device, threads → `Roofline`, measured once and kept.

A layer that does m MACs on b bytes takes at least max(m / peak, b / bandwidth) (Williams et al. 2009): where m / b is
below peak / bandwidth it waits for memory, above it for arithmetic. The peak is that of a large float32 matrix product,
the bandwidth that of a copy far larger than the caches, reading and writing counted. The decision that is not obvious:
the best of several runs counts, since whatever else the machine does can only make one slower.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from archscan.latency.cache import kept_table
from archscan.latency.timing import LatencySetup, Run, milliseconds, threads, versions

SIDE = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices that are multiplied."""

COPIED_BYTES = {"cpu": 2**27, "cuda": 2**30}
RUNS = 7


@dataclass(frozen=True)
class Roofline:
    """Peaks of one device at a number of threads, measured in float32.

    Attributes:
        macs_per_second: Of a large matrix product.
        bytes_per_second: Of a large copy; what is read and what is written both count.
    """

    macs_per_second: float
    bytes_per_second: float

    @property
    def ridge_macs_per_byte(self) -> float:
        """Arithmetic intensity from which on arithmetic is the limit."""
        return self.macs_per_second / self.bytes_per_second

    def bound(self, macs_per_byte: float) -> Literal["memory", "compute"]:
        """Say what limits a layer of this arithmetic intensity."""
        return "memory" if macs_per_byte < self.ridge_macs_per_byte else "compute"

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def measured_roofline(setup: LatencySetup) -> Roofline:
    """Measure the device's peaks with so many threads, or read what was measured before."""
    device = torch.device(setup.device or "cpu")
    with threads(setup), kept_table("roofline", versions(device)) as table:
        if not {"macs_per_second", "bytes_per_second"} <= table.keys():
            table.update(_measured(device))
        return Roofline(table["macs_per_second"], table["bytes_per_second"])


def _measured(device: torch.device) -> dict[str, float]:
    side, size = SIDE[device.type], COPIED_BYTES[device.type]
    with _full_precision(), torch.no_grad():
        left, right = (torch.ones(side, side, device=device) for _ in range(2))
        product = torch.empty(side, side, device=device)
        source = torch.ones(size // 4, device=device)
        target = torch.empty_like(source)
        return {
            "macs_per_second": side**3 / _best_seconds(lambda: torch.mm(left, right, out=product), device),
            "bytes_per_second": 2 * size / _best_seconds(lambda: target.copy_(source), device),
        }


def _best_seconds(run: Run, device: torch.device) -> float:
    return min(milliseconds(run, device) for _ in range(RUNS)) / 1000


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply in float32 proper on devices that could do with less."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
