"""Repair without labels: exact where it can be, never worse, and nothing else touched."""

import copy
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from archscan import reconstruct
from archscan.errors import BadInput
from archscan.groups import couple
from archscan.heldout import distances
from archscan.least_squares import Effort
from archscan.lockstep import lockstep
from archscan.rebuild import rebuild
from archscan.reconstruct import repair
from archscan.recover import Recalibrated
from archscan.rehearsal import rehearse
from tests import nets
from tests.masked import random_kept, randomised

EXACT = Effort(rows_per_column=math.inf, ridges=(1e-13,))
IMAGE = torch.zeros(2, 3, 8, 8, dtype=torch.float64)


def images(count=32, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(part, None) for part in torch.randn(count, 3, size, size, generator=generator).double().split(8)]


def slimmed(model, kept=None, seed=0):
    """Rebuild with what is kept of the groups named, or with what chance keeps of all."""
    coupling = couple(model, IMAGE)
    if kept is None:
        chosen = random_kept(coupling, seed)
    else:
        chosen = {g.name: (tuple(kept.get(g.name, range(g.steps))),) * len(g.units) for g in coupling.groups}
    return rebuild(model, IMAGE, coupling, chosen)


def outputs(model):
    with torch.no_grad():
        return torch.cat([model(batch) for batch, _ in images(seed=7)])


class TwoLayers(nn.Module):
    """What is tested by hand: one layer that loses channels, one that reads them."""

    def __init__(self, bias=False, norm=True, kernel=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, kernel, bias=bias)
        self.bn2 = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


LAYOUTS = {"bias": {"bias": True, "norm": False}, "norm": {}, "both": {"bias": True}, "wide": {"kernel": 3}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", ["bias", "ls"])
def test_a_constant_channel_is_absorbed_exactly(layout, level):
    model = randomised(TwoLayers(**LAYOUTS[layout]))
    with torch.no_grad():
        model.bn1.weight[2], model.bn1.bias[2] = 0.0, 1.7
    made = slimmed(model, {"conv1": (0, 1, 3, 4, 5)})
    assert not torch.allclose(outputs(made.model), outputs(model), atol=1e-2)
    found = repair(model, made.model, made.surgery, images(), level, effort=EXACT)
    torch.testing.assert_close(outputs(found.model), outputs(model), rtol=1e-9, atol=1e-9)
    assert found.steps[0].kept
    before, after = (dict(m.named_parameters()) for m in (made.model, found.model))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= ({"conv2.bias"} if level == "bias" else {"conv2.weight", "conv2.bias"})


def test_a_mean_without_a_place_to_go_is_reported():
    model = randomised(TwoLayers(bias=False, norm=False))
    made = slimmed(model, {"conv1": (0, 1, 3)})
    found = repair(model, made.model, made.surgery, images(), "bias", effort=EXACT)
    assert found.skipped["conv2.weight"] == "no bias and no BatchNorm of its own takes up a mean"
    assert torch.equal(found.model.conv2.weight, made.model.conv2.weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_duplicate_channel_is_repaired_exactly(layout):
    model = randomised(TwoLayers(**LAYOUTS[layout]))
    with torch.no_grad():
        for tensor in (model.conv1.weight, model.bn1.weight, model.bn1.bias, *model.bn1.buffers()):
            if tensor.ndim:
                tensor[4] = tensor[1]
    made = slimmed(model, {"conv1": (0, 1, 2, 3, 5)})
    found = repair(model, made.model, made.surgery, images(), "ls", effort=EXACT)
    torch.testing.assert_close(outputs(found.model), outputs(model), rtol=1e-8, atol=1e-8)
    summed = model.conv2.weight[:, [0, 1, 2, 3, 5]].clone()
    summed[:, 1] += model.conv2.weight[:, 4]
    torch.testing.assert_close(found.model.conv2.weight, summed, rtol=1e-7, atol=1e-7)
    (layer,) = [layer for layer in found.layers if layer.weight == "conv2.weight"]
    assert (layer.changed, layer.error_after < 1e-15 < layer.error_before) == ("weights", True)


def test_mean_correction_is_the_mean_of_what_was_removed():
    model = randomised(TwoLayers())
    made = slimmed(model, {"conv1": (0, 1, 3, 4, 5)})
    found = repair(model, made.model, made.surgery, images(40), "bias", effort=EXACT)
    fit = torch.cat([batch for batch, _ in images(40)])[: found.samples]
    with torch.no_grad():
        lost = F.relu(model.bn1(model.conv1(fit)))[:, 2].mean() * model.conv2.weight[:, 2, 0, 0]
    if found.steps[-1].kept:
        pytest.skip("BatchNorm was recalibrated on top")
    torch.testing.assert_close(found.model.bn2.running_mean, model.bn2.running_mean - lost, rtol=1e-10, atol=1e-10)


NETS = {
    "plain": nets.Plain,
    "without BatchNorm": nets.NoBatchNorm,
    "residual": nets.Residual,
    "dense": nets.DenseConcat,
    "depthwise": nets.Depthwise,
    "grouped": lambda: nets.Grouped(4),
    "squeeze-excite": nets.SqueezeExcite,
    "shuffle": nets.Shuffle,
    "split": nets.Split,
    "flatten": nets.Flatten,
    "shared": nets.Shared,
    "padded": nets.PaddedShortcut,
    "slice add": nets.SliceAdd,
    "standardised": nets.StandardisedWeight,
    "channels last": nets.ChannelsLast,
    "transposed": nets.Transposed,
    "auxiliary": nets.Auxiliary,
    "functional": nets.Functional,
    "attention": nets.ChannelAttention,
    "gated": nets.GatedLinear,
}

SKIPPED = {
    "shared": {"twice.weight": "several places", "a.weight": "several places"},
    "standardised": {"conv2d": "computed"},
    "transposed": {"up.weight": "conv_transpose2d is not solved for", "grouped.weight": "conv_transpose2d"},
    "functional": {"matrix": "is not solved for"},
    "attention": {"slide.weight": "other positions"},
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("level", ["bias", "ls"])
def test_no_layer_and_no_network_gets_worse(name, level):
    torch.manual_seed(0)
    model = randomised(NETS[name]())
    made = slimmed(model, seed=3)
    found = repair(model, made.model, made.surgery, images(), level)
    assert all(layer.error_after <= layer.error_before for layer in found.layers)
    held = [torch.cat([batch for batch, _ in images()])[-found.holdout :]]
    loss = float(distances(model, made.model, held).mean())
    for step in found.steps:
        assert step.loss_before == pytest.approx(loss)
        assert step.kept == (step.loss_after < step.loss_before)
        loss = step.loss_after if step.kept else loss
    assert float(distances(model, found.model, held).mean()) == pytest.approx(loss)
    assert (found.samples, found.holdout) == (28, 4)
    if level == "ls" and found.steps[0].kept:
        for path, reason in SKIPPED.get(name, {}).items():
            (told,) = [why for where, why in found.skipped.items() if where.startswith(path)]
            assert reason in told
        assert set(SKIPPED.get(name, {})) == {where.partition(" ")[0] for where in found.skipped}


def test_depthwise_weights_pass_through():
    model = randomised(nets.Depthwise())
    made = slimmed(model, {"expand": range(5)})
    found = repair(model, made.model, made.surgery, images(), "ls")
    assert torch.equal(found.model.dw.weight, made.model.dw.weight)
    assert not torch.equal(found.model.project.weight, made.model.project.weight)


def test_nothing_given_is_changed():
    model = randomised(nets.Residual()).train()
    made = slimmed(model, seed=1)
    tensors = [{n: t.clone() for n, t in m.state_dict().items()} for m in (model, made.model)]
    state, threads = torch.random.get_rng_state(), threading.active_count()
    found = repair(model, made.model, made.surgery, images(), "ls")
    for given, before in zip((model, made.model), tensors, strict=True):
        assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())
        assert all(module.training and not module._forward_hooks for module in given.modules())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in given.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert threading.active_count() == threads
    assert type(found.model) is type(model)
    assert all(module.training for module in found.model.modules())
    assert all(parameter.requires_grad for parameter in found.model.parameters())


def test_the_same_images_give_the_same_network_however_they_are_batched():
    model = randomised(nets.Residual())
    made = slimmed(model, seed=1)
    one, other = (
        repair(model, made.model, made.surgery, batches, "ls", effort=EXACT).model
        for batches in (images(), [torch.cat([batch for batch, _ in images()])])
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# Where outputs are compared -------------------------------------------------------------------------------------------


def place_of(model, path):
    (place,) = [place for place in rehearse(model.double().eval(), IMAGE).places if place.weight == path]
    return place


def test_a_residual_branch_answers_for_the_sum():
    model = randomised(nets.Residual())
    place = place_of(model, "conv2.weight")
    assert (place.sum_call is not None, place.mean, place.bias, place.rectified) == (True, "bn2.running_mean", "", True)
    assert place_of(model, "conv1.weight").sum_call is None
    assert place_of(model, "fc.weight").bias == "fc.bias"


def test_a_branch_makes_up_for_an_error_of_the_shortcut():
    model = randomised(nets.Residual())
    made = slimmed(model, {})
    with torch.no_grad():
        made.model.stem.bias += 0.3
        stem = made.model.stem.bias.clone()
    original, slim = model.eval(), made.model.eval()
    places = [place for place in rehearse(original, IMAGE).places if place.weight == "conv2.weight"]
    batches = [batch for batch, _ in images()]
    for _, meetings in lockstep(original, slim, places, batches):
        for batch, meeting in zip(batches, meetings, strict=True):
            with torch.no_grad():
                x = F.relu(slim.stem(batch))
                torch.testing.assert_close(meeting.shortcut, x)
                torch.testing.assert_close(meeting.args[0], F.relu(slim.bn1(slim.conv1(x))))
                right = F.relu(original.stem(batch))
                branch = original.bn2(original.conv2(F.relu(original.bn1(original.conv1(right)))))
                torch.testing.assert_close(meeting.target, right + branch)
    assert torch.equal(slim.stem.bias, stem)


class Downsampled(nn.Module):
    """Both terms of the sum are layers, and the input is overwritten where `spoil` says so."""

    def __init__(self, spoil=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.down, self.bn3 = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.drop, self.spoil = nn.Dropout(0.5), spoil
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        z = self.drop(self.bn2(self.conv2(y)))
        if self.spoil:
            y.zero_()
        return self.fc(F.relu(torch.add(self.bn3(self.down(x)), z)).mean((2, 3)))


def test_of_two_layers_in_a_sum_the_one_with_more_inputs_answers_for_it():
    wide, narrow = (place_of(Downsampled(), f"{name}.weight") for name in ("conv2", "down"))
    assert (wide.sum_call is not None, wide.branch, wide.rectified) == (True, 1, True)
    assert (narrow.sum_call, narrow.mean, narrow.rectified) == (None, "bn3.running_mean", False)
    assert wide.last_call > narrow.last_call


def test_where_the_input_is_overwritten_the_layer_itself_is_compared():
    place = place_of(Downsampled(spoil=True), "conv2.weight")
    assert (place.sum_call, place.norm_call, place.mean) == (None, None, "")


@pytest.mark.parametrize("spoil", [False, True])
def test_repair_of_a_branch_is_seen_by_all_that_follows(spoil):
    model = randomised(Downsampled(spoil))
    made = slimmed(model, {"conv1": range(5)})
    found = repair(model, made.model, made.surgery, images(64), "ls")
    assert found.steps[0].kept
    last = found.layers[-1]
    assert last.weight == "fc.weight"
    fc = copy.deepcopy(found.model)
    fc.fc.load_state_dict(made.model.fc.state_dict())
    with torch.no_grad():
        held = torch.cat([b for b, _ in images(64)])[-found.holdout :]
        wrong, right = fc(held), model(held)
    variance = (right - right.mean(0)).square().sum()
    if not found.steps[-1].kept:
        assert last.error_before == pytest.approx(float((wrong - right).square().sum() / variance), rel=1e-6)


def test_values_that_others_read_are_not_followed():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(8, 5)

        def forward(self, x):
            y = self.conv(x)
            assert y.shape[1] == 4  # a look at the shape reads no value
            return self.fc(torch.cat([F.relu(self.bn(y)), y.mT], 1).mean((2, 3)))

    assert place_of(Read(), "conv.weight").norm_call is None


# Steps ----------------------------------------------------------------------------------------------------------------


def test_a_step_that_hurts_is_taken_back_and_said_so(monkeypatch):
    model = randomised(nets.Plain())
    made = slimmed(model, seed=2)

    def spoiled(place, tensors, found):
        with torch.no_grad():
            tensors[place.weight].mul_(-3.0)

    monkeypatch.setattr(reconstruct, "_put", spoiled)
    monkeypatch.setattr(reconstruct, "recalibrate_batchnorm", lambda model, _: Recalibrated(model, 0, 0))
    found = repair(model, made.model, made.surgery, images(), "ls")
    assert [(step.name, step.kept) for step in found.steps] == [("ls", False), ("bias", False)]
    assert all(step.loss_after > step.loss_before for step in found.steps)
    assert torch.equal(outputs(found.model), outputs(made.model))
    assert found.layers == ()
    assert found.clause() == (
        "nothing repaired on 28 images, checked on 4 others (ls, bias did not help and was taken back)"
    )


def test_progress_and_clause():
    model = randomised(nets.Plain())
    made = slimmed(model, seed=2)
    seen = []
    found = repair(model, made.model, made.surgery, images(), "ls", progress=lambda *done: seen.append(done))
    assert seen[:3] == [(1, 3), (2, 3), (3, 3)]
    assert "layers re-solved" in found.clause()
    assert "on 28 images, checked on 4 others" in found.clause()


def test_fewer_images_where_activations_would_not_fit():
    model = randomised(nets.Plain())
    made = slimmed(model, seed=2)
    largest = rehearse(model, IMAGE).largest_bytes
    assert largest == 12 * 8 * 8 * 8
    found = repair(model, made.model, made.surgery, images(64), "ls", max_bytes=24 * 5 * largest)
    assert found.samples + found.holdout == 24


def test_distance_is_the_divergence_of_class_probabilities():
    def net(logits):
        return lambda _: torch.tensor(logits, dtype=torch.float64)

    right, found = net([[0.0, math.log(3.0)]]), net([[0.0, 0.0]])
    divergence = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert distances(right, found, [torch.zeros(1)]).tolist() == pytest.approx([divergence])


def test_other_distances_are_squared_errors_relative_to_the_mean_square():
    def net(values):
        return lambda images: tuple(torch.tensor(value, dtype=torch.float64) for value in values)

    right, found = net([[1.0, 2.0], [[[0.0]], [[1.0]]]]), net([[1.0, 3.0], [[[2.0]], [[1.0]]]])
    assert distances(right, found, [torch.zeros(2)]).tolist() == pytest.approx([4 / 3, 1 / 3])
    whole = net([3.0]), net([0.0])  # one number for both images
    assert distances(*whole, [torch.zeros(2)]).tolist() == pytest.approx([1.0, 1.0])
    assert distances(net([[0.0, 0.0]]), net([[0.0, 2.0]]), [torch.zeros(2)]).tolist() == [
        0.0,
        4.0,
    ]  # nothing to divide by
    assert distances(net([]), net([]), [torch.zeros(2)]).tolist() == [0.0, 0.0]


def test_refusals():
    model = randomised(nets.Plain())
    made = slimmed(model, seed=2)
    with pytest.raises(BadInput, match="at least 16"):
        repair(model, made.model, made.surgery, images(8), "ls")
    with pytest.raises(BadInput, match="one size"):
        repair(model, made.model, made.surgery, [{"image": 0}], "ls")
    with pytest.raises(BadInput, match="one size"):
        repair(model, made.model, made.surgery, [*images(16), *images(16, size=6)], "ls")
    threads = threading.active_count()
    with pytest.raises(BadInput, match=r"runs add where the original runs conv2d for conv1\.weight"):
        repair(model, randomised(Renamed()), made.surgery, images(), "ls")
    with pytest.raises(BadInput, match=r"the original runs a BatchNorm for conv1\.weight"):
        repair(model, randomised(nets.PaddedShortcut()), made.surgery, images(), "ls")
    assert threading.active_count() == threads


class Renamed(nets.Plain):
    """Makes a call more than the original."""

    def forward(self, x):
        return super().forward(x + 1)


def test_lockstep_is_unwound_when_it_is_left_early():
    model = randomised(nets.Plain())
    threads = threading.active_count()
    steps = lockstep(model, copy.deepcopy(model), rehearse(model, IMAGE).places, [batch for batch, _ in images()])
    next(steps)
    assert threading.active_count() > threads
    steps.close()
    assert threading.active_count() == threads


class Symmetric(nn.Module):
    """Sees no difference between an image and its mirror image, or nothing but that."""

    def __init__(self, sided):
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3), nn.Linear(12, 4)
        self.sided = sided

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        other = x.flip(-1)
        x = (x - other)[..., : x.shape[-1] // 2] if self.sided else x + other
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("sided", [False, True])
def test_mirror_images_are_fitted_to_where_the_original_does_not_mind(sided):
    torch.manual_seed(0)
    model = Symmetric(sided).double().eval()
    with torch.no_grad():  # activations are mirrored as images are; one net's scores change their sign then
        for conv in (model.conv1, model.conv2):
            conv.weight.copy_((conv.weight + conv.weight.flip(-1)) / 2)
        model.head.bias.zero_()
    images = torch.randn(160, 3, 8, 8, dtype=torch.float64)
    coupling = couple(model, images[:2])
    kept = {g.name: (tuple(range(g.steps if g.frozen else g.steps - 4)),) for g in coupling.groups}
    made = rebuild(model, images[:2], coupling, kept)
    found = repair(model, made.model, made.surgery, [images], "ls")
    assert found.mirrored is not sided
    assert (found.samples, found.holdout) == (140, 20)
    assert ("140 images and their mirror images, checked on 20 others" in found.clause()) is not sided
    few = repair(model, made.model, made.surgery, [images[:64]], "ls")
    assert not few.mirrored  # eight held-out images say too little
    assert not repair(model, made.model, made.surgery, [images], "bias").mirrored
    rows = {layer.weight: layer.rows for layer in found.layers}
    assert rows["head.weight"] == (140 if sided else 280)
