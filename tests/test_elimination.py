"""Emptying groups unit by unit: against exact least squares on every set that is looked at."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from archscan.criteria import score
from archscan.criteria.columns import DAMPENING
from archscan.criteria.elimination import STREAM_FACTOR
from archscan.gates import collect
from archscan.groups import couple
from archscan.losses import classification_loss

NEEDS = frozenset({"sample_gradient", "layer_inputs", "group", "summed"})


class Two(nn.Module):
    """One hidden width of six, read by two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.left = nn.Conv2d(6, 4, 3, padding=1)
        self.right = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        hidden = F.relu(self.first(x))
        both = torch.cat([self.left(hidden), self.right(hidden)], 1)
        return self.head(F.relu(both).mean((2, 3)))


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model = Two().double().eval()
    with torch.no_grad():
        model.first.weight[3] = model.first.weight[2] + 0.05 * torch.randn(3, 3, 3)  # 2 and 3 do nearly the same
        model.first.bias[3] = model.first.bias[2]
    images = torch.randn(24, 3, 5, 5, dtype=torch.float64)
    labels = torch.arange(24) % 3
    coupling = couple(model, images[:2])
    statistics = collect(model, coupling, [(images, labels)], classification_loss, NEEDS)
    group = next(group for group in coupling.groups if group.name == "first")
    return model, images, statistics, list(group.units[0])


def error_without(model, images, removed):
    """Squared error per image that ridge regression on the kept channels leaves in both readers' outputs."""
    with torch.no_grad():
        hidden = F.relu(model.first(images))
        total = 0.0
        for layer in (model.left, model.right):
            size, pad = layer.kernel_size[0], layer.padding[0]
            columns = F.unfold(hidden, size, padding=pad).transpose(1, 2).reshape(-1, 6 * size * size)
            weight = layer.weight.reshape(4, -1)
            centred = columns - columns.mean(0)
            moment = centred.T @ centred / len(images)
            moment += DAMPENING * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
            gone = torch.zeros(6, size * size, dtype=torch.bool)
            gone[removed] = True
            r = gone.flatten()
            schur = moment[r][:, r] - moment[r][:, ~r] @ torch.linalg.inv(moment[~r][:, ~r]) @ moment[~r][:, r]
            total += float((weight[:, r] @ schur * weight[:, r]).sum())
    return total


def test_saliencies_sum_to_what_least_squares_cannot_repair(case):
    model, images, statistics, units = case
    saliency = score("obd-obc", statistics)[units]
    order = np.argsort(saliency, kind="stable")
    errors = [error_without(model, images, order[: count + 1].tolist()) for count in range(5)]
    rises = np.maximum.accumulate(np.diff([0.0, *errors]))
    scale = saliency[order[0]] / rises[0]
    assert saliency[order[:5]] == pytest.approx(scale * rises, rel=1e-6)


def test_each_unit_that_goes_is_the_one_that_is_missed_least(case):
    model, images, statistics, units = case
    order = np.argsort(score("obd-obc", statistics)[units], kind="stable").tolist()
    for count in range(5):
        left = [unit for unit in range(6) if unit not in order[:count]]
        errors = {unit: error_without(model, images, [*order[:count], unit]) for unit in left}
        assert order[count] == min(errors, key=errors.get)


def test_of_two_units_that_do_the_same_one_is_cheap_and_the_other_is_not(case):
    _, _, statistics, units = case
    one_by_one, in_turn = (score(name, statistics)[units] for name in ("obd-ls", "obd-obc"))
    assert max(one_by_one[2], one_by_one[3]) < np.median(one_by_one)
    assert min(in_turn[2], in_turn[3]) < np.median(in_turn) < max(in_turn[2], in_turn[3])


def test_without_any_repair_a_group_costs_what_obd_says(case):
    model, images, statistics, units = case
    with torch.no_grad():
        hidden = F.relu(model.first(images))
        alone = 0.0
        for unit in range(6):
            for layer in (model.left, model.right):
                only = F.conv2d(hidden[:, [unit]], layer.weight[:, [unit]], padding=layer.padding)
                alone += float(only.square().sum()) / len(images)
    saliency = score("obd-obc", statistics)[units]
    first = int(saliency.argmin())
    scale = score("obd", statistics)[units].sum() / alone
    assert saliency[first] == pytest.approx(scale * error_without(model, images, [first]), rel=1e-6)


def test_a_wide_group_is_emptied_several_units_at_a_time(case, monkeypatch):
    _, _, statistics, units = case
    monkeypatch.setattr("archscan.criteria.elimination.ROUNDS", 3)
    saliency = np.sort(score("obd-obc", statistics)[units])
    assert saliency[::2] == pytest.approx(saliency[1::2], rel=1e-8)
    assert (np.diff(saliency) > 0).all()
    assert saliency[-1] > 1.5 * saliency[0]


class Stream(nn.Module):
    """A stream that two branches add to, one of them by a constant, and whose inner width nothing is added to."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        hidden = F.relu(self.stem(x))
        inner = F.relu(self.inner(hidden) + 1.0)
        return self.head((hidden + self.outer(inner)).mean((2, 3)))


def test_units_that_sums_write_cost_their_factor_more():
    torch.manual_seed(0)
    model, images = Stream().double().eval(), torch.randn(12, 3, 5, 5, dtype=torch.float64)
    coupling = couple(model, images[:2])
    assert {group.name: group.summed for group in coupling.groups if group.frozen is None} == {
        "stem": True,
        "inner": False,
    }
    statistics = collect(model, coupling, [(images, torch.arange(12) % 3)], classification_loss, NEEDS)
    plain = replace(statistics, summed_U=np.zeros(coupling.unit_count, dtype=bool))
    factor_U = np.where(statistics.require("summed"), STREAM_FACTOR, 1.0)
    assert set(factor_U.tolist()) == {1.0, STREAM_FACTOR}
    np.testing.assert_allclose(score("obd-obc", statistics), factor_U * score("obd-obc", plain), rtol=1e-12)
