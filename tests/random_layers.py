"""The vocabulary of random CNNs: one small module per pattern that real networks are made of.

Every module takes activations [N, C, *space] and returns activations of the same rank; its variants are the ways in
which people write the pattern.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORM = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
MAX_POOL = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
AVG_POOL = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
FUNCTIONAL_CONV = (F.conv1d, F.conv2d, F.conv3d)
ADAPTIVE = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
ADAPTIVE_MAX = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)


def resized(x: Tensor, like: Tensor) -> Tensor:
    """Pool an activation to the size in space of another."""
    return ADAPTIVE[x.ndim - 3](x, tuple(like.shape[2:]))  # type: ignore[arg-type]


def conv(dims: int, inputs: int, outputs: int, kernel: int = 1, **options: int | bool) -> nn.Module:
    return CONV[dims - 1](inputs, outputs, kernel, padding=kernel // 2, **options)  # type: ignore[arg-type]


def space(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


class Fit(nn.Module):
    """Give a second activation the channels and the size in space of the first."""

    def __init__(self, dims: int, first: Tensor, second: Tensor) -> None:
        super().__init__()
        same = first.shape[1] == second.shape[1]
        self.project = nn.Identity() if same else conv(dims, second.shape[1], first.shape[1])
        self.resize = first.shape[2:] != second.shape[2:]

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        second = self.project(second)
        return resized(second, first) if self.resize else second


class Binary(nn.Module):
    """A residual sum, a gate, a maximum: of two activations, in place or not."""

    def __init__(self, dims: int, first: Tensor, second: Tensor, variant: int) -> None:
        super().__init__()
        self.fit, self.variant = Fit(dims, first, second), variant

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        second = self.fit(first, second)
        if self.variant == 0:
            return first + second
        if self.variant == 1:
            return first * second.sigmoid()
        if self.variant == 2:
            first = first.clone()
            first += second
            return first
        if self.variant == 3:
            return torch.maximum(first, second)
        if self.variant == 4:
            return torch.where(second > 0, first, second)
        return torch.stack([first, second], 1).sum(1)


class Concat(nn.Module):
    """Concatenation along channels, once or with one activation twice."""

    def __init__(self, dims: int, first: Tensor, second: Tensor, variant: int) -> None:
        super().__init__()
        self.variant, self.resize = variant, first.shape[2:] != second.shape[2:]

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        if self.resize:
            second = resized(second, first)
        return torch.cat([first, second, first] if self.variant == 2 else [second, first], 1)


class Split(nn.Module):
    """Parts of the channels: by halves, by sizes in an attribute, or by bounds of slices."""

    def __init__(self, channels: int, variant: int) -> None:
        super().__init__()
        self.variant, self.bound = variant, max(1, channels // 3)
        self.upper, self.sizes = min(2 * self.bound, channels - 1), [self.bound, channels - self.bound]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.variant == 0:
            return x.chunk(2, 1)
        if self.variant == 1:
            return torch.split(x, self.sizes, 1)
        if self.variant == 2:
            return x[:, : self.bound], x[:, self.bound :]
        if self.variant == 3:
            return torch.split(x, x.shape[1] // 2, 1)[:2]
        if self.variant == 4:
            return x.narrow(1, 0, self.bound), x[:, -self.bound :]
        return x[:, self.bound : self.upper], torch.cat([x[:, : self.bound], x[:, self.upper :]], 1)


class Pick(nn.Module):
    """A single channel or a window of channels, by a number in the code or in an attribute, as a gate of all others."""

    def __init__(self, dims: int, channels: int, variant: int) -> None:
        super().__init__()
        self.variant, self.place, self.conv = variant, channels // 2, conv(dims, 1, channels)
        self.pair = conv(dims, min(2, channels - 1), channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.variant == 0:
            return x * x[:, :1].sigmoid()
        if self.variant == 1:
            return x + self.conv(x[:, self.place : self.place + 1])
        if self.variant == 2:
            return x + self.conv(x[:, self.place].unsqueeze(1))
        if self.variant == 3:
            return x * x.unbind(1)[-1].unsqueeze(1).sigmoid()
        if self.variant == 4:
            return x + self.pair(x[:, 1:3])
        return x + self.conv(x.split(1, 1)[self.place])


class Shuffle(nn.Module):
    """A channel shuffle, by the batch size of the input, by -1, or by the op itself."""

    def __init__(self, groups: int, variant: int) -> None:
        super().__init__()
        self.groups, self.variant = groups, variant

    def forward(self, x: Tensor) -> Tensor:
        if self.variant == 2:
            return F.channel_shuffle(x, self.groups)
        grouped = x.view(len(x), self.groups, x.shape[1] // self.groups, *x.shape[2:]).transpose(1, 2)
        if self.variant:
            return grouped.reshape(len(x), -1, *x.shape[2:])
        return grouped.contiguous().view_as(x)


class Reorder(nn.Module):
    """Channels in another order, or some of them."""

    order: Tensor

    def __init__(self, channels: int, variant: int) -> None:
        super().__init__()
        self.variant, self.shift = variant, channels // 2
        self.register_buffer("order", torch.arange(channels - 1, -1, -1))

    def forward(self, x: Tensor) -> Tensor:
        if self.variant == 0:
            return x.flip(1)
        if self.variant == 1:
            return x.flip(x.ndim - 1)
        if self.variant == 2:
            return torch.cat([x[:, self.shift :], x[:, : self.shift]], 1)
        if self.variant == 3:
            return x[:, ::2]
        return x.roll(self.shift, 1) if self.variant == 4 else x[:, self.order]


class SliceAdd(nn.Module):
    """Write into some channels of an activation in place."""

    def __init__(self, dims: int, channels: int, variant: int) -> None:
        super().__init__()
        self.variant, self.bound = variant, max(1, channels // 2)
        self.conv = conv(dims, channels if variant == 1 else self.bound, self.bound, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        if self.variant == 0:
            x[:, : self.bound] += self.conv(x[:, : self.bound])
        elif self.variant == 1:
            x[:, -self.bound :] = self.conv(x)
        else:
            part = x[:, : self.bound]
            part.mul_(self.conv(part).sigmoid())
        return x


class Pad(nn.Module):
    """Zeros before and after the channels, or around space."""

    def __init__(self, dims: int, variant: int) -> None:
        super().__init__()
        self.before, self.after = ((0, 2), (1, 1), (2, 1))[variant % 3]
        self.in_space, self.dims = variant >= 3, dims

    def forward(self, x: Tensor) -> Tensor:
        if self.in_space:
            return F.pad(x, (self.before, self.after) * self.dims)
        return F.pad(x, (0, 0) * self.dims + (self.before, self.after))


class SqueezeExcite(nn.Module):
    """Channel attention: by convolutions, by linear layers, or shared for the mean and the maximum."""

    def __init__(self, dims: int, channels: int, variant: int) -> None:
        super().__init__()
        self.variant, middle = variant, max(1, channels // 2)
        if variant == 0:
            self.reduce, self.expand = conv(dims, channels, middle), conv(dims, middle, channels)
        else:
            self.reduce, self.expand = nn.Linear(channels, middle), nn.Linear(middle, channels)

    def _gate(self, pooled: Tensor) -> Tensor:
        return self.expand(F.relu(self.reduce(pooled)))

    def forward(self, x: Tensor) -> Tensor:
        if self.variant == 0:
            return x * self._gate(x.mean(space(x), keepdim=True)).sigmoid()
        gate = self._gate(ADAPTIVE[x.ndim - 3](x, 1).flatten(1))
        if self.variant == 2:
            gate = gate + self._gate(ADAPTIVE_MAX[x.ndim - 3](x, 1).flatten(1))
        return x * gate.sigmoid().view(*x.shape[:2], *(1,) * (x.ndim - 2))


class AcrossChannels(nn.Module):
    """What mixes channels: a map of means and maxima, a convolution along channels, a softmax, means of groups."""

    def __init__(self, dims: int, channels: int, variant: int) -> None:
        super().__init__()
        self.variant, self.groups = variant, 2 if channels % 2 == 0 else 1
        self.conv = conv(dims, 2, 1, 3) if variant == 0 else nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.variant == 0:
            return x * self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()
        if self.variant == 1:
            gate = self.conv(x.mean(space(x)).unsqueeze(1)).transpose(1, 2)
            return x * gate.sigmoid().view(*x.shape[:2], *(1,) * (x.ndim - 2))
        if self.variant == 2:
            return x.softmax(1)
        if self.variant == 3:
            grouped = x.view(len(x), self.groups, -1, *x.shape[2:])
            return (grouped - grouped.mean(2, keepdim=True)).flatten(1, 2)
        return x.view(len(x), self.groups, -1, *x.shape[2:]).mean(2)


class ChannelsLast(nn.Module):
    """A linear layer or a LayerNorm on the last axis, between two permutations."""

    def __init__(self, channels: int, width: int, variant: int) -> None:
        super().__init__()
        if variant == 0:
            self.layer: nn.Module = nn.Linear(channels, width)
        elif variant == 1:
            self.layer = nn.Sequential(nn.Linear(channels, width), nn.GELU(), nn.Linear(width, channels))
        else:
            self.layer = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.movedim(1, -1)).movedim(-1, 1)


class Functional(nn.Module):
    """Parameters and buffers that a forward uses itself: scales, a weight, a kernel, a standardised weight."""

    blur: Tensor

    def __init__(self, dims: int, channels: int, width: int, variant: int) -> None:
        super().__init__()
        self.dims, self.variant = dims, variant
        self.scale = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(1, channels, *[1] * dims))
        self.unused = nn.Parameter(torch.zeros(channels))
        self.weight = nn.Parameter(torch.randn(width, channels, *[3] * dims) / channels)
        self.register_buffer("blur", torch.ones(channels, 1, *[3] * dims))

    def forward(self, x: Tensor) -> Tensor:
        convolve = FUNCTIONAL_CONV[self.dims - 1]
        if self.variant == 0:
            return x * self.scale.view(-1, *[1] * self.dims)
        if self.variant == 1:
            return x + self.bias
        if self.variant == 2:
            return convolve(x, self.weight, padding=1)
        if self.variant == 3:
            return convolve(x, self.blur, padding=1, groups=x.shape[1])
        if self.variant == 4:
            flat = self.weight.flatten(1)
            flat = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-5)
            return convolve(x, flat.view_as(self.weight), padding=1)
        return torch.einsum("nc...,oc->no...", x, self.weight.flatten(2)[..., 0])


class Standardised(nn.Module):
    """A standardised weight, grouped or not: by batch_norm as in timm, or by hand over all but the output axis."""

    def __init__(self, dims: int, channels: int, width: int, variant: int) -> None:
        super().__init__()
        self.by_hand, self.dims = variant % 2 == 1, dims
        groups = next(count for count in ((1,), (2, 3, 1), (4, 2, 1))[variant // 2] if channels % count == 0)
        self.conv = CONV[dims - 1](channels, groups * max(1, width // groups), 3, padding=1, groups=groups)
        self.gain = nn.Parameter(torch.ones(self.conv.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        if self.by_hand:
            spread, mean = torch.std_mean(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
            weight = self.gain.view(-1, *[1] * (self.dims + 1)) * (weight - mean) / (spread + 1e-3)
        else:
            flat = weight.reshape(1, self.conv.out_channels, -1)
            weight = F.batch_norm(flat, None, None, weight=self.gain, training=True).reshape_as(weight)
        return FUNCTIONAL_CONV[self.dims - 1](x, weight, self.conv.bias, padding=1, groups=self.conv.groups)


class Twice(nn.Module):
    """One module called twice, two modules with one weight, or one weight for two activations."""

    def __init__(self, dims: int, channels: int, variant: int) -> None:
        super().__init__()
        self.variant = variant
        self.conv, self.norm = conv(dims, channels, channels, 3), BATCH_NORM[dims - 1](channels)
        self.other = conv(dims, channels, channels, 3)
        if variant == 1:
            self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.variant == 0:
            return self.conv(F.relu(self.norm(self.conv(x))))
        if self.variant == 1:
            return self.other(F.relu(self.norm(self.conv(x))))
        return torch.cat([self.conv(x), F.relu(self.conv(self.other(x)))], 1)


class Attention(nn.Module):
    """Self-attention over places, with a product of activations."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(channels, size) for size in (width, width, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        scores = self.query(tokens) @ self.key(tokens).transpose(1, 2)
        return x + (scores.softmax(-1) @ self.value(tokens)).transpose(1, 2).reshape(x.shape)


class SelectiveKernel(nn.Module):
    """Two branches weighed by a softmax over the branches, from the sum of both."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.left, self.right = conv(dims, channels, channels, 3), conv(dims, channels, channels)
        self.reduce, self.expand = conv(dims, channels, 4), conv(dims, 4, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.left(x), self.right(x)], 1)
        gate = self.expand(F.relu(self.reduce(both.sum(1).mean(space(x), keepdim=True))))
        return (both * gate.view(len(x), 2, -1, *gate.shape[2:]).softmax(1)).sum(1)
