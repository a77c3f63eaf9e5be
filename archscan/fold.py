"""Fold gates into weights: model, coupling, gates → a new model whose consumers' weights are multiplied by the gates.

A gate multiplies a channel where it is consumed, and every consumer is linear in what it reads, so that its weight can
take the gate up: the network stays what it is, layer by layer, and costs nothing more. A depthwise convolution passes
its channel on instead of consuming it, and keeps its weight. A gate of 0 leaves the masked original.

The decision that is not obvious: only a weight that is a parameter as it stands, used for nothing else, can take up a
gate exactly. One that is computed (standardised, predicted, an activation) is refused where a kept gate differs from 1;
`foldable_units` tells beforehand.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from archscan.capture import ContractionMode, split_input, train_mode
from archscan.coupling.contractions import REPEATED, TRANSPOSED
from archscan.errors import BadInput, RebuildMismatch
from archscan.graph import Graph, Node
from archscan.groups import AxisUnits, Consumer, Coupling
from archscan.rebuild import apply
from archscan.surgery import Surgery, named_tensors
from archscan.verify import TOLERANCE, output_tensors


def foldable_units(coupling: Coupling) -> np.ndarray:
    """Say of every unit whether each of its consumers can take up a gate, shape [U].

    The gates of the others have to stay at 1 (or 0 where the unit goes).
    """
    able_U = np.ones(coupling.unit_count, dtype=bool)
    for consumer in coupling.consumers:
        if _obstacle(coupling, consumer):
            able_U[consumer.units[consumer.units >= 0]] = False
    return able_U


def fold_gates(model: nn.Module, coupling: Coupling, gates_U: np.ndarray, surgery: Surgery) -> nn.Module:
    """Fold the gates of what is kept into the slim network; the original is left unchanged.

    Args:
        model: The original.
        coupling: What coupling said about it.
        gates_U: One gate per unit; those of removed units do not matter.
        surgery: What cuts the original.

    Returns:
        A new, slim network: it computes what the original does with these gates, and 0 for what is removed.

    Raises:
        BadInput: The gates do not fit, or cannot be folded.
        RebuildMismatch: The surgery does not fit the model.
    """
    gates_U = _checked(gates_U, coupling.unit_count).copy()
    gates_U[_cut_units(coupling, surgery)] = 1.0  # what is cut need not be folded first
    return apply(gated(model, coupling, gates_U), surgery)


def gated(model: nn.Module, coupling: Coupling, gates_U: np.ndarray) -> nn.Module:
    """Fold gates into a copy of the original, at full width.

    Args:
        model: The original, left unchanged.
        coupling: What coupling said about it.
        gates_U: One gate per unit; 1 leaves a channel as it is, 0 is what `verify.masked_original` makes of it.

    Returns:
        A new network; in train mode, what only runs there (auxiliary heads) has no gates.

    Raises:
        BadInput: The gates do not fit, or a consumer cannot take one up.
    """
    gates_U = _checked(gates_U, coupling.unit_count)
    result = copy.deepcopy(model)
    tensors = dict(named_tensors(result))
    done: set[str] = set()
    for consumer in coupling.consumers:
        units = consumer.units[consumer.units >= 0]
        if consumer.weight in done or not (gates_U[units] != 1).any():
            continue
        if why := _obstacle(coupling, consumer):
            raise BadInput(
                f"the input of {consumer.module or 'the model'} cannot take up gates, since {why}; leave the gates of"
                " its channels at 1 (see foldable_units)"
            )
        done.add(consumer.weight)
        _scale(tensors[consumer.weight], _owner(coupling, consumer.weight), consumer, gates_U)
    return result


def _checked(gates_U: np.ndarray, unit_count: int) -> np.ndarray:
    gates_U = np.asarray(gates_U, dtype=np.float64)
    if gates_U.shape != (unit_count,) or not np.isfinite(gates_U).all():
        raise BadInput(
            f"gates_U has shape {gates_U.shape}, or is not finite; pass one finite gate for each of the {unit_count}"
            " units"
        )
    return gates_U


def _cut_units(coupling: Coupling, surgery: Surgery) -> np.ndarray:
    """List the units that a surgery removes."""
    removed: set[int] = set()
    for name, cuts in surgery.cuts.items():
        owners = {axis.axis: axis.units for axis in coupling.tensors.get(name, ()) if axis.units.ndim == 1}
        for cut in cuts:
            if cut.axis in owners and not cut.by_row:
                removed.update(np.delete(owners[cut.axis], np.asarray(cut.kept, dtype=np.int64)).tolist())
    return np.array(sorted(removed - {-1}), dtype=np.int64)


# Who can take up a gate -----------------------------------------------------------------------------------------------


def _obstacle(coupling: Coupling, consumer: Consumer) -> str:
    """Say why a consumer's weight cannot take up gates; empty where it can."""
    if (consumer.units < 0).all():
        return ""
    if not consumer.weight:
        return "its weight is computed in every forward"
    owners = [axis for axis in coupling.tensors.get(consumer.weight, ()) if axis.role == "in"]
    if len(owners) != 1:
        return f"{len(owners)} axes of {consumer.weight} read channels"
    same = [other for other in coupling.consumers if other.weight == consumer.weight]
    read = _channels(owners[0], len(consumer.units))
    if not all(np.array_equal(other.units, read) for other in same):
        return f"{consumer.weight} reads other channels in another call"
    readers = {other.contraction for other in same}
    if coupling.graph is not None and (node := _stranger(coupling.graph, consumer.weight, readers)) is not None:
        return f"{consumer.weight} is used at {node.where()} as well"
    return ""


def _owner(coupling: Coupling, weight: str) -> AxisUnits:
    return next(axis for axis in coupling.tensors[weight] if axis.role == "in")


def _channels(owner: AxisUnits, count: int) -> np.ndarray:
    """List the units of the `count` channels that a weight reads, in the order of the channels.

    The rows of a grouped convolution read other channels in every group of rows.
    """
    if owner.units.ndim == 1:
        return owner.units
    rows, places = owner.units.shape
    return owner.units[:: max(1, rows * places // count)].reshape(-1)


def _stranger(graph: Graph, weight: str, readers: set[int]) -> Node | None:
    """Find an op that uses a weight for anything but the contractions `readers`, also transposed."""
    numbers = {number for number, value in enumerate(graph.values) if value.name == weight}
    for node in graph.nodes:
        if not numbers & set(node.tensors) or node.contraction in readers:
            continue
        if str(node.op).split(".")[1] not in TRANSPOSED | REPEATED:
            return node
        numbers.update(number for number in node.outputs if number is not None)
    return None


def _scale(weight: Tensor, owner: AxisUnits, consumer: Consumer, gates_U: np.ndarray) -> None:
    """Multiply the slices of a weight that read gated channels."""
    gates_C = np.append(gates_U, 1.0)[consumer.units]  # unit -1 has no gate
    if owner.units.ndim == 2:
        rows, places = owner.units.shape
        groups = len(gates_C) // places
        factors = np.repeat(gates_C.reshape(groups, places), rows // groups, axis=0)
        shape = [rows, *[1] * (owner.axis - 1), places]
    else:
        factors, shape = gates_C, [*[1] * owner.axis, len(gates_C)]
    shape += [1] * (weight.ndim - len(shape))
    weight.detach().mul_(torch.from_numpy(factors).reshape(shape).to(weight))


# Proof ----------------------------------------------------------------------------------------------------------------


class _Gating(ContractionMode):
    """Multiply the consumers' inputs by gates while the model's forward runs inside this mode."""

    def __init__(self, coupling: Coupling, gates_U: Tensor) -> None:
        super().__init__()
        self.consumers = {
            number: [consumer for consumer in coupling.consumers if consumer.contraction == number]
            for number in {consumer.contraction for consumer in coupling.consumers}
        }
        self.gates_V = nn.functional.pad(gates_U, (0, 1), value=1.0)  # the last is that of channels without a unit

    def on_contraction(
        self, number: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        operands = list(args)
        for consumer in self.consumers.get(number, ()):
            if consumer.operand >= len(operands):
                raise BadInput(
                    f"the input of {consumer.module or 'the model'} is not passed as a positional tensor; capture the"
                    " model as it is run"
                )
            activation = operands[consumer.operand]
            shape = [1] * activation.ndim
            shape[consumer.axis] = len(consumer.units)
            factors = self.gates_V[torch.from_numpy(consumer.units)].reshape(shape)
            operands[consumer.operand] = activation * factors.to(activation)
        return func(*operands, **kwargs)


def check_fold(
    original: nn.Module, folded: nn.Module, coupling: Coupling, gates_U: np.ndarray, example_input: Any
) -> float:
    """See that a network with folded gates computes what the original does with gates at its consumers, in eval mode.

    Args:
        original: The original.
        folded: What `gated` made of it, or `fold_gates` where the gates of all removed units are 0.
        coupling: What coupling said about the original.
        gates_U: One gate per unit.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Returns:
        The largest absolute difference of any output.

    Raises:
        RebuildMismatch: It is larger than rounding explains.
    """
    args, kwargs = split_input(example_input)
    gates = torch.from_numpy(_checked(gates_U, coupling.unit_count))
    with train_mode(original, False), train_mode(folded, False), torch.no_grad():
        with _Gating(coupling, gates):
            expected = output_tensors(original(*args, **kwargs))
        found = output_tensors(folded(*args, **kwargs))
    return max(_differences(expected, found), default=0.0)


def _differences(expected: list[Tensor], found: list[Tensor]) -> Iterator[float]:
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        raise RebuildMismatch("the network with folded gates has outputs of other shapes; please report this network")
    for gates_at_inputs, folded in zip(expected, found, strict=True):
        error = float((gates_at_inputs.double() - folded.double()).abs().max()) if folded.numel() else 0.0
        scale = float(gates_at_inputs.double().abs().max()) if folded.numel() else 0.0
        if not error <= TOLERANCE.get(folded.dtype, TOLERANCE[torch.float32]) * scale:
            raise RebuildMismatch(
                f"folding gates into weights changed an output by {error:.3g} of {scale:.3g}, which is more than"
                " rounding; please report this network"
            )
        yield error
