"""Gate statistics against finite differences, dense Hessians and loops over samples."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archscan.errors import BadInput
from archscan.gates import collect
from archscan.groups import AxisUnits, ChannelGroup, Coupling, couple
from archscan.losses import classification_loss, sampled_label_loss
from tests import reference
from tests.gate_nets import CASES, CHAIN, CLASSES, DENSE, GROUPED, RESIDUAL, Case, consumer, gather, images_and_labels

ALL_PASSES = frozenset({"gradient", "sample_gradient", "fisher_gradient", "hessian_ones", "hessian_diagonal"})


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


# First order ----------------------------------------------------------------------------------------------------------


def test_gradient_is_that_of_finite_differences(case: Case) -> None:
    loss = reference.loss_of_gates(case.model(), case.coupling, classification_loss, images_and_labels())
    expected = reference.finite_difference_gradient(loss, reference.ones(case.coupling))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(gather(case, "gradient").require("gradient")[0], expected, atol=1e-8)


def test_sample_gradients_are_those_of_single_samples(case: Case) -> None:
    expected = reference.sample_gradients(case.model(), case.coupling, classification_loss, images_and_labels())
    np.testing.assert_allclose(gather(case, "sample_gradient").require("sample_gradient"), expected, atol=1e-12)


def test_probes_and_gates_agree(case: Case) -> None:
    probed = gather(case, "sample_gradient")
    multiplied = gather(case, "sample_gradient", "hessian_ones")
    np.testing.assert_allclose(probed.require("sample_gradient"), multiplied.require("sample_gradient"), atol=1e-12)


def test_mean_gradient_is_the_mean_of_sample_gradients_of_each_batch() -> None:
    batches = [images_and_labels(4, seed=1), images_and_labels(3, seed=2)]
    statistics = gather(CHAIN, "gradient", "sample_gradient", batches=batches)
    rows = statistics.require("sample_gradient")
    assert statistics.batch_sizes == (4, 3)
    assert statistics.samples == 7
    np.testing.assert_allclose(statistics.require("gradient"), [rows[:4].mean(0), rows[4:].mean(0)], atol=1e-14)


def test_sample_gradients_do_not_depend_on_the_split_into_batches() -> None:
    images, labels = images_and_labels(6)
    split = [(images[:1], labels[:1]), (images[1:4], labels[1:4]), (images[4:], labels[4:])]
    for need in ("sample_gradient", "fisher_gradient"):
        whole, parts = gather(CHAIN, need, seed=5), gather(CHAIN, need, seed=5, batches=split)
        np.testing.assert_allclose(whole.require(need), parts.require(need), atol=1e-12)


def test_any_loss_and_any_batch_will_do() -> None:
    images, _ = images_and_labels()
    goal = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(6, CLASSES)

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        weights = F.linear(
            batch["goal"], torch.eye(CLASSES, dtype=torch.float64)
        )  # a contraction before the model's own
        return F.linear((model(batch["images"]) - weights).square(), goal.new_ones(1, CLASSES)).mean()

    batch = {"images": images, "goal": goal}
    expected = reference.hessian(CHAIN.model(), CHAIN.coupling, loss_fn, batch).sum(1)
    statistics = gather(CHAIN, "hessian_ones", loss_fn=loss_fn, batches=[batch])
    np.testing.assert_allclose(statistics.require("hessian_ones")[0], expected, atol=1e-10)


def test_float32_is_close_to_float64() -> None:
    images, labels = images_and_labels()
    single = gather(RESIDUAL, *ALL_PASSES, model=RESIDUAL.model().float(), batches=[(images.float(), labels)])
    double = gather(RESIDUAL, *ALL_PASSES)
    assert single.require("sample_gradient").dtype == np.float32
    for need in ALL_PASSES:
        np.testing.assert_allclose(single.require(need), double.require(need), atol=1e-5)


def test_differentiation_starts_at_the_first_gated_consumer() -> None:
    model, needed = CHAIN.model(), []
    model.conv1.register_forward_hook(lambda _module, _args, output: needed.append(output.requires_grad))
    model.conv2.register_forward_hook(lambda _module, _args, output: needed.append(output.requires_grad))
    gather(CHAIN, "sample_gradient", model=model)
    assert needed == [False, True]


@pytest.mark.parametrize("case", [CHAIN, RESIDUAL, DENSE, GROUPED], ids=lambda case: case.name)
def test_gates_sit_where_coupling_found_them(case: Case) -> None:
    found = couple(case.model(), images_and_labels()[0])
    loss = reference.loss_of_gates(case.model(), found, classification_loss, images_and_labels())
    expected = reference.finite_difference_gradient(loss, reference.ones(found))
    free = np.array([u for group in found.groups if group.frozen is None for row in group.units for u in row])
    assert len(free) >= case.coupling.unit_count
    gradient = gather(Case("found", case.make, found), "gradient").require("gradient")[0]
    np.testing.assert_allclose(gradient[free], expected[free], atol=1e-8)


def test_frozen_units_have_no_gate() -> None:
    frozen = ChannelGroup("conv1", (tuple(range(4)),), 1, (), "held")
    open_ = ChannelGroup("conv2", (tuple(range(4, 9)),), 1, (), None)
    held = Case("held", CHAIN.make, replace(CHAIN.coupling, groups=(frozen, open_)))
    statistics, everything = gather(held, *ALL_PASSES), gather(CHAIN, *ALL_PASSES)
    np.testing.assert_allclose(statistics.require("gradient")[0, 4:], everything.require("gradient")[0, 4:], atol=1e-12)
    assert not statistics.require("sample_gradient")[:, :4].any()
    dense = reference.hessian(CHAIN.model(), CHAIN.coupling, classification_loss, images_and_labels())
    np.testing.assert_allclose(statistics.require("hessian_ones")[0, 4:], dense[4:, 4:].sum(1), atol=1e-10)


# Second order ---------------------------------------------------------------------------------------------------------


def test_hessian_ones_is_the_dense_hessians_row_sum(case: Case) -> None:
    batches = [images_and_labels(4, seed=1), images_and_labels(3, seed=2)]
    rows = gather(case, "hessian_ones", batches=batches).require("hessian_ones")
    for row, batch in zip(rows, batches, strict=True):
        dense = reference.hessian(case.model(), case.coupling, classification_loss, batch)
        assert np.abs(dense).max() > 1e-4
        np.testing.assert_allclose(row, dense.sum(1), atol=1e-10)


def test_hessian_diagonal_is_exact_with_as_many_probes_as_units(case: Case) -> None:
    batches = [images_and_labels(4, seed=1), images_and_labels(2, seed=2)]
    diagonal = gather(case, "hessian_diagonal", batches=batches, diagonal_probes=15).require("hessian_diagonal")
    dense = [reference.hessian(case.model(), case.coupling, classification_loss, batch) for batch in batches]
    np.testing.assert_allclose(diagonal, np.diag((4 * dense[0] + 2 * dense[1]) / 6), atol=1e-10)


@pytest.mark.parametrize(("need", "seen"), [("gradient", [5]), ("hessian_ones", [3, 2]), ("sharpness", [5, 3, 2])])
def test_halves_take_turns_where_it_goes_backward_twice(need: str, seen: list[int]) -> None:
    model, sizes = CHAIN.model(), []
    model.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    gather(CHAIN, need, batches=[images_and_labels(5)], model=model)
    assert sizes[: len(seen)] == seen  # the first pass of sharpness takes no gradient
    sizes.clear()
    own_loss = gather(
        CHAIN, need, batches=[images_and_labels(5)], model=model, loss_fn=lambda m, b: classification_loss(m, b)
    )
    assert set(sizes) == {5}
    np.testing.assert_allclose(
        gather(CHAIN, need, batches=[images_and_labels(5)]).require(need), own_loss.require(need)
    )


def test_hutchinsons_error_is_what_its_variance_says() -> None:
    images, labels = images_and_labels(6)
    dense = np.stack(
        [
            reference.hessian(
                RESIDUAL.model(), RESIDUAL.coupling, classification_loss, (images[n : n + 1], labels[n : n + 1])
            )
            for n in range(6)
        ]
    )
    off_diagonal = dense * (1 - np.eye(RESIDUAL.coupling.unit_count))
    probes, trials = 4, 60
    variance = np.square(off_diagonal).sum(2).mean(0) / (6 * probes)
    model = RESIDUAL.model()
    errors = [
        gather(RESIDUAL, "hessian_diagonal", model=model, diagonal_probes=probes, seed=seed).require("hessian_diagonal")
        - np.diagonal(dense, axis1=1, axis2=2).mean(0)
        for seed in range(trials)
    ]
    assert np.abs(np.mean(errors, 0)).max() < 5 * np.sqrt(variance.max() / trials)
    assert np.square(errors).mean() == pytest.approx(variance.mean(), rel=0.35)


def test_a_loss_that_is_linear_in_the_gates_has_no_hessian() -> None:
    coupling = Coupling((), 4, {}, (consumer(1, "1", range(4), -1),))
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).double()
    linear = Case("linear", lambda: model, coupling)
    batch = (torch.ones(2, 3, dtype=torch.float64),)
    statistics = gather(
        linear, *(ALL_PASSES - {"fisher_gradient"}), batches=[batch], loss_fn=lambda m, b: m(b[0]).mean()
    )
    assert not statistics.require("hessian_ones").any()
    assert not statistics.require("hessian_diagonal").any()


# Fisher ---------------------------------------------------------------------------------------------------------------


def test_drawn_labels_give_the_gauss_newton_matrix_on_average() -> None:
    images, labels = images_and_labels(3)
    repeats = 3000
    factors = gather(
        GROUPED, "fisher_gradient", batches=[(images.repeat(repeats, 1, 1, 1), labels.repeat(repeats))]
    ).require("fisher_gradient")
    exact = reference.gauss_newton(GROUPED.model(), GROUPED.coupling, images)
    estimate = factors.T @ factors / len(factors)
    assert np.linalg.norm(estimate - exact) < 0.05 * np.linalg.norm(exact)


def test_a_loss_with_drawn_labels_gives_the_same_as_the_fisher_gradient() -> None:
    statistics = gather(CHAIN, "sample_gradient", "fisher_gradient", loss_fn=sampled_label_loss(7), seed=7)
    np.testing.assert_array_equal(statistics.require("sample_gradient"), statistics.require("fisher_gradient"))


def test_passes_can_be_shared_or_not(case: Case) -> None:
    together = gather(case, *ALL_PASSES, seed=3)
    for need in sorted(ALL_PASSES):
        alone = gather(case, need, seed=3)
        np.testing.assert_allclose(alone.require(need), together.require(need), atol=1e-10)
        with pytest.raises(BadInput, match="the statistics hold no"):
            alone.require(next(iter(ALL_PASSES - {need})))  # type: ignore[arg-type]


# Weights --------------------------------------------------------------------------------------------------------------


def test_weight_norm_is_over_producers_and_consumers() -> None:
    model = GROUPED.model()
    weights = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
    norms = gather(GROUPED, "weight_norm", model=model, batches=[]).require("weight_norm")
    for u in range(4):
        half = slice(0, 2) if u < 2 else slice(2, 4)
        slices = [weights["conv1.weight"][u].ravel(), weights["conv2.weight"][half, u % 2].ravel()]
        assert norms[u] == pytest.approx(np.linalg.norm(np.concatenate(slices)))
        slices = [weights["conv2.weight"][u].ravel(), weights["fc.weight"][:, u]]
        assert norms[4 + u] == pytest.approx(np.linalg.norm(np.concatenate(slices)))


def test_weight_norm_of_a_table_of_owners_that_spans_the_weight() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    coupling = Coupling((), 3, {"0.weight": (AxisUnits(1, np.array([[0, 1], [2, -1]]), "in"),)}, ())
    norms = collect(model, coupling, [], classification_loss, frozenset({"weight_norm"})).require("weight_norm")
    np.testing.assert_allclose(norms, model[0].weight.detach().abs().flatten()[:3].numpy())


def test_bn_scale_is_absolute_and_nan_without_a_batchnorm() -> None:
    model = CHAIN.model()
    with torch.no_grad():
        model.bn1.weight.copy_(torch.tensor([-2.0, 0.5, 0.0, 1.0]))
    scale = gather(CHAIN, "bn_scale", model=model, batches=[]).require("bn_scale")
    np.testing.assert_array_equal(scale[:4], [2.0, 0.5, 0.0, 1.0])
    np.testing.assert_array_equal(scale[4:9], model.bn2.weight.detach().numpy())
    assert np.isnan(scale[9:]).all()


def test_bn_scale_of_a_network_without_batchnorm_is_refused() -> None:
    with pytest.raises(BadInput, match="has a BatchNorm"):
        gather(GROUPED, "bn_scale", batches=[])


@pytest.mark.parametrize(("tensor", "need"), [("conv2.weight", "weight_norm"), ("bn1.weight", "bn_scale")])
def test_weights_that_are_not_finite_are_refused(tensor: str, need: str) -> None:
    model = CHAIN.model()
    model.state_dict()[tensor].view(-1)[0] = float("nan")
    with pytest.raises(BadInput, match="saved from a sound training run"):
        gather(CHAIN, need, model=model, batches=[])


# Nothing left changed -------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        [module.training for module in model.modules()],
        [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        torch.get_rng_state(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_changed(fails: bool) -> None:
    model = CHAIN.model().train()
    model.bn2.eval()
    model.fc1.weight.requires_grad_(False)
    model.fc2.weight.grad = torch.ones_like(model.fc2.weight)
    model.conv2.register_forward_pre_hook(lambda _module, _args: None)
    images, labels = images_and_labels()
    before = copy.deepcopy(snapshot(model))

    def loss_fn(inner: nn.Module, batch: Any) -> Tensor:
        torch.rand(3)
        if fails:
            raise KeyError("a bug of the caller's")
        return classification_loss(inner, batch)

    if fails:
        with pytest.raises(KeyError):
            gather(CHAIN, *ALL_PASSES, model=model, batches=[(images, labels)], loss_fn=loss_fn)
    else:
        with torch.no_grad():
            gather(CHAIN, *ALL_PASSES, model=model, batches=[(images, labels)], loss_fn=loss_fn)
    assert not images.requires_grad
    torch.testing.assert_close(snapshot(model)[:-2], before[:-2], rtol=0, atol=0)
    assert torch.equal(snapshot(model)[-2], before[-2])
    assert torch.is_grad_enabled()


def test_progress_counts_batches() -> None:
    seen: list[tuple[int, int]] = []

    def endless() -> Iterator[Any]:
        yield images_and_labels(2)

    gather(CHAIN, "gradient", batches=[images_and_labels(2)] * 3, progress=lambda *done: seen.append(done))
    gather(CHAIN, "gradient", batches=endless(), progress=lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3), (1, 0)]


def test_batches_are_not_touched_for_weight_statistics() -> None:
    def untouchable() -> Iterator[Any]:
        raise AssertionError
        yield

    assert gather(CHAIN, "weight_norm", batches=untouchable()).samples == 0
