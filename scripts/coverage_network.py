"""Open one network of the sweep, slim it, and check it in every way that is known: name → record of plain JSON values.

A record says what was checked and what was found; ``problems`` lists every check that failed, with its cause. Nothing
here decides which networks there are or how they are run (`coverage`), or how the records read (`coverage_report`).
"""

import copy
import random
import re
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coverage_statistics import compare_with_same_statistics
from coverage_subjects import build, smallest_input
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import archscan
from archscan import export
from archscan.costs import CostModel
from archscan.errors import ArchscanError, InfeasibleBudget
from archscan.groups import Coupling, couple, freeze
from archscan.rebuild import CannotFollow, apply, rebuild
from archscan.recipes import Recipe, seeded
from archscan.recount import recount
from archscan.results import SlimResult
from archscan.surgery import Kept, Surgery
from archscan.verify import TOLERANCE, masked_original, output_tensors, prove, randomize

TARGET = 0.6
PRODUCTS = {"conv", "linear", "matmul", "bmm", "addmm", "einsum"}
"""What fvcore calls the operators that `FlopCounterMode` counts too, at two FLOPs for each multiply-accumulate."""

PADDED_CONVOLUTION = "aten::_convolution_mode"
FVCORE_MISSES = {"scaled_dot_product_attention", "aten::scaled_dot_product_attention", PADDED_CONVOLUTION}
"""Functions with products that fvcore knows nothing of; the plan counts convolutions padded by name among them."""

ROUNDING = 1e-6
"""Gradients smaller than this fraction of the largest are taken for rounding errors (float32)."""

LEAST_EFFECT = 1e-5
"""A proof counts where the channels that were removed would have changed the outputs by this fraction or more."""

Record = dict[str, Any]
Report = Callable[[str], None]
"""Told the name of each stage as it begins."""


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


@dataclass(frozen=True, eq=False)
class Cut:
    """A slim network with the coupling and the kept steps that made it."""

    model: nn.Module
    surgery: Surgery
    coupling: Coupling
    kept: Kept
    notes: tuple[str, ...] = ()


def _random_kept(coupling: Coupling, seed: int) -> Kept:
    """Keep between a half and all but one of the steps of every live group, drawn anew in each fibre."""
    draw = random.Random(seed)
    kept = {}
    for group in coupling.groups:
        steps = range(group.steps)
        live = group.frozen is None and group.steps > 1
        count = draw.randint((group.steps + 1) // 2, group.steps - 1) if live else group.steps
        kept[group.name] = tuple(tuple(sorted(draw.sample(steps, count))) for _ in group.units)
    return kept


def cut_everywhere(model: nn.Module, example: Tensor, coupling: Coupling, seed: int) -> Cut:
    """Narrow every group that may be narrowed: plans leave most groups alone, and prove nothing of those.

    Where a forward cannot follow, the groups of its module are frozen, as `archscan.slim` does.
    """
    notes: list[str] = []
    while True:
        kept = _random_kept(coupling, seed)
        try:
            rebuilt = rebuild(model, example, coupling, kept)
        except CannotFollow as error:
            inside = f"{error.module}." if error.module else ""
            stuck = [
                group.name
                for group in coupling.groups
                if group.frozen is None and any(f"{member.module}.".startswith(inside) for member in group.members)
            ]
            if not stuck:
                raise
            coupling = freeze(coupling, dict.fromkeys(stuck, f"the forward of {error.module} hard-codes a width"))
            notes.append(f"{error.module}: {error.detail}")
            continue
        return Cut(rebuilt.model.eval(), rebuilt.surgery, coupling, kept, tuple(notes))


def prove_everywhere(model: nn.Module, example: Tensor, cut: Cut, costs: CostModel) -> tuple[Record, Iterator[str]]:
    """Prove and price a network that was narrowed everywhere; return what was seen, and yield what is wrong."""
    proof = prove(model, cut.model, cut.surgery, cut.coupling, cut.kept, example)
    widths_G = np.array([len(cut.kept[group.name][0]) for group in cut.coupling.groups])
    planned, counted = costs.evaluate("macs", widths_G), recount(cut.model, example)
    params = sum(parameter.numel() for parameter in cut.model.parameters())
    seen = {
        "groups": len(widths_G),
        "cut": int((widths_G < costs.full_widths_G).sum()),
        "ratio": planned / costs.evaluate("macs", costs.full_widths_G),
        "applicable": proof.applicable,
        "error": proof.max_abs_error,
        "kept_width": list(cut.notes),
    }

    def wrong() -> Iterator[str]:
        if not proof.passed:
            yield proof.reason
        if planned != counted.macs:
            yield f"{counted.by} counts {counted.macs:,} MACs where the cost model says {planned:,}"
        if params != costs.evaluate("params", widths_G):
            yield f"there are {params:,} parameters where the cost model says {costs.evaluate('params', widths_G):,}"
        yield from (f"cannot follow in {note}" for note in cut.notes)

    return seen, wrong()


def prove_with_same_statistics(model: nn.Module, cut: Cut, example: Tensor) -> tuple[Record, str]:
    """Prove a network whose statistics mix channels (`coverage_statistics`); return what was seen and what failed."""
    seen = compare_with_same_statistics(model, cut.surgery, cut.coupling, cut.kept, example)
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
    products = sum(count for name, count in by_operator.items() if name in PRODUCTS)
    counts["missed_by_fvcore"] = missed = sum(n for op, n in halves.items() if "attention" not in op) - products
    skipped = {*counts["uncounted"], *counts["fvcore_skips"]}
    if missed < 0 or (missed and not FVCORE_MISSES & skipped):
        return counts, f"FlopCounterMode counts {missed:,} MACs of products more than fvcore"
    if counts["planned"] - counts["fvcore"] != (missed if PADDED_CONVOLUTION in skipped else 0):
        return counts, f"fvcore counts {counts['fvcore']:,} MACs where the plan says {counts['planned']:,}"
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


def trained_by_a_step(model: nn.Module, example: Tensor) -> dict[str, float]:
    """Take one step of Adam in train mode, on a copy; name the parameters that moved, with their largest gradient.

    What is exactly zero before is a masked slice, and does not count.
    """
    learner = copy.deepcopy(model).train()
    before = {name: parameter.detach().clone() for name, parameter in learner.named_parameters()}
    inputs = torch.randn(4, *example.shape[1:], generator=torch.Generator().manual_seed(1))
    with seeded(0), _no_dropout(learner), torch.enable_grad():
        outputs = [tensor for tensor in output_tensors(learner(inputs)) if tensor.requires_grad]
        torch.stack([tensor.float().square().mean() for tensor in outputs]).sum().backward()
    torch.optim.Adam(learner.parameters(), lr=1e-2, eps=1e-30).step()
    moved = {
        name: float((parameter.grad * (before[name] != 0)).abs().max())
        for name, parameter in learner.named_parameters()
        if parameter.grad is not None and not torch.equal(parameter, before[name])
    }
    return {name: gradient for name, gradient in moved.items() if gradient}


def check_training(model: nn.Module, cut: Cut, example: Tensor) -> str:
    """Compare which parameters one training step moves, in the masked original and in the slim network, randomised.

    The masked original, because what is left of a layer may be dead at first. A gradient that is zero but for rounding
    (of a bias before a BatchNorm) may be exactly zero in one of the two.
    """
    original = randomize(model, 0)
    expected = trained_by_a_step(masked_original(original, cut.coupling, cut.kept), example)
    found = trained_by_a_step(apply(original, cut.surgery), example)
    for these, those, what in (
        (expected, found, "leaves as it is {}, which it changed before"),
        (found, expected, "changes {}, which it did not change before"),
    ):
        noise = ROUNDING * max(these.values(), default=0.0)
        only = sorted(name for name in these.keys() - those.keys() if these[name] > noise)
        if only:
            return f"a training step {what.format(f'{len(only)} parameters, such as {only[0]}')}"
    return ""


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
                cut = Cut(result.model, result.surgery, result.analysis.coupling, result.plan.kept)
                plan["same_statistics"], cause = prove_with_same_statistics(model, cut, example)
                problems.add(f"same statistics, {criterion}", cause)
            if not target - 0.02 <= plan["ratio"] <= target:
                problems.add("target", f"the plan keeps {plan['ratio']:.3f} of the MACs where {target} was asked for")
    if result is None:
        return record
    with problems.checking("price"):
        record["price"], disagreement = check_price(result, example)
        problems.add("price", disagreement)
    cut = Cut(result.model, result.surgery, result.analysis.coupling, result.plan.kept)
    with problems.checking("everywhere"):
        cut = cut_everywhere(model, example, coupling, seed=0)
        record["everywhere"], wrong = prove_everywhere(model, example, cut, result.analysis.costs)
        for cause in wrong:
            problems.add("everywhere", cause)
        if cut.coupling.mixing:
            record["everywhere"]["same_statistics"], cause = prove_with_same_statistics(model, cut, example)
            problems.add("everywhere", cause)
    with problems.checking("training"):
        problems.add("training", check_training(model, cut, example))
    with problems.checking("saving"):
        problems.add("saving", check_saving(network, model, result, example))
    return record
