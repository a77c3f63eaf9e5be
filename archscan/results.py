"""What came of a slimming, and the reports on it: `SlimResult` → `Report` → a saved folder.

The frozen data that `slimming` returns, and the one place that knows both them and the numbers that are printed. The
decision that is not obvious: what only the command line knows (names, files, accuracy) comes as a `Context`, so that a
result from Python gives the same report with those parts left out.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from archscan import __version__, saving
from archscan.costs import CostModel
from archscan.detailing import layer_links, saliency_detail
from archscan.errors import BadInput
from archscan.findings import (
    Bottleneck,
    Finding,
    GroupUse,
    GroupWidth,
    ModuleCost,
    capacity_bottlenecks,
    cost_findings,
    network_keep_ratio,
    ranked,
)
from archscan.groups import ChannelGroup, Coupling
from archscan.latency import LatencyModel, LatencySetup, Timing
from archscan.module_costs import cost_totals, latency_of, module_rows
from archscan.options import DEFAULT_ROUNDS, Recovery
from archscan.planner import Plan
from archscan.recipes import Recipe
from archscan.repairs import Repaired
from archscan.report import model as numbers
from archscan.report.details import Agreement
from archscan.report.html import render_html
from archscan.report.model import Report
from archscan.report.training import TrainingRun
from archscan.rounds import Round, check_rounds
from archscan.surgery import Surgery
from archscan.verify import Verification
from archscan.widths import WidthRule, allowed_steps

RECOVERIES = get_args(Recovery)


@dataclass(frozen=True)
class SlimSettings:
    """How to slim, beyond the budget, the data and the criterion.

    Attributes:
        rule: Which widths are allowed.
        protect: Shell patterns of layers that keep their width.
        recover: Repair on the calibration batches after slimming: ``bn`` re-estimates BatchNorm statistics, ``bias``
            corrects mean outputs, ``ls`` re-solves weights by least squares, ``blocks`` then tunes block by block (see
            `reconstruct.repair`).
        seed: Of everything random.
        rounds: Slim in so many steps, each repaired, and scored anew before the next (see `rounds`).
        set_effects: Whether a set of units costs the sum of their saliencies (``additive``), or what the criterion's
            quadratic form says of the set (``quadratic``, for the criteria that have one; see `set_effects`).
        latency: How to measure the time before and after; None for no measurement, unless a target is on it.
    """

    rule: WidthRule = field(default_factory=WidthRule)
    protect: tuple[str, ...] = ()
    recover: Recovery = "none"
    seed: int = 0
    rounds: int = DEFAULT_ROUNDS
    set_effects: Literal["additive", "quadratic"] = "additive"
    latency: LatencySetup | None = None

    def __post_init__(self) -> None:
        if isinstance(self.protect, str):
            raise BadInput(f"protect is the text {self.protect!r}; pass a tuple of patterns: ({self.protect!r},)")
        if self.recover not in RECOVERIES:
            raise BadInput(f"recover is {self.recover!r}; it must be {' or '.join(map(repr, RECOVERIES))}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise BadInput(f"the seed is {self.seed!r}; it must be a whole number from 0 on")
        check_rounds(self.rounds)
        if self.set_effects not in ("additive", "quadratic"):
            raise BadInput(f"set_effects is {self.set_effects!r}; it must be 'additive' or 'quadratic'")


@dataclass(frozen=True, eq=False)
class Analysis:
    """What is known of a network before anything is planned.

    Attributes:
        coupling: Channel groups, places of gates, sizes.
        costs: MACs, parameters, activations and memory as functions of the groups' widths.
        latency: Fitted times of its ops; None where no budget is on time.
    """

    coupling: Coupling
    costs: CostModel
    latency: LatencyModel | None = None


@dataclass(frozen=True)
class Scored:
    """What the saliency was measured on.

    Attributes:
        samples: How many calibration samples.
        synthetic: Whether they were noise, with labels drawn from the model's own predictions.
    """

    samples: int
    synthetic: bool


@dataclass(frozen=True, eq=False)
class SlimResult:
    """A slim network, how it came about, and the proof.

    Attributes:
        model: The slim network: an ordinary, trainable module of the original's class. It is in eval mode, whatever the
            original was in, as `archscan.load` gives it; call ``model.train()`` to fine-tune it.
        plan: What was kept, and the predicted costs.
        surgery: What was cut, enough to repeat it on a fresh original.
        analysis: Coupling and costs of the original.
        saliency_U: Saliency of each unit, as of the last round that it was there.
        scored: What the saliency was measured on; None where the criterion reads weights only.
        verification: The comparison with the masked original, before any repair.
        recovery: What was repaired, as a clause; None where nothing was.
        rule: Which widths were allowed.
        notes: What a user has to know, a sentence each.
        warnings: What a user must not overlook, a sentence each.
        seconds: Time of each stage, measured.
        recipe: How to build the original's architecture; None where only its user can.
        history: Earlier slimmings of the same network.
        rounds: The rounds of this one, in order.
        repaired: What least squares or bias correction did to each layer; None where neither was asked for.
        agreement: How other criteria rank the units; None where none could be computed from what was collected.
        timing: The dense and the slim network, measured; None where that was not asked for.
        trainings: What was measured in the training after each round; empty where there was none.
        findings: What the slimming says about the dense network; what its costs say is in the report alone.
        confidence: Group name → share of the plans made in other ways in which it stands out as a bottleneck.
        lossless: What went without any loss; None where a budget decided.
    """

    model: nn.Module
    plan: Plan
    surgery: Surgery
    analysis: Analysis
    saliency_U: np.ndarray
    scored: Scored | None
    verification: Verification
    recovery: str | None
    rule: WidthRule
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]
    recipe: Recipe | None = None
    history: tuple[saving.Step, ...] = ()
    rounds: tuple[Round, ...] = ()
    repaired: Repaired | None = None
    agreement: Agreement | None = None
    timing: Timing | None = None
    trainings: tuple[TrainingRun, ...] = ()
    findings: tuple[Finding, ...] = ()
    confidence: Mapping[str, float] = field(default_factory=dict)
    lossless: numbers.Lossless | None = None

    def __repr__(self) -> str:
        """One short line, as a notebook shows it; everything in it is in `summary`."""
        proof = "proven" if self.verification.applicable and self.verification.passed else "see .verification"
        return f"{type(self).__name__}({type(self.model).__name__}, {self.plan!r}, {proof})"

    @property
    def summary(self) -> dict[str, Any]:
        """The numbers of this run, as ``summary.json`` has them."""
        return report_of(self).to_json()

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write ``plan.json``, ``model.safetensors``, ``summary.json`` and ``report.html``; return the folder.

        Raises:
            BadInput: The folder exists and is not to be overwritten, or cannot be written.
        """
        return save_result(self, report_of(self), Path(folder), overwrite=overwrite)


@dataclass(frozen=True)
class Context:
    """What a report says beyond the result itself.

    Attributes:
        model: Name of the network.
        input_shape: Shape of one input, without the batch axis.
        weights: Where the weights come from.
        data: What the saliency was scored on.
        accuracy: Before and after, where it was measured.
        warnings: Sentences that must not be overlooked, beside the result's own.
        notes: Sentences to know, beside the result's own.
        device: Where it ran.
        command_line: As typed.
    """

    model: str = "model"
    input_shape: tuple[int, ...] = ()
    weights: numbers.Weights | None = None
    data: numbers.Data | None = None
    accuracy: numbers.Accuracy | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    device: str = "cpu"
    command_line: str = ""


def report_of(result: SlimResult, context: Context | None = None) -> Report:
    """Put together the report of a slimming."""
    context = context or _context_of(result)
    plan, analysis = result.plan, result.analysis
    widths = np.array([len(plan.kept[group.name][0]) for group in analysis.coupling.groups])
    rows, modules = group_rows(analysis, plan), module_rows(analysis.costs, widths, result.timing)
    target, *further = (numbers.Target(each.kind, each.ratio) for each in plan.budget.parts)
    return Report(
        archscan=__version__,
        command="widen" if plan.widened else "slim",
        model=context.model,
        input_shape=context.input_shape or _input_shape(analysis),
        weights=context.weights,
        data=context.data,
        criterion=str(plan.provenance.get("criterion", "")),
        seed=int(plan.provenance.get("seed", 0)),
        target=target,
        before=cost_totals(analysis.costs, analysis.costs.full_widths_G),
        after=cost_totals(analysis.costs, widths),
        keep_ratio=numbers.KeepRatio(plan.after.macs / plan.before.macs, plan.after.params / plan.before.params),
        verification=numbers.Verification(
            result.verification.applicable,
            result.verification.reason,
            result.verification.max_abs_error,
            result.verification.tolerance,
            result.verification.passed,
            result.verification.largest_output,
        ),
        accuracy=context.accuracy,
        recovery=result.recovery,
        groups=rows,
        bottlenecks=() if plan.widened or result.lossless else _bottlenecks(result, rows),
        modules=modules,
        saliency_lost=None if result.lossless else numbers.SaliencyLost(plan.saliency_lost, plan.saliency_lost_uniform),
        warnings=(*result.warnings, *context.warnings),
        notes=(*result.notes, *_uncounted(analysis), *context.notes),
        seconds=result.seconds,
        environment=_environment(context.device),
        command_line=context.command_line,
        links=layer_links(analysis.coupling.groups),
        saliency=None
        if result.lossless
        else saliency_detail(
            analysis.coupling.groups, analysis.costs, result.saliency_U, plan, result.rule, result.agreement
        ),
        findings=_findings(result.findings, modules, rows, result.timing),
        latency=latency_of(result.timing),
        further_targets=tuple(further),
        history=result.trainings,
        lossless=result.lossless,
    )


def _context_of(result: SlimResult) -> Context:
    """Say what is known of a model that was passed from Python."""
    name = result.recipe.name if result.recipe else type(result.model).__name__
    scored = result.scored
    kind, labels = ("synthetic", "model") if scored and scored.synthetic else ("given", "dataset")
    data = None if scored is None else numbers.Data(kind, scored.samples, 0, labels)
    device = next((tensor.device.type for tensor in result.model.parameters()), "cpu")
    return Context(model=name, weights=numbers.Weights("given"), data=data, device=device)


def report_of_scan(analysis: Analysis, context: Context, seconds: Mapping[str, float]) -> Report:
    """Put together the report of a scan: costs and groups, nothing planned."""
    rows, modules = group_rows(analysis, None), module_rows(analysis.costs, None)
    return Report(
        archscan=__version__,
        command="scan",
        model=context.model,
        input_shape=context.input_shape or _input_shape(analysis),
        weights=None,
        data=None,
        criterion=None,
        seed=0,
        target=None,
        before=cost_totals(analysis.costs, analysis.costs.full_widths_G),
        after=None,
        keep_ratio=None,
        verification=None,
        accuracy=None,
        recovery=None,
        groups=rows,
        bottlenecks=(),
        modules=modules,
        saliency_lost=None,
        warnings=context.warnings,
        notes=(*_uncounted(analysis), *context.notes),
        seconds=seconds,
        environment=_environment(context.device),
        command_line=context.command_line,
        links=layer_links(analysis.coupling.groups),
        findings=_findings((), modules, rows),
    )


def save_result(result: SlimResult, report: Report, folder: Path, *, overwrite: bool) -> Path:
    """Write a result folder with its report; see `saving.save`."""
    steps = (*result.history, saving.Step(result.plan, result.surgery))
    return saving.save(
        folder, result.model, steps, result.recipe, report.to_json(), render_html(report), overwrite=overwrite
    )


def group_rows(analysis: Analysis, plan: Plan | None) -> tuple[numbers.GroupRow, ...]:
    """List every group with its shares of the dense costs; without a plan everything is kept."""
    full = analysis.costs.full_widths_G
    macs, params = (analysis.costs.by_module(kind, full) for kind in ("macs", "params"))
    totals = max(sum(macs.values()), 1), max(sum(params.values()), 1)
    rows = []
    for depth, group in enumerate(analysis.coupling.groups):
        modules = list(dict.fromkeys(member.module for member in group.members))
        steps = group.steps if plan is None else len(plan.kept[group.name][0])
        rows.append(
            numbers.GroupRow(
                name=group.name,
                units=group.channels,
                kept=steps * group.channels_per_step,
                frozen=group.frozen is not None,
                reason=group.frozen or "",
                members=tuple(modules),
                macs_share=sum(macs.get(module, 0) for module in modules) / totals[0],
                params_share=sum(params.get(module, 0) for module in modules) / totals[1],
                depth=depth,
            )
        )
    return tuple(rows)


def group_uses(
    groups: Sequence[ChannelGroup], rows: Sequence[numbers.GroupRow], rule: WidthRule
) -> tuple[GroupUse, ...]:
    """Say what a plan did with each group."""
    return tuple(
        GroupUse(
            row.name,
            row.units,
            row.kept,
            min(allowed_steps(group, rule)) * group.channels_per_step,
            row.frozen,
            row.macs_share,
        )
        for group, row in zip(groups, rows, strict=True)
    )


def _bottlenecks(result: SlimResult, rows: Sequence[numbers.GroupRow]) -> tuple[Bottleneck, ...]:
    uses = group_uses(result.analysis.coupling.groups, rows, result.rule)
    return capacity_bottlenecks(uses, network_keep_ratio(uses), result.confidence)


def _findings(
    found: Sequence[Finding],
    modules: Sequence[numbers.ModuleRow],
    rows: Sequence[numbers.GroupRow],
    timing: Timing | None = None,
) -> tuple[Finding, ...]:
    """Add what costs say to what slimming found, and rank all of it."""
    run = None if timing is None else timing.comparison.before
    timed_on = "" if run is None else f"{run.device}, {run.threads} threads, batch {run.batch}"
    costs = [
        ModuleCost(row.path, row.macs, row.params, row.activation_bytes, row.time_ms, row.macs_per_byte, row.bound)
        for row in modules
    ]
    widths = [GroupWidth(row.name, row.kept, row.macs_share) for row in rows if not row.frozen]
    return ranked((*found, *cost_findings(costs, widths, timed_on)))


def _uncounted(analysis: Analysis) -> tuple[str, ...]:
    names = ", ".join(analysis.costs.uncounted)
    return (f"MACs of these ops are not counted, by fvcore neither: {names}",) if names else ()


def _input_shape(analysis: Analysis) -> tuple[int, ...]:
    graph = analysis.coupling.graph
    values = graph.values if graph is not None else ()
    return next((value.shape[1:] for value in values if value.kind == "input"), ())


def _environment(device: str) -> numbers.Environment:
    return numbers.Environment(torch.__version__, device, torch.get_num_threads(), platform.python_version())
