"""Audit criteria on one network: model, coupling, calibration and held-out batches → `Audit`.

Criteria score on the calibration batches; what removal really does is measured on held-out ones, which no criterion has
seen. The loss of every ablation is measured once and serves all criteria.

The decision that is not obvious: criteria are ranked by the mean of two rank correlations over the whole network, of
single units and of sets. A planner compares units of different layers and adds saliencies up, so both have to hold;
ranks, because the few units without which nothing works would decide Pearson's correlation alone, and those are never
removed.

Shape suffixes: U units, A ablations.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from archscan.audit.ablations import Ablation, draw_sets, draw_units, free_units, own_plan
from archscan.audit.oracle import Losses, measure
from archscan.criteria import CRITERIA, criterion, score
from archscan.errors import BadInput
from archscan.gate_statistics import GateStatistics, Need
from archscan.gates import collect
from archscan.groups import Coupling
from archscan.losses import LossFn
from archscan.options import ProgressCallback, ProgressFactory, silent

QUADRATIC = {"obd": False, "cbs": False, "loss-change": True}
"""Criteria that stand for the quadratic form ½ 1ᵀF_MM 1 of the cost of a set M, F being the Fisher of the gates; and
whether they have the linear term -Σ E[g_u] as well."""


@dataclass(frozen=True)
class AuditSettings:
    """How large an audit is.

    Attributes:
        units: Single units to remove, over all groups.
        sets: Sets of units to remove.
        kept: Fractions of the MACs that each criterion's own plans keep.
        seed: Of everything random.
    """

    units: int = 100
    sets: int = 40
    kept: tuple[float, ...] = (0.9, 0.8)
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Prediction:
    """What one criterion says.

    Attributes:
        name: The criterion.
        saliency_U: Of every unit.
        summed_A: Sum of saliencies of each drawn ablation.
        quadratic_A: The quadratic form of each drawn ablation; None where the criterion has none.
        own_plans: Places, among all ablations that were measured, of its own plan for each fraction of the MACs kept;
            None where widths do not get there.
    """

    name: str
    saliency_U: np.ndarray
    summed_A: np.ndarray
    quadratic_A: np.ndarray | None
    own_plans: tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Audit:
    """Predictions and measurements.

    Attributes:
        settings: What was asked for.
        drawn: Units, then sets: the first ablations of those measured.
        measured: All ablations, own plans at the end.
        losses: Of all ablations.
        predictions: By criterion, in the order asked for.
        unscored: Criteria that could not be scored, with the reason.
        samples: Calibration samples.
    """

    settings: AuditSettings
    drawn: tuple[Ablation, ...]
    measured: tuple[Ablation, ...]
    losses: Losses
    predictions: tuple[Prediction, ...]
    samples: int
    unscored: Mapping[str, str] = field(default_factory=dict)


def audit(
    model: nn.Module,
    coupling: Coupling,
    calibration: Iterable[Any],
    held_out: Iterable[Any],
    loss_fn: LossFn,
    names: Sequence[str] | None = None,
    *,
    settings: AuditSettings | None = None,
    progress: ProgressFactory = silent,
) -> Audit:
    """Compare criteria with the loss changes that they predict; the model is left unchanged.

    Args:
        model: The network, on any device.
        coupling: Its groups and the places of its gates.
        calibration: Batches that criteria score on.
        held_out: Batches that loss changes are measured on.
        loss_fn: Mean loss of a batch over its samples, from the true labels.
        names: Criteria; None for the whole table, without those that the network or the loss does not allow.
        settings: Size and seed.
        progress: Opens one bar for scoring, by batches, and then one for removing, by forward passes.

    Raises:
        BadInput: A criterion is unknown or cannot be scored, nothing is free to be removed, or batches are unusable.
    """
    settings = settings or AuditSettings()
    for name in names or ():
        criterion(name)
    drawn = draw_units(coupling, settings.units, settings.seed) + draw_sets(coupling, settings.sets, settings.seed)
    with progress("Scoring by all criteria") as step:
        scores, unscored, statistics = _scores(model, coupling, calibration, loss_fn, names, settings.seed, step)
    measured, places = _with_own_plans(coupling, drawn, scores, settings)
    with progress("Removing channels") as step:
        losses = measure(model, coupling, measured, held_out, loss_fn, seed=settings.seed, progress=step)
    if not np.ptp(losses.change_A):
        raise BadInput(
            "every removal changes the loss by the same amount, so that no criterion can be right or wrong; audit"
            " a trained network on images that it was trained for"
        )
    predictions = tuple(
        Prediction(
            name,
            saliency_U,
            np.array([saliency_U[list(ablation.units)].sum() for ablation in drawn]),
            quadratic_form(statistics, drawn, linear=QUADRATIC[name]) if name in QUADRATIC else None,
            places[name],
        )
        for name, saliency_U in scores.items()
    )
    return Audit(settings, drawn, measured, losses, predictions, statistics.samples, unscored)


def quadratic_form(statistics: GateStatistics, ablations: Sequence[Ablation], *, linear: bool) -> np.ndarray:
    """Predict the cost of each set M as ½ 1ᵀF_MM 1 = ½ E_n[s_n²], with s_n = Σ_{u∈M} g_nu; shape [A].

    With `linear`, −E_n[s_n] is added, as in the expansion of the loss away from a minimum.
    """
    gradient_NU = statistics.require("sample_gradient")
    sums = (gradient_NU[:, list(ablation.units)].sum(1, dtype=np.float64) for ablation in ablations)
    return np.array([0.5 * np.square(sum_N).mean() - (sum_N.mean() if linear else 0.0) for sum_N in sums])


def _scores(
    model: nn.Module,
    coupling: Coupling,
    batches: Iterable[Any],
    loss_fn: LossFn,
    names: Sequence[str] | None,
    seed: int,
    progress: ProgressCallback,
) -> tuple[dict[str, np.ndarray], dict[str, str], GateStatistics]:
    """Score by all criteria from one collection of statistics; of the whole table, leave out what cannot be had."""
    wanted = list(CRITERIA) if names is None else list(dict.fromkeys(names))
    unscored: dict[str, str] = {}
    try:
        statistics = collect(model, coupling, batches, loss_fn, _needs(wanted), seed=seed, progress=progress)
    except BadInput:
        if names is not None:
            raise
        # One row of the table may ask for what this network or this loss does not have: see which.
        unscored = _unobtainable(model, coupling, batches, loss_fn, wanted, seed)
        wanted = [name for name in wanted if name not in unscored]
        statistics = collect(model, coupling, batches, loss_fn, _needs(wanted), seed=seed, progress=progress)
    scores: dict[str, np.ndarray] = {}
    for name in wanted:
        try:
            scores[name] = score(name, statistics)
        except BadInput as error:
            if names is not None:
                raise
            unscored[name] = str(error)
    return scores, unscored, statistics


def _needs(names: Sequence[str]) -> frozenset[Need]:
    """Unite what criteria read; the gradients are there in any case, for the quadratic form."""
    always: frozenset[Need] = frozenset({"sample_gradient"})
    return always.union(*(criterion(name).needs for name in names))


def _unobtainable(
    model: nn.Module, coupling: Coupling, batches: Iterable[Any], loss_fn: LossFn, names: Sequence[str], seed: int
) -> dict[str, str]:
    """Try each need on one batch; name the criteria whose needs cannot be collected."""
    first = [next(iter(batches))]
    failures: dict[frozenset[Any], str] = {}
    for needs in {frozenset(criterion(name).needs) for name in names}:
        try:
            collect(model, coupling, first, loss_fn, needs, seed=seed)
        except BadInput as error:
            failures[needs] = str(error)
    return {name: failures[criterion(name).needs] for name in names if criterion(name).needs in failures}


def _with_own_plans(
    coupling: Coupling, drawn: Sequence[Ablation], scores: Mapping[str, np.ndarray], settings: AuditSettings
) -> tuple[tuple[Ablation, ...], dict[str, tuple[int | None, ...]]]:
    """Append each criterion's own plans, the same ones once; give their places."""
    measured = list(drawn)
    place_of: dict[tuple[int, ...], int] = {}
    places: dict[str, tuple[int | None, ...]] = {}
    for name, saliency_U in scores.items():
        found: list[int | None] = []
        for kept in settings.kept:
            made = own_plan(coupling, saliency_U, kept, settings.seed)
            if made is not None and made.units not in place_of:
                place_of[made.units] = len(measured)
                measured.append(made)
            found.append(None if made is None else place_of[made.units])
        places[name] = tuple(found)
    return tuple(measured), places


def free_counts(coupling: Coupling) -> tuple[int, int]:
    """Count the units that may go, and the groups that they lie in."""
    free = free_units(coupling)
    return sum(map(len, free.values())), len(free)
