"""What a new user types and passes: checkpoints as training loops save them, code with mistakes, and what is said."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import archscan
from archscan import cli, pipeline
from archscan.commands import slim
from archscan.data import ImageSet
from archscan.errors import BadInput, InfeasibleBudget
from archscan.folders import check_replaceable
from archscan.options import silent
from archscan.recipes import list_networks
from archscan.remarks import Images, notes_of
from archscan.report import views
from archscan.report.advice import finding_command
from archscan.report.html import render_html
from archscan.report.progress import progress_on
from archscan.report.terminal import console, render, show
from archscan.saved import open_saved, read_result
from archscan.sources import Preprocessing, open_subject
from archscan.weights import load_into, load_state_file

FACTORIES = """
from torch import nn

def tiny():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

def raising():
    raise KeyError("no such width")

class Misspelt(nn.Module):
    def forward(self, images):
        return self.bdoy(images)

def misspelt():
    return Misspelt()

class Pair(nn.Module):
    def forward(self, left, right):
        return left + right

def pair():
    return Pair()
"""


class Two(nn.Sequential):
    def __init__(self, first="first", second="second"):
        super().__init__()
        self.add_module(first, nn.Conv2d(3, 4, 3))
        self.add_module(second, nn.Linear(4, 5))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "nets.py"
    path.write_text(FACTORIES, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def result():
    return archscan.slim(tiny(), torch.zeros(1, 3, 8, 8), target_flops=0.6, criterion="magnitude")


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    )


# Checkpoints


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"net": state, "acc": 93.1, "epoch": 3},
        lambda state: {"anything": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
        lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    ],
)
def test_checkpoints_of_training_loops_load(tmp_path, wrap):
    model, state = Two(), {key: value + 1 for key, value in Two().state_dict().items()}
    torch.save(wrap(state), tmp_path / "last.pth")
    load_into(model, load_state_file(tmp_path / "last.pth"), "last.pth")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_of_several_state_dicts_one_has_to_be_named(tmp_path):
    state = Two().state_dict()
    average = {key: value + 1 for key, value in state.items()}
    path = tmp_path / "last.pth"
    torch.save({"model": state, "ema": average, "epoch": 3}, path)
    with pytest.raises(BadInput, match=r"several state dicts \(model, ema\); say which, such as .*last.pth:model"):
        load_state_file(path)
    assert torch.equal(load_state_file(f"{path}:ema")["first.bias"], average["first.bias"])
    with pytest.raises(BadInput, match="no state dict 'swa'; it holds model, ema"):
        load_state_file(f"{path}:swa")


@pytest.mark.parametrize("first", ["module", "model"])
def test_a_model_whose_own_names_look_like_a_prefix_loads(tmp_path, first):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(first, Two())

    model = Wrapped()
    state = {key: value + 1 for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "last.pth")
    load_into(model, load_state_file(tmp_path / "last.pth"), "last.pth")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_another_width_is_not_called_another_number_of_classes():
    model = Two()
    state = model.state_dict() | {"first.weight": torch.zeros(9, 3, 3, 3), "first.bias": torch.zeros(9)}
    with pytest.raises(BadInput, match=r"of another shape \(first.weight \(9, 3, 3, 3\) instead of \(4, 3, 3, 3\)"):
        load_into(model, state, "last.pth")


# Code with mistakes


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("raising", r"raising in .*nets.py fails: KeyError: 'no such width' \(line 8\); mend it"),
        ("misspelt", r"AttributeError: 'Misspelt' object has no attribute 'bdoy' \(line 12\)"),
        ("pair", "gives it one batch of images; use archscan.slim from Python"),
    ],
)
def test_a_mistake_in_the_users_code_is_one_sentence_with_its_line(file, factory, said):
    with pytest.raises(BadInput, match=said) as refusal:
        open_subject(f"{file}:{factory}", input_size=8)
    assert "\n" not in str(refusal.value)
    assert "--input-size" not in str(refusal.value)  # it was given


def test_a_file_that_cannot_be_read_as_python_is_refused(tmp_path):
    (tmp_path / "nets.py").write_text("1 / 0\n", encoding="utf-8")
    with pytest.raises(BadInput, match=r"cannot be imported: ZeroDivisionError: division by zero \(line 1\)"):
        open_subject(f"{tmp_path / 'nets.py'}:tiny")


def test_a_forward_that_decides_by_its_input_is_told():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = tiny()

        def forward(self, images):
            return self.body(-images if images.sum() > 0 else images)

    said = archscan.slim(Branching(), torch.ones(1, 3, 8, 8), target_flops=0.6, criterion="magnitude").warnings
    assert any("the model itself reads values that depend on its input" in warning for warning in said)


# What nothing can be done with


def test_a_network_without_free_groups_is_refused_with_the_reason():
    model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InfeasibleBudget, match="nothing of the MACs can be saved: every channel group is frozen"):
        archscan.slim(model, torch.zeros(1, 3, 8, 8), target_flops=0.6, criterion="magnitude")


def test_a_run_that_would_remove_nothing_is_refused(file, tmp_path, capsys):
    assert cli.main([f"{file}:tiny", "--target-flops", "1", "--output", str(tmp_path / "out")]) == 2
    assert "nothing would be removed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_root_of_the_disk_is_no_output_folder():
    with pytest.raises(BadInput, match="root of the disk"):
        check_replaceable("/", (), "", overwrite=True)


def test_a_file_is_no_saved_result(tmp_path):
    (tmp_path / "compare.html").write_text("", encoding="utf-8")
    with pytest.raises(BadInput, match="is a file; give a folder"):
        read_result(tmp_path / "compare.html")


# What is said


def test_a_pattern_with_a_colon_is_one_of_source_and_name():
    assert {network.source for network in list_networks("reference:*")} == {"reference"}
    assert [network.name for network in list_networks("torchvision:resnet18")] == ["resnet18"]


def test_a_mistyped_pattern_is_answered_with_near_names():
    with pytest.raises(BadInput, match="no network matches 'mobilnet_v2'; did you mean mobilenet_v2"):
        pipeline.list_command("mobilnet_v2")


def test_reprs_are_short_and_say_what_was_done(result):
    assert repr(result).startswith("SlimResult(Sequential, Plan(")
    assert repr(result).endswith("channel groups), proven)")
    coupling = result.analysis.coupling
    for each in (result, result.plan, coupling, *coupling.groups):
        assert "\n" not in repr(each)
        assert len(repr(each)) < 160
    assert repr(coupling) == "Coupling(4 channel groups, 2 of them free; 39 units)"
    assert repr(coupling.groups[0]) == "ChannelGroup('0.input', width 3, tensor axes 1, frozen: network input)"


def test_random_weights_are_told_again_when_their_result_is_slimmed_further(tmp_path):
    def options(name, *more):
        typed = [name, "--target-flops", "0.7", "--criterion", "magnitude", "--output", str(tmp_path / "out"), *more]
        return slim.read_options(slim.make_parser().parse_args(typed), "")

    report = pipeline.slim_command(options("lenet5", "--weights", "random"), silent).report
    assert report.weights.kind == "random"
    info = open_saved(tmp_path / "out").weights
    assert info.kind == "random"
    assert "was made from random weights" in info.reason


def test_a_finding_gives_the_whole_command(result):
    typed = "archscan 'my nets.py:tiny' --target-flops 0.6 --data my/images --weights=tiny.pt --seed 3"
    report = replace(result_report(result), command_line=typed)

    def command(option, line=typed):
        found = replace(finding, option=option)
        return finding_command(replace(report, command_line=line), found)

    widen = "archscan widen MODEL --only 0"
    finding = archscan.findings.Finding(1, "capacity", "group", ("0",), "A.", "B.", "C.", widen)
    model = "'my nets.py:tiny' --data my/images --weights=tiny.pt"
    assert command(widen) == f"archscan widen {model} --only 0"
    assert command("--target-params 0.6") == f"archscan {model} --target-params 0.6"
    assert command("--lossless") == f"archscan {model} --lossless"
    assert command("--round-to 8") == f"archscan {model} --target-flops 0.6 --round-to 8"
    assert command("--latency", "archscan scan tiny --target-flops 0.6") == "archscan tiny --target-flops 0.6 --latency"
    assert command("") == ""
    for unknown in ("", "archscan --target-flops 0.6 tiny", "archscan 'tiny"):
        assert command("--lossless", unknown) == "--lossless"
    page = render_html(replace(report, findings=(finding,)))
    assert "archscan widen &#39;my nets.py:tiny&#39; --data my/images --weights=tiny.pt --only 0" in page
    assert f"{views.verification_line(report)}." in page


def result_report(result):
    return archscan.results.report_of(result)


def test_a_long_command_can_be_copied_from_a_narrow_terminal(result):
    option = "archscan widen MODEL --only a.very.long.path.in.a.deep.network --factor 2 --keep-flops"
    finding = archscan.findings.Finding(1, "capacity", "group", ("0",), "A.", "B.", "C.", option)
    screen = io.StringIO()
    show(render(replace(result_report(result), findings=(finding,))), console(screen, width=40, colour=True))
    assert option in screen.getvalue()


@pytest.mark.parametrize(
    ("skipped", "classes", "said"),
    [
        (
            ("a.jpg",),
            ("cat",),
            ["1 class of the data is not the model's", "1 calibration image could not be read and was"],
        ),
        (
            ("a.jpg", "b.jpg"),
            ("cat", "dog"),
            ["2 classes of the data are not", "2 calibration images could not be read and were"],
        ),
    ],
)
def test_notes_count_in_grammar(skipped, classes, said):
    pixels, labels = np.zeros((4, 8, 8, 3), np.uint8), torch.zeros(4, dtype=torch.int64)
    found = ImageSet("dir", "folder", pixels, labels, classes, 4, skipped, Preprocessing((8, 8), (0.5,), (0.5,)), 2)
    options = slim.read_options(slim.make_parser().parse_args(["x", "--target-flops", "0.5"]), "")
    notes = " ".join(notes_of(options, Images(found, None, labels_fit=False), "obd"))
    assert all(words in notes for words in said)


@pytest.mark.parametrize(("total", "shown"), [(0, "Opening ━"), (8, "3/8")])
def test_a_bar_counts_only_where_there_is_something_to_count(total, shown):
    screen = io.StringIO()
    with progress_on(Console(file=screen, force_terminal=True, width=60, color_system=None))("Opening") as step:
        step(3 if total else 0, total)
    assert shown in screen.getvalue()
    assert "0/0" not in screen.getvalue()
    assert "/?" not in screen.getvalue()
