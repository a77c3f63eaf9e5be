"""Plan and rebuild until every forward can follow: analysis, saliency, wish → a plan and the network that it gives.

A forward that writes a width into its code (``x.view(-1, 400)``) cannot lose those channels. The decision that is not
obvious: such a failure names the module whose code it is, and not the groups, which may be many. So each group around
that module is cut alone, and those that fail alone are frozen; only where none does, all of them are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from archscan.errors import InfeasibleBudget, RebuildMismatch
from archscan.groups import Coupling, freeze
from archscan.planner import Budget, Plan, plan
from archscan.rebuild import CannotFollow, Rebuilt, rebuild
from archscan.results import Analysis
from archscan.surgery import Kept
from archscan.widths import WidthRule

_REPLANS = 64


@dataclass(frozen=True)
class Wish:
    """What a plan has to meet.

    Attributes:
        budget: What must not be exceeded.
        rule: Which widths are allowed.
        seed: Of the planner's search.
    """

    budget: Budget
    rule: WidthRule
    seed: int


@dataclass(frozen=True, eq=False)
class Fitted:
    """A plan that could be carried out.

    Attributes:
        plan: What is kept.
        rebuilt: The network.
        analysis: The one given, with more groups frozen where forwards hard-code widths.
        notes: What was frozen and why, a sentence each.
    """

    plan: Plan
    rebuilt: Rebuilt
    analysis: Analysis
    notes: tuple[str, ...]


def plan_and_rebuild(
    model: nn.Module, example_input: Any, analysis: Analysis, saliency_U: np.ndarray, wish: Wish
) -> Fitted:
    """Plan and rebuild; where a forward cannot follow, freeze what it hard-codes and plan again.

    Args:
        model: The original, left unchanged.
        example_input: What it was captured with.
        analysis: Its coupling and costs.
        saliency_U: Saliency of each unit.
        wish: What the plan has to meet.

    Raises:
        InfeasibleBudget: The target is below what the minimum widths and the frozen groups allow.
        RebuildMismatch: Nothing is left to freeze, and a forward still cannot follow.
    """
    notes: list[str] = []
    for _ in range(_REPLANS):
        coupling = analysis.coupling
        try:
            made = plan(coupling.groups, saliency_U, analysis.costs, wish.budget, wish.rule, seed=wish.seed)
        except InfeasibleBudget as error:
            raise InfeasibleBudget("; ".join([str(error), *notes])) from error
        try:
            return Fitted(made, rebuild(model, example_input, coupling, made.kept), analysis, tuple(notes))
        except CannotFollow as error:
            reasons = _to_freeze(model, example_input, coupling, made.kept, error)
            analysis = replace(analysis, coupling=freeze(coupling, reasons))
            names = ", ".join(list(reasons)[:3]) + (f" and {len(reasons) - 3} more" if len(reasons) > 3 else "")
            notes.append(
                f"{names} keep{'s' if len(reasons) == 1 else ''} the full width, since the forward of "
                f"{error.module or 'the model'} hard-codes it ({error.detail})."
            )
    raise RebuildMismatch("too many forwards hard-code their widths; protect those modules by name")


def _to_freeze(
    model: nn.Module, example_input: Any, coupling: Coupling, kept: Kept, error: CannotFollow
) -> Mapping[str, str]:
    """Find the groups that a forward hard-codes, with the reason; raise the error again where none is left."""
    around = _cut_around(coupling, kept, error.module)
    if not around:
        raise error
    found = around
    if len(around) > 1:
        found = [name for name in around if not _can_be_cut_alone(model, example_input, coupling, kept, name)]
    reason = f"the forward of {error.module or 'the model'} hard-codes a width"
    return dict.fromkeys(found or around, reason)


def _cut_around(coupling: Coupling, kept: Kept, module: str) -> list[str]:
    """List the groups that lose channels in a module, what is below it included; the model itself is around all."""
    inside = f"{module}." if module else ""
    readers = [consumer for consumer in coupling.consumers if f"{consumer.module}.".startswith(inside)]
    read = {unit for consumer in readers for unit in consumer.units.tolist()}
    return [
        group.name
        for group in coupling.groups
        if group.frozen is None
        and len(kept[group.name][0]) < group.steps
        and (
            any(f"{member.module}.".startswith(inside) for member in group.members)
            or any(unit in read for fibre in group.units for unit in fibre)
        )
    ]


def _can_be_cut_alone(model: nn.Module, example_input: Any, coupling: Coupling, kept: Kept, name: str) -> bool:
    alone = {
        group.name: kept[name] if group.name == name else (tuple(range(group.steps)),) * len(group.units)
        for group in coupling.groups
    }
    try:
        rebuild(model, example_input, coupling, alone)
    except CannotFollow:
        return False
    return True
