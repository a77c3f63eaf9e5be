"""What a slimming says about the network that was slimmed: rounds, calibration batches → findings.

Capacity and redundancy from the plan and from plans made in other ways, dead channels from the weights, silent and
repeated ones from one pass over the calibration images. The decision that is not obvious: that pass is made only on
images that somebody passed; on the noise that stands in for them, what is silent would mean nothing.

Shape suffixes: G groups, U units, P units of one group.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from archscan.activations import Activations, observe
from archscan.criteria.bayes import group_evidence
from archscan.criteria.redundancy import effective_rank
from archscan.dead_units import dead_units
from archscan.findings import Finding, capacity_bottlenecks, network_keep_ratio
from archscan.findings.capacity import standing_out
from archscan.findings.confidence import Planned, Votes, replan
from archscan.findings.narrow import capacity_findings
from archscan.findings.network import Measured, Network
from archscan.findings.redundancy import (
    constant_findings,
    dead_findings,
    far_below,
    redundancy_findings,
    silent_findings,
    twin_findings,
)
from archscan.gate_statistics import GateStatistics
from archscan.groups import ChannelGroup
from archscan.results import group_rows, group_uses
from archscan.stages import Calibration, Done, Job


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        findings: All but those of cost, in no order.
        confidence: Group name → share of the plans made in other ways in which it stands out as a bottleneck.
    """

    findings: tuple[Finding, ...]
    confidence: Mapping[str, float]


def diagnose(job: Job, calibration: Calibration, first: Done, last: Done) -> Diagnosis:
    """Look at the dense network with what its slimming told.

    Args:
        job: What was slimmed, and how.
        calibration: Batches, gone through once where they are not noise.
        first: The round that scored the dense network.
        last: The round whose plan counts.
    """
    analysis, plan = last.fitted.analysis, last.fitted.plan
    groups, coupling = analysis.coupling.groups, analysis.coupling
    rows = group_rows(analysis, plan)
    network = Network(
        groups,
        analysis.costs,
        np.array([len(plan.kept[group.name][0]) for group in groups]),
        np.array([row.macs_share for row in rows]),
        _measured_on(first, calibration),
    )
    with job.watch.stage("findings"), job.progress("Planning in other ways") as step:
        planned = Planned(
            groups,
            analysis.costs,
            job.settings.rule,
            first.saliency_U,
            first.criterion,
            plan.after.macs / plan.before.macs,
        )
        assert first.statistics is not None
        replans = replan(planned, first.statistics, job.settings.seed, step)
    seen = _activations(job, calibration, last)
    with job.watch.stage("findings"):
        capacity, redundant = (replans.votes(_judge(network, rule)) for rule in (standing_out, _falling_behind))
        confidence = {
            group.name: votes.confidence
            for group, votes in zip(groups, capacity, strict=True)
            if votes.confidence is not None
        }
        measured = _measured(groups, first.statistics, seen)
        dead_U = dead_units(job.model, coupling)
        uses = group_uses(groups, rows, job.settings.rule)
        bottlenecks = capacity_bottlenecks(uses, network_keep_ratio(uses), confidence)
        lost_G = _lost(groups, last.gone_U, first.saliency_U)
        findings = [
            *dead_findings(network, dead_U),
            *capacity_findings(bottlenecks, network, _with(measured, groups, capacity)),
            *redundancy_findings(network, _with(measured, groups, redundant), lost_G),
        ]
        if seen is not None:
            findings += silent_findings(network, seen.silent_U & ~dead_U, seen.samples)
            findings += constant_findings(network, seen.constant_U & ~seen.silent_U & ~dead_U, seen.samples)
            findings += twin_findings(network, seen.twins_by_group, seen.samples)
    return Diagnosis(tuple(findings), confidence)


def _judge(
    network: Network, rule: Callable[[Sequence[float], float], Sequence[bool]]
) -> Callable[[np.ndarray], np.ndarray]:
    """Hold the kept fractions of the free groups against the network's."""

    def judge(keep_G: np.ndarray) -> np.ndarray:
        said_G = np.zeros(len(keep_G), dtype=bool)
        said_G[network.free_G] = rule(keep_G[network.free_G].tolist(), network.keep_ratio(keep_G))
        return said_G

    return judge


def _falling_behind(keeps: Sequence[float], network_keep_ratio: float) -> list[bool]:
    return [far_below(keep, network_keep_ratio) for keep in keeps]


def _measured_on(first: Done, calibration: Calibration) -> str:
    if first.scored is None:
        return ""
    return f"{first.scored.samples:,} images{' of synthetic noise' if calibration.is_noise else ''}"


def _activations(job: Job, calibration: Calibration, last: Done) -> Activations | None:
    """Look at what layers read on the images, where somebody passed any."""
    if calibration.is_noise or calibration.batches == ():
        return None
    coupling, batches = last.fitted.analysis.coupling, calibration.batches
    with job.watch.stage("findings"), job.progress("Watching channels") as step:
        return observe(job.model, coupling, batches, calibration.loss_fn, progress=step, place=job.place)


def _measured(
    groups: Sequence[ChannelGroup], statistics: GateStatistics, seen: Activations | None
) -> dict[str, Measured]:
    """Count the directions and the well-determined gates of each group that may be cut."""
    ranks, determined = {}, {}
    gradient_NU = statistics.sample_gradient_NU
    if gradient_NU is not None:
        group_U = np.full(statistics.unit_count, -1)
        for number, group in enumerate(groups):
            group_U[np.array(group.units)] = number
        determined = {each.group: each for each in group_evidence(replace(statistics, group_U=group_U))}
    for number, group in enumerate(groups):
        if gradient_NU is not None and group.frozen is None:
            own_NP = gradient_NU[:, np.array(group.units).reshape(-1)].astype(np.float64)
            ranks[number] = effective_rank(np.linalg.svd(own_NP, compute_uv=False))
    return {
        group.name: Measured(
            units=sum(map(len, group.units)),
            activation_rank=_activation_rank(seen, number),
            gradient_rank=ranks.get(number),
            well_determined=determined[number].well_determined if number in determined else None,
        )
        for number, group in enumerate(groups)
        if group.frozen is None
    }


def _activation_rank(seen: Activations | None, number: int) -> float | None:
    if seen is None or number not in seen.covariance_by_group:
        return None
    eigenvalues_P = np.linalg.eigvalsh(seen.covariance_by_group[number])
    return effective_rank(np.sqrt(np.clip(eigenvalues_P, 0.0, None)))


def _with(
    measured: Mapping[str, Measured], groups: Sequence[ChannelGroup], votes: Sequence[Votes]
) -> dict[str, Measured]:
    by_name = {group.name: each for group, each in zip(groups, votes, strict=True)}
    return {
        name: replace(
            own, resamples=by_name[name].resamples, criteria=by_name[name].criteria, budgets=by_name[name].budgets
        )
        for name, own in measured.items()
    }


def _lost(groups: Sequence[ChannelGroup], gone_U: np.ndarray, saliency_U: np.ndarray) -> np.ndarray:
    """Give the share of each group's saliency that went; 0 where it has none."""
    lost = []
    for group in groups:
        units = np.array(group.units).reshape(-1)
        total = float(saliency_U[units].sum())
        lost.append(float(saliency_U[units][gone_U[units]].sum()) / total if total > 0 else 0.0)
    return np.array(lost)
