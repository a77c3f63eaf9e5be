"""Tiny float64 networks with the places of their gates written by hand, for the tests of gates and criteria."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archscan.gate_statistics import GateStatistics
from archscan.gates import collect
from archscan.groups import AxisUnits, Consumer, Coupling
from archscan.losses import classification_loss

CLASSES = 3


def consumer(contraction: int, module: str, units: range | list[int], axis: int = -3) -> Consumer:
    return Consumer(contraction, 0, axis, np.array(units), f"{module}.weight", module)


def owners(*axes: tuple[int, range | list[int], str]) -> tuple[AxisUnits, ...]:
    return tuple(AxisUnits(axis, np.array(units), role) for axis, units, role in axes)  # type: ignore[arg-type]


def trained_looking(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic a value that matters, in float64 and eval mode."""
    draw = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, dtype=torch.float64, generator=draw)
            tensor.copy_(
                1 + 0.3 * noise.abs() if "var" in name or tensor.ndim == 1 else noise / tensor[0].numel() ** 0.5
            )
    return model


class Chain(nn.Module):
    """conv, BatchNorm and in-place ReLU, twice, then two linear layers; the images' channels have no unit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
        self.fc1, self.fc2 = nn.Linear(5, 6), nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu_(self.bn1(self.conv1(images)))
        x = F.relu_(self.bn2(self.conv2(x))).mean((2, 3))
        return self.fc2(torch.tanh(self.fc1(x)))


class Residual(nn.Module):
    """One activation that two convolutions read and that is then added to in place; in-place ReLU on the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.inner, self.outer = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.side = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu_(self.bn(self.stem(images)))
        y = self.outer(F.silu(self.inner(x), inplace=True))
        y += x
        y += self.side(x)
        return self.fc(F.relu_(y).mean((2, 3)))


class Dense(nn.Module):
    """Concatenation read through a BatchNorm and an in-place ReLU, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 3)
        self.bn1, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(5), nn.Conv2d(5, 2, 1)
        self.fc = nn.Linear(2, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = torch.cat([x, self.conv1(F.relu_(self.bn1(x)))], 1)
        return self.fc(torch.tanh(self.conv2(F.relu_(self.bn2(x)))).mean((2, 3)))


class Attention(nn.Module):
    """Tokens with channels on the last axis, and fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Linear(3, 4), nn.Linear(4, 12)
        self.proj, self.fc = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images.flatten(2).transpose(1, 2)[:, :6])
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)  # one head
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return self.fc(F.gelu(x).mean(1))


class Frames(nn.Module):
    """Each sample's quadrants are folded into the batch axis, and back after two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1), nn.Linear(3, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        frames = images.unfold(3, 4, 4).permute(0, 3, 1, 2, 4).flatten(0, 1)
        maps = torch.tanh(self.conv2(torch.tanh(self.conv1(frames))))
        return self.fc(maps.mean((2, 3)).reshape(len(images), -1, 3).mean(1))


class Grouped(nn.Module):
    """A grouped convolution, read by a 1 x 1 convolution on images without any normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=2)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(images)))).mean((2, 3)))


@dataclass(frozen=True)
class Case:
    """A network and its gates."""

    name: str
    make: Callable[[], nn.Module]
    coupling: Coupling

    def model(self) -> nn.Module:
        return trained_looking(self.make())


CHAIN = Case(
    "chain",
    Chain,
    Coupling(
        (),
        15,
        {
            "conv1.weight": owners((0, range(4), "out")),
            "bn1.weight": owners((0, range(4), "affine")),
            "bn1.running_mean": owners((0, range(4), "affine")),
            "conv2.weight": owners((0, range(4, 9), "out"), (1, range(4), "in")),
            "bn2.weight": owners((0, range(4, 9), "affine")),
            "fc1.weight": owners((0, range(9, 15), "out"), (1, range(4, 9), "in")),
            "fc2.weight": owners((1, range(9, 15), "in")),
        },
        (
            consumer(0, "conv1", [-1, -1, -1]),
            consumer(1, "conv2", range(4)),
            consumer(2, "fc1", range(4, 9), -1),
            consumer(3, "fc2", range(9, 15), -1),
        ),
    ),
)
RESIDUAL = Case(
    "residual",
    Residual,
    Coupling(
        (),
        7,
        {},
        (
            consumer(1, "inner", range(4)),
            consumer(2, "outer", range(4, 7)),
            consumer(3, "side", range(4)),
            consumer(4, "fc", range(4), -1),
        ),
    ),
)
DENSE = Case(
    "dense",
    Dense,
    Coupling(
        (),
        6,
        {},
        (consumer(1, "conv1", range(3)), consumer(2, "conv2", [0, 1, 2, 3, -1]), consumer(3, "fc", [4, 5], -1)),
    ),
)
ATTENTION = Case(
    "attention",
    Attention,
    Coupling(
        (),
        8,
        {},
        (consumer(1, "qkv", range(4), -1), consumer(3, "proj", range(4, 8), -1), consumer(4, "fc", range(4), -1)),
    ),
)
FRAMES = Case(
    "frames",
    Frames,
    Coupling((), 7, {}, (consumer(1, "conv2", range(4)), consumer(2, "fc", range(4, 7), -1))),
)
GROUPED = Case(
    "grouped",
    Grouped,
    Coupling(
        (),
        8,
        {
            "conv1.weight": owners((0, range(4), "out")),
            "conv2.weight": (
                *owners((0, range(4, 8), "out")),
                AxisUnits(1, np.array([[0, 1], [0, 1], [2, 3], [2, 3]]), "in"),
            ),
            "fc.weight": owners((1, range(4, 8), "in")),
        },
        (consumer(1, "conv2", range(4)), consumer(2, "fc", range(4, 8), -1)),
    ),
)
CASES = (CHAIN, RESIDUAL, DENSE, ATTENTION, FRAMES, GROUPED)


def images_and_labels(samples: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 3, 8, 8, dtype=torch.float64, generator=draw)
    return images, torch.randint(CLASSES, (samples,), generator=draw)


def gather(
    case: Case, *needs: str, batches: Any = None, model: nn.Module | None = None, **options: Any
) -> GateStatistics:
    batches = [images_and_labels()] if batches is None else batches
    loss_fn = options.pop("loss_fn", classification_loss)
    return collect(model or case.model(), case.coupling, batches, loss_fn, frozenset(needs), **options)  # type: ignore[arg-type]
