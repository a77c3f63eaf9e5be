"""Coupling: which channels of which tensors belong together. Recorded run → `Components` of united labels.

`walk` applies the table of rules to a recorded run, the modules named after kinds of ops fill the table, and
`components` reads what the rules recorded. Everything works on label planes (`planes`).
"""

from archscan.coupling import contractions, elementwise, layout, products, statistics  # each fills the table of rules
from archscan.coupling.components import Components, Fibres, marked, mixing_places, resolve
from archscan.coupling.labels import Record
from archscan.coupling.walk import RULES, Walk, rule

__all__ = [
    "RULES",
    "Components",
    "Fibres",
    "Record",
    "Walk",
    "contractions",
    "elementwise",
    "layout",
    "marked",
    "mixing_places",
    "products",
    "resolve",
    "rule",
    "statistics",
]
