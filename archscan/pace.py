"""Plan to a share of the measured time: analysis, saliency, wish, `LatencySetup` → a network that takes so long.

The planner is given modelled time (`latency.model`); the network that it plans is built and measured beside the dense
one, in turns. Where the share of the time is off by more than `CLOSE`, and by more than the measurement is uncertain
by, the budget is corrected and planned again, so that another measurement finds it within `NEAR`. The decision that is
not obvious: the model is wrong mostly by what it leaves out (the overhead of Python, time that ops save by running one
after another), which hardly depends on widths; so measured shares lie on a line in modelled ones through the dense
network, and the next budget is where the line through the last point meets the target.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from archscan.errors import InfeasibleBudget
from archscan.latency import LatencySetup, Timing, compare, latency_model, width_steps
from archscan.options import ProgressFactory
from archscan.planner import Budget, Plan
from archscan.replan import Fitted, Wish, plan_and_rebuild, priced
from archscan.results import Analysis
from archscan.widths import WidthRule

NEAR, CLOSE = 0.05, 0.025
"""By which share of the target the measured time may be off: in the end, and without another plan."""

TRIES = 4

WORTH_TELLING = 0.95
"""Kept share of the MACs below which time should have gone down too."""


def time_budget(budget: Budget) -> Budget | None:
    """Return the part of a budget that is on measured time, where there is one."""
    return next((part for part in budget.parts if part.kind == "latency"), None)


def timed(
    analysis: Analysis, rule: WidthRule, budget: Budget, setup: LatencySetup, progress: ProgressFactory
) -> tuple[Analysis, WidthRule]:
    """Measure layers at a few widths: what makes modelled time a cost, and which widths are worth having.

    Args:
        analysis: Of the network.
        rule: Which widths are allowed; where it fixes no rounding, the measured steps of the hardware do.
        budget: With a part on time.
        setup: How to measure.
        progress: Opens progress bars.
    """
    with progress("Measuring layers") as step:
        latency = latency_model(analysis.coupling, setup, step)
    if rule.round_to is None:
        part = time_budget(budget)
        share = 1.0 if part is None else part.ratio**0.5
        with progress("Measuring widths") as step:
            rule = replace(rule, measured=width_steps(analysis.coupling, setup, share, step))
    return Analysis(analysis.coupling, priced(analysis.coupling, latency), latency), rule


def plan_and_time(
    model: nn.Module,
    example_input: Any,
    analysis: Analysis,
    saliency_U: np.ndarray,
    wish: Wish,
    progress: ProgressFactory,
) -> Fitted:
    """Plan, rebuild and measure until the share of the time is the one that was asked for, or nearly; see `NEAR`.

    Returns:
        The network that came closest, its plan with the budget as it was asked for.

    Raises:
        InfeasibleBudget: The target is below what the minimum widths and the frozen groups allow.
        RebuildMismatch: A forward cannot follow; see `plan_and_rebuild`.
    """
    part = time_budget(wish.budget)
    assert part is not None
    assert wish.setup is not None
    modelled, best, off = part.ratio, None, np.inf
    for number in range(1, TRIES + 1):
        try:
            trial = replace(wish, budget=_with_time(wish.budget, modelled))
            fitted = plan_and_rebuild(model, example_input, analysis, saliency_U, trial)
        except InfeasibleBudget:
            if best is None:
                raise
            break
        with progress(f"Measuring time (plan {number})") as step:
            measured = compare(model, fitted.rebuilt.model, example_input, wish.setup, step)
        if abs(measured.ratio / part.ratio - 1) < off:
            best, off = fitted, abs(measured.ratio / part.ratio - 1)
        before, after = fitted.plan.before.latency, fitted.plan.after.latency
        assert before is not None
        assert after is not None
        if off <= CLOSE or measured.ratio_low <= part.ratio <= measured.ratio_high:
            break
        modelled = corrected(after / before, measured.ratio, part.ratio)
    assert best is not None
    return replace(best, plan=replace(best.plan, budget=wish.budget))


def corrected(modelled: float, measured: float, target: float) -> float:
    """Say which modelled share of the time to plan for, after one measurement.

    The line through the dense network, (1, 1), and (`modelled`, `measured`) says where `target` lies. Where a network
    that is slim by the model took as long as the dense one, the line says nothing, and the budget is lowered by the
    ratio of what was asked for to what came out.
    """
    slope = (1 - measured) / max(1 - modelled, 1e-6)
    line = 1 - (1 - target) / slope if slope > 0.1 else modelled * target / measured
    return float(np.clip(line, 0.25 * modelled, 1.0))


def time_warnings(timing: Timing, plan: Plan) -> list[str]:
    """Say where the time is not what was asked for, and where MACs went down and time did not."""
    found, asked = [], time_budget(plan.budget)
    share, macs = timing.comparison.ratio, plan.after.macs / plan.before.macs
    where = timing.comparison.after
    how = f"batch {where.batch}, {where.threads} threads, {where.format}, {where.device}"
    if asked is not None and abs(share / asked.ratio - 1) > NEAR:
        found.append(
            f"The slim network takes {share:.1%} of the dense one's time ({how}), and {asked.ratio:.1%} was asked for; "
            "measure on a machine that does nothing else, or ask for another share."
        )
    if asked is None and macs < WORTH_TELLING and 1 - share < (1 - macs) / 3:
        found.append(
            f"The MACs went down to {macs:.1%}, but the time only to {share:.1%} ({how}); a target on time "
            "(--target-latency) slims what the time is spent on."
        )
    return found


def _with_time(budget: Budget, ratio: float) -> Budget:
    parts = [replace(part, ratio=ratio if part.kind == "latency" else part.ratio) for part in budget.parts]
    return replace(parts[0], also=tuple(parts[1:]))
