"""What findings are about: a network with its plan, and what was measured of each of its groups.

`Network` prices widths, so that every saving that a finding names is exact by the cost model. `Measured` collects what
the calibration images say of a group beside the plan: directions that its activations and gradients span, parameters
that they determine, and how often it stands out in other plans.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from archscan.budgets import Budget, Costs, costs_at
from archscan.costs import CostModel
from archscan.findings.finding import Saving
from archscan.groups import ChannelGroup
from archscan.wording import enumerated

_EVERYTHING = Budget("macs", 1.0)


@dataclass(frozen=True, eq=False)
class Network:
    """A network and its plan.

    Attributes:
        groups: All channel groups, in the order of the cost model's widths.
        costs: Costs as a function of their kept steps.
        kept_widths_G: Steps that the plan keeps.
        macs_share_G: Fraction of the dense MACs in layers that read or write each group.
        measured_on: What the saliency was measured on, such as ``256 images``; empty where it reads weights only.
    """

    groups: Sequence[ChannelGroup]
    costs: CostModel
    kept_widths_G: np.ndarray
    macs_share_G: np.ndarray
    measured_on: str

    @property
    def full_widths_G(self) -> np.ndarray:
        """Steps of the dense network."""
        return self.costs.full_widths_G

    @property
    def free_G(self) -> np.ndarray:
        """Which groups may be cut, boolean."""
        return np.array([group.frozen is None for group in self.groups], dtype=bool)

    @property
    def channels_G(self) -> np.ndarray:
        """Full widths in channels."""
        return np.array([group.channels for group in self.groups])

    def cost(self, widths_G: np.ndarray) -> Costs:
        """Price one choice of widths."""
        return costs_at(self.costs, widths_G, _EVERYTHING)

    def saving(self, widths_G: np.ndarray, *, lossless: bool = False) -> Saving:
        """Price what these widths take off the dense network."""
        full, narrow = self.cost(self.full_widths_G), self.cost(widths_G)
        return Saving(full.macs - narrow.macs, full.params - narrow.params, lossless)

    def shares(self, saving: Saving) -> tuple[float, float]:
        """Give a saving as fractions of the dense MACs and parameters."""
        full = self.cost(self.full_widths_G)
        return saving.macs / max(full.macs, 1), saving.params / max(full.params, 1)

    def keep_ratio(self, keep_G: np.ndarray) -> float:
        """Give the kept fraction of the channels of all free groups; 1 where there are none."""
        channels_G = self.channels_G * self.free_G
        return float((channels_G * keep_G).sum() / channels_G.sum()) if channels_G.any() else 1.0


@dataclass(frozen=True)
class Measured:
    """What was measured of a group; None where it was not.

    Attributes:
        units: Its units.
        activation_rank: Effective rank of its activations' covariance (Roy and Vetterli 2007), of `units`.
        gradient_rank: The same of its gate gradients over the images; at most the number of images.
        well_determined: Gates that the images determine (MacKay 1992); at most the number of images.
        resamples: Share of bootstrap samples of the images on whose plans it stands out.
        criteria: Share of other criteria.
        budgets: Share of other budgets.
    """

    units: int = 0
    activation_rank: float | None = None
    gradient_rank: float | None = None
    well_determined: float | None = None
    resamples: float | None = None
    criteria: float | None = None
    budgets: float | None = None

    def numbers(self) -> dict[str, float]:
        """Give all that was measured, by name."""
        named = ((each.name, getattr(self, each.name)) for each in fields(self) if each.name != "units")
        return {name: float(value) for name, value in named if value is not None}

    def votes(self) -> str:
        """Say as a clause in which other plans the group stands out; empty where there were none."""
        shares = (
            (self.resamples, "in {} of resamples"),
            (self.criteria, "by {} of other criteria"),
            (self.budgets, "at {} of other budgets"),
        )
        named = [clause.format(f"{100 * share:.0f}%") for share, clause in shares if share is not None]
        return f" ({enumerated(named)} too)" if named else ""

    def spans(self) -> str:
        """Say as a clause in how many directions it differs between images, and how many gates are determined."""
        ranks = (("activations", self.activation_rank), ("gradients", self.gradient_rank))
        spans = [f"its {what} span {rank:.1f}" for what, rank in ranks if rank is not None]
        named = [*spans[:-1], f"{spans[-1]} of {self.units:,} directions"] if spans else []
        if self.well_determined is not None:
            named.append(f"the images determine {self.well_determined:.1f} of {self.units:,} gates")
        return f"; {enumerated(named)}" if named else ""
