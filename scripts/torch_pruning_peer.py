"""Prune a network with Torch-Pruning, the peer of the benchmarks, at its best: network, images, target → networks.

What is done, by the peer's documented calls alone (`BasePruner` with global ranking, its group importances, gradients
accumulated by `loss.backward()` in eval mode):

- One-shot: one step; its pruning ratio is bisected for the largest network that is not above the target.
- Iterative: many small steps, scored anew before each, until the network is not above the target; where the importance
  needs gradients, they are computed anew each time that another 2.5 % of the dense MACs are gone (10 % where each
  sample needs a backward pass of its own, or a Kronecker factor is made of them).

Three ways to treat a shortcut that pads channels, which the peer's index mapping takes for an identity: leave it to
the peer, protect all that such shortcuts are added to, or write them as 1 x 1 convolutions that compute the same.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning
from benchmarking import counted_macs
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from archscan.reference_nets import PaddedShortcut

Batches = Sequence[tuple[Tensor, Tensor]]
Shortcuts = Literal["as-is", "kept", "conv"]
Schedule = Literal["one-shot", "iterative"]

SMALL_STEPS = 400
"""Steps of the iterative schedule; each takes 1/400 of the channels."""

FRESH_GRADIENTS_AFTER = 0.025
"""Fraction of the dense MACs after which gradients are computed anew."""

_BISECTIONS = 12
CRASHES = (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError, ZeroDivisionError)
"""What the peer is seen to raise where it cannot prune a network, or leaves one that cannot run."""


@dataclass(frozen=True)
class Peer:
    """One way to use the peer."""

    importance: str
    shortcuts: Shortcuts
    schedule: Schedule

    def __str__(self) -> str:
        return f"{self.importance}/{self.shortcuts}/{self.schedule}"


def _importances() -> dict[str, Callable[[int], Any]]:
    """Name the peer's importances; each is made for a number of classes."""
    importance = torch_pruning.importance
    return {
        "random": lambda _classes: importance.RandomImportance(),
        "l1": lambda _classes: importance.GroupMagnitudeImportance(p=1),
        "l2": lambda _classes: importance.GroupMagnitudeImportance(p=2),
        "lamp": lambda _classes: importance.LAMPImportance(p=2),
        "fpgm": lambda _classes: importance.FPGMImportance(p=2),
        "bn-scale": lambda _classes: importance.BNScaleImportance(),
        "taylor": lambda _classes: importance.GroupTaylorImportance(),
        "hessian": lambda _classes: importance.GroupHessianImportance(),
        "obdc": lambda classes: importance.OBDCImportance(num_classes=classes),
    }


IMPORTANCES = ("random", "l1", "l2", "lamp", "fpgm", "bn-scale", "taylor", "hessian", "obdc")
_FRESH_AFTER = {"taylor": FRESH_GRADIENTS_AFTER, "hessian": 0.1, "obdc": 0.1}
"""Fraction of the dense MACs after which an importance that reads gradients is given new ones."""


def parse_peer(text: str) -> Peer:
    """Read ``importance/shortcuts/schedule``.

    Raises:
        ValueError: It is not of that form.
    """
    importance, shortcuts, schedule = text.split("/")
    if importance not in IMPORTANCES:
        raise ValueError(importance)
    if shortcuts not in ("as-is", "kept", "conv") or schedule not in ("one-shot", "iterative"):
        raise ValueError(text)
    return Peer(importance, shortcuts, schedule)  # type: ignore[arg-type]


def pruned(
    peer: Peer, dense: nn.Module, example: Tensor, batches: Batches, ratios: Sequence[float]
) -> Iterator[tuple[float, nn.Module]]:
    """Yield a network for each ratio of kept MACs, in descending order, never above it; `dense` is left unchanged.

    Raises:
        CRASHES: The peer cannot prune the network.
    """
    dense_macs = counted_macs(dense, example)
    limits = [(ratio, int(ratio * dense_macs)) for ratio in sorted(ratios, reverse=True)]
    start = prepared(dense, peer.shortcuts)
    find = _one_shot if peer.schedule == "one-shot" else _iterative
    return find(peer, start, example, batches, limits, dense_macs)


def prepared(dense: nn.Module, shortcuts: Shortcuts) -> nn.Module:
    """Copy a network, its padded shortcuts written as convolutions where that is asked for."""
    model = copy.deepcopy(dense).eval().requires_grad_(True)
    if shortcuts == "conv":
        widths = _block_widths(model)
        for path, module in list(model.named_modules()):
            if isinstance(module, PaddedShortcut):
                model.set_submodule(path, identity_convolution(module, widths[path]))
    return model


def identity_convolution(shortcut: PaddedShortcut, inputs: int) -> nn.Conv2d:
    """Write a padded shortcut as a strided 1 x 1 convolution whose weight is a padded identity."""
    outputs = inputs + shortcut.pad_before + shortcut.pad_after
    conv = nn.Conv2d(inputs, outputs, 1, stride=shortcut.stride, bias=False)
    weight = torch.zeros(outputs, inputs)
    weight[shortcut.pad_before : shortcut.pad_before + inputs] = torch.eye(inputs)
    conv.weight = nn.Parameter(weight[:, :, None, None])
    return conv


def _block_widths(model: nn.Module) -> dict[str, int]:
    """Find the input channels of each padded shortcut: those of the first convolution beside it."""
    modules = dict(model.named_modules())
    return {
        path: modules[f"{path.rpartition('.')[0]}.conv1"].in_channels
        for path, module in modules.items()
        if isinstance(module, PaddedShortcut)
    }


def protected(model: nn.Module, shortcuts: Shortcuts) -> list[nn.Module]:
    """List the layers that the peer must not prune: the classifier, and where asked for all that shortcuts add up."""
    linear: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if shortcuts != "kept":
        return linear
    stream: list[nn.Module] = [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and (path == "conv1" or path.endswith(".conv2"))
    ]
    return linear + stream


def compute_gradients(model: nn.Module, batches: Batches) -> None:
    """Accumulate the gradients of the loss over the batches, in eval mode, as the peer's importances read them."""
    model.eval().zero_grad()
    for images, labels in batches:
        cross_entropy(model(images), labels).backward()


def feed(peer: Peer, importance: Any, pruner: Any, model: nn.Module, batches: Batches) -> None:
    """Give an importance the gradients that it reads, as its documentation says; nothing where it reads none."""
    if peer.importance == "taylor":
        compute_gradients(model, batches)
    elif peer.importance == "hessian":
        importance.zero_grad()
        for image, label in _single(batches):
            model.eval().zero_grad()
            cross_entropy(model(image), label).backward()
            importance.accumulate_grad(model)
    elif peer.importance == "obdc":
        importance._clear_buffer()
        importance._prepare_model(model, pruner)
        generator = torch.Generator().manual_seed(0)
        for images, _ in batches:
            model.eval().zero_grad()
            logits = model(images)
            drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
            cross_entropy(logits, drawn).backward()
            importance.step()
        importance._rm_hooks(model)


def _single(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in batches:
        for number in range(len(images)):
            yield images[number : number + 1], labels[number : number + 1]


def _copy_with_gradients(model: nn.Module) -> nn.Module:
    """Copy a network; `copy.deepcopy` leaves the gradients of parameters out."""
    copied = copy.deepcopy(model)
    for old, new in zip(model.parameters(), copied.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    return copied


def _pruner(peer: Peer, model: nn.Module, example: Tensor, ratio: float, steps: int) -> Any:
    classes = max(module.out_features for module in model.modules() if isinstance(module, nn.Linear))
    return torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=_importances()[peer.importance](classes),
        global_pruning=True,
        pruning_ratio=ratio,
        iterative_steps=steps,
        ignored_layers=protected(model, peer.shortcuts),
    )


def _one_shot(
    peer: Peer, start: nn.Module, example: Tensor, batches: Batches, limits: Sequence[tuple[float, int]], _dense: int
) -> Iterator[tuple[float, nn.Module]]:
    if peer.importance == "taylor":
        compute_gradients(start, batches)
    elif peer.importance in _FRESH_AFTER:
        raise ValueError(f"{peer.importance} is used in the iterative schedule only")
    for ratio, limit in limits:
        low, high, best, crash = 0.0, 1.0, None, "no pruning ratio does"
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            model = _copy_with_gradients(start)
            try:
                _pruner(peer, model, example, middle, steps=1).step()
                enough = counted_macs(model, example) <= limit
            except CRASHES as error:  # a smaller ratio may leave alone what breaks the network
                crash, high = str(error), middle
                continue
            if enough:
                high, best = middle, model
            else:
                low = middle
        if best is None:
            raise RuntimeError(f"the MACs do not come down to {ratio:g}: {crash}")
        yield ratio, best


def _iterative(
    peer: Peer, start: nn.Module, example: Tensor, batches: Batches, limits: Sequence[tuple[float, int]], dense: int
) -> Iterator[tuple[float, nn.Module]]:
    model = start
    pruner = _pruner(peer, model, example, 1.0, steps=SMALL_STEPS)
    macs, scored_at = counted_macs(model, example), None
    waiting = list(limits)
    for _ in range(SMALL_STEPS - 1):
        if scored_at is None or scored_at - macs >= _FRESH_AFTER.get(peer.importance, 1.0) * dense:
            feed(peer, pruner.importance, pruner, model, batches)
            scored_at = macs
        pruner.step()
        macs = counted_macs(model, example)
        while waiting and macs <= waiting[0][1]:
            yield waiting.pop(0)[0], copy.deepcopy(model)
        if not waiting:
            return
    raise RuntimeError(f"the MACs do not come down to {waiting[0][0]:g}")
