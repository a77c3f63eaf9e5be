"""Slimming in rounds: what is left is described as the original is, and the rounds together are one slimming."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import archscan
from archscan.errors import BadInput
from archscan.gates import collect
from archscan.groups import couple
from archscan.losses import classification_loss
from archscan.planner import Budget
from archscan.rebuild import rebuild
from archscan.recount import fvcore_macs
from archscan.reference_nets import cifar_resnet, densenet40_cifar, mobilenetv2_cifar
from archscan.rounds import budgets, gone_units, remaining
from archscan.slimming import SlimSettings, slim
from archscan.widths import WidthRule, allowed_steps
from tests.masked import masked, random_kept, randomised


class Grouped(nn.Module):
    """A grouped convolution, a shuffle and a split."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.wide(x))
        samples, channels, height, width = x.shape
        x = x.view(samples, 4, channels // 4, height, width).transpose(1, 2).reshape(x.shape)
        left, right = x.chunk(2, 1)
        return self.head(torch.cat([right, left], 1).mean((2, 3)))


def images(count, side=12):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def batches(count=3, size=8, side=12):
    labels = torch.arange(count * size) % 5
    return list(zip(images(count * size, side).split(size), labels.split(size), strict=True))


# --- the steps


def test_budgets_are_geometric_and_end_at_the_target():
    steps = budgets(Budget("macs", 0.4), 4)
    assert [step.ratio for step in steps] == pytest.approx([0.4**0.25, 0.4**0.5, 0.4**0.75, 0.4])
    assert steps[-1] == Budget("macs", 0.4)
    assert budgets(Budget("params", 0.7), 1) == (Budget("params", 0.7),)


@pytest.mark.parametrize("rounds", [0, -1, 65, 1.5, True, None, "2"])
def test_impossible_numbers_of_rounds_are_refused(rounds):
    with pytest.raises(BadInput, match="rounds"):
        budgets(Budget("macs", 0.5), rounds)
    with pytest.raises(BadInput, match="rounds"):
        SlimSettings(rounds=rounds)


# --- the slim network in terms of the original


@pytest.mark.parametrize("make", [Grouped, lambda: cifar_resnet(8), mobilenetv2_cifar, densenet40_cifar])
def test_the_slim_network_is_scored_as_the_masked_original_is(make):
    torch.manual_seed(0)
    model = randomised(make())
    example = images(1)
    coupling = couple(model, example)
    kept = random_kept(coupling, seed=4)
    slim_model = rebuild(model, example, coupling, kept).model
    data = [(images(6), torch.arange(6) % 5)]
    needs = frozenset({"sample_gradient", "weight_norm", "group"})
    found = collect(slim_model, remaining(coupling, kept), data, classification_loss, needs)
    expected = collect(masked(model, coupling, kept), coupling, data, classification_loss, needs)
    gone = gone_units(coupling, kept)
    assert gone.any()
    assert not found.sample_gradient_NU[:, gone].any()
    scale = np.abs(expected.sample_gradient_NU).max()
    difference = (found.sample_gradient_NU - expected.sample_gradient_NU)[:, ~gone]
    assert np.abs(difference).max() <= 1e-9 * scale
    assert (found.group_U[~gone] == expected.group_U[~gone]).all()
    assert (found.group_U[gone] == -1).all()


def test_weights_are_measured_on_what_is_left():
    model = randomised(Grouped())
    coupling = couple(model, images(1))
    kept = random_kept(coupling, seed=5)
    left = remaining(coupling, kept)
    slim_model = rebuild(model, images(1), coupling, kept).model
    for name, axes in left.tensors.items():
        shape = slim_model.state_dict()[name].shape
        for axis in axes:
            assert axis.units.shape == ((shape[axis.axis],) if axis.units.ndim == 1 else tuple(shape[:2])), name


# --- rounds


@pytest.fixture(scope="module")
def result():
    model = randomised(cifar_resnet(8, 5))
    settings = SlimSettings(recover="ls", rounds=3)
    return model, slim(model, images(1), target_flops=0.5, data=batches(), settings=settings)


def test_rounds_come_down_to_the_budget_step_by_step(result):
    _, made = result
    dense = made.plan.before.macs
    assert len(made.rounds) == 3
    for done, ratio in zip(made.rounds, (0.5 ** (1 / 3), 0.5 ** (2 / 3), 0.5), strict=True):
        assert done.ratio == pytest.approx(ratio)
        assert 0.97 * ratio * dense <= done.macs <= ratio * dense
        assert done.max_abs_error < 1e-10
        assert "re-solved" in done.recovery
    assert [done.units for done in made.rounds] == sorted((done.units for done in made.rounds), reverse=True)
    assert made.rounds[-1].macs == made.plan.after.macs
    assert "3 rounds" in " ".join(made.notes)
    assert made.plan.provenance["rounds"] == 3


def test_the_price_is_that_of_the_finished_network(result):
    _, made = result
    assert fvcore_macs(made.model, images(1)) == made.plan.after.macs
    assert sum(parameter.numel() for parameter in made.model.parameters()) == made.plan.after.params


def test_all_rounds_together_are_the_masked_original():
    model = randomised(cifar_resnet(8, 5))
    made = slim(model, images(1), target_flops=0.5, data=batches(), settings=SlimSettings(rounds=3))
    reference = masked(model, made.analysis.coupling, made.plan.kept)
    x = images(2)
    torch.testing.assert_close(made.model(x), reference(x), rtol=1e-9, atol=1e-9)
    lost = made.saliency_U[gone_units(made.analysis.coupling, made.plan.kept)].sum()
    assert made.plan.saliency_lost == pytest.approx(lost)
    assert made.plan.saliency_lost == pytest.approx(sum(done.saliency_lost for done in made.rounds))


def test_widths_keep_the_rule_of_the_original():
    model = randomised(cifar_resnet(8, 5))
    rule = WidthRule(round_to=4)
    made = slim(model, images(1), target_flops=0.4, data=batches(), settings=SlimSettings(rule, rounds=4))
    for group in made.analysis.coupling.groups:
        assert len(made.plan.kept[group.name][0]) in allowed_steps(group, rule)


def test_rounds_are_repeatable_and_leave_the_original_alone():
    model = randomised(cifar_resnet(8, 5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = SlimSettings(recover="bn", rounds=2)
    made, again = (
        slim(model, images(1), target_flops=0.5, data=batches(), criterion="obd-obc", settings=settings)
        for _ in range(2)
    )
    assert again.plan == made.plan
    assert again.rounds == made.rounds
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), made.model.parameters(), strict=True))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_scoring_anew_changes_the_plan():
    model = randomised(cifar_resnet(8, 5))
    once, thrice = (
        slim(model, images(1), target_flops=0.4, data=batches(), settings=SlimSettings(rounds=rounds)).plan.kept
        for rounds in (1, 3)
    )
    assert once != thrice


def test_a_result_of_rounds_is_saved_and_loads_in_one_go(result, tmp_path):
    model, made = result
    folder = made.save(tmp_path / "slim")
    loaded = archscan.load(folder, model)
    assert torch.equal(loaded(images(2)), made.model(images(2)))


def test_what_repair_did_to_each_layer_is_in_the_result_and_said_in_a_sentence(result):
    _, made = result
    assert made.repaired is not None
    assert {layer.weight for layer in made.repaired.layers} <= set(dict(made.model.named_parameters()))
    (said,) = (note for note in made.summary["notes"] if note.startswith("Each repair"))
    assert f"{made.repaired.holdout} held-out" in said
    for step in made.repaired.steps:
        assert f"({step.loss_before:.3g} to {step.loss_after:.3g})" in said
        assert step.kept == (step.loss_after < step.loss_before)
    assert ("rolled back (" in said) == any(not step.kept for step in made.repaired.steps)


def test_set_effects_need_a_criterion_that_has_them():
    with pytest.raises(BadInput, match="set_effects"):
        SlimSettings(set_effects="all")
    settings = SlimSettings(set_effects="quadratic")
    with pytest.raises(BadInput, match="obd, obs, mfac, cbs, sosp-i"):
        slim(cifar_resnet(8), torch.zeros(1, 3, 16, 16), target_flops=0.5, criterion="magnitude", settings=settings)


def test_set_effects_in_rounds_cost_less_together_than_the_additive_plan():
    model = randomised(cifar_resnet(8, 5))
    settings = SlimSettings(rounds=2, set_effects="quadratic")
    made = slim(model, images(1), target_flops=0.5, data=batches(), criterion="obd", settings=settings)
    assert made.verification.passed
    assert made.plan.after.macs <= 0.5 * made.plan.before.macs
    assert made.plan.provenance["set_effects"] == "quadratic"
