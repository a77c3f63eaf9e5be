"""The table of criteria: one row each, with its function, what that reads, and what reading it costs.

A criterion is one function and one row here. It sees `GateStatistics` only, never a model, so that a unit may be a
single weight as well. Larger saliency means keep. Saliencies are normalised for nothing but what a row's formula says:
their scale across layers is information.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from archscan.criteria import (
    baselines,
    bayes,
    cbs,
    curvature,
    elimination,
    expansion,
    fisher,
    kronecker,
    mfac,
    obs,
    reconstruction,
    redundancy,
    sosp,
    taylor,
)
from archscan.gate_statistics import GateStatistics, Need
from archscan.sharpness import POWER_STEPS

Score = Callable[[GateStatistics], np.ndarray]
Update = Callable[[GateStatistics, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Criterion:
    """One row of the table.

    Attributes:
        name: What users type.
        score: The saliency of shape [U], not negative.
        formula: The same in one line of ASCII, with g the gate gradient of one sample and F = E[g g'].
        needs: The gate statistics that it reads.
        cost: What collecting them takes for each batch.
        source: Where it comes from.
        summary: One sentence on when to use it.
        update: Statistics, which units go (boolean, [U]) → gates of shape [U] that make up for them, 0 for those units;
            None where the criterion has no update.
    """

    name: str
    score: Score
    formula: str
    needs: frozenset[Need]
    cost: str
    source: str
    summary: str
    update: Update | None = None


_FREE = "no data"
_FIRST = "one forward and one backward pass"
_DRAWN = "one forward and two backward passes"
_SECOND_MOMENTS = "one forward and one backward pass, and a Gram matrix per layer"
_DOUBLE = "one forward, one backward and one double-backward pass"


def _row(
    name: str,
    score: Score,
    formula: str,
    needs: set[Need],
    cost: str,
    source: str,
    summary: str,
    update: Update | None = None,
) -> Criterion:
    return Criterion(name, score, formula, frozenset(needs), cost, source, summary, update)


_ROWS = (
    _row(
        "random",
        baselines.random,
        "uniform in [0, 1)",
        set(),
        _FREE,
        "chance",
        "The floor: a criterion that does not beat it has learned nothing about the network.",
    ),
    _row(
        "magnitude",
        baselines.magnitude,
        "||w_u|| over producers and consumers",
        {"weight_norm"},
        _FREE,
        "Han et al. 2015",
        "When there are no data at all; weights of different layers are hardly comparable.",
    ),
    _row(
        "bn-scale",
        baselines.bn_scale,
        "mean |gamma_u|",
        {"bn_scale"},
        _FREE,
        "Liu et al. 2017",
        "For networks trained with an L1 penalty on their BatchNorm scales; weak without it.",
    ),
    _row(
        "taylor-activation",
        taylor.taylor_activation,
        "E|g_u| / sqrt(sum_v (E|g_v|)^2), v in the group",
        {"sample_gradient", "group"},
        _FIRST,
        "Molchanov et al. 2017",
        "To compare with published Taylor pruning of feature maps; normalised per group, so that every group gives.",
    ),
    _row(
        "taylor-fo",
        taylor.taylor_fo,
        "sum_b (E_b[g_u])^2 over minibatches b",
        {"gradient"},
        _FIRST,
        "Molchanov et al. 2019",
        "To compare with published Taylor pruning; depends on the batch size, since it squares batch means.",
    ),
    _row(
        "taylor-abs",
        taylor.taylor_abs,
        "E|g_u|",
        {"sample_gradient"},
        _FIRST,
        "mean over samples of the first-order change (cf. Molchanov et al. 2017)",
        "When a fast criterion has to hold for a trained network, whose mean gradient is mostly noise.",
    ),
    _row(
        "taylor-so",
        taylor.taylor_so,
        "sum_b (E_b[g_u] - 1/2 H_uu)^2",
        {"gradient", "hessian_diagonal"},
        "one forward, one backward and eight double-backward passes",
        "Molchanov et al. 2019",
        "When a unit's own curvature matters and its interactions do not; the slowest, and an estimate with noise.",
    ),
    _row(
        "snip",
        taylor.snip,
        "|E[g_u]| / sum_v |E[g_v]|",
        {"gradient"},
        _FIRST,
        "Lee et al. 2019",
        "For a network before training; the mean gradient of a trained one is mostly noise.",
    ),
    _row(
        "obd",
        fisher.obd,
        "1/2 F_uu",
        {"sample_gradient"},
        _FIRST,
        "LeCun et al. 1990; Theis et al. 2018",
        "For a trained network, near a minimum of the loss: second-order information at the price of first order.",
    ),
    _row(
        "loss-change",
        expansion.loss_change,
        "max(0, -E[g_u] + 1/2 F_uu)",
        {"sample_gradient"},
        _FIRST,
        "LeCun et al. 1990, first-order term kept; cf. Singh and Alistarh 2020",
        "To predict what units do one at a time; a poor plan, since all that seems to do harm goes at once.",
    ),
    _row(
        "obs",
        obs.obs,
        f"1/2 / [(F + lambda I)^-1]_uu - lambda / 2, lambda = {obs.DAMPENING:g} mean F_vv",
        {"sample_gradient"},
        _FIRST,
        "Hassibi and Stork 1993",
        "For a trained network: what a unit costs once others make up for it; its update helps where no repair does.",
        obs.obs_update,
    ),
    _row(
        "mfac",
        mfac.mfac,
        f"1/2 / [(F + lambda I)^-1]_uu - lambda / 2 within the group, lambda = {mfac.DAMPENING:g} mean F_vv",
        {"sample_gradient", "group"},
        _FIRST,
        "Frantar et al. 2021",
        "As obs with only the units of its own group making up for a unit: when groups are to be judged apart.",
        mfac.mfac_update,
    ),
    _row(
        "cbs",
        cbs.cbs,
        "rise of 1/2 1'F_MM 1 as u joins the cheapest nested sets M",
        {"sample_gradient"},
        _FIRST,
        "Yu et al. 2022",
        "When much goes at once: units that do the same are dearer together, and those that cancel are cheap together.",
        obs.obs_update,
    ),
    _row(
        "sosp-i",
        sosp.sosp_i,
        "|E[g_u]| + 1/2 sum_v |G_uv|, G the Gauss-Newton matrix",
        {"gradient", "fisher_gradient"},
        _DRAWN,
        "Nonnenmacher et al. 2022",
        "When pairs of units matter and classes are the output; takes a product of all pairs of units as well.",
    ),
    _row(
        "sosp-h",
        sosp.sosp_h,
        "|E[g_u]| + 1/2 |(H 1)_u|",
        {"gradient", "hessian_ones"},
        _DOUBLE,
        "Nonnenmacher et al. 2022",
        "When interactions of units matter, in large networks and for any loss; needs an exact Hessian-vector product.",
    ),
    _row(
        "laplace-snr",
        bayes.laplace_snr,
        f"|mu_u| / sigma_u = sqrt(N (F_uu + lambda)), lambda = {bayes.PRIOR:g} mean F_vv",
        {"sample_gradient"},
        _FIRST,
        "Graves 2011",
        "Ranks as obd does and charges less for dear units: many cheap ones are then no better than a dear one.",
    ),
    _row(
        "evidence",
        bayes.evidence,
        "[H (H + alpha I)^-1]_uu within the group, H = N F, alpha by the evidence",
        {"sample_gradient", "group"},
        _FIRST,
        "MacKay 1992",
        "When the question is which groups the data use up: counts how many of a group's gates are determined.",
    ),
    _row(
        "kfac",
        kronecker.kfac,
        "1/2 sum over readers of tr(W_u' S W_u A_uu), A of inputs, S of gradients of outputs",
        {"layer_inputs", "layer_gradients"},
        _SECOND_MOMENTS,
        "Martens and Grosse 2015; Wang et al. 2019",
        "As obd, where gate gradients of few images are noisy: two factors per layer average over positions too.",
    ),
    _row(
        "kfac-obs",
        kronecker.kfac_obs,
        "1/2 sum over readers of tr(W_u' S W_u [(A^-1)_uu]^-1)",
        {"layer_inputs", "layer_gradients"},
        _SECOND_MOMENTS,
        "Wang et al. 2019; Hassibi and Stork 1993",
        "As kfac, where the repair by least squares (--recover ls) follows.",
    ),
    _row(
        "obc",
        reconstruction.obc,
        "sum over readers of 1/2 tr(W_u [(H^-1)_uu]^-1 W_u'), H = 2 E[X X']",
        {"layer_inputs"},
        "one forward pass and a Gram matrix per layer",
        "Frantar and Alistarh 2022",
        "When there are no labels; layers compare by output error, not loss. Its update is what --recover ls solves.",
    ),
    _row(
        "obd-ls",
        reconstruction.obd_ls,
        "1/2 F_uu times the share of u's contribution to its readers that other channels cannot give",
        {"sample_gradient", "layer_inputs"},
        _SECOND_MOMENTS,
        "LeCun et al. 1990; Frantar and Alistarh 2022",
        "When the repair by least squares (--recover ls) follows: the loss change that it cannot make up for.",
    ),
    _row(
        "obd-obc",
        elimination.obd_obc,
        "rise of tr(W_R [(C^-1)_RR]^-1 W_R') as u joins the set R that readers miss least, scaled to 1/2 F (streams F)",
        {"sample_gradient", "layer_inputs", "group", "summed"},
        _SECOND_MOMENTS,
        "LeCun et al. 1990; Frantar and Alistarh 2022; Kurtic et al. 2023",
        "As obd-ls, when much goes at once: a unit counts as redundant only as long as its doubles are there.",
    ),
    _row(
        "gradient-rank",
        redundancy.gradient_rank,
        "leverage of u in the leading r directions of its group's gradients, r their effective rank",
        {"sample_gradient", "group"},
        _FIRST,
        "Roy and Vetterli 2007",
        "When the question is how redundant each group is; it weighs directions, not what they cost.",
    ),
    _row(
        "spectral",
        curvature.spectral,
        "1/2 lambda_max of the group's Hessian by the weights that read it, times their ||w_u||^2",
        {"sharpness", "read_norm"},
        f"{POWER_STEPS} times one forward, one backward and one double-backward pass",
        "cf. Dong et al. 2019",
        "When flatness is what is looked for: a bound for the sharpest direction, not an estimate for the unit.",
    ),
)

CRITERIA: Mapping[str, Criterion] = MappingProxyType({row.name: row for row in _ROWS})
"""All criteria, by name."""
