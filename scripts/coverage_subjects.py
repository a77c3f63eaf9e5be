"""Open the networks of the sweep: name → module, example input, coupling, in the arithmetic that it is proven in.

The decision that is not obvious: a subject is randomised and in float64 from the start. What a freshly initialised
network hides (scales of one, biases of zero) and what rounding hides need no further copies then, and every stage of
the sweep, `archscan.slim` included, works on the very network that the proof is about.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from archscan.errors import BadInput
from archscan.groups import Coupling, couple
from archscan.randomize import near_activations, randomize
from archscan.recipes import Recipe, seeded
from archscan.recipes import build as build_recipe

SIDES = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384)
CLIPS = ((3, 4, 32, 32), (3, 8, 64, 64), (3, 16, 64, 64), (3, 16, 112, 112), (3, 16, 224, 224))

FLOAT64_PARAMETERS = 500_000_000
"""Networks with more parameters than this are proven in float32: the proof holds several copies, 22 GiB at 480
million."""


class DetectorCore(nn.Module):
    """The part of a torchvision detector that is a plain network: backbone, pyramid and dense heads."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

    def forward(self, images_NCHW: Tensor) -> Any:
        """Give everything that the detector's post-processing reads."""
        features = self.backbone(images_NCHW)
        return self.head(list(features.values()) if isinstance(features, Mapping) else [features])


@dataclass(frozen=True, eq=False)
class Opened:
    """A network of the sweep.

    Attributes:
        model: The network, randomised, in eval mode.
        example: One input, of the smallest size that the network takes.
        coupling: Its channel groups.
        recipe: How to build it again; None for what is no classifier.
        couple_s: CPU seconds of capture and grouping.
    """

    model: nn.Module
    example: Tensor
    coupling: Coupling
    recipe: Recipe | None
    couple_s: float


def _task(name: str) -> str:
    """Name the folder of torchvision that a network is of: ``detection``, ``video`` …; empty for classifiers."""
    import torchvision

    where = torchvision.models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
    return where.partition(".")[0] if "." in where else ""


def build(network: str, side: int | None = None, seed: int = 0) -> tuple[nn.Module, Recipe | None]:
    """Build a network, such as ``timm:resnet18`` or ``torchvision:fcos_resnet50_fpn``, with random weights.

    Args:
        network: Source and name.
        side: Size of the images that it is built for, where that is to be set.
        seed: Of the weights.

    Raises:
        BadInput: It cannot be built for that size.
    """
    source, _, name = network.partition(":")
    if source == "timm" or not _task(name):
        recipe = Recipe("timm" if source == "timm" else "torchvision", name, {"img_size": [side] * 2} if side else {})
        return build_recipe(recipe, seed=seed), recipe
    import torchvision

    where = _task(name)
    backbone = {"weights_backbone": None} if where in ("segmentation", "detection") else {}
    with seeded(seed):
        model = torchvision.models.get_model_builder(name)(weights=None, **backbone).eval()
    return (DetectorCore(model).eval() if where == "detection" else model), None


def _crop(name: str) -> list[int]:
    """Give the size of the images that the weights of a classifier of torchvision are for."""
    from torchvision.models import get_model_weights

    transforms: Any = next(iter(get_model_weights(name))).transforms
    return list(transforms().crop_size)


def _sizes(network: str) -> tuple[tuple[tuple[int, ...], ...], bool]:
    """List input shapes without the batch, the smallest first; say whether the network is built for one of them."""
    source, _, name = network.partition(":")
    channels, own, fixed = 3, 224, False
    if source == "timm":
        import timm

        config = timm.get_pretrained_cfg(name)
        if config is not None:
            channels, own, fixed = config.input_size[0], config.input_size[-1], bool(config.fixed_input_size)
    elif _task(name) == "video":
        return CLIPS, False
    least = 0
    if source == "torchvision" and _task(name) == "detection":
        least, own = 256, 320  # below, the top of a pyramid is one pixel; SSD300 has no top below 300
    elif source == "torchvision" and not _task(name):
        own = max(own, *_crop(name))
    sides = [*(side for side in SIDES if least <= side < own), own]
    return tuple((channels, side, side) for side in sides), fixed


def _tries(network: str, dtype: torch.dtype) -> Iterator[tuple[nn.Module, Recipe | None, tuple[int, ...]]]:
    """Yield the network with each input size, the smallest first; networks of a fixed size are built anew for each."""
    shapes, fixed = _sizes(network)
    if not fixed:
        model, recipe = build(network)
        prepared = randomize(model, 0).to(dtype)
        del model
        yield from ((prepared, recipe, shape) for shape in shapes)
        return
    for shape in shapes:
        try:
            model, recipe = build(network, None if shape == shapes[-1] else shape[-1])
        except BadInput:
            if shape == shapes[-1]:
                raise
            continue
        yield randomize(model, 0).to(dtype), recipe, shape


def _call(example: Tensor, model: nn.Module) -> object:
    return model(example)


def open_network(network: str, dtype: torch.dtype) -> Opened:
    """Open a network at the smallest input that it takes, in eval and in train mode.

    Args:
        network: Source and name.
        dtype: Of the weights and the input.

    Raises:
        BadInput: It takes none in this arithmetic.
        UnsupportedOp: It uses an op without a coupling rule.
    """
    last: BadInput | None = None
    for model, recipe, shape in _tries(network, dtype):
        example = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
        start = time.process_time()
        try:
            coupling = couple(model, example)
            seconds = time.process_time() - start
            near_activations(model, partial(_call, example), 0)
        except BadInput as error:
            last = error
        except RuntimeError as error:  # what runs on meta may lack a kernel, or mix two arithmetics
            last = BadInput((str(error).strip().splitlines() or [type(error).__name__])[0])
        else:
            return Opened(model, example, coupling, recipe, seconds)
    raise last or BadInput(f"{network} takes no input")


def build_for(network: str, shape: Sequence[int]) -> nn.Module:
    """Build a network for images of the shape that `open_network` found, as it is."""
    shapes, fixed = _sizes(network)
    return build(network, shape[-1] if fixed and tuple(shape) != shapes[-1] else None)[0]


def arithmetic(parameters: int) -> torch.dtype:
    """Say what a network of so many parameters is proven in."""
    return torch.float64 if parameters <= FLOAT64_PARAMETERS else torch.float32
