"""Numbers that only pictures need: how layers hang together, saliency by group, what other budgets would lose.

Parts of a `Report`, frozen and plain like the rest of it. The decision that is not obvious: saliencies are kept as five
quantiles of each group, not one by one, so that a summary stays small enough to read and to mail.
"""

from dataclasses import dataclass
from typing import Literal

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class LayerLink:
    """One layer with weights, and which channel groups it reads and writes.

    Attributes:
        path: Module path.
        reads: Places in `Report.groups` of the groups whose channels are its inputs.
        writes: Of those whose channels are its outputs.
    """

    path: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]


@dataclass(frozen=True)
class GroupSaliency:
    """How the saliencies of one group's units are spread.

    Attributes:
        group: Its name.
        quantiles: At `QUANTILES`.
        per_mac: Mean saliency of a step over the MACs that the first step removed from it saves, in units of the
            saliency per MAC; None where it saves none, or where the group is frozen.
    """

    group: str
    quantiles: tuple[float, ...]
    per_mac: float | None


@dataclass(frozen=True)
class CurvePoint:
    """What a budget loses.

    Attributes:
        kept: Kept fraction of the dense cost.
        lost: Summed saliency of the removed units.
    """

    kept: float
    lost: float


@dataclass(frozen=True)
class Agreement:
    """Rank correlation (Spearman) of criteria over all units that may be removed.

    Attributes:
        criteria: Their names, the one that was used first.
        spearman: One row for each, one column for each.
    """

    criteria: tuple[str, ...]
    spearman: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class SaliencyDetail:
    """What is known of the saliencies.

    Attributes:
        groups: One for each group, in the order of `Report.groups`.
        curve: Best plans from the dense network to the narrowest widths; empty where losses do not add up.
        uniform: The same fraction kept of every group.
        agreement: None where nothing but one criterion could be computed from what was collected.
        curve_of: The cost that the curves are drawn over: the target's where that is counted, else MACs.
    """

    groups: tuple[GroupSaliency, ...]
    curve: tuple[CurvePoint, ...] = ()
    uniform: tuple[CurvePoint, ...] = ()
    agreement: Agreement | None = None
    curve_of: Literal["macs", "params"] = "macs"
