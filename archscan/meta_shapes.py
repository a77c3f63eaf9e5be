"""Outputs of ATen ops on the meta device, by their sizes alone.

There torch derives most sizes through Python decompositions that take a hundred times as long as the op itself, and
most of a capture. Those of normalisations follow from a formula here; those of every other op that returns nothing but
new tensors are remembered, since networks repeat blocks and trials repeat networks. All else runs as usual.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Outputs = Tensor | tuple[Tensor, ...] | None


def _like(data: Tensor) -> Tensor | None:
    """Make an empty tensor of the same size and dense layout; None where the layout is not plain."""
    if data.is_contiguous() or (data.ndim == 4 and data.is_contiguous(memory_format=torch.channels_last)):
        return torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, device="meta")
    return None


def bare(tensor: Tensor) -> Tensor:
    """Make a tensor like this one on meta."""
    if tensor.is_contiguous() and not tensor.is_quantized:  # a twentieth of the time
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return torch.empty_like(tensor, device="meta")


def _empty(shape: Sequence[int], data: Tensor) -> Tensor:
    return torch.empty(shape, dtype=data.dtype, device="meta")


def _batch_norm(data: Tensor, *_args: Any) -> Outputs:
    result = _like(data)
    return None if result is None else (result, _empty(data.shape[1:2], data), _empty(data.shape[1:2], data))


def _layer_norm(data: Tensor, normalized_shape: Sequence[int], *_args: Any) -> Outputs:
    rows = [*data.shape[: data.ndim - len(normalized_shape)], *[1] * len(normalized_shape)]
    return _empty(data.shape, data), _empty(rows, data), _empty(rows, data)


_OUTPUTS: Mapping[Any, Callable[..., Outputs]] = {
    torch.ops.aten.native_batch_norm.default: _batch_norm,
    torch.ops.aten.native_layer_norm.default: _layer_norm,
}
"""Op → what makes its outputs from its arguments, or None where the case is not the plain one.

A network has normalisations of many sizes, and torch takes the longest to derive theirs.
"""

_PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default})

NORMALISATIONS = frozenset({torch.ops.aten.native_batch_norm.default, torch.ops.aten.native_layer_norm.default})
"""Ops whose other arguments say how they compute, not what they couple."""


_CONSTANTS = (int, float, bool, type(None), str, torch.dtype, torch.layout, torch.memory_format, torch.device)
"""Types of the arguments that sizes may depend on, besides tensors, and lists and tuples of all these."""

_IMPURE = frozenset(
    {
        torch.Tag.data_dependent_output,
        torch.Tag.dynamic_output_shape,
        torch.Tag.maybe_aliasing_or_mutating,
        torch.Tag.nondeterministic_seeded,
    }
)

_MOST = 10_000
"""How many outputs are remembered, of about 1 kB each, before all are forgotten."""

Shape = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Size, stride and type of a tensor."""

_remembered: dict[Any, tuple[Shape, ...]] = {}


class _NoKeyError(Exception):
    """An argument is of another kind than those that sizes are a function of."""


def _is_plain(tensor: Any) -> bool:
    if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_meta or tensor.layout is not torch.strided:
        return False
    return not (tensor.dtype.is_complex or tensor.is_quantized)


def _key(argument: Any) -> Any:
    """Say all about an argument that sizes may depend on."""
    kind = type(argument)
    if kind in _CONSTANTS:
        return kind, argument
    if kind in (list, tuple):
        return kind, *map(_key, argument)
    if not _is_plain(argument):
        raise _NoKeyError
    return argument.shape, argument.stride(), argument.dtype


@cache
def _is_pure(op: Any) -> bool:
    """Say whether an op returns nothing but new tensors, and changes none."""
    schema = op._schema
    if op.namespace != "aten" or schema.is_mutable or not _IMPURE.isdisjoint(op.tags):
        return False
    new = [str(output.type) == "Tensor" and output.alias_info is None for output in schema.returns]
    return bool(new) and all(new)


def run(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an op; on meta, make outputs of the size that they have instead, where that is known.

    Raises:
        RuntimeError: A product of several dtypes, which goes unseen on meta; and what the op raises.
    """
    if op in _PRODUCTS and len({argument.dtype for argument in args if isinstance(argument, Tensor)}) > 1:
        raise RuntimeError(f"{op} is given tensors of several dtypes")
    make = _OUTPUTS.get(op)
    if make is not None and isinstance(args[0], Tensor) and args[0].is_meta:
        made = make(*args, **kwargs)
        if made is not None:
            return made
    if not _is_pure(op):
        return op(*args, **kwargs)
    try:
        key = (op, torch.get_default_dtype(), *map(_key, args), *kwargs, *map(_key, kwargs.values()))
    except _NoKeyError:
        return op(*args, **kwargs)
    shapes = _remembered.get(key)
    if shapes is not None:
        made = tuple(torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in shapes)
        return made if len(op._schema.returns) > 1 else made[0]
    result = op(*args, **kwargs)
    _remember(key, result if isinstance(result, tuple) else (result,))
    return result


def _remember(key: Any, outputs: tuple[Any, ...]) -> None:
    if not all(_is_plain(output) for output in outputs):
        return
    if len(_remembered) >= _MOST:
        _remembered.clear()
    _remembered[key] = tuple((tuple(output.shape), output.stride(), output.dtype) for output in outputs)


class Running(TorchDispatchMode):
    """Run every op by `run`, and no more."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run(func, args, kwargs or {})
