"""A second opinion on what a network costs: a model and an input → its MACs, counted on the model as it is.

The planner prices widths that do not exist yet. What comes out of it is counted again here on the finished network, by
fvcore, which knows nothing of our tables. The decision that is not obvious: where fvcore cannot trace a forward, the
finished network is recorded anew and counted by the table that priced it; this still catches every wrong width.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
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
        added: Functions that fvcore knows nothing of, and their share of the MACs, by rules given to it here.
    """

    macs: int
    by: Literal["fvcore", "archscan"]
    added: Mapping[str, int] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user has to know about this count, a sentence each."""
        if self.by == "archscan":
            return ("fvcore cannot trace this network; archscan counted the MACs of the slim one a second time.",)
        return tuple(
            f"fvcore does not count {name}; its {macs:,} MACs in the slim network are counted by a rule of archscan's."
            for name, macs in self.added.items()
        )


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
    counts = fvcore_counts(model, example_input)
    if counts is not None:
        added = {name: counts[name] for name in counts if name in _ADDED.values()}
        return Recount(sum(counts.values()), "fvcore", added)
    graph = capture(model, example_input)
    none = np.zeros(0, dtype=np.int64)
    return Recount(cost_model(graph, constant_sizes(graph), {}, none).evaluate("macs", none), "archscan")


def fvcore_macs(model: nn.Module, example_input: Any) -> int | None:
    """Count with fvcore, and with rules for what it misses; None where it cannot trace the model."""
    counts = fvcore_counts(model, example_input)
    return None if counts is None else sum(counts.values())


def fvcore_counts(model: nn.Module, example_input: Any) -> dict[str, int] | None:
    """Count as `fvcore_macs` does, by operator."""
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
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention)
        analysis.set_op_handle("aten::einsum", einsum_macs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        try:
            return {_ADDED.get(name, name): int(count) for name, count in analysis.by_operator().items()}
        except _NOT_TRACEABLE:
            return None


_ADDED = {
    "_padded_convolution": "a convolution padded by name",
    "_convolution_mode": "a convolution padded by name",
    "scaled_dot_product_attention": "scaled_dot_product_attention",
}
"""Operators as fvcore names those with a rule of ours → how a message names them."""


def _attention(inputs: list[Any], _outputs: list[Any]) -> int:
    """Count the two products of an attention: queries with keys, and what comes of it with values."""
    query, key, value = (value.type().sizes() for value in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _padded_convolution(inputs: list[Any], outputs: list[Any]) -> int:
    """Count a convolution whose padding is given by name (``"same"``), which fvcore leaves out; its own rule."""
    weight, result = (value.type().sizes() for value in (inputs[1], outputs[0]))
    return math.prod(result) * math.prod(weight[1:])


def einsum_macs(inputs: list[Any], outputs: list[Any]) -> float:
    """Count an einsum of two tensors: the product of all sizes; fvcore's own rule, which rounds, counts any other."""
    from fvcore.nn.jit_handles import einsum_flop_jit

    terms = inputs[0].toIValue().replace(" ", "").partition("->")[0].split(",")
    shapes = [value.type().sizes() for value in inputs[1].node().inputs()]
    if len(terms) != 2 or any("..." in term for term in terms):
        return float(einsum_flop_jit(inputs, outputs))
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, size in zip(term, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return float(math.prod(sizes.values()))


def _first_sample(leaf: Tensor) -> Tensor:
    return leaf[:1] if leaf.ndim else leaf
