"""Command line: arguments → options, exit codes, and what goes to which stream; the pipeline is a stand-in."""

import argparse
import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archscan import cli
from archscan.commands import audit, compare, criteria, evaluate, export, finetune, scan, show, slim, sweep, widen
from archscan.commands import list as list_networks
from archscan.errors import BadInput, InfeasibleBudget, RebuildMismatch
from archscan.options import (
    BudgetOptions,
    DataOptions,
    EvaluateOptions,
    ModelOptions,
    OutputOptions,
    RunOptions,
    ScanOptions,
    SlimOptions,
)
from archscan.report.model import (
    Accuracy,
    CostTotals,
    Evaluation,
    GroupRow,
    KeepRatio,
    Report,
    Saved,
    Target,
    Verification,
    Weights,
)

ROOT = Path(__file__).parents[1]

REPORT = Report(
    archscan="0.1.0",
    command="slim",
    model="lenet5",
    input_shape=(1, 1, 28, 28),
    weights=Weights("random"),
    data=None,
    criterion="obd",
    seed=0,
    target=Target("macs", 0.6),
    before=CostTotals(416_520, 61_706, 6_508),
    after=CostTotals(240_000, 30_000, 5_000),
    keep_ratio=KeepRatio(240_000 / 416_520, 30_000 / 61_706),
    verification=Verification(True, "", 1e-7, 1e-4, True),
    accuracy=None,
    recovery=None,
    groups=(GroupRow("conv1", 6, 4, False, "", ("conv1", "conv2"), 0.9, 0.1, 0),),
    bottlenecks=(),
    modules=(),
    saliency_lost=None,
)
SCAN = replace(REPORT, command="scan", target=None, after=None, keep_ratio=None, verification=None)


@pytest.fixture
def calls(monkeypatch):
    """A pipeline that records what it was asked for."""
    asked = []

    def answer(result):
        def command(*given):
            asked.append(given[0])
            return result

        return command

    pipeline = types.ModuleType("archscan.pipeline")
    pipeline.slim_command = answer(Saved(REPORT, Path("reports/lenet5-flops0.6")))
    pipeline.scan_command = answer(SCAN)
    pipeline.list_command = answer(["lenet5", "resnet50"])
    pipeline.show_command = answer(REPORT)
    pipeline.evaluate_command = answer(Evaluation("lenet5", "out", Accuracy(0.9, 0.8, 100)))
    monkeypatch.setitem(sys.modules, "archscan.pipeline", pipeline)
    monkeypatch.setattr(sys.modules["archscan"], "pipeline", pipeline, raising=False)
    return asked


def failing(error):
    def command(*given):
        raise error

    return command


# ---------------------------------------------------------------- the contract


def options_of(parser):
    return {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}


def test_the_list_of_options_is_frozen():
    assert options_of(slim.make_parser()) == {
        *("--target-latency", "--target-memory", "--latency", "--latency-batch", "--channels-last", "--lossless"),
        *("--target-flops", "--target-params", "--round-to", "--min-width", "--protect", "--criterion", "--recover"),
        *("--weights", "--input-size", "--num-classes", "--data", "--samples", "--eval-data", "--batch-size"),
        *(
            "--mean",
            "--std",
            "--device",
            "--threads",
            "--seed",
            "--output",
            "--overwrite",
            "--json",
            "--quiet",
            "--version",
            "--rounds",
            "--set-effects",
            "--finetune-epochs",
            "--finetune-samples",
            "--export",
        ),
    }
    printing = {"--json", "--quiet"}
    assert options_of(scan.make_parser()) == {"--input-size", "--num-classes", "--protect", *printing}
    assert options_of(list_networks.make_parser()) == set()
    assert options_of(show.make_parser()) == {"--findings", *printing}
    running = {"--data", "--samples", "--batch-size", "--device", "--threads"}
    assert options_of(evaluate.make_parser()) == running | printing
    assert options_of(audit.make_parser()) == {
        *("--weights", "--input-size", "--num-classes", "--data", "--samples", "--held-out", "--eval-data"),
        *("--batch-size", "--mean", "--std", "--criterion", "--units", "--sets", "--device", "--threads", "--seed"),
        *("--output", "--overwrite", *printing),
    }
    assert options_of(criteria.make_parser()) == {"--json"}
    assert options_of(widen.make_parser()) == running | printing | {
        *("--weights", "--input-size", "--num-classes", "--factor", "--keep-flops", "--find-at", "--only", "--protect"),
        *("--round-to", "--min-width", "--eval-data", "--mean", "--std", "--criterion", "--recover", "--seed"),
        *("--output", "--overwrite", "--export"),
    }
    written = {"--format", "--batch", "--opset", "--output", "--overwrite"}
    assert options_of(export.make_parser()) == written | printing
    training = {"--epochs", "--lr", "--opt", "--weight-decay", "--smoothing", "--mixup", "--cutmix", "--hflip", "--ema"}
    assert options_of(finetune.make_parser()) == running | training | printing | {
        *("--eval-data", "--teacher", "--distill-weight", "--temperature", "--amp", "--workers", "--seed", "--resume"),
        *("--output", "--overwrite", "--export"),
    }
    assert options_of(compare.make_parser()) == {"--output", "--overwrite", *printing}
    targets = {"--target-flops", "--target-params", "--target-latency", "--target-memory", "--lossless", "--version"}
    assert options_of(sweep.make_parser()) == options_of(slim.make_parser()) - targets | {"--targets", "--of"}
    commands = "scan list show evaluate export finetune audit criteria widen compare sweep"
    assert set(cli.COMMANDS) == set(commands.split())


@pytest.mark.parametrize("command", [[], *([name] for name in sorted(cli.COMMANDS))])
def test_help_fits_80_columns_and_exits_0(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([*command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    assert max(map(len, lines)) <= 80


def test_help_imports_nothing_heavy():
    program = """
import sys, types
package = types.ModuleType("archscan")
package.__path__ = ["archscan"]
sys.modules["archscan"] = package
from archscan import cli
assert cli.main(["--help"]) == 0 and cli.main(["x", "--target-flops", "7"]) == 2 and cli.main(["--version"]) == 0
heavy = {"torch", "numpy", "rich", "jinja2", "timm"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)


# ---------------------------------------------------------------- options


def test_defaults(calls):
    assert cli.main(["resnet50", "--target-flops", "0.6"]) == 0
    assert calls == [
        SlimOptions(
            ModelOptions("resnet50"), BudgetOptions("macs", 0.6), command_line="archscan resnet50 --target-flops 0.6"
        )
    ]


EVERY_OPTION = """
--target-params 0.5 timm:scan --criterion obd --recover none --weights w.safetensors --data d.zip --samples 64
--eval-data digits --input-size 160,192 --num-classes 10 --batch-size 8 --mean=0.1,0.2,0.3 --std 1,2,3 --round-to 4
--min-width 16 --protect a.* b --protect c --device cpu --threads 2 --seed 7 --output out --overwrite --quiet
--rounds 3 --set-effects quadratic --export onnx,pt2 --target-latency 0.9 --latency-batch 4 --channels-last
--finetune-epochs 2 --finetune-samples 500
"""


def test_every_option_arrives(calls):
    typed = EVERY_OPTION.split()
    assert cli.main(typed) == 0
    assert calls == [
        SlimOptions(
            ModelOptions("timm:scan", "w.safetensors", (160, 192), 10),
            BudgetOptions("params", 0.5, 4, 16, ("a.*", "b", "c"), (("latency", 0.9),)),
            DataOptions("d.zip", 64, "digits", 8, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)),
            RunOptions("cpu", 2, 7),
            OutputOptions(Path("out"), overwrite=True, quiet=True),
            "obd",
            "none",
            3,
            "quadratic",
            ("onnx", "pt2"),
            "archscan " + " ".join(word if word != "a.*" else "'a.*'" for word in typed),
            latency_batch=4,
            channels_last=True,
            finetune_epochs=2,
            finetune_samples=500,
        )
    ]


def test_round_to_auto_and_square_input(calls):
    cli.main(["x", "--target-flops", "1", "--round-to", "auto", "--input-size", "32"])
    assert calls[0].budget.round_to is None
    assert calls[0].model.input_size == (32, 32)


def test_the_other_commands(calls):
    assert cli.main(["scan", "vgg16", "--protect", "a"]) == 0
    assert cli.main(["list", "res*"]) == 0
    assert cli.main(["list"]) == 0
    assert cli.main(["show", "out"]) == 0
    assert cli.main(["evaluate", "out", "--data", "digits", "--json"]) == 0
    assert calls == [
        ScanOptions(ModelOptions("vgg16", "random"), ("a",), command_line="archscan scan vgg16 --protect a"),
        "res*",
        None,
        Path("out"),
        EvaluateOptions(
            Path("out"),
            "digits",
            output=OutputOptions(json=True),
            command_line="archscan evaluate out --data digits --json",
        ),
    ]


@given(st.floats(0, 1, exclude_min=True))
def test_any_kept_fraction_is_taken(ratio):
    parsed = slim.make_parser().parse_args(["x", f"--target-flops={ratio!r}"])
    assert slim.read_options(parsed, "").budget == BudgetOptions("macs", ratio)


@given(st.one_of(st.floats(max_value=0), st.floats(min_value=1, exclude_min=True), st.just(float("nan"))))
def test_no_other_ratio_is_taken(ratio):
    with pytest.raises(BadInput, match="--target-params"):
        slim.make_parser().parse_args(["x", f"--target-params={ratio!r}"])


# ---------------------------------------------------------------- refusals

REFUSED = {
    "": "required: MODEL",
    "x": "archscan scan x",
    "x --target-flops 0.5 --latency-batch 4": "no effect",
    "x --target-flops 0.5 --channels-last": "no effect",
    "x --target-flops 0": "above 0",
    "x --target-flops -0.5": "above 0",
    "x --target-flops 1.01": "at most 1",
    "x --target-flops 60": "60% is written 0.6",
    "x --target-flops many": "'many' is not a number",
    "x --target-flops 0.5 --samples 0": "at least 1",
    "x --target-flops 0.5 --batch-size 1.5": "whole number",
    "x --target-flops 0.5 --seed -1": "whole number",
    "x --target-flops 0.5 --threads ²": "whole number",
    "x --target-flops 0.5 --round-to big": "whole number",
    "x --target-flops 0.5 --input-size 1,2,3": "neither",
    "x --target-flops 0.5 --input-size 32x48": "written with a comma: 32,48",
    "x --target-flops 0.5 --input-size -1": "whole number",
    "x --target-flops 60%": "write it as a fraction, 0.6",
    "x --target-flops many%": "'many' is not a number",
    "x --flops 0.5": "did you mean --target-flops?",
    "x --target-flops 0.5 --mean 0.1,": "not a number",
    "x --target-flops 0.5 --std 0.1,0": "above 0",
    "x --target-flops 0.5 --device tpu": "invalid choice",
    "x --target-flops 0.5 --recover all": "invalid choice",
    "x --target-flops 0.5 --json --quiet": "not allowed with",
    "x --target-flop 0.5": "did you mean --target-flops or",
    "sacn x": "'sacn' is not a command; did you mean archscan scan?",
    "slim x --target-flops 0.5": "leave out 'slim': archscan x --target-flops 0.5",
    "x y": "'x' is not a command; archscan --help lists them",
    "--json scan x": "archscan scan",
    "scan": "required: MODEL",
    "scan x --target-flops 0.5": "unrecognized",
    "show": "required: DIR",
    "evaluate out": "required: --data",
    "list a b": "unrecognized",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_bad_arguments_are_refused_in_one_line(typed, calls, capsys):
    assert cli.main(typed.split()) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert REFUSED[typed] in streams.err
    assert streams.err.startswith("archscan: ")
    assert streams.err.count("\n") == 1
    assert calls == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadInput("No."), 2),
        (InfeasibleBudget("No."), 2),
        (RebuildMismatch("No."), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(error, code, calls, capsys):
    sys.modules["archscan.pipeline"].slim_command = failing(error)
    assert cli.main(["x", "--target-flops", "0.5"]) == code
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err == ("archscan: interrupted\n" if code == 130 else "archscan: No.\n")


def test_other_exceptions_are_bugs_and_not_hidden(calls):
    sys.modules["archscan.pipeline"].slim_command = failing(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["x", "--target-flops", "0.5"])


# ---------------------------------------------------------------- output


@pytest.mark.parametrize("command", ["x --target-flops 0.5", "scan x", "show out"])
def test_json_prints_the_summary_and_nothing_else(command, calls, capsys):
    assert cli.main([*command.split(), "--json"]) == 0
    streams = capsys.readouterr()
    assert json.loads(streams.out) == (SCAN if "scan" in command else REPORT).to_json()
    assert streams.err == ""


def test_quiet_prints_one_line(calls, capsys):
    assert cli.main(["x", "--target-flops", "0.5", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "57.6% of its MACs" in out
    assert "[random weights]" in out


def test_list_prints_names_line_by_line(calls, capsys):
    assert cli.main(["list"]) == 0
    assert capsys.readouterr().out == "lenet5\nresnet50\n"


def test_the_summary_names_the_saved_folder(calls, capsys):
    assert cli.main(["x", "--target-flops", "0.5"]) == 0
    assert "archscan evaluate reports/lenet5-flops0.6 --data DIR" in capsys.readouterr().out


PIPED = """
import sys, types
pipeline = types.ModuleType("archscan.pipeline")
pipeline.list_command = lambda pattern: ["name"] * 200_000
sys.modules["archscan.pipeline"] = pipeline
import archscan
archscan.pipeline = pipeline
from archscan.cli import main
sys.exit(main(["list"]))
"""


def test_a_closed_pipe_is_no_error():
    read, write = os.pipe()
    with subprocess.Popen([sys.executable, "-c", PIPED], cwd=ROOT, stdout=write, stderr=subprocess.PIPE) as process:
        os.close(write)
        assert os.read(read, 5) == b"name\n"
        os.close(read)
        _, errors = process.communicate(timeout=60)
    assert errors == b""
    assert process.returncode == 0


def test_parsers_keep_no_state():
    first, second = (slim.make_parser().parse_args(["x", "--protect", "a"]) for _ in range(2))
    assert first == second == argparse.Namespace(**vars(first))
    assert second.protect == ["a"]
