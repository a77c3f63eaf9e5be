"""Which criterion is right about *this* network: predicted loss changes against measured ones.

``ablations`` draws what is removed, ``replay`` and ``oracle`` measure what that does, ``agreement`` has the statistics,
``run`` puts criteria against the measurement, ``summary`` ranks them, and ``choose`` does it all shortly.
"""

from archscan.audit.ablations import Ablation, draw_sets, draw_units, own_plan
from archscan.audit.choose import Choice, choose_criterion
from archscan.audit.oracle import Losses, measure
from archscan.audit.run import Audit, AuditSettings, Prediction, audit
from archscan.audit.summary import measured_rows, rank, reliability_of

__all__ = [
    "Ablation",
    "Audit",
    "AuditSettings",
    "Choice",
    "Losses",
    "Prediction",
    "audit",
    "choose_criterion",
    "draw_sets",
    "draw_units",
    "measure",
    "measured_rows",
    "own_plan",
    "rank",
    "reliability_of",
]
