"""Repair a slim network layer by layer, without labels: original, slim network, images → `Repaired`.

In depth order, every layer's bias (level ``bias``) or weights and bias (level ``ls``) are solved for, so that its
outputs on calibration images come closest to those of the *original* network, from inputs that the repaired layers
before it produce. Where a BatchNorm follows, what is compared is its output, and its running mean takes up the bias;
where the layer ends a residual branch, it is the sum with the shortcut, so that a branch makes up for errors of the
shortcut too. Luo et al. 2017 (ThiNet) and He et al. 2017 ("Channel pruning") solve single layers in this way.

Each layer keeps its weights where that is better on images that the fit has not seen. After that, each step as a whole
has to bring the network's outputs closer to the original's on the same images, or is taken back.

The decision that is not obvious: BatchNorm statistics are kept as they are, but for the mean. Estimating them again
would scale up what a least-squares fit, being a conditional mean, rightly leaves out; it is tried at the
end, and seldom stays.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from archscan.capture import train_mode
from archscan.errors import BadInput
from archscan.least_squares import Effort, Layer, Sample, Solution, solve
from archscan.lockstep import Meeting, lockstep
from archscan.recover import recalibrate_batchnorm
from archscan.rehearsal import Place, Rehearsal, rehearse
from archscan.surgery import Surgery, named_tensors

Level = Literal["bias", "ls"]
StepName = Literal["bias", "ls", "bn"]
Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""

HOLDOUT_SHARE = 1 / 8
LEAST_SAMPLES = 16
_CHUNKS = 16
_LIVE_TENSORS = 5
"""Activations of the largest size that both networks hold at a time, as in a residual block."""

_NOT_ABSORBABLE = "no bias and no BatchNorm of its own takes up a mean"
_MISPLACED = "its outputs lie at other positions in the slim network"


@dataclass(frozen=True)
class LayerRepair:
    """What became of one layer.

    Attributes:
        weight: Path of its weight.
        changed: What was changed: ``weights``, ``bias`` or ``nothing``.
        compared: Where outputs were compared: behind the ``layer`` and its BatchNorm, or behind the ``sum`` with the
            shortcut.
        error_before: Squared error on held-out images, relative to the variance of the original's outputs there.
        error_after: The same after the repair.
        ridge: Strength that the hold-out chose, in units of the mean of the Gram matrix's diagonal; None where weights
            stayed.
        columns: Inputs of one output.
        rows: Positions that were fitted to.
    """

    weight: str
    changed: Literal["weights", "bias", "nothing"]
    compared: Literal["layer", "sum"]
    error_before: float
    error_after: float
    ridge: float | None
    columns: int
    rows: int


@dataclass(frozen=True)
class Step:
    """One repair of the whole network.

    Attributes:
        name: ``bias``, ``ls``, or ``bn`` for BatchNorm recalibration.
        kept: Whether it brought the outputs closer to the original's; taken back otherwise.
        loss_before: Distance of the outputs from the original's on held-out images, see `distance`.
        loss_after: The same after the step.
    """

    name: StepName
    kept: bool
    loss_before: float
    loss_after: float


@dataclass(frozen=True, eq=False)
class Repaired:
    """A repaired network, and how it was done.

    Attributes:
        model: The new network.
        steps: What was tried, in order.
        layers: What became of each layer in the last step of this kind that was kept; empty where none was.
        skipped: Weight or name of each contraction that was left alone, and why.
        samples: Images that were fitted to.
        holdout: Images that it was checked on.
    """

    model: nn.Module
    steps: tuple[Step, ...]
    layers: tuple[LayerRepair, ...]
    skipped: Mapping[str, str]
    samples: int
    holdout: int

    def clause(self) -> str:
        """Say in one clause what was done."""
        named = {
            "ls": f"weights of {sum(layer.changed == 'weights' for layer in self.layers)} layers re-solved",
            "bias": f"mean outputs of {sum(layer.changed == 'bias' for layer in self.layers)} layers corrected",
            "bn": "BatchNorm statistics recalibrated",
        }
        done = " and ".join(named[step.name] for step in self.steps if step.kept) or "nothing repaired"
        back = ", ".join(step.name for step in self.steps if not step.kept)
        return f"{done} on {self.samples} images, checked on {self.holdout} others" + (
            f" ({back} did not help and was taken back)" if back else ""
        )


def repair(
    original: nn.Module,
    slim: nn.Module,
    surgery: Surgery,
    batches: Iterable[Any],
    level: Level,
    *,
    effort: Effort | None = None,
    max_bytes: int = 4 << 30,
    progress: Progress | None = None,
) -> Repaired:
    """Bring a slim network's outputs closer to the original's; both networks are left unchanged.

    Costs one forward pass of either network over the images, and, for each layer of K inputs and O outputs, products
    of K² + (1 + sweeps) · 2 K O multiply-adds per position that is looked at, and K³ / 3 for each ridge tried.

    Args:
        original: The network before slimming.
        slim: The network that it was slimmed to.
        surgery: What was cut.
        batches: Tensors of images, or tuples that start with one.
        level: ``bias`` for the biases only, ``ls`` for the weights too.
        effort: How much work to put into each layer.
        max_bytes: Activations to keep at a time; fewer images are used where they would not fit.
        progress: Called after every layer.

    Raises:
        BadInput: There are too few images, or the slim network's forward differs from the original's.
    """
    device = next((tensor.device for tensor in slim.parameters()), torch.device("cpu"))
    images = _gathered(batches).to(device)
    job = _Job(original, surgery, effort or Effort(), progress)
    with train_mode(original, False), train_mode(slim, False):
        rehearsal = rehearse(original, images[:2])
        images = images[: _affordable(rehearsal, len(images), max_bytes)]
        fit, holdout = _split(images)
        repaired = _repaired(job, slim, rehearsal, fit, holdout, level)
    for new, old in zip(repaired.model.modules(), slim.modules(), strict=True):
        new.training = old.training
    return repaired


@dataclass(frozen=True, eq=False)
class _Job:
    original: nn.Module
    surgery: Surgery
    effort: Effort
    progress: Progress | None


def _repaired(
    job: _Job, slim: nn.Module, rehearsal: Rehearsal, fit: list[Tensor], holdout: list[Tensor], level: Level
) -> Repaired:
    """Try the levels from the wanted one down until one helps, then BatchNorm recalibration."""
    model = slim
    steps: list[Step] = []
    layers: tuple[LayerRepair, ...] = ()
    loss = distance(job.original, slim, holdout)
    levels: Sequence[Level] = ("ls", "bias") if level == "ls" else ("bias",)
    for name in levels:
        candidate, found = _reconstructed(job, slim, rehearsal, fit, holdout, name)
        after = distance(job.original, candidate, holdout)
        steps.append(Step(name, after < loss, loss, after))
        if steps[-1].kept:
            model, layers, loss = candidate, found, after
            break
    recalibrated = recalibrate_batchnorm(model, fit)
    if recalibrated.layers:
        after = distance(job.original, recalibrated.model, holdout)
        steps.append(Step("bn", after < loss, loss, after))
        model = recalibrated.model if steps[-1].kept else model
    skipped = dict(rehearsal.skipped)
    done, solved = {layer.weight for layer in layers}, any(step.name == "ls" and step.kept for step in steps)
    for place in rehearsal.places if layers else ():
        if place.weight not in done:
            skipped[place.weight] = _MISPLACED if solved or place.bias or place.mean else _NOT_ABSORBABLE
    return Repaired(copy.deepcopy(model), tuple(steps), layers, skipped, _count(fit), _count(holdout))


# Images ---------------------------------------------------------------------------------------------------------------


def _gathered(batches: Iterable[Any]) -> Tensor:
    parts = [batch[0] if isinstance(batch, (tuple, list)) and batch else batch for batch in batches]
    if not all(isinstance(part, Tensor) and part.shape[1:] == parts[0].shape[1:] for part in parts):
        raise BadInput("repair needs batches of images of one size; pass tensors, or (images, labels) pairs")
    count = sum(len(part) for part in parts)
    if count < LEAST_SAMPLES:
        raise BadInput(
            f"repair needs at least {LEAST_SAMPLES} calibration images, to fit to and to check on, not {count}; "
            "pass more, or choose BatchNorm recalibration"
        )
    return torch.cat(parts)


def _affordable(rehearsal: Rehearsal, count: int, max_bytes: int) -> int:
    fitting = max_bytes // max(1, _LIVE_TENSORS * rehearsal.largest_bytes)
    return max(LEAST_SAMPLES, min(count, fitting))


def _split(images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Set the last images apart; both parts in chunks of equal size, each of which runs as one batch."""
    held = max(1, round(len(images) * HOLDOUT_SHARE))
    size = max(2, -(-len(images) // _CHUNKS))
    return list(images[:-held].split(size)), list(images[-held:].split(size))


def _count(batches: Sequence[Tensor]) -> int:
    return sum(len(batch) for batch in batches)


# One step -------------------------------------------------------------------------------------------------------------


def distance(original: nn.Module, model: nn.Module, batches: Sequence[Tensor]) -> float:
    """Measure how far a network's outputs are from the original's; both have to be in eval mode.

    Mean Kullback-Leibler divergence of the class probabilities where the output is [samples, classes]; otherwise the
    squared error of all outputs, relative to their squares.
    """
    total = weight = 0.0
    with torch.no_grad():
        for images in batches:
            right, found = (
                [leaf for leaf in tree_flatten(net(images))[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
                for net in (original, model)
            )
            if len(right) == 1 and right[0].ndim == 2 and right[0].shape[1] > 1:
                log_q, log_p = (output[0].double().log_softmax(1) for output in (found, right))
                total += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
                weight += len(images)
            else:
                total += sum(float((a.double() - b.double()).square().sum()) for a, b in zip(right, found, strict=True))
                weight += sum(float(a.double().square().sum()) for a in right)
    return total / weight if weight else total


def _reconstructed(
    job: _Job, slim: nn.Module, rehearsal: Rehearsal, fit: list[Tensor], holdout: list[Tensor], level: Level
) -> tuple[nn.Module, tuple[LayerRepair, ...]]:
    """Solve for every layer of a copy."""
    result = copy.deepcopy(slim)
    tensors = dict(named_tensors(result))
    places = [place for place in rehearsal.places if level == "ls" or place.bias or place.mean]
    layers: list[LayerRepair] = []
    met = lockstep(job.original, result, places, [*fit, *holdout])
    with contextlib.closing(met):
        for done, (place, meetings) in enumerate(met, start=1):
            layer = _layer(place, meetings[0])
            solves = level == "ls" and not _is_depthwise(layer)
            effort = job.effort if solves else replace(job.effort, ridges=())
            samples = [_sample(place, meeting, _kept(job.surgery, place)) for meeting in meetings]
            if all(sample.fits(layer) for sample in samples):
                found = solve(layer, samples[: len(fit)], samples[len(fit) :], effort)
                _put(place, tensors, found)
                layers.append(_record(place, layer, found))
            if job.progress is not None:
                job.progress(done, len(places))
    return result, tuple(layers)


def _is_depthwise(layer: Layer) -> bool:
    return layer.groups > 1 and layer.weight.shape[1] == 1


def _kept(surgery: Surgery, place: Place) -> Tensor | None:
    kept = next((cut.kept for cut in surgery.cuts.get(place.weight, ()) if cut.axis == 0), None)
    return None if kept is None else torch.tensor(kept)


def _sample(place: Place, meeting: Meeting, kept: Tensor | None) -> Sample:
    shortcut = None if meeting.shortcut is None else _as_maps(place, meeting.shortcut)
    return Sample(_as_maps(place, meeting.args[0]), _as_maps(place, meeting.target), kept, shortcut)


def _as_maps(place: Place, values: Tensor) -> Tensor:
    """Lay inputs or outputs out as NCHW: rows of a linear layer become images of one pixel."""
    if place.function == "linear":
        return values.reshape(-1, values.shape[-1])[:, :, None, None]
    return values.unsqueeze(2) if place.function == "conv1d" else values


def _layer(place: Place, meeting: Meeting) -> Layer:
    """Read a layer from the call that the slim network made."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    call: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    call |= dict(zip(names, meeting.args, strict=False)) | dict(meeting.kwargs)
    weight = call["weight"].detach()
    scale, offset = _affine(meeting.norm, weight)
    bias = weight.new_zeros(len(weight)) if call["bias"] is None else call["bias"].detach()
    layer = Layer(weight, bias, scale, offset, intercept=bool(place.bias or place.mean), rectified=place.rectified)
    if place.function == "linear":
        return replace(layer, weight=weight[:, :, None, None])
    plane = place.function == "conv2d"
    weight = weight if plane else weight.unsqueeze(2)
    stride, dilation = (_pair(call[name], plane, 1) for name in ("stride", "dilation"))
    padding = _padding(call["padding"], weight.shape[2:], dilation, plane)
    return replace(layer, weight=weight, stride=stride, padding=padding, dilation=dilation, groups=int(call["groups"]))


def _affine(norm: Mapping[str, Any] | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Give scale and offset of a BatchNorm in eval mode, in float64."""
    scale, offset = (
        weight.new_ones(len(weight), dtype=torch.float64),
        weight.new_zeros(len(weight), dtype=torch.float64),
    )
    if norm is None:
        return scale, offset
    scale = (norm["running_var"].double() + norm["eps"]).rsqrt()
    scale = scale if norm["weight"] is None else scale * norm["weight"].detach().double()
    offset = offset if norm["bias"] is None else norm["bias"].detach().double()
    return scale, offset - scale * norm["running_mean"].double()


def _pair(value: Any, plane: bool, fill: int) -> tuple[int, int]:
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not plane:
        return fill, int(sizes[0])
    return int(sizes[0]), int(sizes[-1])


def _padding(value: Any, kernel: Sequence[int], dilation: tuple[int, int], plane: bool) -> tuple[int, int, int, int]:
    """Give the zeros to the left, to the right, above and below."""
    if value == "same":
        height, width = (dilation[axis] * (kernel[axis] - 1) for axis in (0, 1))
        return width // 2, width - width // 2, height // 2, height - height // 2
    height, width = (0, 0) if value == "valid" else _pair(value, plane, 0)
    return width, width, height, height


def _put(place: Place, tensors: Mapping[str, Tensor], found: Solution) -> None:
    """Write a solution into the network; a running mean takes up the bias with the other sign."""
    with torch.no_grad():
        weight = tensors[place.weight]
        weight.copy_(found.weight.reshape(weight.shape))
        if place.bias:
            tensors[place.bias].copy_(found.bias)
        elif place.mean:
            tensors[place.mean].sub_(found.bias)


def _record(place: Place, layer: Layer, found: Solution) -> LayerRepair:
    solved = math.isfinite(found.ridge)
    better = found.error_after < found.error_before
    return LayerRepair(
        weight=place.weight,
        changed="weights" if solved else "bias" if better else "nothing",
        compared="layer" if place.sum_call is None else "sum",
        error_before=found.error_before,
        error_after=found.error_after,
        ridge=found.ridge if solved else None,
        columns=layer.columns,
        rows=found.rows,
    )
