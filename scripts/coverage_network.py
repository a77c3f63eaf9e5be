"""Open one network of the sweep, slim it, and check it in every way that is known: name → record of plain JSON values.

A record says what was checked and what was found; ``problems`` lists every check that failed, with its cause. Nothing
here decides which networks there are or how they are run (`coverage`), or how the records read (`coverage_report`).

The decision that is not obvious: three slim networks are made and proven. One by magnitude, through `archscan.slim`,
which is what users run; one by random scores, from the same coupling; and one in which *every* group is narrowed, since
plans leave most groups alone and prove nothing of those. What it is made of is trained and thrown away at the end.
"""

import copy
import re
import resource
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coverage_attention import describe_attention, without_place
from coverage_checks import check_price, check_saving, check_training
from coverage_subjects import Opened, arithmetic, build, open_network
from torch import Tensor, nn

import archscan
from archscan.criteria import criterion, score
from archscan.errors import ArchscanError, BadInput, InfeasibleBudget
from archscan.gates import collect
from archscan.groups import Coupling
from archscan.losses import classification_loss
from archscan.planner import Budget, Plan
from archscan.randomize import near_activations
from archscan.rebuild import CannotFollow, apply, rebuild
from archscan.recount import recount
from archscan.replan import Wish, plan_and_rebuild, priced
from archscan.results import Analysis
from archscan.same_statistics import Played, run_with_same_statistics
from archscan.saving import Step
from archscan.settle import narrowed, settle
from archscan.surgery import Kept, Surgery
from archscan.verify import TOLERANCE, Verification, masked_original, output_tensors
from archscan.widths import WidthRule

TARGET = 0.6

LEAST_EFFECT, TELLING = 1e-10, 100.0
"""A proof counts where the removed channels would have changed the outputs by this fraction or more, and by so many
times the error that was found."""

OVERFLOW = 1e30
"""Stands for the effect of channels with which, on statistics that do not know them, the outputs grow out of bounds."""

SETTLEMENTS = 4
"""How often a network that is narrowed everywhere may need more groups tied or frozen."""

SLIM_PARAMETERS = 50_000_000
"""Larger networks are slimmed by magnitude in the stages of `archscan.slim`, whose own proof holds five copies."""

Record = dict[str, Any]
Report = Callable[[str], None]
"""Told the name of each stage as it begins."""


@dataclass(frozen=True, eq=False)
class Cut:
    """A slim network with the coupling and the kept steps that made it."""

    model: nn.Module
    surgery: Surgery
    coupling: Coupling
    kept: Kept
    notes: tuple[str, ...] = ()
    verification: Verification | None = None


def frozen_channels(model: nn.Module, coupling: Coupling) -> Record:
    """Count the output channels of convolutions that keep their width, without the network's outputs.

    ``reasons`` has one entry for all places of one reason, under the reason as it is at the first of them.
    """
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
    first: dict[str, str] = {}
    summed: Counter[str] = Counter()
    for reason, count in frozen.most_common():
        first.setdefault(without_place(reason), reason)
        summed[without_place(reason)] += count
    named = {first[short]: count for short, count in summed.most_common()}
    return {"channels": total, "frozen": sum(frozen.values()), "reasons": named}


# --- three ways to cut ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Case:
    """One network on its way through the sweep."""

    opened: Opened
    analysis: Analysis
    target: float = TARGET
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def model(self) -> nn.Module:
        """The original."""
        return self.opened.model

    @property
    def example(self) -> Tensor:
        """Its input."""
        return self.opened.example


def _within_reach(case: _Case, slim: Callable[[], Any]) -> Any:
    """Slim to the target; where frozen parts do not allow that, half-way to what they do allow."""
    try:
        return slim()
    except InfeasibleBudget as error:
        lowest = re.search(r"reachable: ([\d.]+)", str(error))
        if lowest is None or float(lowest[1]) >= 0.99:
            raise
        case.target = round((float(lowest[1]) + 1) / 2, 3)
        return slim()


def slim_by_stages(case: _Case, saliency_U: np.ndarray) -> tuple[Cut, Plan]:
    """Plan and rebuild from scores, on what is known of the network already."""
    wish = Wish(Budget("macs", case.target), WidthRule(), 0)
    fitted = plan_and_rebuild(case.model, case.example, case.analysis, saliency_U, wish)
    case.analysis = fitted.analysis
    coupling, rebuilt = fitted.analysis.coupling, fitted.rebuilt
    return Cut(rebuilt.model.eval(), rebuilt.surgery, coupling, fitted.plan.kept, fitted.notes), fitted.plan


def cut_everywhere(case: _Case, seed: int) -> Cut:
    """Narrow every group that may be narrowed; where a forward cannot follow, settle what it can, as a plan does."""
    coupling, notes = case.analysis.coupling, list[str]()
    for _ in range(SETTLEMENTS):
        kept = narrowed(coupling, seed)
        try:
            rebuilt = rebuild(case.model, case.example, coupling, kept)
        except CannotFollow:
            settled = settle(case.model, case.example, coupling, kept)
            if not settled.notes:
                raise
            coupling = settled.coupling
            notes.extend(settled.notes)
            continue
        case.analysis = Analysis(coupling, priced(coupling))
        return Cut(rebuilt.model.eval(), rebuilt.surgery, coupling, kept, tuple(notes))
    raise CannotFollow("", "settling it finds no end", 0)


# --- proofs ---------------------------------------------------------------------------------------------------------


def _run(model: nn.Module, example: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return output_tensors(model(example))


def difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Give the largest difference of any output, relative to the largest output; infinite where shapes differ."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return float("inf")
    pairs = [(a, b) for a, b in zip(expected, found, strict=True) if a.numel()]
    scale = max((float(a.abs().max()) for a, _ in pairs), default=0.0)
    largest = torch.stack([(a - b).abs().max() for a, b in pairs]).max()
    return float(largest) / scale if scale else float(largest)


def _judged(case: _Case, seen: Record) -> tuple[Record, str]:
    dtype = case.example.dtype
    seen["dtype"] = str(dtype).removeprefix("torch.")
    if not seen["error"] <= TOLERANCE[dtype]:
        return seen, f"the outputs differ by {seen['error']:.3g} of the largest where {TOLERANCE[dtype]:.0e} is allowed"
    if not seen["effect"] >= max(LEAST_EFFECT, TELLING * seen["error"]):
        return seen, f"nothing is proven: the removed channels change the outputs by {seen['effect']:.3g} only"
    return seen, ""


def _relative(verification: Verification) -> Record:
    """Give the error of a comparison by `archscan.slim` as a fraction of the largest output."""
    error = (verification.max_abs_error or 0.0) / (verification.largest_output or 1.0)
    return {"error": error, "dtype": verification.dtype, "by": verification.proof}


def prove(case: _Case, cut: Cut, masked: nn.Module) -> tuple[Record, str]:
    """Compare a slim network with the masked original, both randomised, in the way that applies."""
    played = Played(_run(masked, case.example), _run(cut.model, case.example), case.outputs, 0, 0)
    if cut.coupling.mixing:
        bare = played.found
        if [tensor.shape for tensor in bare] != [tensor.shape for tensor in case.outputs]:
            return {}, "the outputs have other shapes"
        if not all(bool(tensor.isfinite().all()) for tensor in bare):
            return {}, "an output is not finite"
        run = partial(_run, example=case.example)
        with_statistics = run_with_same_statistics(masked, cut.model, cut.coupling, run, case.model)
        if with_statistics is None:
            return {}, "the statistics over channels cannot be played back"
        played = with_statistics
    elif not difference(played.expected, played.found) <= TOLERANCE[case.example.dtype]:
        played = _with_steady_statistics(case, cut)
    finite = all(bool(tensor.isfinite().all()) for tensor in played.unmasked)
    effect = difference(played.expected, played.unmasked) if finite else OVERFLOW
    seen = {"error": difference(played.expected, played.found), "effect": effect}
    return _judged(case, seen | {"played_back": played.played_back, "constants": played.constants})


def _with_steady_statistics(case: _Case, cut: Cut) -> Played:
    """Compare once more where rounding may have been magnified, with statistics that keep activations in bounds."""
    run = partial(_run, example=case.example)
    original, masked = copy.deepcopy(case.model), masked_original(case.model, cut.coupling, cut.kept)
    near_activations(masked, run, 0, twin=original)
    return Played(run(masked), run(apply(original, cut.surgery)), run(original), 0, 0)


def check_widths(case: _Case, cut: Cut) -> tuple[Record, Iterator[str]]:
    """Price a network that was narrowed everywhere; return what was seen, and yield what disagrees."""
    widths_G = np.array([len(cut.kept[group.name][0]) for group in cut.coupling.groups])
    costs = case.analysis.costs
    planned, counted = costs.evaluate("macs", widths_G), recount(cut.model, case.example)
    params = sum(parameter.numel() for parameter in cut.model.parameters())
    seen = {
        "groups": len(widths_G),
        "cut": int((widths_G < costs.full_widths_G).sum()),
        "ratio": planned / costs.evaluate("macs", costs.full_widths_G),
        "kept_width": list(cut.notes),
    }

    def wrong() -> Iterator[str]:
        if planned != counted.macs:
            yield f"{counted.by} counts {counted.macs:,} MACs where the cost model says {planned:,}"
        if params != costs.evaluate("params", widths_G):
            yield f"there are {params:,} parameters where the cost model says {costs.evaluate('params', widths_G):,}"

    return seen, wrong()


# --- the record -----------------------------------------------------------------------------------------------------


class _Problems:
    """Collect what goes wrong, check by check, so that one failure does not hide the next; and the time of each."""

    def __init__(self, record: Record, report: Report) -> None:
        self.record, self.report = record, report
        record["problems"] = []
        record["stage_s"] = {}

    @contextmanager
    def checking(self, check: str) -> Iterator[None]:
        """Name the check that runs; whatever it raises becomes a problem of it."""
        self.report(check)
        start = time.process_time()
        try:
            yield
        except ArchscanError as error:
            self.add(check, f"{type(error).__name__}: {error}")
        except Exception as error:  # whatever code that nobody here wrote may raise
            last = traceback.extract_tb(error.__traceback__)[-1]
            message = (str(error).strip().splitlines() or [""])[0][:300]
            where = f"{Path(last.filename).parent.name}/{Path(last.filename).name}:{last.lineno} {last.name}"
            self.add(check, f"{type(error).__name__}: {message} [{where}]")
        finally:
            self.record["stage_s"][check] = round(time.process_time() - start, 3)

    def add(self, check: str, cause: str) -> None:
        """Add a problem where there is a cause."""
        if cause:
            self.record["problems"].append({"check": check, "cause": cause})


def _open(network: str, record: Record) -> Opened:
    """Open a network in float64 where it takes that and is not too large, else in float32."""
    wanted = arithmetic(record["params"])
    try:
        return open_network(network, wanted)
    except BadInput:
        if wanted == torch.float32:
            raise
    return open_network(network, torch.float32)


def _note_plan(record: Record, problems: _Problems, case: _Case, scores: str, cut: Cut, plan: Plan) -> None:
    """Prove one plan where `archscan.slim` has not compared the outputs, and see that it meets its target."""
    ratio = plan.after.macs / plan.before.macs
    noted: Record = {"target": case.target, "ratio": ratio, "applicable": not cut.coupling.mixing}
    noted["kept_width"] = list(cut.notes)
    record["plans"][scores] = noted
    if cut.verification is not None and cut.verification.applicable:
        noted["proof"] = _relative(cut.verification)
    else:
        noted["proof"], cause = prove(case, cut, masked_original(case.model, cut.coupling, cut.kept))
        problems.add(f"proof, {scores}", cause)
    if not case.target - 0.02 <= ratio <= case.target:
        problems.add("target", f"the plan keeps {ratio:.3f} of the MACs where {case.target} was asked for")


def _by_magnitude(record: Record, case: _Case) -> tuple[Cut, Plan]:
    """Slim through `archscan.slim`, which makes a proof of its own; the largest networks by the stages of it."""
    if record["params"] > SLIM_PARAMETERS:
        needs, coupling = criterion("magnitude").needs, case.analysis.coupling
        statistics = collect(case.model, coupling, (), classification_loss, needs)
        return slim_by_stages(case, score("magnitude", statistics))
    result = archscan.slim(
        case.model, case.example, target_flops=case.target, criterion="magnitude", recipe=case.opened.recipe
    )
    case.analysis = result.analysis
    record["slim_s"] = {stage: round(seconds, 3) for stage, seconds in result.seconds.items()}
    coupling, plan, proof = result.analysis.coupling, result.plan, result.verification
    return Cut(result.model, result.surgery, coupling, plan.kept, result.notes, proof), plan


def _check_magnitude(record: Record, problems: _Problems, case: _Case) -> None:
    cut: Cut | None = None
    with problems.checking("slim by magnitude"):
        cut, plan = _within_reach(case, lambda: _by_magnitude(record, case))
        _note_plan(record, problems, case, "magnitude", cut, plan)
    if cut is not None:
        with problems.checking("saving"):
            step = Step(plan, cut.surgery)
            problems.add("saving", check_saving(case.model, cut.model, step, case.opened.recipe, case.example))


def _check_random(record: Record, problems: _Problems, case: _Case) -> None:
    with problems.checking("slim by random"):
        saliency_U = np.random.default_rng(0).random(case.analysis.coupling.unit_count)
        cut, plan = _within_reach(case, lambda: slim_by_stages(case, saliency_U))
        _note_plan(record, problems, case, "random", cut, plan)
        record["price"], disagreement = check_price(cut.model, case.example, plan.after.macs)
        record["price"]["uncounted"] = list(case.analysis.costs.uncounted)
        problems.add("price", disagreement)


def _check_everywhere(record: Record, problems: _Problems, case: _Case) -> list[nn.Module]:
    """Prove and price what is narrowed everywhere; return it and the masked original, to be trained."""
    with problems.checking("everywhere"):
        cut = cut_everywhere(case, seed=7)
        record["frozen"] = frozen_channels(case.model, cut.coupling)
        record["attention"] = describe_attention(cut.coupling)
        record["everywhere"], wrong = check_widths(case, cut)
        for cause in wrong:
            problems.add("everywhere", cause)
        masked = masked_original(case.model, cut.coupling, cut.kept)
        proof, cause = prove(case, cut, masked)
        record["everywhere"] |= {"applicable": not cut.coupling.mixing, "proof": proof}
        problems.add("everywhere", cause)
        return [cut.model, masked]
    return []


def _opened_case(network: str, record: Record) -> _Case:
    """Open a network and note what it is."""
    if "params" not in record:
        record["params"] = sum(parameter.numel() for parameter in build(network)[0].parameters())
    opened = _open(network, record)
    coupling = opened.coupling
    record |= {"input": list(opened.example.shape), "couple_s": opened.couple_s, "groups": len(coupling.groups)}
    record["mixing"] = dict(Counter(text.partition(" at ")[0] for text in coupling.mixing))
    record |= {"ops": len(coupling.graph.nodes) if coupling.graph else 0}
    record["dtype"] = str(opened.example.dtype).removeprefix("torch.")
    record["frozen"] = frozen_channels(opened.model, coupling)
    return _Case(opened, Analysis(coupling, priced(coupling)), outputs=_run(opened.model, opened.example))


def examine(network: str, report: Report, facts: Mapping[str, Any] | None = None) -> Record:
    """Run every check of the sweep on one network.

    Args:
        network: Such as ``timm:resnet18``.
        report: Told the name of each check as it begins.
        facts: What is known already: ``params``.
    """
    record: Record = {"network": network, **(facts or {}), "plans": {}}
    problems = _Problems(record, report)
    case: _Case | None = None
    with problems.checking("open"):
        case = _opened_case(network, record)
    if case is not None:
        _check_magnitude(record, problems, case)
        _check_random(record, problems, case)
        pair, example = _check_everywhere(record, problems, case), case.example
        macs = case.analysis.costs.evaluate("macs", case.analysis.costs.full_widths_G)
        del case  # the original, whose memory the largest networks need for their gradients
        if pair:
            with problems.checking("training"):
                problems.add("training", check_training(pair, example, macs))
    record["couple_s"] = round(min(record.get("couple_s", 0.0), record.get("slim_s", {}).get("capture", 1e9)), 4)
    record["peak_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return record
