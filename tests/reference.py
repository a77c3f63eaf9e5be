"""Slow, obvious implementations that tests compare with.

Gates are placed here by module hooks and by name, so that nothing is shared with the numbering of contractions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from archscan.groups import Coupling


@contextmanager
def gated(model: nn.Module, coupling: Coupling, gates_U: Tensor) -> Iterator[None]:
    """Multiply the input of every consumer's module by its units' gates."""

    def hook(units: np.ndarray, axis: int) -> Callable[..., Any]:
        def multiply(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            factors = torch.stack([gates_U[u] if u >= 0 else torch.ones_like(gates_U[0]) for u in units.tolist()])
            shape = [1] * args[0].ndim
            shape[axis] = len(units)
            return (args[0] * factors.reshape(shape), *args[1:])

        return multiply

    handles = [
        model.get_submodule(consumer.module).register_forward_pre_hook(hook(consumer.units, consumer.axis))
        for consumer in coupling.consumers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def loss_of_gates(model: nn.Module, coupling: Coupling, loss_fn: Any, batch: Any) -> Callable[[Tensor], Tensor]:
    """The loss of a batch as a function of the gates."""

    def loss(gates_U: Tensor) -> Tensor:
        with gated(model, coupling, gates_U):
            return loss_fn(model, batch)

    return loss


def ones(coupling: Coupling) -> Tensor:
    return torch.ones(coupling.unit_count, dtype=torch.float64)


def finite_difference_gradient(loss: Callable[[Tensor], Tensor], gates_U: Tensor, step: float = 1e-5) -> np.ndarray:
    """Central differences, one unit at a time."""
    gradient = np.empty(len(gates_U))
    with torch.no_grad():
        for u in range(len(gates_U)):
            moved = torch.zeros_like(gates_U)
            moved[u] = step
            gradient[u] = (loss(gates_U + moved) - loss(gates_U - moved)).item() / (2 * step)
    return gradient


def sample_gradients(model: nn.Module, coupling: Coupling, loss_fn: Any, batch: tuple[Tensor, ...]) -> np.ndarray:
    """Differentiate the loss of one sample at a time; shape [N, U]."""
    rows = []
    for n in range(len(batch[0])):
        single = tuple(part[n : n + 1] for part in batch)
        rows.append(torch.autograd.functional.jacobian(loss_of_gates(model, coupling, loss_fn, single), ones(coupling)))
    return torch.stack(rows).numpy()


def hessian(model: nn.Module, coupling: Coupling, loss_fn: Any, batch: Any) -> np.ndarray:
    """The dense Hessian of a batch's loss by the gates; shape [U, U]."""
    loss = loss_of_gates(model, coupling, loss_fn, batch)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, ones(coupling)).numpy()


def gauss_newton(model: nn.Module, coupling: Coupling, images: Tensor) -> np.ndarray:
    """Jᵀ (diag p − p pᵀ) J averaged over samples, J being the Jacobian of the logits by the gates; shape [U, U]."""
    total = np.zeros((coupling.unit_count, coupling.unit_count))
    for n in range(len(images)):

        def logits(gates_U: Tensor, image: Tensor = images[n : n + 1]) -> Tensor:
            with gated(model, coupling, gates_U):
                return model(image)[0]

        jacobian = torch.autograd.functional.jacobian(logits, ones(coupling)).numpy()
        p = logits(ones(coupling)).softmax(0).detach().numpy()
        total += jacobian.T @ (np.diag(p) - np.outer(p, p)) @ jacobian
    return total / len(images)
