"""A second opinion on what a network costs: a model and an input → its MACs, counted on the model as it is.

The planner prices widths that do not exist yet. What comes out of it is counted again here on the finished network, by
fvcore, which knows nothing of our tables. The decision that is not obvious: where fvcore cannot trace a forward, the
finished network is recorded anew and counted by the table that priced it; this still catches every wrong width.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from archscan.capture import capture, split_input, train_mode
from archscan.costs import constant_sizes, cost_model

_NOT_TRACEABLE = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""What fvcore and torch.jit raise on a forward that they cannot trace."""


@dataclass(frozen=True)
class Recount:
    """MACs of one sample.

    Attributes:
        macs: The number; one multiply-accumulate is one MAC.
        by: Who counted.
    """

    macs: int
    by: Literal["fvcore", "archscan"]


class _Positional(nn.Module):
    """A model whose keyword arguments are positional, since torch.jit traces no others."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Any) -> Any:
        """Call the model by keyword."""
        return self.model(**dict(zip(self.names, values, strict=True)))


def recount(model: nn.Module, example_input: Any) -> Recount:
    """Count the MACs of one sample; the model is left unchanged.

    Args:
        model: The network to count, on any device.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Raises:
        BadInput: The model cannot take the input.
    """
    macs = fvcore_macs(model, example_input)
    if macs is not None:
        return Recount(macs, "fvcore")
    graph = capture(model, example_input)
    none = np.zeros(0, dtype=np.int64)
    return Recount(cost_model(graph, constant_sizes(graph), {}, none).evaluate("macs", none), "archscan")


def fvcore_macs(model: nn.Module, example_input: Any) -> int | None:
    """Count with fvcore; None where it cannot trace the model."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    inputs = tree_map(lambda leaf: _first_sample(leaf).to(device) if isinstance(leaf, Tensor) else leaf, example_input)
    if isinstance(inputs, Mapping):
        model, inputs = _Positional(model, tuple(inputs)), tuple(inputs.values())
    args, _ = split_input(inputs)
    # Importing fvcore and tracing warn of what torch deprecates, which no user of archscan can change.
    with warnings.catch_warnings(action="ignore"), train_mode(model, False), torch.no_grad():
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(model, args)
        analysis.set_op_handle("aten::_convolution_mode", _padded_convolution)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        try:
            return int(analysis.total())
        except _NOT_TRACEABLE:
            return None


def _padded_convolution(inputs: list[Any], outputs: list[Any]) -> int:
    """Count a convolution whose padding is given by name (``"same"``), which fvcore leaves out; its own rule."""
    weight, result = (value.type().sizes() for value in (inputs[1], outputs[0]))
    return math.prod(result) * math.prod(weight[1:])


def _first_sample(leaf: Tensor) -> Tensor:
    return leaf[:1] if leaf.ndim else leaf
