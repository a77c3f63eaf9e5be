"""The classical problems: what they are, and that surgeons do on them what made them known."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from archscan.criteria import obs

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(obs, "UPDATE_DAMPENING", obs.DAMPENING)
    return importlib.import_module("classic_problems")


def test_the_jacobian_is_that_of_finite_differences(problems: ModuleType) -> None:
    task = problems.monk(1, seed=0)
    network = problems.fresh(task, 0, 1.0)
    found = network.jacobian(task.inputs_NI)
    assert found.shape == (124, 58)
    for weight in range(0, 58, 5):
        step = 1e-6 * (np.arange(58) == weight)
        above, below = (problems.Perceptron(3, network.weight_W + s, network.left_W) for s in (step, -step))
        expected = (above.outputs(task.inputs_NI) - below.outputs(task.inputs_NI)) / 2e-6
        np.testing.assert_allclose(found[:, weight], expected, atol=1e-8)


def test_the_monks_rules_hold_for_as_many_vectors_as_in_the_literature(problems: ModuleType) -> None:
    for problem, positive in ((1, 216), (2, 142), (3, 228)):
        task = problems.monk(problem, seed=3)
        assert task.all_inputs_NI.shape == (432, 17)
        assert task.all_targets_N.sum() == positive
        assert len(problems.fresh(task, 0, 1.0).weight_W) == (58, 39, 39)[problem - 1]
        chosen = [np.flatnonzero((task.all_inputs_NI == row).all(1)).item() for row in task.inputs_NI]
        assert len(set(chosen)) == len(chosen) == (124, 169, 122)[problem - 1]
        assert (task.all_targets_N[chosen] != task.targets_N).sum() == (0, 0, 6)[problem - 1]


def test_training_ends_where_the_penalised_error_is_flat(problems: ModuleType) -> None:
    task, decay = problems.xor(), 1e-3
    network = problems.fresh(task, 2, 1.0).trained(task, decay)
    error_N = network.outputs(task.inputs_NI) - task.targets_N
    slope_W = network.jacobian(task.inputs_NI).T @ error_N / 4 + decay * network.weight_W
    np.testing.assert_allclose(slope_W, 0, atol=2e-5)


def test_only_surgery_keeps_a_trained_xor_network_working(problems: ModuleType) -> None:
    task, solved, kept = problems.xor(), 0, {"obs": 0, "obd": 0, "magnitude": 0}
    for seed in range(12):
        network = problems.fresh(task, seed, 1.0).trained(task, 1e-4)
        if network.accuracy(task) < 1:
            continue
        solved += 1
        for method in kept:
            weight = int(network.scores(task, method).argmin())
            kept[method] += network.without(weight, task, method).accuracy(task) == 1
    assert solved >= 5
    assert kept["obs"] == solved
    assert max(kept["obd"], kept["magnitude"]) < solved / 2


def test_surgery_takes_more_out_of_a_monk_than_damage_does(problems: ModuleType) -> None:
    task = problems.monk(2, seed=0)
    network = problems.fresh(task, 0, 0.5).trained(task, 1e-3, 400)
    assert network.accuracy(task) == 1
    left = {m: problems.pruned(network, task, m, 1e-3, retrain=False) for m in ("obs", "obd", "magnitude")}
    assert all(smaller.accuracy(task) == 1 for smaller in left.values())
    assert not left["obs"].weight_W[~left["obs"].left_W].any()
    assert left["obs"].left_W.sum() < 0.7 * min(left["obd"].left_W.sum(), left["magnitude"].left_W.sum())


def test_the_script_writes_its_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "classics"
    tiny = ("--seeds", "1", "--lenet-seeds", "0", "--output", str(output))
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
    command = [sys.executable, str(SCRIPTS / "reproduce_classics.py"), *tiny]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "classics.json").read_text(encoding="utf-8"))
    page = (tmp_path / "classics.md").read_text(encoding="utf-8")
    assert len(data["monks"]) == 3 * 3 * 2
    assert "| MONK 3, obs, retrained |" in page
    assert {file.name for file in (tmp_path / "images").iterdir()} == {"classics-xor.svg", "classics-monks.svg"}
