"""Choose a criterion for one network by a short audit: calibration batches → `Choice`.

The batches are halved: criteria score on one half, and loss changes are measured on the other, so that no image is
used for both. The decision that is not obvious: many candidates tie on a short audit, and those that do are put to the
test that matters: each makes its own plans, which are masked, and the one that loses least is taken. A criterion may be
right about units one at a time and make a bad plan, when all that it undervalues goes together.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import nn

from archscan.audit.run import AuditSettings, audit
from archscan.audit.summary import rank
from archscan.errors import BadInput
from archscan.groups import Coupling
from archscan.losses import LossFn
from archscan.options import ProgressCallback, silent
from archscan.report.audit import AuditedCriterion

SHORT = AuditSettings(units=48, sets=24, kept=(0.9, 0.8))
"""How large a short audit is."""


@dataclass(frozen=True)
class Choice:
    """A criterion that was chosen, and why.

    Attributes:
        name: The criterion.
        score: Mean of its rank correlations with the measured loss change, of single units and of sets.
        own_loss: Mean loss change by its own plans, unrepaired, over the fractions of the MACs of `SHORT`.
        tied: Other candidates whose score cannot be told from the best one's.
        candidates: All of them with their scores, the best first.
        ablations: Loss changes measured of single units and sets.
        samples: Calibration samples, half of which were scored on.
        seconds: What it took.
    """

    name: str
    score: float
    own_loss: float
    tied: tuple[str, ...]
    candidates: tuple[tuple[str, float], ...]
    ablations: int
    samples: int
    seconds: float

    def sentence(self) -> str:
        """Say what was chosen, from what, on what evidence and at what cost."""
        kept = " and ".join(f"{100 * fraction:g}" for fraction in SHORT.kept)
        others = (
            f"; {', '.join(self.tied)} could not be told from the best by that, and their own plans for {kept} % of "
            "the MACs lost no less"
            if self.tied
            else ""
        )
        return (
            f"The criterion {self.name} was chosen from {len(self.candidates)} by a short audit: its rank correlation "
            f"with the measured loss change of {self.ablations} removals is {self.score:.2f}{others} "
            f"({self.samples} images, half to score and half to measure, {self.seconds:.0f} s)."
        )


def choose_criterion(
    model: nn.Module,
    coupling: Coupling,
    batches: Iterable[Any],
    loss_fn: LossFn,
    names: Sequence[str],
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> Choice:
    """Audit criteria shortly and take the best: of those that tie, the one whose own plans lose least.

    It costs what scoring by all of them costs, on half of the batches, and some forty forward passes over the other:
    for ResNet-20 on 256 images of 32 x 32 pixels and nine criteria of one backward pass, 8 s of one core.

    Args:
        model: The network, on any device.
        coupling: Its groups and the places of its gates.
        batches: Calibration batches with true labels, two at least.
        loss_fn: Mean loss of a batch over its samples.
        names: Candidates; where two cannot be told apart by anything, the one that stands first is taken.
        seed: Of everything random.
        progress: Reports calibration batches scored, and then forward passes with something removed.

    Raises:
        BadInput: There is no candidate, one is unknown or cannot be scored, or there are fewer than two batches.
    """
    start = time.perf_counter()
    held = list(batches)
    if not names:
        raise BadInput("there is no criterion to choose from; name at least one")
    if len(held) < 2:
        raise BadInput(
            "a criterion cannot be chosen on one batch, since what it scores on must not be what it is judged on; pass"
            " more images or a smaller batch size"
        )
    settings = AuditSettings(SHORT.units, SHORT.sets, SHORT.kept, seed)
    bars = silent if progress is None else lambda _description: nullcontext(progress)
    found = audit(model, coupling, held[::2], held[1::2], loss_fn, names, settings=settings, progress=bars)
    rows = rank(found)
    tied = sorted((row for row in rows if row.tied), key=lambda row: (_own_loss(row), names.index(row.name)))
    return Choice(
        name=tied[0].name,
        score=tied[0].score,
        own_loss=_own_loss(tied[0]),
        tied=tuple(row.name for row in tied[1:]),
        candidates=tuple((row.name, row.score) for row in rows),
        ablations=len(found.drawn),
        samples=found.samples + found.losses.samples,
        seconds=time.perf_counter() - start,
    )


def _own_loss(row: AuditedCriterion) -> float:
    known = [made.loss_change for made in row.plans if made.loss_change is not None]
    return fmean(known) if known else 0.0
