"""One round of a slimming: what stands, budget, calibration batches → what stands after it.

Score, plan, rebuild, prove, repair, each timed. The decision that is not obvious: every round cuts the original network
anew, to what its plan and those before it keep (see `rounds`), so that no error of one round is carried into the next.
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
from archscan.errors import BadInput, RebuildMismatch
from archscan.gates import Need, collect
from archscan.losses import LossFn
from archscan.options import ProgressFactory
from archscan.planner import Budget
from archscan.processes import Place
from archscan.rebuild import Rebuilt
from archscan.reconstruct import Repaired, repair
from archscan.recount import recount
from archscan.recover import recalibrate_batchnorm
from archscan.replan import Fitted, Wish, plan_and_rebuild
from archscan.results import Analysis, Scored, SlimSettings
from archscan.rounds import Round, gone_units, remaining
from archscan.set_effects import SetEffects, set_effects
from archscan.sharding import ALONE
from archscan.verify import Verification, check_price, prove

__all__ = ["QUADRATIC", "Calibration", "Done", "Job", "Stopwatch", "run_round"]


QUADRATIC: Mapping[str, Need] = MappingProxyType(
    {**dict.fromkeys(("obd", "obs", "mfac", "cbs"), "sample_gradient"), "sosp-i": "fisher_gradient"}
)
"""Criteria that have a quadratic form, and the statistic that it is made of."""


class Stopwatch:
    """Collect the time of named stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

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


@dataclass(frozen=True, eq=False)
class Job:
    """What every stage of one slimming needs; of the criteria, the first that the network's layers allow is used."""

    model: nn.Module
    example_input: Any
    budget: Budget
    criteria: tuple[str, ...]
    settings: SlimSettings
    watch: Stopwatch
    progress: ProgressFactory
    place: Place = ALONE


@dataclass(frozen=True, eq=False)
class Done:
    """What a round left.

    Attributes:
        criterion: What scored it.
        fitted: Plan, cut network, analysis of the original.
        saliency_U: Saliency of each unit, as of the last round that it was there.
        scored: What it was measured on; None where the criterion reads weights only.
        verification: The comparison with the masked original.
        model: The network, repaired.
        repaired: What was done to each layer; None where that is not known by layer.
        notes: What a user has to know, a sentence each.
        summary: The round in numbers.
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

    @property
    def gone_U(self) -> np.ndarray:
        """Which units are gone, boolean."""
        return gone_units(self.fitted.analysis.coupling, self.fitted.plan.kept)


def run_round(job: Job, calibration: Calibration, at: Analysis | Done, budget: Budget, where: str = "") -> Done:
    """Score what is left, plan, cut the original anew, prove, repair.

    Args:
        job: What is slimmed, and how.
        calibration: Batches.
        at: The analysis of the original before the first round, what the round before left after that.
        budget: What the round must not exceed.
        where: Said of the round in progress bars.
    """
    analysis = at.fitted.analysis if isinstance(at, Done) else at
    found = _scored_by_one_of(job, at, calibration, where)
    gone_U = at.gone_U if isinstance(at, Done) else None
    wish = Wish(budget, job.settings.rule, job.settings.seed, gone_U, found.effects)
    with job.watch.stage("plan and rebuild"), job.progress(f"Planning{where}") as step:
        step(0, 0)
        fitted = plan_and_rebuild(job.model, job.example_input, analysis, found.values_U, wish)
    with job.watch.stage("verify"), job.progress(f"Proving the slim network{where}") as step:
        step(0, 0)
        verification, counted = _prove(job, fitted)
    model, recovery, repaired = _recovered(job, fitted.rebuilt, calibration, where)
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
    return Done(found.criterion, fitted, found.values_U, found.scored, verification, model, repaired, notes, summary)


@dataclass(frozen=True, eq=False)
class _Saliency:
    criterion: str
    values_U: np.ndarray
    scored: Scored | None
    effects: SetEffects | None
    notes: tuple[str, ...]


def _scored_by_one_of(job: Job, at: Analysis | Done, calibration: Calibration, where: str) -> _Saliency:
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


def _scored(job: Job, name: str, at: Analysis | Done, calibration: Calibration, where: str) -> _Saliency:
    """Score the units that are there; the others keep the saliency that they went with."""
    model, coupling = job.model, (at.fitted.analysis if isinstance(at, Done) else at).coupling
    if isinstance(at, Done):
        model, coupling = at.model, remaining(coupling, at.fitted.plan.kept)
    needs = find_criterion(name).needs
    with job.watch.stage("saliency"), job.progress(f"Scoring channels by {name}{where}") as step:
        batches, loss_fn, seed = calibration.batches, calibration.loss_fn, job.settings.seed
        statistics = collect(model, coupling, batches, loss_fn, needs, seed=seed, progress=step, place=job.place)
        saliency_U, effects = score(name, statistics), None
        if job.settings.set_effects == "quadratic":
            effects = set_effects(statistics.require(QUADRATIC[name]))
    if isinstance(at, Done):
        saliency_U = np.where(at.gone_U, at.saliency_U, saliency_U)
    scored = Scored(statistics.samples, calibration.synthetic) if statistics.samples else None
    return _Saliency(name, saliency_U, scored, effects, ())


def _prove(job: Job, fitted: Fitted) -> tuple[Verification, list[str]]:
    """See that the slim network is the masked original and costs what the plan says; note who counted the costs."""
    made, rebuilt = fitted.plan, fitted.rebuilt
    verification = prove(
        job.model,
        rebuilt.model,
        rebuilt.surgery,
        fitted.analysis.coupling,
        made.kept,
        _telling_input(job),
        seed=job.settings.seed,
    )
    if not verification.passed:
        raise RebuildMismatch(
            f"the slim network is not the masked original ({verification.reason}), so that nothing was written; "
            "please report this network"
        )
    counted = recount(rebuilt.model, job.example_input)
    check_price(
        rebuilt.model,
        counted_macs=counted.macs,
        predicted_macs=made.after.macs,
        predicted_params=made.after.params,
    )
    return verification, list(counted.notes)


def _telling_input(job: Job) -> Any:
    """Put noise where the example input is one value all over, which would hide most errors."""
    generator = torch.Generator().manual_seed(job.settings.seed)

    def tell(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.ndim < 3 or leaf.unique().numel() > 1:
            return leaf
        return torch.randn(leaf.shape, generator=generator).to(leaf)

    return tree_map(tell, job.example_input)


def _recovered(
    job: Job, rebuilt: Rebuilt, calibration: Calibration, where: str
) -> tuple[nn.Module, str | None, Repaired | None]:
    level = job.settings.recover
    if level == "none":
        return rebuilt.model, None, None
    if level != "bn":
        with job.watch.stage("recover"), job.progress(f"Repairing the slim network{where}") as step:
            found = repair(job.model, rebuilt.model, rebuilt.surgery, calibration.batches, level, progress=step)
        return found.model, found.clause(), found
    with job.watch.stage("recover"), job.progress(f"Recalibrating BatchNorm{where}") as step:
        again = recalibrate_batchnorm(rebuilt.model, calibration.batches, step)
    layers = f"{again.layers} layer{'s' if again.layers > 1 else ''}"
    return again.model, f"BatchNorm statistics of {layers} recalibrated on {again.samples} images", None
