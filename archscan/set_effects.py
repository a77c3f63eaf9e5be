"""What removing a set of units costs, where that is not the sum of what each costs: gate gradients → better sets.

    Q(M) = ½ 1ᵀ S_MM 1,   S = (1 − λ) F + λ diag(F),   F = AᵀA / N

with A the gate gradients [N, U] of N samples: two units that do the same cost four times what one does, two that make
up for each other less than their sum. F has rank N at most, so that among thousands of units some sets look free by
chance; shrinking it towards its diagonal, by as much as its entries vary from sample to sample, keeps those dear
(Ledoit and Wolf 2004; Schäfer and Strimmer 2005, equation 7, for second moments in place of correlations).

The decision that is not obvious: the widths are found by the additive search, on what each unit costs *given* the set
that is out. Whether that pays is seen from Q itself, so that a set is never worse than the additive one.

Shape suffixes: N samples, U units, G units of one fibre of a group.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from archscan.errors import BadInput
from archscan.groups import ChannelGroup

Kept = Mapping[str, tuple[tuple[int, ...], ...]]

REPLANS = 12
SWEEPS = 8
_PAIRED = 16
"""Units on either side that a swap looks at."""

_PARTS = (1.0, 0.5, 0.25, 0.125)


@dataclass(frozen=True, eq=False)
class SetEffects:
    """A quadratic form of the loss over the gates.

    Attributes:
        factors_NU: A.
        shrinkage: λ, from 0 (all pairs count) to 1 (none do).
    """

    factors_NU: np.ndarray
    shrinkage: float

    @property
    def single_U(self) -> np.ndarray:
        """What each unit costs alone, ½ F_uu."""
        return 0.5 * np.square(self.factors_NU, dtype=np.float64).mean(0)

    def loss(self, removed_U: np.ndarray) -> float:
        """Give Q of a set, boolean of shape [U]."""
        sum_N = self.factors_NU[:, removed_U].sum(1, dtype=np.float64)
        together = 0.5 * float(np.square(sum_N).mean())
        return (1 - self.shrinkage) * together + self.shrinkage * float(self.single_U[removed_U].sum())

    def marginals(self, removed_U: np.ndarray) -> np.ndarray:
        """Give what Q rises by as each unit joins the set, or fell by when it left; shape [U]."""
        sum_N = self.factors_NU[:, removed_U].sum(1, dtype=np.float64)
        single_U = self.single_U
        with_all_U = (sum_N @ self.factors_NU) / len(sum_N)
        return (1 - self.shrinkage) * (with_all_U - np.where(removed_U, 2 * single_U, 0.0)) + single_U


def set_effects(factors_NU: np.ndarray) -> SetEffects:
    """Estimate the form from the gate gradients of single samples.

    λ = Σ Var(F_uv) / Σ F_uv², summed over u ≠ v, at most 1.

    Args:
        factors_NU: Gate gradients, one row for each sample.

    Raises:
        BadInput: There are fewer than two samples.
    """
    samples = len(factors_NU)
    if samples < 2:
        raise BadInput("set effects need the gate gradients of two samples at least; pass more calibration images")
    square_NU = np.square(factors_NU, dtype=np.float64)
    fourth = np.square(square_NU.sum(1)).mean() - np.square(square_NU).sum(1).mean()
    gram_NN = (factors_NU @ factors_NU.T).astype(np.float64) / samples
    second = np.square(gram_NN).sum() - np.square(square_NU.mean(0)).sum()
    if second <= 0:
        return SetEffects(factors_NU, 1.0)
    return SetEffects(factors_NU, float(np.clip((fourth - second) / (samples - 1) / second, 0.0, 1.0)))


def refine(
    groups: Sequence[ChannelGroup],
    effects: SetEffects,
    start: Kept,
    replan: Callable[[np.ndarray], Kept],
    gone_U: np.ndarray | None = None,
) -> Kept:
    """Look for a set that costs less together, at the same budget.

    Args:
        groups: Channel groups.
        effects: What sets cost.
        start: Kept steps to start from.
        replan: Makes a plan within the budget from saliencies, taken as additive.
        gone_U: Units that are gone already and stay so, boolean; None where there are none.
    """
    gone_U = np.zeros(effects.factors_NU.shape[1], dtype=bool) if gone_U is None else gone_U
    best = _swapped(groups, effects, start, gone_U)
    saliency_U = effects.single_U
    for _ in range(REPLANS):
        now = effects.loss(removed_units(groups, best, effects, gone_U))
        marginal_U = effects.marginals(removed_units(groups, best, effects, gone_U))
        for part in _PARTS:
            mixed_U = (1 - part) * saliency_U + part * marginal_U
            trial = _swapped(groups, effects, replan(mixed_U), gone_U)
            if effects.loss(removed_units(groups, trial, effects, gone_U)) < now * (1 - 1e-9):
                best, saliency_U = trial, mixed_U
                break
        else:
            return best
    return best


def removed_units(
    groups: Sequence[ChannelGroup], kept: Kept, effects: SetEffects, gone_U: np.ndarray | None
) -> np.ndarray:
    """Say of every unit whether it goes now, those that are gone already left out; shape [U]."""
    removed_U = np.zeros(effects.factors_NU.shape[1], dtype=bool)
    for group in groups:
        for units, steps in zip(group.units, kept[group.name], strict=True):
            removed_U[list(units)] = True
            removed_U[[units[step] for step in steps]] = False
    return removed_U if gone_U is None else removed_U & ~gone_U


def _swapped(groups: Sequence[ChannelGroup], effects: SetEffects, kept: Kept, gone_U: np.ndarray) -> Kept:
    """Exchange kept and removed units of the same fibre, best first, until no exchange pays."""
    removed_U = removed_units(groups, kept, effects, gone_U)
    sum_N = effects.factors_NU[:, removed_U].sum(1, dtype=np.float64)
    fibres = [np.array(units) for group in groups if group.frozen is None for units in group.units]
    fibres = [units[~gone_U[units]] for units in fibres]
    for _ in range(SWEEPS):
        swaps = sum(_swap_within(effects, unit_G, removed_U, sum_N) for unit_G in fibres)
        if not swaps:
            break
    return {group.name: _steps(group, kept[group.name], removed_U | gone_U) for group in groups}


def _steps(
    group: ChannelGroup, kept: tuple[tuple[int, ...], ...], removed_U: np.ndarray
) -> tuple[tuple[int, ...], ...]:
    if group.frozen is not None:
        return kept
    return tuple(tuple(np.flatnonzero(~removed_U[np.array(units)]).tolist()) for units in group.units)


def _swap_within(effects: SetEffects, unit_G: np.ndarray, removed_U: np.ndarray, sum_N: np.ndarray) -> int:
    """Swap within one fibre; `removed_U` and `sum_N` (of what is removed) follow. Returns how many swaps there were."""
    factors_NG = effects.factors_NU[:, unit_G].astype(np.float64)
    double_G, share, swaps = np.square(factors_NG).mean(0), 1 - effects.shrinkage, 0
    for _ in range(len(unit_G)):
        out_G = removed_U[unit_G]
        cost_G = share * (sum_N @ factors_NG / len(sum_N) - np.where(out_G, double_G, 0.0)) + 0.5 * double_G
        outs, ins = np.flatnonzero(out_G), np.flatnonzero(~out_G)
        outs = outs[np.argsort(-cost_G[outs], kind="stable")[:_PAIRED]]
        ins = ins[np.argsort(cost_G[ins], kind="stable")[:_PAIRED]]
        if not len(outs) or not len(ins):
            break
        # the unit that comes back no longer meets the one that goes
        change = cost_G[ins][None] - cost_G[outs][:, None]
        change -= share * (factors_NG[:, outs].T @ factors_NG[:, ins]) / len(sum_N)
        back, away = np.unravel_index(int(np.argmin(change)), change.shape)
        if not change[back, away] < -1e-9 * double_G.max():
            break
        removed_U[unit_G[outs[back]]], removed_U[unit_G[ins[away]]] = False, True
        sum_N += factors_NG[:, ins[away]] - factors_NG[:, outs[back]]
        swaps += 1
    return swaps
