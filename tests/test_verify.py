"""The proof: it passes for right networks, fails for each kind of wrong one, and says where it does not apply."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import archscan  # noqa: F401 - before anything that may import torchvision
from archscan.errors import RebuildMismatch
from archscan.groups import couple, freeze
from archscan.randomize import near_activations, randomize
from archscan.rebuild import apply, rebuild, surgery_for
from archscan.settle import narrowed
from archscan.surgery import Cut, Surgery, named_tensors
from archscan.verify import TOLERANCE, Verification, check_price, masked_original, output_tensors, prove, verify
from tests import hand_couplings as hand


@pytest.fixture(params=hand.EXACT, ids=lambda make: make.__name__)
def case(request: pytest.FixtureRequest) -> hand.Case:
    torch.manual_seed(0)
    return request.param()


def test_right_network_passes_in_float64(case: hand.Case) -> None:
    slim = rebuild(case.model, case.inputs, case.coupling, case.kept)
    found = prove(case.model, slim.model, slim.surgery, case.coupling, case.kept, case.inputs)
    assert (found.applicable, found.passed, found.reason, found.dtype) == (True, True, "", "float64")
    assert found.max_abs_error <= 1e-12
    assert found.tolerance > 0


def test_masked_original_zeroes_consumers_alone(case: hand.Case) -> None:
    before = {name: tensor.clone() for name, tensor in named_tensors(case.model)}
    masked = dict(named_tensors(masked_original(case.model, case.coupling, case.kept)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(case.model))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, masked[name])}
    consumers = {name for name, axes in case.coupling.tensors.items() if any(axis.role == "in" for axis in axes)}
    assert changed
    assert {name.replace("again", "twice") for name in changed} <= consumers
    assert all(((masked[name] == before[name]) | (masked[name] == 0)).all() for name in changed)


def test_masked_depthwise_weight_keeps_its_values() -> None:
    case = hand.depthwise()
    masked = masked_original(case.model, case.coupling, case.kept)
    assert torch.equal(masked[1].weight, case.model[1].weight)
    removed = [0, 1, 6, 7]
    assert not masked[3].weight[:, removed].any()
    assert torch.equal(masked[3].weight[:, 2:6], case.model[3].weight[:, 2:6])


def test_masked_grouped_weight_is_masked_row_by_row() -> None:
    case = hand.grouped()
    weight = masked_original(case.model, case.coupling, case.kept)[1].weight
    zero = (weight == 0).all(dim=(2, 3))
    expected = torch.tensor([[False, False, True, False]] * 4 + [[True, False, False, False]] * 4)
    assert torch.equal(zero, expected)


# --- wrong networks must fail ----------------------------------------------------------------------------------------


def wrong(case: hand.Case, **cuts: tuple[Cut, ...]) -> tuple[nn.Module, Surgery]:
    right = surgery_for(case.coupling, case.kept)
    surgery = Surgery({**right.cuts, **{name.replace("__", "."): cut for name, cut in cuts.items()}})
    return apply(case.model, surgery), surgery


@pytest.mark.parametrize(
    "cuts",
    [
        {"first__weight": (Cut(0, (0, 2, 4)),)},
        {"first__bias": (Cut(0, (0, 1, 2)),)},
        {"second__weight": (Cut(0, (1, 3)), Cut(1, (0, 1, 5)))},
        {"act__weight": (Cut(0, (0, 1)),)},
        {"head__weight": (Cut(1, (4, 5, 6, 7, 8, 9, 10, 11)),)},
        {"norm__running_mean": (Cut(0, (0, 1, 5)),)},
        {"norm__running_var": (Cut(0, (0, 1, 5)),)},
        {"norm__weight": (Cut(0, (0, 1, 5)),)},
        {"norm__bias": (Cut(0, (0, 1, 5)),)},
    ],
    ids=lambda cuts: next(iter(cuts)),
)
def test_each_wrong_index_is_seen_though_the_norm_is_fresh(cuts: dict[str, tuple[Cut, ...]]) -> None:
    torch.manual_seed(0)
    case = hand.chain()
    slim, surgery = wrong(case, **cuts)
    found = prove(case.model, slim, surgery, case.coupling, case.kept, case.inputs)
    assert found.applicable
    assert not found.passed
    assert found.reason


def test_forgotten_consumer_is_seen() -> None:
    """A coupling that does not know that the head reads `second` would cut the wrong thing; here it masks nothing."""
    torch.manual_seed(0)
    case = hand.chain()
    slim = rebuild(case.model, case.inputs, case.coupling, case.kept)
    tensors = {name: axes for name, axes in case.coupling.tensors.items() if name != "head.weight"}
    blind = replace(case.coupling, tensors=tensors)
    assert not verify(case.model, slim.model, blind, case.kept, case.inputs).passed


def test_structure_that_plain_values_hide_is_seen_in_the_randomised_copy() -> None:
    torch.manual_seed(0)
    case = hand.chain()
    slim, surgery = wrong(case, norm__weight=(Cut(0, (0, 1, 5)),))
    assert verify(case.model, slim, case.coupling, case.kept, case.inputs).passed
    found = prove(case.model, slim, surgery, case.coupling, case.kept, case.inputs)
    assert not found.passed
    assert found.reason.startswith("with randomised normalisation")


def test_other_shapes_and_infinite_outputs_fail() -> None:
    case = hand.residual()
    slim = rebuild(case.model, case.inputs, case.coupling, case.kept).model
    other = copy.deepcopy(slim)
    other.head = nn.Linear(2, 3)
    assert "other shapes" in verify(case.model, other, case.coupling, case.kept, case.inputs).reason
    with torch.no_grad():
        slim.head.bias.fill_(math.inf)
    assert "not finite" in verify(case.model, slim, case.coupling, case.kept, case.inputs).reason


# --- how it compares -------------------------------------------------------------------------------------------------


def test_forward_that_cannot_run_in_float64_is_compared_in_float32() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = hand.chain().model

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.float())

    torch.manual_seed(0)
    model, case = Casting(), hand.chain()
    tensors = {f"body.{name}": axes for name, axes in case.coupling.tensors.items()}
    coupling = replace(case.coupling, tensors=tensors)
    slim = rebuild(model, case.inputs, coupling, case.kept)
    found = prove(model, slim.model, slim.surgery, coupling, case.kept, case.inputs)
    assert (found.passed, found.dtype) == (True, "float32")


def test_tolerance_is_relative_to_the_output() -> None:
    torch.manual_seed(0)
    case = hand.chain()
    slim = rebuild(case.model, case.inputs, case.coupling, case.kept).model
    reference = masked_original(case.model, case.coupling, case.kept).eval()(case.inputs).detach()
    found = verify(case.model, slim, case.coupling, case.kept, case.inputs, tolerance=0.25)
    assert found.tolerance == pytest.approx(0.25 * float(reference.abs().max()), rel=1e-5)
    usual = verify(case.model, slim, case.coupling, case.kept, case.inputs)
    assert usual.tolerance == pytest.approx(TOLERANCE[torch.float64] * found.tolerance / 0.25)
    with torch.no_grad():
        slim.head.bias[0] += 0.01 * float(reference.abs().max())
    assert verify(case.model, slim, case.coupling, case.kept, case.inputs, tolerance=0.25).passed
    assert not verify(case.model, slim, case.coupling, case.kept, case.inputs).passed


def test_nothing_is_left_changed(case: hand.Case) -> None:
    case.model.train()
    slim = rebuild(case.model, case.inputs, case.coupling, case.kept)
    models = (case.model, slim.model)
    before = [{name: tensor.clone() for name, tensor in named_tensors(model)} for model in models]
    random_state = torch.random.get_rng_state()
    prove(case.model, slim.model, slim.surgery, case.coupling, case.kept, case.inputs)
    for model, tensors in zip(models, before, strict=True):
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in named_tensors(model))
        assert all(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random_state)


class Normalised(nn.Module):
    """Statistics over channels: norms and a channel mean, and of a weight, taken by the same op in the same forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer_norm = nn.Conv2d(3, 8, 1), nn.LayerNorm(8)
        self.body, self.group_norm = nn.Conv2d(8, 12, 1), nn.GroupNorm(3, 12)
        self.standardised, self.head = nn.Parameter(torch.randn(6, 12, 1, 1)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_norm(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.group_norm(self.body(x * (x * x).mean(1, keepdim=True)))
        weight = self.standardised - self.standardised.mean((1, 2, 3), keepdim=True)
        return self.head(F.conv2d(x, weight).relu().mean((2, 3)))


def normalised(full: str = "") -> hand.Case:
    torch.manual_seed(0)
    model, x = Normalised(), torch.randn(2, 3, 5, 5)
    coupling = couple(model, x)
    coupling = freeze(coupling, {full: "so"}) if full else coupling
    assert [place.split()[0] for place in coupling.mixing] == ["LayerNorm", "mean", "GroupNorm"]
    return hand.Case(model, x, coupling, narrowed(coupling, 0), 0)


@pytest.mark.parametrize("full", ["", "standardised", "body"])
def test_where_channels_mix_both_are_given_the_same_statistics(full: str) -> None:
    case = normalised(full)
    slim = rebuild(case.model, case.inputs, case.coupling, case.kept)
    assert not torch.allclose(
        slim.model(case.inputs), masked_original(case.model, case.coupling, case.kept)(case.inputs)
    )
    found = prove(case.model, slim.model, slim.surgery, case.coupling, case.kept, case.inputs)
    assert (found.applicable, found.passed, found.proof, found.dtype) == (True, True, "same statistics", "float64")
    assert found.max_abs_error <= 1e-13
    assert "the original's statistics over channels (LayerNorm at layer_norm, mean" in found.reason
    assert "little" not in found.reason


@pytest.mark.parametrize("tensor", ["layer_norm.weight", "group_norm.bias", "standardised", "body.weight"])
def test_a_wrong_index_is_seen_beside_the_same_statistics(tensor: str) -> None:
    case = normalised()
    surgery = rebuild(case.model, case.inputs, case.coupling, case.kept).surgery
    axis, size = surgery.cuts[tensor][-1], dict(named_tensors(case.model))[tensor].shape
    other = tuple(sorted({*range(size[axis.axis])} - {axis.kept[0]}))[: len(axis.kept)]
    wrong = Surgery({**surgery.cuts, tensor: (*surgery.cuts[tensor][:-1], Cut(axis.axis, other))})
    slim = apply(case.model, wrong)
    found = prove(case.model, slim, wrong, case.coupling, case.kept, case.inputs)
    assert (found.applicable, found.passed, found.proof) == (True, False, "same statistics")
    assert "differ by" in found.reason


def test_a_proof_that_says_little_says_so() -> None:
    case = normalised()
    with torch.no_grad():
        case.model.head.weight.mul_(1e-9)
    surgery = rebuild(case.model, case.inputs, case.coupling, case.kept).surgery
    found = prove(case.model, apply(case.model, surgery), surgery, case.coupling, case.kept, case.inputs)
    assert found.passed
    assert "which says little, since all that was removed would change the outputs by" in found.reason


def test_single_values_are_normalised_in_a_batch_of_two() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 2, 1)).eval()
    x = torch.randn(1, 3, 1, 1)
    coupling = couple(model, x)
    kept = {
        group.name: (tuple(range(group.steps if group.frozen else 1)),) * len(group.units) for group in coupling.groups
    }
    slim = rebuild(model, x, coupling, kept)
    with pytest.raises(ValueError, match="more than 1 value"):
        slim.model(x)
    found = prove(model, slim.model, slim.surgery, coupling, kept, x)
    assert found.passed
    assert "at a batch of two" in found.reason


def test_statistics_that_cannot_be_caught_are_not_played_back() -> None:
    case = normalised()
    slim = rebuild(case.model, case.inputs, case.coupling, case.kept)
    for place in ("somewhere", "sum over channels at head"):
        other = replace(case.coupling, mixing=(*case.coupling.mixing, place))
        found = prove(case.model, slim.model, slim.surgery, other, case.kept, case.inputs)
        assert (found.applicable, found.passed, found.proof) == (False, True, "sanity")


def test_where_channels_mix_beyond_that_a_training_step_is_checked_instead() -> None:
    torch.manual_seed(0)
    case = hand.layer_norm()
    slim = rebuild(case.model, case.inputs, case.coupling, case.kept)
    state = torch.random.get_rng_state()
    found = prove(case.model, slim.model, slim.surgery, case.coupling, case.kept, case.inputs[:1])
    assert (found.applicable, found.passed, found.max_abs_error, found.tolerance) == (False, True, None, None)
    assert "norm" in found.reason
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in slim.model.parameters())
    with torch.no_grad():
        slim.model.norm.weight[0] = math.nan
    broken = prove(case.model, slim.model, slim.surgery, case.coupling, case.kept, case.inputs)
    assert not broken.passed
    assert "not finite" in broken.reason


def test_infinite_gradient_of_the_training_step_fails() -> None:
    class Sharp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.scale).abs().sqrt() if self.training else x + self.scale

    model = Sharp()
    mixed = hand.coupling([], {}, mixing=("here",))
    found = verify(model, copy.deepcopy(model), mixed, {}, torch.zeros(2, 3))
    assert not found.passed
    assert "gradient" in found.reason


def test_output_tensors_of_any_container() -> None:
    class Output:
        def __init__(self, x: Tensor) -> None:
            self.logits, self.name = x, "x"

    x = torch.zeros(1)
    assert len(output_tensors({"a": x, "b": (x, [x, None, 3])})) == 3
    assert output_tensors(Output(x)) == [x]


# --- randomise -------------------------------------------------------------------------------------------------------


def test_randomize_leaves_no_trivial_value_and_is_reproducible() -> None:
    case = hand.chain()
    with torch.no_grad():
        case.model.norm.weight.zero_()
        case.model.second.weight.zero_()
    state = torch.random.get_rng_state()
    first, again, other = randomize(case.model, 1), randomize(case.model, 1), randomize(case.model, 2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not case.model.norm.weight.any()
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(first.norm, name)
        assert len(value.unique()) == len(value)
        assert torch.equal(value, getattr(again.norm, name))
        assert not torch.equal(value, getattr(other.norm, name))
    assert first.norm.weight.min() >= 0.5
    assert first.norm.running_var.min() > 0
    assert first.second.weight.all()
    assert torch.equal(first.first.weight, case.model.first.weight)
    assert torch.equal(first.norm.num_batches_tracked, case.model.norm.num_batches_tracked)


# --- price -----------------------------------------------------------------------------------------------------------


def test_price_must_be_exact() -> None:
    case = hand.shared()
    slim = apply(case.model, surgery_for(case.coupling, case.kept))
    params = int(np.sum([parameter.numel() for parameter in slim.parameters()]))
    check_price(slim, counted_macs=10, predicted_macs=10, predicted_params=params)
    with pytest.raises(RebuildMismatch, match="11 MACs where the plan says 10"):
        check_price(slim, counted_macs=11, predicted_macs=10, predicted_params=params)
    with pytest.raises(RebuildMismatch, match="parameters"):
        check_price(slim, counted_macs=10, predicted_macs=10, predicted_params=params + 1)


class Amplifier(nn.Sequential):
    """A network that makes much of the last digits: the sine of large numbers."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.sin(3e7 * super().forward(images))


def amplified(error: float) -> Verification:
    torch.manual_seed(0)
    model = Amplifier(nn.Conv2d(3, 64, 3), nn.Tanh(), nn.Conv2d(64, 4, 3)).double().eval()
    images = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    coupling = couple(model, images)
    kept = narrowed(coupling, seed=0)
    slim = rebuild(model, images, coupling, kept)
    with torch.no_grad():
        slim.model[2].weight[0] *= 1 + error
    return verify(model, slim.model, coupling, kept, images)


def test_rounding_that_a_network_amplifies_is_measured_and_no_error_hides_in_it() -> None:
    right, wrong = amplified(0.0), amplified(1e-12)
    assert TOLERANCE[torch.float64] < right.max_abs_error / right.largest_output
    assert right.passed
    assert "amplifies rounding" in right.reason
    assert not wrong.passed
    assert "where rounding explains" in wrong.reason


def test_statistics_near_the_activations_keep_a_deep_network_in_bounds_and_are_those_of_its_twin() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(30)]
    model = randomize(nn.Sequential(*layers).double().eval(), 0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data *= 10
    twin, images = copy.deepcopy(model), torch.randn(1, 8, 6, 6, dtype=torch.float64)
    assert model(images).abs().max() > 1e12
    before = [module.running_var.clone() for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    near_activations(model, lambda network: network(images), 0, twin=twin)
    assert 1e-3 < model(images).abs().max() < 1e3
    assert torch.equal(model(images), twin(images))
    after = [module.running_var for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
