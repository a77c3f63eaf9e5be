"""Remove what does nothing: model → a smaller network that computes the same, for any input.

Only units that are proven dead go (see `dead_units`). The network that is left is proven like a slim one, and then held
against the original as it is, with nothing masked, on noise and on whatever images are passed.

The decision that is not obvious: channels that were merely silent on some images stay. Removing them changes nothing on
these images either, but that is what an ordinary target does first, since their saliency is 0; it is not lossless.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from archscan.capture import train_mode
from archscan.dead_units import dead_units, lossless_kept
from archscan.errors import BadInput, RebuildMismatch
from archscan.findings.network import Network
from archscan.findings.redundancy import dead_findings
from archscan.options import ProgressFactory, silent
from archscan.planner import Budget
from archscan.recipes import Recipe
from archscan.recognise import recognise
from archscan.replan import Fitted, Wish, plan_and_rebuild
from archscan.report.model import Lossless
from archscan.results import Analysis, SlimResult, SlimSettings, group_rows
from archscan.rounds import gone_units
from archscan.sharding import on_device
from archscan.slimming import analyse, checked_device, seeded, versions
from archscan.stages import Job, Stopwatch, prove_fitted, telling_input
from archscan.verify import TOLERANCE, Verification, output_tensors, verify
from archscan.widths import WidthRule

ALL = Budget("macs", 1.0)
_ATTEMPTS = 4


def remove_dead(
    model: nn.Module,
    example_input: Any,
    *,
    data: Iterable[Any] | None = None,
    settings: SlimSettings | None = None,
    recipe: Recipe | None = None,
    progress: ProgressFactory = silent,
) -> SlimResult:
    """Remove the channels that change no output, whatever the input; the model is not modified.

    Args:
        model: Any network.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        data: Batches of images, or tuples that start with one, to compare outputs on besides noise.
        settings: Width rules, protected layers and seed; everything else must be left alone. By default every dead
            channel goes, whatever width that leaves.
        recipe: How the model's architecture was built; None to find out.
        progress: Opens progress bars.

    Returns:
        The smaller network, in eval mode, with its plan, and the comparison in ``lossless``.

    Raises:
        BadInput: No channel is dead for every input, or an argument makes no sense.
        UnsupportedOp: The forward uses an op without a coupling rule.
        RebuildMismatch: The smaller network does not compute what the original does; this is a defect to report.
    """
    settings = settings or SlimSettings(WidthRule(round_to=1))
    _check(settings)
    device = checked_device(model)
    example_input = on_device(example_input, device)
    job = Job(model, example_input, ALL, (), settings, Stopwatch(), progress)
    with seeded(job):
        return _without_dead(job, data, recipe)


def _check(settings: SlimSettings) -> None:
    """Refuse what would have no effect."""
    without = SlimSettings(settings.rule, settings.protect, seed=settings.seed)
    if settings != without:
        raise BadInput("nothing is scored or repaired where no loss is allowed; leave only rule, protect and seed")


def _without_dead(job: Job, data: Iterable[Any] | None, recipe: Recipe | None) -> SlimResult:
    with job.watch.stage("capture"):
        analysis = analyse(job.model, job.example_input, job.settings.protect)
    with job.watch.stage("dead channels"), job.progress("Looking for dead channels") as step:
        step(0, 0)
        dead_U = dead_units(job.model, analysis.coupling)
        fitted = _fitted(job, analysis, dead_U)
    with job.watch.stage("verify"), job.progress("Proving the smaller network") as step:
        step(0, 0)
        verification, counted = prove_fitted(job, fitted)
        lossless = _compare(job, fitted, data)
    if recipe is None:
        with job.watch.stage("recognise"):
            recipe = recognise(job.model, job.example_input)
    provenance = {**versions(), "seed": job.settings.seed, "lossless": True}
    return SlimResult(
        model=fitted.rebuilt.model.eval(),
        plan=replace(fitted.plan, saliency_lost=0.0, saliency_lost_uniform=0.0, provenance=provenance),
        surgery=fitted.rebuilt.surgery,
        analysis=fitted.analysis,
        saliency_U=(~dead_U).astype(np.float64),
        scored=None,
        verification=verification,
        recovery=None,
        rule=job.settings.rule,
        notes=(*fitted.notes, *counted),
        warnings=(),
        seconds=job.watch.seconds,
        recipe=recipe,
        findings=tuple(dead_findings(_network(fitted), dead_U)),
        lossless=lossless,
    )


def _network(fitted: Fitted) -> Network:
    groups, plan = fitted.analysis.coupling.groups, fitted.plan
    widths_G = np.array([len(plan.kept[group.name][0]) for group in groups])
    shares_G = np.array([row.macs_share for row in group_rows(fitted.analysis, plan)])
    return Network(groups, fitted.analysis.costs, widths_G, shares_G, "")


def _fitted(job: Job, analysis: Analysis, dead_U: np.ndarray) -> Fitted:
    """Plan to keep all that lives; where a forward cannot follow and groups are frozen or tied, plan again."""
    for _ in range(_ATTEMPTS):
        kept = lossless_kept(analysis.coupling.groups, dead_U, job.settings.rule)
        gone_U = gone_units(analysis.coupling, kept)
        if not gone_U.any():
            raise BadInput(
                "no channel that may be removed is dead for every input, so nothing can go without loss; set a target, "
                "such as --target-flops 0.9, which takes what the images need least"
            )
        wish = Wish(ALL, job.settings.rule, job.settings.seed, gone_U)
        fitted = plan_and_rebuild(job.model, job.example_input, analysis, np.ones(len(dead_U)), wish)
        if not (gone_units(fitted.analysis.coupling, fitted.plan.kept) & ~dead_U).any():
            return fitted
        analysis = fitted.analysis
    raise RebuildMismatch("dead channels are tied to others by forwards that hard-code widths; protect those modules")


def _compare(job: Job, fitted: Fitted, data: Iterable[Any] | None) -> Lossless:
    """Hold the smaller network against the original, with nothing masked, on noise and on the images.

    Raises:
        RebuildMismatch: They differ by more than rounding.
    """
    noise = telling_input(tree_map(_blank, job.example_input), job.settings.seed)
    on_noise = _on_noise(job, fitted, noise)
    errors, images = [], 0
    for batch in data if data is not None else ():
        found = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(found, Tensor):
            raise BadInput(f"a batch is a {type(batch).__name__}; pass tensors of images, or (images, labels) pairs")
        errors.append(_on_images(job.model, fitted.rebuilt.model, found.to(next(job.model.parameters()).device)))
        images += len(found)
    groups, kept = fitted.analysis.coupling.groups, fitted.plan.kept
    gone = [group.channels - len(kept[group.name][0]) * group.channels_per_step for group in groups]
    return Lossless(
        channels=sum(gone),
        groups=sum(number > 0 for number in gone),
        error_on_noise=on_noise.max_abs_error or 0.0,
        error_on_images=max(errors, default=None),
        images=images,
        tolerance=on_noise.tolerance or 0.0,
    )


def _on_noise(job: Job, fitted: Fitted, noise: Any) -> Verification:
    """Compare in float64 where that can be afforded, as a slim network is."""
    coupling = fitted.analysis.coupling
    everything = {group.name: (tuple(range(group.steps)),) * len(group.units) for group in coupling.groups}
    unmixed = replace(coupling, mixing=())  # nothing is played back: the networks are compared as they are
    found = verify(job.model, fitted.rebuilt.model, unmixed, everything, noise)
    if not found.passed:
        raise _mismatch(found.reason)
    return found


def _on_images(original: nn.Module, smaller: nn.Module, images: Tensor) -> float:
    """Compare in the network's own arithmetic, as it is used."""
    with torch.no_grad(), train_mode(original, False), train_mode(smaller, False):
        pairs = list(zip(output_tensors(original(images)), output_tensors(smaller(images)), strict=True))
    error = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
    allowed = TOLERANCE[torch.float32] * max(float(a.abs().max()) for a, _ in pairs)
    if not error <= allowed:
        raise _mismatch(f"on images the outputs differ by {error:.3g} where rounding explains {allowed:.3g}")
    return error


def _mismatch(reason: str) -> RebuildMismatch:
    return RebuildMismatch(
        f"without its dead channels the network does not compute what it did ({reason}), so that nothing was written; "
        "please report this network"
    )


def _blank(leaf: Any) -> Any:
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
