"""How each op bounds its result: the table of rules for `ranges`, and the intervals that they compute with.

An extension is one function and one row here. Whatever an op without a row gives is taken for anything, so that a
missing rule costs findings and never soundness.

The decision that is not obvious: a convolution is bounded by channel, from the least and the largest value of each
channel read, which costs next to nothing; only outputs whose inputs are all points are really computed.

Shape suffixes: C channels, O outputs, K positions of a kernel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

INF = float("inf")
_ROUNDING = 1e-5
"""How far a sum in float32 may miss its bound, as a fraction of how far it can vary."""

_CHUNK = 1 << 24


@dataclass(frozen=True, eq=False)
class Range:
    """Least and largest value of each element, on the CPU; float64, but for parameters, which keep their own type.

    Ends that are one tensor are a parameter's or a buffer's own memory, which nothing may be written into.
    """

    low: Tensor
    high: Tensor

    @property
    def fixed(self) -> Tensor:
        """Which elements are points, boolean."""
        return (self.low == self.high) & self.low.isfinite()

    @property
    def is_memory(self) -> bool:
        """Whether this is a parameter or a buffer, or a view of one."""
        return self.low.numel() > 0 and self.low.data_ptr() == self.high.data_ptr()

    @property
    def is_point(self) -> bool:
        """Whether all elements are points."""
        return self.low is self.high or bool(self.fixed.all())

    def by_channel(self, axis: int) -> "Range":
        """Give the range of all elements of each index of an axis, shape [C]."""
        low, high = (end.movedim(axis, 0).flatten(1) for end in (self.low, self.high))
        return Range(low.amin(1), high.amax(1))


def point(tensor: Tensor) -> Range:
    """Give the range of a parameter or buffer, in its own memory where that is the CPU's."""
    own = tensor.detach().cpu()
    return Range(own, own)


def anything(shape: Sequence[int]) -> Range:
    """Give the range of what nothing is known of."""
    low = torch.full(tuple(shape), -INF, dtype=torch.float64)
    return Range(low, -low)


Rule = Callable[..., Range | None]
_Rule = TypeVar("_Rule", bound=Rule)
RULES: dict[str, Rule] = {}
"""Op → bounds of its first result, from ranges and plain arguments; None for anything."""

MONOTONE: frozenset[str] = frozenset(
    name
    for line in (
        "relu hardtanh clamp clamp_min clamp_max sigmoid tanh hardsigmoid elu selu celu softplus sqrt exp",
        "copy clone _to_copy cat stack roll flip index_select zero zeros_like ones_like _unsafe_view",
        "mean sum amax amin maximum minimum avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices",
        "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d",
        "constant_pad_nd reflection_pad2d replication_pad2d upsample_nearest2d upsample_bilinear2d",
    )
    for name in line.split()
)
"""Ops that do not fall where any of their floating arguments rises."""

BOUNDED_BELOW = frozenset({"silu", "gelu", "hardswish", "mish"})
"""Ops that are at least -0.4, not negative where their argument is not, and at most max(x, 0)."""


def rule(*names: str) -> Callable[[_Rule], _Rule]:
    """Register a rule.

    Raises:
        ValueError: An op has one.
    """

    def register(function: _Rule) -> _Rule:
        for name in names:
            if name in RULES or name in MONOTONE:
                raise ValueError(f"{name} has a rule")
            RULES[name] = function
        return function

    return register


def _as_range(value: Any) -> Range:
    if isinstance(value, Range):
        return value
    number = torch.tensor(float(value), dtype=torch.float64)
    return Range(number, number)


def _times(left: Tensor, right: Tensor) -> Tensor:
    """Multiply; nothing times anything finite is nothing."""
    return (left * right).nan_to_num(0.0, INF, -INF)


def _product(left: Range, right: Range) -> Range:
    corners = torch.stack([_times(a, b) for a in (left.low, left.high) for b in (right.low, right.high)])
    return Range(corners.amin(0), corners.amax(0))


def _sum(left: Range, right: Range) -> Range:
    return Range(left.low + right.low, left.high + right.high)


@rule("mul")
def _mul(left: Any, right: Any) -> Range:
    return _product(_as_range(left), _as_range(right))


@rule("div")
def _div(left: Any, right: Any, rounding_mode: str | None = None) -> Range | None:
    divisor = _as_range(right)
    if rounding_mode is not None or not bool(((divisor.low > 0) | (divisor.high < 0)).all()):
        return None
    return _product(_as_range(left), Range(1 / divisor.high, 1 / divisor.low))


@rule("add")
def _add(left: Any, right: Any, alpha: float = 1) -> Range:
    return _sum(_as_range(left), _product(_as_range(right), _as_range(alpha)))


@rule("sub")
def _sub(left: Any, right: Any, alpha: float = 1) -> Range:
    return _add(left, right, -alpha)


@rule("leaky_relu")
def _leaky_relu(data: Range, slope: float = 0.01) -> Range | None:
    if slope < 0:
        return None
    return Range(*(torch.where(end >= 0, end, _times(end, _as_range(slope).low)) for end in (data.low, data.high)))


def _affine(data: Range, weight: Range | None, bias: Range | None, shape: Sequence[int]) -> Range:
    for operand, combine in ((weight, _product), (bias, _sum)):
        if operand is not None:
            data = combine(data, Range(operand.low.reshape(shape), operand.high.reshape(shape)))
    return data


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def _batch_norm(
    data: Range, weight: Range | None, bias: Range | None, mean: Range | None, variance: Range | None, *rest: Any
) -> Range | None:
    training = len(rest) == 3 and rest[0]
    if mean is None or variance is None or training:
        return None
    inverse = Range((variance.high + rest[-1]).rsqrt(), (variance.low + rest[-1]).rsqrt())
    scale = inverse if weight is None else _product(inverse, weight)
    shape = [-1 if axis == 1 else 1 for axis in range(data.low.ndim)]
    centred = _sum(data, Range(-mean.high.reshape(shape), -mean.low.reshape(shape)))
    return _affine(centred, scale, bias, shape)


@rule("native_layer_norm")
def _layer_norm(data: Range, normalised: Sequence[int], weight: Range | None, bias: Range | None, *_: Any) -> Range:
    return _affine(anything(data.low.shape), weight, bias, list(normalised))


@rule("native_group_norm")
def _group_norm(data: Range, weight: Range | None, bias: Range | None, *_: Any) -> Range:
    return _affine(anything(data.low.shape), weight, bias, [-1] + [1] * (data.low.ndim - 2))


@dataclass(frozen=True, eq=False)
class _Contracted:
    """Bounds of Σ w x for each output, and whether all that it reads are points; shape [O] each."""

    low: Tensor
    high: Tensor
    exact: Tensor


def _contracted(channels: Range, moving_C: Tensor, weight_OCK: Tensor) -> _Contracted:
    """Bound what a layer gives for any x within the ranges of its channels, or 0 where a border is padded."""
    ends = channels.low.clamp(max=0), channels.high.clamp(min=0)
    (low_C, below_C), (high_C, above_C) = ((end.nan_to_num(0.0, 0.0, 0.0), end.isinf().double()) for end in ends)
    parts = []
    for part_OCK in weight_OCK.split(max(1, _CHUNK // max(1, weight_OCK[0].numel()))):
        up_OC, down_OC = (part_OCK.clamp(min=0).flatten(2).sum(2), part_OCK.clamp(max=0).flatten(2).sum(2))
        up_OC, down_OC = up_OC.double(), down_OC.double()
        low_O, high_O = up_OC @ low_C + down_OC @ high_C, up_OC @ high_C + down_OC @ low_C
        slack_O = _ROUNDING * (high_O - low_O)
        endless_low, endless_high = up_OC @ below_C - down_OC @ above_C, up_OC @ above_C - down_OC @ below_C
        low_O = torch.where(endless_low > 0, -INF, low_O - slack_O)
        high_O = torch.where(endless_high > 0, INF, high_O + slack_O)
        exact_O = (up_OC - down_OC) @ moving_C.double() == 0
        parts.append((low_O, high_O, exact_O))
    return _Contracted(*(torch.cat(column) for column in zip(*parts, strict=True)))


@rule("convolution")
def _convolution(
    data: Range,
    weight: Range,
    bias: Range | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    *rest: Any,
) -> Range | None:
    if transposed or not weight.is_point:
        return None
    groups = int(rest[-1])
    channels, moving_C = data.by_channel(1), ~data.fixed.movedim(1, 0).flatten(1).all(1)
    parts = zip(
        weight.low.flatten(2).chunk(groups),
        channels.low.chunk(groups),
        channels.high.chunk(groups),
        moving_C.chunk(groups),
        strict=True,
    )
    bounds = [_contracted(Range(low_C, high_C), moving, weight_OCK) for weight_OCK, low_C, high_C, moving in parts]
    shape = (1, -1, *[1] * (data.low.ndim - 2))
    low, high, exact = (
        torch.cat([getattr(bound, name) for bound in bounds]).reshape(shape) for name in ("low", "high", "exact")
    )
    if bool(exact.any()):
        points = torch.where(data.fixed, data.low, torch.zeros_like(data.low))
        computed = torch.ops.aten.convolution.default(
            points, weight.low.double(), None, stride, padding, dilation, transposed, *rest
        )
        low, high = (torch.where(exact, computed, end) for end in (low, high))
    return _affine(Range(low, high), None, bias, shape)


@rule("addmm")
def _addmm(bias: Range, data: Range, weight: Range, beta: float = 1, alpha: float = 1) -> Range | None:
    if beta != 1 or alpha != 1 or not weight.is_point:
        return None
    return _sum(_matrix_product(data, weight.low), bias)


@rule("mm")
def _mm(data: Range, weight: Range) -> Range | None:
    return _matrix_product(data, weight.low) if weight.is_point else None


def _matrix_product(data: Range, weight_CO: Tensor) -> Range:
    bound = _contracted(data.by_channel(1), ~data.fixed.all(0), weight_CO.T[:, :, None])
    if not bool(bound.exact.any()):
        return Range(bound.low, bound.high)
    computed = torch.where(data.fixed, data.low, torch.zeros_like(data.low)) @ weight_CO.double()
    return Range(torch.where(bound.exact, computed, bound.low), torch.where(bound.exact, computed, bound.high))
