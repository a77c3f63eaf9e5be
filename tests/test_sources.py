import contextlib
import json
import math
import os
import pickle
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from archscan import hubs, sources
from archscan.errors import BadInput
from archscan.recipes import Recipe, build, build_from_file, list_networks, resolve
from archscan.reference_nets import REFERENCE_NETS
from archscan.sources import Preprocessing, Subject, WeightsInfo, open_subject
from archscan.weights import check_finite, load_into, load_state_file

torchvision = hubs.torchvision  # imported after archscan, which declares the operators that torchvision may lack

FACTORY_FILE = """
from dataclasses import dataclass
from torch import nn
from neighbour import WIDTH

@dataclass
class Config:
    width: int = WIDTH

def tiny(num_classes=4):
    width = Config().width
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

def fixed():
    return tiny()

def maps():
    return nn.Conv2d(3, 4, 3)

def deep():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(64), nn.Flatten(), nn.Linear(36, 2))

def needy(width):
    return tiny()

def nothing():
    return "not a module"

constant = 3
"""


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(hubs, "hub_is_reachable", lambda *_: False)


@pytest.fixture
def factories(tmp_path):
    (tmp_path / "neighbour.py").write_text("WIDTH = 6\n")
    (tmp_path / "nets.py").write_text(FACTORY_FILE)
    return str(tmp_path / "nets.py")


@pytest.fixture
def lenet_weights(tmp_path):
    state = REFERENCE_NETS["lenet5"].factory().state_dict()
    save_file(state, tmp_path / "lenet.safetensors")
    return tmp_path / "lenet.safetensors", state


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def one_sentence(refusal):
    return "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


# Names


def test_a_name_belongs_to_timm_first_and_a_prefix_decides():
    assert resolve("resnet18") == ("timm", "resnet18")
    assert resolve("resnet18.a1_in1k") == ("timm", "resnet18.a1_in1k")
    assert resolve("torchvision:resnet18") == ("torchvision", "resnet18")
    assert resolve("shufflenet_v2_x1_0") == ("torchvision", "shufflenet_v2_x1_0")
    assert resolve("resnet20_cifar") == resolve("reference:resnet20_cifar") == ("reference", "resnet20_cifar")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resent50", "resnet50"),
        ("resnet56_cifra", "resnet56_cifar"),
        ("torchvision:resent18", "resnet18"),
        ("timm:lenet5", "timm has no network"),
        ("hf-hub:someone/resnet18", "there is no network"),
        ("local-dir:resnet18", "there is no network"),
        ("qqqqqqqq", "there is no network"),
        ("", "there is no network"),
    ],
)
def test_unknown_networks_get_the_closest_names(name, hint):
    with pytest.raises(BadInput, match=hint) as refusal:
        open_subject(name)
    assert one_sentence(refusal)


def test_unknown_tags_are_refused():
    with pytest.raises(BadInput, match="bogus"):
        open_subject("resnet18.bogus")


def test_networks_are_listed_by_pattern_or_part():
    everything = list_networks()
    assert {network.source for network in everything} == {"timm", "torchvision", "reference"}
    assert [network.name for network in list_networks("resnet*_cifar")] == sorted(
        f"resnet{depth}_cifar" for depth in (20, 32, 44, 56, 110)
    )
    assert {network.name for network in list_networks("LENET5")} == {"lenet5"}
    assert list_networks("no such thing") == []
    pretrained = {(network.source, network.name): network.pretrained for network in everything}
    assert pretrained["timm", "resnet50"]
    assert pretrained["torchvision", "resnet50"]
    assert not pretrained["reference", "lenet5"]


# Recipes


@pytest.mark.parametrize(
    "name", ["resnet18", "torchvision:mobilenet_v3_small", "torchvision:googlenet", "resnet20_cifar", "lenet5"]
)
def test_a_recipe_builds_the_same_architecture_after_json(name):
    subject = open_subject(name, weights="random", num_classes=5)
    recipe = Recipe.from_json(json.loads(json.dumps(subject.recipe.to_json())))
    before = torch.get_rng_state()
    again = build(recipe, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_tensors(again.state_dict(), subject.model.state_dict())
    assert str(again) == str(subject.model)
    assert not again.training
    assert not same_tensors(build(recipe, seed=1).state_dict(), again.state_dict())


@pytest.mark.parametrize(
    "recipe",
    [
        {"source": "timm", "name": "hf-hub:someone/model", "kwargs": {}},
        {"source": "timm", "name": "../resnet18", "kwargs": {}},
        {"source": "timm", "name": "resnet18", "kwargs": {"pretrained": True}},
        {"source": "timm", "name": "resnet18", "kwargs": {"checkpoint_path": "evil.pth"}},
        {"source": "timm", "name": "resnet18", "kwargs": {"num_classes": 10**12}},
        {"source": "timm", "name": "resnet18", "kwargs": {"num_classes": -1}},
        {"source": "timm", "name": "resnet18", "kwargs": {"num_classes": "10"}},
        {"source": "timm", "name": "resnet18", "kwargs": {"num_classes": [10, 10]}},
        {"source": "timm", "name": "resnet18", "kwargs": {"img_size": [224, 10**9]}},
        {"source": "torchvision", "name": "resnet18", "kwargs": {"weights": "DEFAULT"}},
        {"source": "torchvision", "name": "googlenet", "kwargs": {"aux_logits": 3}},
        {"source": "torchvision", "name": "resnet18", "kwargs": {"aux_logits": True}},
        {"source": "reference", "name": "lenet5", "kwargs": {"image_size": [4, 4]}},
        {"source": "reference", "name": "LeNet5", "kwargs": {}},
        {"source": "os", "name": "system", "kwargs": {}},
        {"source": ["timm"], "name": "resnet18", "kwargs": {}},
        {"source": "timm", "name": 3, "kwargs": {}},
        {"source": "timm", "name": "resnet18"},
        [],
    ],
)
def test_recipes_of_unknown_origin_are_not_trusted(recipe):
    with pytest.raises(BadInput) as refusal:
        build(Recipe.from_json(recipe))
    assert one_sentence(refusal)


@pytest.mark.parametrize("value", [0, 10**7, 2.0, True, "10", None])
def test_a_recipe_with_senseless_numbers_is_refused_before_anything_is_built(value):
    with pytest.raises(BadInput, match="whole number"):
        Recipe.from_json({"source": "reference", "name": "lenet5", "kwargs": {"num_classes": value}})


def test_a_recipe_does_not_run_a_file(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef net(): pass\n")
    with pytest.raises(BadInput, match="may not run"):
        build(Recipe("file", f"{tmp_path}/evil.py:net"))
    assert not (tmp_path / "ran").exists()


# Subjects


def test_a_subject_has_the_networks_own_preprocessing(offline):
    subject = open_subject("torchvision:efficientnet_v2_s")
    assert subject.preprocessing == Preprocessing(
        (384, 384), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 1.0, "center"
    )
    assert tuple(subject.example_input.shape) == (1, 3, 384, 384)
    assert subject.num_classes == 1000
    subject = open_subject("mobilenetv3_small_050")
    assert (subject.preprocessing.interpolation, subject.preprocessing.crop_pct) == ("bicubic", 0.875)
    subject = open_subject("lenet5")
    assert (subject.input_size, subject.preprocessing.channels, subject.num_classes) == ((28, 28), 1, 10)


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "regnet_y_400mf", "convnext_tiny", "inception_v3", "swin_v2_t"]
)
def test_torchvisions_resized_side_is_recovered_from_the_crop_ratio(name):
    own, _, _ = sources._torchvision_defaults(name)
    transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    assert [math.floor(side / own.crop_pct) for side in own.input_size] == transforms.resize_size * 2


def test_options_replace_the_networks_own():
    subject = open_subject(
        "resnet20_cifar", weights="random", input_size=(40, 48), num_classes=3, mean=[0.5], std=(0.1, 0.2, 0.3)
    )
    assert tuple(subject.example_input.shape) == (1, 3, 40, 48)
    assert subject.mean == (0.5, 0.5, 0.5)
    assert subject.std == (0.1, 0.2, 0.3)
    assert subject.model(subject.example_input).shape == (1, subject.num_classes) == (1, 3)
    assert open_subject("lenet5", weights="random", input_size=32).model(torch.randn(1, 1, 32, 32)).shape == (1, 10)
    fixed = open_subject("test_vit", weights="random", input_size=96)
    assert fixed.recipe.kwargs["img_size"] == [96, 96]
    assert fixed.model(fixed.example_input).shape == (1, fixed.num_classes)


@pytest.mark.parametrize(
    "options",
    [
        {"input_size": 0},
        {"input_size": (32, 32, 32)},
        {"input_size": 10**9},
        {"num_classes": 0},
        {"mean": (0.5, 0.5)},
        {"mean": ()},
        {"mean": (math.nan,)},
        {"std": (0.0,)},
    ],
)
def test_options_out_of_bounds_are_refused(options):
    with pytest.raises(BadInput) as refusal:
        open_subject("resnet20_cifar", weights="random", **options)
    assert one_sentence(refusal)


def test_names_are_safe_for_folders(factories):
    assert open_subject("resnet18.a1_in1k", weights="random").name == "resnet18.a1_in1k"
    assert open_subject(f"{factories}:tiny").name == "nets-tiny"


# Pretrained weights


def test_auto_falls_back_to_random_weights_and_says_why(offline):
    for name, why in (
        ("resnet18", "huggingface.co cannot be reached"),
        ("torchvision:resnet18", "download.pytorch.org cannot be reached"),
        ("resnet20_cifar", "come without weights"),
    ):
        subject = open_subject(name)
        assert subject.weights.kind == "random"
        assert why in subject.weights.reason
        with pytest.raises(BadInput, match="no pretrained weights"):
            open_subject(name, weights="pretrained")


def test_an_unreachable_hub_leaves_the_client_as_it_was(offline, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hubs.offline_where_unreachable() as online:
        assert not online
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE


def test_a_silent_host_is_not_waited_for(monkeypatch):
    released = threading.Event()

    def hang(*_args, **_kwargs):
        released.wait(2)
        return contextlib.nullcontext()

    monkeypatch.setattr(hubs.urllib.request, "urlopen", hang)
    try:
        assert not hubs.hub_is_reachable("https://example.invalid", seconds=0.05)
    finally:
        released.set()


@pytest.mark.parametrize("num_classes", [None, 7])
def test_torchvisions_weights_are_loaded(monkeypatch, num_classes):
    donor = torchvision.models.resnet18(weights=None).state_dict()
    monkeypatch.setattr(hubs, "hub_is_reachable", lambda *_: True)
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda *_, **__: donor)
    subject = open_subject("torchvision:resnet18", num_classes=num_classes)
    own = subject.model.state_dict()
    assert subject.weights.kind == "pretrained"
    assert all(torch.equal(own[key], donor[key]) for key in donor if not key.startswith("fc."))
    assert (
        torch.equal(own["fc.weight"], donor["fc.weight"]) if num_classes is None else own["fc.weight"].shape == (7, 512)
    )
    assert bool(subject.weights.reason) == (num_classes is not None)


def test_googlenet_with_weights_is_what_its_recipe_builds(monkeypatch):
    donor = torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=True).state_dict()
    monkeypatch.setattr(hubs, "hub_is_reachable", lambda *_: True)
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda *_, **__: donor)
    subject = open_subject("torchvision:googlenet")
    assert str(build(subject.recipe)) == str(subject.model)
    assert subject.model.transform_input
    assert torch.equal(subject.model.fc.weight, donor["fc.weight"])


def test_timms_weights_are_loaded(monkeypatch):
    import timm.models._builder as builder

    donor = build(Recipe("timm", "resnet18", {"num_classes": 1000}), seed=9).state_dict()
    monkeypatch.setattr(hubs, "hub_is_reachable", lambda *_: True)
    monkeypatch.setattr(builder, "load_state_dict_from_hf", lambda *_, **__: dict(donor))
    subject = open_subject("resnet18", weights="pretrained")
    assert subject.weights == WeightsInfo("pretrained", "timm/resnet18.a1_in1k")
    assert same_tensors(subject.model.state_dict(), donor)
    other = open_subject("resnet18", num_classes=4)
    assert "the classifier is random: it has 4 outputs, the weights 1000" in other.weights.reason
    assert torch.equal(other.model.state_dict()["conv1.weight"], donor["conv1.weight"])


def test_a_failing_download_is_a_reason(monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError("the line is dead")

    monkeypatch.setattr(hubs, "hub_is_reachable", lambda *_: True)
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fail)
    assert "the line is dead" in open_subject("torchvision:resnet18").weights.reason


# Weights files


@pytest.mark.parametrize("form", ["safetensors", "pt", "legacy", "nested", "model", "parallel"])
def test_weights_files_are_loaded(tmp_path, lenet_weights, form):
    path, state = lenet_weights
    if form != "safetensors":
        path = tmp_path / "lenet.pth"
        content = {
            "nested": {"epoch": 3, "state_dict": state},
            "model": {"model": state},
            "parallel": {f"module.{key}": value for key, value in state.items()},
        }.get(form, state)
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    subject = open_subject("lenet5", weights=str(path), seed=5)
    assert subject.weights == WeightsInfo("file", str(path))
    assert same_tensors(subject.model.state_dict(), state)


def test_step_counters_may_be_missing():
    model = build(Recipe("reference", "resnet20_cifar"))
    load_into(model, {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}, "weights")


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def truncated(path, state):
    torch.save(state, path / "whole.pt")
    (path / "cut.pt").write_bytes((path / "whole.pt").read_bytes()[:5000])
    return path / "cut.pt"


def truncated_safetensors(path, state):
    save_file(state, path / "whole.safetensors")
    (path / "cut.safetensors").write_bytes((path / "whole.safetensors").read_bytes()[:5000])
    return path / "cut.safetensors"


def saved(name):
    def save(path, content):
        torch.save(content, path / name)
        return path / name

    return save


def bare_pickle(path, _state):
    (path / "bare.pt").write_bytes(pickle.dumps({"w": Evil(path / "ran")}))
    return path / "bare.pt"


def written(name, content):
    def write(path, _state):
        (path / name).write_bytes(content)
        return path / name

    return write


def tampered(change):
    def save(path, state):
        state = {key: value.clone() for key, value in state.items()}
        change(state)
        save_file(state, path / "tampered.safetensors")
        return path / "tampered.safetensors"

    return save


BAD_WEIGHTS = {
    "missing": (lambda path, _state: path / "nothing.pt", "there is no weights file"),
    "unknown ending": (written("weights.onnx", b"x"), "unknown ending"),
    "truncated": (truncated, "truncated or of another kind"),
    "truncated safetensors": (truncated_safetensors, "truncated or of another kind"),
    "empty": (written("empty.pt", b""), "truncated or of another kind"),
    "text": (written("text.pth", b"hello world"), "truncated or of another kind"),
    "code": (lambda path, _state: saved("code.pt")(path, {"w": Evil(path / "ran")}), "would run .*mkdir.* refused"),
    "bare code": (bare_pickle, "refused"),
    "whole model": (lambda path, _state: saved("model.pt")(path, nn.Conv2d(1, 1, 1)), "would run .*Conv2d.* refused"),
    "no tensors": (
        lambda path, _state: saved("numbers.pt")(path, {"epoch": 3}),
        "other things than tensors \\(epoch\\)",
    ),
    "no names": (lambda path, _state: saved("list.pt")(path, [torch.ones(1)]), "no state dict"),
    "other model": (
        lambda path, _state: saved("other.pt")(path, nn.Conv2d(1, 1, 1).state_dict()),
        "8 missing \\(conv1.weight, conv1.bias, conv2.weight and 5 more\\), 2 unknown \\(weight, bias\\)",
    ),
    "other shape": (
        tampered(lambda state: state.update({"conv1.weight": torch.ones(20, 1, 3, 3)})),
        "conv1.weight \\(20, 1, 3, 3\\) instead of \\(20, 1, 5, 5\\)",
    ),
    "other classes": (
        tampered(lambda state: state.update({"fc2.weight": torch.ones(7, 500), "fc2.bias": torch.ones(7)})),
        "pass --num-classes 7",
    ),
    "integers": (tampered(lambda state: state.update({"fc1.bias": torch.ones(500, dtype=torch.int64)})), "fc1.bias"),
    "nan": (tampered(lambda state: state["conv2.bias"][3:4].fill_(math.nan)), "NaN .*conv2.bias"),
    "infinity": (tampered(lambda state: state["fc1.weight"][0, :2].fill_(math.inf)), "infinity .*fc1.weight"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_refused_in_one_sentence(tmp_path, lenet_weights, case):
    make, message = BAD_WEIGHTS[case]
    path = make(tmp_path, lenet_weights[1])
    with pytest.raises(BadInput, match=message) as refusal:
        open_subject("lenet5", weights=str(path))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_number_of_classes_load_with_it(tmp_path):
    save_file(REFERENCE_NETS["resnet20_cifar"].factory(num_classes=7).state_dict(), tmp_path / "seven.safetensors")
    with pytest.raises(BadInput, match=r"7 classes where the model has 10 .*pass --num-classes 7"):
        open_subject("resnet20_cifar", weights=str(tmp_path / "seven.safetensors"))
    assert open_subject("resnet20_cifar", weights=str(tmp_path / "seven.safetensors"), num_classes=7).num_classes == 7


def test_a_refused_file_leaves_the_model_alone(lenet_weights):
    model = build(Recipe("reference", "lenet5"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(BadInput):
        load_into(model, {**lenet_weights[1], "conv1.bias": torch.full((20,), math.nan)}, "weights")
    assert same_tensors(model.state_dict(), before)


def test_finite_tensors_pass_the_check():
    check_finite({"weight": torch.ones(3), "counter": torch.tensor(3)}, "weights")


def test_old_style_keys_are_found_below_a_compiled_wrapper(tmp_path):
    state = {f"_orig_mod.{key}": value for key, value in nn.Conv2d(1, 1, 1).state_dict().items()}
    save_file(state, tmp_path / "compiled.safetensors")
    assert set(load_state_file(tmp_path / "compiled.safetensors")) == {"weight", "bias"}


# Files and saved results


def test_a_factory_in_a_file_is_called(factories):
    subject = open_subject(f"{factories}:tiny", input_size=12, num_classes=9)
    assert subject.weights.kind == "given"
    assert tuple(subject.example_input.shape) == (1, 1, 12, 12)
    assert subject.num_classes == 9
    assert subject.recipe == Recipe("file", f"{factories}:tiny", {"num_classes": 9})
    assert same_tensors(build_from_file(subject.recipe).state_dict(), subject.model.state_dict())
    assert open_subject(f"{factories}:fixed").num_classes == 4


def test_a_factorys_weights_can_be_replaced(factories, tmp_path):
    state = build_from_file(Recipe("file", f"{factories}:tiny"), seed=3).state_dict()
    save_file(state, tmp_path / "tiny.safetensors")
    subject = open_subject(f"{factories}:tiny", weights=str(tmp_path / "tiny.safetensors"))
    assert same_tensors(subject.model.state_dict(), state)


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("absent", {}, "has no function absent"),
        ("constant", {}, "has no function constant"),
        ("needy", {}, "cannot be called with no arguments"),
        ("fixed", {"num_classes": 3}, "cannot be called with num_classes"),
        ("nothing", {}, "returned 'not a module' \\(str\\)"),
        ("maps", {}, "not one row of class scores"),
        ("deep", {"input_size": 32}, "cannot take an input of shape \\(1, 3, 32, 32\\)"),
        ("tiny", {"weights": "random"}, "decides about its weights"),
        ("tiny", {"weights": "pretrained"}, "decides about its weights"),
    ],
)
def test_bad_factories_are_refused(factories, factory, options, message):
    with pytest.raises(BadInput, match=message):
        open_subject(f"{factories}:{factory}", **options)


def test_bad_files_are_refused(tmp_path):
    (tmp_path / "broken.py").write_text("def net(:\n")
    (tmp_path / "lost.py").write_text("import no_such_module_anywhere\n")
    for name, message in (
        ("absent.py:net", "there is no file"),
        ("broken.py:net", "SyntaxError"),
        ("lost.py:net", "no_such_module_anywhere"),
        ("broken.py", "does not name a factory"),
    ):
        with pytest.raises(BadInput, match=message):
            open_subject(f"{tmp_path}/{name}")


def test_a_saved_folder_is_opened_by_the_loader_that_was_passed(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    plain = open_subject("lenet5", weights="random")

    def open_saved(folder) -> Subject:
        assert folder == tmp_path
        return plain

    subject = open_subject(str(tmp_path), open_saved=open_saved, input_size=32, mean=[0.3])
    assert subject.model is plain.model
    assert tuple(subject.example_input.shape) == (1, 1, 32, 32)
    assert subject.mean == (0.3,)
    for options in ({"weights": "random"}, {"num_classes": 3}):
        with pytest.raises(BadInput, match="saved result"):
            open_subject(str(tmp_path), open_saved=open_saved, **options)


def test_a_folder_without_a_plan_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"without a plan\.json"):
        open_subject(str(tmp_path))
