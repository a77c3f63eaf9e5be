"""Criteria from second moments, gradient matrices and Hessian blocks, against dense matrices in float64."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from archscan import sharpness as sharpness_module
from archscan.criteria import columns, score
from archscan.criteria.reconstruction import obc_update, unexplained_share
from archscan.criteria.redundancy import effective_rank
from archscan.errors import BadInput
from archscan.gate_statistics import GateStatistics
from archscan.groups import couple
from archscan.layer_statistics import InputBlock, LayerMoments
from archscan.least_squares import Effort, solve
from archscan.losses import classification_loss
from archscan.positions import Layer, Sample
from tests import reference
from tests.gate_nets import CHAIN, GROUPED, RESIDUAL, Case, gather, images_and_labels

BOTH = ("layer_inputs", "layer_gradients")
LAYER_CASES = (CHAIN, RESIDUAL, GROUPED)


@pytest.fixture(params=LAYER_CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def readers(statistics: GateStatistics) -> list[tuple[LayerMoments, InputBlock]]:
    return [(layer, block) for layer in statistics.require_layers("layer_inputs") for block in layer.blocks]


def ridge_of(moment_KK: np.ndarray) -> float:
    return columns.DAMPENING * np.trace(moment_KK) / len(moment_KK)


def refitted_error(block: InputBlock, moment_KK: np.ndarray, gone_K: np.ndarray) -> float:
    """min over Ŵ of E‖W x − Ŵ x_K‖² + λ ‖W_K − Ŵ‖², by least squares on rows of which A is the second moment."""
    values, vectors = np.linalg.eigh(moment_KK)
    root = np.sqrt(values.clip(min=0))[:, None] * vectors.T
    rows = np.vstack([root, np.sqrt(ridge_of(moment_KK)) * np.diag(~gone_K)])
    wanted = rows @ block.weight_OK.T
    found, *_ = np.linalg.lstsq(rows[:, ~gone_K], wanted, rcond=None)
    return float(np.square(wanted - rows[:, ~gone_K] @ found).sum())


# Kronecker factors ----------------------------------------------------------------------------------------------------


def fisher_of(layer: LayerMoments, block: InputBlock, gradient_GOO: np.ndarray, *, damped: bool) -> np.ndarray:
    """A ⊗ Γ, for weights laid out column after column."""
    moment_KK = block.gram_KK / layer.samples
    if damped:
        moment_KK = moment_KK + ridge_of(moment_KK) * np.eye(len(moment_KK))
    return np.kron(moment_KK, gradient_GOO[block.group] / layer.samples)


def blocks_of(statistics: GateStatistics) -> Iterator[tuple[LayerMoments, InputBlock, np.ndarray]]:
    gradients = statistics.require("layer_gradients")
    for layer, gradient_GOO in zip(statistics.require_layers("layer_inputs"), gradients, strict=True):
        for block in layer.blocks:
            yield layer, block, gradient_GOO


def test_kfac_is_half_the_quadratic_form_of_the_dense_kronecker_product(case: Case) -> None:
    statistics = gather(case, *BOTH)
    expected = np.zeros(case.coupling.unit_count)
    for layer, block, gradient_GOO in blocks_of(statistics):
        dense = fisher_of(layer, block, gradient_GOO, damped=False)
        for u in np.unique(block.unit_K):
            change = np.where(block.unit_K == u, block.weight_OK, 0.0).T.reshape(-1)
            expected[u] += change @ dense @ change / 2
    np.testing.assert_allclose(score("kfac", statistics), expected, rtol=1e-10)


def test_kfac_obs_is_the_least_of_the_dense_quadratic_form(case: Case) -> None:
    statistics = gather(case, *BOTH)
    expected = np.zeros(case.coupling.unit_count)
    for layer, block, gradient_GOO in blocks_of(statistics):
        dense = fisher_of(layer, block, gradient_GOO, damped=True)
        for u in np.unique(block.unit_K):
            gone = np.repeat(block.unit_K == u, len(block.weight_OK))
            exact = fisher_of(layer, block, gradient_GOO, damped=False)  # what goes has no part in the damping
            change = block.weight_OK.T.reshape(-1)[gone]
            within, across = exact[np.ix_(gone, gone)], dense[np.ix_(gone, ~gone)]
            rest = np.linalg.pinv(dense[np.ix_(~gone, ~gone)], rcond=1e-12, hermitian=True)
            expected[u] += change @ (within - across @ rest @ across.T) @ change / 2
    np.testing.assert_allclose(score("kfac-obs", statistics), expected, rtol=1e-6)
    assert (score("kfac-obs", statistics) <= score("kfac", statistics)).all()


def test_kfac_is_obd_where_the_fisher_information_is_a_kronecker_product() -> None:
    """For a layer that reads single positions of one sample there is no sum that is taken apart."""
    batch = images_and_labels(1)
    statistics = gather(CHAIN, *BOTH, "sample_gradient", batches=[batch])
    linear = slice(4, 15)
    np.testing.assert_allclose(score("kfac", statistics)[linear], score("obd", statistics)[linear], rtol=1e-10)


# Least squares --------------------------------------------------------------------------------------------------------


def test_obc_is_the_error_that_exact_least_squares_leaves(case: Case) -> None:
    statistics = gather(case, "layer_inputs")
    expected = np.zeros(case.coupling.unit_count)
    for layer, block in readers(statistics):
        for u in np.unique(block.unit_K):
            expected[u] += refitted_error(block, block.gram_KK / layer.samples, block.unit_K == u)
    np.testing.assert_allclose(score("obc", statistics), expected, rtol=1e-6)


def test_a_unit_is_charged_in_every_layer_that_reads_it_and_in_none_that_makes_it() -> None:
    statistics = gather(RESIDUAL, "layer_inputs")
    names = [layer.module for layer in statistics.require_layers("layer_inputs")]
    assert names == ["inner", "outer", "side", "fc"]
    parts = [
        score("obc", replace(statistics, layer_inputs_L=(layer,)))
        for layer in statistics.require_layers("layer_inputs")
    ]
    np.testing.assert_allclose(sum(parts), score("obc", statistics))
    assert [list(np.flatnonzero(part)) for part in parts] == [[0, 1, 2, 3], [4, 5, 6], [0, 1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize("case", [CHAIN, GROUPED], ids=lambda case: case.name)
def test_the_update_is_exact_least_squares_for_every_subset(case: Case) -> None:
    statistics = gather(case, "layer_inputs")
    for layer, block in readers(statistics):
        units, moment_KK = np.unique(block.unit_K), block.gram_KK / layer.samples
        for size in range(1, min(len(units), 4)):
            for gone in combinations(units.tolist(), size):
                removed_U = np.isin(np.arange(case.coupling.unit_count), gone)
                new_OK = obc_update(block, layer, removed_U)
                gone_K = removed_U[block.unit_K]
                assert not new_OK[:, gone_K].any()
                lost_OK = new_OK - block.weight_OK
                penalty = ridge_of(moment_KK) * np.square(lost_OK[:, ~gone_K]).sum()
                error = np.trace(lost_OK @ moment_KK @ lost_OK.T) + penalty
                assert error == pytest.approx(refitted_error(block, moment_KK, gone_K), rel=1e-6)


def test_the_update_of_single_units_costs_what_obc_says() -> None:
    statistics = gather(CHAIN, "layer_inputs")
    layer, block = readers(statistics)[0]
    for u in range(4):
        lost_OK = obc_update(block, layer, np.arange(15) == u) - block.weight_OK
        moment_KK, gone_K = block.gram_KK / layer.samples, block.unit_K == u
        penalty = ridge_of(moment_KK) * np.square(lost_OK[:, ~gone_K]).sum()
        error = np.trace(lost_OK @ moment_KK @ lost_OK.T) + penalty
        assert error == pytest.approx(score("obc", statistics)[u])


def test_the_update_is_what_the_repair_by_least_squares_finds() -> None:
    """`reconstruct` solves for the same weights, where the ridge is the same and no intercept is free."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, 4, 6, 6, dtype=torch.float64, generator=draw)
    weight = torch.randn(3, 4, 3, 3, dtype=torch.float64, generator=draw)
    target = torch.nn.functional.conv2d(inputs, weight)
    kept = [0, 2, 3]
    bare = Layer(weight[:, kept], torch.zeros(3), torch.ones(3), torch.zeros(3), intercept=False)
    columns_KR = torch.nn.functional.unfold(inputs, 3).permute(1, 0, 2).reshape(36, -1).numpy()
    gram_KK = columns_KR @ columns_KR.T
    unit_K = np.repeat(np.arange(4), 9)
    block = InputBlock(0, np.arange(36), unit_K, weight.reshape(3, 36).numpy(), gram_KK, columns_KR.sum(1))
    kept_K = unit_K != 1
    strength = 0.1 * np.diag(gram_KK)[kept_K].mean()  # as the repair counts it: over what is kept
    sample = Sample(inputs[:, kept], target)
    found = solve(bare, [sample], [sample], Effort(rows_per_column=float("inf"), ridges=(0.1,)))
    updated = obc_update(
        block, LayerMoments("layer", 5, 16, (block,)), np.arange(4) == 1, strength / np.diag(gram_KK).mean()
    )
    assert found.ridge == 0.1
    np.testing.assert_allclose(updated[:, kept_K], found.weight.reshape(3, 27).numpy(), atol=1e-10)


def test_an_update_keeps_something() -> None:
    layer, block = readers(gather(CHAIN, "layer_inputs"))[0]
    with pytest.raises(BadInput, match="conv2 would read no channel any more"):
        obc_update(block, layer, np.ones(15, dtype=bool))
    np.testing.assert_array_equal(obc_update(block, layer, np.zeros(15, dtype=bool)), block.weight_OK)


def made_layer(inputs_NK: np.ndarray, weight_OK: np.ndarray) -> GateStatistics:
    """A linear layer that reads one unit per column."""
    units = len(inputs_NK[0])
    gram_KK = inputs_NK.T @ inputs_NK
    block = InputBlock(0, np.arange(units), np.arange(units), weight_OK, gram_KK, inputs_NK.sum(0))
    layer = LayerMoments("layer", len(inputs_NK), 1, (block,))
    return GateStatistics(units, sample_gradient_NU=np.ones((2, units)), layer_inputs_L=(layer,))


def test_copies_and_constants_can_be_given_by_others_and_noise_cannot() -> None:
    rng = np.random.default_rng(0)
    noise_N3 = rng.normal(size=(400, 3))
    inputs = np.column_stack([noise_N3[:, 0], noise_N3[:, 0], noise_N3[:, 1], np.full(400, 2.0), noise_N3[:, 2]])
    share_U = unexplained_share(made_layer(inputs, rng.normal(size=(2, 5))))
    assert share_U[[0, 1, 3]].max() < 0.03
    assert share_U[[2, 4]].min() > 0.95
    statistics = made_layer(inputs, rng.normal(size=(2, 5)))
    np.testing.assert_allclose(score("obd-ls", statistics), 0.5 * unexplained_share(statistics))
    assert score("obc", statistics)[3] > 10 * score("obc", statistics)[0]  # without an intercept, a constant is needed


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), samples=st.integers(2, 9), units=st.integers(1, 8), dead=st.booleans())
def test_shares_are_shares(seed: int, samples: int, units: int, dead: bool) -> None:
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(samples, units)) + rng.normal(size=units)
    inputs[:, 0] *= not dead
    share_U = unexplained_share(made_layer(inputs, rng.normal(size=(3, units))))
    assert (share_U >= 0).all()
    assert (share_U <= 1 + 1e-9).all()


def test_inputs_that_hardly_vary_can_be_given_by_the_intercept() -> None:
    """Rounding to float32 leaves a centred moment that is not positive definite."""
    rng = np.random.default_rng(0)
    made = made_layer(3 + 1e-6 * rng.normal(size=(8, 200)), rng.normal(size=(2, 200)))
    (layer,) = made.require_layers("layer_inputs")
    (block,) = layer.blocks
    rounded = replace(block, gram_KK=block.gram_KK.astype(np.float32).astype(np.float64), sum_K=block.sum_K)
    noisy = rounded.gram_KK * (1 + 1e-6 * rng.normal(size=(200, 200)))
    rounded = replace(rounded, gram_KK=(noisy + noisy.T) / 2)
    share_U = unexplained_share(replace(made, layer_inputs_L=(replace(layer, blocks=(rounded,)),)))
    assert share_U.max() < 1e-3


def test_a_layer_that_sees_nothing_is_charged_nothing() -> None:
    silent = made_layer(np.zeros((4, 3)), np.ones((2, 3)))
    for name in ("obc", "obd-ls"):
        np.testing.assert_array_equal(score(name, silent), 0)


def test_a_moment_that_cannot_be_inverted_is_refused() -> None:
    with pytest.raises(BadInput, match="the inputs of conv9 have a second moment that cannot be inverted"):
        columns.inverse(np.array([[1.0, 2.0], [2.0, 1.0]]), "conv9")


# Effective rank -------------------------------------------------------------------------------------------------------


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(np.array([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3)
    assert effective_rank(np.array([1.0, 1e-9])) == pytest.approx(1, abs=1e-6)
    assert effective_rank(np.zeros(2)) == 0
    p = np.array([0.5, 0.3, 0.2])
    assert effective_rank(7 * p) == pytest.approx(np.prod(p**-p))


def test_gradient_rank_is_the_leverage_in_the_leading_directions() -> None:
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(9, 5)) @ rng.normal(size=(5, 5))
    group_U = np.array([0, 1, 0, 0, 1])
    scores = score("gradient-rank", GateStatistics(5, sample_gradient_NU=gradients, group_U=group_U))
    for members in ([0, 2, 3], [1, 4]):
        values, vectors = np.linalg.eigh(gradients[:, members].T @ gradients[:, members])
        values, vectors = np.sqrt(values[::-1]), vectors[:, ::-1]
        p = values / values.sum()
        rank = np.prod(p**-p)
        whole = int(rank)
        expected = np.square(vectors[:, :whole]).sum(1) + (rank - whole) * np.square(vectors[:, whole])
        np.testing.assert_allclose(scores[members], expected)
        assert scores[members].sum() == pytest.approx(rank)


def test_gradients_along_one_direction_make_one_unit_worth_of_saliency() -> None:
    gradients = np.outer(np.arange(1.0, 7.0), [1.0, 2.0, 0.0, 2.0])
    scores = score("gradient-rank", GateStatistics(4, sample_gradient_NU=gradients, group_U=np.zeros(4, dtype=int)))
    np.testing.assert_allclose(scores, np.array([1, 4, 0, 4]) / 9, atol=1e-9)


# Sharpness ------------------------------------------------------------------------------------------------------------


def block_eigenvalue(matrix: np.ndarray) -> float:
    return float(np.abs(np.linalg.eigvalsh(matrix)).max())


@pytest.mark.parametrize("net", [CHAIN, RESIDUAL], ids=lambda case: case.name)
def test_spectral_is_that_of_the_dense_hessians_blocks(net: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharpness_module, "POWER_STEPS", 20)
    batches = [images_and_labels(4, seed=1), images_and_labels(2, seed=2)]
    batch = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    coupling = couple(net.model(), batch[0])
    statistics = gather(Case("found", net.make, coupling), "sharpness", "read_norm", "group", batches=iter(batches))
    dense = reference.hessian(net.model(), coupling, classification_loss, batch)
    norm_U, group_U = statistics.require("read_norm"), statistics.require("group")
    checked = 0
    for number, group in enumerate(coupling.groups):
        members = np.flatnonzero(group_U == number)
        if group.frozen is None:
            scaled = dense[np.ix_(members, members)] / np.outer(norm_U[members], norm_U[members])
            expected = 0.5 * block_eigenvalue(scaled) * norm_U[members] ** 2
            np.testing.assert_allclose(score("spectral", statistics)[members], expected, rtol=1e-3)
            checked += 1
    assert checked >= 2


def test_read_norm_is_over_consumers_alone() -> None:
    model = GROUPED.model()
    norms = gather(GROUPED, "read_norm", model=model, batches=[]).require("read_norm")
    weight = model.conv2.weight.detach().numpy()  # type: ignore[union-attr,operator]
    assert norms[3] == pytest.approx(np.linalg.norm(weight[2:, 1]))
    assert norms[6] == pytest.approx(np.linalg.norm(model.fc.weight.detach().numpy()[:, 2]))  # type: ignore[union-attr,operator]


def test_spectral_needs_weights() -> None:
    with pytest.raises(BadInput, match="no weights are known that read a unit"):
        score("spectral", gather(RESIDUAL, "sharpness", "read_norm"))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), units=st.integers(1, 7), groups=st.integers(1, 3))
def test_sharpness_never_exceeds_the_largest_eigenvalue(seed: int, units: int, groups: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(units, units))
    matrix = matrix + matrix.T
    group_U, norm_U = rng.integers(0, groups, units), rng.random(units) + 0.1
    same = group_U[:, None] == group_U
    found = sharpness_module.sharpness(lambda vector_U: (same * matrix) @ vector_U, group_U, norm_U)
    for group in np.unique(group_U):
        members = group_U == group
        largest = block_eigenvalue((matrix / np.outer(norm_U, norm_U))[np.ix_(members, members)])
        assert (found[members] <= largest * (1 + 1e-9)).all()
        assert np.ptp(found[members]) == 0


def test_units_that_nothing_reads_take_no_part_in_sharpness() -> None:
    found = sharpness_module.sharpness(lambda v: np.array([3.0, 50.0]) * v, np.zeros(2, dtype=int), np.array([1.0, 0]))
    np.testing.assert_allclose(found, 3)


def test_random_signs_leave_what_is_within_groups() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(6, 6))
    matrix = torch.from_numpy(matrix + matrix.T)
    group_U, vector_U = np.array([0, 1, 2, 0, 1, 2]), rng.normal(size=6)
    like_NU = torch.zeros(40_000, 6, dtype=torch.float64)

    def product(most: int) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        return sharpness_module.groupwise_product(lambda v: v @ matrix, vector_U, group_U, like_NU, draw, most)

    exact = ((group_U[:, None] == group_U) * matrix.numpy()) @ vector_U
    np.testing.assert_allclose(product(3)[0], exact, atol=1e-12)
    noisy = product(2)
    assert np.abs(noisy[0].numpy() - exact).max() > 0.1
    np.testing.assert_allclose(noisy.mean(0), exact, atol=0.1)
