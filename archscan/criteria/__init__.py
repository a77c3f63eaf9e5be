"""The table of criteria: gate statistics → saliency of each unit.

A criterion is one function and one row here. It sees `GateStatistics` only, never a model; its row says which of them
it needs and what collecting those costs. Larger saliency means keep.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

import numpy as np

from archscan.criteria import baselines, fisher, sosp, taylor
from archscan.errors import BadInput
from archscan.gates import GateStatistics, Need


@dataclass(frozen=True)
class Criterion:
    """One row of the table.

    Attributes:
        name: What users type.
        score: The saliency of shape [U], not negative.
        needs: The gate statistics that it reads.
        cost: What collecting them takes for each batch.
        source: Where it comes from.
        summary: One sentence on when to use it.
    """

    name: str
    score: Callable[[GateStatistics], np.ndarray]
    needs: frozenset[Need]
    cost: str
    source: str
    summary: str


def _row(
    name: str, function: Callable[[GateStatistics], np.ndarray], needs: set[Need], cost: str, source: str, summary: str
) -> Criterion:
    return Criterion(name, function, frozenset(needs), cost, source, summary)


_FREE = "no data"
_FIRST = "one forward and one backward pass"
_DRAWN = "one forward and two backward passes"
_DOUBLE = "one forward, one backward and one double-backward pass"

_ROWS = (
    _row(
        "random",
        baselines.random,
        set(),
        _FREE,
        "chance",
        "The floor: a criterion that does not beat it has learned nothing about the network.",
    ),
    _row(
        "magnitude",
        baselines.magnitude,
        {"weight_norm"},
        _FREE,
        "Han et al. 2015",
        "When there are no data at all; weights of different layers are hardly comparable.",
    ),
    _row(
        "bn-scale",
        baselines.bn_scale,
        {"bn_scale"},
        _FREE,
        "Liu et al. 2017",
        "For networks trained with an L1 penalty on their BatchNorm scales; weak without it.",
    ),
    _row(
        "taylor-fo",
        taylor.taylor_fo,
        {"gradient"},
        _FIRST,
        "Molchanov et al. 2019",
        "To compare with published Taylor pruning; depends on the batch size, since it squares batch means.",
    ),
    _row(
        "taylor-abs",
        taylor.taylor_abs,
        {"sample_gradient"},
        _FIRST,
        "mean over samples of the first-order change (cf. Molchanov et al. 2017)",
        "When a fast criterion has to hold for a trained network, whose mean gradient is mostly noise.",
    ),
    _row(
        "taylor-so",
        taylor.taylor_so,
        {"gradient", "hessian_diagonal"},
        "one forward, one backward and eight double-backward passes",
        "Molchanov et al. 2019",
        "When a unit's own curvature matters and its interactions do not; the slowest, and an estimate with noise.",
    ),
    _row(
        "obd",
        fisher.obd,
        {"sample_gradient"},
        _FIRST,
        "LeCun et al. 1990; Theis et al. 2018",
        "For a trained network, near a minimum of the loss: second-order information at the price of first order.",
    ),
    _row(
        "sosp-i",
        sosp.sosp_i,
        {"gradient", "fisher_gradient"},
        _DRAWN,
        "Nonnenmacher et al. 2022",
        "When pairs of units matter and classes are the output; takes a product of all pairs of units as well.",
    ),
    _row(
        "sosp-h",
        sosp.sosp_h,
        {"gradient", "hessian_ones"},
        _DOUBLE,
        "Nonnenmacher et al. 2022",
        "When interactions of units matter, in large networks and for any loss; needs an exact Hessian-vector product.",
    ),
)

CRITERIA: Mapping[str, Criterion] = MappingProxyType({row.name: row for row in _ROWS})
"""All criteria, by name."""


def criterion(name: str) -> Criterion:
    """Find a criterion by its name.

    Raises:
        BadInput: There is none; the message has the closest names.
    """
    if name in CRITERIA:
        return CRITERIA[name]
    close = get_close_matches(name, CRITERIA, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(CRITERIA)}"
    raise BadInput(f"no criterion is called {name!r}; {hint}")


def score(name: str, statistics: GateStatistics) -> np.ndarray:
    """Compute the saliency of every unit by the criterion called `name`, shape [U].

    Raises:
        BadInput: There is no such criterion, the statistics lack what it needs, or a saliency is not finite.
    """
    saliency_U = criterion(name).score(statistics)
    if not np.isfinite(saliency_U).all():
        unit = int(np.flatnonzero(~np.isfinite(saliency_U))[0])
        raise BadInput(f"the {name} saliency of unit {unit} is {saliency_U[unit]}; check the weights and the images")
    return saliency_U
