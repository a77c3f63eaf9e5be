"""Slim a network from Python: model, example input, budget, data → `SlimResult`.

The stages of the design in their order, each timed. The decision that is not obvious: a plan that some forward cannot
follow is not an error. The groups that the forward reads are frozen with that reason, and the plan is made again.
"""

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from archscan import __version__, export
from archscan.costs import CostModel, cost_model
from archscan.criteria import criterion as find_criterion
from archscan.criteria import score
from archscan.errors import BadInput, InfeasibleBudget, RebuildMismatch
from archscan.gates import collect
from archscan.groups import Coupling, couple, freeze
from archscan.losses import LossFn, classification_loss, sampled_label_loss
from archscan.options import DEFAULT_CRITERION, SYNTHETIC_SAMPLES, ProgressFactory
from archscan.planner import Budget, Plan, plan, protect, uniform_plan
from archscan.rebuild import CannotFollow, Rebuilt, Surgery, rebuild
from archscan.recipes import Recipe
from archscan.recognise import recognise
from archscan.recount import recount
from archscan.recover import recalibrate_batchnorm
from archscan.verify import Verification, check_price, prove
from archscan.weights import check_finite
from archscan.widths import WidthRule

_NO_PASS = frozenset({"weight_norm", "bn_scale"})
"""Gate statistics that are read off the weights: a criterion that needs no others sees no data."""

_NOISE_BATCH_SIZE = 8
_REPLANS = 64


@dataclass(frozen=True)
class SlimSettings:
    """How to slim, beyond the budget, the data and the criterion.

    Attributes:
        rule: Which widths are allowed.
        protect: Shell patterns of layers that keep their width.
        recover: ``bn`` re-estimates BatchNorm statistics on the calibration batches after slimming.
        seed: Of everything random.
    """

    rule: WidthRule = field(default_factory=WidthRule)
    protect: tuple[str, ...] = ()
    recover: Literal["none", "bn"] = "none"
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Analysis:
    """What is known of a network before anything is planned.

    Attributes:
        coupling: Channel groups, places of gates, sizes.
        costs: MACs, parameters and activations as functions of the groups' widths.
    """

    coupling: Coupling
    costs: CostModel


@dataclass(frozen=True, eq=False)
class SlimResult:
    """A slim network, how it came about, and the proof.

    Attributes:
        model: The slim network: an ordinary module of the original's class, in eval mode.
        plan: What was kept, and the predicted costs.
        surgery: What was cut, enough to repeat it on a fresh original.
        analysis: Coupling and costs of the original.
        saliency_U: Saliency of each unit.
        verification: The comparison with the masked original, before any repair.
        recovery: What was repaired, as a clause; None where nothing was.
        notes: What a user has to know, a sentence each.
        warnings: What a user must not overlook, a sentence each.
        seconds: Time of each stage, measured.
        recipe: How to build the original's architecture; None where only the caller can.
        history: Earlier slimmings of the same network.
    """

    model: nn.Module
    plan: Plan
    surgery: Surgery
    analysis: Analysis
    saliency_U: np.ndarray
    verification: Verification
    recovery: str | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]
    recipe: Recipe | None = None
    history: tuple[export.Step, ...] = ()

    @property
    def summary(self) -> dict[str, Any]:
        """The numbers of this run, as ``summary.json`` has them."""
        from archscan.summary import report_of

        return report_of(self).to_json()

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write ``plan.json``, ``model.safetensors``, ``summary.json`` and ``report.html``; return the folder.

        Raises:
            BadInput: The folder exists and is not to be overwritten, or cannot be written.
        """
        from archscan.summary import report_of, save_result

        return save_result(self, report_of(self), Path(folder), overwrite=overwrite)


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


def analyse(model: nn.Module, example_input: Any, patterns: Iterable[str] = ()) -> Analysis:
    """Find channel groups and costs of a network, which is left unchanged.

    Raises:
        UnsupportedOp: The forward uses an op without a coupling rule.
        BadInput: The model cannot take the input, or a protected pattern matches nothing.
    """
    coupling = couple(model, example_input)
    coupling = replace(coupling, groups=protect(coupling.groups, tuple(patterns)))
    assert coupling.graph is not None  # noqa: S101
    assert coupling.sizes is not None  # noqa: S101
    full = np.array([group.steps for group in coupling.groups], dtype=np.int64)
    return Analysis(coupling, cost_model(coupling.graph, coupling.sizes, coupling.parameters, full))


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
    progress: Progress = silent,
) -> SlimResult:
    """Slim a network to a budget; the model is not modified.

    Args:
        model: Any network; on CUDA, batches are moved there.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        target_flops: Kept fraction of the MACs (one MAC is one FLOP), above 0 and at most 1.
        target_params: Kept fraction of the parameters, likewise; give one of the two.
        data: Calibration batches, such as a data loader of (images, labels); None for noise.
        criterion: A name from `archscan.criteria.CRITERIA`.
        loss_fn: Mean loss of a batch, ``loss_fn(model, batch) -> scalar``; None for classification.
        settings: Width rules, protected layers, repair, seed.
        progress: Opens progress bars.

    Raises:
        BadInput: An argument makes no sense, is out of range, or does not fit the model.
        UnsupportedOp: The forward uses an op without a coupling rule.
        InfeasibleBudget: The target is below what the minimum widths allow.
        RebuildMismatch: The slim network is not what the plan says; this is a defect to report.
    """
    settings = settings or SlimSettings()
    budget = budget_of(target_flops, target_params)
    watch = Stopwatch()
    with watch.stage("capture"):
        analysis = analyse(model, example_input, settings.protect)
    warnings: list[str] = []
    if data is None:
        warnings.append("the saliency was scored on synthetic noise; pass calibration data")
        data = synthetic_batches(example_input, settings.seed)
        loss_fn = loss_fn or sampled_label_loss(settings.seed)
    batches = list(data) if iter(data) is data else data
    saliency = _saliency(model, analysis, batches, criterion, loss_fn, settings.seed, watch, progress)
    made, rebuilt, analysis, notes = _plan_and_rebuild(model, example_input, analysis, saliency, budget, settings, watch)
    with watch.stage("verify"), progress("Proving the slim network") as step:
        step(0, 0)
        verification = _prove(model, example_input, analysis, made, rebuilt, settings.seed)
    slim_model, recovery = rebuilt.model, None
    if settings.recover == "bn":
        with watch.stage("recover"), progress("Recalibrating BatchNorm") as step:
            repaired = recalibrate_batchnorm(rebuilt.model, batches, step)
        slim_model = repaired.model
        if repaired.layers:
            recovery = f"BatchNorm statistics of {repaired.layers} layers recalibrated on {repaired.samples} images"
    provenance = {
        "archscan": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "criterion": criterion,
        "seed": settings.seed,
        "recover": settings.recover,
    }
    return SlimResult(
        slim_model.eval(),
        replace(made, provenance=provenance),
        rebuilt.surgery,
        analysis,
        saliency,
        verification,
        recovery,
        tuple(notes),
        tuple(warnings),
        watch.seconds,
    )


def budget_of(target_flops: float | None, target_params: float | None) -> Budget:
    """Read the two targets, of which exactly one must be given.

    Raises:
        BadInput: None or both are given, or the ratio is not in (0, 1].
    """
    if (target_flops is None) == (target_params is None):
        given = "two targets were" if target_flops is not None else "no target was"
        raise BadInput(f"{given} given; give one, such as target_flops=0.6")
    if target_flops is not None:
        return Budget("macs", target_flops)
    assert target_params is not None  # noqa: S101
    return Budget("params", target_params)


def synthetic_batches(example_input: Any, seed: int) -> list[Any]:
    """Make calibration batches of Gaussian noise like the example input."""
    generator = torch.Generator().manual_seed(seed)

    def noise(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            return leaf
        if not leaf.is_floating_point():
            raise BadInput("an input of whole numbers cannot be made up; pass calibration data")
        return torch.randn((SYNTHETIC_BATCH_SIZE, *leaf.shape[1:]), generator=generator).to(leaf.dtype)

    if not isinstance(example_input, Tensor):
        raise BadInput("a model with several inputs needs calibration data and a loss_fn; pass both")
    return [(tree_map(noise, example_input), None) for _ in range(SYNTHETIC_BATCHES)]


def _saliency(
    model: nn.Module,
    analysis: Analysis,
    batches: Iterable[Any],
    name: str,
    loss_fn: LossFn | None,
    seed: int,
    watch: Stopwatch,
    progress: Progress,
) -> np.ndarray:
    needs = criterion(name).needs
    with watch.stage("saliency"), progress(f"Scoring channels by {name}") as step:
        statistics = collect(
            model, analysis.coupling, batches, loss_fn or classification_loss, needs, seed=seed, progress=step
        )
        return score(name, statistics)


def _plan_and_rebuild(
    model: nn.Module,
    example_input: Any,
    analysis: Analysis,
    saliency_U: np.ndarray,
    budget: Budget,
    settings: SlimSettings,
    watch: Stopwatch,
) -> tuple[Plan, Rebuilt, Analysis, list[str]]:
    """Plan and rebuild; where a forward cannot follow, freeze what it reads and plan again."""
    notes: list[str] = []
    for _ in range(_REPLANS):
        groups = analysis.coupling.groups
        with watch.stage("plan"):
            made = plan(groups, saliency_U, analysis.costs, budget, settings.rule, seed=settings.seed)
        try:
            with watch.stage("rebuild"):
                rebuilt = rebuild(model, example_input, analysis.coupling, made.kept)
        except CannotFollow as error:
            groups = _frozen_around(analysis.coupling, error)
            analysis = replace(analysis, coupling=replace(analysis.coupling, groups=groups))
            notes.append(f"{error.module or 'the model itself'} keeps its width, since {error.detail}")
            continue
        if made.after == made.before and budget.ratio < 1:
            raise RebuildMismatch("nothing was removed although the budget asked for it; please report this network")
        return made, rebuilt, analysis, notes
    raise RebuildMismatch("too many forwards hard-code their widths; protect those modules by name")


def _frozen_around(coupling: Coupling, error: CannotFollow) -> tuple[ChannelGroup, ...]:
    """Freeze the groups that touch the module whose forward cannot follow; raise the error again where none is left."""
    inside = f"{error.module}." if error.module else ""
    groups = []
    for group in coupling.groups:
        touches = any(f"{member.module}.".startswith(inside) for member in group.members)
        units = {unit for fibre in group.units for unit in fibre}
        reads = any(
            f"{consumer.module}.".startswith(inside) and units & set(consumer.units.tolist())
            for consumer in coupling.consumers
        )
        freeze = group.frozen is None and (touches or reads)
        groups.append(replace(group, frozen=f"the forward of {error.module or 'the model'} hard-codes a width") if freeze else group)
    if tuple(groups) == coupling.groups:
        raise error
    return tuple(groups)


def _prove(
    model: nn.Module, example_input: Any, analysis: Analysis, made: Plan, rebuilt: Rebuilt, seed: int
) -> Verification:
    verification = prove(
        model, rebuilt.model, rebuilt.surgery, analysis.coupling, made.kept, example_input, seed=seed
    )
    if not verification.passed:
        raise RebuildMismatch(f"the slim network is not the masked original: {verification.reason}; nothing is written")
    counted = fvcore_macs(rebuilt.model, example_input)
    check_price(
        rebuilt.model,
        counted_macs=made.after.macs if counted is None else counted,
        predicted_macs=made.after.macs,
        predicted_params=made.after.params,
    )
    return verification


def fvcore_macs(model: nn.Module, example_input: Any) -> int | None:
    """Count a model's MACs per sample with fvcore, as a second opinion; None where fvcore cannot trace it."""
    from fvcore.nn import FlopCountAnalysis

    first = tree_map(lambda leaf: leaf[:1] if isinstance(leaf, Tensor) and leaf.ndim else leaf, example_input)
    if isinstance(first, Mapping):
        return None
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    inputs = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, first)
    analysis = FlopCountAnalysis(model.eval(), inputs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    try:
        return int(analysis.total())
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError):
        return None


def criteria_names() -> tuple[str, ...]:
    """Names of all criteria."""
    return tuple(CRITERIA)
