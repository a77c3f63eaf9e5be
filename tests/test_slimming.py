"""Slimming from Python: the original stays as it was, the result is what the plan says, and nonsense is refused."""

import copy
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import archscan
from archscan import options, replan
from archscan.capture import capture
from archscan.errors import BadInput, InfeasibleBudget, RebuildMismatch
from archscan.latency import LatencySetup
from archscan.recognise import recognise
from archscan.recount import Recount, fvcore_macs, recount
from archscan.reference_nets import REFERENCE_NETS
from archscan.slimming import SlimSettings, slim
from archscan.surgery import named_tensors
from archscan.widths import WidthRule


class Plain(nn.Module):
    """A network of nobody's zoo: convolutions with BatchNorm and dropout, five classes."""

    def __init__(self, width=16):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(2 * width, 5)

    def features(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.drop(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))

    def forward(self, x):
        return self.head(self.features(x))


class Named(Plain):
    """Takes its inputs by keyword and returns a dict."""

    def forward(self, image, scale):
        return {"logits": super().forward(image * scale)}


class Paired(Plain):
    """Takes two inputs."""

    def forward(self, image, other):
        return self.head(self.features(image) - self.features(other))


class HardCoded(Plain):
    """Reads a width that nobody can change from outside."""

    def features(self, x):
        return super().features(x).reshape(len(x), 32)


IMAGE = torch.zeros(1, 3, 8, 8)


def seeded(make, *arguments):
    torch.manual_seed(0)
    model = make(*arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.3)
    return model


def batches(count=3, size=8):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(5, (size,), generator=generator))
        for _ in range(count)
    ]


def tensors_of(model):
    return {name: tensor.detach().clone() for name, tensor in named_tensors(model)}


def assert_same(first, second):
    a, b = tensors_of(first), tensors_of(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def state_of(model):
    """Everything about a model that a slimming might have touched."""
    return (
        {
            name: (id(tensor), tensor._version, tensor.requires_grad, tensor.grad)
            for name, tensor in named_tensors(model)
        },
        {name: module.training for name, module in model.named_modules()},
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
    )


# --- the original -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("criterion", ["sosp-h", "obd", "taylor-so", "magnitude", "bn-scale", "random"])
def test_the_original_is_left_as_it_was(criterion, training):
    model = seeded(Plain).train(training)
    model.bn2.eval()
    model.conv1.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before, values = state_of(model), tensors_of(model)
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    slim(model, IMAGE, target_flops=0.5, data=batches(), criterion=criterion, settings=SlimSettings(recover="bn"))
    assert state_of(model) == before
    assert all(torch.equal(tensor, values[name]) for name, tensor in named_tensors(model))
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == generators[1:]  # noqa: NPY002


def test_the_result_is_in_eval_mode_and_trains_what_the_original_trains():
    model = seeded(Plain).train()
    model.conv1.weight.requires_grad_(False)
    result = slim(model, IMAGE, target_flops=0.5, data=batches())
    assert not any(module.training for module in result.model.modules())
    assert not result.model.conv1.weight.requires_grad
    assert result.model.conv2.weight.requires_grad
    assert type(result.model) is Plain


def test_callers_need_no_gradients():
    model = seeded(Plain)
    free = slim(model, IMAGE, target_flops=0.5, data=batches())
    with torch.no_grad():
        assert slim(model, IMAGE, target_flops=0.5, data=batches()).plan == free.plan


# --- the result -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_costs_are_those_of_the_finished_network(kind):
    model = seeded(Plain)
    target = {"target_flops" if kind == "macs" else "target_params": 0.5}
    result = slim(model, IMAGE, **target, data=batches(), settings=SlimSettings(WidthRule(round_to=1)))
    after, before = getattr(result.plan.after, kind), getattr(result.plan.before, kind)
    assert 0.45 * before < after <= 0.5 * before
    assert sum(parameter.numel() for parameter in result.model.parameters()) == result.plan.after.params
    assert fvcore_macs(result.model, IMAGE) == result.plan.after.macs
    with FlopCounterMode(display=False) as counter:
        result.model(IMAGE)
    normalised = 2 * 64 * (result.model.bn1.num_features + result.model.bn2.num_features)
    assert counter.get_total_flops() // 2 == result.plan.after.macs - normalised
    assert result.verification.passed
    assert result.verification.max_abs_error < 1e-12
    assert result.summary["keep_ratio"][kind] == after / before


def test_the_same_seed_gives_the_same_network_even_from_a_shuffling_loader():
    images, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    loader = DataLoader(TensorDataset(images, labels), batch_size=4, shuffle=True)
    settings = SlimSettings(recover="bn", seed=3)
    model = seeded(Plain)
    first = slim(model, IMAGE, target_flops=0.5, data=loader, criterion="taylor-fo", settings=settings)
    torch.manual_seed(99)
    second = slim(model, IMAGE, target_flops=0.5, data=loader, criterion="taylor-fo", settings=settings)
    assert first.plan == second.plan
    assert np.array_equal(first.saliency_U, second.saliency_U)
    assert_same(first.model, second.model)


def test_batches_may_come_from_a_generator():
    listed = slim(seeded(Plain), IMAGE, target_flops=0.5, data=batches(), settings=SlimSettings(recover="bn"))
    made = slim(seeded(Plain), IMAGE, target_flops=0.5, data=iter(batches()), settings=SlimSettings(recover="bn"))
    assert_same(listed.model, made.model)
    assert made.scored.samples == 24
    assert made.recovery == "BatchNorm statistics of 2 layers recalibrated on 24 images"


def test_recovery_touches_statistics_only():
    model = seeded(Plain)
    bare, repaired = (
        slim(model, IMAGE, target_flops=0.5, data=batches(), settings=SlimSettings(recover=recover)).model
        for recover in ("none", "bn")
    )
    different = {
        name for name, tensor in named_tensors(bare) if not torch.equal(tensor, dict(named_tensors(repaired))[name])
    }
    assert different == {f"bn{number}.running_{what}" for number in (1, 2) for what in ("mean", "var")}


def test_any_loss_will_do():
    def loss_fn(model, batch):
        return (model.features(batch["pixels"]) ** 2).mean() + model(batch["pixels"]).pow(2).mean()

    data = [{"pixels": images} for images, _ in batches()]
    result = slim(seeded(Plain), IMAGE, target_flops=0.5, data=data, loss_fn=loss_fn, criterion="obd")
    assert result.plan.after.macs <= 0.5 * result.plan.before.macs


def test_inputs_by_keyword_and_outputs_in_a_dict():
    model = seeded(Named)
    example = {"image": torch.randn(2, 3, 8, 8), "scale": torch.ones(2, 1, 1, 1)}

    def loss_fn(model, batch):
        return F.cross_entropy(model(**batch[0])["logits"], batch[1])

    data = [({"image": images, "scale": torch.ones(len(images), 1, 1, 1)}, labels) for images, labels in batches()]
    result = slim(model, example, target_flops=0.5, data=data, loss_fn=loss_fn)
    assert result.verification.passed
    assert result.model(**example)["logits"].shape == (2, 5)


def test_several_inputs_in_a_tuple():
    model = seeded(Paired)
    example = (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8))

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0], batch[0].flip(-1)), batch[1])

    result = slim(model, example, target_flops=0.5, data=batches(), loss_fn=loss_fn)
    assert result.verification.passed
    assert fvcore_macs(result.model, example) == result.plan.after.macs


def test_without_data_the_scores_come_from_noise_and_say_so():
    result = slim(seeded(Plain), IMAGE, target_flops=0.5)
    assert (result.scored.synthetic, result.scored.samples) == (True, options.SYNTHETIC_SAMPLES)
    assert "noise" in result.warnings[0]
    summary = result.summary
    assert (summary["data"]["kind"], summary["data"]["labels"]) == ("synthetic", "model")


@pytest.mark.parametrize("criterion", ["magnitude", "bn-scale", "random"])
def test_a_criterion_of_weights_needs_no_data_and_blames_none(criterion):
    result = slim(seeded(Paired), (IMAGE, IMAGE), target_flops=0.5, criterion=criterion)
    assert result.scored is None
    assert result.warnings == ()
    assert result.summary["data"] is None


def test_a_width_that_a_forward_hard_codes_is_frozen_with_a_note():
    result = slim(seeded(HardCoded), IMAGE, target_flops=0.6, data=batches(), settings=SlimSettings(WidthRule(1)))
    assert result.model.conv2.out_channels == 32
    assert result.model.conv1.out_channels < 16
    assert [note.partition(",")[0] for note in result.notes] == ["conv2 keeps the full width"]
    assert {group.name: group.frozen for group in result.analysis.coupling.groups}["conv2"].endswith(
        "hard-codes a width"
    )
    with pytest.raises(InfeasibleBudget, match="conv2 keeps the full width"):
        slim(seeded(HardCoded), IMAGE, target_flops=0.05, data=batches(), settings=SlimSettings(WidthRule(1)))


@pytest.mark.parametrize("recover", ["none", "bn", "bias", "ls"])
def test_the_default_criterion_suits_the_repair(recover):
    settings = SlimSettings(recover=recover)
    result = slim(seeded(Plain), IMAGE, target_flops=0.5, data=batches(), settings=settings)
    expected = options.LEAST_SQUARES_CRITERION if recover == "ls" else options.DEFAULT_CRITERION
    assert result.plan.provenance["criterion"] == expected == options.default_criterion(recover)
    assert options.SlimOptions.criterion is None


class Transposed(Plain):
    """Reads channels by a layer that least squares does not know."""

    def __init__(self):
        super().__init__()
        self.conv2 = nn.ConvTranspose2d(16, 32, 2, stride=2)


def test_a_default_that_does_not_know_a_layer_gives_way_and_says_so():
    settings = SlimSettings(recover="ls")
    result = slim(seeded(Transposed), IMAGE, target_flops=0.5, data=batches(), settings=settings)
    assert result.plan.provenance["criterion"] == "obd"
    assert any(note.startswith("Channels were scored by obd in place of obd-obc: conv2 reads") for note in result.notes)
    with pytest.raises(BadInput, match="conv2 reads channels by"):
        slim(seeded(Transposed), IMAGE, target_flops=0.5, data=batches(), criterion="obd-obc", settings=settings)


def test_channel_groups_from_the_top():
    groups = archscan.channel_groups(seeded(Plain), IMAGE)
    assert {group.name: group.channels for group in groups if group.frozen is None} == {"conv1": 16, "conv2": 32}


# --- saving and loading -----------------------------------------------------------------------------------------------


def train_a_step(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = tensors_of(model)
    images = torch.randn(4, *((1, 28, 28) if model.__class__.__name__ == "LeNet5" else (3, 64, 64)))
    F.cross_entropy(model(images), torch.arange(4)).backward()
    optimizer.step()
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(changed) == len(list(model.parameters()))


def test_a_plain_module_is_saved_and_put_onto_a_fresh_original(tmp_path):
    model = seeded(Plain)
    result = slim(model, IMAGE, target_flops=0.5, data=batches())
    folder = result.save(tmp_path / "out")
    assert {file.name for file in folder.iterdir()} == {"plan.json", "model.safetensors", "summary.json", "report.html"}
    fresh = Plain()
    values = tensors_of(fresh)
    loaded = archscan.load(folder, model=fresh)
    assert_same(loaded, result.model)
    assert torch.equal(loaded(batches()[0][0]), result.model(batches()[0][0]))
    assert all(torch.equal(tensor, values[name]) for name, tensor in named_tensors(fresh))
    with pytest.raises(BadInput, match="pass model="):
        archscan.load(folder)
    with pytest.raises(BadInput, match="overwrite"):
        result.save(folder)
    assert result.save(folder, overwrite=True) == folder


ZOO = {
    "timm:resnet18": lambda: timm.create_model("resnet18", num_classes=7),
    "torchvision:mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=6),
    "reference:lenet5": lambda: REFERENCE_NETS["lenet5"].factory(),
}


@pytest.mark.parametrize("name", ZOO)
def test_networks_of_a_zoo_load_by_themselves_bit_for_bit_and_train(tmp_path, name):
    model = seeded(ZOO[name])
    image = torch.randn(1, *((1, 28, 28) if name.endswith("lenet5") else (3, 64, 64)))
    result = slim(model, image, target_flops=0.6, criterion="magnitude")
    assert f"{result.recipe.source}:{result.recipe.name}" == name
    loaded = archscan.load(result.save(tmp_path / "out"))
    assert_same(loaded, result.model)
    assert torch.equal(loaded(image), result.model(image))
    assert result.summary["model"] == result.recipe.name
    train_a_step(loaded)


def test_a_changed_network_of_a_zoo_is_not_recognised():
    image = torch.randn(1, 3, 64, 64)
    as_it_comes, in_its_modules, in_its_forward = (seeded(torchvision.models.resnet18) for _ in range(3))
    in_its_modules.layer1[0].relu = nn.SiLU()
    in_its_forward.maxpool.forward = lambda x: x
    assert recognise(as_it_comes, image).name == "resnet18"
    assert recognise(in_its_modules, image) is None
    assert recognise(in_its_forward, image) is None


# --- counting again ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_fvcore_counts_without_a_word(capfd):
    model = seeded(Plain).train()
    before = state_of(model)
    counted = recount(model, IMAGE.repeat(3, 1, 1, 1))
    assert state_of(model) == before
    assert counted == Recount(64 * (9 * 3 * 16 + 9 * 16 * 32 + 2 * 16 + 2 * 32) + 32 * 5, "fvcore")
    assert capfd.readouterr() == ("", "")


def test_what_fvcore_cannot_trace_is_counted_anew():
    class Wrapped(Plain):
        def forward(self, x):
            return SimpleNamespace(logits=super().forward(x))

    model = seeded(Wrapped)
    assert fvcore_macs(model, IMAGE) is None
    assert recount(model, IMAGE) == Recount(recount(seeded(Plain), IMAGE).macs, "archscan")
    result = slim(model, IMAGE, target_flops=0.5, data=batches())
    assert any("fvcore cannot trace" in note for note in result.notes)


def test_a_wrong_price_is_found_without_fvcore_too(monkeypatch):
    monkeypatch.setattr("archscan.recount.fvcore_counts", lambda *_: None)
    real = replan.plan

    def wrong(*arguments, **keywords):
        made = real(*arguments, **keywords)
        return replace(made, after=replace(made.after, macs=made.after.macs - 1))

    monkeypatch.setattr(replan, "plan", wrong)
    with pytest.raises(RebuildMismatch, match="MACs where the plan says"):
        slim(seeded(Plain), IMAGE, target_flops=0.5, data=batches())


# --- refusals ---------------------------------------------------------------------------------------------------------


def untouchable():
    raise AssertionError("no batch may be asked for")
    yield


def spoiled(model):
    with torch.no_grad():
        model.conv2.weight[3, 1] = float("nan")
    return model


def compiled(model):
    """Look like what torch.compile returns, whose import alone takes seconds."""
    model._orig_mod = Plain()
    return model


REFUSED = {
    "no target": (lambda: slim(Plain(), IMAGE), "no target"),
    "time elsewhere": (
        lambda: slim(Plain(), IMAGE, target_latency=0.5, settings=SlimSettings(latency=LatencySetup(device="meta"))),
        "on meta",
    ),
    "ratio 0": (lambda: slim(Plain(), IMAGE, target_flops=0), "above 0"),
    "ratio 1.5": (lambda: slim(Plain(), IMAGE, target_params=1.5), "at most 1"),
    "ratio True": (lambda: slim(Plain(), IMAGE, target_flops=True), "kept fraction"),
    "ratio text": (lambda: slim(Plain(), IMAGE, target_flops="0.5"), "kept fraction"),
    "criterion": (lambda: slim(Plain(), IMAGE, target_flops=0.5, criterion="sosp"), "sosp-[hi]"),
    "no module": (lambda: slim(lambda x: x, IMAGE, target_flops=0.5), "pass a torch.nn.Module"),
    "compiled": (lambda: slim(compiled(Plain()), IMAGE, target_flops=0.5), "compiled"),
    "nowhere": (lambda: slim(Plain().to("meta"), IMAGE, target_flops=0.5), "meta"),
    "NaN": (lambda: slim(spoiled(Plain()), IMAGE, target_flops=0.5, criterion="random"), "NaN.*conv2.weight"),
    "input": (lambda: slim(Plain(), torch.zeros(1, 4, 8, 8), target_flops=0.5), "cannot take an input"),
    "no input": (lambda: slim(Plain(), None, target_flops=0.5, data=batches()), "no tensor"),
    "one batch": (lambda: slim(Plain(), IMAGE, target_flops=0.5, data=batches()[0]), "one tuple, not batches"),
    "one tensor": (lambda: slim(Plain(), IMAGE, target_flops=0.5, data=batches()[0][0]), "not batches"),
    "no batch": (lambda: slim(Plain(), IMAGE, target_flops=0.5, data=[]), "no calibration batch"),
    "images alone": (lambda: slim(Plain(), IMAGE, target_flops=0.5, data=[IMAGE]), "pass loss_fn"),
    "label": (lambda: slim(Plain(), IMAGE, target_flops=0.5, data=[(IMAGE, torch.tensor([5]))]), "label 5"),
    "loss without data": (lambda: slim(Plain(), IMAGE, target_flops=0.5, loss_fn=lambda m, b: 0), "pass data="),
    "two inputs": (lambda: slim(Paired(), (IMAGE, IMAGE), target_flops=0.5), "pass calibration batches"),
    "recover on noise": (lambda: slim(Plain(), IMAGE, target_flops=0.5, settings=SlimSettings(recover="bn")), "noise"),
    "recover what": (lambda: SlimSettings(recover="all"), "'none' or 'bn'"),
    "recover nothing": (
        lambda: slim(
            nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)),
            IMAGE,
            target_flops=0.5,
            data=untouchable(),
            settings=SlimSettings(recover="bn"),
        ),
        "no BatchNorm",
    ),
    "protect text": (lambda: SlimSettings(protect="conv1"), "tuple of patterns"),
    "protect nothing": (
        lambda: slim(Plain(), IMAGE, target_flops=0.5, settings=SlimSettings(protect=("convv1",))),
        "did you mean.*conv1",
    ),
    "seed": (lambda: SlimSettings(seed=-1), "whole number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nonsense_is_refused(name):
    call, words = REFUSED[name]
    with pytest.raises(BadInput, match=words):
        call()


class Untouchable:
    """Batches that nobody may look at."""

    def __iter__(self):
        raise AssertionError("a batch was asked for")

    def __len__(self):
        return 1


@pytest.mark.parametrize("target", ["target_flops", "target_params"])
def test_an_infeasible_budget_is_refused_before_anything_is_scored(target):
    with pytest.raises(InfeasibleBudget, match=r"reachable: 0\.\d+ to 1\.000"):
        slim(Plain(), IMAGE, **{target: 0.001}, data=Untouchable())


def test_a_rebuilt_network_that_is_wrong_is_never_returned(monkeypatch):
    real = replan.rebuild

    def corrupt(*arguments):
        rebuilt = real(*arguments)
        with torch.no_grad():
            rebuilt.model.conv2.weight[0, 0] += 1e-3
        return rebuilt

    monkeypatch.setattr(replan, "rebuild", corrupt)
    with pytest.raises(RebuildMismatch, match=r"not the masked original.*differ by"):
        slim(seeded(Plain), IMAGE, target_flops=0.5, data=batches())


def test_capture_leaves_plain_alone():
    model = seeded(Plain)
    before = copy.deepcopy(model)
    capture(model, IMAGE, training=True)
    assert_same(model, before)
