"""Second moments of what layers read and of the gradients of what they give: calls of layers → `LayerMoments`.

A layer is one call of a convolution or of a linear layer that reads units. At one position it computes y = W x, with x
a column of its im2col matrix. What criteria need of it are E[Σ x xᵀ], summed over positions, and E[mean δ δᵀ], averaged
over them, δ being the gradient of a sample's own loss by y. `probes` hands every call over, `gates.collect` asks.

Shape suffixes: G groups of a convolution, O outputs of one group, K columns (inputs of one output), R rows (positions
of all samples), C channels read.

The decision that is not obvious: large maps are looked at on a grid of positions, shifted from sample to sample, since
the Gram matrix of a 3 x 3 convolution costs up to nine times its forward pass. Which positions follows from the number
of the sample alone, so that the sums do not depend on the split into batches. Chunks are multiplied in the precision of
the activations and summed in float64.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from archscan.errors import BadInput
from archscan.groups import Consumer
from archscan.processes import Place

BLOCK_COLUMNS = 4608
"""Wider layers are described block by block; a Gram matrix takes 8 bytes times the square of it, 170 MB."""

_LEAST_POSITIONS = 64
_ROWS_OVER_COLUMNS = 4
_CHUNK_VALUES = 1 << 22
_FUNCTIONS = frozenset({"linear", "conv1d", "conv2d", "conv3d"})


@dataclass(frozen=True, eq=False)
class InputBlock:
    """Columns of one group of a layer, all columns of a unit together.

    Attributes:
        group: Which group of the convolution reads them.
        column_K: Their numbers among the inputs of one output of that group.
        unit_K: The unit of each, -1 where it belongs to none that could be removed.
        weight_OK: The group's weights on them, float64.
        gram_KK: Σ x xᵀ over samples and positions, float64.
        sum_K: Σ x, likewise.
    """

    group: int
    column_K: np.ndarray
    unit_K: np.ndarray
    weight_OK: np.ndarray
    gram_KK: np.ndarray
    sum_K: np.ndarray


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """What was seen of one layer's inputs.

    Attributes:
        module: Path of the module in whose forward the call is.
        samples: Samples seen.
        positions: Outputs per channel and sample.
        blocks: Second moments of the inputs; one block per group where no group is wider than `BLOCK_COLUMNS`.
    """

    module: str
    samples: int
    positions: float
    blocks: tuple[InputBlock, ...]


@dataclass(frozen=True, eq=False)
class LayerCall:
    """A layer as it was called, with inputs [rows, C, positions …] and weights [G·O, C / G, kernel …]."""

    inputs: Tensor
    weight: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    """As `torch.nn.functional.pad` takes it."""
    dilation: tuple[int, ...]
    groups: int
    output_axis: int = 1
    """Channel axis of the result."""

    @property
    def columns(self) -> int:
        """K: inputs of one output."""
        return self.weight[0].numel()


@dataclass(eq=False)
class _BlockSums:
    """An `InputBlock` on the device, while it is summed up."""

    group: int
    column_K: Tensor
    unit_K: np.ndarray
    whole: bool
    gram_KK: Tensor
    sum_K: Tensor

    def add(self, columns_GKR: Tensor, scale: float) -> None:
        columns_KR = columns_GKR[self.group]
        if not self.whole:
            columns_KR = columns_KR[self.column_K]
        self.gram_KK.add_(columns_KR @ columns_KR.T, alpha=scale)
        self.sum_K.add_(columns_KR.sum(1), alpha=scale)

    def finished(self, weight_GOK: Tensor) -> InputBlock:
        weight_OK = weight_GOK[self.group][:, self.column_K]
        parts = (part.cpu().numpy() for part in (weight_OK.double(), self.gram_KK, self.sum_K))
        return InputBlock(self.group, self.column_K.cpu().numpy(), self.unit_K, *parts)


@dataclass(eq=False)
class _LayerSums:
    module: str
    weight_GOK: Tensor
    blocks: tuple[_BlockSums, ...]
    samples: int = 0
    positions: float = 0.0
    gradient_GOO: Tensor | None = None


@dataclass
class LayerWatch:
    """Adds up the moments of all layers, while the model runs and goes backward.

    Attributes:
        inputs: Whether moments of inputs are wanted.
        gradients: Whether moments of the gradients of outputs are.
    """

    inputs: bool
    gradients: bool
    first_sample: int = 0
    """Samples in the batches before, whoever saw them."""
    _open: bool = False
    _layers: dict[int, _LayerSums] = field(default_factory=dict)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Let gradients count; there are backward passes of other losses, and through gradients, too."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def on_call(self, consumer: Consumer, unit_C: np.ndarray, call: LayerCall, samples: int, result: Tensor) -> None:
        """Add the inputs of a layer, and get ready for the gradient of its result.

        Args:
            consumer: The layer, as coupling knows it.
            unit_C: Unit of each channel that it reads, -1 for none that could be removed.
            call: What was called.
            samples: Of the batch.
            result: What it returned.
        """
        number = consumer.contraction
        if number not in self._layers:
            self._layers[number] = _start(call, unit_C, consumer.module)
        layer = self._layers[number]
        first_row = self.first_sample * len(call.inputs) // samples
        with torch.no_grad():
            for columns_GKR, scale in _chunks(call, first_row) if self.inputs else ():
                for block in layer.blocks:
                    block.add(columns_GKR, scale)
        outputs = result[0].numel() // len(call.weight)
        layer.samples += samples
        layer.positions = outputs * len(result) / samples
        if self.gradients and result.requires_grad:
            axis = call.output_axis  # a hook that knew the call would keep its inputs alive
            result.register_hook(lambda grad: self._on_gradient(layer, grad, axis, samples))

    def _on_gradient(self, layer: _LayerSums, grad: Tensor, axis: int, samples: int) -> None:
        """Add the gradient of a loss that is the mean over samples; leaves the gradient itself as it is."""
        if not self._open:
            return
        with torch.no_grad():
            groups, outputs = layer.weight_GOK.shape[:2]
            flat_GOR = grad.movedim(axis, 0).reshape(groups, outputs, -1) * samples
            product_GOO = (flat_GOR @ flat_GOR.transpose(1, 2)).double() / layer.positions
            layer.gradient_GOO = product_GOO if layer.gradient_GOO is None else layer.gradient_GOO + product_GOO

    def forget(self) -> None:
        """Let what was added up so far not count; which layers there are stays known."""
        for layer in self._layers.values():
            layer.samples, layer.gradient_GOO = 0, None
            for block in layer.blocks:
                block.gram_KK.zero_()
                block.sum_K.zero_()

    def merge(self, place: Place, last: int) -> None:
        """Add up what all processes saw.

        Args:
            place: Which process this is.
            last: The process that saw the last batch.
        """
        layers = self._in_order()
        seen = place.share([(layer.samples, layer.positions) for layer in layers])
        for number, layer in enumerate(layers):
            layer.samples = sum(of_process[number][0] for of_process in seen)
            layer.positions = seen[last][number][1]
            layer.weight_GOK = place.first(layer.weight_GOK)
            for block in layer.blocks if self.inputs else ():
                place.sum(block.gram_KK)
                place.sum(block.sum_K)
            if self.gradients:
                if layer.gradient_GOO is None:
                    groups, outputs = layer.weight_GOK.shape[:2]
                    layer.gradient_GOO = layer.weight_GOK.new_zeros(groups, outputs, outputs, dtype=torch.float64)
                place.sum(layer.gradient_GOO)

    def input_moments(self) -> tuple[LayerMoments, ...]:
        """Give what was added up of inputs, in the order of the calls.

        Raises:
            BadInput: A moment is not finite.
        """
        found = []
        for layer in self._in_order():
            blocks = tuple(block.finished(layer.weight_GOK) for block in layer.blocks)
            for block in blocks:
                _require_finite(block.gram_KK, layer.module)
            found.append(LayerMoments(layer.module, layer.samples, layer.positions, blocks))
        return tuple(found)

    def gradient_moments(self) -> tuple[np.ndarray, ...]:
        """Give Σ over samples of the mean of δ δᵀ over positions, [G, O, O] for each layer, likewise.

        Raises:
            BadInput: A moment is not finite.
        """
        found = []
        for layer in self._in_order():
            groups, outputs = layer.weight_GOK.shape[:2]
            moment_GOO = np.zeros((groups, outputs, outputs))  # where the loss does not depend on the layer
            if layer.gradient_GOO is not None:
                moment_GOO = layer.gradient_GOO.cpu().numpy()
                _require_finite(moment_GOO, layer.module)
            found.append(moment_GOO)
        return tuple(found)

    def _in_order(self) -> list[_LayerSums]:
        return [layer for _, layer in sorted(self._layers.items())]


def _require_finite(moment: np.ndarray, module: str) -> None:
    if not np.isfinite(moment).all():
        raise BadInput(
            f"second moments at {module or 'the model'} are not finite; check the weights and the images, or use"
            " float32"
        )


# One call -------------------------------------------------------------------------------------------------------------


def read_call(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], consumer: Consumer
) -> LayerCall:
    """Read a layer from its arguments, the input first; a linear layer is a convolution in one dimension.

    Raises:
        BadInput: It is neither a convolution nor a linear layer, or what it reads as its weight has units too.
    """
    name = getattr(function, "__name__", "")
    if name not in _FUNCTIONS or consumer.operand != 0:
        raise BadInput(
            f"{consumer.module or 'the model'} reads channels by {name or 'a function'}, and this criterion knows"
            " convolutions and linear layers only; choose another one, such as obd"
        )
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    call: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    call |= dict(zip(names, args, strict=False)) | dict(kwargs)
    inputs, weight = call["input"].detach(), call["weight"].detach()
    if name == "linear":
        rows = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        return LayerCall(rows.transpose(1, 2), weight[:, :, None], (1,), (0, 0), (1,), 1, -1)
    kernel = weight.shape[2:]
    stride, dilation = (_per_axis(call[key], len(kernel)) for key in ("stride", "dilation"))
    return LayerCall(inputs, weight, stride, _padding(call["padding"], kernel, dilation), dilation, int(call["groups"]))


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return tuple(int(size) for size in (sizes if len(sizes) == axes else sizes * axes))


def _padding(value: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Give the zeros before and after each axis, the last axis first."""
    if value == "same":
        totals = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(size, size) for size in _per_axis(0 if value == "valid" else value, len(kernel))]
    return tuple(side for pair in reversed(sides) for side in pair)


def _start(call: LayerCall, unit_C: np.ndarray, module: str) -> _LayerSums:
    """Cut the columns of each group into blocks, all columns of a unit in the same block."""
    weight_GOK = call.weight.reshape(call.groups, -1, call.columns)
    unit_GK = unit_C.reshape(call.groups, -1).repeat(prod(call.weight.shape[2:]), axis=1)
    device = call.inputs.device
    blocks = []
    for group, unit_K in enumerate(unit_GK):
        for columns in _cut(unit_K, BLOCK_COLUMNS):
            size = len(columns)
            blocks.append(
                _BlockSums(
                    group,
                    torch.from_numpy(columns).to(device),
                    unit_K[columns],
                    size == call.columns,
                    torch.zeros(size, size, dtype=torch.float64, device=device),
                    torch.zeros(size, dtype=torch.float64, device=device),
                )
            )
    return _LayerSums(module, weight_GOK, tuple(blocks))


def _cut(unit_K: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    """Give the columns of each block, ascending; columns of no unit count one by one."""
    if len(unit_K) <= limit:
        yield np.arange(len(unit_K))
        return
    alone = unit_K < 0
    owner_K = np.where(alone, unit_K.max(initial=0) + 1 + np.arange(len(unit_K)), unit_K)
    _, first_K, inverse_K = np.unique(owner_K, return_index=True, return_inverse=True)
    order = np.argsort(first_K[inverse_K], kind="stable")
    size_of_owner = np.bincount(inverse_K)
    block: list[np.ndarray] = []
    room, start = limit, 0
    while start < len(order):
        size = int(size_of_owner[inverse_K[order[start]]])
        if block and size > room:
            yield np.sort(np.concatenate(block))
            block, room = [], limit
        block.append(order[start : start + size])
        room, start = room - size, start + size
    yield np.sort(np.concatenate(block))


def _chunks(call: LayerCall, first_row: int) -> Iterator[tuple[Tensor, float]]:
    """Give columns [G, K, R] of some rows at a time, and how many positions each stands for."""
    windows = F.pad(call.inputs, call.padding) if any(call.padding) else call.inputs
    windows = windows.to(torch.promote_types(windows.dtype, torch.float32))
    axes = len(call.stride)
    for axis, size in enumerate(call.weight.shape[2:]):
        reach = (size - 1) * call.dilation[axis] + 1
        windows = windows.unfold(2 + axis, reach, call.stride[axis])[..., :: call.dilation[axis]]
    sizes = windows.shape[2 : 2 + axes]
    skip = _skip(sizes, call.columns)
    phases = skip**axes
    for phase in range(phases):
        starts = [phase // skip**axis % skip for axis in range(axes)]
        grid = tuple(slice(start, None, skip) for start in starts)
        part = windows[(phase - first_row) % phases :: phases][(slice(None), slice(None), *grid)]
        if not len(part):
            continue
        kept = part[0, 0].numel() // prod(call.weight.shape[2:])
        step = max(1, _CHUNK_VALUES // (kept * call.columns * call.groups))
        for rows in part.split(step):
            # [rows, C, positions …, kernel …] → [C, kernel …, rows, positions …]
            order = (1, *range(2 + axes, 2 + 2 * axes), 0, *range(2, 2 + axes))
            yield rows.permute(order).reshape(call.groups, call.columns, -1), prod(sizes) / kept


def _skip(sizes: Sequence[int], columns: int) -> int:
    """Choose the step of the grid: a quarter as many positions of each sample as there are columns, or 64, remain."""
    wanted = max(_LEAST_POSITIONS, columns / _ROWS_OVER_COLUMNS)
    skip = int((prod(sizes) / wanted) ** (1 / len(sizes)) + 1e-9)
    return max(1, min(skip, *sizes))
