"""Slim a network from Python: model, example input, budget, data → `SlimResult`.

The stages of the design in their order, each timed. The decision that is not obvious: a budget out of reach is refused
before anything is scored, by pricing the narrowest widths, since scores take nearly all of the time.
"""

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from archscan import __version__
from archscan.capture import require_plain
from archscan.costs import cost_model
from archscan.criteria import criterion as find_criterion
from archscan.errors import BadInput
from archscan.groups import couple
from archscan.losses import LossFn, classification_loss, sampled_label_loss
from archscan.options import DEFAULT_CRITERION, SYNTHETIC_SAMPLES, ProgressFactory, default_criterion
from archscan.planner import Budget, Plan, protect, uniform_plan
from archscan.processes import Place
from archscan.recipes import Recipe
from archscan.recognise import recognise
from archscan.results import Analysis, SlimResult, SlimSettings
from archscan.rounds import Round, budgets
from archscan.sharding import ALONE
from archscan.stages import QUADRATIC, Calibration, Done, Job, Stopwatch, run_round
from archscan.surgery import named_tensors
from archscan.weights import check_finite

__all__ = ["SlimResult", "SlimSettings", "Stopwatch", "analyse", "has_batchnorm", "reads_images", "silent", "slim"]

_WEIGHT_STATISTICS = frozenset({"weight_norm", "bn_scale", "read_norm", "group"})
_NOISE_BATCH_SIZE = 8


def silent(_description: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """Show no progress."""
    return nullcontext(lambda _done, _total: None)


def reads_images(criterion: str) -> bool:
    """Say whether a criterion runs the network at all; the others read weights only."""
    return bool(find_criterion(criterion).needs - _WEIGHT_STATISTICS)


def has_batchnorm(model: nn.Module) -> bool:
    """Say whether there are BatchNorm statistics that could be estimated anew."""
    return any(isinstance(module, _BatchNorm) and module.running_mean is not None for module in model.modules())


def slim(
    model: nn.Module,
    example_input: Any,
    *,
    target_flops: float | None = None,
    target_params: float | None = None,
    data: Iterable[Any] | None = None,
    criterion: str | None = None,
    loss_fn: LossFn | None = None,
    settings: SlimSettings | None = None,
    recipe: Recipe | None = None,
    progress: ProgressFactory = silent,
    place: Place = ALONE,
) -> SlimResult:
    """Slim a network to a budget; the model is not modified, and neither are the global random generators.

    Everything random, a shuffling data loader included, follows from ``settings.seed``.

    Args:
        model: Any network; what it is given is moved to its device.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        target_flops: Kept fraction of the MACs (one MAC is one FLOP), above 0 and at most 1.
        target_params: Kept fraction of the parameters, likewise; give one of the two.
        data: Calibration batches, such as a data loader of (images, labels); None for noise.
        criterion: A name from `archscan.criteria.CRITERIA`; None for the one that suits the repair (see `options`).
        loss_fn: Mean loss of a batch, ``loss_fn(model, batch) -> scalar``; None for classification.
        settings: Width rules, protected layers, repair, seed.
        recipe: How the model's architecture was built; None to find out, which is done for the networks of timm,
            torchvision and archscan.
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
    settings = settings or SlimSettings()
    budget = _budget(target_flops, target_params)
    names = _criteria(criterion, settings)
    find_criterion(names[0])
    if settings.set_effects == "quadratic" and names[0] not in QUADRATIC:
        raise BadInput(f"criterion {names[0]!r} has no set effects; choose {', '.join(QUADRATIC)}, or 'additive'")
    device = _checked_device(model)
    example_input = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, example_input)
    job = Job(model, example_input, budget, names, settings, Stopwatch(), progress, place)
    calibration = _calibration(job, data, loss_fn)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        return _slim(job, calibration, recipe)


def _slim(job: Job, calibration: Calibration, recipe: Recipe | None) -> SlimResult:
    """Run the stages, in rounds."""
    with job.watch.stage("capture"):
        analysis = analyse(job.model, job.example_input, job.settings.protect)
    _require_feasible(job, analysis)
    stages = budgets(job.budget, job.settings.rounds)
    last = run_round(job, calibration, analysis, stages[0], _where(1, len(stages)))
    job = replace(job, criteria=(last.criterion,))
    rounds, notes = [last.summary], [*last.notes]
    for number, budget in enumerate(stages[1:], start=2):
        last = run_round(job, calibration, last, budget, _where(number, len(stages)))
        rounds.append(last.summary)
        notes.extend(last.notes)
    if recipe is None:
        with job.watch.stage("recognise"):
            recipe = recognise(job.model, job.example_input)
    warnings = ["The saliency was scored on synthetic noise; pass calibration data."] if calibration.synthetic else []
    return SlimResult(
        model=last.model.eval(),
        plan=replace(_plan_of_all_rounds(job, last), provenance=_provenance(job)),
        surgery=last.fitted.rebuilt.surgery,
        analysis=last.fitted.analysis,
        saliency_U=last.saliency_U,
        scored=last.scored,
        verification=last.verification,
        recovery=last.summary.recovery,
        rule=job.settings.rule,
        notes=(*dict.fromkeys(notes), *_notes(rounds, last)),
        warnings=tuple(warnings),
        seconds=job.watch.seconds,
        recipe=recipe,
        rounds=tuple(rounds),
        repaired=last.repaired,
    )


def _where(number: int, count: int) -> str:
    return f" (round {number} of {count})" if count > 1 else ""


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
    assert coupling.graph is not None
    assert coupling.sizes is not None
    full = np.array([group.steps for group in coupling.groups], dtype=np.int64)
    return Analysis(coupling, cost_model(coupling.graph, coupling.sizes, coupling.parameters, full))


# --- arguments ------------------------------------------------------------------------------------------------------


def _budget(target_flops: float | None, target_params: float | None) -> Budget:
    if target_flops is not None and target_params is not None:
        raise BadInput("target_flops and target_params were both given; give one target")
    if target_flops is not None:
        return Budget("macs", target_flops)
    if target_params is not None:
        return Budget("params", target_params)
    raise BadInput("no target was given; add one, such as target_flops=0.6 to keep 60% of the MACs")


def _criteria(name: str | None, settings: SlimSettings) -> tuple[str, ...]:
    """List the criteria to try in turn; only a default has an alternative."""
    if name is not None:
        return (name,)
    if settings.set_effects == "quadratic":
        return (DEFAULT_CRITERION,)
    return tuple(dict.fromkeys((default_criterion(settings.recover), DEFAULT_CRITERION)))


def _checked_device(model: nn.Module) -> torch.device:
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
    if job.settings.recover == "bn" and not has_batchnorm(job.model):
        raise BadInput("the model has no BatchNorm statistics to recalibrate; leave out recover='bn'")
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


def _provenance(job: Job) -> dict[str, Any]:
    return {
        "archscan": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "criterion": job.criteria[0],
        "seed": job.settings.seed,
        "recover": job.settings.recover,
        "rounds": job.settings.rounds,
        "set_effects": job.settings.set_effects,
    }


def _require_feasible(job: Job, analysis: Analysis) -> None:
    """Refuse a budget out of reach before any work is spent on scores, which do not change what widths cost."""
    groups, coupling = analysis.coupling.groups, analysis.coupling
    uniform_plan(groups, np.zeros(coupling.unit_count), analysis.costs, job.budget, job.settings.rule)
