"""Slim a network from Python: model, example input, budget, data → `SlimResult`.

The stages of the design in their order, each timed. The decision that is not obvious: a budget out of reach is refused
before anything is scored, by pricing the narrowest widths, since scores take nearly all of the time.
"""

import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from archscan import __version__
from archscan.budgets import NOUNS
from archscan.capture import require_plain
from archscan.criteria import criterion as find_criterion
from archscan.diagnosis import diagnose
from archscan.errors import BadInput
from archscan.groups import couple
from archscan.latency import LatencySetup, Timing, measure_pair
from archscan.losses import LossFn, classification_loss, sampled_label_loss
from archscan.options import DEFAULT_CRITERION, SYNTHETIC_SAMPLES, ProgressFactory, default_criterion, silent
from archscan.pace import time_budget, time_warnings, timed
from archscan.planner import Budget, BudgetKind, Plan, protect, uniform_plan
from archscan.processes import Place
from archscan.recipes import Recipe
from archscan.recognise import recognise
from archscan.replan import priced
from archscan.results import Analysis, SlimResult, SlimSettings
from archscan.retraining import Finetuning, notes_of_training, opened
from archscan.rounds import Round
from archscan.sharding import ALONE, on_device
from archscan.stages import (
    QUADRATIC,
    Calibration,
    Done,
    Job,
    Saliency,
    Stopwatch,
    branching_warnings,
    run_rounds,
    scored_by_one_of,
    where_of,
)
from archscan.surgery import named_tensors
from archscan.weights import check_finite

__all__ = ["SlimResult", "SlimSettings", "Stopwatch", "analyse", "has_batchnorm", "reads_images", "slim", "slim_each"]

_WEIGHT_STATISTICS = frozenset({"weight_norm", "bn_scale", "read_norm", "group"})
_NOISE_BATCH_SIZE = 8


def reads_images(criterion: str) -> bool:
    """Say whether a criterion runs the network at all; the others read weights only."""
    return bool(find_criterion(criterion).needs - _WEIGHT_STATISTICS)


def has_batchnorm(model: nn.Module) -> bool:
    """Say whether there are BatchNorm statistics that could be estimated anew."""
    return any(isinstance(module, _BatchNorm) and module.running_mean is not None for module in model.modules())


def require_batchnorm(model: nn.Module) -> None:
    """Refuse to recalibrate a network without BatchNorm statistics."""
    if not has_batchnorm(model):
        raise BadInput("the model has no BatchNorm statistics to recalibrate; leave out recover='bn'")


def slim(
    model: nn.Module,
    example_input: Any,
    *,
    target_flops: float | None = None,
    target_params: float | None = None,
    target_latency: float | None = None,
    target_memory: float | None = None,
    data: Iterable[Any] | None = None,
    criterion: str | None = None,
    loss_fn: LossFn | None = None,
    settings: SlimSettings | None = None,
    recipe: Recipe | None = None,
    finetune: Finetuning | None = None,
    progress: ProgressFactory = silent,
    place: Place = ALONE,
) -> SlimResult:
    """Slim a network to a budget; the model is not modified, and neither are the global random generators.

    Everything random, a shuffling data loader included, follows from ``settings.seed``.

    Args:
        model: Any network; what it is given is moved to its device.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        target_flops: Kept fraction of the MACs (one MAC is one FLOP), above 0 and at most 1.
        target_params: Kept fraction of the parameters, likewise.
        target_latency: Kept fraction of the measured time, likewise; ``settings.latency`` says how to measure it.
        target_memory: Kept fraction of the peak activation memory, counted, likewise. Of several targets all are met.
        data: Calibration batches, such as a data loader of (images, labels); None for noise.
        criterion: A name from `archscan.criteria.CRITERIA`; None for the one that suits the repair (see `options`).
        loss_fn: Mean loss of a batch, ``loss_fn(model, batch) -> scalar``; None for classification.
        settings: Width rules, protected layers, repair, seed.
        recipe: How its architecture was built; None to find out, for the networks of timm, torchvision and archscan.
        finetune: Train the network after every round of ``settings.rounds``; None for no training.
        progress: Opens progress bars.
        place: Which process this is, of those that slim the same network together and share its scoring.

    Returns:
        The slim network, in eval mode, with its plan and proof; ``save`` writes a folder that `archscan.load` opens.

    Raises:
        BadInput: An argument makes no sense, is out of range, or does not fit the model.
        UnsupportedOp: The forward uses an op without a coupling rule.
        InfeasibleBudget: The target is below what the minimum widths allow.
        RebuildMismatch: The slim network is not what the plan says; this is a defect to report.
    """
    budget = _budget(macs=target_flops, params=target_params, latency=target_latency, memory=target_memory)
    each = slim_each(
        model,
        example_input,
        (budget,),
        data=data,
        criterion=criterion,
        loss_fn=loss_fn,
        settings=settings,
        recipe=recipe,
        finetune=finetune,
        progress=progress,
        place=place,
    )
    return next(each)


def slim_each(
    model: nn.Module,
    example_input: Any,
    budgets: Sequence[Budget],
    *,
    data: Iterable[Any] | None = None,
    criterion: str | None = None,
    loss_fn: LossFn | None = None,
    settings: SlimSettings | None = None,
    recipe: Recipe | None = None,
    finetune: Finetuning | None = None,
    progress: ProgressFactory = silent,
    place: Place = ALONE,
) -> Iterator[SlimResult]:
    """Slim a network to each of several budgets, as `slim` does to one; the dense network is scored once for all.

    Args:
        model: As for `slim`.
        example_input: As for `slim`.
        budgets: At least one; one that is out of reach is refused before anything is scored.
        data: As for `slim`.
        criterion: As for `slim`.
        loss_fn: As for `slim`.
        settings: As for `slim`.
        recipe: As for `slim`.
        finetune: As for `slim`; each of the results is trained.
        progress: As for `slim`.
        place: As for `slim`.

    Yields:
        What `slim` returns, in the order of the budgets, each as soon as it is done. Of the time of its stages, that of
        what is shared is told by each.

    Raises:
        ArchscanError: See `slim`.
    """
    jobs = _jobs(model, example_input, budgets, criterion, settings or SlimSettings(), progress, place)
    first, calibration = jobs[0], _calibration(jobs[0], data, loss_fn)
    retraining = None if finetune is None else opened(finetune, model, place)
    with seeded(first):
        with first.watch.stage("capture"):
            analysis = analyse(model, first.example_input, first.settings.protect)
        ready = [_timed(job, analysis) for job in jobs]
        for job, analysed in ready:
            _require_feasible(job, analysed)
        found = scored_by_one_of(first, analysis, calibration, where_of(1, first.settings.rounds))
        if recipe is None:
            with first.watch.stage("recognise"):
                recipe = recognise(model, first.example_input)
    for job, analysed in ready:
        own = replace(job, watch=Stopwatch(first.watch.seconds), criteria=(found.criterion,), retraining=retraining)
        if len(jobs) > 1:
            own = replace(own, progress=_telling(progress, job.budget))
        with seeded(own):
            result = _slim(own, calibration, analysed, found, recipe)
        yield result


def _jobs(
    model: nn.Module,
    example_input: Any,
    budgets: Sequence[Budget],
    criterion: str | None,
    settings: SlimSettings,
    progress: ProgressFactory,
    place: Place,
) -> list[Job]:
    """Check the arguments; one job for each budget, all with one watch for what they share."""
    if not budgets:
        raise BadInput("no budget was given; pass at least one, such as Budget('macs', 0.6)")
    names = _criteria(criterion, settings)
    find_criterion(names[0])
    if settings.set_effects == "quadratic" and names[0] not in QUADRATIC:
        raise BadInput(f"criterion {names[0]!r} has no set effects; choose {', '.join(QUADRATIC)}, or 'additive'")
    device, watch = checked_device(model), Stopwatch()
    example_input = on_device(example_input, device)
    measured = [(budget, _measuring(settings, budget, device, place)) for budget in budgets]
    return [Job(model, example_input, budget, names, how, watch, progress, place) for budget, how in measured]


@contextmanager
def seeded(job: Job) -> Iterator[None]:
    """Seed the global random generators, and give them back as they were."""
    with torch.random.fork_rng({tensor.device for _, tensor in named_tensors(job.model) if tensor.is_cuda}):
        torch.manual_seed(job.settings.seed)
        yield


def _telling(progress: ProgressFactory, budget: Budget) -> ProgressFactory:
    """Let progress bars say which budget they are for."""
    return lambda description: progress(f"{description}, {100 * budget.ratio:g}% of {NOUNS[budget.kind]}")


def _timed(job: Job, analysis: Analysis) -> tuple[Job, Analysis]:
    """Measure layers where a budget is on time."""
    if time_budget(job.budget) is None or job.settings.latency is None:
        return job, analysis
    with job.watch.stage("measure layers"):
        analysis, rule = timed(analysis, job.settings.rule, job.budget, job.settings.latency, job.progress)
    return replace(job, settings=replace(job.settings, rule=rule)), analysis


def _slim(job: Job, calibration: Calibration, analysis: Analysis, found: Saliency, recipe: Recipe | None) -> SlimResult:
    """Run the stages after the first scoring, in rounds."""
    done = run_rounds(job, calibration, analysis, found)
    first, last = done.first, done.last
    diagnosis = diagnose(job, calibration, first, last)
    plan, timing = _plan_of_all_rounds(job, last), _timing(job, last)
    warnings = ["The saliency was scored on synthetic noise; pass calibration data."] if calibration.synthetic else []
    warnings += [] if timing is None else time_warnings(timing, plan)
    warnings += branching_warnings(analysis)
    return SlimResult(
        model=last.model.eval(),
        plan=replace(plan, provenance=_provenance(job)),
        surgery=last.fitted.rebuilt.surgery,
        analysis=last.fitted.analysis,
        saliency_U=last.saliency_U,
        scored=last.scored,
        verification=last.verification,
        recovery=last.summary.recovery,
        rule=job.settings.rule,
        notes=(*done.notes, *_notes(done.summaries, last), *notes_of_training(done.trainings)),
        warnings=tuple(warnings),
        seconds=job.watch.seconds,
        recipe=recipe,
        rounds=done.summaries,
        repaired=last.repaired,
        agreement=last.agreement,
        findings=diagnosis.findings,
        confidence=diagnosis.confidence,
        timing=timing,
        trainings=done.trainings,
    )


def _timing(job: Job, last: Done) -> Timing | None:
    """Measure what came out beside the original; once more where it was planned by measuring."""
    setup = job.settings.latency
    if setup is None:
        return None
    with job.watch.stage("measure"), job.progress("Measuring time") as step:
        return measure_pair(job.model, last.model, job.example_input, setup, step)


def _notes(rounds: Sequence[Round], last: Done) -> Iterator[str]:
    """Say how many rounds there were, and how repair was checked."""
    if len(rounds) > 1:
        ratios = ", ".join(f"{each.ratio:.3g}" for each in rounds)
        yield f"Slimmed in {len(rounds)} rounds, each scored on the network that the one before left: {ratios} kept."
    if last.repaired is not None:
        yield last.repaired.note()


def _plan_of_all_rounds(job: Job, last: Done) -> Plan:
    """Let the last plan count what all rounds lost, each unit by its last saliency."""
    made, analysis = last.fitted.plan, last.fitted.analysis
    if job.settings.rounds == 1:
        return made
    even = uniform_plan(analysis.coupling.groups, last.saliency_U, analysis.costs, job.budget, job.settings.rule)
    lost = float(last.saliency_U[last.gone_U].sum())
    return replace(made, saliency_lost=lost, saliency_lost_uniform=even.saliency_lost)


def analyse(model: nn.Module, example_input: Any, patterns: Iterable[str] = ()) -> Analysis:
    """Find channel groups and costs of a network, which is left unchanged.

    Raises:
        UnsupportedOp: The forward uses an op without a coupling rule.
        BadInput: The model cannot take the input, or a protected pattern matches nothing.
    """
    coupling = couple(model, example_input)
    coupling = replace(coupling, groups=protect(coupling.groups, tuple(patterns)))
    return Analysis(coupling, priced(coupling))


# --- arguments ------------------------------------------------------------------------------------------------------


def _budget(*, macs: float | None, params: float | None, latency: float | None, memory: float | None) -> Budget:
    targets: dict[BudgetKind, float | None] = {"macs": macs, "params": params, "latency": latency, "memory": memory}
    given = [Budget(kind, ratio) for kind, ratio in targets.items() if ratio is not None]
    if not given:
        raise BadInput("no target was given; add one, such as target_flops=0.6 to keep 60% of the MACs")
    return replace(given[0], also=tuple(given[1:]))


def _measuring(settings: SlimSettings, budget: Budget, device: torch.device, place: Place) -> SlimSettings:
    """Decide how time is measured: on the model's device, and always where a target is on it."""
    if time_budget(budget) is None and settings.latency is None:
        return settings
    if place.count > 1:
        raise BadInput("several processes on one machine cannot measure time; start one, without torchrun")
    setup = settings.latency or LatencySetup()
    if setup.device is not None and torch.device(setup.device).type != device.type:
        raise BadInput(f"time is to be measured on {setup.device}, but the model is on {device.type}; move it there")
    return replace(settings, latency=replace(setup, device=device.type))


def _criteria(name: str | None, settings: SlimSettings) -> tuple[str, ...]:
    """List the criteria to try in turn; only a default has an alternative."""
    if name is not None:
        return (name,)
    if settings.set_effects == "quadratic":
        return (DEFAULT_CRITERION,)
    return tuple(dict.fromkeys((default_criterion(settings.recover), DEFAULT_CRITERION)))


def checked_device(model: nn.Module) -> torch.device:
    """See that the model is one to work on; say where it lives."""
    if not isinstance(model, nn.Module):
        raise BadInput(f"the model is a {type(model).__name__}; pass a torch.nn.Module")
    require_plain(model)
    tensors = dict(named_tensors(model))
    places = sorted({str(tensor.device) for tensor in tensors.values()})
    if len(places) > 1 or places == ["meta"]:
        raise BadInput(f"the model lies on {' and '.join(places)}; move all of it to one CPU or GPU")
    check_finite(tensors, "the model")
    return torch.device(places[0] if places else "cpu")


def _calibration(job: Job, data: Iterable[Any] | None, loss_fn: LossFn | None) -> Calibration:
    """Decide what the network is scored on."""
    repairs = job.settings.recover != "none"
    if job.settings.recover == "bn":
        require_batchnorm(job.model)
    if data is not None:
        if isinstance(data, (Tensor, dict)) or (isinstance(data, tuple) and any(isinstance(x, Tensor) for x in data)):
            raise BadInput(f"data is one {type(data).__name__}, not batches; pass a data loader, or [(images, labels)]")
        if not isinstance(data, Iterable):
            raise BadInput(f"data is a {type(data).__name__}, not batches; pass a data loader, or [(images, labels)]")
        batches = list(data) if isinstance(data, Iterator) else data  # an iterator gives its batches once only
        return Calibration(batches, loss_fn or classification_loss, synthetic=False)
    if repairs:
        raise BadInput(f"recover={job.settings.recover!r} needs real images, noise would mislead it; pass data=")
    if not any(reads_images(name) for name in job.criteria):
        return Calibration((), classification_loss, synthetic=False)
    if loss_fn is not None:
        raise BadInput("a loss_fn was given without batches for it; pass data=")
    noise = _noise(job.example_input, job.settings.seed)
    return Calibration(noise, sampled_label_loss(job.settings.seed), synthetic=True)


def _noise(example_input: Any, seed: int) -> list[Any]:
    """Make calibration batches of Gaussian noise like the example input."""
    if not isinstance(example_input, Tensor) or not example_input.is_floating_point():
        raise BadInput("noise can stand in for images only; pass calibration batches as data=, and their loss_fn=")
    generator = torch.Generator().manual_seed(seed)
    shape = (_NOISE_BATCH_SIZE, *example_input.shape[1:])
    count = SYNTHETIC_SAMPLES // _NOISE_BATCH_SIZE
    return [(torch.randn(shape, generator=generator).to(example_input), None) for _ in range(count)]


def versions() -> dict[str, Any]:
    """Name the versions that a plan was made with."""
    return {"archscan": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _provenance(job: Job) -> dict[str, Any]:
    return {
        **versions(),
        "criterion": job.criteria[0],
        "seed": job.settings.seed,
        "recover": job.settings.recover,
        "rounds": job.settings.rounds,
        "set_effects": job.settings.set_effects,
        **({} if job.retraining is None else {"finetune_epochs": job.retraining.settings.epochs}),
    }


def _require_feasible(job: Job, analysis: Analysis) -> None:
    """Refuse a budget out of reach before any work is spent on scores, which do not change what widths cost."""
    groups, coupling = analysis.coupling.groups, analysis.coupling
    uniform_plan(groups, np.zeros(coupling.unit_count), analysis.costs, job.budget, job.settings.rule)
