"""What to keep and what it will cost: groups, saliency, costs, budget → `Plan`.

A plan names, for every channel group, the steps that stay in each fibre. Its cost is never above the budget, and no
single step of any group would still fit below it. `plan` loses as little saliency as it can; `uniform_plan`, the
baseline, gives every group the same keep ratio.

The decision that is not obvious: widths are chosen first (`search`), knowing only what each width of a group loses at
best; which units stay then follows from their saliencies alone.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from archscan.costs import CostModel
from archscan.errors import BadInput, InfeasibleBudget
from archscan.groups import ChannelGroup
from archscan.search import Problem, State, search, uniform
from archscan.set_effects import SetEffects, refine, removed_units
from archscan.widths import WidthRule, best_steps, choices

__all__ = ["Budget", "BudgetKind", "Costs", "Plan", "WidthRule", "check_fits", "plan", "protect", "uniform_plan"]

BudgetKind = Literal["macs", "params"]

RESTART_WORK = 2_000
"""Random restarts of one search times the square of its groups: small networks get many, large ones few."""


@dataclass(frozen=True)
class Budget:
    """A cost that must not be exceeded.

    Attributes:
        kind: What is counted; one MAC is one FLOP.
        ratio: Kept fraction of the dense network's cost, above 0 and at most 1.
    """

    kind: BudgetKind
    ratio: float

    def __post_init__(self) -> None:
        if self.kind not in ("macs", "params"):
            raise BadInput(f"the budget is on {self.kind!r}; it must be on 'macs' or 'params'")
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)) or not 0 < self.ratio <= 1:
            raise BadInput(f"the target ratio is {self.ratio!r}; it is the kept fraction, above 0 and at most 1")

    def limit(self, dense: int) -> int:
        """Round the budget down to a whole cost, reading the ratio as the decimal number that it prints as."""
        return math.floor(Fraction(repr(float(self.ratio))) * dense)


@dataclass(frozen=True)
class Costs:
    """Costs of a network per image: multiply-accumulates, parameters, elements of the outputs of its contractions."""

    macs: int
    params: int
    activations: int


@dataclass(frozen=True)
class Plan:
    """What is kept.

    Attributes:
        kept: Group name → for each fibre the kept steps, sorted; all groups are listed, frozen ones in full.
        budget: What was asked for.
        before: Costs of the dense network.
        after: Costs of the planned one.
        saliency_lost: Summed saliency of the removed units.
        saliency_lost_uniform: The same for the uniform plan at the same budget.
        provenance: Criterion, seed, data, versions; JSON values only.
    """

    kept: Mapping[str, tuple[tuple[int, ...], ...]]
    budget: Budget
    before: Costs
    after: Costs
    saliency_lost: float
    saliency_lost_uniform: float
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Write as JSON values."""
        return {
            "kept": {name: [list(fibre) for fibre in fibres] for name, fibres in self.kept.items()},
            "budget": {"kind": self.budget.kind, "ratio": self.budget.ratio},
            "before": vars(self.before).copy(),
            "after": vars(self.after).copy(),
            "saliency_lost": self.saliency_lost,
            "saliency_lost_uniform": self.saliency_lost_uniform,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Plan":
        """Read what `to_json` wrote, trusting nothing.

        Raises:
            BadInput: Anything is missing, unknown, of another type, out of order or absurdly large.
        """
        _keys(data, "the plan", cls.__dataclass_fields__)
        _keys(data["budget"], "budget", Budget.__dataclass_fields__)
        kept = _mapping(data["kept"], "kept")
        plan = cls(
            kept={name: _read_fibres(fibres, name) for name, fibres in kept.items()},
            budget=Budget(data["budget"]["kind"], data["budget"]["ratio"]),
            before=_read_costs(data["before"], "before"),
            after=_read_costs(data["after"], "after"),
            saliency_lost=_read_number(data["saliency_lost"], "saliency_lost"),
            saliency_lost_uniform=_read_number(data["saliency_lost_uniform"], "saliency_lost_uniform"),
            provenance=_mapping(data["provenance"], "provenance"),
        )
        for kind in Costs.__dataclass_fields__:
            if getattr(plan.after, kind) > getattr(plan.before, kind):
                raise BadInput(
                    f"the plan's {kind} grow from before to after; it was edited or damaged, so make it again"
                )
        return plan


MAX_UNITS = 1_000_000
MAX_COST = 2**53
"""No network comes near these; a plan that exceeds them was edited or damaged."""


def _refuse(where: str, problem: str) -> BadInput:
    return BadInput(f"{where} of the plan {problem}; it was edited or damaged, so make it again")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _refuse(where, "is not a mapping of names")
    return dict(value)


def _keys(value: Any, where: str, expected: Mapping[str, Any]) -> None:
    found = _mapping(value, where)
    if different := sorted(set(found) ^ set(expected)):
        raise _refuse(where, f"has missing or unknown entries ({', '.join(map(repr, different[:5]))})")


def _is_count(value: Any, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit


def _read_number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise _refuse(where, f"is {value!r}, not a finite number")
    return float(value)


def _read_costs(value: Any, where: str) -> Costs:
    _keys(value, where, Costs.__dataclass_fields__)
    for name, cost in value.items():
        if not _is_count(cost, MAX_COST):
            raise _refuse(f"{where}.{name}", f"is {str(cost)[:40]}, not a whole number below 2^53")
    return Costs(**value)


def _read_fibres(value: Any, name: str) -> tuple[tuple[int, ...], ...]:
    """Read the kept steps of one group: at least one fibre, all of one length, each strictly increasing."""
    where = f"group {name[:80]!r}"
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise _refuse(where, "is not a list of fibres")
    for fibre in value:
        if not isinstance(fibre, Sequence) or isinstance(fibre, str) or not 0 < len(fibre) <= MAX_UNITS:
            raise _refuse(where, "has a fibre that is not a list of at least one step")
        if not all(_is_count(step, MAX_UNITS) for step in fibre):
            raise _refuse(where, f"keeps a step that is not a whole number from 0 to {MAX_UNITS - 1}")
        if any(first >= second for first, second in pairwise(fibre)):
            raise _refuse(where, "keeps steps that are not sorted and distinct")
    if len({len(fibre) for fibre in value}) > 1:
        raise _refuse(where, "keeps more in one fibre than in another")
    return tuple(tuple(fibre) for fibre in value)


def check_fits(plan: Plan, groups: Sequence[ChannelGroup]) -> None:
    """Hold a plan against the groups of the network that it is about to be applied to.

    Raises:
        BadInput: Another set of groups, another number of fibres, or a step that a group does not have.
    """
    names = {group.name for group in groups}
    if different := sorted(names ^ set(plan.kept)):
        raise BadInput(f"the plan is of another network: {different[0]!r} is a channel group of one of the two only")
    for group in groups:
        fibres = plan.kept[group.name]
        if len(fibres) != len(group.units) or max(fibre[-1] for fibre in fibres) >= group.steps:
            raise BadInput(
                f"the plan is of another network: in {group.name} it keeps {len(fibres)} fibres up to step "
                f"{max(fibre[-1] for fibre in fibres)}, but there are {len(group.units)} of {group.steps} steps"
            )


def plan(
    groups: Sequence[ChannelGroup],
    saliency_U: np.ndarray,
    costs: CostModel,
    budget: Budget,
    rule: WidthRule,
    *,
    seed: int = 0,
    gone_U: np.ndarray | None = None,
    effects: SetEffects | None = None,
) -> Plan:
    """Keep the units that lose least saliency, at a cost of at most `budget` and as close below as widths allow.

    Args:
        groups: All channel groups, in the order of the cost model's widths.
        saliency_U: Saliency of each unit, in any unit; only finite values for groups that are not frozen.
        costs: Costs as a function of the groups' kept steps.
        budget: What must not be exceeded.
        rule: Which widths are allowed.
        seed: Of the search's random restarts.
        gone_U: Which units an earlier round removed, boolean; they stay away and their saliency is not read. The losses
            of the plan count the others only.
        effects: What sets of units lose together; None where that is the sum of their saliencies. The losses of the
            plan are those of sets then.

    Raises:
        BadInput: Saliency that is not finite or not one per unit, or a network that costs nothing.
        InfeasibleBudget: Even the narrowest widths cost more.
    """
    problem = _problem(groups, saliency_U, costs, budget, rule, gone_U)
    restarts = max(1, RESTART_WORK // max(len(groups), 1) ** 2)
    column_G = search(problem, seed=seed, restarts=min(restarts, 40))
    found = _plan(groups, saliency_U, costs, budget, problem, column_G, gone_U)
    if effects is None:
        return found

    def replan(marginal_U: np.ndarray) -> Plan:
        posed = _problem(groups, marginal_U, costs, budget, rule, gone_U)
        return _plan(groups, marginal_U, costs, budget, posed, search(posed, seed=seed, restarts=0), gone_U)

    even = _plan(groups, saliency_U, costs, budget, problem, uniform(problem), gone_U)
    return _with_set_effects(groups, effects, (found, even), replan, costs, gone_U)


def _with_set_effects(
    groups: Sequence[ChannelGroup],
    effects: SetEffects,
    starts: tuple[Plan, Plan],
    replan: Callable[[np.ndarray], Plan],
    costs: CostModel,
    gone_U: np.ndarray | None,
) -> Plan:
    """Improve on additive plans, the best one and the uniform one, by what sets lose together."""
    lost, even = (effects.loss(removed_units(groups, start.kept, effects, gone_U)) for start in starts)
    start = starts[0] if lost <= even else starts[1]
    kept = refine(groups, effects, start.kept, lambda marginal_U: replan(marginal_U).kept, gone_U)
    widths_G = np.array([len(kept[group.name][0]) for group in groups])
    return replace(
        start,
        kept=kept,
        after=_costs(costs, widths_G),
        saliency_lost=effects.loss(removed_units(groups, kept, effects, gone_U)),
        saliency_lost_uniform=even,
    )


def uniform_plan(
    groups: Sequence[ChannelGroup],
    saliency_U: np.ndarray,
    costs: CostModel,
    budget: Budget,
    rule: WidthRule,
    *,
    seed: int = 0,
) -> Plan:
    """Keep the same fraction of every group, at a cost of at most `budget`; arguments and refusals as in `plan`.

    Within a group the units of highest saliency stay. There is nothing random here; `seed` is there for the signature.
    """
    problem = _problem(groups, saliency_U, costs, budget, rule)
    return _plan(groups, saliency_U, costs, budget, problem, uniform(problem))


def _problem(
    groups: Sequence[ChannelGroup],
    saliency_U: np.ndarray,
    costs: CostModel,
    budget: Budget,
    rule: WidthRule,
    gone_U: np.ndarray | None = None,
) -> Problem:
    """Check the planner's input and pose the search; raises what `plan` raises."""
    _check_groups(groups, saliency_U, costs)
    table = choices(groups, np.asarray(saliency_U, dtype=np.float64), rule, gone_U)
    full_G = costs.full_widths_G
    dense = costs.evaluate(budget.kind, full_G)
    narrowest = costs.evaluate(budget.kind, table.steps_GN[:, 0])
    limit = budget.limit(dense)
    noun = {"macs": "MACs", "params": "parameters"}[budget.kind]
    if dense == 0:
        raise BadInput(f"the network has no {noun} to save; set the target on something that it has")
    if narrowest > limit:
        # rounded up, so that the printed end of the range can be asked for
        lowest = math.ceil(Fraction(narrowest, dense) * 1000) / 1000
        raise InfeasibleBudget(
            f"a target of {budget.ratio:g} of the dense {noun} is below what the minimum widths, the frozen and the "
            f"protected groups allow (reachable: {lowest:.3f} to 1.000 of the dense {noun}); ask for more"
        )
    return Problem(table, costs.quadratic(budget.kind), limit)


def _check_groups(groups: Sequence[ChannelGroup], saliency_U: np.ndarray, costs: CostModel) -> None:
    if len({group.name for group in groups}) < len(groups):
        raise BadInput("two channel groups have the same name; a plan could not tell them apart")
    if [group.steps for group in groups] != costs.full_widths_G.tolist():
        raise BadInput("the cost model was made for other channel groups; make both from the same run")
    needed = 1 + max((unit for group in groups for fibre in group.units for unit in fibre), default=-1)
    if np.ndim(saliency_U) != 1 or len(saliency_U) < needed:
        raise BadInput(f"saliency has shape {np.shape(saliency_U)}; it must have one number for each of {needed} units")


def _plan(
    groups: Sequence[ChannelGroup],
    saliency_U: np.ndarray,
    costs: CostModel,
    budget: Budget,
    problem: Problem,
    column_G: np.ndarray,
    gone_U: np.ndarray | None = None,
) -> Plan:
    state, baseline = State(problem, column_G), State(problem, uniform(problem))
    after = _costs(costs, state.width_G)
    assert getattr(after, budget.kind) <= problem.limit, "the search works with the prices that the cost model gives"
    return Plan(
        kept={
            g.name: best_steps(g, np.asarray(saliency_U), int(width), gone_U)
            for g, width in zip(groups, state.width_G, strict=True)
        },
        budget=budget,
        before=_costs(costs, costs.full_widths_G),
        after=after,
        saliency_lost=state.loss,
        saliency_lost_uniform=baseline.loss,
    )


def _costs(costs: CostModel, widths_G: np.ndarray) -> Costs:
    return Costs(*(costs.evaluate(kind, widths_G) for kind in ("macs", "params", "activations")))


def protect(groups: Sequence[ChannelGroup], patterns: Sequence[str]) -> tuple[ChannelGroup, ...]:
    """Freeze the groups that cut a layer whose path matches one of `patterns`.

    Args:
        groups: Channel groups; those that are frozen already keep their reason.
        patterns: Shell patterns on module paths and group names; a path such as ``layer1`` stands for all below it too.

    Raises:
        BadInput: A pattern matches nothing.
    """
    paths = [_paths(group) for group in groups]
    frozen: dict[int, str] = {}
    for pattern in patterns:
        hits = [number for number, names in enumerate(paths) if any(_matches(name, pattern) for name in names)]
        if not hits:
            known = {".".join(name.split(".")[:n]) for names in paths for name in names for n in range(1, 9)}
            close = difflib.get_close_matches(pattern, sorted(known), n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "look at the groups that a scan lists"
            raise BadInput(f"the protected pattern {pattern!r} matches no layer; {hint}")
        for number in hits:
            frozen.setdefault(number, f"protected by {pattern!r}")
    return tuple(
        replace(group, frozen=frozen[number]) if number in frozen and group.frozen is None else group
        for number, group in enumerate(groups)
    )


def _paths(group: ChannelGroup) -> set[str]:
    """Paths of the modules that own what a group cuts, and the group's own name."""
    return {group.name, *(member.tensor.rpartition(".")[0] or member.tensor for member in group.members)}


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
