"""Place one gate per unit in a running model: coupling, one forward pass → probed or gated activations.

A `Gates` mode wraps a forward pass. At each consumer of `Coupling.consumers` it either multiplies the activation by
gates, or puts a probe there that reads Σ a · dL/da off in the backward pass. `gates.collect` is its one user.

Shape suffixes: N samples, U units, V units and a last column for channels of no unit, C channels of one consumer.

The decision that is not obvious: the probe saves the activation through autograd, which refuses to go on where the
activation was overwritten in place after it was consumed. The sum would be silently wrong otherwise.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from archscan.capture import ContractionMode, train_mode
from archscan.errors import BadInput
from archscan.groups import Consumer, Coupling
from archscan.layer_statistics import LayerWatch, read_call


@dataclass(frozen=True, eq=False)
class _Place:
    """A consumer whose index arrays lie on the model's device."""

    consumer: Consumer
    columns: Tensor
    """Column of each channel's gate in [N, V]: its unit, or U where it has none that could be removed."""

    @property
    def name(self) -> str:
        return self.consumer.module or "the model"

    def units(self, unit_count: int) -> np.ndarray:
        """Give the unit of each channel that could be removed, -1 for the others."""
        columns = self.columns.cpu().numpy()
        return np.where(columns < unit_count, columns, -1)

    def channel_axis(self, activation: Any) -> int:
        """Find the channel axis, from 0, of what was passed to the call, checking that it is what was captured."""
        where = f"the input of {self.name} (contraction {self.consumer.contraction})"
        if not isinstance(activation, Tensor):
            raise BadInput(
                f"{where} is not passed as a positional tensor, as it was at capture; capture the model as it is run"
            )
        axis = activation.ndim + self.consumer.axis
        if axis < 1 or activation.shape[axis] != len(self.columns):
            raise BadInput(
                f"{where} has shape {tuple(activation.shape)}, but capture saw {len(self.columns)} channels on axis"
                f" {self.consumer.axis} and samples on axis 0; capture the model again, as it is run"
            )
        return axis


class _Probe(torch.autograd.Function):
    """Pass a consumer's input through; going backward, hand it and its gradient to `record`.

    `anchor` is a leaf that requires grad: it makes the output require grad where the activation does not.
    """

    @staticmethod
    def forward(ctx: Any, activation: Tensor, anchor: Tensor, record: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(activation)  # autograd then refuses one that was overwritten since
        ctx.record = record
        return activation.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (activation,) = ctx.saved_tensors
        ctx.record(activation, grads[0])
        return grads[0] if ctx.needs_input_grad[0] else None, None, None


class Gates(ContractionMode):
    """Place probes or gates on the consumers' inputs while the model's forward runs inside this mode.

    Contractions are numbered from 0 at every call of the model, so that a loss may compute before, between and after.

    Attributes:
        samples: Samples of the batch that runs.
        output: What the model returned last.
        watch: Gets to know every layer that reads units; None where nobody wants to.
    """

    def __init__(self, coupling: Coupling, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.watch: LayerWatch | None = None
        self.coupling = coupling
        self.samples = 0
        self.output: Any = None
        self._places: dict[int, list[_Place]] = {}
        column_of_unit = _columns(coupling)
        for consumer in coupling.consumers:
            columns = column_of_unit[consumer.units]
            if (columns < coupling.unit_count).any():
                place = _Place(consumer, torch.from_numpy(columns).to(device))
                self._places.setdefault(consumer.contraction, []).append(place)
        if not self._places:
            raise BadInput(
                "no layer of the model reads a channel that could be removed, so that there is nothing to score"
            )
        self._running = False
        self._contractions = 0  # of the model's last call
        self._anchor = torch.zeros((), device=device, dtype=dtype, requires_grad=True)
        self._gates_NU: Tensor | None = None  # real gates; None where probes are placed
        self._gates_NV: Tensor | None = None
        self._sums_NV: Tensor | None = None  # where probes add what they read

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self._anchor.device

    def begin(self, samples: int, *, multiply: bool) -> None:
        """Prepare for one batch, with gates that multiply (for second-order statistics) or with probes."""
        self.samples, self.output, self._contractions, self._sums_NV = samples, None, 0, None
        self._gates_NU = self._gates_NV = None
        if multiply:
            self._gates_NU = self._anchor.new_ones(samples, self.coupling.unit_count).requires_grad_()
            self._gates_NV = nn.functional.pad(self._gates_NU, (0, 1), value=1.0)

    def enter_model(self, _module: nn.Module, _args: Any) -> None:
        """Number contractions from 0; a forward pre-hook of the model."""
        self._running, self.count = True, 0

    def leave_model(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Keep the output; a forward hook of the model."""
        self._running, self._contractions, self.output = False, self.count, output

    def require_placed(self) -> None:
        """Check that the model came to every place of a gate."""
        if self._contractions <= (last := max(self._places)):
            raise BadInput(
                f"the model ran {self._contractions} contractions, but capture saw at least {last + 1}; capture the"
                " model as it is run, and let loss_fn call the model itself"
            )

    def reader_of(self, unit: int) -> str:
        """Name the first module that reads `unit`."""
        readers = (place.consumer for places in self._places.values() for place in places)
        return next((reader.module for reader in readers if unit in reader.units), "") or "the model"

    def gradient(self, loss: Tensor, *, keep_graph: bool, differentiable: bool) -> Tensor:
        """Differentiate each sample's own loss by its gates, `loss` being the mean over samples; shape [N, U]."""
        if self._gates_NU is not None:
            (grad_NU,) = torch.autograd.grad(
                loss, self._gates_NU, retain_graph=keep_graph or differentiable, create_graph=differentiable
            )
            return self.samples * grad_NU
        self._sums_NV = self._anchor.new_zeros(self.samples, self.coupling.unit_count + 1)
        torch.autograd.grad(loss, self._anchor, retain_graph=keep_graph, allow_unused=True)
        return self.samples * self._sums_NV[:, :-1]

    def hessian_product(self, gradient_NU: Tensor, vector_NU: Tensor) -> Tensor:
        """Multiply each sample's Hessian by that sample's row of `vector_NU`, by double backward; shape [N, U].

        Args:
            gradient_NU: What `gradient` returned, differentiable; the graph is kept.
            vector_NU: One vector per sample.
        """
        assert self._gates_NU is not None
        if not gradient_NU.requires_grad:  # the loss is linear in the gates
            return torch.zeros_like(vector_NU)
        (product_NU,) = torch.autograd.grad(
            gradient_NU, self._gates_NU, vector_NU, retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(vector_NU) if product_NU is None else product_NU

    def on_contraction(
        self, number: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run contraction `number` on probed or gated operands."""
        operands = list(args)
        places = self._places.get(number, ()) if self._running else ()
        for place in places:
            index = place.consumer.operand
            operands[index : index + 1] = [self._gated(place, operands[index] if index < len(operands) else None)]
        result = func(*operands, **kwargs)
        if self.watch is not None:
            for place in places:
                call = read_call(func, operands, kwargs, place.consumer)
                self.watch.on_call(place.consumer, place.units(self.coupling.unit_count), call, self.samples, result)
        return result

    def _gated(self, place: _Place, activation: Any) -> Tensor:
        axis = place.channel_axis(activation)
        if activation.shape[0] % self.samples:
            raise BadInput(
                f"the input of {place.name} has leading size {activation.shape[0]}, which is no multiple of the batch's"
                f" {self.samples} samples, so that it has no gradient per sample"
            )
        if self._gates_NV is None:
            return _Probe.apply(activation, self._anchor, partial(self._record, place, axis))
        gates_NC = self._gates_NV[:, place.columns]
        frames = activation.shape[0] // self.samples
        shape = [activation.shape[0]] + [1] * (activation.ndim - 1)
        shape[axis] = len(place.columns)
        return activation * gates_NC.repeat_interleave(frames, 0).reshape(shape).to(activation.dtype)

    def _record(self, place: _Place, axis: int, activation: Tensor, grad: Tensor) -> None:
        """Add Σ a · dL/da over positions to the columns of the place's units."""
        assert self._sums_NV is not None
        with torch.no_grad():
            positions = [i for i in range(1, grad.ndim) if i != axis]
            product = activation * grad  # faster than einsum, whose batched dot products do not vectorise
            sums = product.sum(positions) if positions else product
            sums_NC = sums.reshape(self.samples, -1, sums.shape[1]).sum(1)
            self._sums_NV.index_add_(1, place.columns, sums_NC.to(self._sums_NV.dtype))


def _columns(coupling: Coupling) -> np.ndarray:
    """Number the column of each unit's gate: the unit itself, U for frozen ones; the last entry, U, serves unit -1.

    What is never removed needs no gate: its row of H would count interactions that never happen, and the way back from
    the first convolution to the image is the longest of all.
    """
    columns = np.arange(coupling.unit_count + 1)
    for group in coupling.groups:
        if group.frozen is not None:
            columns[np.asarray(group.units).reshape(-1)] = coupling.unit_count
    return columns


@contextmanager
def only_gates_differentiable(model: nn.Module, gates: Gates, seed: int) -> Iterator[None]:
    """Run in eval mode, with frozen parameters and its own random numbers, and put everything back."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    device = gates.device
    hooks = [
        model.register_forward_pre_hook(gates.enter_model, prepend=True),
        model.register_forward_hook(gates.leave_model, always_call=True),
    ]
    try:
        devices = [device] if device.type == "cuda" else []
        with train_mode(model, False), torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(seed)
            for parameter in required:
                parameter.requires_grad_(False)
            yield
    finally:
        gates.begin(0, multiply=False)  # lets go of the graph
        for hook in hooks:
            hook.remove()
        for parameter, value in required.items():
            parameter.requires_grad_(value)


def hessian_diagonal(gates: Gates, gradient_NU: Tensor, probes: int) -> Tensor:
    """Estimate the diagonal of the Hessian of the batch's mean loss.

    diag(H) = E[v ⊙ H v] over Rademacher v, drawn for each sample (Hutchinson 1990). Exact, by unit
    vectors, where there are no more units than probes.
    """
    samples, units = gradient_NU.shape
    if units <= probes:
        basis = torch.eye(units, dtype=gradient_NU.dtype, device=gradient_NU.device)
        products = [gates.hessian_product(gradient_NU, unit.expand(samples, units)) for unit in basis]
        return torch.stack(products, 2).double().mean(0).diagonal()
    total_U = torch.zeros(units, dtype=torch.float64, device=gradient_NU.device)
    for _ in range(probes):
        signs_NU = torch.randint_like(gradient_NU, 2) * 2 - 1
        total_U += (signs_NU * gates.hessian_product(gradient_NU, signs_NU)).double().mean(0)
    return total_U / probes


def device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Find where the model lives and the precision it computes in, at least float32 for what is accumulated."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, torch.promote_types(parameter.dtype, torch.float32)
    return torch.device("cpu"), torch.float32
