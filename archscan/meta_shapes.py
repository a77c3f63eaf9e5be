"""Outputs of common ATen ops on the meta device, by their sizes alone.

There torch derives the size of a normalisation, a broadcast or a mean through Python decompositions that take a hundred
times as long as the op itself, and most of a capture. Each function here returns the outputs, or None where the case is
not the plain one, and then the op runs as usual.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...] | None


def _like(data: Tensor) -> Tensor | None:
    """Make an empty tensor of the same size and dense layout; None where the layout is not plain."""
    if data.is_contiguous() or (data.ndim == 4 and data.is_contiguous(memory_format=torch.channels_last)):
        return torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, device="meta")
    return None


def _empty(shape: Sequence[int], data: Tensor) -> Tensor:
    return torch.empty(shape, dtype=data.dtype, device="meta")


def _batch_norm(data: Tensor, *_args: Any) -> Outputs:
    result = _like(data)
    return None if result is None else (result, _empty(data.shape[1:2], data), _empty(data.shape[1:2], data))


def _layer_norm(data: Tensor, normalized_shape: Sequence[int], *_args: Any) -> Outputs:
    rows = [*data.shape[: data.ndim - len(normalized_shape)], *[1] * len(normalized_shape)]
    return _empty(data.shape, data), _empty(rows, data), _empty(rows, data)


def _binary(left: Any, right: Any, **_options: Any) -> Outputs:
    """Take the size of the left operand where the right one broadcasts to it."""
    if not isinstance(left, Tensor) or not left.is_floating_point():
        return None
    if isinstance(right, Tensor):
        fits = right.ndim <= left.ndim and all(
            mine in (1, theirs) for mine, theirs in zip(right.shape[::-1], left.shape[::-1], strict=False)
        )
        if not fits or right.dtype != left.dtype or (right.shape == left.shape and right.stride() != left.stride()):
            return None
    return _like(left)


def _mean(data: Tensor, axes: Sequence[int] | None = None, keepdim: bool = False, **options: Any) -> Outputs:
    if axes is None or options or not data.is_floating_point():
        return None
    reduced = {axis % data.ndim for axis in axes}
    sizes = [1 if axis in reduced else size for axis, size in enumerate(data.shape) if keepdim or axis not in reduced]
    return _empty(sizes, data)


OUTPUTS: Mapping[Any, Callable[..., Outputs]] = {
    torch.ops.aten.native_batch_norm.default: _batch_norm,
    torch.ops.aten.native_layer_norm.default: _layer_norm,
    torch.ops.aten.add.Tensor: _binary,
    torch.ops.aten.mul.Tensor: _binary,
    torch.ops.aten.mean.dim: _mean,
}
"""Op → what makes its outputs from its arguments."""

NORMALISATIONS = frozenset({torch.ops.aten.native_batch_norm.default, torch.ops.aten.native_layer_norm.default})
"""Ops whose other arguments say how they compute, not what they couple."""
