"""What removing units one after the other costs, with least squares after each: moments of layers → saliency [U].

A unit that is redundant as long as another one is there costs little alone, and much once that one is gone. So each
group is emptied step by step: the unit that the layers reading it miss least goes first, the weights on the others are
solved for again, and what the next one costs is looked at anew. The rise of the cost with a unit is its saliency, made
monotone, so that the units of least saliency are the sets that were looked at, and summed saliencies what they cost
(Frantar and Alistarh 2022, "Optimal Brain Compression", for a layer; Kurtic et al. 2023, "ZipLM", for structures).

The decision that is not obvious: least squares says how large the error of a layer's outputs is, not what it matters.
Each group's errors are scaled by one number, so that removing its units without any repair would cost what `obd` says.

Shape suffixes: O outputs, K columns of a block, U units of a group, J columns of a unit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from archscan.criteria.columns import DAMPENING, damped, inverse, removal_costs, second_moment, unit_columns
from archscan.criteria.fisher import obd
from archscan.gate_statistics import GateStatistics
from archscan.layer_statistics import InputBlock, LayerMoments

ROUNDS = 128
"""A group is emptied in so many rounds at most; wide ones lose several units in each."""


STREAM_FACTOR = 2.0
"""What a unit that sums write costs more than the layers that read it say. The layers behind a residual branch make up
for what the branch lost; what a stream lost, no layer behind it has. Measured on the CIFAR ResNet-20 at half of the
MACs (512 images; mean Kullback-Leibler divergence from the dense network after least squares, on 5,000 others): factors
of 1, 1.5, 2 and 3 gave 0.282, 0.236, 0.233 and 0.233."""

_NEXT = 1 + 1e-9
"""Keeps units apart that are equally cheap once made monotone: they are to go in the order that was looked at."""


def obd_obc(statistics: GateStatistics) -> np.ndarray:
    """Estimate the loss change as each unit joins those of its group that go before it, after least squares.

    s_u = rise of c_g tr(W_R [(C⁻¹)_RR]⁻¹ W_Rᵀ), summed over the layers that read the group, as u joins the set R, and
    c_g = Σ_u ½ F_uu / Σ_u tr(W_u A_uu W_uᵀ), `STREAM_FACTOR` times that where sums write the group. C is the damped
    second moment of their inputs about the mean, A that about zero.

    Returns:
        Saliency of shape [U], in units of the loss; not negative.
    """
    saliency_U = obd(statistics) * np.where(statistics.require("summed"), STREAM_FACTOR, 1.0)
    group_U = statistics.require("group")
    parts = [(layer, block) for layer in statistics.require_layers("layer_inputs") for block in layer.blocks]
    contribution_U = np.zeros(statistics.unit_count)
    for layer, block in parts:
        contribution_U += removal_costs(block, second_moment(block, layer), statistics.unit_count)
    for group in range(int(group_U.max(initial=-1)) + 1):
        unit_U = np.flatnonzero(group_U == group)
        readers = [_Reader(layer, block, unit_U) for layer, block in parts if np.isin(block.unit_K, unit_U).any()]
        total = contribution_U[unit_U].sum()
        if readers and total > 0:
            scale = saliency_U[unit_U].sum() / total
            saliency_U[unit_U] = scale * _rises(readers, len(unit_U))
    return saliency_U


class _Reader:
    """A layer that reads a group: the inverse of its inputs' second moment, and its weights, as units go."""

    def __init__(self, layer: LayerMoments, block: InputBlock, unit_U: np.ndarray) -> None:
        moment_KK = damped(second_moment(block, layer, centred=True), DAMPENING)
        live = moment_KK.any()
        self.inverse_KK = inverse(moment_KK, layer.module) if live else np.eye(len(moment_KK))
        self.weight_OK = block.weight_OK.copy() if live else np.zeros_like(block.weight_OK)
        place = {unit: place for place, unit in enumerate(unit_U.tolist())}
        self.columns: dict[int, np.ndarray] = {
            place[unit]: columns_J
            for pair in unit_columns(block.unit_K)
            for unit, columns_J in zip(pair.unit_M.tolist(), pair.column_MJ, strict=True)
            if unit in place
        }

    def add_errors(self, error_U: np.ndarray) -> None:
        """Add the error that each unit that is left would leave alone."""
        for size in {len(columns_J) for columns_J in self.columns.values()}:
            units = [unit for unit, columns_J in self.columns.items() if len(columns_J) == size]
            columns_UJ = np.stack([self.columns[unit] for unit in units])
            weight_UOJ = self.weight_OK[:, columns_UJ].transpose(1, 0, 2)
            block_UJJ = self.inverse_KK[columns_UJ[:, :, None], columns_UJ[:, None, :]]
            solved_UJO = np.linalg.solve(block_UJJ, weight_UOJ.transpose(0, 2, 1))
            error_U[units] += (weight_UOJ.transpose(0, 2, 1) * solved_UJO).sum((1, 2))

    def remove(self, units: Sequence[int]) -> float:
        """Take units out, let the weights on the others make up for them; give the error that this adds."""
        gone = [self.columns.pop(unit) for unit in units if unit in self.columns]
        if not gone:
            return 0.0
        gone_R = np.concatenate(gone)
        across_RK = np.linalg.solve(self.inverse_KK[np.ix_(gone_R, gone_R)], self.inverse_KK[gone_R])
        weight_OR = self.weight_OK[:, gone_R]
        rest_K = np.setdiff1d(np.arange(len(self.inverse_KK)), gone_R)
        error = float((weight_OR * np.linalg.solve(self.inverse_KK[np.ix_(gone_R, gone_R)], weight_OR.T).T).sum())
        self.weight_OK = self.weight_OK[:, rest_K] - weight_OR @ across_RK[:, rest_K]
        self.inverse_KK = self.inverse_KK[np.ix_(rest_K, rest_K)] - (
            self.inverse_KK[np.ix_(rest_K, gone_R)] @ across_RK[:, rest_K]
        )
        moved_K = np.zeros(len(across_RK[0]), dtype=np.int64)
        moved_K[rest_K] = np.arange(len(rest_K))
        self.columns = {unit: moved_K[columns_J] for unit, columns_J in self.columns.items()}
        return error


@dataclass(frozen=True)
class _Removal:
    """Units that go together, and the error that this adds."""

    units: tuple[int, ...]
    error: float


def _removals(readers: Sequence[_Reader], count: int) -> Iterator[_Removal]:
    """Empty a group of `count` units."""
    left = np.ones(count, dtype=bool)
    together = -(-count // ROUNDS)
    while left.any():
        error_U = np.zeros(count)
        for reader in readers:
            reader.add_errors(error_U)
        error_U[~left] = np.inf
        units = np.argsort(error_U, kind="stable")[: min(together, int(left.sum()))]
        left[units] = False
        yield _Removal(tuple(units.tolist()), sum(reader.remove(units.tolist()) for reader in readers))


def _rises(readers: Sequence[_Reader], count: int) -> np.ndarray:
    """Give each unit the rise of the error as it goes, more than that of those before it."""
    rise_U, least = np.zeros(count), 0.0
    for removal in _removals(readers, count):
        for unit in removal.units:
            least = max(least * _NEXT, removal.error / len(removal.units))
            rise_U[unit] = least
    return rise_U
