"""Tiny networks, one coupling pattern each, with what coupling must say about them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.bn1(self.conv1(x)))
        x = F.relu_(self.bn2(self.conv2(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class NoBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.PReLU(6), nn.Conv2d(6, 4, 1))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.fc(F.relu(y).mean((2, 3)))


class DenseConcat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(10), nn.Conv2d(10, 4, 3, padding=1)
        self.fc = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        features.append(self.conv1(F.relu(self.norm1(features[0]))))
        features.append(self.conv2(F.relu(self.norm2(torch.cat(features, 1)))))
        return self.fc(torch.cat(features, 1).mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self, multiplier: int = 1) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.dw = nn.Conv2d(8, 8 * multiplier, 3, padding=1, groups=8)
        self.bn2, self.project = nn.BatchNorm2d(8 * multiplier), nn.Conv2d(8 * multiplier, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn2(self.dw(F.hardswish(self.bn1(self.expand(x))))))
        return self.fc(self.project(x).mean((2, 3)))


class Grouped(nn.Module):
    """A grouped convolution with `groups` groups between two ordinary ones, each 16 channels wide."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=groups), nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(self.conv3(x).mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.reduce, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.conv2, self.fc = nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn1(self.conv1(x)))
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return self.fc(self.conv2(x * gate.sigmoid()).mean((2, 3)))


class Shuffle(nn.Module):
    """Two branches, concatenated and shuffled as in ShuffleNet, then split by halves again."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.again, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), F.relu(self.right(x))], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        first, second = x.chunk(2, dim=1)
        return self.fc(torch.cat([first, self.again(second)], 1).mean((2, 3)))


class NativeShuffle(nn.Module):
    """`nn.ChannelShuffle` before a grouped convolution, and a transposed convolution with weight norm over axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.shuffle = nn.Conv2d(3, 12, 1), nn.ChannelShuffle(2)
        self.conv2 = nn.Conv2d(12, 8, 1, groups=2)
        self.up = nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(8, 6, 2, stride=2), dim=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.shuffle(F.relu(self.conv1(x))))
        return self.fc(F.relu(self.up(F.relu(x))).mean((2, 3)))


class Split(nn.Module):
    """Pieces of equal width, each with a convolution of its own, as in Res2Net; the width is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 6
        self.conv1, self.bn1 = nn.Conv2d(3, 18, 1, bias=False), nn.BatchNorm2d(18)
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
        self.conv3, self.fc = nn.Conv2d(18, 4, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = torch.split(F.relu(self.bn1(self.conv1(x))), self.width, 1)
        a = F.relu(self.convs[0](a))
        b = F.relu(self.convs[1](a + b))
        return self.fc(self.conv3(torch.cat([a, b, c], 1)).mean((2, 3)))


class OwnSizes(nn.Module):
    """Pieces whose sizes are listed one by one, two of them equal by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (6, 6, 4)
        self.conv, self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 3, padding=1)
        self.c, self.fc = nn.Conv2d(4, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = torch.split(F.relu(self.conv(x)), self.sizes, 1)
        return self.fc(F.relu(self.a(a) + self.b(b) + self.c(c)).mean((2, 3)))


class Flatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 6, 3, stride=2), nn.Linear(6 * 16, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_max_pool2d(F.relu(self.conv(x)), 4)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


class Shared(nn.Module):
    """One convolution called twice, and one weight registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 6, 1, bias=False), nn.Conv2d(8, 6, 1, bias=False)
        self.b.weight = self.a.weight
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.stem(x))))))
        return self.fc((self.a(x) + self.b(x.abs())).mean((2, 3)))


class PaddedShortcut(nn.Module):
    """A shortcut that pads channels with zeros, as option A of the CIFAR ResNets does."""

    def __init__(self) -> None:
        super().__init__()
        self.pad_before, self.pad_after = 4, 4
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.bn, self.head, self.fc = nn.BatchNorm2d(16), nn.Conv2d(16, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad_before, self.pad_after))
        return self.fc(self.head(F.relu(self.bn(self.conv(x)) + shortcut)).mean((2, 3)))


class Flip(nn.Module):
    """Channels added to themselves in reverse order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return self.fc(self.head(x + torch.flip(x, (1,)) * x).mean((2, 3)))


class SliceAdd(nn.Module):
    """The first channels get something added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.head, self.fc = nn.Conv2d(12, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.wide(x), self.narrow(x)
        y[:, : z.shape[1]] += z
        return self.fc(self.head(F.relu(y)).mean((2, 3)))


class StandardisedWeight(nn.Module):
    """A convolution whose weight is standardised over its inputs before use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        weight = self.conv2.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
        return self.fc(self.bn2(F.conv2d(x, weight, padding=1)).mean((2, 3)))


class ChannelsLast(nn.Module):
    """A ConvNeXt-like block: depthwise, LayerNorm over channels, two linears, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dw = nn.Conv2d(3, 8, 2, stride=2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.gamma, self.head = nn.Parameter(torch.ones(8)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = (self.gamma * self.fc2(F.gelu(self.fc1(y)))).permute(0, 3, 1, 2)
        return self.head((x + y).mean((2, 3)))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.bn, self.grouped = nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 6, 3, groups=6)
        self.head = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.up(F.relu(self.down(x))))
        return self.head(F.interpolate(self.grouped(x), scale_factor=2.0, mode="bilinear"))


class Auxiliary(nn.Module):
    """A second head that runs in training only, as GoogLeNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.aux, self.aux_fc = nn.Conv2d(8, 4, 1), nn.Linear(4, 5)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.relu(self.conv1(x))
        out = self.fc(self.drop(F.relu(self.conv2(x)).mean((2, 3))))
        return (out, self.aux_fc(F.relu(self.aux(x)).mean((2, 3)))) if self.training else out


class Functional(nn.Module):
    """Parameters used without modules, a positional table, and a buffer that scales channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.2)
        self.table = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.register_buffer("scale", torch.rand(8) + 0.5)
        self.matrix = nn.Parameter(torch.randn(8, 6) * 0.2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.weight, padding=1) + self.table) * self.scale.view(1, -1, 1, 1)
        return self.head(F.relu(x.mean((2, 3)) @ self.matrix))


class SelectiveKernel(nn.Module):
    """Two branches, stacked, weighted by a softmax over the branches, and summed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 5, padding=2)
        self.reduce, self.select = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 16, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([self.a(x), self.b(x).relu()], dim=1)
        weights = self.select(self.reduce(x.sum(1).mean((2, 3), keepdim=True)).relu())
        weights = weights.view(x.shape[0], 2, -1, 1, 1).softmax(dim=1)
        return self.fc((x * weights).sum(1).mean((2, 3)))


class SubPixel(nn.Module):
    """Channels traded for places, there and back again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.middle = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1)
        self.after, self.head = nn.Conv2d(20, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(F.pixel_shuffle(F.relu(self.conv(x)), 2))
        return self.head(self.after(F.pixel_unshuffle(x, 2)).mean((2, 3)))


class GatedLinear(nn.Module):
    """One half of the channels gates the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.head(F.glu(self.conv(x), dim=1)).mean((2, 3)))


class ChannelAttention(nn.Module):
    """A convolution that slides along the channels (ECA)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.slide = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv1d(1, 1, 3, padding=1)
        self.head, self.fc = nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        gate = self.slide(x.mean((2, 3)).unsqueeze(1)).squeeze(1).sigmoid()
        return self.fc(self.head(x * gate[:, :, None, None]).mean((2, 3)))


class Windows(nn.Module):
    """Space rolled, unfolded into windows, and read by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 4, 6)
        self.patches, self.fc = nn.Linear(6 * 9, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(F.relu(self.conv(x)), (1, 1), (2, 3))
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h // 2, w // 2, c * 4)
        x = self.mix(x).permute(0, 3, 1, 2)
        return self.fc(self.patches(F.unfold(x, 3).transpose(1, 2)).relu().mean(1))


class GroupNormed(nn.Module):
    """GroupNorms one after the other: groups must keep equally many channels each, or go as a whole."""

    def __init__(self, *groups: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12, 5)
        self.norm = nn.Sequential(*(nn.GroupNorm(count, 12) for count in groups))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class Volumes(nn.Module):
    """Three-dimensional convolutions on frames made of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8), nn.Conv3d(8, 6, (1, 3, 3))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv2(F.relu(self.bn(self.conv1(x.unsqueeze(1)))))).mean((2, 3, 4)))


class WeightNormed(nn.Module):
    """Weights split into direction and magnitude; the norm of a transposed one is over what it writes."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.conv1 = norm(nn.Conv2d(3, 8, 3, padding=1))
        self.conv2 = norm(nn.ConvTranspose2d(8, 6, 2) if transposed else nn.Conv2d(8, 6, 3))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))


class Folded(nn.Module):
    """Space unfolded into patches and folded back again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.spread, self.fc = nn.Conv2d(6, 4 * 9, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(F.relu(self.conv(x)), 3, padding=1)
        x = self.spread(F.relu(self.head(F.fold(patches, (12, 12), 3, padding=1))))
        return self.fc(F.relu(F.fold(x.flatten(2), (12, 12), 3, padding=1)).mean((2, 3)))


class Tokens(nn.Module):
    """A map of 16 channels turned into 9 tokens, some attention, and a head."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.stem, self.attention = nn.Conv2d(3, 16, 4, stride=4), attention
        self.position = nn.Parameter(torch.randn(1, 9, 16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)).flatten(2).transpose(1, 2) + self.position
        return self.fc((x + self.attention(x)).mean(1))


class Positions(nn.Module):
    """A code of positions, whose places are no channels, added before a BatchNorm over tokens and one over a map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.map, self.line = nn.Parameter(torch.randn(1, 8, 12, 12)), nn.Parameter(torch.randn(1, 6, 144))
        self.head, self.bn2, self.fc = nn.Conv2d(8, 6, 1), nn.BatchNorm1d(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(F.relu(self.bn1(self.conv(x) + self.map))).flatten(2)
        return self.fc(F.relu(self.bn2(x + self.line)).mean(2))


class Heads(nn.Module):
    """Attention of four heads from one projection, with a bias for each head, as in many hybrids."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.place = 4, 6
        self.qkv, self.proj = nn.Linear(16, 3 * 24), nn.Linear(24, 16)
        self.table = nn.Parameter(torch.randn(5, 4))
        self.register_buffer("index", torch.arange(81).view(9, 9) % 5)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        q, k, v = self.qkv(x).reshape(n, 9, 3, self.heads, self.place).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * 0.4) @ k.transpose(-2, -1) + self.table[self.index].permute(2, 0, 1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class FusedHeads(nn.Module):
    """Separate projections; channels come out in the order [place, head]."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.place = 3, 4
        self.q, self.kv, self.proj = nn.Linear(16, 12), nn.Linear(16, 24), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        q = self.q(x).view(n, 9, self.heads, self.place).transpose(1, 2)
        k, v = self.kv(x).view(n, 9, self.heads, 2 * self.place).transpose(1, 2).chunk(2, -1)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.permute(0, 2, 3, 1).flatten(2))


class MultiQuery(nn.Module):
    """Heads of queries that share one key and one value."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v, self.proj = nn.Linear(16, 20), nn.Linear(16, 5), nn.Linear(16, 5), nn.Linear(20, 16)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(x.shape[0], 9, self.heads, 5).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, self.k(x).unsqueeze(1), self.v(x).unsqueeze(1))
        return self.proj(x.transpose(1, 2).flatten(2))


class NormedHeads(nn.Module):
    """Queries normalised with weights that all heads share, so that no head may go; the values may get narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.q, self.k, self.v, self.proj = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 12), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.proj(((self.norm(q) @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class LinearAttention(nn.Module):
    """Keys meet values first, beside a column of ones that norms the result, as in EfficientViT."""

    def __init__(self) -> None:
        super().__init__()
        self.place = 4
        self.qkv, self.proj = nn.Linear(16, 3 * 12), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (-1, 3 * self.place)).transpose(1, 2).chunk(3, -1)
        x = q.relu() @ (k.relu().transpose(2, 3) @ F.pad(v, (0, 1), value=1.0))
        return self.proj((x[..., :-1] / (x[..., -1:] + 1.0)).transpose(1, 2).flatten(2))


class RelativePlaces(nn.Module):
    """Queries of every head meet one table of positions too, as in HaloNet."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 5
        self.qk, self.v, self.proj = nn.Linear(16, 30), nn.Linear(16, 20), nn.Linear(20, 16)
        self.places = nn.Parameter(torch.randn(9, 3))

    def forward(self, x: Tensor) -> Tensor:
        qk = self.qk(x).unflatten(2, (self.heads, 6)).transpose(1, 2)
        q, k = qk.split([3, 3], -1)
        scores = q @ k.transpose(2, 3) + q @ self.places.t()
        v = self.v(x).unflatten(2, (self.heads, 4)).transpose(1, 2)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class GroupedHeads(nn.Module):
    """A grouped convolution whose groups are the heads: its groups go with them."""

    def __init__(self) -> None:
        super().__init__()
        self.place = 2
        self.conv1, self.conv2 = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, stride=4, padding=1, groups=4)
        self.proj, self.fc = nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.relu(self.conv1(x))).flatten(2)
        q, k, v = x.view(x.shape[0], -1, 3 * self.place, 9).transpose(2, 3).chunk(3, -1)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.fc(F.relu(self.proj(x.transpose(1, 2).flatten(2))).mean(1))


class CrossCovariance(nn.Module):
    """The channels of a head attend to each other, as in XCiT; the product lies in memory as ``linear`` dislikes it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qkv, self.proj = nn.Linear(16, 3 * 12), nn.Linear(12, 16)
        self.heat = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 4, 1).unbind(0)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3) * self.heat
        return self.proj((scores.softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2))


class CodedTokens(Tokens):
    """Tokens with a code of places that a layer makes anew for every sample, of nothing that the samples hold."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__(attention)
        self.code = nn.Conv2d(1, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)) + self.code(torch.ones(len(x), 1, 3, 3, dtype=x.dtype, device=x.device))
        x = x.flatten(2).transpose(1, 2) + self.position
        return self.fc((x + self.attention(x)).mean(1))


class Stacked(nn.Module):
    """Two branches stacked and taken apart again; both must keep equally many channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1)
        self.c, self.d, self.fc = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(torch.stack([self.a(x), self.b(x)], 1))
        return self.fc((self.c(x[:, 0]) + self.d(x[:, 1])).relu().mean((2, 3)))


class OneHead(nn.Module):
    """Attention without heads: the queries and keys stay, the values may get narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 12), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj((self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x))


@dataclass(frozen=True)
class Case:
    """One network and what coupling must find: units of each live group, [fibres x steps], in order.

    `frozen` has the beginnings of all reasons but the network's input and output.
    """

    make: Callable[[], nn.Module]
    live: tuple[str, ...]
    mixing: bool = False
    frozen: tuple[str, ...] = ()


CASES = {
    "plain": Case(Plain, ("conv1 1x8", "conv2 1x12")),
    "no-batch-norm": Case(NoBatchNorm, ("body.0 1x8", "body.2 1x6", "body.4 1x4")),
    "residual": Case(Residual, ("stem 1x8", "conv1 1x6")),
    "dense-concat": Case(DenseConcat, ("stem 1x6", "conv1 1x4", "conv2 1x4")),
    "depthwise": Case(Depthwise, ("expand 1x8", "project 1x6")),
    "depthwise-multiplier": Case(lambda: Depthwise(2), ("expand 1x8", "project 1x6")),
    "grouped-places": Case(lambda: Grouped(2), ("conv1 2x8", "conv2 2x8", "conv3 1x6")),
    "grouped-whole": Case(lambda: Grouped(8), ("conv1 1x8", "conv3 1x6")),
    "squeeze-excite": Case(SqueezeExcite, ("conv1 1x8", "reduce 1x4", "conv2 1x6")),
    "shuffle": Case(Shuffle, ("left 2x4", "again 1x8")),
    "native-shuffle": Case(NativeShuffle, ("conv1 2x3", "conv2 2x4", "up 1x6"), mixing=True),
    "split": Case(Split, ("conv1 3x6", "convs.1 1x6", "conv3 1x4")),
    "own-sizes": Case(OwnSizes, ("conv 1x6", "conv#2 1x6", "conv#3 1x4", "a 1x8")),
    "flatten": Case(Flatten, ("conv 1x6", "fc1 1x10")),
    "shared": Case(Shared, ("stem 1x8", "a 1x6")),
    "padded-shortcut": Case(PaddedShortcut, ("stem 1x8", "conv 1x8", "head 1x6")),
    "flip": Case(Flip, ("conv 1x4", "head 1x6")),
    "slice-add": Case(SliceAdd, ("wide 1x4", "wide#2 1x8", "head 1x6")),
    "standardised-weight": Case(StandardisedWeight, ("conv1 1x8", "conv2 1x6"), mixing=True),
    "channels-last": Case(ChannelsLast, ("stem 1x8", "fc1 1x12"), mixing=True),
    "transposed": Case(Transposed, ("down 1x8", "up 1x6")),
    "auxiliary": Case(Auxiliary, ("conv1 1x8", "conv2 1x6", "aux 1x4")),
    "selective-kernel": Case(SelectiveKernel, ("a 1x8", "reduce 1x4")),
    "sub-pixel": Case(SubPixel, ("conv 1x3", "middle 1x5", "after 1x6")),
    "gated-linear": Case(GatedLinear, ("conv 1x8", "head 1x6")),
    "channel-attention": Case(ChannelAttention, ("conv 1x8", "head 1x6"), mixing=True),
    "windows": Case(Windows, ("conv 1x8", "mix 1x6", "patches 1x7")),
    "group-norm": Case(lambda: GroupNormed(2), ("conv 2x6",), mixing=True),
    "group-norm-of-single-channels": Case(lambda: GroupNormed(12), ("conv 1x12",)),
    "group-norms-in-turn": Case(lambda: GroupNormed(6, 12), ("conv 6x2",), mixing=True),
    "volumes": Case(Volumes, ("conv1 1x8", "conv2 1x6")),
    "weight-norm": Case(WeightNormed, ("conv1 1x8", "conv2 1x6")),
    "weight-norm-transposed": Case(lambda: WeightNormed(True), ("conv1 1x8", "conv2 1x6"), mixing=True),
    "folded": Case(Folded, ("conv 1x8", "head 1x6", "spread 1x4")),
    "positions": Case(Positions, ("conv 1x8", "head 1x6")),
    "heads": Case(lambda: Tokens(Heads()), ("stem 1x16", "attention.qkv 1x4")),
    "fused-heads": Case(lambda: Tokens(FusedHeads()), ("stem 1x16", "attention.q 1x3")),
    "multi-query": Case(
        lambda: Tokens(MultiQuery()), ("stem 1x16", "attention.q 1x4"), frozen=("contracted", "flattened")
    ),
    "normed-heads": Case(lambda: Tokens(NormedHeads()), ("stem 1x16", "attention.v 2x6"), frozen=("contracted",)),
    "linear-attention": Case(lambda: Tokens(LinearAttention()), ("stem 1x16", "attention.qkv 1x3")),
    "relative-places": Case(lambda: Tokens(RelativePlaces()), ("stem 1x16", "attention.qk 1x5"), frozen=("meets",)),
    "grouped-heads": Case(GroupedHeads, ("conv1 1x4", "proj 1x6")),
    "cross-covariance": Case(lambda: CodedTokens(CrossCovariance()), ("stem 1x16", "attention.qkv 1x4")),
    "stacked": Case(Stacked, ("a 2x8", "c 1x6")),
    "one-head": Case(lambda: Tokens(OneHead()), ("stem 1x16", "attention.v 1x12"), frozen=("contracted",)),
    "functional": Case(Functional, ("weight 1x8", "matrix 1x6")),
}

INPUT = torch.zeros(2, 3, 12, 12)
