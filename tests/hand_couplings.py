"""Tiny networks with couplings written by hand, so that cutting is tested apart from finding what to cut."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archscan.groups import AxisUnits, ChannelGroup, Coupling


@dataclass(frozen=True, eq=False)
class Case:
    """A network, an input, its coupling, what to keep, and the parameters that should be left."""

    model: nn.Module
    inputs: Tensor
    coupling: Coupling
    kept: Mapping[str, tuple[tuple[int, ...], ...]]
    parameters: int


def group(name: str, *fibres: Sequence[int], frozen: str | None = None) -> ChannelGroup:
    return ChannelGroup(name, tuple(tuple(fibre) for fibre in fibres), 1, (), frozen)


def owners(axis: int, units: Any, role: str = "affine") -> AxisUnits:
    return AxisUnits(axis, np.asarray(units), role)


def coupling(
    groups: Sequence[ChannelGroup], tensors: Mapping[str, Sequence[AxisUnits]], mixing: tuple[str, ...] = ()
) -> Coupling:
    count = sum(len(fibre) for each in groups for fibre in each.units)
    return Coupling(tuple(groups), count, {name: tuple(axes) for name, axes in tensors.items()}, (), mixing=mixing)


def norm(path: str, units: Sequence[int]) -> dict[str, list[AxisUnits]]:
    return {f"{path}.{name}": [owners(0, units)] for name in ("weight", "bias", "running_mean", "running_var")}


def chain() -> Case:
    """conv → BatchNorm → relu → conv → flatten → linear; a unit of `second` owns four features of the linear layer."""
    model = nn.Sequential()
    for name, module in {
        "first": nn.Conv2d(3, 6, 3, padding=1),
        "norm": nn.BatchNorm2d(6),
        "relu": nn.ReLU(),
        "second": nn.Conv2d(6, 4, 3, padding=1),
        "act": nn.PReLU(4),
        "pool": nn.AdaptiveAvgPool2d(2),
        "flat": nn.Flatten(),
        "head": nn.Linear(16, 5),
    }.items():
        model.add_module(name, module)
    a, b = range(6), range(6, 10)
    tensors = {
        "first.weight": [owners(0, a, "out")],
        "first.bias": [owners(0, a)],
        **norm("norm", a),
        "second.weight": [owners(0, b, "out"), owners(1, a, "in")],
        "second.bias": [owners(0, b)],
        "act.weight": [owners(0, b)],
        "head.weight": [owners(1, np.repeat(np.array(b), 4), "in")],
    }
    kept = {"first": ((0, 2, 5),), "second": ((1, 3),)}
    parameters = (3 * 27 + 3) + 6 + (2 * 27 + 2) + 2 + (5 * 8 + 5)
    return Case(
        model, torch.randn(2, 3, 8, 8), coupling([group("first", a), group("second", b)], tensors), kept, parameters
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.body = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        return self.head((x + self.body(x).relu()).mean((2, 3)))


def residual() -> Case:
    units = range(4)
    tensors = {
        "stem.weight": [owners(0, units, "out")],
        "stem.bias": [owners(0, units)],
        "norm.running_mean": [owners(0, units)],
        "norm.running_var": [owners(0, units)],
        "body.weight": [owners(0, units, "out"), owners(1, units, "in")],
        "head.weight": [owners(1, units, "in")],
    }
    return Case(
        Residual(), torch.randn(2, 3, 5, 5), coupling([group("stem", units)], tensors), {"stem": ((0, 3),)}, 8 + 36 + 6
    )


def depthwise() -> Case:
    """1 × 1 → depthwise with two outputs per channel → 1 × 1."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1, bias=False)
    )
    units, twice = range(4), [0, 0, 1, 1, 2, 2, 3, 3]
    tensors = {
        "0.weight": [owners(0, units, "out")],
        "0.bias": [owners(0, units)],
        "1.weight": [owners(0, twice, "out"), owners(1, [[unit] for unit in twice], "in")],
        "1.bias": [owners(0, twice)],
        "3.weight": [owners(1, twice, "in")],
    }
    return Case(model, torch.randn(2, 3, 5, 5), coupling([group("0", units)], tensors), {"0": ((1, 2),)}, 8 + 40 + 8)


def grouped() -> Case:
    """1 × 1 → two groups of 4 → 4 channels → 1 × 1; the fibres keep equally many but other channels."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1))
    a, b = [[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9, 10, 11], [12, 13, 14, 15]]
    tensors = {
        "0.weight": [owners(0, [*a[0], *a[1]], "out")],
        "1.weight": [owners(0, [*b[0], *b[1]], "out"), owners(1, [a[0]] * 4 + [a[1]] * 4, "in")],
        "1.bias": [owners(0, [*b[0], *b[1]])],
        "3.weight": [owners(1, [*b[0], *b[1]], "in")],
    }
    kept = {"0": ((0, 1, 3), (1, 2, 3)), "1": ((0, 3), (1, 2))}
    return Case(
        model, torch.randn(2, 3, 5, 5), coupling([group("0", *a), group("1", *b)], tensors), kept, 18 + 4 * 27 + 4 + 10
    )


def whole_groups() -> Case:
    """A grouped convolution that loses one of its three groups, in and out."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1, groups=3, bias=False), nn.ReLU(), nn.Conv2d(6, 2, 1))
    units = [0, 0, 1, 1, 2, 2]
    tensors = {
        "0.weight": [owners(0, units, "out")],
        "0.bias": [owners(0, units)],
        "1.weight": [owners(0, units, "out"), owners(1, [[unit] * 2 for unit in units], "in")],
        "3.weight": [owners(1, units, "in")],
    }
    return Case(
        model, torch.randn(2, 3, 5, 5), coupling([group("0", range(3))], tensors), {"0": ((0, 2),)}, 16 + 8 + 10
    )


def transposed() -> Case:
    """conv → grouped transposed conv → conv: the transposed weight has its inputs along axis 0."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, stride=2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    a, b = range(4), range(4, 10)
    tensors = {
        "0.weight": [owners(0, a, "out")],
        "0.bias": [owners(0, a)],
        "1.weight": [owners(0, a, "in"), owners(1, b, "out")],
        "1.bias": [owners(0, b)],
        "3.weight": [owners(1, b, "in")],
    }
    kept = {"0": ((0, 3),), "1": ((2, 3, 5),)}
    return Case(model, torch.randn(2, 3, 5, 5), coupling([group("0", a), group("1", b)], tensors), kept, 8 + 24 + 3 + 8)


class Shared(nn.Module):
    """One convolution under two names, one PReLU weight in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 2, 1)
        self.again = self.twice
        self.act, self.other = nn.PReLU(4), nn.PReLU(4)
        self.other.weight = self.act.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other(self.again(self.act(self.twice(self.stem(x))))))


def shared() -> Case:
    units = range(4)
    tensors = {
        "stem.weight": [owners(0, units, "out")],
        "stem.bias": [owners(0, units)],
        "twice.weight": [owners(0, units, "out"), owners(1, units, "in")],
        "act.weight": [owners(0, units)],
        "head.weight": [owners(1, units, "in")],
    }
    return Case(
        Shared(),
        torch.randn(2, 3, 5, 5),
        coupling([group("stem", units)], tensors),
        {"stem": ((1, 2, 3),)},
        12 + 9 + 3 + 8,
    )


def layer_norm() -> Case:
    """conv → LayerNorm over channels → linear: the slim network is not the masked original."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.head = nn.Conv2d(3, 6, 1), nn.LayerNorm(6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.norm(self.stem(x).mean((2, 3)))
            return {"logits": self.head(F.dropout(F.gelu(x), 0.1, self.training))}

    units = range(6)
    tensors = {
        "stem.weight": [owners(0, units, "out")],
        "stem.bias": [owners(0, units)],
        "norm.weight": [owners(0, units)],
        "norm.bias": [owners(0, units)],
        "head.weight": [owners(1, units, "in")],
    }
    mixed = coupling([group("stem", units)], tensors, mixing=("norm",))
    return Case(Net(), torch.randn(2, 3, 5, 5), mixed, {"stem": ((0, 1, 4),)}, 12 + 6 + 8)


EXACT = (chain, residual, depthwise, grouped, whole_groups, transposed, shared)
"""Cases in which the slim network must equal the masked original."""
