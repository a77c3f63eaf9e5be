"""Plan and rebuild until every forward can follow: analysis, saliency, wish → a plan and the network that it gives.

A forward that writes a width into its code (``x.view(-1, 400)``) cannot lose those channels. The decision that is not
obvious: at the first such failure the whole network is settled (see `settle`), not only what this plan happened to cut,
so that two or three plans are enough however many modules hard-code a width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from archscan.costs import CostModel, cost_model
from archscan.errors import InfeasibleBudget, RebuildMismatch
from archscan.groups import Coupling
from archscan.latency import LatencyModel, LatencySetup
from archscan.planner import Budget, Plan, plan
from archscan.rebuild import CannotFollow, Rebuilt, rebuild
from archscan.results import Analysis
from archscan.set_effects import SetEffects
from archscan.settle import settle
from archscan.surgery import Kept
from archscan.widths import WidthRule

_REPLANS = 8


@dataclass(frozen=True)
class Wish:
    """What a plan has to meet.

    Attributes:
        budget: What must not be exceeded.
        rule: Which widths are allowed.
        seed: Of the planner's search.
        gone_U: Which units an earlier round removed, see `planner.plan`.
        effects: What sets of units lose together, likewise.
        setup: How to measure time; None where no budget is on it.
    """

    budget: Budget
    rule: WidthRule
    seed: int
    gone_U: np.ndarray | None = None
    effects: SetEffects | None = None
    setup: LatencySetup | None = None


@dataclass(frozen=True, eq=False)
class Fitted:
    """A plan that could be carried out.

    Attributes:
        plan: What is kept.
        rebuilt: The network.
        analysis: The one given, with more groups frozen or tied where forwards hard-code widths.
        notes: What was frozen or tied and why, a sentence each.
    """

    plan: Plan
    rebuilt: Rebuilt
    analysis: Analysis
    notes: tuple[str, ...]


def plan_and_rebuild(
    model: nn.Module, example_input: Any, analysis: Analysis, saliency_U: np.ndarray, wish: Wish
) -> Fitted:
    """Plan and rebuild; where a forward cannot follow, freeze or tie what it hard-codes and plan again.

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
            made = plan(
                coupling.groups,
                saliency_U,
                analysis.costs,
                wish.budget,
                wish.rule,
                seed=wish.seed,
                gone_U=wish.gone_U,
                effects=wish.effects,
            )
        except InfeasibleBudget as error:
            raise InfeasibleBudget("; ".join([str(error), *notes])) from error
        try:
            return Fitted(made, rebuild(model, example_input, coupling, made.kept), analysis, tuple(notes))
        except CannotFollow:
            analysis, told = settled(model, example_input, analysis, made.kept)
            if not told:
                raise
            notes.extend(told)
    raise RebuildMismatch("too many forwards hard-code their widths; protect those modules by name")


def settled(
    model: nn.Module, example_input: Any, analysis: Analysis, kept: Kept | None = None
) -> tuple[Analysis, tuple[str, ...]]:
    """Freeze or tie what forwards hard-code (see `settle`) and price it anew; also what was done, a sentence each."""
    found = settle(model, example_input, analysis.coupling, kept)
    costs = priced(found.coupling, analysis.latency)
    return Analysis(found.coupling, costs, analysis.latency), found.notes


def priced(coupling: Coupling, latency: LatencyModel | None = None) -> CostModel:
    """Price a coupling that holds the recorded run: costs as functions of its groups' widths, time where modelled."""
    assert coupling.graph is not None
    assert coupling.sizes is not None
    full_G = np.array([group.steps for group in coupling.groups], dtype=np.int64)
    fixed = [number for number, group in enumerate(coupling.groups) if group.frozen is not None]
    costs = cost_model(coupling.graph, coupling.sizes, coupling.parameters, full_G, fixed)
    return costs if latency is None else costs.with_timing(latency.quadratic(coupling.sizes, full_G))
