"""Build the networks of the sweep, and find the smallest input that each takes: name → module, example input."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from archscan.capture import capture
from archscan.errors import BadInput
from archscan.recipes import seeded

SIDES = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384)
CLIPS = ((3, 4, 32, 32), (3, 8, 64, 64), (3, 16, 64, 64), (3, 16, 112, 112), (3, 16, 224, 224))


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


def build(network: str, seed: int = 0) -> nn.Module:
    """Build a network, such as ``timm:resnet18`` or ``torchvision:fcos_resnet50_fpn``, with random weights."""
    source, _, name = network.partition(":")
    with seeded(seed):
        if source == "timm":
            import timm

            return timm.create_model(name, pretrained=False).eval()
        import torchvision

        factory = torchvision.models.get_model_builder(name)
        where = factory.__module__.removeprefix("torchvision.models.").partition(".")[0]
        backbone = {"weights_backbone": None} if where in ("segmentation", "detection") else {}
        model = factory(weights=None, **backbone).eval()
        return DetectorCore(model).eval() if where == "detection" else model


def _is_detector(name: str) -> bool:
    import torchvision

    return torchvision.models.get_model_builder(name).__module__.startswith("torchvision.models.detection")


def _shapes(network: str) -> Iterator[tuple[int, ...]]:
    """Yield input shapes without the batch, the smallest first; only its own where a network takes no other."""
    source, _, name = network.partition(":")
    channels, own, fixed = 3, 224, False
    if source == "timm":
        import timm

        config = timm.get_pretrained_cfg(name)
        if config is not None:
            channels, own, fixed = config.input_size[0], config.input_size[-1], bool(config.fixed_input_size)
    else:
        import torchvision

        if torchvision.models.get_model_builder(name).__module__.startswith("torchvision.models.video"):
            yield from CLIPS
            return
    least = 256 if source == "torchvision" and _is_detector(name) else 0  # below, the top of a pyramid is one pixel
    sides = [own] if fixed else [*(side for side in SIDES if least <= side < own), max(own, least)]
    yield from ((channels, side, side) for side in sides)


def smallest_input(network: str, model: nn.Module) -> Tensor:
    """Make noise of the smallest size that the network takes, in eval and in train mode.

    Raises:
        BadInput: It takes none.
    """
    last: BadInput | None = None
    for shape in _shapes(network):
        example = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        try:
            capture(model, example)
            capture(model, example, training=True)
        except BadInput as error:
            last = error
            continue
        return example
    raise last or BadInput(f"{network} takes no input")
