"""What to keep and what it will cost: groups, saliency, costs, budget → `Plan`.

A plan names, for every channel group, the steps that stay in each fibre. Its cost is never above the budget, and no
single step of any group would still fit below it. `plan` loses as little saliency as it can; `uniform_plan`, the
baseline, gives every group the same keep ratio. Several budgets are all met.

Two decisions are not obvious. Widths are chosen first (`search`), knowing only what each width of a group loses at
best; which units stay then follows from their saliencies alone. And a budget on peak memory is one limit for each
moment of the run, most of which never bind: the search starts with the largest; one that it exceeds is added.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import numpy as np

from archscan.budgets import (
    Budget,
    Costs,
    Limit,
    budget_json,
    costs_at,
    costs_json,
    is_count,
    limits_of,
    mapping_of_names,
    read_budget,
    read_costs,
    read_number,
    refuse,
    require_keys,
)
from archscan.costs import BudgetKind, CostModel
from archscan.errors import BadInput
from archscan.groups import ChannelGroup
from archscan.knapsack import Problem, State
from archscan.search import search, uniform
from archscan.set_effects import SetEffects, refine, removed_units
from archscan.widths import Choices, WidthRule, best_steps, choices

__all__ = ["Budget", "BudgetKind", "Costs", "Plan", "WidthRule", "check_fits", "plan", "protect", "uniform_plan"]

RESTART_WORK = 2_000
"""Random restarts of one search times the square of its groups: small networks get many, large ones few."""


@dataclass(frozen=True)
class Plan:
    """What is kept.

    Attributes:
        kept: Group name → for each fibre the kept steps, sorted; all groups are listed, frozen ones in full. A group
            that gets wider has all its steps, some more than once: they are the sources of the new ones.
        budget: What was asked for; all of the MACs, which it may exceed, for a network that only got wider.
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

    def __repr__(self) -> str:
        """Give costs and number of groups; the units of a large network would fill pages."""
        macs = 100 * self.after.macs / max(self.before.macs, 1)
        params = 100 * self.after.params / max(self.before.params, 1)
        return f"Plan({macs:.1f}% of the MACs, {params:.1f}% of the parameters, {len(self.kept):,} channel groups)"

    @property
    def widened(self) -> tuple[str, ...]:
        """Names of the groups that get wider."""
        return tuple(name for name, fibres in self.kept.items() if _repeats(fibres[0]))

    def to_json(self) -> dict[str, Any]:
        """Write as JSON values."""
        return {
            "kept": {name: [list(fibre) for fibre in fibres] for name, fibres in self.kept.items()},
            "budget": budget_json(self.budget),
            "before": costs_json(self.before),
            "after": costs_json(self.after),
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
        require_keys(data, "the plan", cls.__dataclass_fields__)
        kept = mapping_of_names(data["kept"], "kept")
        plan = cls(
            kept={name: _read_fibres(fibres, name) for name, fibres in kept.items()},
            budget=read_budget(data["budget"]),
            before=read_costs(data["before"], "before"),
            after=read_costs(data["after"], "after"),
            saliency_lost=read_number(data["saliency_lost"], "saliency_lost"),
            saliency_lost_uniform=read_number(data["saliency_lost_uniform"], "saliency_lost_uniform"),
            provenance=mapping_of_names(data["provenance"], "provenance"),
        )
        for kind in Costs.__dataclass_fields__:
            if not plan.widened and (getattr(plan.after, kind) or 0) > (getattr(plan.before, kind) or 0):
                raise BadInput(
                    f"the plan's {kind} grow from before to after; it was edited or damaged, so make it again"
                )
        return plan


MAX_UNITS = 1_000_000
"""No network comes near this; a plan that exceeds it was edited or damaged."""


def _repeats(fibre: Sequence[int]) -> bool:
    return len(set(fibre)) < len(fibre)


def _read_fibres(value: Any, name: str) -> tuple[tuple[int, ...], ...]:
    """Read the kept steps of one group: at least one fibre, all of one length, each sorted."""
    where = f"group {name[:80]!r}"
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise refuse(where, "is not a list of fibres")
    for fibre in value:
        if not isinstance(fibre, Sequence) or isinstance(fibre, str) or not 0 < len(fibre) <= MAX_UNITS:
            raise refuse(where, "has a fibre that is not a list of at least one step")
        if not all(is_count(step, MAX_UNITS) for step in fibre):
            raise refuse(where, f"keeps a step that is not a whole number from 0 to {MAX_UNITS - 1}")
        if any(first > second for first, second in pairwise(fibre)):
            raise refuse(where, "keeps steps that are not sorted")
        if _repeats(fibre) and len(set(fibre)) <= fibre[-1]:
            raise refuse(where, "repeats steps, which only a group that keeps all of them can")
    if len({len(fibre) for fibre in value}) > 1:
        raise refuse(where, "keeps more in one fibre than in another")
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
    restarts = min(max(1, RESTART_WORK // max(len(groups), 1) ** 2), 40)
    posed = _posed(groups, saliency_U, costs, budget, rule, gone_U)
    chosen = _choose(posed, lambda problem: search(problem, seed=seed, restarts=restarts))
    found = _plan(groups, saliency_U, costs, budget, chosen, gone_U)
    if effects is None:
        return found

    def replan(marginal_U: np.ndarray) -> Plan:
        again = _posed(groups, marginal_U, costs, budget, rule, gone_U)
        widths = _choose(again, lambda problem: search(problem, seed=seed, restarts=0))
        return _plan(groups, marginal_U, costs, budget, widths, gone_U)

    even = _plan(groups, saliency_U, costs, budget, _even(chosen), gone_U)
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
        after=costs_at(costs, widths_G, start.budget),
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
    posed = _posed(groups, saliency_U, costs, budget, rule)
    return _plan(groups, saliency_U, costs, budget, _even(_choose(posed, uniform)))


def planned_widths(
    groups: Sequence[ChannelGroup], saliency_U: np.ndarray, costs: CostModel, budget: Budget, rule: WidthRule
) -> np.ndarray:
    """Choose the steps that each group keeps, without random restarts, for many plans of one network.

    Arguments and refusals as in `plan`; shape [G].
    """
    chosen = _choose(
        _posed(groups, saliency_U, costs, budget, rule), lambda problem: search(problem, seed=0, restarts=0)
    )
    return State(chosen.problem, chosen.column_G).width_G


@dataclass(frozen=True, eq=False)
class _Posed:
    """Widths to choose from, and for each part of the budget its limits."""

    table: Choices
    limits: tuple[tuple[Limit, ...], ...]


@dataclass(frozen=True, eq=False)
class _Chosen:
    """A problem with the columns that were chosen, and those of the uniform plan."""

    problem: Problem
    column_G: np.ndarray
    uniform_G: np.ndarray


def _posed(
    groups: Sequence[ChannelGroup],
    saliency_U: np.ndarray,
    costs: CostModel,
    budget: Budget,
    rule: WidthRule,
    gone_U: np.ndarray | None = None,
) -> _Posed:
    """Check the planner's input and pose the search; raises what `plan` raises."""
    _check_groups(groups, saliency_U, costs)
    table = choices(groups, np.asarray(saliency_U, dtype=np.float64), rule, gone_U)
    return _Posed(table, limits_of(costs, budget, table.steps_GN[:, 0]))


def _choose(posed: _Posed, find: Callable[[Problem], np.ndarray]) -> _Chosen:
    """Choose widths within the largest limit of each part of the budget; where another is exceeded, within that too."""
    used = [limits[0] for limits in posed.limits]
    others = [limit for limits in posed.limits for limit in limits[1:]]
    rows = np.arange(len(posed.table.last_G))
    while True:
        problem = Problem(posed.table, tuple(each.price for each in used), tuple(each.limit for each in used))
        chosen = _Chosen(problem, find(problem), uniform(problem))
        widths = [posed.table.steps_GN[rows, column_G] for column_G in (chosen.column_G, chosen.uniform_G)]
        worst = max(others, key=lambda each: max(map(each.excess, widths)), default=None)
        if worst is None or max(map(worst.excess, widths)) <= 0:
            return chosen
        others.remove(worst)
        used.append(worst)


def _even(chosen: _Chosen) -> _Chosen:
    return replace(chosen, column_G=chosen.uniform_G)


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
    chosen: _Chosen,
    gone_U: np.ndarray | None = None,
) -> Plan:
    state, baseline = (State(chosen.problem, column_G) for column_G in (chosen.column_G, chosen.uniform_G))
    before, after = (costs_at(costs, widths_G, budget) for widths_G in (costs.full_widths_G, state.width_G))
    assert all(getattr(after, part.kind) <= part.limit(getattr(before, part.kind)) for part in budget.parts), (
        "the search works with the prices that the cost model gives"
    )
    return Plan(
        kept={
            g.name: best_steps(g, np.asarray(saliency_U), int(width), gone_U)
            for g, width in zip(groups, state.width_G, strict=True)
        },
        budget=budget,
        before=before,
        after=after,
        saliency_lost=state.loss,
        saliency_lost_uniform=baseline.loss,
    )


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
            raise BadInput(f"the pattern {pattern!r} matches no layer; {hint}")
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
