"""Let the other groups pay for what got wider: trial, saliency → a plan that costs no more MACs than the original.

The decision that is not obvious: the planner is not told of widening. It sees a network whose wider groups are frozen
at their new widths, and which costs more than it may.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from archscan.budgets import costs_at
from archscan.errors import InfeasibleBudget, RebuildMismatch
from archscan.planner import Budget, Plan, plan
from archscan.rebuild import CannotFollow, Rebuilt, rebuild
from archscan.replan import settled
from archscan.results import Analysis
from archscan.verify import Verification
from archscan.widening.copies import Sources, stretched
from archscan.widening.trial import Bench, Trial, held, without
from archscan.widths import WidthRule

SAME_MACS = Budget("macs", 1.0)
_REPLANS = 8


@dataclass(frozen=True, eq=False)
class Paid:
    """A wider network whose cost is settled.

    Attributes:
        plan: What every group copies or keeps, from the original on.
        rebuilt: The network.
        verification: What it was held against.
        analysis: The one given, with more groups tied or frozen where forwards hold their widths.
        sources: The groups that are wider.
        refused: Those that no longer could → why.
        notes: What was tied or frozen and why, a sentence each.
    """

    plan: Plan
    rebuilt: Rebuilt
    verification: Verification
    analysis: Analysis
    sources: Sources
    refused: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def pay(bench: Bench, trial: Trial, saliency_U: np.ndarray, rule: WidthRule) -> Paid:
    """Slim the other groups until the network costs no more MACs than the original; it is still to be proved.

    Args:
        bench: The original.
        trial: What gets wider.
        saliency_U: Saliency of each unit of the original.
        rule: Which widths the groups that pay may have.

    Raises:
        InfeasibleBudget: Even at their narrowest they save too little.
        RebuildMismatch: Forwards hold too many widths.
    """
    analysis, sources, refused = trial.analysis, trial.sources, dict[str, str]()
    notes: list[str] = []
    for _ in range(_REPLANS):
        made = _plan(analysis, sources, saliency_U, rule, bench.seed)
        try:
            rebuilt = rebuild(bench.model, bench.example_input, analysis.coupling, made.kept)
            return Paid(made, rebuilt, trial.verification, analysis, sources, refused, tuple(notes))
        except CannotFollow:
            analysis, told = settled(bench.model, bench.example_input, analysis, made.kept)
            if not told:
                raise
            notes.extend(told)
            refused |= dict(held(analysis.coupling, sources))
            sources = without(sources, refused)
        if not sources:
            name, why = next(iter(refused.items()))
            raise RebuildMismatch(f"{name} cannot get wider while others get narrower: {why}; leave out keep_flops")
    raise RebuildMismatch("too many forwards hard-code their widths; protect those modules by name")


def _plan(analysis: Analysis, sources: Sources, saliency_U: np.ndarray, rule: WidthRule, seed: int) -> Plan:
    """Plan the groups that pay around those that are wider."""
    groups, costs = analysis.coupling.groups, analysis.costs
    wider = stretched(groups, costs, sources)
    limit, dense = (model.evaluate("macs", model.full_widths_G) for model in (costs, wider.costs))
    try:
        made = plan(wider.groups, saliency_U, wider.costs, Budget("macs", limit / dense), rule, seed=seed)
    except InfeasibleBudget as error:
        raise InfeasibleBudget(
            f"the other groups cannot pay for a network that costs {dense / limit:.2f} times the MACs; widen less, "
            "widen fewer groups, or let it cost more"
        ) from error
    before = costs_at(costs, costs.full_widths_G, SAME_MACS)
    return replace(made, kept={**made.kept, **sources}, budget=SAME_MACS, before=before)
