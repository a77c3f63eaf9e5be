"""Re-solve one layer's weights by ridge regression: samples of inputs and targets → `Solution`.

What a layer computes at one position is y = W x + b per group of the convolution, with x one column of its im2col
matrix; behind it may come an affine map per output (BatchNorm in eval mode) and a shortcut:

    p = scale · (W x + b) + offset + shortcut

Given targets t for p, the change Δ of W and the change of b minimise ‖t − p‖² + ridge · ‖scale · Δ‖², so that a large
ridge gives back the weights that are there, not zeros. Where a rectifier reads p, ‖relu(t) − relu(p)‖² counts instead:
a target t ≤ 0 asks for no more than p ≤ 0, and is replaced by min(p, 0) of the solution so far. That majorises the
loss, and the Gram matrix stays the same (Zhang et al. 2015, "Accelerating very deep convolutional networks", solve the
same problem by alternation).

Shape suffixes: G groups of the convolution, K columns (inputs of one output), O outputs of one group, R rows
(positions of all images). Chunks (see `positions`) are multiplied in the precision of the activations and summed in
float64.

The decision that is not obvious: moments are taken of the *error* that the present weights leave, not of the targets.
The ridge then pulls towards those weights, the error of any change follows from the moments alone, and wide layers are
solved block by block of their columns with the same code.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from archscan.positions import Chunk, Layer, Sample, chunks

RIDGES = tuple(10.0**power for power in range(1, -7, -1))
"""Candidate strengths, in units of the mean of the Gram matrix's diagonal."""

_DEAD_SCALE = 1e-6
_NOTHING_WRONG = 1e-10
"""Squared error, relative to the variance of the targets, that rounding leaves where nothing was changed yet."""


@dataclass(frozen=True)
class Effort:
    """How much work to put into one layer.

    Attributes:
        rows_per_column: Positions are left out, evenly, down to this multiple of the columns; infinite for all.
        block_columns: Wider layers are solved block by block; a Gram matrix takes 8 · block_columns² bytes.
        rectified_sweeps: How often targets that a rectifier hides are replaced.
        ridges: Strengths to choose from by hold-out, tried in this order until the error rises again.
    """

    rows_per_column: float = 64.0
    block_columns: int = 4608
    rectified_sweeps: int = 3
    ridges: tuple[float, ...] = RIDGES


@dataclass(frozen=True, eq=False)
class Solution:
    """What was found for a layer.

    Attributes:
        weight: To put in place of the old one, in its precision; the old one where no change was better.
        bias: Likewise.
        ridge: The strength chosen; infinite where the weights stay.
        error_before: ‖t − p‖² on the hold-out, rectified where the layer is, relative to the variance of the targets.
        error_after: The same with the new weights; never larger.
        rows: Positions that it was fitted to.
    """

    weight: Tensor
    bias: Tensor
    ridge: float
    error_before: float
    error_after: float
    rows: int


@dataclass(frozen=True, eq=False)
class _Change:
    """What is added to the weights (GKO) and to the bias (GO), in float64."""

    weight_GKO: Tensor
    bias_GO: Tensor


@dataclass(frozen=True, eq=False)
class _Moments:
    """Sums over positions of products of columns x and errors e, the latter in units of y."""

    gram_GKK: Tensor
    cross_GKO: Tensor
    column_GK: Tensor
    error_GO: Tensor
    square_GO: Tensor
    rows: int

    def centred_gram(self, intercept: bool) -> Tensor:
        """Give XᵀX about the means, where an intercept takes these away."""
        if not intercept:
            return self.gram_GKK
        return self.gram_GKK - torch.einsum("gk,gl->gkl", self.column_GK / self.rows, self.column_GK)

    def centred_cross(self, intercept: bool) -> Tensor:
        """Give XᵀE about the means, likewise."""
        if not intercept:
            return self.cross_GKO
        return self.cross_GKO - torch.einsum("gk,go->gko", self.column_GK / self.rows, self.error_GO)

    def with_intercept(self, weight_GKO: Tensor, intercept: bool) -> _Change:
        """Add the best change of the bias to a change of the weights."""
        if not intercept:
            return _Change(weight_GKO, torch.zeros_like(self.error_GO))
        rest_GO = self.error_GO - torch.einsum("gk,gko->go", self.column_GK, weight_GKO)
        return _Change(weight_GKO, rest_GO / self.rows)

    def squared_error(self, step: _Change) -> Tensor:
        """Give ‖e − Δᵀx − b‖² of every output."""
        weight_GKO, bias_GO = step.weight_GKO, step.bias_GO
        linear_GO = (weight_GKO * self.cross_GKO).sum(1) + bias_GO * self.error_GO
        quadratic_GO = (weight_GKO * (self.gram_GKK @ weight_GKO)).sum(1) + self.rows * bias_GO.square()
        mixed_GO = bias_GO * torch.einsum("gk,gko->go", self.column_GK, weight_GKO)
        return self.square_GO - 2 * linear_GO + quadratic_GO + 2 * mixed_GO


@dataclass(frozen=True, eq=False)
class _Factor:
    """A factorised normal equation of a block of columns, to be solved for other targets again."""

    block: slice
    cholesky_GKK: Tensor
    strength_G11: Tensor
    ridge: float

    def step(self, moments: _Moments, change: _Change, intercept: bool) -> _Change:
        """Solve (XᵀX + strength) Δ = XᵀE − strength · (change so far)."""
        pull_GKO = self.strength_G11 * change.weight_GKO[:, self.block]
        weight_GKO = torch.cholesky_solve(moments.centred_cross(intercept) - pull_GKO, self.cholesky_GKK)
        return moments.with_intercept(weight_GKO, intercept)


class _Stream:
    """The samples of one layer as chunks of positions."""

    def __init__(self, layer: Layer, samples: Sequence[Sample], effort: Effort) -> None:
        self.layer = layer
        self.samples = samples
        self.shape_GO = (layer.groups, len(layer.weight) // layer.groups)
        weight_GOK = layer.weight.detach().double().reshape(*self.shape_GO, layer.columns)
        self.weight_GKO = weight_GOK.transpose(1, 2)
        self.bias_GO, scale_GO, self.offset_GO = (
            values.detach().double().reshape(self.shape_GO) for values in (layer.bias, layer.scale, layer.offset)
        )
        self.dead_GO = scale_GO.abs() <= _DEAD_SCALE * scale_GO.abs().max()
        self.scale_GO = scale_GO.masked_fill(self.dead_GO, 0.0)
        self.rows = sum(sample.target.shape[0] * sample.target[0, 0].numel() for sample in samples)
        self.skip = max(1, math.isqrt(int(self.rows / min(effort.rows_per_column * layer.columns, self.rows + 1))))

    def unchanged(self) -> _Change:
        """Start from the weights that are there."""
        return _Change(torch.zeros_like(self.weight_GKO), torch.zeros_like(self.bias_GO))

    def error(self, change: _Change) -> tuple[float, float]:
        """Give the squared error and the variance of the targets, both summed over positions and outputs."""
        error = variance = torch.zeros((), dtype=torch.float64, device=self.weight_GKO.device)
        total_GO, square_GO, rows = torch.zeros_like(self.bias_GO), torch.zeros_like(self.bias_GO), 0
        for chunk in chunks(self.layer, self.samples, self.skip):
            target_GOR, found_GOR = chunk.target_GOR, self._predicted(chunk, change)
            if self.layer.rectified:
                target_GOR, found_GOR = target_GOR.relu(), found_GOR.relu()
            error = error + (target_GOR - found_GOR).square().sum(dtype=torch.float64)
            total_GO = total_GO + target_GOR.sum(2, dtype=torch.float64)
            square_GO = square_GO + target_GOR.square().sum(2, dtype=torch.float64)
            rows += target_GOR.shape[2]
        variance = (square_GO - total_GO.square() / rows).sum()
        return float(error), max(float(variance), torch.finfo(torch.float64).tiny)

    def moments(self, change: _Change, block: slice, *, one_sided: bool, gram: bool) -> _Moments:
        """Sum up the errors that a change leaves, and the columns of a block."""
        groups, width = self.shape_GO[0], len(range(*block.indices(self.layer.columns)))
        new = self.weight_GKO.new_zeros
        gram_GKK, cross_GKO = new(groups, width, width if gram else 0), new(groups, width, self.shape_GO[1])
        column_GK, error_GO, square_GO = new(groups, width), new(self.shape_GO), new(self.shape_GO)
        rows = 0
        for chunk in chunks(self.layer, self.samples, self.skip):
            error_GOR = self._error(chunk, change, one_sided=one_sided)
            columns_GKR = chunk.columns_GKR[:, block]
            if gram:
                gram_GKK += columns_GKR @ columns_GKR.transpose(1, 2)
            cross_GKO += columns_GKR @ error_GOR.transpose(1, 2)
            column_GK += columns_GKR.sum(2, dtype=torch.float64)
            error_GO += error_GOR.sum(2, dtype=torch.float64)
            square_GO += error_GOR.square().sum(2, dtype=torch.float64)
            rows += columns_GKR.shape[2]
        return _Moments(gram_GKK, cross_GKO, column_GK, error_GO, square_GO, rows)

    def _predicted(self, chunk: Chunk, change: _Change) -> Tensor:
        """Give p of the positions of a chunk, in the precision of its columns."""
        scale_GO1 = self.scale_GO[:, :, None]
        weight_GOK = scale_GO1 * (self.weight_GKO + change.weight_GKO).transpose(1, 2)
        offset_GO1 = scale_GO1 * (self.bias_GO + change.bias_GO)[:, :, None] + self.offset_GO[:, :, None]
        dtype = chunk.columns_GKR.dtype
        return weight_GOK.to(dtype) @ chunk.columns_GKR + offset_GO1.to(dtype) + chunk.shortcut_GOR

    def _error(self, chunk: Chunk, change: _Change, *, one_sided: bool) -> Tensor:
        """Give target − prediction in units of y; outputs that BatchNorm multiplies by zero have none."""
        found_GOR, target_GOR = self._predicted(chunk, change), chunk.target_GOR
        if one_sided:
            target_GOR = target_GOR.where(target_GOR > 0, found_GOR.clamp(max=0))
        scale_GO = self.scale_GO.masked_fill(self.dead_GO, 1.0).to(found_GOR.dtype)
        error_GOR = (target_GOR - found_GOR) / scale_GO[:, :, None]
        return error_GOR.masked_fill(self.dead_GO[:, :, None], 0.0)


def solve(layer: Layer, fit: Sequence[Sample], holdout: Sequence[Sample], effort: Effort | None = None) -> Solution:
    """Find the weights that bring a layer's outputs closest to their targets on the hold-out.

    Args:
        layer: What was called, with the weights that are there.
        fit: Batches to solve on.
        holdout: Batches to choose the ridge on, and between the old and the new weights.
        effort: How much work to put in.
    """
    effort = effort or Effort()
    fitting, checking = (_Stream(layer, samples, effort) for samples in (fit, holdout))
    best = fitting.unchanged()
    before, variance = checking.error(best)
    least, ridge = before, math.inf
    for change, factors in _sweeps(fitting, checking, effort) if before > _NOTHING_WRONG * variance else ():
        error, _ = checking.error(change)
        if error < least:
            best, least, ridge = change, error, max((factor.ridge for factor in factors), default=math.inf)
    added = best.weight_GKO.transpose(1, 2).reshape(layer.weight.shape)
    return Solution(
        weight=(layer.weight.detach().double() + added).to(layer.weight.dtype),
        bias=(layer.bias.detach().double() + best.bias_GO.reshape(-1)).to(layer.bias.dtype),
        ridge=ridge,
        error_before=before / variance,
        error_after=least / variance,
        rows=fitting.rows // fitting.skip**2,
    )


def _sweeps(fitting: _Stream, checking: _Stream, effort: Effort) -> Iterator[tuple[_Change, list[_Factor]]]:
    """Yield better and better solutions."""
    change, factors = _first_sweep(fitting, checking, effort)
    yield change, factors
    for _ in range(effort.rectified_sweeps if fitting.layer.rectified and factors else 0):
        change = _rectified_sweep(fitting, factors, change)
        yield change, factors


def _first_sweep(fitting: _Stream, checking: _Stream, effort: Effort) -> tuple[_Change, list[_Factor]]:
    """Solve block after block of columns, each with the strength that the hold-out likes best."""
    layer, change = fitting.layer, fitting.unchanged()
    weight_GO = fitting.scale_GO.square()
    factors: list[_Factor] = []
    for first in range(0, layer.columns, effort.block_columns):
        block = slice(first, first + effort.block_columns)
        moments, unseen = (s.moments(change, block, one_sided=False, gram=True) for s in (fitting, checking))
        best = moments.with_intercept(torch.zeros_like(moments.cross_GKO), layer.intercept)
        least, chosen = float((unseen.squared_error(best) * weight_GO).sum()), None
        for factor in _factors(moments, block, layer.intercept, effort.ridges):
            step = factor.step(moments, change, layer.intercept)
            error = float((unseen.squared_error(step) * weight_GO).sum())
            if error < least:
                best, least, chosen = step, error, factor
            elif chosen is not None:
                break
        change = _added(change, best, block)
        factors += [] if chosen is None else [chosen]
    return change, factors


def _factors(moments: _Moments, block: slice, intercept: bool, ridges: Sequence[float]) -> Iterator[_Factor]:
    gram_GKK = moments.centred_gram(intercept)
    unit_G11 = gram_GKK.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    for ridge in ridges:
        matrix_GKK = gram_GKK.clone()
        matrix_GKK.diagonal(dim1=1, dim2=2).add_(ridge * unit_G11[:, :, 0])
        cholesky_GKK, failed = torch.linalg.cholesky_ex(matrix_GKK)
        if not bool(failed.any()):
            yield _Factor(block, cholesky_GKK, ridge * unit_G11, ridge)


def _rectified_sweep(fitting: _Stream, factors: Sequence[_Factor], change: _Change) -> _Change:
    """Solve every block again, for targets that ask for no more than the rectifier lets through."""
    for factor in factors:
        moments = fitting.moments(change, factor.block, one_sided=True, gram=False)
        change = _added(change, factor.step(moments, change, fitting.layer.intercept), factor.block)
    return change


def _added(change: _Change, step: _Change, block: slice) -> _Change:
    weight_GKO = change.weight_GKO.clone()
    weight_GKO[:, block] += step.weight_GKO
    return _Change(weight_GKO, change.bias_GO + step.bias_GO)
