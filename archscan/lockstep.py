"""Run two networks in lockstep, layer by layer: networks, batches → pauses with what both computed there.

Each batch's forward pass runs in a thread of its own, which rests wherever a layer's outputs can be compared. Nothing
is computed twice and nothing is stored: what a resting forward pass holds is what it needs to go on. So a repair of
every layer, each on inputs that the layers before it, already repaired, produce, costs one forward pass of either
network, however deep, and works for any forward that a Python program can be.

Where to rest is found by a rehearsal of the original on one small batch. A `Place` is a convolution or linear layer
with its own weight, followed, where nobody else reads what is between, by a BatchNorm and by the sum that ends a
residual branch. Calls of Python functions are numbered in their order; both networks make the same calls.

The decision that is not obvious: threads, not copies of activations. Only one of them runs at any time.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from archscan.capture import ContractionMode
from archscan.errors import BadInput

LAYERS: frozenset[str] = frozenset({"conv1d", "conv2d", "linear"})
SUMS: frozenset[str] = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})
RECTIFIERS: frozenset[str] = frozenset({"relu", "relu_"})


@dataclass(frozen=True)
class Place:
    """A layer whose outputs both networks can be compared at.

    Attributes:
        weight: Path of its weight.
        call: Number of the call of the layer.
        norm_call: Number of the call of the BatchNorm that alone reads it; None where there is none.
        norm: Path of that BatchNorm's running mean; empty where there is none.
        sum_call: Number of the call that alone reads the result and adds a shortcut to it; None where there is none.
        branch: Which argument of the sum the result is.
        rectified: Whether a rectifier alone reads what comes out.
    """

    weight: str
    call: int
    norm_call: int | None = None
    norm: str = ""
    sum_call: int | None = None
    branch: int = 0
    rectified: bool = False

    @property
    def last_call(self) -> int:
        """Number of the call behind which outputs are compared."""
        return max(number for number in (self.call, self.norm_call, self.sum_call) if number is not None)


@dataclass(frozen=True)
class Rehearsal:
    """What a network's forward does, as far as repair goes.

    Attributes:
        places: In the order in which outputs are compared.
        skipped: Path or name of each other contraction, and why it is left alone.
        names: Name of the function of each call.
    """

    places: tuple[Place, ...]
    skipped: Mapping[str, str]
    names: tuple[str, ...]


# Rehearsal ------------------------------------------------------------------------------------------------------------

_Key = tuple[int, int]
"""A value: identity of its tensor, and the tensor's version, which rises when it is written to."""


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> _Key:
    return id(tensor), tensor._version


@dataclass
class _Call:
    """One call of a Python function, with its tensors kept alive so that identities stay unique."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: list[_Key]
    writes: list[_Key]
    changed: set[int]
    """Storages that it wrote to in place."""


class _Numbered(ContractionMode):
    """Number the calls of all Python functions on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # an attribute read such as `.shape`
            return func(*args, **(kwargs or {}))
        number, self.calls = self.calls, self.calls + 1
        return self.on_call(number, name, func, args, kwargs or {})

    def on_call(self, number: int, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run call `number`."""
        raise NotImplementedError


class _Rehearsing(_Numbered):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[_Call] = []

    def on_call(self, number: int, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        inputs = _tensors((args, kwargs))
        reads = [_key(tensor) for tensor in inputs]
        result = func(*args, **kwargs)
        changed = {
            tensor.untyped_storage().data_ptr()
            for tensor, (_, version) in zip(inputs, reads, strict=True)
            if tensor._version != version
        }
        outputs = _tensors(result)
        self.made.append(_Call(name, args, {**kwargs, "": outputs}, reads, [_key(t) for t in outputs], changed))
        return result


def rehearse(model: nn.Module, images: Tensor) -> Rehearsal:
    """Find the places of a network, which runs once and is left unchanged; it has to be in eval mode."""
    mode = _Rehearsing()
    with torch.no_grad(), mode:
        model(images)
    return _Analysis(mode.made, model).rehearsal()
