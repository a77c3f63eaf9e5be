"""What is wrong with a network's shape, and what to do: costs, saliency, plan, activations → ranked `Finding`s.

`capacity` (too narrow), `redundancy` (too wide, dead, repeated), `cost` (where it spends), each a function from numbers
to findings; `confidence` asks whether other images, criteria and budgets agree; `ranking` says what to act on first.
"""

from archscan.findings.capacity import Bottleneck, GroupUse, capacity_bottlenecks, network_keep_ratio
from archscan.findings.cost import GroupWidth, ModuleCost, cost_findings
from archscan.findings.finding import Finding, FindingKind, Saving
from archscan.findings.ranking import ranked

__all__ = [
    "Bottleneck",
    "Finding",
    "FindingKind",
    "GroupUse",
    "GroupWidth",
    "ModuleCost",
    "Saving",
    "capacity_bottlenecks",
    "cost_findings",
    "network_keep_ratio",
    "ranked",
]
