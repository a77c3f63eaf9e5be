"""Widen what is too narrow: model, data → bottlenecks → a wider network that computes the same, ready to be trained.

Capacity bottlenecks (SOSP, Nonnenmacher et al. 2022: "expand-prune") are found by slimming to a budget and looking who
gave nothing up. They are widened by copies of their channels (Net2WiderNet, Chen et al. 2016), and where the cost is to
stay the same, the other groups pay for it by losing their least salient channels.

The decision that is not obvious: one plan holds both. It keeps the steps of a wider group more than once and fewer of
the others', so that it is proved, saved, loaded and slimmed again like any other; and what only got wider is held
against the original itself, statistics over channels and all, before anything else is done (see `trial`).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from archscan.budgets import costs_at
from archscan.errors import BadInput, RebuildMismatch
from archscan.groups import ChannelGroup
from archscan.losses import LossFn
from archscan.options import DEFAULT_FIND_AT, ProgressFactory, silent
from archscan.planner import Costs, Plan
from archscan.recipes import Recipe
from archscan.recover import recalibrate_batchnorm
from archscan.report.views import plural
from archscan.results import SlimResult, SlimSettings, report_of
from archscan.sharding import on_device
from archscan.slimming import Stopwatch, require_batchnorm, slim
from archscan.stages import check_plan, telling_input
from archscan.surgery import MAX_REPEATS
from archscan.verify import prove
from archscan.widening.copies import all_sources, named, sources_of
from archscan.widening.pay import SAME_MACS, Paid, pay
from archscan.widening.trial import Bench, Trial, try_wider
from archscan.widths import WidthRule

__all__ = ["WidenResult", "WidenSettings", "widen"]

MOST_LISTED = 6


@dataclass(frozen=True)
class WidenSettings:
    """What to widen, how far, and who pays.

    Attributes:
        factor: New width of a group over its old one.
        keep_flops: Whether the other groups are slimmed until the network costs no more MACs than before.
        find_at: Kept fraction of the MACs at which bottlenecks show.
        only: Shell patterns of names of the groups to widen, in place of the bottlenecks.
        rule: Which widths the groups that pay may have.
        protect: Shell patterns of layers that keep their width.
        recover: Repair on the calibration batches where groups paid: ``bn`` re-estimates BatchNorm statistics.
        seed: Of everything random.
    """

    factor: float = 2.0
    keep_flops: bool = False
    find_at: float = DEFAULT_FIND_AT
    only: tuple[str, ...] = ()
    rule: WidthRule = field(default_factory=WidthRule)
    protect: tuple[str, ...] = ()
    recover: Literal["none", "bn"] = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        number = isinstance(self.factor, (int, float)) and not isinstance(self.factor, bool)
        if not number or not 1 < self.factor <= MAX_REPEATS:
            raise BadInput(f"the factor is {self.factor!r}; it must be above 1 and at most {MAX_REPEATS}")
        if isinstance(self.only, str):
            raise BadInput(f"only is the text {self.only!r}; pass a tuple of patterns: ({self.only!r},)")
        if self.recover not in ("none", "bn"):
            raise BadInput(f"recover is {self.recover!r}; a widened network can be repaired by 'bn' or 'none'")
        if self.recover == "bn" and not self.keep_flops:
            raise BadInput("a network that only gets wider computes what it did; leave out recover='bn'")


@dataclass(frozen=True, eq=False)
class WidenResult(SlimResult):
    """A wider network, how it came about, and the proof; see `SlimResult` for what it shares with a slim one.

    Attributes:
        widened: Names of the groups that got wider.
        refused: Those that should have → why they could not.
    """

    widened: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)


def widen(
    model: nn.Module,
    example_input: Any,
    *,
    data: Iterable[Any] | None = None,
    criterion: str | None = None,
    loss_fn: LossFn | None = None,
    settings: WidenSettings | None = None,
    recipe: Recipe | None = None,
    progress: ProgressFactory = silent,
) -> WidenResult:
    """Widen the capacity bottlenecks of a network; the model is not modified.

    Args:
        model: Any network.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        data: Calibration batches, such as a data loader of (images, labels); None for noise.
        criterion: A name from `archscan.criteria.CRITERIA`, by which bottlenecks are found and channels given up; None
            for the default.
        loss_fn: Mean loss of a batch, ``loss_fn(model, batch) -> scalar``; None for classification.
        settings: How far to widen, and who pays.
        recipe: How the model's architecture was built; None to find out.
        progress: Opens progress bars.

    Returns:
        The wider network, in eval mode, with its plan and proof; ``save`` writes a folder that `archscan.load` opens.

    Raises:
        BadInput: An argument makes no sense, nothing stands out as a bottleneck, or none of them can get wider.
        InfeasibleBudget: The other groups cannot pay.
        RebuildMismatch: The wider network does not compute what the plan says; this is a defect to report.
        UnsupportedOp: The forward uses an op without a coupling rule.
    """
    settings = settings or WidenSettings()
    _check_repair(model, data, settings)
    batches = list(data) if isinstance(data, Iterator) else data
    found = slim(
        model,
        example_input,
        target_flops=1.0 if settings.only else settings.find_at,
        data=batches,
        criterion=criterion,
        loss_fn=loss_fn,
        settings=SlimSettings(settings.rule, settings.protect, seed=settings.seed),
        recipe=recipe,
        progress=progress,
    )
    return _recalibrated(_widened(model, example_input, found, settings, progress), batches, progress)


def _check_repair(model: nn.Module, data: Iterable[Any] | None, settings: WidenSettings) -> None:
    if settings.recover == "bn" and data is None:
        raise BadInput("recover='bn' needs real images, noise would mislead it; pass data=")
    if settings.recover == "bn":
        require_batchnorm(model)


def _widened(
    model: nn.Module, example_input: Any, found: SlimResult, settings: WidenSettings, progress: ProgressFactory
) -> WidenResult:
    """Widen what was found, or what is named; let others pay."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    example_input = on_device(example_input, device)
    bench = Bench(model, example_input, telling_input(example_input, settings.seed), settings.seed)
    watch, groups = Stopwatch(), found.analysis.coupling.groups
    chosen, note = (named(groups, settings.only), "") if settings.only else _bottlenecks(found, settings.find_at)
    sources = {group.name: sources_of(group, settings.factor, found.saliency_U) for group in chosen}
    with watch.stage("widen and verify"), progress(f"Widening {plural(len(sources), 'channel group')}") as step:
        step(0, 0)
        trial = try_wider(bench, found.analysis, sources)
    _require_some(trial)
    paid = _paid(bench, trial, found, settings, watch, progress)
    result = _result(found, trial, paid, settings, watch)
    return replace(result, notes=(note, *result.notes) if note else result.notes)


def _bottlenecks(found: SlimResult, find_at: float) -> tuple[list[ChannelGroup], str]:
    """List the capacity bottlenecks, and say what was seen of them."""
    seen = report_of(found).bottlenecks
    share = f"{100 * find_at:g}% of the MACs"
    if not seen:
        raise BadInput(
            f"no channel group stands out as a bottleneck at {share}; look at another share of them (--find-at, "
            "find_at=), or name the groups to widen (--only, only=)"
        )
    names = [f"{each.group} {100 * each.keep_ratio:.0f}%" for each in seen]
    listed = ", ".join(names[:MOST_LISTED]) + (" …" if len(names) > MOST_LISTED else "")
    network = f"slimmed to {share} the network keeps {100 * seen[0].network_keep_ratio:.0f}% of its channels"
    wanted = {each.group for each in seen}
    groups = [group for group in found.analysis.coupling.groups if group.name in wanted]
    return groups, f"Bottlenecks: {network}, and these keep far more: {listed}."


def _require_some(trial: Trial) -> None:
    if not trial.sources:
        name, why = next(iter(trial.refused.items()))
        others = f" (nor can {plural(len(trial.refused) - 1, 'other')})" if len(trial.refused) > 1 else ""
        raise BadInput(f"{name} cannot get wider: {why}{others}; name other groups")


def _paid(
    bench: Bench, trial: Trial, found: SlimResult, settings: WidenSettings, watch: Stopwatch, progress: ProgressFactory
) -> Paid:
    """Let the other groups pay where they are to; prove and price what comes of it."""
    if not settings.keep_flops:
        return _priced(bench, _at_any_cost(trial, found.plan.before))
    with watch.stage("plan and rebuild"), progress("Slimming the other groups") as step:
        step(0, 0)
        paid = pay(bench, trial, found.saliency_U, settings.rule)
    with watch.stage("verify"), progress("Proving the new network") as step:
        step(0, 0)
        rebuilt, coupling, kept = paid.rebuilt, paid.analysis.coupling, paid.plan.kept
        inputs, seed = bench.telling_input, bench.seed
        proof = prove(bench.model, rebuilt.model, rebuilt.surgery, coupling, kept, inputs, seed=seed)
    if not proof.passed:
        raise RebuildMismatch(
            f"the new network is not the masked original ({proof.reason}), so that nothing was written; "
            "please report this network"
        )
    return _priced(bench, replace(paid, verification=proof))


def _at_any_cost(trial: Trial, before: Costs) -> Paid:
    """Let nobody pay."""
    groups, costs = trial.analysis.coupling.groups, trial.analysis.costs
    kept = all_sources(groups, trial.sources)
    widths_G = np.array([len(kept[group.name][0]) for group in groups])
    plan = Plan(kept, SAME_MACS, before, costs_at(costs, widths_G, SAME_MACS), 0.0, 0.0)
    return Paid(plan, trial.rebuilt, trial.verification, trial.analysis, trial.sources)


def _priced(bench: Bench, paid: Paid) -> Paid:
    """See that the network costs what the plan says."""
    check_plan(paid.rebuilt.model, bench.example_input, paid.plan)
    return paid


def _result(found: SlimResult, trial: Trial, paid: Paid, settings: WidenSettings, watch: Stopwatch) -> WidenResult:
    refused = {**trial.refused, **paid.refused}
    provenance = {
        **found.plan.provenance,
        "factor": settings.factor,
        "keep_flops": settings.keep_flops,
        "find_at": settings.find_at,
        "recover": settings.recover,
    }
    shared = {name: getattr(found, name) for name in ("saliency_U", "scored", "recovery", "rule", "warnings", "recipe")}
    notes = (*found.notes, *trial.notes, *paid.notes, *_notes(refused))
    return WidenResult(
        **shared,
        model=paid.rebuilt.model.eval(),
        plan=replace(paid.plan, provenance=provenance),
        surgery=paid.rebuilt.surgery,
        analysis=paid.analysis,
        verification=paid.verification,
        notes=tuple(dict.fromkeys(notes)),
        seconds={f"{name} (to find)": took for name, took in found.seconds.items()} | watch.seconds,
        widened=tuple(paid.sources),
        refused=refused,
    )


def _notes(refused: Mapping[str, str]) -> Iterator[str]:
    for name, why in refused.items():
        yield f"{name} was not widened: {why}."


def _recalibrated(result: WidenResult, batches: Iterable[Any] | None, progress: ProgressFactory) -> WidenResult:
    """Estimate BatchNorm's statistics anew where that was asked for."""
    if result.plan.provenance["recover"] == "none" or batches is None:
        return result
    watch = Stopwatch()
    with watch.stage("recover"), progress("Recalibrating BatchNorm") as step:
        again = recalibrate_batchnorm(result.model, batches, step)
    return replace(result, model=again.model, recovery=again.clause(), seconds={**result.seconds, **watch.seconds})
