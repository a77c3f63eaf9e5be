"""The benchmark scripts on tiny settings: they run to the end, and what they write adds up."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from archscan.sources import open_subject

pytest.importorskip("torch_pruning")

SCRIPTS = Path(__file__).parent.parent / "scripts"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""What the scripts ask for; with it they need not start themselves anew."""


def run(name: str, *arguments: str, output: Path) -> tuple[dict, str]:
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *arguments, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 0, done.stderr
    markdown = output.with_name(f"{output.name}.md").read_text(encoding="utf-8")
    data = json.loads(output.with_name(f"{output.name}.json").read_text(encoding="utf-8"))
    assert data["versions"]["torch-pruning"]
    assert f"python {name}.py" in data["command"].replace(f"{SCRIPTS.as_posix()}/", "").replace("scripts/", "")
    return data, markdown


def folder_of_data(folder: Path) -> Path:
    """Write ten classes of noise and random weights under the names that the benchmark reads."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        with zipfile.ZipFile(folder / f"cifar10-{split}.zip", "w") as archive:
            for number in range(40):
                image = folder / "image.png"
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(image)
                archive.write(image, f"class{number % 10}/{number}.png")
    subject = open_subject("reference:resnet20_cifar", weights="random")
    save_file(subject.model.state_dict(), folder / "resnet20_cifar10.safetensors")
    return folder


def test_trace(tmp_path: Path) -> None:
    arguments = ("--networks", "reference:resnet20_cifar", "--repeats", "1", "--scaling", "8", "14")
    data, markdown = run("bench_trace", *arguments, output=tmp_path / "trace")
    (row,) = data["networks"]
    assert row["ratio"] == row["archscan_s"] / row["peer_s"]
    assert row["archscan_groups"] > 9
    assert row["peer_groups"] > 9
    assert [entry["layers"] for entry in data["scaling"]] == [8, 14]
    assert "| reference:resnet20_cifar |" in markdown


def test_score(tmp_path: Path) -> None:
    tiny = ("--network", "reference:resnet20_cifar", "--input-size", "32", "--batch-size", "2", "--batches", "1")
    arguments = (*tiny, "--repeats", "1", "--rows", "obd,Torch-Pruning Hessian")
    data, markdown = run("bench_score", *arguments, output=tmp_path / "score")
    names = [row["name"] for row in data["rows"]]
    assert names == ["forward + backward, eval mode", "forward + backward, train mode", "obd", "Torch-Pruning Hessian"]
    assert all(row["peak_mib"] >= row["before_mib"] > 0 for row in data["rows"])
    assert "| obd |" in markdown


def test_accuracy(tmp_path: Path) -> None:
    data_folder = folder_of_data(tmp_path)
    counts = ("--samples", "20", "--recalibration-samples", "20", "--batch-size", "10", "--eval-samples", "20")
    peers = "l2/kept/one-shot,l2/conv/iterative"
    arguments = ("--networks", "resnet20_cifar", "--data", str(data_folder), *counts, "--ratios", "0.9", "--seeds", "0")
    methods = ("--methods", "default,magnitude", "--peers", peers)
    data, markdown = run("bench_accuracy", *arguments, *methods, output=tmp_path / "accuracy")
    assert {(point["side"], point["method"]) for point in data["points"]} == {
        *(("archscan", method) for method in ("default", "magnitude")),
        *(("torch-pruning", peer) for peer in peers.split(",")),
    }
    repairs = {"default": {"blocks"}, "magnitude": {"none", "bn", "bias", "ls", "blocks"}}
    for point in data["points"]:
        assert point["failure"] is None
        assert point["ratio"] - 0.05 < point["macs"] <= point["ratio"]
        assert point["accuracy"].keys() == repairs.get(point["method"], {"none", "bn"})
        assert all(0 <= accuracy <= 1 for accuracy in point["accuracy"].values())
    assert "| magnitude | least squares |" in markdown
    assert "| magnitude | least squares, then block by block |" in markdown
    assert (tmp_path / "accuracy-resnet20_cifar.svg").exists()

    cached = tmp_path / "accuracy" / "cache.jsonl"
    before = cached.read_text(encoding="utf-8")
    again, _ = run("bench_accuracy", *arguments, *methods, "--resume", output=tmp_path / "accuracy")
    assert again["points"] == data["points"]
    assert cached.read_text(encoding="utf-8") == before


def test_points_of_another_setting_are_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    benchmarking, report = (importlib.import_module(name) for name in ("benchmarking", "accuracy_report"))

    def cache(setting: dict, *, resume: bool = True):
        return benchmarking.Cache(tmp_path / "cache.jsonl", setting, lambda entry: report.Point(**entry), resume=resume)

    first, second = (report.Point("net", "archscan", name, 0.5, 0, 0.49, {"none": 0.8}) for name in ("obd", "random"))
    cache({"samples": 1}).put(first)
    cache({"samples": 2}).put(second)
    assert cache({"samples": 1}).points == {first.key: first}
    assert cache({"samples": 2}).points == {second.key: second}
    assert cache({"samples": 2}, resume=False).points == {}
    assert cache({"samples": 1}).points == {}


def test_a_padded_shortcut_as_a_convolution_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.syspath_prepend(str(SCRIPTS))
    peer = importlib.import_module("torch_pruning_peer")
    subject = open_subject("reference:resnet20_cifar", weights="random")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(peer.prepared(subject.model, "conv")(images), subject.model(images))
    assert len(list(peer.prepared(subject.model, "conv").modules())) == len(list(subject.model.modules()))


def test_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSCAN_CACHE", str(tmp_path / "cache"))
    tiny = ("--networks", "reference:resnet20_cifar", "--input-size", "16", "--batches", "1", "--repeats", "2")
    data, markdown = run("bench_latency", *tiny, "--ratio", "0.8", "--runtimes", "eager", output=tmp_path / "latency")
    assert all("Torch-Pruning" in where for where in data["failures"])  # it cannot prune padded shortcuts
    assert {point["variant"] for point in data["points"]} >= {"dense", "archscan, MACs", "archscan, time"}
    assert all(point["ratio"] == 1 for point in data["points"] if point["variant"] == "dense")
    assert all(point["macs"] <= 0.8 for point in data["points"] if "MACs" in point["variant"])
    assert "## eager" in markdown
