"""Criteria against dense matrices, and the contract that every row of the table keeps."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from archscan.criteria import CRITERIA, Criterion, criteria_table, criterion, score, sosp
from archscan.errors import BadInput
from archscan.gate_statistics import GateStatistics, Need
from archscan.gates import collect
from archscan.groups import AxisUnits, Consumer, Coupling
from archscan.losses import classification_loss
from tests import reference
from tests.gate_nets import CHAIN, GROUPED, RESIDUAL, Case, images_and_labels

BATCHES = [images_and_labels(4, seed=1), images_and_labels(2, seed=2)]
NO_DATA = {"random", "magnitude", "bn-scale"}
SQUARES_BATCH_MEANS = {"taylor-fo", "taylor-so"}


def saliency(name: str, case: Case = CHAIN, batches: object = None, **options: int) -> np.ndarray:
    row = criterion(name)
    used = BATCHES if batches is None else batches
    return score(name, collect(case.model(), case.coupling, used, classification_loss, row.needs, **options))  # type: ignore[arg-type]


def made_up(samples: int = 7, units: int = 5, seed: int = 0) -> GateStatistics:
    """Statistics of no network, with two batches."""
    draw = np.random.default_rng(seed)
    return GateStatistics(
        unit_count=units,
        seed=seed,
        batch_sizes=(samples - 3, 3),
        gradient_BU=draw.normal(size=(2, units)),
        sample_gradient_NU=draw.normal(size=(samples, units)).astype(np.float32),
        fisher_gradient_NU=draw.normal(size=(samples, units)).astype(np.float32),
        hessian_ones_BU=draw.normal(size=(2, units)),
        hessian_diagonal_U=draw.normal(size=units),
        weight_norm_U=draw.random(units),
        bn_scale_U=np.where(np.arange(units) == 1, np.nan, draw.random(units)),
        group_U=np.arange(units) // 2 - 1,
        summed_U=np.arange(units) % 3 == 0,
    )


@cache
def everything() -> GateStatistics:
    """All there is of one network."""
    return collect(CHAIN.model(), CHAIN.coupling, BATCHES, classification_loss, frozenset(get_args(Need)))


def optional_fields() -> dict[str, str]:
    """Which field of the statistics holds what a criterion may need."""
    found = {entry.name.rpartition("_")[0]: entry.name for entry in fields(GateStatistics)}
    return {need: found[need] for need in get_args(Need)}


def arrays_in(value: Any) -> Iterator[np.ndarray]:
    if isinstance(value, np.ndarray):
        yield value
    elif is_dataclass(value):
        for entry in fields(value):
            yield from arrays_in(getattr(value, entry.name))
    elif isinstance(value, tuple):
        for part in value:
            yield from arrays_in(part)


@pytest.fixture(params=CRITERIA.values(), ids=list(CRITERIA))
def row(request: pytest.FixtureRequest) -> Criterion:
    return request.param


# Scores ---------------------------------------------------------------------------------------------------------------


def test_taylor_squares_the_loss_change_of_each_batch() -> None:
    gradients, diagonals = [], []
    for batch in BATCHES:
        loss = reference.loss_of_gates(CHAIN.model(), CHAIN.coupling, classification_loss, batch)
        gradients.append(reference.finite_difference_gradient(loss, reference.ones(CHAIN.coupling)))
        diagonals.append(np.diag(reference.hessian(CHAIN.model(), CHAIN.coupling, classification_loss, batch)))
    diagonal = (4 * diagonals[0] + 2 * diagonals[1]) / 6
    np.testing.assert_allclose(saliency("taylor-fo"), sum(g**2 for g in gradients), atol=1e-8)
    expected = sum((g - diagonal / 2) ** 2 for g in gradients)
    np.testing.assert_allclose(saliency("taylor-so", diagonal_probes=15), expected, atol=1e-8)


def test_first_order_per_sample_criteria_are_moments_of_sample_gradients() -> None:
    samples = np.concatenate(
        [
            reference.sample_gradients(RESIDUAL.model(), RESIDUAL.coupling, classification_loss, batch)
            for batch in BATCHES
        ]
    )
    np.testing.assert_allclose(saliency("taylor-abs", RESIDUAL), np.abs(samples).mean(0), atol=1e-12)
    np.testing.assert_allclose(saliency("obd", RESIDUAL), (samples**2).mean(0) / 2, atol=1e-12)


def test_taylor_activation_is_normalised_within_groups() -> None:
    made = made_up()
    means = np.abs(made.require("sample_gradient")).mean(0)
    expected = np.empty(5)
    for group in (-1, 0, 1):  # the first of which holds the units of no group
        own = made.require("group") == group
        expected[own] = means[own] / np.linalg.norm(means[own])
    np.testing.assert_allclose(score("taylor-activation", made), expected, rtol=1e-6)
    silent = replace(made, sample_gradient_NU=np.zeros((7, 5)))
    np.testing.assert_array_equal(score("taylor-activation", silent), 0)


def test_snip_shares_out_the_mean_gradient() -> None:
    made = made_up()
    gradients = made.require("gradient")
    mean = np.abs(4 * gradients[0] + 3 * gradients[1])
    np.testing.assert_allclose(score("snip", made), mean / mean.sum())
    with pytest.raises(BadInput, match="nothing to share out"):
        score("snip", replace(made, gradient_BU=np.zeros((2, 5))))


def test_a_unit_that_two_layers_read_is_counted_once_by_each() -> None:
    """A gate is read by all its consumers and made by one producer, which adds nothing: no double counting."""
    batch = images_and_labels(5)
    loss = reference.loss_of_gates(RESIDUAL.model(), RESIDUAL.coupling, classification_loss, batch)
    gradient = np.abs(reference.finite_difference_gradient(loss, reference.ones(RESIDUAL.coupling)))
    np.testing.assert_allclose(saliency("snip", RESIDUAL, [batch]), gradient / gradient.sum(), atol=1e-8)
    samples = reference.sample_gradients(RESIDUAL.model(), RESIDUAL.coupling, classification_loss, batch)
    found = saliency("laplace-snr", RESIDUAL, [batch]) ** 2
    curvature = (samples**2).sum(0)
    np.testing.assert_allclose(found, curvature + 0.01 * curvature.mean(), rtol=1e-8)


def test_sosp_h_is_that_of_the_dense_hessian_over_all_samples() -> None:
    batch = tuple(torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    loss = reference.loss_of_gates(RESIDUAL.model(), RESIDUAL.coupling, classification_loss, batch)
    gradient = reference.finite_difference_gradient(loss, reference.ones(RESIDUAL.coupling))
    dense = reference.hessian(RESIDUAL.model(), RESIDUAL.coupling, classification_loss, batch)
    expected = np.abs(gradient) + np.abs(dense.sum(1)) / 2
    np.testing.assert_allclose(saliency("sosp-h", RESIDUAL), expected, atol=1e-8)


def test_sosp_i_is_that_of_the_dense_gauss_newton_matrix() -> None:
    repeats = 1500
    images, labels = images_and_labels(3)
    batch = (images.repeat(repeats, 1, 1, 1), labels.repeat(repeats))
    loss = reference.loss_of_gates(GROUPED.model(), GROUPED.coupling, classification_loss, (images, labels))
    gradient = reference.finite_difference_gradient(loss, reference.ones(GROUPED.coupling))
    dense = reference.gauss_newton(GROUPED.model(), GROUPED.coupling, images)
    expected = np.abs(gradient) + np.abs(dense).sum(1) / 2
    np.testing.assert_allclose(saliency("sosp-i", GROUPED, [batch]), expected, rtol=0.08)


@settings(max_examples=30, deadline=None)
@given(
    factors=st.tuples(st.integers(1, 6), st.integers(1, 9)).flatmap(
        lambda shape: arrays(np.float64, shape, elements=st.floats(-3, 3))
    ),
    block=st.integers(1, 40),
)
def test_blocks_of_row_sums_are_those_of_the_whole_matrix(factors: np.ndarray, block: int) -> None:
    dense = np.abs(factors.T @ factors / len(factors)).sum(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sosp, "_BLOCK_NUMBERS", block)
        np.testing.assert_allclose(sosp.absolute_row_sums(factors), dense, atol=1e-10)


def test_sosp_averages_batches_by_their_sizes() -> None:
    made = made_up()
    gradients, products, factors = (made.require(need) for need in ("gradient", "hessian_ones", "fisher_gradient"))
    mean = (4 * gradients[0] + 3 * gradients[1]) / 7
    ones = (4 * products[0] + 3 * products[1]) / 7
    newton = factors.T @ factors / 7
    np.testing.assert_allclose(sosp.sosp_h(made), np.abs(mean) + np.abs(ones) / 2)
    np.testing.assert_allclose(sosp.sosp_i(made), np.abs(mean) + np.abs(newton).sum(1) / 2, rtol=1e-5)


def test_units_without_a_batchnorm_go_last_by_bn_scale() -> None:
    made = made_up()
    scores = score("bn-scale", made)
    assert scores[1] == scores.max()
    with pytest.raises(BadInput, match="has a BatchNorm"):
        score("bn-scale", replace(made, bn_scale_U=np.full(5, np.nan)))


def test_random_follows_the_seed() -> None:
    np.testing.assert_array_equal(score("random", made_up(seed=1)), score("random", made_up(seed=1)))
    assert (score("random", made_up(seed=1)) != score("random", made_up(seed=2))).all()


# The table's contract -------------------------------------------------------------------------------------------------


def test_a_row_is_told_by_its_name_and_described(row: Criterion) -> None:
    assert criterion(row.name) is row
    assert row.cost
    assert row.source
    assert row.summary.endswith(".")


def test_a_row_needs_what_it_says_and_no_more(row: Criterion) -> None:
    held = optional_fields()
    only = replace(everything(), **{name: None for need, name in held.items() if need not in row.needs})
    np.testing.assert_array_equal(row.score(only), row.score(everything()))
    for need in row.needs:
        with pytest.raises(BadInput, match=f"hold no {need}"):
            row.score(replace(everything(), **{held[need]: None}))


def test_a_row_gives_each_unit_a_finite_saliency(row: Criterion) -> None:
    scores = saliency(row.name)
    assert scores.shape == (CHAIN.coupling.unit_count,)
    assert scores.dtype == np.float64
    assert np.isfinite(scores).all()
    assert (scores >= 0).all()
    assert (scores > 0).any()


def test_a_row_leaves_the_statistics_alone(row: Criterion) -> None:
    before = [found.copy() for found in arrays_in(everything())]
    row.score(everything())[:] = -1
    if row.update is not None:
        row.update(everything(), np.arange(everything().unit_count) % 3 == 0)[:] = -1
    assert len(before) > len(get_args(Need))
    for old, new in zip(before, arrays_in(everything()), strict=True):
        np.testing.assert_array_equal(new, old)


def renumbered(coupling: Coupling, order: np.ndarray) -> Coupling:
    """Give unit u of `coupling` the number order[u]."""
    table = np.append(order, -1)
    return replace(
        coupling,
        tensors={
            path: tuple(AxisUnits(owner.axis, table[owner.units], owner.role) for owner in owners)
            for path, owners in coupling.tensors.items()
        },
        consumers=tuple(
            Consumer(c.contraction, c.operand, c.axis, table[c.units], c.weight, c.module) for c in coupling.consumers
        ),
    )


@pytest.mark.parametrize("name", sorted(CRITERIA.keys() - {"random"}))  # which draws by number
def test_a_row_follows_the_units_numbers(name: str) -> None:
    order = np.random.default_rng(0).permutation(CHAIN.coupling.unit_count)
    moved = Case("renumbered", CHAIN.make, renumbered(CHAIN.coupling, order))
    exact = {"diagonal_probes": 15}  # fewer draw by number
    np.testing.assert_allclose(saliency(name, moved, **exact)[order], saliency(name, **exact), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", sorted(CRITERIA.keys() - SQUARES_BATCH_MEANS))
def test_a_row_does_not_depend_on_the_split_into_batches(name: str) -> None:
    images, labels = images_and_labels(6)
    split = [(images[:1], labels[:1]), (images[1:4], labels[1:4]), (images[4:], labels[4:])]
    whole = saliency(name, batches=[(images, labels)])
    np.testing.assert_allclose(saliency(name, batches=split), whole, rtol=1e-9, atol=1e-12 * whole.max())


@pytest.mark.parametrize("name", sorted(CRITERIA.keys() - NO_DATA))
def test_a_scale_that_a_batchnorm_takes_away_changes_nothing(name: str) -> None:
    """w · dL/dw is 0 for a convolution before a BatchNorm, so that scores in weight space would collapse."""
    model = CHAIN.model()
    scaled = CHAIN.model()
    scaled.conv1.weight.data *= 10
    scaled.conv1.bias.data *= 10
    scaled.bn1.running_mean *= 10
    scaled.bn1.running_var.mul_(100).add_(99 * model.bn1.eps)
    row = criterion(name)
    plain, other = (
        score(name, collect(net, CHAIN.coupling, BATCHES, classification_loss, row.needs)) for net in (model, scaled)
    )
    np.testing.assert_allclose(other, plain, rtol=1e-8, atol=1e-12 * plain.max())
    assert plain[:4].max() > 0.01 * plain.max()


# Ensembles ------------------------------------------------------------------------------------------------------------


def test_an_ensemble_averages_ranks_and_reads_them_on_the_first_scale() -> None:
    made = replace(made_up(), weight_norm_U=np.array([1.0, 3.0, 3.0, 0.5, 9.0]))
    first = score("obd", made)
    mean = (np.argsort(np.argsort(first)) + np.array([1, 2.5, 2.5, 0, 4])) / 2
    np.testing.assert_allclose(score("obd+magnitude", made), np.interp(mean, np.arange(5), np.sort(first)))


def test_an_ensemble_needs_what_its_parts_need() -> None:
    found = criterion("sosp-h+magnitude+random")
    assert found.needs == {"gradient", "hessian_ones", "weight_norm"}
    assert found.name == "sosp-h+magnitude+random"
    assert found.update is None
    np.testing.assert_array_equal(score(found.name, everything()), found.score(everything()))


def test_an_ensemble_takes_nothing_but_the_order_from_all_but_the_first() -> None:
    made = made_up()
    larger = replace(made, weight_norm_U=made.require("weight_norm") ** 3)
    np.testing.assert_array_equal(score("obd+magnitude", larger), score("obd+magnitude", made))
    assert (score("magnitude+obd", larger) != score("magnitude+obd", made)).any()
    ranks = [np.argsort(score(name, made)) for name in ("obd+magnitude", "magnitude+obd")]
    np.testing.assert_array_equal(*ranks)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("obd+", "joins nothing on one side"),
        ("+", "joins nothing on one side"),
        ("obd++magnitude", "joins nothing on one side"),
        ("obd+magnitude+obd", "names obd more than once"),
        ("obd+sosph", "no criterion is called 'sosph'; did you mean sosp-h"),
        ("obd + magnitude", "no criterion is called 'obd '; did you mean obd"),
    ],
)
def test_ensembles_that_make_no_sense_are_refused(name: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        criterion(name)


# In words -------------------------------------------------------------------------------------------------------------


def test_the_table_tells_of_every_criterion_in_ascii_formulas() -> None:
    rows = criteria_table()
    assert [row.name for row in rows] == list(CRITERIA)
    assert all(row.score and row.score.isascii() and row.needs and row.cost and row.source for row in rows)
    words = {row.name: row.needs for row in rows}
    assert words["random"] == "nothing"
    assert words["magnitude"] == words["bn-scale"] == "weights only"
    assert words["obd"] == words["mfac"] == "labels"
    assert words["sosp-h"] == words["spectral"] == "labels, the Hessian"
    assert words["obc"] == "forward only"
    assert words["obd-ls"] == "labels"


def test_every_statistic_has_a_word_for_users() -> None:
    from archscan import criteria

    assert set(criteria._READS) == set(get_args(Need))


# Refusals -------------------------------------------------------------------------------------------------------------


def test_an_unknown_criterion_gets_the_closest_names() -> None:
    with pytest.raises(BadInput, match="no criterion is called 'sosph'; did you mean sosp-h"):
        score("sosph", made_up())
    with pytest.raises(BadInput, match="choose from random, magnitude"):
        score("quux", made_up())


def test_a_saliency_that_is_not_finite_is_refused() -> None:
    made = made_up()
    assert made.gradient_BU is not None
    made.gradient_BU[0, 2] = np.inf
    with pytest.raises(BadInput, match="taylor-fo saliency of unit 2 is inf"):
        score("taylor-fo", made)
