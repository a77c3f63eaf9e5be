"""What a layer reads and should give, position by position: a layer, batches → chunks of columns and targets.

A convolution's output at one position is its weights times one column of its im2col matrix. That matrix never exists as
a whole: positions come in chunks of whole images, and only those of a grid, where fewer are enough.

Shape suffixes: G groups of the convolution, K columns (inputs of one output), O outputs of one group, R rows
(positions of all images).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK_VALUES = 1 << 22
"""Numbers of the im2col matrix that exist at the same time, about."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution as it was called, and what is behind it; a linear layer is a 1 × 1 convolution.

    Attributes:
        weight: OIHW; not changed.
        bias: Per output, zeros where there is none; not changed.
        scale: Of the BatchNorm behind it, per output; ones where there is none.
        offset: Likewise; zeros where there is none.
        stride: Height and width.
        padding: Zeros to the left, to the right, above and below.
        dilation: Height and width.
        groups: Of the convolution.
        intercept: Whether the bias may change.
        rectified: Whether a rectifier, and nothing else, reads the result.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor
    offset: Tensor
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    intercept: bool = True
    rectified: bool = False

    @property
    def columns(self) -> int:
        """K: inputs of one output."""
        return self.weight[0].numel()

    def output_size(self, inputs_NCHW: Tensor) -> tuple[int, int]:
        """Give the height and width of the outputs."""
        left, right, top, bottom = self.padding
        height, width = inputs_NCHW.shape[2] + top + bottom, inputs_NCHW.shape[3] + left + right
        reach = [self.dilation[axis] * (self.weight.shape[2 + axis] - 1) + 1 for axis in (0, 1)]
        return (height - reach[0]) // self.stride[0] + 1, (width - reach[1]) // self.stride[1] + 1


@dataclass(frozen=True, eq=False)
class Sample:
    """One batch: what goes into a layer, and what should come out behind it; all NCHW.

    Attributes:
        inputs: Of the slim network.
        target: Of the original network, which may have more outputs.
        kept: Numbers of the outputs that the slim network has too; None for all.
        shortcut: What the slim network adds behind the layer; None where it adds nothing.
    """

    inputs: Tensor
    target: Tensor
    kept: Tensor | None = None
    shortcut: Tensor | None = None

    def fits(self, layer: Layer) -> bool:
        """Say whether each output of the layer has a target; not so where channels became positions."""
        outputs = self.target.shape[1] if self.kept is None else len(self.kept)
        shape = (len(self.inputs), len(layer.weight), *layer.output_size(self.inputs))
        return shape == (len(self.target), outputs, *self.target.shape[2:])


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some positions: columns, targets, and what is added behind the layer."""

    columns_GKR: Tensor
    target_GOR: Tensor
    shortcut_GOR: Tensor


def chunks(layer: Layer, samples: Sequence[Sample], skip: int) -> Iterator[Chunk]:
    """Cut batches into chunks of whole images, and leave out positions in a grid that shifts with the batch.

    Args:
        layer: What reads them.
        samples: The batches.
        skip: Every which position to take, in height and in width.
    """
    groups, outputs = layer.groups, len(layer.weight) // layer.groups
    for number, sample in enumerate(samples):
        start = number % skip, number // skip % skip
        target = thinned(sample.target, start, skip)
        if sample.kept is not None:
            target = target[:, sample.kept]
        shortcut = None if sample.shortcut is None else thinned(sample.shortcut, start, skip)
        images = max(1, _CHUNK_VALUES // max(1, target[0, 0].numel() * layer.columns * groups))
        for part in (slice(i, i + images) for i in range(0, len(target), images)):
            columns = columns_of(layer, sample.inputs[part], start, skip)
            yield Chunk(
                _by_group(columns, groups, layer.columns),
                _by_group(target[part].flatten(2), groups, outputs),
                columns.new_zeros(()) if shortcut is None else _by_group(shortcut[part].flatten(2), groups, outputs),
            )


def thinned(maps_NCHW: Tensor, start: tuple[int, int], skip: int) -> Tensor:
    """Take every `skip`-th position in height and width, from a start on that wraps around."""
    if skip == 1:
        return maps_NCHW
    height, width = maps_NCHW.shape[2:]
    return maps_NCHW[:, :, start[0] % height :: skip, start[1] % width :: skip]


def columns_of(layer: Layer, inputs_NCHW: Tensor, start: tuple[int, int], skip: int) -> Tensor:
    """Give the im2col matrix of each image, of every `skip`-th position in height and width; shape [N, G·K, R]."""
    sizes = layer.output_size(inputs_NCHW)
    top, left = (start[axis] % sizes[axis] * layer.stride[axis] for axis in (0, 1))
    strides = layer.stride[0] * skip, layer.stride[1] * skip
    padded = F.pad(inputs_NCHW, layer.padding)[:, :, top:, left:]
    return F.unfold(padded, layer.weight.shape[2:], layer.dilation, stride=strides)


def _by_group(values_NCR: Tensor, groups: int, size: int) -> Tensor:
    """Lay positions of all images side by side, group by group, in float32 or better."""
    images, _, rows = values_NCR.shape
    grouped = values_NCR.reshape(images, groups, size, rows).permute(1, 2, 0, 3)
    return grouped.to(torch.promote_types(values_NCR.dtype, torch.float32)).reshape(groups, size, images * rows)
