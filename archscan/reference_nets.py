"""The small networks of the pruning literature: a name in `REFERENCE_NETS` → an untrained `nn.Module`.

Every ``forward`` follows the sizes of its tensors; no width is written down in it. The exception is `PaddedShortcut`,
whose padding cannot be read from a tensor: it reads its own integer attributes, so that whoever removes channels can
change them.

The residual networks' state-dict keys (``conv1``, ``bn1``, ``layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}``, ``linear``) are
those under which weights for them are commonly shared, and their shortcuts hold no parameters.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MNIST_MEAN = (0.1307,)
MNIST_STD = (0.3081,)


def _initialise(model: nn.Module) -> None:
    """Draw convolution weights as He et al. (2015, eq. 10) do for rectifiers, by fan-out; the rest as PyTorch does."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _conv3x3(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, groups=groups, bias=False)


def _global_average(maps_NCHW: Tensor) -> Tensor:
    return torch.flatten(F.adaptive_avg_pool2d(maps_NCHW, 1), 1)


class LeNet5(nn.Module):
    """Two convolutions and two linear layers: the Caffe variant, 431 thousand parameters, of the pruning papers."""

    def __init__(self, in_channels: int, num_classes: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        height, width = (((size - 4) // 2 - 4) // 2 for size in image_size)
        if height < 1 or width < 1:
            raise ValueError(f"LeNet-5 needs images of at least 16 x 16, not {image_size[0]} x {image_size[1]}")
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * height * width, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Classify images."""
        x = F.max_pool2d(F.relu(self.conv1(x_NCHW)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


class PaddedShortcut(nn.Module):
    """Parameter-free shortcut: subsample in space and pad the channels with zeros (He et al. 2015, option A).

    Attributes:
        pad_before: Zero channels put before those of the input.
        pad_after: Zero channels put after them.
        stride: Every how many pixels one is kept.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.pad_before = (outputs - inputs) // 2
        self.pad_after = outputs - inputs - self.pad_before
        self.stride = stride

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Subsample and pad."""
        return F.pad(x_NCHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad_before, self.pad_after))

    def extra_repr(self) -> str:
        """Show the attributes that forward reads."""
        return f"pad_before={self.pad_before}, pad_after={self.pad_after}, stride={self.stride}"


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else PaddedShortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for 32 x 32 images: three stages of n basic blocks, 16, 32 and 64 channels wide."""

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = _conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        _initialise(self)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = _BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(_BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Classify images."""
        x = F.relu(self.bn1(self.conv1(x_NCHW)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(_global_average(x))


class CifarVGG16(nn.Module):
    """The thirteen convolutions of VGG-16, each followed by BatchNorm, and one linear layer."""

    stages = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for outputs, convs in self.stages:
            for _ in range(convs):
                layers += [_conv3x3(width, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
                width = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, num_classes)
        _initialise(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Classify images."""
        return self.classifier(_global_average(self.features(x_NCHW)))


class _DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = _conv3x3(inputs, growth)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], dim=1)


class _Transition(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class CifarDenseNet(nn.Module):
    """DenseNet without bottlenecks and without compression: three dense blocks, two transitions that keep the width."""

    def __init__(self, depth: int, growth: int, num_classes: int) -> None:
        super().__init__()
        layers_per_block = (depth - 4) // 3
        width = 16
        self.conv = _conv3x3(3, width)
        stages: list[nn.Module] = []
        for block in range(3):
            if block > 0:
                stages.append(_Transition(width))
            stages.append(nn.Sequential(*(_DenseLayer(width + i * growth, growth) for i in range(layers_per_block))))
            width += layers_per_block * growth
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, num_classes)
        _initialise(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Classify images."""
        x = F.relu(self.norm(self.stages(self.conv(x_NCHW))))
        return self.linear(_global_average(x))


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = (
            [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()] if expansion != 1 else []
        )
        self.expand = nn.Sequential(*expand)
        self.depthwise = nn.Sequential(
            _conv3x3(hidden, hidden, stride, groups=hidden), nn.BatchNorm2d(hidden), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 without the strides of the stem and of the second stage, so that 32 x 32 images end at 4 x 4."""

    stages = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    """Expansion, channels, blocks and stride of each stage (Sandler et al. 2018, table 2)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        width = 32
        self.stem = nn.Sequential(_conv3x3(3, width), nn.BatchNorm2d(width), nn.ReLU6())
        blocks: list[nn.Module] = []
        for expansion, outputs, count, stride in self.stages:
            for i in range(count):
                blocks.append(_InvertedResidual(width, outputs, stride if i == 0 else 1, expansion))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.Conv2d(width, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6())
        self.classifier = nn.Linear(1280, num_classes)
        _initialise(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Classify images."""
        return self.classifier(_global_average(self.head(self.blocks(self.stem(x_NCHW)))))


def lenet5(num_classes: int = 10, in_channels: int = 1, image_size: tuple[int, int] = (28, 28)) -> LeNet5:
    """Build LeNet-5; its first linear layer is as wide as `image_size` (height, width in pixels) makes it."""
    return LeNet5(in_channels, num_classes, (image_size[0], image_size[1]))


def cifar_resnet(depth: int, num_classes: int = 10) -> CifarResNet:
    """Build the CIFAR ResNet of `depth` layers."""
    return CifarResNet(depth, num_classes)


def vgg16_bn_cifar(num_classes: int = 10) -> CifarVGG16:
    """Build VGG-16 with BatchNorm for 32 x 32 images."""
    return CifarVGG16(num_classes)


def densenet40_cifar(num_classes: int = 10) -> CifarDenseNet:
    """Build DenseNet-40 with growth rate 12."""
    return CifarDenseNet(40, 12, num_classes)


def mobilenetv2_cifar(num_classes: int = 10) -> CifarMobileNetV2:
    """Build MobileNetV2 for 32 x 32 images."""
    return CifarMobileNetV2(num_classes)


@dataclass(frozen=True)
class ReferenceNet:
    """One row of `REFERENCE_NETS`.

    Attributes:
        factory: Builds it untrained; takes ``num_classes``.
        input_shape: Channels, height and width of its images.
        mean: Per-channel mean that its images are normalised with.
        std: Per-channel standard deviation, likewise.
        source: Where it comes from.
    """

    factory: Callable[..., nn.Module]
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


def _cifar(factory: Callable[..., nn.Module], source: str) -> ReferenceNet:
    return ReferenceNet(factory, (3, 32, 32), IMAGENET_MEAN, IMAGENET_STD, source)


REFERENCE_NETS: Mapping[str, ReferenceNet] = {
    "lenet5": ReferenceNet(
        lenet5, (1, 28, 28), MNIST_MEAN, MNIST_STD, "LeCun et al. 1998, as Han et al. 2015 prune it (20-50-500-10)"
    ),
    **{
        f"resnet{depth}_cifar": _cifar(partial(cifar_resnet, depth), "He et al. 2015, section 4.2, option A shortcuts")
        for depth in (20, 32, 44, 56, 110)
    },
    "vgg16_bn_cifar": _cifar(
        vgg16_bn_cifar, "Simonyan and Zisserman 2014, with BatchNorm as Li et al. 2017 prune it, one linear layer"
    ),
    "densenet40_cifar": _cifar(
        densenet40_cifar, "Huang et al. 2017, growth rate 12, without bottlenecks and compression"
    ),
    "mobilenetv2_cifar": _cifar(
        mobilenetv2_cifar, "Sandler et al. 2018, with the early strides taken out for 32 x 32 images"
    ),
}
"""Every reference network by name."""
