"""What a slimming was asked for, and what came of it: the frozen data between `slimming` and the reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from archscan import export
from archscan.costs import CostModel
from archscan.errors import BadInput
from archscan.groups import Coupling
from archscan.planner import Plan
from archscan.recipes import Recipe
from archscan.surgery import Surgery
from archscan.verify import Verification
from archscan.widths import WidthRule

RECOVERIES = ("none", "bn")


@dataclass(frozen=True)
class SlimSettings:
    """How to slim, beyond the budget, the data and the criterion.

    Attributes:
        rule: Which widths are allowed.
        protect: Shell patterns of layers that keep their width.
        recover: ``bn`` re-estimates BatchNorm statistics on the calibration batches after slimming.
        seed: Of everything random.
    """

    rule: WidthRule = field(default_factory=WidthRule)
    protect: tuple[str, ...] = ()
    recover: Literal["none", "bn"] = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.protect, str):
            raise BadInput(f"protect is the text {self.protect!r}; pass a tuple of patterns: ({self.protect!r},)")
        if self.recover not in RECOVERIES:
            raise BadInput(f"recover is {self.recover!r}; it must be {' or '.join(map(repr, RECOVERIES))}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise BadInput(f"the seed is {self.seed!r}; it must be a whole number from 0 on")


@dataclass(frozen=True, eq=False)
class Analysis:
    """What is known of a network before anything is planned.

    Attributes:
        coupling: Channel groups, places of gates, sizes.
        costs: MACs, parameters and activations as functions of the groups' widths.
    """

    coupling: Coupling
    costs: CostModel


@dataclass(frozen=True)
class Scored:
    """What the saliency was measured on.

    Attributes:
        samples: How many calibration samples.
        synthetic: Whether they were noise.
        labels: ``dataset``, or ``model`` where drawn from the model's own predictions (the true Fisher).
    """

    samples: int
    synthetic: bool
    labels: Literal["dataset", "model"]


@dataclass(frozen=True, eq=False)
class SlimResult:
    """A slim network, how it came about, and the proof.

    Attributes:
        model: The slim network: an ordinary, trainable module of the original's class. It is in eval mode, whatever the
            original was in, as `archscan.load` gives it; call ``model.train()`` to fine-tune it.
        plan: What was kept, and the predicted costs.
        surgery: What was cut, enough to repeat it on a fresh original.
        analysis: Coupling and costs of the original.
        saliency_U: Saliency of each unit.
        scored: What the saliency was measured on; None where the criterion reads weights only.
        verification: The comparison with the masked original, before any repair.
        recovery: What was repaired, as a clause; None where nothing was.
        rule: Which widths were allowed.
        notes: What a user has to know, a sentence each.
        warnings: What a user must not overlook, a sentence each.
        seconds: Time of each stage, measured.
        recipe: How to build the original's architecture; None where only its user can.
        history: Earlier slimmings of the same network.
    """

    model: nn.Module
    plan: Plan
    surgery: Surgery
    analysis: Analysis
    saliency_U: np.ndarray
    scored: Scored | None
    verification: Verification
    recovery: str | None
    rule: WidthRule
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]
    recipe: Recipe | None = None
    history: tuple[export.Step, ...] = ()

    @property
    def summary(self) -> dict[str, Any]:
        """The numbers of this run, as ``summary.json`` has them."""
        from archscan.summary import report_of

        return report_of(self).to_json()

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write ``plan.json``, ``model.safetensors``, ``summary.json`` and ``report.html``; return the folder.

        Raises:
            BadInput: The folder exists and is not to be overwritten, or cannot be written.
        """
        from archscan.summary import report_of, save_result

        return save_result(self, report_of(self), Path(folder), overwrite=overwrite)
