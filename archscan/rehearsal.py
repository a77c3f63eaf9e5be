"""Rehearse a network on one small batch: model, images → the `Place`s where it can be repaired.

A place is a layer with a weight of its own, followed, where nobody else reads what is between, by a BatchNorm and by
the sum that ends a residual branch. Calls of Python functions on tensors are numbered in their order, so that a place
can be found again in another run, of this network or of a slimmed one.

The decision that is not obvious: who reads a value is taken from the run, by the identity of tensors and the version
that PyTorch counts up when one is written to. So what happens in place, or outside modules, is seen like all else.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from archscan.capture import CONTRACTIONS
from archscan.surgery import named_tensors

LAYERS: Mapping[str, int] = {"conv1d": 3, "conv2d": 4, "linear": 2}
"""Functions that can be solved for, and the least number of axes of their inputs."""

SUMS: frozenset[str] = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})
RECTIFIERS: frozenset[str] = frozenset({"relu", "relu_"})


@dataclass(frozen=True)
class Place:
    """A layer whose outputs can be compared between two networks.

    Attributes:
        weight: Path of its weight.
        function: Name of the function that multiplies by it.
        call: Number of the call of that function.
        norm_call: Number of the call of the BatchNorm that alone reads it; None where there is none.
        bias: Path of the bias of the layer, which takes up a mean; empty where it has none of its own.
        mean: Path of that BatchNorm's running mean, which does so where there is no bias; likewise.
        sum_call: Number of the call that alone reads the result and adds a shortcut to it; None where there is none.
        branch: Which argument of the sum the result is.
        rectified: Whether a rectifier alone reads what comes out.
    """

    weight: str
    function: str
    call: int
    norm_call: int | None = None
    bias: str = ""
    mean: str = ""
    sum_call: int | None = None
    branch: int = 0
    rectified: bool = False

    @property
    def last_call(self) -> int:
        """Number of the call whose result is compared."""
        return max(number for number in (self.call, self.norm_call, self.sum_call) if number is not None)


@dataclass(frozen=True)
class Rehearsal:
    """What a network's forward does, as far as repair goes.

    Attributes:
        places: In the order in which outputs are compared.
        skipped: Path of each other contraction's weight, or its name, and why it is left alone.
        largest_bytes: Size of the largest activation, for one image.
    """

    places: tuple[Place, ...]
    skipped: Mapping[str, str]
    largest_bytes: int


_Key = tuple[int, int]
"""A value: identity of its tensor, and the tensor's version, which rises when it is written to."""


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a function. Its tensors are kept alive, so that identities stay unique.

    `changed` holds the storages that it wrote to in place.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Tensor, ...]
    reads: tuple[_Key, ...]
    writes: tuple[_Key, ...]
    changed: frozenset[int]

    @property
    def matters(self) -> bool:
        """Whether it does anything with values: looking at a shape does not, nor does dropout in eval mode."""
        return bool(self.changed) or not set(self.writes) <= set(self.reads)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def function_name(func: Callable[..., Any]) -> str:
    """Name a function as Python does; empty where it has no name."""
    return getattr(func, "__name__", "")


class Numbered(TorchFunctionMode):
    """Number the calls of Python functions on tensors, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        number, self.count = self.count, self.count + 1
        return self.on_call(number, func, args, kwargs or {})

    def on_call(self, number: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run call `number`."""
        raise NotImplementedError


class _Rehearsing(Numbered):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def on_call(self, number: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = _tensors((args, kwargs))
        reads = tuple((id(tensor), tensor._version) for tensor in inputs)
        result = func(*args, **kwargs)
        outputs = tuple(_tensors(result))
        changed = [t for t, (_, version) in zip(inputs, reads, strict=True) if t._version != version]
        self.calls.append(
            _Call(
                function_name(func),
                args,
                kwargs,
                outputs,
                reads,
                tuple((id(tensor), tensor._version) for tensor in outputs),
                frozenset(tensor.untyped_storage().data_ptr() for tensor in changed),
            )
        )
        return result


def rehearse(model: nn.Module, images: Tensor) -> Rehearsal:
    """Find the places of a network, which runs once, has to be in eval mode, and is left unchanged."""
    mode = _Rehearsing()
    with torch.no_grad(), mode:
        model(images)
    finder = _Finder(model, mode.calls)
    found = [finder.place(number) for number, call in enumerate(mode.calls) if call.name in CONTRACTIONS]
    places = _one_branch_per_sum(finder, [place for place in found if isinstance(place, Place)])
    skipped = dict(reason for reason in found if not isinstance(reason, Place))
    largest = max((tensor.nbytes for call in mode.calls if call.matters for tensor in call.outputs), default=0)
    return Rehearsal(tuple(sorted(places, key=lambda place: place.last_call)), skipped, largest // len(images))


class _Finder:
    """Look up what reads what in a rehearsal."""

    def __init__(self, model: nn.Module, calls: Sequence[_Call]) -> None:
        self.calls = calls
        self.paths = {id(tensor): path for path, tensor in reversed(list(named_tensors(model)))}
        self.readers: dict[_Key, list[int]] = {}
        for number, call in enumerate(calls):
            for key in dict.fromkeys(call.reads if call.matters else ()):
                self.readers.setdefault(key, []).append(number)
        active = [call for call in calls if call.matters]
        used = Counter(tensor for call in active for tensor in {id(x) for x in _tensors((call.args, call.kwargs))})
        self.shared = {tensor for tensor, count in used.items() if count > 1}

    def place(self, number: int) -> Place | tuple[str, str]:
        """Describe a contraction, or name it and say why it is left alone."""
        call = self.calls[number]
        weight = call.args[1] if len(call.args) > 1 else None
        path = self.paths.get(id(weight), "") if isinstance(weight, nn.Parameter) else ""
        name = path or f"{call.name} (call {number})"
        if call.name not in LAYERS or call.args[0].ndim < LAYERS[call.name]:
            return name, f"{call.name} is not solved for"
        if not path:
            return name, "its weight is computed"
        if id(weight) in self.shared:
            return name, "its weight is used in several places"
        bare = Place(path, call.name, number, bias=self._own_bias(call))
        place = self._with_sum(self._with_norm(bare))
        overwritten = (self.calls[later].changed for later in range(number, place.last_call + 1))
        if any(call.args[0].untyped_storage().data_ptr() in storages for storages in overwritten):
            place = bare  # what it reads is gone before the end of the branch
        return self.with_rectifier(place)

    def with_rectifier(self, place: Place) -> Place:
        """Note whether a rectifier alone reads what comes out."""
        reader = self._only_reader(place.last_call)
        return replace(place, rectified=reader is not None and self.calls[reader].name in RECTIFIERS)

    def columns(self, place: Place) -> int:
        """Count the inputs of one output."""
        return self.calls[place.call].args[1][0].numel()

    def _with_norm(self, place: Place) -> Place:
        reader = self._only_reader(place.last_call)
        if reader is None or not _is_affine_norm(self.calls[reader]):
            return place
        mean = id(self.calls[reader].args[1])
        return replace(place, norm_call=reader, mean="" if mean in self.shared else self.paths.get(mean, ""))

    def _own_bias(self, call: _Call) -> str:
        bias = call.kwargs.get("bias", call.args[2] if len(call.args) > 2 else None)
        return self.paths.get(id(bias), "") if isinstance(bias, nn.Parameter) and id(bias) not in self.shared else ""

    def _with_sum(self, place: Place) -> Place:
        reader = self._only_reader(place.last_call)
        if reader is None:
            return place
        call, value = self.calls[reader], self.calls[place.last_call].writes[0]
        if call.name not in SUMS or len(call.args) != 2 or call.kwargs or len(call.outputs) != 1:
            return place
        if not all(isinstance(term, Tensor) and term.shape == call.outputs[0].shape for term in call.args):
            return place
        if call.reads[0] == call.reads[1]:
            return place
        return replace(place, sum_call=reader, branch=call.reads.index(value))

    def _only_reader(self, number: int) -> int | None:
        readers = self.readers.get(self.calls[number].writes[0], ())
        return readers[0] if len(readers) == 1 else None


def norm_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name the arguments of a call of ``torch.nn.functional.batch_norm``."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    return {"running_mean": None, "weight": None, "bias": None, "training": False, "eps": 1e-5} | given


def _is_affine_norm(call: _Call) -> bool:
    """Say whether this is a BatchNorm on running statistics, called as PyTorch's modules call it."""
    if call.name != "batch_norm" or len(call.args) < 3 or not isinstance(call.args[1], Tensor):
        return False
    return not norm_arguments(call.args, call.kwargs)["training"]


def _one_branch_per_sum(finder: _Finder, places: Sequence[Place]) -> list[Place]:
    """Where both terms of a sum are layers, let the one with more inputs answer for the sum."""
    chosen: dict[int, Place] = {}
    for place in places:
        if place.sum_call is not None:
            rival = chosen.setdefault(place.sum_call, place)
            if finder.columns(place) > finder.columns(rival):
                chosen[place.sum_call] = place
    return [
        place
        if place.sum_call is None or chosen[place.sum_call] is place
        else finder.with_rectifier(replace(place, sum_call=None))
        for place in places
    ]
