"""What came of a slimming, and the reports on it: `SlimResult` → `Report` → a saved folder.

The frozen data that `slimming` returns, and the one place that knows both them and the numbers that are printed. The
decision that is not obvious: what only the command line knows (names, files, accuracy) comes as a `Context`, so that a
result from Python gives the same report with those parts left out.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from archscan import __version__, saving
from archscan.bottlenecks import Bottleneck, GroupUse, capacity_bottlenecks, network_keep_ratio
from archscan.costs import CostModel
from archscan.errors import BadInput
from archscan.groups import ChannelGroup, Coupling
from archscan.options import DEFAULT_ROUNDS
from archscan.planner import Plan
from archscan.recipes import Recipe
from archscan.reconstruct import Repaired
from archscan.report import model as numbers
from archscan.report.html import render_html
from archscan.report.model import Report
from archscan.rounds import MAX_ROUNDS, Round
from archscan.surgery import Surgery
from archscan.verify import Verification
from archscan.widths import WidthRule, allowed_steps

RECOVERIES = ("none", "bn", "bias", "ls")


@dataclass(frozen=True)
class SlimSettings:
    """How to slim, beyond the budget, the data and the criterion.

    Attributes:
        rule: Which widths are allowed.
        protect: Shell patterns of layers that keep their width.
        recover: Repair on the calibration batches after slimming: ``bn`` re-estimates BatchNorm statistics, ``bias``
            corrects mean outputs, ``ls`` re-solves weights by least squares (see `reconstruct.repair`).
        seed: Of everything random.
        rounds: Slim in so many steps, each repaired, and scored anew before the next (see `rounds`).
        set_effects: Whether a set of units costs the sum of their saliencies (``additive``), or what the criterion's
            quadratic form says of the set (``quadratic``, for the criteria that have one; see `set_effects`).
    """

    rule: WidthRule = field(default_factory=WidthRule)
    protect: tuple[str, ...] = ()
    recover: Literal["none", "bn", "bias", "ls"] = "none"
    seed: int = 0
    rounds: int = DEFAULT_ROUNDS
    set_effects: Literal["additive", "quadratic"] = "additive"

    def __post_init__(self) -> None:
        if isinstance(self.protect, str):
            raise BadInput(f"protect is the text {self.protect!r}; pass a tuple of patterns: ({self.protect!r},)")
        if self.recover not in RECOVERIES:
            raise BadInput(f"recover is {self.recover!r}; it must be {' or '.join(map(repr, RECOVERIES))}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise BadInput(f"the seed is {self.seed!r}; it must be a whole number from 0 on")
        if type(self.rounds) is not int or not 1 <= self.rounds <= MAX_ROUNDS:
            raise BadInput(f"rounds is {self.rounds!r}; it must be a whole number from 1 to {MAX_ROUNDS}")
        if self.set_effects not in ("additive", "quadratic"):
            raise BadInput(f"set_effects is {self.set_effects!r}; it must be 'additive' or 'quadratic'")


@dataclass(frozen=True, eq=False)
class Analysis:
    """What is known of a network before anything is planned.

    Attributes:
        coupling: Channel groups, places of gates, sizes.
        costs: MACs, parameters and activations as functions of the groups' widths.
    """

    coupling: Coupling
    costs: CostModel


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
    rows = group_rows(analysis, plan)
    target = numbers.Target(plan.budget.kind, plan.budget.ratio)
    return Report(
        archscan=__version__,
        command="slim",
        model=context.model,
        input_shape=context.input_shape or _input_shape(analysis),
        weights=context.weights,
        data=context.data,
        criterion=str(plan.provenance.get("criterion", "")),
        seed=int(plan.provenance.get("seed", 0)),
        target=target,
        before=numbers.CostTotals(plan.before.macs, plan.before.params, plan.before.activations),
        after=numbers.CostTotals(plan.after.macs, plan.after.params, plan.after.activations),
        keep_ratio=numbers.KeepRatio(plan.after.macs / plan.before.macs, plan.after.params / plan.before.params),
        verification=numbers.Verification(
            result.verification.applicable,
            result.verification.reason,
            result.verification.max_abs_error,
            result.verification.tolerance,
            result.verification.passed,
        ),
        accuracy=context.accuracy,
        recovery=result.recovery,
        groups=rows,
        bottlenecks=_bottlenecks(analysis.coupling.groups, rows, result.rule),
        modules=_module_rows(analysis, widths),
        saliency_lost=numbers.SaliencyLost(plan.saliency_lost, plan.saliency_lost_uniform),
        warnings=(*result.warnings, *context.warnings),
        notes=(*result.notes, *_uncounted(analysis), *context.notes),
        seconds=result.seconds,
        environment=_environment(context.device),
        command_line=context.command_line,
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
    full = analysis.costs.full_widths_G
    macs, params, activations = (analysis.costs.evaluate(kind, full) for kind in ("macs", "params", "activations"))
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
        before=numbers.CostTotals(macs, params, activations),
        after=None,
        keep_ratio=None,
        verification=None,
        accuracy=None,
        recovery=None,
        groups=group_rows(analysis, None),
        bottlenecks=(),
        modules=_module_rows(analysis, None),
        saliency_lost=None,
        warnings=context.warnings,
        notes=(*_uncounted(analysis), *context.notes),
        seconds=seconds,
        environment=_environment(context.device),
        command_line=context.command_line,
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


def _module_rows(analysis: Analysis, widths: np.ndarray | None) -> tuple[numbers.ModuleRow, ...]:
    costs = analysis.costs
    macs, params = (costs.by_module(kind, costs.full_widths_G) for kind in ("macs", "params"))
    after = costs.by_module("macs", widths) if widths is not None else None
    return tuple(
        numbers.ModuleRow(path, macs.get(path, 0), params.get(path, 0), None if after is None else after.get(path, 0))
        for path in dict.fromkeys([*macs, *params])
    )


def _bottlenecks(
    groups: Sequence[ChannelGroup], rows: Sequence[numbers.GroupRow], rule: WidthRule
) -> tuple[Bottleneck, ...]:
    uses = [
        GroupUse(
            row.name,
            row.units,
            row.kept,
            min(allowed_steps(group, rule)) * group.channels_per_step,
            row.frozen,
            row.macs_share,
        )
        for group, row in zip(groups, rows, strict=True)
    ]
    return capacity_bottlenecks(uses, network_keep_ratio(uses))


def _uncounted(analysis: Analysis) -> tuple[str, ...]:
    names = ", ".join(analysis.costs.uncounted)
    return (f"MACs of these ops are not counted, by fvcore neither: {names}",) if names else ()


def _input_shape(analysis: Analysis) -> tuple[int, ...]:
    graph = analysis.coupling.graph
    values = graph.values if graph is not None else ()
    return next((value.shape[1:] for value in values if value.kind == "input"), ())


def _environment(device: str) -> numbers.Environment:
    return numbers.Environment(torch.__version__, device, torch.get_num_threads(), platform.python_version())
