"""Criteria from the Fisher information of the gates against dense matrices, enumeration and finite differences."""

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archscan.criteria import CRITERIA, bayes, cbs, criterion, factors, mfac, obs, score
from archscan.errors import BadInput
from archscan.gate_statistics import GateStatistics
from archscan.losses import classification_loss
from tests import gate_nets, reference

SHAPES = st.tuples(st.integers(2, 12), st.integers(2, 12), st.integers(0, 2**20))


def drawn(samples: int, units: int, seed: int) -> np.ndarray:
    """Gradients whose units differ in scale and depend on one another."""
    draw = np.random.default_rng(seed)
    mixed = draw.normal(size=(samples, units)) @ (np.eye(units) + 0.5 * draw.normal(size=(units, units)))
    return mixed * draw.uniform(0.2, 2.0, units)


def of(factors_NU: np.ndarray, group_U: np.ndarray | None = None) -> GateStatistics:
    samples, units = factors_NU.shape
    group_U = np.arange(units) * 3 // units if group_U is None else group_U
    return GateStatistics(units, 0, (samples,), sample_gradient_NU=factors_NU, group_U=group_U)


def dense(factors_NU: np.ndarray) -> np.ndarray:
    return sum(np.outer(row, row) for row in factors_NU) / len(factors_NU)


def mean_diagonal(factors_NU: np.ndarray) -> float:
    found = np.diag(dense(factors_NU))
    return float(found[found > 0].mean())


def surgeon(fisher_UU: np.ndarray, damping: float, removed_U: np.ndarray) -> np.ndarray:
    """Gates after the update of OBS for sets, as the paper writes it."""
    inverse = np.linalg.inv(fisher_UU + damping * np.eye(len(fisher_UU)))
    change = -inverse[:, removed_U] @ np.linalg.inv(inverse[np.ix_(removed_U, removed_U)]) @ np.ones(removed_U.sum())
    return np.where(removed_U, 0.0, 1 + change)


# OBS and M-FAC --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SHAPES)
def test_obs_is_that_of_the_dense_inverse(shape: tuple[int, int, int]) -> None:
    gradients = drawn(*shape)
    damping = obs.DAMPENING * mean_diagonal(gradients)
    inverse = np.linalg.inv(dense(gradients) + damping * np.eye(shape[1]))
    expected = 0.5 / np.diag(inverse) - damping / 2
    np.testing.assert_allclose(score("obs", of(gradients)), expected, rtol=1e-6, atol=1e-9 * expected.max())


@settings(max_examples=40, deadline=None)
@given(SHAPES)
def test_mfac_is_that_of_the_dense_inverse_of_each_group(shape: tuple[int, int, int]) -> None:
    gradients = drawn(*shape)
    made, damping = of(gradients), mfac.DAMPENING * mean_diagonal(gradients)
    found = score("mfac", made)
    for group in np.unique(made.require("group")):
        own = np.flatnonzero(made.require("group") == group)
        inverse = np.linalg.inv(dense(gradients)[np.ix_(own, own)] + damping * np.eye(len(own)))
        np.testing.assert_allclose(found[own], 0.5 / np.diag(inverse) - damping / 2, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("samples", "rows"), [(70, 64), (9, 4), (5, 1)])
def test_the_recursion_gives_the_dense_inverse_whatever_its_blocks(
    samples: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mfac, "_ROWS", rows)
    gradients = drawn(samples, 8, 1)
    found = mfac.InverseFisher.of(gradients, 0.1)
    inverse = np.linalg.inv(dense(gradients) + 0.1 * np.eye(8))
    np.testing.assert_allclose(found.diagonal(), np.diag(inverse), rtol=1e-9)
    chosen = np.arange(8) % 3 == 0
    np.testing.assert_allclose(found.columns(chosen), inverse[:, chosen], atol=1e-10)


def test_one_group_makes_mfac_the_same_as_obs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mfac, "DAMPENING", obs.DAMPENING)
    made = of(drawn(9, 6, 0), np.zeros(6, dtype=np.int64))
    np.testing.assert_allclose(score("mfac", made), score("obs", made), rtol=1e-7)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.data())
def test_updates_are_those_of_the_dense_inverse(shape: tuple[int, int, int], data: st.DataObject) -> None:
    gradients, units = drawn(*shape), shape[1]
    removed = np.array(data.draw(st.lists(st.booleans(), min_size=units, max_size=units)))
    made, mean = of(gradients), mean_diagonal(gradients)
    expected = surgeon(dense(gradients), obs.UPDATE_DAMPENING * mean, removed)
    for name in ("obs", "cbs"):
        update = criterion(name).update
        assert update is not None
        np.testing.assert_allclose(update(made, removed), expected, atol=1e-7)
    found = mfac.mfac_update(made, removed)
    for group in np.unique(made.require("group")):
        own = np.flatnonzero(made.require("group") == group)
        expected = surgeon(dense(gradients)[np.ix_(own, own)], mfac.UPDATE_DAMPENING * mean, removed[own])
        np.testing.assert_allclose(found[own], expected, atol=1e-7)


def test_the_score_is_what_the_removal_costs_after_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obs, "DAMPENING", 1e-9)
    monkeypatch.setattr(obs, "UPDATE_DAMPENING", 1e-9)
    gradients = drawn(40, 6, 3)
    made, fisher = of(gradients), dense(gradients)
    for unit in range(6):
        gone = np.arange(6) == unit
        change = obs.obs_update(made, gone) - 1
        assert change @ fisher @ change / 2 == pytest.approx(score("obs", made)[unit], rel=1e-4)
        assert change @ fisher @ change <= fisher[unit, unit]


def test_a_unit_that_another_copies_costs_nothing_and_the_copy_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obs, "DAMPENING", 1e-8)
    monkeypatch.setattr(obs, "UPDATE_DAMPENING", 1e-8)
    gradients = drawn(30, 5, 2)
    gradients[:, 4] = gradients[:, 1]
    made = of(gradients)
    saliency = score("obs", made)
    assert saliency[[1, 4]].max() < 1e-6 * saliency[[0, 2, 3]].min()
    assert score("obd", made)[[1, 4]].min() > 1e-3
    np.testing.assert_allclose(obs.obs_update(made, np.arange(5) == 4), [1, 2, 1, 1, 0], atol=1e-4)


def test_a_unit_may_be_a_single_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gates of a linear model's weights give w² / 2[H⁻¹] of Hassibi and Stork, H that of the weights."""
    monkeypatch.setattr(obs, "DAMPENING", 1e-10)
    draw = np.random.default_rng(0)
    weights, weight_gradients = draw.normal(size=5), drawn(50, 5, 1)
    inverse = np.linalg.inv(dense(weight_gradients))
    np.testing.assert_allclose(
        score("obs", of(weight_gradients * weights)), weights**2 / (2 * np.diag(inverse)), rtol=1e-5
    )


def test_units_without_a_gradient_cost_nothing_and_keep_their_gates() -> None:
    gradients = drawn(6, 8, 0)
    gradients[:, [2, 5]] = 0.0
    made = of(gradients)
    for name in ("obd", "obs", "mfac", "evidence"):
        np.testing.assert_array_equal(score(name, made)[[2, 5]] < 1e-12, True)
    gates = obs.obs_update(made, np.arange(8) == 0)
    np.testing.assert_array_equal(gates[[2, 5]], 1.0)


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = drawn(6, 20, 0).astype(np.float32)
    whole = factors.leverage(gradients, 0.3), factors.gram(gradients), factors.ridge(gradients, np.arange(6.0), 0.3)
    monkeypatch.setattr(factors, "_BLOCK_NUMBERS", 18)
    parts = factors.leverage(gradients, 0.3), factors.gram(gradients), factors.ridge(gradients, np.arange(6.0), 0.3)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10)


def test_gates_that_all_lack_a_gradient_are_refused() -> None:
    for name in ("obs", "mfac", "laplace-snr"):
        with pytest.raises(BadInput, match="every gate gradient is 0"):
            score(name, of(np.zeros((3, 4))))


@pytest.mark.parametrize("removed", [np.zeros(3, dtype=bool), np.zeros(4)])
@pytest.mark.parametrize("update", [obs.obs_update, mfac.mfac_update])
def test_removed_units_are_told_by_truth_values(update: Callable[..., np.ndarray], removed: np.ndarray) -> None:
    with pytest.raises(BadInput, match="one truth value for each of the 4 units"):
        update(of(drawn(3, 4, 0)), removed)


# CBS ------------------------------------------------------------------------------------------------------------------


def halves(gradients: np.ndarray) -> list[float]:
    """The cost of every set of half the units."""
    fisher = dense(gradients)
    return [fisher[np.ix_(m, m)].sum() / 2 for m in combinations(range(len(fisher)), len(fisher) // 2)]


def first(chain: np.ndarray, size: int) -> np.ndarray:
    return np.isin(np.arange(len(chain)), chain[:size])


@pytest.mark.parametrize(("units", "far"), [(4, 0.01), (8, 0.03), (12, 0.06)])
def test_halves_are_close_to_the_cheapest_of_all(units: int, far: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 is the cheapest of all sets, 1 the mean of all; swaps bring greedy selection closer."""
    monkeypatch.setattr(cbs, "_LEVELS", 2)  # all of the first half may be swapped
    swaps, places = cbs._SWAPS, {0: [], cbs._SWAPS: []}
    for seed in range(12):
        gradients = drawn(10, units, seed)
        costs = halves(gradients)
        for allowed, found in places.items():
            monkeypatch.setattr(cbs, "_SWAPS", allowed)
            cost = cbs.cost(gradients, first(cbs.nested_sets(gradients)[0], units // 2))
            found.append((cost - min(costs)) / (np.mean(costs) - min(costs)))
    assert min(places[swaps]) > -1e-9
    assert np.mean(places[swaps]) < min(far, 0.5 * np.mean(places[0]))


@settings(max_examples=40, deadline=None)
@given(SHAPES)
def test_no_swap_improves_a_half(shape: tuple[int, int, int]) -> None:
    gradients = drawn(*shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cbs, "_LEVELS", 2)
        chain, _ = cbs.nested_sets(gradients)
    chosen = first(chain, shape[1] // 2)
    least = cbs.cost(gradients, chosen)
    for leaver in np.flatnonzero(chosen):
        for joiner in np.flatnonzero(~chosen):
            other = chosen.copy()
            other[[leaver, joiner]] = False, True
            assert cbs.cost(gradients, other) > least - 1e-7 * mean_diagonal(gradients)


def greedy(gradients: np.ndarray) -> list[int]:
    """The slow chain: at each turn the unit after which the set costs least."""
    inside = np.zeros(gradients.shape[1], dtype=bool)
    chain: list[int] = []
    for _ in range(gradients.shape[1]):
        prices = [
            np.inf if inside[u] else cbs.cost(gradients, inside | (np.arange(len(inside)) == u))
            for u in range(len(inside))
        ]
        chain.append(int(np.argmin(prices)))
        inside[chain[-1]] = True
    return chain


@settings(max_examples=20, deadline=None)
@given(SHAPES)
def test_chains_are_greedy_and_their_prices_add_up(shape: tuple[int, int, int]) -> None:
    gradients = drawn(*shape)
    chain, prices = cbs.nested_sets(gradients)  # so few units that a level has one: nothing to swap
    assert chain.tolist() == greedy(gradients)
    for size in range(1, shape[1] + 1):
        assert prices[:size].sum() == pytest.approx(cbs.cost(gradients, first(chain, size)), abs=1e-9)


@pytest.mark.parametrize("refreshes", [7, 512])
def test_chains_with_swaps_and_candidates_are_about_as_cheap_as_greedy_ones(
    refreshes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cbs, "_REFRESHES", refreshes)
    gradients = drawn(25, 160, 0).astype(np.float32)
    chain, _ = cbs.nested_sets(gradients)
    slow = np.array(greedy(gradients))
    assert sorted(chain) == list(range(160))
    costs = [[cbs.cost(gradients, first(found, size)) for size in range(16, 120)] for found in (chain, slow)]
    assert np.mean(np.divide(*costs)) < 1.2


def test_sorting_by_saliency_gives_the_nested_sets() -> None:
    gradients = drawn(20, 90, 1)
    saliency = score("cbs", of(gradients))
    chain, prices = cbs.nested_sets(gradients)
    assert np.argsort(saliency).tolist() == chain.tolist()
    assert (saliency >= 0).all()
    assert saliency.sum() == pytest.approx(prices.sum(), rel=1e-6)


def test_two_units_that_do_the_same_are_dearer_together_and_two_that_cancel_are_free() -> None:
    gradients = np.random.default_rng(0).normal(size=(200, 4))
    gradients[:, 3] = -gradients[:, 2]
    gradients[:, :2] = 2 * gradients[:, :1]
    saliency = score("cbs", of(gradients))
    assert saliency[[2, 3]].max() < saliency[[0, 1]].min()
    assert saliency[[2, 3]].sum() < 1e-6
    assert saliency.sum() == pytest.approx(2 * np.diag(dense(gradients))[0], rel=1e-6)


# Laplace and evidence -------------------------------------------------------------------------------------------------


def test_laplace_snr_is_one_over_the_posterior_deviation() -> None:
    gradients = drawn(7, 5, 0)
    fisher = np.diag(dense(gradients))
    prior = bayes.PRIOR * 7 * fisher.mean()
    np.testing.assert_allclose(score("laplace-snr", of(gradients)), 1 / np.sqrt(1 / (7 * fisher + prior)))


@settings(max_examples=40, deadline=None)
@given(SHAPES)
def test_evidence_shares_out_the_well_determined_parameters(shape: tuple[int, int, int]) -> None:
    gradients = drawn(*shape)
    made = of(gradients)
    saliency = score("evidence", made)
    for found in bayes.group_evidence(made):
        own = np.flatnonzero(made.require("group") == found.group)
        hessian = shape[0] * dense(gradients)[np.ix_(own, own)]
        alpha = found.prior_precision
        eigenvalues = np.linalg.eigvalsh(hessian).clip(0)
        gamma = (eigenvalues / (eigenvalues + alpha)).sum()
        assert found.parameters == len(own)
        assert found.well_determined == pytest.approx(gamma, rel=1e-6)
        assert alpha == pytest.approx(gamma / len(own), rel=1e-6)  # the evidence's update leaves it where it is
        assert 0 < found.use <= 1
        expected = np.diag(hessian @ np.linalg.inv(hessian + alpha * np.eye(len(own))))
        np.testing.assert_allclose(saliency[own], expected, rtol=1e-6, atol=1e-9)


def test_alpha_is_where_the_evidence_is_greatest() -> None:
    gradients = drawn(30, 6, 0)
    hessian = 30 * dense(gradients)

    def log_evidence(alpha: float) -> float:
        return 0.5 * (6 * np.log(alpha) - alpha * 6 - np.linalg.slogdet(hessian + alpha * np.eye(6))[1])

    alpha = bayes.prior_precision(gradients)
    assert log_evidence(alpha) > max(log_evidence(0.99 * alpha), log_evidence(1.01 * alpha))


def test_a_group_that_no_image_uses_has_no_well_determined_parameters() -> None:
    gradients = drawn(5, 6, 0)
    gradients[:, :2] = 0.0
    first, *_ = bayes.group_evidence(of(gradients))
    assert (first.well_determined, first.prior_precision, first.use) == (0.0, 0.0, 0.0)


# On networks ----------------------------------------------------------------------------------------------------------


def test_the_update_lowers_the_quadratic_loss_of_a_network() -> None:
    """Gates, Hessian-like curvature and the update fit together: the true loss of the network after it is no worse."""
    case, batch = gate_nets.RESIDUAL, gate_nets.images_and_labels(6)
    made = gate_nets.gather(case, "sample_gradient", batches=[batch])
    samples = reference.sample_gradients(case.model(), case.coupling, classification_loss, batch)
    np.testing.assert_allclose(score("obs", made), score("obs", of(samples)), rtol=1e-8)
    fisher, removed = dense(samples), np.arange(case.coupling.unit_count) == int(np.argmin(score("obs", made)))
    plain = np.where(removed, -1.0, 0.0)
    updated = obs.obs_update(made, removed) - 1
    assert updated @ fisher @ updated < plain @ fisher @ plain


def test_removing_a_channel_is_priced_with_the_constant_that_it_leaves_behind() -> None:
    """A gate is at the consumer: its gradient sees all of a channel, mean included, and not what varies alone."""
    case, (images, labels) = gate_nets.CHAIN, gate_nets.images_and_labels()
    model = case.model()
    with torch.no_grad():  # channel 0 of the first BatchNorm says nothing but a constant
        model.bn1.weight[0] = 0.0
        model.bn1.bias[0] = 2.0
    made = gate_nets.gather(case, "gradient", "sample_gradient", "group", model=model, batches=[(images, labels)])
    loss = reference.loss_of_gates(model, case.coupling, classification_loss, (images, labels))
    removed = reference.ones(case.coupling)
    removed[0] = 0.0
    assert abs(loss(removed) - loss(reference.ones(case.coupling))) > 1e-2
    for name in ("taylor-activation", "snip", "obd", "obs", "mfac", "cbs", "laplace-snr", "evidence"):
        saliency = score(name, made)
        assert saliency[0] > 0.05 * np.median(saliency), name


def test_every_criterion_with_an_update_says_so_in_the_table() -> None:
    assert {name for name, row in CRITERIA.items() if row.update is not None} >= {"obs", "mfac", "cbs"}
