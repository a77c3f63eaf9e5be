"""Exports: each file is the slim network and nothing else, and where it cannot be, a sentence and no file."""

import doctest
import json
import logging
import shutil
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

import archscan
from archscan import exporters, recipes, saving
from archscan.commands import export as command
from archscan.errors import BadInput, RebuildMismatch
from archscan.exporters import (
    ExportSettings,
    Pair,
    checks,
    export_formats,
    export_pair,
    folder,
    network,
    onnx_file,
)
from archscan.exporters.checks import compare, make_trials, resize_batch
from archscan.exporters.folder import open_pair
from archscan.report.model import read_report
from tests import nets

onnx = pytest.importorskip("onnx", reason="NO ONNX: pip install 'archscan[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="NO ONNX RUNTIME: pip install 'archscan[onnx]'")

FILES = {"onnx": "model.onnx", "pt2": "model.pt2", "script": "model.ts.pt"}


def randomised(model):
    """Give normalisations statistics and gains that a file must have, or it is seen."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var, module.bias.data, module.running_mean):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


def images(batch=1, seed=0):
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def slim(model, example, ratio=0.5):
    return archscan.slim(model, example, target_flops=ratio, criterion="magnitude")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A slim residual network, exported in all formats right after it was slimmed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = randomised(nets.Residual())
    result = slim(dense, images())
    where = result.save(tmp_path_factory.mktemp("exported") / "slim")
    pair = Pair(dense, result.model, read_report(where / "summary.json"))
    report = export_pair(where, pair, images(), ("onnx", "pt2", "script"))
    assert read_report(where / "summary.json") == report
    return where


@pytest.fixture(scope="module")
def _slim_lenet5(tmp_path_factory):
    model = recipes.build(recipes.Recipe("reference", "lenet5", {}))
    return slim(model, torch.randn(1, 1, 28, 28)).save(tmp_path_factory.mktemp("lenet5") / "slim")


@pytest.fixture
def saved(_slim_lenet5, tmp_path):
    """A saved LeNet-5, which knows its architecture; a copy that a test may spoil."""
    return Path(shutil.copytree(_slim_lenet5, tmp_path / "saved"))


@pytest.fixture
def base():
    torch.manual_seed(0)
    return randomised(nets.Residual())


# ---------------------------------------------------------------- a saved result


def loaders(where):
    session = onnxruntime.InferenceSession(str(where / "model.onnx"), providers=["CPUExecutionProvider"])
    yield lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    yield torch.export.load(where / "model.pt2").module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield torch.jit.load(where / "model.ts.pt")


def test_every_file_computes_the_slim_network(exported):
    model = archscan.load(exported, nets.Residual())
    for batch in (1, 2, 5):
        inputs = images(batch, seed=batch)
        with torch.no_grad():
            expected = model(inputs)
            for run in loaders(exported):
                torch.testing.assert_close(run(inputs), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_the_summary_lists_the_files_with_the_slim_networks_parameters(exported):
    report = read_report(exported / "summary.json")
    assert {entry.format: entry.file for entry in report.exports} == FILES
    for entry in report.exports:
        assert entry.parameters == report.after.params < report.before.params
        assert entry.file_bytes == (exported / entry.file).stat().st_size
        assert entry.max_abs_error >= 0
        assert entry.max_relative_error <= checks.RELATIVE_TOLERANCE
        assert entry.batch_size is None
        assert "batch 1 and 3" in entry.checked_by
    assert [entry.opset is None for entry in report.exports] == [False, True, True]


def contents(file):
    if not zipfile.is_zipfile(file):
        return [file.read_bytes()]
    with zipfile.ZipFile(file) as archive:
        return [archive.read(name) for name in archive.namelist()]


def test_no_file_holds_a_dense_tensor_a_path_or_an_example(exported):
    model = archscan.load(exported, nets.Residual())
    shapes = {tuple(tensor.shape) for tensor in model.state_dict().values()} | {(2,)}
    graph = onnx.load(exported / "model.onnx").graph
    assert {tuple(tensor.dims) for tensor in graph.initializer} <= shapes
    for file in ("model.onnx", "model.pt2"):  # TorchScript keeps the paths of sources for its error messages
        for content in contents(exported / file):
            assert str(Path(nets.__file__).parent).encode() not in content
            assert str(Path(torch.__file__).parent).encode() not in content
    assert torch.export.load(exported / "model.pt2").example_inputs is None


def test_the_architecture_adds_up(exported):
    lines = (exported / "architecture.txt").read_text().splitlines()
    report = read_report(exported / "summary.json")
    rows = [line.replace(" -> ", "->").split() for line in lines[3:-2]]
    model = archscan.load(exported, nets.Residual())
    for column, before, after in (
        (4, report.before.params, report.after.params),
        (5, report.before.macs, report.after.macs),
    ):
        pairs = [row[column].replace(",", "").split("->") for row in rows]
        assert sum(int(pair[0]) for pair in pairs) == before
        assert sum(int(pair[-1]) for pair in pairs) == after
    for path, type_name, width_in, width_out, *_ in rows:
        module = model.get_submodule(path)
        assert type(module).__name__ == type_name
        if isinstance(module, nn.Conv2d):
            assert [int(width.split("->")[-1]) for width in (width_in, width_out)] == [
                module.in_channels,
                module.out_channels,
            ]
    assert any("->" in row[3] for row in rows)


def test_exports_can_be_replaced_only_when_asked(base, tmp_path):
    export_formats(base, images(), tmp_path, ("script",))
    with pytest.raises(BadInput, match=r"model\.ts\.pt exists; pass --overwrite"):
        export_formats(base, images(), tmp_path, ("script",))
    (entry,) = export_formats(base, images(), tmp_path, ("script",), ExportSettings(overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == [entry.file]


def test_another_folder_leaves_the_saved_one_as_it_is(saved, tmp_path):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    exporters.export_saved(saved, ("script",), tmp_path / "elsewhere")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["architecture.txt", "model.ts.pt"]


def test_a_format_exported_again_replaces_its_entry(saved):
    exporters.export_saved(saved, ("script", "pt2"))
    exporters.export_saved(saved, ("script",), None, ExportSettings(4, overwrite=True))
    found = {entry.format: entry.batch_size for entry in read_report(saved / "summary.json").exports}
    assert found == {"script": 4, "pt2": None}
    archscan.load(saved)
    saving.check_target(saved, overwrite=True)


def test_a_summary_from_before_there_were_exports_is_read(saved):
    data = json.loads((saved / "summary.json").read_text())
    del data["exports"]
    (saved / "summary.json").write_text(json.dumps(data))
    assert read_report(saved / "summary.json").exports == ()


def test_the_architecture_of_the_second_slimming_starts_from_the_first(saved, tmp_path):
    again = slim(archscan.load(saved), torch.randn(1, 1, 28, 28), 0.6)
    recipe, _ = saving.read_steps(saved)
    replace(again, recipe=recipe, history=saving.read_history(saved)).save(tmp_path / "twice")
    first, twice = read_report(saved / "summary.json"), open_pair(tmp_path / "twice", None)
    assert sum(parameter.numel() for parameter in twice.before.parameters()) == first.after.params
    assert sum(parameter.numel() for parameter in twice.after.parameters()) < first.after.params


# ---------------------------------------------------------------- nothing half-written


class Stopped(BaseException):
    """What no handler expects."""


@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt, RebuildMismatch("off"), OSError(28, "No space left")])
def test_an_interruption_leaves_nothing(saved, monkeypatch, error):
    def write(given, where):
        (where / "model.ts.pt").write_bytes(b"half")
        raise error

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setitem(exporters.FORMATS, "script", ("model.ts.pt", write))
    with pytest.raises(BadInput if isinstance(error, OSError) else error if isinstance(error, type) else type(error)):
        exporters.export_saved(saved, ("pt2", "script"))
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_the_network_and_the_process_are_left_as_they_were(base, tmp_path):
    base.train()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    random, disabled = torch.get_rng_state(), logging.root.manager.disable
    export_formats(base, images(), tmp_path, ("pt2", "script"))
    assert base.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert logging.root.manager.disable == disabled


# ---------------------------------------------------------------- inputs and outputs


class Several(nets.Residual):
    def forward(self, image, offset=None, scale=None):
        scores = super().forward(image) * scale + offset.sum(1, keepdim=True)
        return {"scores": scores, "extra": (scores.argmax(1), image.mean((2, 3)))}


class Offset(nets.Residual):
    def forward(self, image, offset):
        scores = super().forward(image)
        return [scores + offset, scores]


def test_keyword_inputs_in_any_order_and_nested_outputs(tmp_path):
    model = randomised(Several())
    inputs = {"scale": torch.ones(2, 1), "image": images(2), "offset": torch.randn(2, 4)}
    export_formats(model, inputs, tmp_path, ("onnx", "pt2"))
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert {value.name for value in graph.input} == set(inputs)
    assert [value.name for value in graph.output] == ["output_scores", "output_extra_0", "output_extra_1"]
    assert {value.type.tensor_type.shape.dim[0].dim_param for value in (*graph.input, *graph.output)} == {"batch"}
    with torch.no_grad():
        given = resize_batch(inputs, 4, 7)
        found = torch.export.load(tmp_path / "model.pt2").module()(**given)
        assert all(map(torch.equal, tree_leaves(found), tree_leaves(model(**given))))


def test_positional_inputs_and_several_outputs(tmp_path):
    made = export_formats(randomised(Offset()), (images(2), torch.ones(2, 5)), tmp_path, ("pt2", "script"))
    assert [entry.max_abs_error for entry in made] == [0, 0]


class Twins(nets.Residual):
    def forward(self, x):
        return super().forward(x).reshape(2, 5)


def test_one_batch_size_where_the_code_fixes_it(tmp_path):
    model = randomised(Twins())
    with pytest.raises(BadInput, match=r"cannot run a batch of 1 .*--batch N"):
        export_formats(model, images(), tmp_path / "a", ("pt2",))
    made = export_formats(model, images(), tmp_path / "b", ("onnx", "pt2", "script"), ExportSettings(2))
    assert [entry.batch_size for entry in made] == [2, 2, 2]
    (value,) = onnx.load(tmp_path / "b" / "model.onnx").graph.input
    assert value.type.tensor_type.shape.dim[0].dim_value == 2


def test_the_opset_is_the_one_asked_for_or_refused(base, tmp_path):
    (entry,) = export_formats(base, images(), tmp_path / "a", ("onnx",), ExportSettings(opset=21))
    assert entry.opset == onnx.load(tmp_path / "a" / "model.onnx").opset_import[0].version == 21
    for opset in (9, 99):
        with pytest.raises(BadInput, match=f"opset {opset}"):
            export_formats(base, images(), tmp_path / "b", ("onnx",), ExportSettings(opset=opset))
    with pytest.raises(BadInput, match="nothing is exported as onnx"):
        export_formats(base, images(), tmp_path / "b", ("pt2",), ExportSettings(opset=20))
    assert not (tmp_path / "b").exists()


def test_large_networks_have_their_tensors_beside_the_graph(base, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "LARGEST_FILE_BYTES", 1000)
    (entry,) = export_formats(base, images(), tmp_path, ("onnx",))
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"model.onnx", "model.onnx.data"}
    assert entry.file_bytes == sum(sizes.values())
    onnx.checker.check_model(tmp_path / "model.onnx")
    with folder.staged(tmp_path) as partial:
        (partial / "model.onnx").write_text("smaller")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


# ---------------------------------------------------------------- refusals


class OddAtOne(nets.Residual):
    def forward(self, x):
        y = super().forward(x)
        return y + 1 if x.shape[0] == 1 else y


class Looks(nets.Residual):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x.mean()


class Fixes(nets.Residual):
    def forward(self, x):
        return super().forward(x) if x.shape[0] < 3 else super().forward(x) + 0


class Number(nets.Residual):
    def forward(self, x):
        return super().forward(x), 3


class Nothing(nets.Residual):
    def forward(self, x):
        return 3


class NotANumber(nets.Residual):
    def forward(self, x):
        return super().forward(x) * float("nan")


REFUSED = [
    (OddAtOne, "pt2", RebuildMismatch, "off by 1 for a batch of 1"),
    (OddAtOne, "script", RebuildMismatch, "off by 1 for a batch of 1"),
    (Looks, "onnx", BadInput, "cannot be exported as pt2 and onnx .*data-dependent"),
    (Fixes, "pt2", BadInput, "--batch 1|cannot be exported as pt2"),
    (Number, "onnx", BadInput, "output holds 3, and an ONNX file gives tensors only"),
    (Nothing, "script", BadInput, "no tensor"),
    (NotANumber, "pt2", BadInput, "gives NaN"),
]


@pytest.mark.parametrize(
    ("make", "name", "kind", "sentence"), REFUSED, ids=lambda value: getattr(value, "__name__", "")
)
def test_what_cannot_be_exported_is_refused_in_one_sentence(tmp_path, make, name, kind, sentence, capfd):
    torch.manual_seed(0)
    with pytest.raises(kind, match=sentence) as refusal:
        export_formats(randomised(make()), images(), tmp_path / "out", (name,))
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().out == ""


def test_an_op_that_onnx_runtime_lacks_is_a_sentence(base, tmp_path):
    with pytest.raises(BadInput, match=r"cannot be exported as onnx .ONNX Runtime says"):
        export_formats(base.double(), images().double(), tmp_path / "out", ("onnx",))
    for error in (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        with pytest.raises(RuntimeError, match="onnx's checker says: odd"), onnx_file._raising_runtime_error():
            raise error("odd")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_before_any_work(saved, monkeypatch, missing):
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name == missing else object())
    monkeypatch.setattr(exporters, "open_pair", lambda *_: pytest.fail("opened"))
    with pytest.raises(BadInput, match=rf"needs {missing}, .*pip install 'archscan\[onnx\]'"):
        archscan.export(saved)


def test_arguments_that_say_nothing_are_refused(base, saved, tmp_path):
    for formats, sentence in (
        ((), "no export format"),
        (("tflite",), "'tflite'; choose from"),
        ("onnx", "pass a tuple"),
    ):
        with pytest.raises(BadInput, match=sentence):
            archscan.export(base, formats, example_input=images(), output=tmp_path)
    with pytest.raises(BadInput, match="needs example_input= and output="):
        archscan.export(base)
    with pytest.raises(BadInput, match="knows its input"):
        archscan.export(saved, example_input=images())
    with pytest.raises(BadInput, match="no tensor with a batch axis"):
        archscan.export(base, ("pt2",), example_input=torch.tensor(1.0), output=tmp_path)
    with pytest.raises(BadInput, match="there is no folder"):
        archscan.export(tmp_path / "nowhere", ("pt2",))
    with pytest.raises(BadInput, match="batch_size is 0"):
        ExportSettings(batch_size=0)


# ---------------------------------------------------------------- the checks can fail


def test_a_file_that_computes_something_else_is_refused(base):
    trials = make_trials(base, images(), (1, 3))
    right = {trial.batch_size: trial.outputs[0] for trial in trials}
    assert compare("f", lambda x: [right[len(x)]], trials).max_abs_error == 0
    agreement = compare("f", lambda x: [right[len(x)] * (1 + 5e-5)], trials)
    assert 0 < agreement.max_relative_error < 1e-4
    for spoil in (lambda y: y * 1.001, lambda y: y + float("nan"), lambda y: y[:, :-1], lambda y: y.flip(1)):
        with pytest.raises(RebuildMismatch, match=r"f (is off|gives outputs)"):
            compare("f", lambda x, spoil=spoil: [spoil(right[len(x)])], trials)
    with pytest.raises(RebuildMismatch, match="gives outputs"):
        compare("f", lambda x: [right[len(x)]] * 2, trials)


def test_a_file_with_dense_tensors_is_refused(base, tmp_path, monkeypatch):
    made = network.prepare(base, images(), ExportSettings())
    tensors = sum(tensor.numel() * 4 for tensor in base.state_dict().values())
    network.check_size(made, "f", tensors, 10)
    with pytest.raises(RebuildMismatch, match="takes 9,"):
        network.check_size(made, "f", 9_000_000, 10)
    with pytest.raises(RebuildMismatch, match=r"holds fc.weight with shape \(5, 9\)"):
        network.count_parameters(made, lambda name: (5, 9) if name == "fc.weight" else None, "f")
    monkeypatch.setattr(onnx_file, "_shapes", lambda _: {"fc.weight": (5, 8)})
    monkeypatch.setattr(torch.export, "export", lambda *_, _made=made.program, **__: pytest.fail("traced twice"))
    with pytest.raises(RebuildMismatch, match=r"lacks stem.weight, which the network reads"):
        onnx_file.write_onnx(made, tmp_path)


class Tied(nets.Residual):
    """A classifier under two names; the blocks are not used."""

    def __init__(self):
        super().__init__()
        self.again = nn.Linear(8, 5)
        self.again.weight = self.fc.weight

    def forward(self, x):
        x = self.stem(x).mean((2, 3))
        return self.fc(x) + self.again(x)


def test_a_parameter_under_two_names_counts_once(tmp_path):
    model = Tied()
    made = export_formats(randomised(model), images(), tmp_path, ("onnx", "pt2", "script"))
    everything = sum(parameter.numel() for parameter in model.parameters())
    read = sum(p.numel() for part in (model.stem, model.fc) for p in part.parameters()) + 5
    assert [entry.parameters for entry in made] == [read, everything, everything]


@given(batch=st.integers(1, 5), mean=st.floats(-3, 3), spread=st.floats(0.1, 3))
def test_drawn_batches_are_like_the_example(batch, mean, spread):
    example = {
        "x": torch.randn(2, 3, 40, 40) * spread + mean,
        "n": torch.tensor([3, 4]),
        "s": torch.tensor(2.0),
        "k": 1,
    }
    first, again = (resize_batch(example, batch, 5) for _ in range(2))
    assert all(np.array_equal(first[name], again[name]) for name in example)
    assert first["x"].shape == (batch, 3, 40, 40)
    assert abs(float(first["x"].mean()) - float(example["x"].mean())) < 0.1 * spread
    assert first["n"].tolist() == [3, 4, 3, 4, 3][:batch]
    assert (float(first["s"]), first["k"]) == (2.0, 1)


# ---------------------------------------------------------------- the command


def test_the_commands_formats_are_the_tables():
    assert tuple(exporters.FORMATS) == command.FORMATS
    assert [name for name, _ in exporters.FORMATS.values()] == list(FILES.values())
    assert {*FILES.values(), "architecture.txt"} < set(saving.EXPORTS)


def run(*arguments):
    command.run(command.make_parser().parse_args([str(argument) for argument in arguments]), "archscan export")


def test_the_command_prints_what_it_wrote(saved, capsys):
    run(saved, "--format", "pt2,script")
    printed = capsys.readouterr().out
    assert "model.pt2" in printed
    assert "model.ts.pt" in printed
    report = read_report(saved / "summary.json")
    assert f"{report.after.params:,}" in printed
    run(saved, "--format", "script", "--overwrite", "--json", "--batch", 2)
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["format"], entry["batch_size"]) == ("script", 2)
    run(saved, "--format", "script", "--overwrite", "--quiet", "--batch", "dynamic")
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("wrong", ["tflite", "", "onnx,,pt2", "ONNX"])
def test_the_command_refuses_unknown_formats(wrong):
    with pytest.raises(BadInput, match="is no export format"):
        command.make_parser().parse_args(["x", "--format", wrong])


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(exporters).failed == 0
    assert doctest.testmod(exporters).attempted > 0


def test_a_summary_with_impossible_images_is_refused(saved):
    report = read_report(saved / "summary.json")
    for shape in ((), (0, 28, 28), (3, 2**20, 2**20)):
        with pytest.raises(BadInput, match="cannot be"):
            folder.example_of(replace(report, input_shape=shape))
