"""Rules for ops that work element by element: channels that meet are one unit."""

from collections.abc import Sequence

from archscan.coupling import planes
from archscan.coupling.labels import Planes
from archscan.coupling.walk import Walk, rule, unite_all
from archscan.graph import Node

_ARITHMETIC = """add sub rsub mul div pow neg abs sqrt rsqrt exp expm1 log log1p square reciprocal sign maximum minimum
    clamp clamp_min clamp_max where lerp addcmul addcdiv erf round floor ceil trunc remainder fmod fill sin cos atan2"""
_ACTIVATIONS = """relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid tanh hardtanh softplus hardswish
    hardsigmoid log_sigmoid_forward softshrink hardshrink threshold native_dropout"""
_LOGIC = """eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not isnan
    isinf isfinite nan_to_num masked_fill"""


@rule(*_ARITHMETIC.split(), *_ACTIVATIONS.split(), *_LOGIC.split())
def elementwise(walk: Walk, node: Node) -> Sequence[Planes]:
    """Unite the channels that meet in each element."""
    operands = [(walk.planes[number], walk.shape(number)) for number in node.tensors]
    result = unite_all(walk, walk.out_shape(node), operands, walk.where(node))
    return [result] * len(node.outputs)


@rule("copy", "copysign")
def copy(walk: Walk, node: Node) -> Sequence[Planes]:
    """Unite what is written with the place it is written to, whose labels stay."""
    elementwise(walk, node)
    return [walk.of(node.args[0])]


@rule("_prelu_kernel")
def prelu(walk: Walk, node: Node) -> Sequence[Planes]:
    """Unite each channel with its slope; the slope arrives reshaped to broadcast along axis 1."""
    return elementwise(walk, node)


@rule("glu")
def glu(walk: Walk, node: Node) -> Sequence[Planes]:
    """Unite the two halves place by place: one half gates the other."""
    axis = node.args[1] if len(node.args) > 1 else -1
    results = []
    for plane in walk.of(node.args[0]):
        if axis % plane.ndim not in planes.varying(plane):
            results.append(planes.compress(plane).expand(walk.out_shape(node)))
            continue
        first, second = plane.chunk(2, axis)
        walk.record.unite(first, second)
        results.append(first)
    return [tuple(results)]
