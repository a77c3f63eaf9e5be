"""The table ATen op → MACs from shapes: a recorded op → the factors whose product is its multiply-accumulates.

One multiply-accumulate is one FLOP here, and the counts are those of fvcore's `FlopCountAnalysis` on its default
handles: convolutions and matrix products; 2 per element of a batch norm in eval mode; 5 per element of a layer or
group norm (4 without affine parameters); the input of an adaptive average pool; upsampling. (fvcore rounds a general
``einsum`` to four digits; here it is exact.) The products of attention, of which fvcore knows nothing, are counted too.

Data format: a factor is an int or a `Size`, which is linear in the widths of channel groups, so that a formula prices
widths that do not exist yet. An op is free of cost (`IGNORED`), counted (`MAC_HANDLES`), or reported as uncounted.

The decision that is not obvious: a handle may look at the Python function that issued its op, because fvcore sees
functions (``adaptive_avg_pool2d``) where a dispatch mode sees what they decompose into (``mean``).
"""

from collections.abc import Callable
from dataclasses import dataclass

from archscan.errors import BadInput
from archscan.graph import Node, Ref
from archscan.sizes import Size

Sizes = tuple[Size, ...]
SizeOf = Callable[[int], Sizes]
"""Value number of a `Graph` → the size of each axis."""

Factors = tuple[int | Size, ...]


@dataclass(frozen=True)
class Call:
    """What a handle sees of an op: sizes and constants, never values or modules."""

    node: Node
    size_of: SizeOf

    def sizes(self, argument: int) -> Sizes:
        """Sizes of a positional tensor argument."""
        return self.size_of(self.node.args[argument].value)

    def has(self, argument: int) -> bool:
        """Whether a positional argument is a tensor (and not None)."""
        return len(self.node.args) > argument and isinstance(self.node.args[argument], Ref)

    @property
    def output(self) -> Sizes:
        """Sizes of the first output."""
        first = self.node.outputs[0]
        assert first is not None, "an op with a handle returns a tensor"
        return self.size_of(first)


Handle = Callable[[Call], Factors | None]
"""Factors of an op's MACs; None where this use of the op is free."""

MAC_HANDLES: dict[str, Handle] = {}


def register(*ops: str) -> Callable[[Handle], Handle]:
    """Enter a handle for ops such as ``aten::convolution`` into `MAC_HANDLES`.

    Raises:
        BadInput: One of them already has a handle, or is listed as free of cost.
    """

    def enter(handle: Handle) -> Handle:
        for op in ops:
            if op in MAC_HANDLES or op.removeprefix("aten::") in IGNORED:
                raise BadInput(f"{op} already has a cost; remove its entry before registering another")
            MAC_HANDLES[op] = handle
        return handle

    return enter


_VIEWS_AND_LAYOUT = """
    _reshape_alias _reshape_copy _to_copy _unsafe_index _unsafe_view alias as_strided cat channel_shuffle chunk
    clone col2im constant_pad_nd contiguous copy detach diagonal expand expand_as flip gather im2col index
    index_copy index_fill index_put index_select lift_fresh lift_fresh_copy masked_fill masked_scatter movedim
    narrow native_channel_shuffle permute pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d repeat
    repeat_interleave replication_pad1d replication_pad2d reshape resize roll rot90 scatter scatter_add select
    select_scatter slice slice_scatter split split_with_sizes squeeze stack swapaxes t take take_along_dim tile to
    transpose tril triu type_as unbind unfold unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze view
    view_as
"""
_CREATION = """
    _local_scalar_dense arange bernoulli embedding empty empty_like empty_permuted empty_strided equal eye fill full
    full_like is_same_size isfinite isinf isnan linspace meshgrid new_empty new_empty_strided new_full new_ones
    new_zeros nonzero normal one_hot ones ones_like rand rand_like randint randn randn_like randperm scalar_tensor
    uniform zero zeros zeros_like
"""
_ELEMENTWISE = """
    _prelu_kernel abs add addcdiv addcmul argmax argmin atan2 bitwise_and bitwise_not bitwise_or bitwise_xor ceil
    celu clamp clamp_max clamp_min cos div dropout elu eq erf exp expm1 floor floor_divide fmod frac ge gelu glu gt
    hardshrink hardsigmoid hardswish hardtanh le leaky_relu lerp log log10 log1p log2 log_sigmoid_forward
    logical_and logical_not logical_or logical_xor logit lt maximum minimum mish mul native_dropout ne neg pow prelu
    reciprocal relu relu6 remainder round rrelu rrelu_with_noise rsqrt rsub selu sgn sigmoid sign silu sin softplus
    softshrink sqrt square sub tan tanh threshold true_divide trunc where
"""
_REDUCTIONS_AND_POOLING = """
    _adaptive_avg_pool3d _log_softmax _safe_softmax _softmax adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d all amax amin aminmax any avg_pool1d avg_pool2d avg_pool3d cumprod cumsum linalg_vector_norm
    logsumexp max max_pool1d max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool2d min
    native_batch_norm_stats norm prod sort std std_mean sum topk var var_mean
"""
IGNORED: frozenset[str] = frozenset(f"{_VIEWS_AND_LAYOUT} {_CREATION} {_ELEMENTWISE} {_REDUCTIONS_AND_POOLING}".split())
"""ATen ops that cost nothing by fvcore's convention, without ``aten::`` and the ``_`` of in-place forms."""

MISSED_BY_FVCORE: frozenset[str] = frozenset({"scaled_dot_product_attention"})
"""Functions that fvcore knows nothing of. They are counted here, by the ops that they issue, and listed."""


@register("aten::convolution", "aten::_convolution")
def _convolution(call: Call) -> Factors:
    """Count output places × weight elements; a transposed convolution visits its input's places instead."""
    transposed = call.node.args[6]
    spatial = (call.sizes(0) if transposed else call.output)[2:]
    return (call.sizes(0)[0], *call.sizes(1), *spatial)


@register("aten::addmm")
def _addmm(call: Call) -> Factors:
    return (*call.sizes(1), call.sizes(2)[-1])


@register("aten::mm", "aten::bmm", "aten::matmul")
def _matmul(call: Call) -> Factors:
    return (*call.sizes(0), call.sizes(1)[-1])


@register("aten::linear")
def _linear(call: Call) -> Factors:
    return (*call.sizes(0), call.sizes(1)[0])


@register("aten::native_batch_norm", "aten::_native_batch_norm_legit")
def _batch_norm(call: Call) -> Factors:
    """Count 2 per element (1 without affine) with running statistics, else as a norm that computes its own."""
    uses_batch_statistics = call.node.args[5]
    affine = call.has(1)
    if uses_batch_statistics:
        return (5 if affine else 4, *call.sizes(0))
    return (2 if affine else 1, *call.sizes(0))


@register("aten::native_layer_norm")
def _layer_norm(call: Call) -> Factors:
    return (5 if call.has(2) else 4, *call.sizes(0))


@register("aten::native_group_norm")
def _group_norm(call: Call) -> Factors:
    return (5 if call.has(1) else 4, *call.sizes(0))


@register("aten::_adaptive_avg_pool2d", "aten::mean")
def _adaptive_avg_pool2d(call: Call) -> Factors | None:
    """Count the input of an adaptive pool, which arrives as a mean where its output is 1 × 1; other means are free."""
    return call.sizes(0) if call.node.function == "adaptive_avg_pool2d" else None


@register("aten::upsample_nearest2d")
def _upsample_nearest2d(call: Call) -> Factors:
    return call.output


@register("aten::upsample_bilinear2d", "aten::grid_sampler_2d")
def _four_per_output(call: Call) -> Factors:
    return (4, *call.output)


_PRODUCTS = frozenset(
    {"aten::convolution", "aten::_convolution", "aten::addmm", "aten::bmm", "aten::mm", "aten::matmul", "aten::linear"}
)


def counts_as_activation(node: Node, op: str) -> bool:
    """Whether fvcore's `ActivationCountAnalysis` counts the output; a bare ``torch.mm`` it leaves out."""
    bare = op == "aten::mm" and node.function == "mm"
    return op in _PRODUCTS and not bare and node.function not in MISSED_BY_FVCORE
