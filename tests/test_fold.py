"""Gates folded into weights against gates that multiply activations."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from archscan.errors import BadInput, RebuildMismatch
from archscan.fold import check_fold, fold_gates, foldable_units, gated
from archscan.groups import Consumer, couple
from archscan.rebuild import CannotFollow, apply, rebuild, surgery_for
from tests import gate_nets, nets, reference
from tests.masked import random_kept, randomised, removed_units

INPUT = nets.INPUT.double()
COMPUTED = {"standardised-weight", "weight-norm", "weight-norm-transposed"}
PLAIN = {"plain", "residual", "depthwise", "grouped-places", "grouped-whole", "shared", "flatten", "channels-last"}

MASKED = [name for name, case in nets.CASES.items() if not case.mixing and name not in COMPUTED]
"""Nets whose slim version is the masked original."""


def images(seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=draw)


def random_gates(able_U: np.ndarray, seed: int = 0) -> np.ndarray:
    """Gates away from 1 and from one another; 1 where they cannot be folded."""
    return np.where(able_U, np.random.default_rng(seed).uniform(0.3, 1.8, len(able_U)), 1.0)


@pytest.mark.parametrize("case", gate_nets.CASES, ids=lambda case: case.name)
def test_folded_gates_are_gates_at_the_inputs_of_modules(case: gate_nets.Case) -> None:
    model, batch = case.model(), gate_nets.images_and_labels()[0]
    coupling = couple(model, batch)
    gates_U = random_gates(np.ones(coupling.unit_count, dtype=bool))
    folded = gated(model, coupling, gates_U)
    with reference.gated(model, coupling, torch.from_numpy(gates_U)), torch.no_grad():
        expected = model(batch)
    assert (expected - model(batch)).abs().max() > 1e-3
    np.testing.assert_allclose(folded(batch).detach(), expected, atol=1e-12)


@pytest.mark.parametrize("name", nets.CASES)
def test_folded_gates_are_gates_at_every_contraction(name: str) -> None:
    model = randomised(nets.CASES[name].make())
    coupling = couple(model, INPUT)
    able_U = foldable_units(coupling)
    gates_U = random_gates(able_U)
    before = copy.deepcopy(model.state_dict())
    folded = gated(model, coupling, gates_U)
    assert check_fold(model, folded, coupling, gates_U, images()) < 1e-10
    assert able_U.all() or name not in PLAIN
    assert not able_U.all() or name not in COMPUTED
    assert not able_U.any() or (folded(images()) - model(images())).abs().max() > 1e-3
    for path, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[path], rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", [name for name, case in nets.CASES.items() if not case.mixing and name not in COMPUTED]
)
@pytest.mark.parametrize("seed", range(2))
def test_a_slim_network_with_folded_gates_is_the_gated_original(name: str, seed: int) -> None:
    model = randomised(nets.CASES[name].make())
    coupling = couple(model, INPUT)
    kept = random_kept(coupling, seed)
    gates_U = random_gates(foldable_units(coupling), seed)
    gates_U[list(removed_units(coupling, kept))] = 0.0
    try:
        surgery = rebuild(model, INPUT, coupling, kept).surgery
    except CannotFollow:
        pytest.skip("its forward hard-codes a width that this plan changes")
    folded = fold_gates(model, coupling, gates_U, surgery)
    assert check_fold(model, folded, coupling, gates_U, images()) < 1e-10
    sizes = [tuple(tensor.shape) for tensor in folded.state_dict().values()]
    assert sizes == [tuple(tensor.shape) for tensor in apply(model, surgery).state_dict().values()]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=4, max_size=4), st.integers(0, 5))
def test_folding_twice_multiplies_gates(values: list[float], seed: int) -> None:
    model = randomised(nets.Residual(), seed)
    coupling = couple(model, INPUT)
    first, second = np.resize(values, coupling.unit_count), random_gates(np.ones(coupling.unit_count, dtype=bool))
    twice = gated(gated(model, coupling, first), coupling, second)
    torch.testing.assert_close(twice(images()), gated(model, coupling, first * second)(images()), rtol=1e-9, atol=1e-12)


def test_a_depthwise_convolution_keeps_its_weight() -> None:
    model = randomised(nets.Depthwise())
    coupling = couple(model, INPUT)
    folded = gated(model, coupling, random_gates(np.ones(coupling.unit_count, dtype=bool)))
    torch.testing.assert_close(folded.dw.weight, model.dw.weight, rtol=0, atol=0)
    assert (folded.project.weight != model.project.weight).any()


def test_a_weight_under_two_names_stays_one() -> None:
    model = randomised(nets.Shared())
    coupling = couple(model, INPUT)
    folded = gated(model, coupling, random_gates(np.ones(coupling.unit_count, dtype=bool)))
    assert folded.a.weight is folded.b.weight


def test_a_folded_network_trains() -> None:
    model = randomised(nets.Plain())
    coupling = couple(model, INPUT)
    folded = gated(model, coupling, np.full(coupling.unit_count, 0.5)).train()
    folded(images()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in folded.parameters())


def test_what_is_cut_need_not_be_folded() -> None:
    model = randomised(nets.StandardisedWeight())
    coupling = couple(model, INPUT)
    group = next(group for group in coupling.groups if group.name == "conv1")
    kept = {each.name: tuple(tuple(range(each.steps)) for _ in each.units) for each in coupling.groups}
    surgery = surgery_for(coupling, {**kept, "conv1": (tuple(range(1, group.steps)),)})
    gates_U = np.ones(coupling.unit_count)
    gates_U[group.units[0][0]] = 0.0
    folded, plain = fold_gates(model, coupling, gates_U, surgery), apply(model, surgery)
    for path, tensor in plain.state_dict().items():
        torch.testing.assert_close(folded.state_dict()[path], tensor, rtol=0, atol=0)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_a_computed_weight_is_refused_where_its_gates_differ_from_one() -> None:
    model = randomised(nets.StandardisedWeight())
    coupling = couple(model, INPUT)
    gates_U = np.where(foldable_units(coupling), 0.7, 1.0)
    assert gates_U.min() < gates_U.max()
    gated(model, coupling, gates_U)
    with pytest.raises(BadInput, match="cannot take up gates, since its weight is computed in every forward"):
        gated(model, coupling, np.full(coupling.unit_count, 0.7))


class Tied(nn.Module):
    """A weight that a linear layer multiplies by, and that is added to as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.fc(F.relu(self.conv(x)).mean((2, 3)))
        return out + self.fc.weight.square().sum(1)


def test_a_weight_with_another_use_is_refused() -> None:
    model = randomised(Tied())
    coupling = couple(model, INPUT)
    assert not foldable_units(coupling).all()
    with pytest.raises(BadInput, match=r"since fc\.weight is used at the model's own forward as well"):
        gated(model, coupling, np.full(coupling.unit_count, 0.5))


def test_a_weight_that_reads_other_channels_in_another_call_is_refused() -> None:
    case = gate_nets.CHAIN
    moved = [Consumer(c.contraction, 0, c.axis, c.units[::-1], c.weight, c.module) for c in case.coupling.consumers]
    coupling = replace(case.coupling, consumers=(*case.coupling.consumers, moved[1]))
    with pytest.raises(BadInput, match=r"conv2\.weight reads other channels in another call"):
        gated(case.model(), coupling, np.full(15, 0.5))


@pytest.mark.parametrize("gates_U", [np.ones(3), np.full(15, np.nan)])
def test_gates_that_do_not_fit_are_refused(gates_U: np.ndarray) -> None:
    with pytest.raises(BadInput, match="one finite gate for each of the 15 units"):
        gated(gate_nets.CHAIN.model(), gate_nets.CHAIN.coupling, gates_U)


def test_a_wrong_fold_does_not_pass() -> None:
    model = randomised(nets.Plain())
    coupling = couple(model, INPUT)
    gates_U = random_gates(np.ones(coupling.unit_count, dtype=bool))
    with pytest.raises(RebuildMismatch, match="more than rounding"):
        check_fold(model, model, coupling, gates_U, images())
    kept = {group.name: tuple(tuple(range(len(row))) for row in group.units) for group in coupling.groups}
    folded = fold_gates(model, coupling, gates_U, surgery_for(coupling, kept))
    assert check_fold(model, folded, coupling, gates_U, images()) < 1e-10
