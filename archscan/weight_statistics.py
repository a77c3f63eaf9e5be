"""What weights alone say of units: model, coupling → arrays of shape [U]."""

from collections.abc import Collection

import numpy as np
from torch import nn

from archscan.errors import BadInput
from archscan.groups import Coupling, Role


def weight_norm(model: nn.Module, coupling: Coupling) -> np.ndarray:
    """Compute the L2 norm of all of a unit's weights: its slices of its producers and of its consumers, shape [U]."""
    return _norm(model, coupling, {"out", "in"})


def read_norm(model: nn.Module, coupling: Coupling) -> np.ndarray:
    """Compute the L2 norm of the weights by which a unit is read, its slices of its consumers, shape [U]."""
    return _norm(model, coupling, {"in"})


def _norm(model: nn.Module, coupling: Coupling, roles: Collection[Role]) -> np.ndarray:
    squares_U = np.zeros(coupling.unit_count)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for path, axes in coupling.tensors.items():
        if path not in parameters:
            continue
        squares = parameters[path].detach().double().square().cpu()
        for owner in axes:
            if owner.role not in roles:
                continue
            keep = {owner.axis} if owner.units.ndim == 1 else {0, owner.axis}
            summed = squares.numpy().sum(tuple(axis for axis in range(squares.ndim) if axis not in keep))
            owned = owner.units >= 0
            np.add.at(squares_U, owner.units[owned], summed[owned])
    if not np.isfinite(squares_U).all():
        raise BadInput(
            "the model's weights hold NaN or infinity; load weights that were saved from a sound training run"
        )
    return np.sqrt(squares_U)


def bn_scale(model: nn.Module, coupling: Coupling) -> np.ndarray:
    """Compute the mean abs(γ) over a unit's BatchNorm channels, NaN for units without one, shape [U].

    A BatchNorm is any module with a weight and a running mean, so that custom and frozen ones count too.
    """
    sums_U, counts_U = np.zeros(coupling.unit_count), np.zeros(coupling.unit_count)
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, axes in coupling.tensors.items():
        parent, _, name = path.rpartition(".")
        module = modules.get(parent)
        if name != "weight" or getattr(module, "running_mean", None) is None:
            continue
        scale = getattr(module, name).detach().double().abs().cpu().numpy()
        for owner in axes:
            owned = owner.units >= 0
            np.add.at(sums_U, owner.units[owned], scale[owned])
            np.add.at(counts_U, owner.units[owned], 1)
    if not counts_U.any():
        raise BadInput("no channel that could be removed has a BatchNorm; choose a criterion other than bn-scale")
    if not np.isfinite(sums_U).all():
        raise BadInput("a BatchNorm weight is NaN or infinite; load weights that were saved from a sound training run")
    return np.divide(sums_U, counts_U, out=np.full_like(sums_U, np.nan), where=counts_U > 0)


def group_of_unit(coupling: Coupling) -> np.ndarray:
    """Number each unit's channel group, -1 where it has none, shape [U]."""
    group_U = np.full(coupling.unit_count, -1)
    for number, group in enumerate(coupling.groups):
        group_U[np.asarray(group.units).reshape(-1)] = number
    return group_U


def summed(coupling: Coupling) -> np.ndarray:
    """Say of each unit whether sums write its channels, boolean, shape [U]."""
    summed_U = np.zeros(coupling.unit_count, dtype=bool)
    for group in coupling.groups:
        summed_U[np.asarray(group.units).reshape(-1)] = group.summed
    return summed_U


def weight_statistics(model: nn.Module, coupling: Coupling, needs: Collection[str]) -> dict[str, np.ndarray]:
    """Compute the statistics that no batch is needed for, and those that `sharpness` reads."""
    found: dict[str, np.ndarray] = {}
    if "weight_norm" in needs:
        found["weight_norm"] = weight_norm(model, coupling)
    if "bn_scale" in needs:
        found["bn_scale"] = bn_scale(model, coupling)
    if "group" in needs or "sharpness" in needs:
        found["group"] = group_of_unit(coupling)
    if "summed" in needs:
        found["summed"] = summed(coupling)
    if "read_norm" in needs or "sharpness" in needs:
        found["read_norm"] = read_norm(model, coupling)
    return found
