"""The tutorial of the README is typed as it stands, and prints what it says, up to the machine's numbers."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from archscan.cli import main

README = Path(__file__).parent.parent / "README.md"
NUMBER = re.compile(r"\d[\d,.]*(e[-+]?\d+)?")


def tutorial():
    """Commands of the tutorial with the text that follows each."""
    section = README.read_text(encoding="utf-8").split("## From a timm model to ONNX Runtime")[1].split("\n## ")[0]
    blocks = re.findall(r"```console\n\$ (.*?)\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) == 4
    return [(shlex.split(command), printed) for command, printed in blocks]


def without_numbers(text):
    return NUMBER.sub("#", " ".join(text.split()))


def percents(text):
    return [float(number) for number in re.findall(r"([\d.]+)%", text)]


def test_the_tutorial_prints_what_the_readme_says(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    printed = []
    for command, expected in tutorial():
        if command[0] == "archscan":
            assert main(command[1:]) == 0
            found = capsys.readouterr().out
        else:
            assert command[0] == "python"
            found = subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, text=True).stdout
        assert without_numbers(found) == without_numbers(expected)
        printed.append((found, expected))
    (slim, said), (tuned, claimed), _, (shape, shape_said) = printed
    assert percents(slim)[0] <= 60.0
    assert percents(slim)[0] == pytest.approx(percents(said)[0], abs=0.2)
    assert percents(tuned)[-1] == pytest.approx(percents(claimed)[-1], abs=3.0)
    assert shape.split() == shape_said.split()
