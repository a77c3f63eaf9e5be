"""Open one network of the sweep, slim it, and check it in every way that is known: name → record of plain JSON values.

A record says what was checked and what was found; ``problems`` lists every check that failed, with its cause. Nothing
here decides which networks there are or how they are run (`coverage`), or how the records read (`coverage_report`).
"""

import copy
import re
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coverage_statistics import compare_with_same_statistics
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import archscan
from archscan import export
from archscan.capture import capture
from archscan.errors import ArchscanError, BadInput, InfeasibleBudget
from archscan.groups import Coupling, couple
from archscan.rebuild import apply
from archscan.recipes import Recipe, seeded
from archscan.results import SlimResult
from archscan.verify import TOLERANCE, output_tensors, randomize

TARGET = 0.6
SIDES = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384)
CLIPS = ((3, 4, 32, 32), (3, 8, 64, 64), (3, 16, 64, 64), (3, 16, 112, 112), (3, 16, 224, 224))
PRODUCTS = {"conv", "linear", "matmul", "bmm", "addmm", "einsum"}
"""What fvcore calls the operators that `FlopCounterMode` counts too, at two FLOPs for each multiply-accumulate."""

LEAST_EFFECT = 1e-5
"""A proof counts where the channels that were removed would have changed the outputs by this fraction or more."""

Record = dict[str, Any]
Report = Callable[[str], None]
"""Told the name of each stage as it begins."""


class DetectorCore(nn.Module):
    """The part of a torchvision detector that is a plain network: backbone, pyramid and dense heads."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

    def forward(self, images_NCHW: Tensor) -> Any:
        """Give everything that the detector's post-processing reads."""
        features = self.backbone(images_NCHW)
        return self.head(list(features.values()) if isinstance(features, Mapping) else [features])


def build(network: str, seed: int = 0) -> nn.Module:
    """Build a network, such as ``timm:resnet18`` or ``torchvision:fcos_resnet50_fpn``, with random weights."""
    source, _, name = network.partition(":")
    with seeded(seed):
        if source == "timm":
            import timm

            return timm.create_model(name, pretrained=False).eval()
        import torchvision

        factory = torchvision.models.get_model_builder(name)
        where = factory.__module__.removeprefix("torchvision.models.").partition(".")[0]
        backbone = {"weights_backbone": None} if where in ("segmentation", "detection") else {}
        model = factory(weights=None, **backbone).eval()
        return DetectorCore(model).eval() if where == "detection" else model


def _shapes(network: str) -> Iterator[tuple[int, ...]]:
    """Yield input shapes without the batch, the smallest first; only its own where a network takes no other."""
    source, _, name = network.partition(":")
    channels, own, fixed = 3, 224, False
    if source == "timm":
        import timm

        config = timm.get_pretrained_cfg(name)
        if config is not None:
            channels, own, fixed = config.input_size[0], config.input_size[-1], bool(config.fixed_input_size)
    else:
        import torchvision

        if torchvision.models.get_model_builder(name).__module__.startswith("torchvision.models.video"):
            yield from CLIPS
            return
    sides = [own] if fixed else [*(side for side in SIDES if side < own), own]
    yield from ((channels, side, side) for side in sides)


def smallest_input(network: str, model: nn.Module) -> Tensor:
    """Make noise of the smallest size that the network takes, in eval and in train mode.

    Raises:
        BadInput: It takes none.
    """
    last: BadInput | None = None
    for shape in _shapes(network):
        example = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        try:
            capture(model, example)
            capture(model, example, training=True)
        except BadInput as error:
            last = error
            continue
        return example
    raise last or BadInput(f"{network} takes no input")


def time_coupling(model: nn.Module, example: Tensor) -> tuple[Coupling, float]:
    """Capture and group twice; return the coupling and the shorter time in seconds."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        coupling = couple(model, example)
        times.append(time.perf_counter() - start)
    return coupling, min(times)


def frozen_channels(model: nn.Module, coupling: Coupling) -> Record:
    """Count the output channels of convolutions that keep their width, by reason, without the network's outputs."""
    reasons: dict[int, str] = {}
    for group in coupling.groups:
        if group.frozen is not None:
            reasons |= dict.fromkeys((unit for fibre in group.units for unit in fibre), group.frozen)
    total, frozen = 0, Counter[str]()
    for path, module in model.named_modules():
        if not isinstance(module, nn.modules.conv._ConvNd) or module.out_channels == 1:
            continue
        axis = 1 if module.transposed else 0
        owners = coupling.tensors.get(f"{path}.weight" if path else "weight", ())
        units = next((own.units for own in owners if own.axis == axis), np.full(module.out_channels, -1))
        found = [reasons.get(unit, "") if unit >= 0 else "in no unit" for unit in units.reshape(-1).tolist()]
        counted = [reason for reason in found if reason != "network output"]
        total += len(counted)
        frozen.update(reason for reason in counted if reason)
    return {"channels": total, "frozen": sum(frozen.values()), "reasons": dict(frozen.most_common())}


def slim_by(model: nn.Module, example: Tensor, criterion: str) -> tuple[SlimResult, float]:
    """Slim to `TARGET`, or half-way to what the frozen parts allow where that is more; return the target too."""
    try:
        return archscan.slim(model, example, target_flops=TARGET, criterion=criterion), TARGET
    except InfeasibleBudget as error:
        lowest = re.search(r"reachable: ([\d.]+)", str(error))
        if lowest is None or float(lowest[1]) >= 0.99:
            raise
        target = round((float(lowest[1]) + 1) / 2, 3)
        return archscan.slim(model, example, target_flops=target, criterion=criterion), target


def describe_plan(result: SlimResult, target: float) -> Record:
    """Say what a plan asked for, what it got, and how its proof went."""
    proof = result.verification
    largest = proof.tolerance and proof.max_abs_error is not None and proof.max_abs_error / proof.tolerance
    return {
        "target": target,
        "ratio": result.plan.after.macs / result.plan.before.macs,
        "applicable": proof.applicable,
        "reason": proof.reason,
        "error_by_tolerance": largest,
        "dtype": proof.dtype,
        "kept_width": list(result.notes),
        "seconds": {stage: round(seconds, 3) for stage, seconds in result.seconds.items()},
    }


def prove_with_same_statistics(model: nn.Module, result: SlimResult, example: Tensor) -> tuple[Record, str]:
    """Prove a network in which statistics mix channels (`coverage_statistics`); return what was seen and what failed."""
    coupling = result.analysis.coupling
    seen = compare_with_same_statistics(model, result.surgery, coupling, result.plan.kept, example)
    cause = ""
    if not seen.error <= TOLERANCE[torch.float64]:
        cause = f"the outputs differ by {seen.error:.3g}"
    elif not seen.effect >= LEAST_EFFECT:
        cause = f"nothing is proven: the removed channels change the outputs by {seen.effect:.3g} only"
    return vars(seen).copy(), cause


def check_price(result: SlimResult, example: Tensor) -> tuple[Record, str]:
    """Count the slim network by fvcore and by `FlopCounterMode`; return the counts, and what disagrees."""
    from fvcore.nn import FlopCountAnalysis

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result.model(example)
    halves = {str(op): int(count) // 2 for op, count in counter.get_flop_counts()["Global"].items()}
    counts: Record = {
        "planned": result.plan.after.macs,
        "uncounted": list(result.analysis.costs.uncounted),
        "flop_counter": halves,
    }
    analysis = FlopCountAnalysis(result.model, example)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    try:
        by_operator = {name: int(count) for name, count in analysis.by_operator().items()}
        counts["fvcore"] = sum(by_operator.values())
        counts["fvcore_skips"] = dict(analysis.unsupported_ops())
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
        return counts, f"fvcore cannot trace it ({str(error).strip().splitlines()[0][:120]})"
    if counts["fvcore"] != counts["planned"]:
        return counts, f"fvcore counts {counts['fvcore']:,} MACs where the plan says {counts['planned']:,}"
    products = sum(count for name, count in by_operator.items() if name in PRODUCTS)
    counted = sum(count for op, count in halves.items() if "attention" not in op)
    if products != counted:
        return counts, f"FlopCounterMode counts {counted:,} MACs of products where fvcore counts {products:,}"
    return counts, ""


@contextmanager
def _no_dropout(model: nn.Module) -> Iterator[None]:
    """Switch off what drops at random: its draws depend on the width."""
    rates = [
        (module, name)
        for module in model.modules()
        for name in ("p", "drop_prob", "drop_rate")
        if isinstance(vars(module).get(name), float)
    ]
    before = [getattr(module, name) for module, name in rates]
    for module, name in rates:
        setattr(module, name, 0.0)
    yield
    for (module, name), rate in zip(rates, before, strict=True):
        setattr(module, name, rate)


def trained_by_a_step(model: nn.Module, example: Tensor) -> set[str]:
    """Take one step of Adam in train mode, on a copy, and name the parameters that moved."""
    learner = copy.deepcopy(model).train()
    before = {name: parameter.detach().clone() for name, parameter in learner.named_parameters()}
    inputs = torch.randn(4, *example.shape[1:], generator=torch.Generator().manual_seed(1))
    with seeded(0), _no_dropout(learner), torch.enable_grad():
        outputs = [tensor for tensor in output_tensors(learner(inputs)) if tensor.requires_grad]
        torch.stack([tensor.float().square().mean() for tensor in outputs]).sum().backward()
    torch.optim.Adam(learner.parameters(), lr=1e-2, eps=1e-30).step()
    return {name for name, parameter in learner.named_parameters() if not torch.equal(parameter, before[name])}


def check_training(model: nn.Module, result: SlimResult, example: Tensor) -> str:
    """Compare which parameters one training step moves, in the original and in the slim network, both randomised."""
    original = randomize(model, 0)
    expected = trained_by_a_step(original, example)
    found = trained_by_a_step(apply(original, result.surgery), example)
    stuck, extra = sorted(expected - found), sorted(found - expected)
    if stuck:
        return f"a training step leaves {len(stuck)} parameters as they are that it changed before, such as {stuck[0]}"
    return f"a training step changes {extra[0]}, which it did not change before" if extra else ""


def check_saving(network: str, model: nn.Module, result: SlimResult, example: Tensor) -> str:
    """Save, load and compare the outputs bit by bit and the classes module by module."""
    source, _, name = network.partition(":")
    classification = source == "timm" or name in _torchvision_classifiers()
    recipe = Recipe("timm" if source == "timm" else "torchvision", name) if classification else None
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "result"
        export.save(where, result.model, [export.Step(result.plan, result.surgery)], recipe, {}, "")
        loaded = export.load(where, model=None if recipe is not None else model)
    with torch.no_grad():
        pairs = zip(output_tensors(result.model(example)), output_tensors(loaded(example)), strict=True)
        if not all(torch.equal(before, after) for before, after in pairs):
            return "the loaded network gives other outputs"
    classes = [[type(module) for module in each.modules()] for each in (model, loaded)]
    return "" if classes[0] == classes[1] else "the loaded network is of other classes"


def _torchvision_classifiers() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


class _Problems:
    """Collect what goes wrong, check by check, so that one failure does not hide the next."""

    def __init__(self, record: Record, report: Report) -> None:
        self.record, self.report = record, report
        record["problems"] = []

    @contextmanager
    def checking(self, check: str) -> Iterator[None]:
        """Name the check that runs; whatever it raises becomes a problem of it."""
        self.report(check)
        try:
            yield
        except ArchscanError as error:
            self.add(check, f"{type(error).__name__}: {error}")
        except Exception as error:  # whatever code that nobody here wrote may raise
            last = traceback.extract_tb(error.__traceback__)[-1]
            message = (str(error).strip().splitlines() or [""])[0][:300]
            where = f"{Path(last.filename).parent.name}/{Path(last.filename).name}:{last.lineno} {last.name}"
            self.add(check, f"{type(error).__name__}: {message} [{where}]")

    def add(self, check: str, cause: str) -> None:
        """Add a problem where there is a cause."""
        if cause:
            self.record["problems"].append({"check": check, "cause": cause})


def examine(network: str, report: Report) -> Record:
    """Run every check of the sweep on one network.

    Args:
        network: Such as ``timm:resnet18``.
        report: Told the name of each check as it begins.
    """
    record: Record = {"network": network}
    problems = _Problems(record, report)
    with problems.checking("build"):
        model = build(network)
        record["params"] = sum(parameter.numel() for parameter in model.parameters())
    if record["problems"]:
        return record
    with problems.checking("couple"):
        example = smallest_input(network, model)
        record["input"] = list(example.shape)
        coupling, record["couple_s"] = time_coupling(model, example)
        record |= {"groups": len(coupling.groups), "mixing": list(coupling.mixing)}
        record["ops"] = len(coupling.graph.nodes) if coupling.graph is not None else 0
        record["frozen"] = frozen_channels(model, coupling)
    if record["problems"]:
        return record
    result: SlimResult | None = None
    record["plans"] = {}
    for criterion in ("random", "magnitude"):
        with problems.checking(f"slim by {criterion}"):
            result, target = slim_by(model, example, criterion)
            record["plans"][criterion] = plan = describe_plan(result, target)
            record["frozen"] = frozen_channels(model, result.analysis.coupling)
            if result.analysis.coupling.mixing:
                plan["same_statistics"], cause = prove_with_same_statistics(model, result, example)
                problems.add(f"same statistics, {criterion}", cause)
            if not target - 0.02 <= plan["ratio"] <= target:
                problems.add("target", f"the plan keeps {plan['ratio']:.3f} of the MACs where {target} was asked for")
    if result is None:
        return record
    with problems.checking("price"):
        record["price"], disagreement = check_price(result, example)
        problems.add("price", disagreement)
    with problems.checking("training"):
        problems.add("training", check_training(model, result, example))
    with problems.checking("saving"):
        problems.add("saving", check_saving(network, model, result, example))
    return record
