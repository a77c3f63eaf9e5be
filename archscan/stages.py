"""The rounds of a slimming: what stands, budget, calibration batches → what stands after each.

Score, plan, rebuild, prove, repair, and train where that is asked for, each timed. The decision that is not obvious:
every round cuts the original network anew, to what its plan and those before it keep (see `rounds`), so that no error
of one round is carried into the next.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from archscan.criteria import criterion as find_criterion
from archscan.criteria import score
from archscan.detailing import CHEAP_NEEDS, agreement_of
from archscan.divergence import value_reader
from archscan.errors import BadInput, RebuildMismatch
from archscan.gate_statistics import GateStatistics, Need
from archscan.gates import collect
from archscan.losses import LossFn
from archscan.options import ProgressFactory
from archscan.pace import plan_and_time, time_budget
from archscan.planner import Budget, Plan
from archscan.processes import Place
from archscan.rebuild import Rebuilt
from archscan.reconstruct import repair
from archscan.recount import recount
from archscan.recover import recalibrate_batchnorm
from archscan.repairs import Repaired
from archscan.replan import Fitted, Wish, plan_and_rebuild
from archscan.report.details import Agreement
from archscan.report.training import TrainingRun
from archscan.results import Analysis, Scored, SlimSettings
from archscan.retraining import Retraining, train_round
from archscan.rounds import Round, gone_units, put_back, remaining, rows_between
from archscan.rounds import budgets as divided
from archscan.set_effects import SetEffects, set_effects
from archscan.sharding import ALONE
from archscan.verify import Verification, check_price, prove

__all__ = [
    "QUADRATIC",
    "Calibration",
    "Done",
    "Job",
    "Stopwatch",
    "prove_fitted",
    "run_rounds",
    "telling_input",
    "where_of",
]


QUADRATIC: Mapping[str, Need] = MappingProxyType(
    {**dict.fromkeys(("obd", "obs", "mfac", "cbs"), "sample_gradient"), "sosp-i": "fisher_gradient"}
)
"""Criteria that have a quadratic form, and the statistic that it is made of."""


class Stopwatch:
    """Collect the time of named stages."""

    def __init__(self, seconds: Mapping[str, float] = MappingProxyType({})) -> None:
        self.seconds: dict[str, float] = dict(seconds)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage; the same name adds up."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Calibration:
    """Batches to score and to repair on, and the loss of each; no batches where nothing reads any."""

    batches: Iterable[Any]
    loss_fn: LossFn
    synthetic: bool

    @property
    def is_noise(self) -> bool:
        """Whether the batches are noise: made here, or passed by somebody who says so."""
        return self.synthetic or bool(getattr(self.batches, "is_synthetic", False))


@dataclass(frozen=True, eq=False)
class Job:
    """What every stage of one slimming needs; of the criteria, the first that the network's layers allow is used.

    A network is trained after every round where there is a `retraining`.
    """

    model: nn.Module
    example_input: Any
    budget: Budget
    criteria: tuple[str, ...]
    settings: SlimSettings
    watch: Stopwatch
    progress: ProgressFactory
    place: Place = ALONE
    retraining: Retraining | None = None


@dataclass(frozen=True, eq=False)
class Done:
    """What a round left.

    Attributes:
        criterion: What scored it.
        fitted: Plan, cut network, analysis of the original.
        saliency_U: Saliency of each unit, as of the last round that it was there.
        scored: What it was measured on; None where the criterion reads weights only.
        verification: The comparison with the masked original.
        model: The network, repaired, and trained where that was asked for.
        repaired: What was done to each layer; None where that is not known by layer.
        notes: What a user has to know, a sentence each.
        summary: The round in numbers.
        agreement: How other criteria rank the units of the first round; None where there was none to compare with.
        statistics: What the saliency was computed from, without the moments of layers.
        training: What was measured in training; None where there was none.
    """

    criterion: str
    fitted: Fitted
    saliency_U: np.ndarray
    scored: Scored | None
    verification: Verification
    model: nn.Module
    repaired: Repaired | None
    notes: tuple[str, ...]
    summary: Round
    agreement: Agreement | None = None
    statistics: GateStatistics | None = None
    training: TrainingRun | None = None

    @property
    def gone_U(self) -> np.ndarray:
        """Which units are gone, boolean."""
        return gone_units(self.fitted.analysis.coupling, self.fitted.plan.kept)


@dataclass(frozen=True, eq=False)
class Rounds:
    """What all rounds left.

    Attributes:
        first: The one that scored the dense network.
        last: The one that left the result.
        summaries: All of them in numbers, in order.
        notes: What a user has to know, a sentence each, none twice.
        trainings: What was measured in training, in order.
    """

    first: Done
    last: Done
    summaries: tuple[Round, ...]
    notes: tuple[str, ...]
    trainings: tuple[TrainingRun, ...]


def run_rounds(job: Job, calibration: Calibration, analysis: Analysis, found: "Saliency") -> Rounds:
    """Run the rounds of a slimming one after the other.

    Args:
        job: What is slimmed, and how.
        calibration: Batches.
        analysis: Of the original.
        found: Its saliency.
    """
    stages = divided(job.budget, job.settings.rounds)
    where = where_of(1, len(stages))
    first = last = _trained(job, _run_round(job, calibration, analysis, stages[0], where, found), 1, where)
    summaries, notes, trainings = [last.summary], [*last.notes], [last.training]
    for number, budget in enumerate(stages[1:], start=2):
        where = where_of(number, len(stages))
        last = _trained(job, _run_round(job, calibration, last, budget, where), number, where)
        summaries.append(last.summary)
        notes.extend(last.notes)
        trainings.append(last.training)
    measured = tuple(each for each in trainings if each is not None)
    return Rounds(first, last, tuple(summaries), tuple(dict.fromkeys(notes)), measured)


def where_of(number: int, count: int) -> str:
    """Say which round it is, in progress bars; nothing where there is one only."""
    return f" (round {number} of {count})" if count > 1 else ""


def _run_round(
    job: Job,
    calibration: Calibration,
    at: Analysis | Done,
    budget: Budget,
    where: str,
    found: "Saliency | None" = None,
) -> Done:
    """Score what is left, plan, cut the original anew, prove, repair.

    Args:
        job: What is slimmed, and how.
        calibration: Batches.
        at: The analysis of the original before the first round, what the round before left after that.
        budget: What the round must not exceed.
        where: Said of the round in progress bars.
        found: The saliency of what stands, where it has been scored; None to score.
    """
    analysis = at.fitted.analysis if isinstance(at, Done) else at
    found = found or scored_by_one_of(job, at, calibration, where)
    gone_U = at.gone_U if isinstance(at, Done) else None
    job = _with_trained_weights(job, at)
    wish = Wish(budget, job.settings.rule, job.settings.seed, gone_U, found.effects, job.settings.latency)
    fitted = _fitted(job, analysis, found.values_U, wish, where)
    with job.watch.stage("verify"), job.progress(f"Proving the slim network{where}") as step:
        step(0, 0)
        verification, counted = prove_fitted(job, fitted)
    model, recovery, repaired = _recovered(job, at, fitted.rebuilt, calibration, where)
    made = fitted.plan
    summary = Round(
        ratio=budget.ratio,
        macs=made.after.macs,
        params=made.after.params,
        units=int((~gone_units(fitted.analysis.coupling, made.kept)).sum()),
        saliency_lost=made.saliency_lost,
        max_abs_error=verification.max_abs_error if verification.applicable else None,
        recovery=recovery,
    )
    notes = (*found.notes, *fitted.notes, *counted)
    return Done(
        found.criterion,
        fitted,
        found.values_U,
        found.scored,
        verification,
        model,
        repaired,
        notes,
        summary,
        found.agreement,
        found.statistics,
    )


def _with_trained_weights(job: Job, at: Analysis | Done) -> Job:
    """Let the next round cut an original that has the weights which the round before trained."""
    if not isinstance(at, Done) or at.training is None:
        return job
    return replace(job, model=put_back(job.model, at.model, at.fitted.rebuilt.surgery))


def _trained(job: Job, at: Done, number: int, where: str) -> Done:
    """Train what a round left, where that was asked for."""
    if job.retraining is None:
        return at
    kept = at.summary.macs / at.fitted.plan.before.macs
    with job.watch.stage("fine-tune"), job.progress(f"Fine-tuning{where}") as step:
        found = train_round(job.retraining, at.model, number, kept, job.place, step)
    return replace(at, model=found.model, training=found.history)


def _fitted(job: Job, analysis: Analysis, saliency_U: np.ndarray, wish: Wish, where: str) -> Fitted:
    subject = (job.model, job.example_input, analysis, saliency_U, wish)
    if time_budget(wish.budget) is not None:
        with job.watch.stage("plan to time"):
            return plan_and_time(*subject, job.progress)
    with job.watch.stage("plan and rebuild"), job.progress(f"Planning{where}") as step:
        step(0, 0)
        return plan_and_rebuild(*subject)


@dataclass(frozen=True, eq=False)
class Saliency:
    """What scoring found: the criterion that did it, one value per unit, and what they come from."""

    criterion: str
    values_U: np.ndarray
    scored: Scored | None
    effects: SetEffects | None
    notes: tuple[str, ...]
    agreement: Agreement | None
    statistics: GateStatistics


def scored_by_one_of(job: Job, at: Analysis | Done, calibration: Calibration, where: str) -> Saliency:
    """Score by the first criterion that the network's layers allow; whatever else is wrong, the last one says too."""
    *preferred, last = job.criteria
    notes: list[str] = []
    for name in preferred:
        try:
            return _scored(job, name, at, calibration, where)
        except BadInput as error:
            notes.append(f"Channels were scored by {last} in place of {name}: {error}.")
    found = _scored(job, last, at, calibration, where)
    return replace(found, notes=tuple(notes))


def _scored(job: Job, name: str, at: Analysis | Done, calibration: Calibration, where: str) -> Saliency:
    """Score the units that are there; the others keep the saliency that they went with."""
    model, coupling = job.model, (at.fitted.analysis if isinstance(at, Done) else at).coupling
    if isinstance(at, Done):
        model, coupling = at.model, remaining(coupling, at.fitted.plan.kept)
    needs = find_criterion(name).needs | CHEAP_NEEDS
    with job.watch.stage("saliency"), job.progress(f"Scoring channels by {name}{where}") as step:
        batches, loss_fn, seed = calibration.batches, calibration.loss_fn, job.settings.seed
        statistics = collect(model, coupling, batches, loss_fn, needs, seed=seed, progress=step, place=job.place)
        saliency_U, effects = score(name, statistics), None
        if job.settings.set_effects == "quadratic":
            effects = set_effects(statistics.require(QUADRATIC[name]))
    if isinstance(at, Done):
        agreement = at.agreement
        saliency_U = np.where(at.gone_U, at.saliency_U, saliency_U)
    else:
        agreement = agreement_of(name, saliency_U, statistics, needs, coupling)
    scored = Scored(statistics.samples, calibration.synthetic) if statistics.samples else None
    light = replace(statistics, layer_inputs_L=None, layer_gradients_L=None)  # moments of layers take gigabytes
    return Saliency(name, saliency_U, scored, effects, (), agreement, light)


def prove_fitted(job: Job, fitted: Fitted) -> tuple[Verification, list[str]]:
    """See that the slim network is the masked original and costs what the plan says; note who counted the costs."""
    made, rebuilt = fitted.plan, fitted.rebuilt
    verification = prove(
        job.model,
        rebuilt.model,
        rebuilt.surgery,
        fitted.analysis.coupling,
        made.kept,
        telling_input(job.example_input, job.settings.seed),
        seed=job.settings.seed,
    )
    if not verification.passed:
        raise RebuildMismatch(
            f"the slim network is not the masked original ({verification.reason}), so that nothing was written; "
            "please report this network"
        )
    return verification, check_plan(rebuilt.model, job.example_input, made)


def check_plan(model: nn.Module, example_input: Any, made: Plan) -> list[str]:
    """See that a network costs what the plan says; note who counted.

    Raises:
        RebuildMismatch: It does not.
    """
    counted, after = recount(model, example_input), made.after
    check_price(model, counted_macs=counted.macs, predicted_macs=after.macs, predicted_params=after.params)
    return list(counted.notes)


def telling_input(example_input: Any, seed: int) -> Any:
    """Put noise where the example input is one value all over, which would hide most errors."""
    generator = torch.Generator().manual_seed(seed)

    def tell(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.ndim < 3 or leaf.unique().numel() > 1:
            return leaf
        return torch.randn(leaf.shape, generator=generator).to(leaf)

    return tree_map(tell, example_input)


def _recovered(
    job: Job, at: Analysis | Done, rebuilt: Rebuilt, calibration: Calibration, where: str
) -> tuple[nn.Module, str | None, Repaired | None]:
    level = job.settings.recover
    if level == "none":
        return rebuilt.model, None, None
    if level != "bn":
        goal, surgery = job.model, rebuilt.surgery
        if isinstance(at, Done) and at.training is not None:  # what is out of its places in the original is not trained
            goal, surgery = at.model, rows_between(at.fitted.rebuilt.surgery, surgery)
        with job.watch.stage("recover"), job.progress(f"Repairing the slim network{where}") as step:
            found = repair(goal, rebuilt.model, surgery, calibration.batches, level, progress=step)
        return found.model, found.clause(), found
    with job.watch.stage("recover"), job.progress(f"Recalibrating BatchNorm{where}") as step:
        again = recalibrate_batchnorm(rebuilt.model, calibration.batches, step)
    return again.model, again.clause(), None


def branching_warnings(analysis: Analysis) -> list[str]:
    """Warn of a forward that another input may take another way through."""
    graph = analysis.coupling.graph
    reader = None if graph is None else value_reader(graph)
    if reader is None:
        return []
    return [
        f"The forward of {reader} reads values that depend on its input, so that another input may take another way "
        "through it; only the way of the example input was analysed and proven."
    ]
