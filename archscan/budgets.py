"""What must not be exceeded: `Budget`, `Costs` and their JSON forms; costs, budget → the limits of a search.

A budget is the kept fraction of a dense network's cost, or of several. The decision that is not obvious: a budget on
peak memory is not one limit but one for each moment of the run, of which those that even the dense network keeps are
left out, since no cost grows where widths shrink.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, get_args

import numpy as np

from archscan.costs import BudgetKind, CostModel, Quadratic
from archscan.errors import BadInput, InfeasibleBudget

NOUNS = {"macs": "MACs", "params": "parameters", "latency": "measured time", "memory": "peak activation memory"}


@dataclass(frozen=True)
class Budget:
    """A cost that must not be exceeded, and others that must not be either.

    Attributes:
        kind: What is limited; one MAC is one FLOP.
        ratio: Kept fraction of the dense network's cost, above 0 and at most 1.
        also: Budgets on other costs, to be met as well.
    """

    kind: BudgetKind
    ratio: float
    also: tuple["Budget", ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(BudgetKind):
            raise BadInput(f"the budget is on {self.kind!r}; it must be on {' or '.join(map(repr, NOUNS))}")
        kinds = [each.kind for each in self.parts]
        if len(set(kinds)) < len(kinds) or any(each.also for each in self.also):
            raise BadInput(f"the budgets are on {', '.join(kinds)}; give one for each kind of cost")
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)) or not 0 < self.ratio <= 1:
            raise BadInput(f"the target ratio is {self.ratio!r}; it is the kept fraction, above 0 and at most 1")

    @property
    def parts(self) -> tuple["Budget", ...]:
        """All that is to be met, one cost each."""
        return (replace(self, also=()), *self.also) if self.also else (self,)

    def limit(self, dense: int) -> int:
        """Round the budget down to a whole cost, reading the ratio as the decimal number that it prints as."""
        return math.floor(Fraction(repr(float(self.ratio))) * dense)


@dataclass(frozen=True)
class Costs:
    """Costs of a network per image.

    Attributes:
        macs: Multiply-accumulates.
        params: Parameters.
        activations: Elements of the outputs of its contractions.
        memory: Most elements that are held at the same time (see `liveness`); None where no budget is on it.
        latency: Time by the latency model, in its units; None where no budget is on it.
    """

    macs: int
    params: int
    activations: int
    memory: int | None = None
    latency: int | None = None


@dataclass(frozen=True, eq=False)
class Limit:
    """One cost as a quadratic form in the widths, and what it must not exceed."""

    price: Quadratic
    limit: int

    def excess(self, widths_G: np.ndarray) -> float:
        """Say by which fraction of the limit widths exceed it; at most 0 where they do not."""
        return (self.price.at(widths_G) - self.limit) / max(self.limit, 1)


def limits_of(costs: CostModel, budget: Budget, narrowest_G: np.ndarray) -> tuple[tuple[Limit, ...], ...]:
    """List the limits that a budget sets, for each of its parts, the one that the dense network exceeds most first.

    Args:
        costs: Costs as a function of the groups' kept steps.
        budget: What must not be exceeded.
        narrowest_G: The narrowest widths that are allowed.

    Raises:
        BadInput: A network that costs nothing.
        InfeasibleBudget: Even the narrowest widths cost more.
    """
    return tuple(_limits_of_part(costs, part, narrowest_G) for part in budget.parts)


def _limits_of_part(costs: CostModel, budget: Budget, narrowest_G: np.ndarray) -> tuple[Limit, ...]:
    full_G, noun = costs.full_widths_G, NOUNS[budget.kind]
    dense, narrowest = (costs.limited(budget.kind, widths_G) for widths_G in (full_G, narrowest_G))
    limit = budget.limit(dense)
    if dense == 0:
        raise BadInput(f"the network has no {noun} to save; set the target on something that it has")
    if narrowest > limit:
        if narrowest == dense:
            raise InfeasibleBudget(
                f"nothing of the {noun} can be saved: every channel group is frozen, protected or at its minimum "
                "width; see why with archscan scan, or choose another target"
            )
        # rounded up, so that the printed end of the range can be asked for
        lowest = math.ceil(Fraction(narrowest, dense) * 1000) / 1000
        raise InfeasibleBudget(
            f"a target of {budget.ratio:g} of the dense {noun} is below what the minimum widths, the frozen and the "
            f"protected groups allow (reachable: {lowest:.3f} to 1.000 of the dense {noun}); ask for more"
        )
    limits = [Limit(price, limit) for price in costs.quadratics(budget.kind)]
    limits.sort(key=lambda each: -each.excess(full_G))
    return (limits[0], *(each for each in limits[1:] if each.excess(full_G) > 0))


def costs_at(costs: CostModel, widths_G: np.ndarray, budget: Budget) -> Costs:
    """Price widths by everything that is counted always, and by what the budget is on."""
    counted = {kind: costs.evaluate(kind, widths_G) for kind in ("macs", "params", "activations")}
    further = {part.kind: costs.limited(part.kind, widths_G) for part in budget.parts if part.kind not in counted}
    return Costs(**counted, **further)


# --- JSON -----------------------------------------------------------------------------------------------------------

MAX_COST = 2**53
"""No network comes near this; a plan that exceeds it was edited or damaged."""


def refuse(where: str, problem: str) -> BadInput:
    """Say what is wrong with a plan that was read."""
    return BadInput(f"{where} of the plan {problem}; it was edited or damaged, so make it again")


def mapping_of_names(value: Any, where: str) -> dict[str, Any]:
    """Read a mapping with texts as keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise refuse(where, "is not a mapping of names")
    return dict(value)


def require_keys(value: Any, where: str, expected: Mapping[str, Any]) -> None:
    """See that a mapping has exactly these keys."""
    found = mapping_of_names(value, where)
    if different := sorted(set(found) ^ set(expected)):
        raise refuse(where, f"has missing or unknown entries ({', '.join(map(repr, different[:5]))})")


def is_count(value: Any, limit: int) -> bool:
    """Say whether a value is a whole number from 0 to below a limit."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit


def read_number(value: Any, where: str) -> float:
    """Read a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise refuse(where, f"is {value!r}, not a finite number")
    return float(value)


def costs_json(costs: Costs) -> dict[str, int]:
    """Write as JSON values; what was not counted is left out."""
    return {name: value for name, value in vars(costs).items() if value is not None}


def budget_json(budget: Budget) -> dict[str, Any]:
    """Write as JSON values."""
    also = [{"kind": each.kind, "ratio": each.ratio} for each in budget.also]
    return {"kind": budget.kind, "ratio": budget.ratio, **({"also": also} if also else {})}


def read_budget(value: Any) -> Budget:
    """Read what `budget_json` wrote, or refuse."""
    found = mapping_of_names(value, "budget")
    also = found.pop("also", [])
    for each in (found, *(also if isinstance(also, list) else [also])):
        require_keys(each, "budget", {"kind": None, "ratio": None})
    return Budget(found["kind"], found["ratio"], tuple(Budget(each["kind"], each["ratio"]) for each in also))


def read_costs(value: Any, where: str) -> Costs:
    """Read what `costs_json` wrote, or refuse."""
    optional = {name for name, entry in Costs.__dataclass_fields__.items() if entry.default is None}
    found = mapping_of_names(value, where)
    require_keys(
        found, where, {name: None for name in Costs.__dataclass_fields__ if {name} - optional or name in found}
    )
    for name, cost in value.items():
        if not is_count(cost, MAX_COST):
            raise refuse(f"{where}.{name}", f"is {str(cost)[:40]}, not a whole number below 2^53")
    return Costs(**value)
