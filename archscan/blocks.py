"""Tune the blocks of a slim network to what the original's return: networks, images → the slim network, changed.

Least squares solves for one layer at a time, so that what a layer gives to a later one of its block stays as near to
the original as it can be, whether or not that is what the later one needs now. Here all weights of a block (a residual
block, an inverted bottleneck …) move together, in depth order, towards the *block's* output in the original network, on
inputs that the tuned blocks before it produce: some steps of Adam on the squared error, without labels and without
looking at the network's outputs (Li et al. 2021, "BRECQ", does this to quantised blocks).

The decision that is not obvious: blocks are found, not declared. A block is an outermost module that runs once, takes a
tensor, returns one, and holds a few of the layers that least squares knows and at most one sum with a shortcut. What
its output channels are follows from the last of these layers; where that is wrong, the error shows it, and the block is
left alone.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from archscan.lockstep import BlockMeeting, lockstep_blocks
from archscan.rehearsal import Place
from archscan.surgery import Surgery

Progress = Callable[[int, int], None]
"""Called with (blocks done, blocks in all)."""

_LEAST_LAYERS, _MOST_LAYERS = 2, 8
"""How many layers a block may hold: one is solved for exactly, and many are a network."""

_ALIGNED = 0.5
"""Above this error, relative to the variance of the target, what is compared is most likely not the same channels."""


@dataclass(frozen=True)
class BlockEffort:
    """How much work to put into one block.

    Attributes:
        steps: Of Adam, at most.
        passes: Over the images, at most; few images take fewer steps.
        images: In one step, at most.
        values: Of the block's output in one step, at most; larger maps mean fewer images.
        rate: First learning rate, as a fraction of the root mean square of the values that it moves; a cosine takes it
            to zero.
    """

    steps: int = 200
    passes: int = 16
    images: int = 32
    values: int = 1 << 21
    rate: float = 0.02


@dataclass(frozen=True)
class Block:
    """A module whose output can be compared between two networks.

    Attributes:
        path: Of the module.
        last: The layer in it whose outputs are the channels that it returns.
    """

    path: str
    last: Place


@dataclass(frozen=True)
class BlockRepair:
    """What became of one block.

    Attributes:
        path: Of the module.
        changed: Whether the tuned weights were kept; not where they were no better on held-out images.
        error_before: Squared error of its output on these, relative to the variance of the original's.
        error_after: The same after the repair.
    """

    path: str
    changed: bool
    error_before: float
    error_after: float


def find_blocks(model: nn.Module, images: Tensor, places: Sequence[Place]) -> list[Block]:
    """Find the blocks of a network, which runs once, has to be in eval mode, and is left unchanged."""
    plain = _plain_modules(model, images)
    inside = Counter(path for place in places for path in _around(place))
    sums = Counter(path for place in places if place.sum_call is not None for path in _around(place))
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))

    def found(path: str, module: nn.Module) -> Iterator[str]:
        own = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
        alone = all(owners[key] == count for key, count in own.items())
        if path in plain and _LEAST_LAYERS <= inside[path] <= _MOST_LAYERS and sums[path] <= 1 and alone:
            yield path
            return
        for name, child in module.named_children():
            yield from found(f"{path}.{name}" if path else name, child)

    paths = sorted(set(found("", model)), key=plain.index)
    return [Block(path, max((p for p in places if path in _around(p)), key=lambda p: p.last_call)) for path in paths]


def _around(place: Place) -> list[str]:
    """List the modules that a layer is in, without the network itself."""
    parts = place.weight.split(".")[:-1]
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _plain_modules(model: nn.Module, images: Tensor) -> list[str]:
    """List the modules that run once, take one tensor and return one, in the order in which they end."""
    ends: list[str] = []
    odd: set[str] = set()

    def note(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
            given = len(args) == 1 and not kwargs and len(tensors) == 1 and tensors[0] is args[0]
            if not given or not isinstance(output, Tensor) or not output.is_floating_point():
                odd.add(path)
            ends.append(path)

        return hook

    handles = [
        module.register_forward_hook(note(path), with_kwargs=True) for path, module in model.named_modules() if path
    ]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    runs = Counter(ends)
    return [path for path in ends if runs[path] == 1 and path not in odd]


def tune_blocks(
    original: nn.Module,
    slim: nn.Module,
    blocks: Sequence[Block],
    surgery: Surgery,
    fit: Sequence[Tensor],
    holdout: Sequence[Tensor],
    effort: BlockEffort,
    progress: Progress | None = None,
) -> tuple[BlockRepair, ...]:
    """Tune the blocks of a slim network in depth order, in place; both networks have to be in eval mode.

    Costs one forward pass of either network over the images, and for each block the steps of training that `effort`
    allows.

    Args:
        original: The network before slimming, left unchanged.
        slim: The network that it was slimmed to; its weights are changed.
        blocks: Of the original.
        surgery: What was cut.
        fit: Batches of images to tune on.
        holdout: Batches to see on whether that helps.
        effort: How much work to put into each block.
        progress: Called after every block.
    """
    done: list[BlockRepair] = []
    met = lockstep_blocks(original, slim, [block.path for block in blocks], [*fit, *holdout])
    with contextlib.closing(met):
        for number, (block, (path, meetings)) in enumerate(zip(blocks, met, strict=False), start=1):
            module = slim.get_submodule(path)
            aligned = [_aligned(module, meeting, block, surgery) for meeting in meetings]
            pairs = [meeting for meeting in aligned if meeting is not None]
            if len(pairs) == len(meetings):
                done.append(_tuned(path, module, pairs[: len(fit)], pairs[len(fit) :], effort))
            if progress is not None:
                progress(number, len(blocks))
    return tuple(done)


def _aligned(module: nn.Module, meeting: BlockMeeting, block: Block, surgery: Surgery) -> BlockMeeting | None:
    """Keep the target's channels that the slim block returns; None where it cannot be told which those are."""
    with torch.no_grad():
        shape = module(meeting.inputs[:1].clone()).shape
    target = meeting.target
    if shape[1:] == target.shape[1:]:
        return meeting
    kept = surgery.kept_rows(block.last.weight)
    axes = [axis for axis in range(1, target.ndim) if len(shape) == target.ndim and shape[axis] != target.shape[axis]]
    if kept is None or len(axes) != 1 or shape[axes[0]] != len(kept):
        return None
    index = torch.tensor(kept, device=target.device)
    if int(index.max()) >= target.shape[axes[0]]:
        return None
    return BlockMeeting(meeting.inputs, target.index_select(axes[0], index))


def _error(module: nn.Module, pairs: Sequence[BlockMeeting]) -> float:
    """Give the squared error of a block's outputs, relative to the variance of the targets."""
    with torch.no_grad():
        found = torch.cat([module(pair.inputs.clone()) for pair in pairs]).double()
    target = torch.cat([pair.target for pair in pairs]).double()
    variance = float((target - target.mean()).square().sum())
    return float((found - target).square().sum()) / max(variance, torch.finfo(torch.float64).tiny)


def _tuned(
    path: str, module: nn.Module, fit: Sequence[BlockMeeting], holdout: Sequence[BlockMeeting], effort: BlockEffort
) -> BlockRepair:
    """Tune one block, and take it back where that is no better on the hold-out."""
    before = _error(module, holdout)
    if not 0 < before <= _ALIGNED:
        return BlockRepair(path, False, before, before)
    state = copy.deepcopy(module.state_dict())
    _descend(module, fit, effort)
    after = _error(module, holdout)
    if after < before:
        return BlockRepair(path, True, before, after)
    module.load_state_dict(state)
    return BlockRepair(path, False, before, before)


def _descend(module: nn.Module, fit: Sequence[BlockMeeting], effort: BlockEffort) -> None:
    """Take the steps."""
    parameters = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    wanted = [parameter.requires_grad for parameter in parameters]
    places = [(batch, image) for batch, pair in enumerate(fit) for image in range(len(pair.inputs))]
    count = min(len(places), effort.images, max(1, effort.values // fit[0].target[0].numel()))
    steps = max(1, min(effort.steps, effort.passes * len(places) // count))
    draws = torch.Generator().manual_seed(0)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        rows = [{"params": [p], "lr": effort.rate * float(p.detach().square().mean().sqrt())} for p in parameters]
        optimizer = torch.optim.Adam(rows)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with torch.enable_grad():
            for _ in range(steps):
                chosen = [places[place] for place in torch.randperm(len(places), generator=draws)[:count].tolist()]
                inputs = torch.cat([fit[batch].inputs[image : image + 1] for batch, image in chosen])
                target = torch.cat([fit[batch].target[image : image + 1] for batch, image in chosen])
                loss = (module(inputs) - target).square().mean() / target.var().clamp(min=1e-12)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    finally:
        for parameter, before in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(before)
            parameter.grad = None
