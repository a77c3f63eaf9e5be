"""What a repair did and how it was checked: steps, layers, blocks → `Repaired`, which says it in sentences."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from archscan.blocks import BlockRepair
from archscan.wording import enumerated

StepName = Literal["bias", "ls", "blocks", "bn"]

_SAID: Mapping[StepName, str] = {
    "ls": "least squares",
    "bias": "bias correction",
    "blocks": "block by block",
    "bn": "BatchNorm recalibration",
}
_BY_CHANCE = ", which chance explains: each block that was tuned fits these images better"


@dataclass(frozen=True)
class LayerRepair:
    """What became of one layer.

    Attributes:
        weight: Path of its weight.
        changed: What was changed: ``weights``, ``bias`` or ``nothing``.
        compared: Where outputs were compared: behind the ``layer`` and its BatchNorm, or behind the ``sum`` with the
            shortcut.
        error_before: Squared error on held-out images, relative to the variance of the original's outputs there.
        error_after: The same after the repair.
        ridge: Strength that the hold-out chose, in units of the mean of the Gram matrix's diagonal; None where weights
            stayed.
        columns: Inputs of one output.
        rows: Positions that were fitted to.
    """

    weight: str
    changed: Literal["weights", "bias", "nothing"]
    compared: Literal["layer", "sum"]
    error_before: float
    error_after: float
    ridge: float | None
    columns: int
    rows: int


@dataclass(frozen=True)
class Step:
    """One repair of the whole network.

    Attributes:
        name: ``bias``, ``ls``, ``blocks``, or ``bn`` for BatchNorm recalibration.
        kept: Whether it stays; it is taken back otherwise.
        loss_before: Distance of the outputs from the original's on held-out images, the mean of `distances`.
        loss_after: The same after the step.
    """

    name: StepName
    kept: bool
    loss_before: float
    loss_after: float

    @property
    def by_chance(self) -> bool:
        """Whether it was kept although these few images say that it brought the outputs no closer."""
        return self.kept and self.loss_after >= self.loss_before


@dataclass(frozen=True, eq=False)
class Repaired:
    """A repaired network, and how it was done.

    Attributes:
        model: The new network.
        steps: What was tried, in order.
        layers: What became of each layer in the last step of this kind that was kept; empty where none was.
        skipped: Weight or name of each contraction that was left alone, and why.
        samples: Images that were fitted to.
        holdout: Images that it was checked on.
        mirrored: Whether the mirror images of the former were fitted to as well.
        blocks: What became of each block; empty where none was tuned.
    """

    model: nn.Module
    steps: tuple[Step, ...]
    layers: tuple[LayerRepair, ...]
    skipped: Mapping[str, str]
    samples: int
    holdout: int
    mirrored: bool = False
    blocks: tuple[BlockRepair, ...] = ()

    def clause(self) -> str:
        """Say in one clause what was done."""
        named = {
            "ls": f"weights of {sum(layer.changed == 'weights' for layer in self.layers)} layers re-solved",
            "bias": f"mean outputs of {sum(layer.changed == 'bias' for layer in self.layers)} layers corrected",
            "blocks": f"{sum(block.changed for block in self.blocks)} blocks tuned",
            "bn": "BatchNorm statistics recalibrated",
        }
        kept = [named[step.name] for step in self.steps if step.kept]
        done = enumerated(kept) or "nothing repaired"
        back = ", ".join(step.name for step in self.steps if not step.kept)
        mirrored = " and their mirror images" if self.mirrored else ""
        return f"{done} on {self.samples} images{mirrored}, checked on {self.holdout} others" + (
            f" ({back} did not help and was taken back)" if back else ""
        )

    def note(self) -> str:
        """Say in a sentence how it was seen that no step hurts."""
        said = ", ".join(
            f"{_SAID[step.name]} {'was kept' if step.kept else 'was rolled back'} "
            f"({step.loss_before:.3g} to {step.loss_after:.3g}{_BY_CHANCE if step.by_chance else ''})"
            for step in self.steps
        )
        counts = (
            (sum(layer.changed == "nothing" for layer in self.layers), len(self.layers), "layers"),
            (sum(not block.changed for block in self.blocks), len(self.blocks), "blocks"),
        )
        rest = [
            f"no change to {stayed} of {total} {what} fitted those images better"
            for stayed, total, what in counts
            if stayed
        ]
        if self.skipped:
            name, why = next(iter(self.skipped.items()))
            rest.append(f"{len(self.skipped)} could not be solved for (such as {name}: {why})")
        return (
            f"Each repair is kept only where it brings the outputs closer to the original's on {self.holdout} held-out "
            f"calibration images, or is rolled back: {said}{'; ' if rest else ''}{' and '.join(rest)}."
        )
