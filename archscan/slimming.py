"""Slim a network from Python: model, example input, budget, data → `SlimResult`.

The stages of the design in their order, each timed. The decision that is not obvious: a budget out of reach is refused
before anything is scored, by pricing the narrowest widths, since scores take nearly all of the time.
"""

import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from archscan import __version__
from archscan.costs import cost_model
from archscan.criteria import criterion as find_criterion
from archscan.criteria import score
from archscan.errors import BadInput, RebuildMismatch
from archscan.gates import collect
from archscan.groups import couple
from archscan.losses import LossFn, classification_loss, sampled_label_loss
from archscan.options import DEFAULT_CRITERION, SYNTHETIC_SAMPLES, ProgressFactory
from archscan.planner import Budget, protect, uniform_plan
from archscan.rebuild import Rebuilt
from archscan.recipes import Recipe
from archscan.recognise import recognise
from archscan.reconstruct import repair
from archscan.recount import recount
from archscan.recover import recalibrate_batchnorm
from archscan.replan import Fitted, Wish, plan_and_rebuild
from archscan.results import Analysis, Scored, SlimResult, SlimSettings
from archscan.surgery import named_tensors
from archscan.verify import Verification, check_price, prove
from archscan.weights import check_finite

__all__ = ["SlimResult", "SlimSettings", "Stopwatch", "analyse", "has_batchnorm", "reads_images", "silent", "slim"]

_WEIGHT_STATISTICS = frozenset({"weight_norm", "bn_scale"})
_NOISE_BATCH_SIZE = 8


@dataclass(frozen=True)
class _Calibration:
    """Batches to score and to repair on, and the loss of each; no batches where nothing reads any."""

    batches: Iterable[Any]
    loss_fn: LossFn
    synthetic: bool


@dataclass(frozen=True, eq=False)
class _Job:
    """What every stage of one slimming needs."""

    model: nn.Module
    example_input: Any
    budget: Budget
    criterion: str
    settings: SlimSettings
    watch: "Stopwatch"
    progress: ProgressFactory


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
    criterion: str = DEFAULT_CRITERION,
    loss_fn: LossFn | None = None,
    settings: SlimSettings | None = None,
    recipe: Recipe | None = None,
    progress: ProgressFactory = silent,
) -> SlimResult:
    """Slim a network to a budget; the model is not modified, and neither are the global random generators.

    Everything random, a shuffling data loader included, follows from ``settings.seed``.

    Args:
        model: Any network; what it is given is moved to its device.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        target_flops: Kept fraction of the MACs (one MAC is one FLOP), above 0 and at most 1.
        target_params: Kept fraction of the parameters, likewise; give one of the two.
        data: Calibration batches, such as a data loader of (images, labels); None for noise.
        criterion: A name from `archscan.criteria.CRITERIA`.
        loss_fn: Mean loss of a batch, ``loss_fn(model, batch) -> scalar``; None for classification.
        settings: Width rules, protected layers, repair, seed.
        recipe: How the model's architecture was built; None to find out, which is done for the networks of timm,
            torchvision and archscan.
        progress: Opens progress bars.

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
    find_criterion(criterion)
    device = _checked_device(model)
    example_input = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, example_input)
    job = _Job(model, example_input, budget, criterion, settings, Stopwatch(), progress)
    calibration = _calibration(job, data, loss_fn)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        return _slim(job, calibration, recipe)


def _slim(job: _Job, calibration: _Calibration, recipe: Recipe | None) -> SlimResult:
    """Run the stages."""
    with job.watch.stage("capture"):
        analysis = analyse(job.model, job.example_input, job.settings.protect)
    _require_feasible(job, analysis)
    saliency_U, scored = _saliency(job, analysis, calibration)
    wish = Wish(job.budget, job.settings.rule, job.settings.seed)
    with job.watch.stage("plan and rebuild"), job.progress("Planning") as step:
        step(0, 0)
        fitted = plan_and_rebuild(job.model, job.example_input, analysis, saliency_U, wish)
    with job.watch.stage("verify"), job.progress("Proving the slim network") as step:
        step(0, 0)
        verification, counted = _prove(job, fitted)
    slim_model, recovery = _recovered(job, fitted.rebuilt, calibration)
    if recipe is None:
        with job.watch.stage("recognise"):
            recipe = recognise(job.model, job.example_input)
    warnings = ["The saliency was scored on synthetic noise; pass calibration data."] if calibration.synthetic else []
    return SlimResult(
        model=slim_model.eval(),
        plan=replace(fitted.plan, provenance=_provenance(job)),
        surgery=fitted.rebuilt.surgery,
        analysis=fitted.analysis,
        saliency_U=saliency_U,
        scored=scored,
        verification=verification,
        recovery=recovery,
        rule=job.settings.rule,
        notes=(*fitted.notes, *counted),
        warnings=tuple(warnings),
        seconds=job.watch.seconds,
        recipe=recipe,
    )


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


def _checked_device(model: nn.Module) -> torch.device:
    """See that the model is one to work on; say where it lives."""
    if not isinstance(model, nn.Module):
        raise BadInput(f"the model is a {type(model).__name__}; pass a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise BadInput(f"the model is compiled ({type(model).__name__}); pass the module that it was made from")
    tensors = dict(named_tensors(model))
    places = sorted({str(tensor.device) for tensor in tensors.values()})
    if len(places) > 1 or places == ["meta"]:
        raise BadInput(f"the model lies on {' and '.join(places)}; move all of it to one CPU or GPU")
    check_finite(tensors, "the model")
    return torch.device(places[0] if places else "cpu")


def _calibration(job: _Job, data: Iterable[Any] | None, loss_fn: LossFn | None) -> _Calibration:
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
        return _Calibration(batches, loss_fn or classification_loss, synthetic=False)
    if repairs:
        raise BadInput(f"recover={job.settings.recover!r} needs real images, noise would mislead it; pass data=")
    if not reads_images(job.criterion):
        return _Calibration((), classification_loss, synthetic=False)
    if loss_fn is not None:
        raise BadInput("a loss_fn was given without batches for it; pass data=")
    noise = _noise(job.example_input, job.settings.seed)
    return _Calibration(noise, sampled_label_loss(job.settings.seed), synthetic=True)


def _noise(example_input: Any, seed: int) -> list[Any]:
    """Make calibration batches of Gaussian noise like the example input."""
    if not isinstance(example_input, Tensor) or not example_input.is_floating_point():
        raise BadInput("noise can stand in for images only; pass calibration batches as data=, and their loss_fn=")
    generator = torch.Generator().manual_seed(seed)
    shape = (_NOISE_BATCH_SIZE, *example_input.shape[1:])
    count = SYNTHETIC_SAMPLES // _NOISE_BATCH_SIZE
    return [(torch.randn(shape, generator=generator).to(example_input), None) for _ in range(count)]


def _provenance(job: _Job) -> dict[str, Any]:
    return {
        "archscan": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "criterion": job.criterion,
        "seed": job.settings.seed,
        "recover": job.settings.recover,
    }


# --- stages ---------------------------------------------------------------------------------------------------------


def _require_feasible(job: _Job, analysis: Analysis) -> None:
    """Refuse a budget out of reach before any work is spent on scores, which do not change what widths cost."""
    groups, coupling = analysis.coupling.groups, analysis.coupling
    uniform_plan(groups, np.zeros(coupling.unit_count), analysis.costs, job.budget, job.settings.rule)


def _saliency(job: _Job, analysis: Analysis, calibration: _Calibration) -> tuple[np.ndarray, Scored | None]:
    needs = find_criterion(job.criterion).needs
    seed = job.settings.seed
    with job.watch.stage("saliency"), job.progress(f"Scoring channels by {job.criterion}") as step:
        statistics = collect(
            job.model,
            analysis.coupling,
            calibration.batches,
            calibration.loss_fn,
            needs,
            seed=seed,
            progress=step,
        )
        saliency_U = score(job.criterion, statistics)
    if not statistics.samples:
        return saliency_U, None
    return saliency_U, Scored(statistics.samples, calibration.synthetic)


def _prove(job: _Job, fitted: Fitted) -> tuple[Verification, list[str]]:
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
    if counted.by == "fvcore":
        return verification, []
    return verification, ["fvcore cannot trace this network; archscan counted the MACs of the slim one a second time."]


def _telling_input(job: _Job) -> Any:
    """Put noise where the example input is one value all over, which would hide most errors."""
    generator = torch.Generator().manual_seed(job.settings.seed)

    def tell(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.ndim < 3 or leaf.unique().numel() > 1:
            return leaf
        return torch.randn(leaf.shape, generator=generator).to(leaf)

    return tree_map(tell, job.example_input)


def _recovered(job: _Job, rebuilt: Rebuilt, calibration: _Calibration) -> tuple[nn.Module, str | None]:
    level = job.settings.recover
    if level == "none":
        return rebuilt.model, None
    if level != "bn":
        with job.watch.stage("recover"), job.progress("Repairing the slim network") as step:
            found = repair(job.model, rebuilt.model, rebuilt.surgery, calibration.batches, level, progress=step)
        return found.model, found.clause()
    with job.watch.stage("recover"), job.progress("Recalibrating BatchNorm") as step:
        repaired = recalibrate_batchnorm(rebuilt.model, calibration.batches, step)
    layers = f"{repaired.layers} layer{'s' if repaired.layers > 1 else ''}"
    return repaired.model, f"BatchNorm statistics of {layers} recalibrated on {repaired.samples} images"
