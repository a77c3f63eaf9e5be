"""Repair a slim network layer by layer, without labels: original, slim network, images → `Repaired`.

In depth order, every layer's bias (level ``bias``) or weights and bias (level ``ls``) are solved for, so that its
outputs on calibration images come closest to those of the *original* network, from inputs that the repaired layers
before it produce. Where a BatchNorm follows, what is compared is its output, and its running mean takes up the bias;
where the layer ends a residual branch, it is the sum with the shortcut, so that a branch makes up for errors of the
shortcut too. Luo et al. 2017 (ThiNet) and He et al. 2017 ("Channel pruning") solve single layers in this way.

A fit of wide layers to few images follows their noise, so that more images are worth much. Mirror images are more of
them where the original does not mind: where it gives most of them the class that it gives the image itself.

Level ``blocks`` then lets all weights of each residual block move together (see `blocks`).

Each layer keeps its weights where that is better on images that the fit has not seen, and so does each block. After
that, each step as a whole has to bring the network's outputs closer to the original's on the same images, or is taken
back; tuned blocks are taken back where they take the outputs further away than chance explains. (On the CIFAR ResNet-20
at half its MACs and 128 to 256 images, 16 to 32 of them held out, four of six repairs that brought the outputs
closer on 2,048 others looked worse on those few.)

The decision that is not obvious: BatchNorm statistics are kept as they are, but for the mean. Estimating them again
would scale up what a least-squares fit, being a conditional mean, rightly leaves out, so that it is tried only where no
such fit was kept. (The few held-out images could be fooled: on the CIFAR ResNet-20 it once stayed for 0.2 % less on 64
images, and cost 27 % more on 5,000 others.)
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from archscan.blocks import BlockEffort, BlockRepair, find_blocks, tune_blocks
from archscan.capture import train_mode
from archscan.heldout import LEAST_SAMPLES, count, distances, gathered, minds_no_mirror, shown_to_hurt, split
from archscan.least_squares import Effort, Solution, solve
from archscan.lockstep import Meeting, lockstep
from archscan.positions import Layer, Sample
from archscan.recover import recalibrate_batchnorm
from archscan.rehearsal import Place, Rehearsal, rehearse
from archscan.repairs import LayerRepair, Repaired, Step, StepName
from archscan.surgery import Surgery, named_tensors

Level = Literal["bias", "ls", "blocks"]
Progress = Callable[[int, int], None]
"""Called with (layers and blocks done, layers and blocks in all)."""

_LIVE_TENSORS = 5
"""Activations of the largest size that both networks hold at a time, as in a residual block."""

_NOT_ABSORBABLE = "no bias and no BatchNorm of its own takes up a mean"
_MISPLACED = "its outputs lie at other positions in the slim network"


def repair(
    original: nn.Module,
    slim: nn.Module,
    surgery: Surgery,
    batches: Iterable[Any],
    level: Level,
    *,
    effort: Effort | None = None,
    block_effort: BlockEffort | None = None,
    max_bytes: int = 4 << 30,
    progress: Progress | None = None,
) -> Repaired:
    """Bring a slim network's outputs closer to the original's; both networks are left unchanged.

    Costs one forward pass of either network over the images, and, for each layer of K inputs and O outputs, products
    of K² + (1 + sweeps) · 2 K O multiply-adds per position that is looked at, and K³ / 3 for each ridge tried. Blocks
    cost what `tune_blocks` says.

    Args:
        original: The network before slimming.
        slim: The network that it was slimmed to.
        surgery: What was cut.
        batches: Tensors of images, or tuples that start with one.
        level: ``bias`` for the biases only, ``ls`` for the weights too, ``blocks`` for these and then block by block.
        effort: How much work to put into each layer.
        block_effort: How much to put into each block.
        max_bytes: Activations to keep at a time; fewer images are used where they would not fit.
        progress: Called after every layer.

    Raises:
        BadInput: There are too few images, or the slim network's forward differs from the original's.
    """
    device = next((tensor.device for tensor in slim.parameters()), torch.device("cpu"))
    images = gathered(batches).to(device)
    job = _Job(original, surgery, effort or Effort(), block_effort or BlockEffort(), progress)
    with train_mode(original, False), train_mode(slim, False):
        rehearsal = rehearse(original, images[:2])
        room = _affordable(rehearsal, max_bytes)
        fit, holdout = split(images[: max(LEAST_SAMPLES, room)])
        mirrored = level != "bias" and 2 * count(fit) + count(holdout) <= room and minds_no_mirror(original, holdout)
        more = [chunk.flip(-1) for chunk in fit] if mirrored else []
        repaired = _repaired(job, slim, rehearsal, [*fit, *more], holdout, level)
        repaired = replace(repaired, samples=count(fit), mirrored=mirrored)
    for new, old in zip(repaired.model.modules(), slim.modules(), strict=True):
        new.training = old.training
    return repaired


@dataclass(frozen=True, eq=False)
class _Job:
    original: nn.Module
    surgery: Surgery
    effort: Effort
    block_effort: BlockEffort
    progress: Progress | None


def _repaired(
    job: _Job, slim: nn.Module, rehearsal: Rehearsal, fit: list[Tensor], holdout: list[Tensor], level: Level
) -> Repaired:
    """Try the levels from the wanted one down until one helps, then block by block, or BatchNorm recalibration."""
    model = slim
    steps: list[Step] = []
    layers: tuple[LayerRepair, ...] = ()
    far = distances(job.original, slim, holdout)
    names: Sequence[Literal["ls", "bias"]] = ("bias",) if level == "bias" else ("ls", "bias")
    for name in names:
        candidate, found = _reconstructed(job, slim, rehearsal, fit, holdout, name)
        after = distances(job.original, candidate, holdout)
        steps.append(_checked(name, far, after))
        if steps[-1].kept:
            model, layers, far = candidate, found, after
            break
    blocks = find_blocks(job.original, fit[0][:2], rehearsal.places) if level == "blocks" else []
    tuned: tuple[BlockRepair, ...] = ()
    if blocks:
        candidate = copy.deepcopy(model)
        tuned = tune_blocks(job.original, candidate, blocks, job.surgery, fit, holdout, job.block_effort, job.progress)
        after = distances(job.original, candidate, holdout)
        steps.append(_checked("blocks", far, after))
        if steps[-1].kept:
            model, far = candidate, after
    solved = any(step.name == "ls" and step.kept for step in steps)
    recalibrated = None if solved else recalibrate_batchnorm(model, fit)
    if recalibrated is not None and recalibrated.layers:
        after = distances(job.original, recalibrated.model, holdout)
        steps.append(_checked("bn", far, after))
        model = recalibrated.model if steps[-1].kept else model
    skipped = dict(rehearsal.skipped)
    done = {layer.weight for layer in layers}
    for place in rehearsal.places if layers else ():
        if place.weight not in done:
            skipped[place.weight] = _MISPLACED if solved or place.bias or place.mean else _NOT_ABSORBABLE
    return Repaired(copy.deepcopy(model), tuple(steps), layers, skipped, count(fit), count(holdout), blocks=tuned)


def _checked(name: StepName, before: Tensor, after: Tensor) -> Step:
    """Decide on a step by the distances of held-out images; of blocks, each was held against these images already."""
    loss_before, loss_after = float(before.mean()), float(after.mean())
    kept = not shown_to_hurt(before, after) if name == "blocks" else loss_after < loss_before
    return Step(name, kept, loss_before, loss_after)


# One step -------------------------------------------------------------------------------------------------------------


def _affordable(rehearsal: Rehearsal, max_bytes: int) -> int:
    """Count the images whose activations fit."""
    return max_bytes // max(1, _LIVE_TENSORS * rehearsal.largest_bytes)


def _reconstructed(
    job: _Job,
    slim: nn.Module,
    rehearsal: Rehearsal,
    fit: list[Tensor],
    holdout: list[Tensor],
    level: Literal["ls", "bias"],
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
    kept = surgery.kept_rows(place.weight)
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
