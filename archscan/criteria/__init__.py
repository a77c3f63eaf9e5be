"""Find a criterion by its name and score with it: name, gate statistics → saliency of each unit.

`table` has the rows; ``a+b`` makes a criterion out of several.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

import numpy as np
from scipy.stats import rankdata

from archscan.criteria.table import CRITERIA, Criterion
from archscan.errors import BadInput
from archscan.gate_statistics import GateStatistics, Need

__all__ = ["CRITERIA", "Criterion", "CriterionRow", "criteria_table", "criterion", "score"]


@dataclass(frozen=True)
class CriterionRow:
    """A criterion in words.

    Attributes:
        name: What users type.
        score: Its formula.
        needs: What it reads, in plain words.
        cost: What collecting that takes for each batch.
        source: Where it comes from.
        summary: One sentence on when to use it.
    """

    name: str
    score: str
    needs: str
    cost: str
    source: str
    summary: str


_READS: Mapping[Need, tuple[str, ...]] = MappingProxyType(
    {
        "group": (),
        "summed": (),
        "weight_norm": (),
        "bn_scale": (),
        "read_norm": (),
        "layer_inputs": ("images",),
        "gradient": ("labels",),
        "sample_gradient": ("labels",),
        "layer_gradients": ("labels",),
        "fisher_gradient": ("class scores",),
        "hessian_ones": ("labels", "the Hessian"),
        "hessian_diagonal": ("labels", "the Hessian"),
        "sharpness": ("labels", "the Hessian"),
    }
)
"""What a user has to have for each statistic beyond weights, in plain words."""


def criterion(name: str) -> Criterion:
    """Find a criterion by its name; ``a+b`` averages the ranks of several.

    Raises:
        BadInput: There is none; the message has the closest names.
    """
    if name in CRITERIA:
        return CRITERIA[name]
    if "+" in name:
        return _ensemble(name)
    close = get_close_matches(name, CRITERIA, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(CRITERIA)}"
    raise BadInput(f"no criterion is called {name!r}; {hint}")


def score(name: str, statistics: GateStatistics) -> np.ndarray:
    """Compute the saliency of every unit by the criterion called `name`, shape [U].

    Raises:
        BadInput: There is no such criterion, the statistics lack what it needs, or a saliency is not finite.
    """
    return _finite(name, criterion(name).score(statistics))


def criteria_table() -> tuple[CriterionRow, ...]:
    """Describe every criterion in words, in the order of the table."""
    return tuple(
        CriterionRow(row.name, row.formula, _reads(row.needs), row.cost, row.source, row.summary)
        for row in CRITERIA.values()
    )


def _reads(needs: frozenset[Need]) -> str:
    """Say what a user has to have: images only where that is all, since labels come with images."""
    words = dict.fromkeys(word for need, found in _READS.items() if need in needs for word in found)
    if not words:
        return "weights only" if needs else "nothing"
    return ", ".join(word for word in words if word != "images") or "forward only"


def _finite(name: str, saliency_U: np.ndarray) -> np.ndarray:
    if not np.isfinite(saliency_U).all():
        unit = int(np.flatnonzero(~np.isfinite(saliency_U))[0])
        raise BadInput(f"the {name} saliency of unit {unit} is {saliency_U[unit]}; check the weights and the images")
    return saliency_U


# Ensembles ------------------------------------------------------------------------------------------------------------


def _ensemble(name: str) -> Criterion:
    """Make the criterion that averages the ranks of those that `name` joins by plus signs.

    Raises:
        BadInput: One is missing, unknown, or there twice.
    """
    names = name.split("+")
    if not all(names):
        raise BadInput(f"{name!r} joins nothing on one side of a plus sign; name two criteria, such as obd+magnitude")
    if len(set(names)) < len(names):
        twice = next(each for each in names if names.count(each) > 1)
        raise BadInput(f"{name!r} names {twice} more than once; name each criterion once")
    rows = [criterion(each) for each in names]
    return Criterion(
        name=name,
        score=lambda statistics: _mean_rank(rows, statistics),
        formula=f"mean rank over the units, read on the scale of {names[0]}",
        needs=frozenset().union(*(row.needs for row in rows)),
        cost=" and ".join(dict.fromkeys(row.cost for row in rows)),
        source=" and ".join(dict.fromkeys(row.source for row in rows)),
        summary="When criteria err in different ways; the first lends its scale, since bare ranks let dear units go.",
    )


def _mean_rank(rows: Sequence[Criterion], statistics: GateStatistics) -> np.ndarray:
    """Average the ranks of each unit, and read the mean on the scale of the first criterion.

    Ranks are scaled to [0, 1], ties share their mean rank, and a mean rank of r becomes the r-quantile of the first
    criterion's saliencies. A plan adds saliencies up: by bare ranks, the dearest unit costs no more than two middling
    ones, and goes where it saves most.
    """
    found = [_finite(row.name, row.score(statistics)) for row in rows]
    last = max(1, statistics.unit_count - 1)
    mean_U = np.mean([(rankdata(saliency_U) - 1) / last for saliency_U in found], axis=0)
    return np.quantile(found[0], mean_U)
