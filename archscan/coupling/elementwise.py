"""Rules for ops that work element by element: channels that meet are one unit."""

from collections.abc import Sequence

from archscan.capture import Node
from archscan.coupling.labels import Planes
from archscan.coupling.walk import Walk, rule, unite_all


@rule(
    *(
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "pow",
        "neg",
        "abs",
        "sqrt",
        "rsqrt",
        "exp",
        "log",
        "square",
        "reciprocal",
        "sign",
    ),
    *(
        "maximum",
        "minimum",
        "clamp",
        "clamp_min",
        "clamp_max",
        "where",
        "lerp",
        "addcmul",
        "addcdiv",
        "erf",
        "round",
        "floor",
    ),
    *(
        "relu",
        "relu6",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "sigmoid",
        "tanh",
        "hardtanh",
        "softplus",
    ),
    *("hardswish", "hardsigmoid", "log_sigmoid_forward", "softshrink", "hardshrink", "threshold", "sin", "cos", "fill"),
    *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "masked_fill", "native_dropout"),
)
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
