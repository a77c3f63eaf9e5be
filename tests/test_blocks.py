"""Repair block by block: which blocks there are, that they get closer and never further, and what stays as it is."""

import copy
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from archscan import reconstruct
from archscan.blocks import Block, BlockEffort, find_blocks, tune_blocks
from archscan.groups import couple
from archscan.heldout import distances, shown_to_hurt
from archscan.lockstep import lockstep_blocks
from archscan.rebuild import rebuild
from archscan.reconstruct import repair
from archscan.rehearsal import rehearse
from archscan.repairs import Repaired, Step
from archscan.surgery import Surgery
from tests.masked import randomised

IMAGE = torch.zeros(2, 3, 8, 8, dtype=torch.float64)


class Residual(nn.Module):
    """A residual block; where it `expands`, with squeeze-excite inside, which holds two layers too."""

    def __init__(self, width, expands=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width)
        self.squeeze = Squeeze(2 * width) if expands else nn.Identity()
        self.conv2, self.bn2 = nn.Conv2d(2 * width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        inner = self.squeeze(F.relu(self.bn1(self.conv1(x))))
        return F.relu(x + self.bn2(self.conv2(inner)))


class Squeeze(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x):
        return x * self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class Tower(nn.Module):
    """Two residual blocks in a stage; a block that is called twice, and one whose weights lie elsewhere too."""

    def __init__(self, twice=False, shared=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.stage = nn.Sequential(Residual(6), Residual(6, expands=True))
        self.again = Residual(6)
        self.head = nn.Linear(6, 5)
        self.twice = twice
        if shared:
            self.again.conv2.weight = self.stage[0].conv2.weight

    def forward(self, x):
        x = self.stage(F.relu(self.stem(x)))
        x = self.again(self.again(x)) if self.twice else self.again(x)
        return self.head(x.mean((2, 3)))


def images(count=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, 3, 8, 8, generator=generator).double().split(8))


def slimmed(model, kept):
    coupling = couple(model, IMAGE)
    chosen = {g.name: (tuple(kept.get(g.name, range(g.steps))),) * len(g.units) for g in coupling.groups}
    return rebuild(model, IMAGE, coupling, chosen)


def found_in(model):
    return find_blocks(model, IMAGE, rehearse(model, IMAGE).places)


@pytest.fixture(scope="module")
def case():
    """A network, and what it becomes without a third of the stream and of an inner width."""
    torch.manual_seed(0)
    model = randomised(Tower())
    return model, slimmed(model, {"stem": (0, 2, 3, 5), "stage.0.conv1": tuple(range(8))})


CASES = {
    "plain": ({}, ["stage.0", "stage.1", "again"]),
    "called twice": ({"twice": True}, ["stage.0", "stage.1"]),
    "weights shared": ({"shared": True}, ["stage.1"]),
}


@pytest.mark.parametrize("name", CASES)
def test_residual_blocks_are_found_in_the_order_of_execution(name):
    given, expected = CASES[name]
    blocks = found_in(randomised(Tower(**given)))
    assert [block.path for block in blocks] == expected
    assert all(block.last.weight == f"{block.path}.conv2.weight" for block in blocks)


def test_both_networks_are_met_where_a_block_begins_and_ends(case):
    model, made = case
    slim, batches = copy.deepcopy(made.model).eval(), images(16)
    threads = threading.active_count()
    met = dict(lockstep_blocks(model, slim, ["stage.0", "again"], batches))
    assert list(met) == ["stage.0", "again"]
    with torch.no_grad():
        for meeting, batch in zip(met["again"], batches, strict=True):
            torch.testing.assert_close(meeting.inputs, slim.stage(F.relu(slim.stem(batch))))
            torch.testing.assert_close(meeting.target, model.again(model.stage(F.relu(model.stem(batch)))))
    assert threading.active_count() == threads
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (model, slim) for m in net.modules())


def test_each_block_gets_closer_on_images_that_it_was_not_tuned_on(case):
    model, made = case
    slim, before = copy.deepcopy(made.model).eval(), copy.deepcopy(model.state_dict())
    wanted = [parameter.requires_grad for parameter in slim.parameters()]
    done = tune_blocks(
        model, slim, found_in(model), made.surgery, images(48), images(16, seed=1), BlockEffort(steps=40, images=16)
    )
    assert [repair.path for repair in done] == ["stage.0", "stage.1", "again"]
    assert any(repair.changed for repair in done)
    assert all((repair.error_after < repair.error_before) == repair.changed for repair in done)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in slim.parameters()] == wanted
    assert all(parameter.grad is None for net in (model, slim) for parameter in net.parameters())
    outside = {n: t for n, t in slim.state_dict().items() if not n.startswith(("stage", "again"))}
    assert all(torch.equal(made.model.state_dict()[name], tensor) for name, tensor in outside.items())


def test_what_does_not_help_is_taken_back(case):
    model, made = case
    slim = copy.deepcopy(made.model).eval()
    done = tune_blocks(
        model, slim, found_in(model), made.surgery, images(16), images(16, seed=1), BlockEffort(steps=3, rate=30.0)
    )
    assert done
    assert not any(repair.changed for repair in done)
    assert all(torch.equal(made.model.state_dict()[name], tensor) for name, tensor in slim.state_dict().items())


def test_a_block_whose_channels_are_not_known_is_left_alone(case):
    model, made = case
    slim = copy.deepcopy(made.model).eval()
    unknown = Surgery({})  # says nothing of the stream, which is narrower than the original's
    effort = BlockEffort(steps=2)
    assert tune_blocks(model, slim, found_in(model), unknown, images(16), images(16, seed=1), effort) == ()
    wrong = [Block(block.path, found_in(model)[0].last) for block in found_in(model)]
    shifted = Surgery({wrong[0].last.weight: tuple(_moved(cut) for cut in made.surgery.cuts[wrong[0].last.weight])})
    done = tune_blocks(model, slim, wrong, shifted, images(16), images(16, seed=1), effort)
    assert not any(repair.changed and repair.error_before > 0.5 for repair in done)


def _moved(cut):
    return cut if cut.axis else type(cut)(0, (0, 1, 2, 4))


def test_the_whole_repair_keeps_blocks_unless_outputs_get_further_away(case):
    model, made = case
    batches = [(batch, None) for batch in images(64)]
    found = repair(model, made.model, made.surgery, batches, "blocks", block_effort=BlockEffort(steps=40, images=16))
    assert [step.name for step in found.steps] == ["ls", "blocks"]
    assert found.steps[0].kept
    alone = repair(model, made.model, made.surgery, batches, "ls")
    assert found.steps[1].loss_before == pytest.approx(alone.steps[0].loss_after)
    assert found.layers == alone.layers
    holdout = images(64)[-1]
    now, then = (distances(model, net.eval(), [holdout]) for net in (found.model, alone.model))
    assert found.steps[1].kept
    assert not shown_to_hurt(then, now)
    assert found.steps[1].loss_after == pytest.approx(float(now.mean()))
    assert f"{sum(block.changed for block in found.blocks)} blocks tuned" in found.clause()
    assert "block by block was kept" in found.note()


def test_blocks_that_take_the_outputs_further_away_are_taken_back(case, monkeypatch):
    def spoiled(original, slim, *others):
        with torch.no_grad():
            for tensor in slim.parameters():
                tensor.mul_(-1)
        return ()

    model, made = case
    batches = [(batch, None) for batch in images(64)]
    monkeypatch.setattr(reconstruct, "tune_blocks", spoiled)
    found = repair(model, made.model, made.surgery, batches, "blocks")
    alone = repair(model, made.model, made.surgery, batches, "ls")
    assert [step.kept for step in found.steps] == [True, False]
    assert "block by block was rolled back" in found.note()
    state = alone.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.model.state_dict().items())


def test_chance_is_told_from_harm():
    before = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = 0.1 * torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise -= noise.mean()
    assert not shown_to_hurt(before, before)
    assert not shown_to_hurt(before, before + noise + 0.015)
    assert shown_to_hurt(before, before + noise + 0.035)
    assert not shown_to_hurt(before, before - 0.1)
    assert shown_to_hurt(before[:1], before[:1] + 0.1)
    assert shown_to_hurt(before, torch.full_like(before, math.nan))
    assert shown_to_hurt(before, torch.where(before > 0.9, math.inf, before))


def test_blocks_kept_by_chance_are_said_to_be():
    step = Step("blocks", True, 0.1, 0.11)
    said = Repaired(nn.Identity(), (step,), (), {}, 28, 4).note()
    assert step.by_chance
    tuned = "which chance explains: each block that was tuned fits these images better"
    assert f"block by block was kept (0.1 to 0.11, {tuned})" in said
