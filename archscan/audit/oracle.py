"""Measure what removing units does to the loss: model, coupling, ablations, held-out batches → `Losses`.

The loss with units masked where they are consumed is the loss of the network rebuilt without them, wherever slimming is
exact. All ablations see the same images, so that what is measured is a difference of pairs.

Shape suffixes: A ablations, B held-out batches.
"""

from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from archscan.audit.ablations import Ablation
from archscan.audit.replay import Replay
from archscan.capture import train_mode
from archscan.errors import BadInput
from archscan.groups import Coupling
from archscan.losses import LossFn
from archscan.sharding import on_device, sample_count

Progress = Callable[[int, int], None]
"""Called with (forward passes done, passes in all; 0 where the number of batches is not known)."""

CHECKED = 8
"""Ablations of the first batch that are run in full as well, to see that skipping changes nothing."""
_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class Losses:
    """Mean losses by batch, float64.

    Attributes:
        sizes_B: Samples of each batch.
        dense_B: Loss with nothing removed.
        ablated_AB: Loss with each ablation's units removed.
        skipped: Whether parts of the network that come before a removal were not run again.
    """

    sizes_B: np.ndarray
    dense_B: np.ndarray
    ablated_AB: np.ndarray
    skipped: bool

    @property
    def change_AB(self) -> np.ndarray:
        """Loss change of each ablation on each batch."""
        return self.ablated_AB - self.dense_B

    @property
    def change_A(self) -> np.ndarray:
        """Loss change of each ablation, the mean over samples."""
        return np.average(self.change_AB, axis=1, weights=self.sizes_B)

    @property
    def dense(self) -> float:
        """Loss with nothing removed, the mean over samples."""
        return float(np.average(self.dense_B, weights=self.sizes_B))

    @property
    def samples(self) -> int:
        """Held-out samples."""
        return int(self.sizes_B.sum())


def measure(
    model: nn.Module,
    coupling: Coupling,
    ablations: Sequence[Ablation],
    batches: Iterable[Any],
    loss_fn: LossFn,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Losses:
    """Measure the loss without each ablation's units, in eval mode; the model is left unchanged.

    Args:
        model: The network, on any device; batches are moved there.
        coupling: Where units are consumed.
        ablations: What to remove, each on its own.
        batches: Held-out batches, taken one at a time.
        loss_fn: Mean loss of a batch over its samples.
        seed: Seeds whatever is random in the model, anew before each run.
        progress: Reports forward passes done.

    Raises:
        BadInput: There is no batch, a loss is not finite, or the model ran differently from its capture.
    """
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    total = len(batches) * len(ablations) if isinstance(batches, Sized) else 0
    sizes: list[int] = []
    rows: list[list[float]] = []
    replay = Replay(model, coupling, device)
    with (
        train_mode(model, False),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.no_grad(),
        replay.installed(),
    ):
        for batch in batches:
            run = _Run(model, on_device(batch, device), loss_fn, seed, len(sizes) + 1)
            row = [replay.keep(run)]
            if not sizes:
                _check_skipping(replay, run, ablations)
            for ablation in ablations:
                row.append(replay.masked(ablation.units, run))
                if progress is not None:
                    progress(len(sizes) * len(ablations) + len(row) - 1, total)
            rows.append(row)
            sizes.append(sample_count(run.batch, "held-out"))
    if not sizes:
        raise BadInput("there is no held-out batch; pass at least one")
    losses = np.array(rows).T
    return Losses(np.array(sizes), losses[0], losses[1:], replay.skips)


@dataclass(frozen=True, eq=False)
class _Run:
    """The loss of one batch, as a function without arguments."""

    model: nn.Module
    batch: Any
    loss_fn: LossFn
    seed: int
    number: int

    def __call__(self) -> float:
        torch.manual_seed(self.seed)
        value = self.loss_fn(self.model, self.batch)
        loss = float(value)
        if not np.isfinite(loss):
            raise BadInput(
                f"the loss of held-out batch {self.number} is {loss}; check the weights and the images for NaN and"
                " infinity"
            )
        return loss


def _check_skipping(replay: Replay, run: _Run, ablations: Sequence[Ablation]) -> None:
    """Run some ablations in full too; a network whose modules remember things between calls is not skipped in."""
    for ablation in ablations[:: max(1, len(ablations) // CHECKED)]:
        if not replay.skips:
            return
        short = replay.masked(ablation.units, run)
        replay.skips = False
        full = replay.masked(ablation.units, run)
        replay.skips = abs(short - full) <= _TOLERANCE * max(1.0, abs(full))
