"""Many processes slim as one does: the same statistics, the same plan, and one sentence when one of them ends."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from archscan.errors import BadInput
from archscan.processes import Place
from archscan.sharding import gather, turns

ROOT = Path(__file__).parent.parent

NET = """
import os, time, torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(12, 10)
        self.at = os.environ.get("FAULT", "")

    def forward(self, x):
        if self.at and len(x) > 1 and os.environ.get("RANK") == "1":
            if self.at == "die":
                os._exit(9)
            if self.at == "nan":
                x = x * float("nan")
            if self.at == "oops":
                from archscan.errors import InfeasibleBudget
                raise InfeasibleBudget("only here")
        return self.head(self.body(x).flatten(1))

def make():
    torch.manual_seed(0)
    return Net()
"""

DRIVER = """
import json, os, sys, traceback
import numpy as np
import torch
import sklearn.datasets
from archscan import cli, pipeline
from archscan.gates import collect
from archscan.groups import couple
from archscan.losses import sampled_label_loss
from archscan.processes import joined
from archscan.report import terminal, progress
from net import make

NEEDS = frozenset(("gradient", "sample_gradient", "fisher_gradient", "hessian_ones", "hessian_diagonal", "weight_norm",
                   "bn_scale", "group", "summed", "read_norm", "layer_inputs", "layer_gradients", "sharpness"))

def flat(found):
    for name in sorted(vars(found)):
        value = getattr(found, name)
        if name == "layer_inputs_L":
            for number, layer in enumerate(value):
                yield f"{name}.{number}.seen", np.array([layer.samples, layer.positions])
                for block in layer.blocks:
                    yield f"{name}.{number}.gram", block.gram_KK
                    yield f"{name}.{number}.sum", block.sum_K
                    yield f"{name}.{number}.weight", block.weight_OK
        elif name == "layer_gradients_L":
            yield from ((f"{name}.{number}", each) for number, each in enumerate(value))
        else:
            yield name, np.asarray(value)

def statistics(output):
    model = make()
    coupling = couple(model.eval(), torch.zeros(1, 3, 8, 8))
    images = torch.randn(11, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with joined(torch.device("cpu")) as place:
        for size in (3, 6):  # 4 batches, and 2, which are fewer than there may be processes
            batches = [(part, None) for part in images.split(size)]
            loss_fn = sampled_label_loss(3)
            for again in range(2):
                found = collect(model, coupling, iter(batches), loss_fn, NEEDS, seed=5, diagonal_probes=2, place=place)
            np.savez(f"{output}.{size}.{place.rank}.npz", **dict(flat(found)))
    return 0

def child(run, rank):
    os.environ.update(run["environment"], RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(run["count"]))
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    code = 1
    try:
        first, *others = run["arguments"]
        code = statistics(*others) if first == "statistics" else cli.main(run["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

for line in sys.stdin:
    run = json.loads(line)
    os.chdir(run["folder"])
    children = [os.fork() or child(run, rank) for rank in range(run["count"])]
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]), flush=True)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run a command line in many processes: forks of one that has imported everything, which takes most of the time."""
    folder = tmp_path_factory.mktemp("nets")
    (folder / "net.py").write_text(NET)
    paths = os.pathsep.join((str(ROOT), str(folder)))
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(count, arguments, cwd, **environment):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
        (cwd / "net.py").write_text(NET)
        asked = {"count": count, "arguments": arguments, "folder": str(cwd), "environment": environment}
        driver.stdin.write(json.dumps(asked) + "\n")
        driver.stdin.flush()
        codes = json.loads(driver.stdout.readline())
        return codes, [tuple((cwd / f"{name}.{rank}").read_text() for name in ("out", "err")) for rank in range(count)]

    with driver:
        yield run
        driver.stdin.close()


SLIM = ("net.py:make", "--input-size", "12", "--target-flops", "0.5", "--device", "cpu")
DIGITS = ("--data", "digits", "--samples", "44", "--batch-size", "12")
BY_OBD = (*SLIM, *DIGITS, "--criterion", "obd", "--recover", "bn", "--rounds", "2", "--quiet")
BY_OBC = (*SLIM, *DIGITS, "--criterion", "obc", "--recover", "bn", "--quiet")


def test_statistics_are_those_of_one_process(runs, tmp_path):
    for count in (1, 2, 4):
        codes, outputs = runs(count, ("statistics", f"of{count}"), tmp_path)
        assert not any(codes), outputs
    for size in (3, 6):
        alone = np.load(tmp_path / f"of1.{size}.0.npz")
        for count in (2, 4):
            found = [np.load(tmp_path / f"of{count}.{size}.{rank}.npz") for rank in range(count)]
            for name in alone.files:
                for each in found:
                    np.testing.assert_array_equal(each[name], found[0][name], err_msg=name)  # all have the same
                near = 1e-12 if name.startswith("layer_") else 0  # sums of moments differ in their order
                np.testing.assert_allclose(found[0][name], alone[name], rtol=near, atol=near, err_msg=name)
    for name in ("sample_gradient_NU", "fisher_gradient_NU"):  # the labels drawn follow the sample, not the batch
        whole, parts = (np.load(tmp_path / f"of2.{size}.0.npz")[name] for size in (6, 3))
        np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-6)


def plans(runs, folder, arguments, counts):
    for count in counts:
        codes, outputs = runs(count, (*arguments, "--output", str(count)), folder)
        assert not any(codes), outputs
        assert "was slimmed" in outputs[0][0]
        assert [output for output in outputs[1:] if any(output)] == []
    folders = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__")
    assert folders == [str(count) for count in counts]
    return [(folder / name / "plan.json").read_text() for name in folders]


def test_the_plan_does_not_depend_on_the_number_of_processes(runs, tmp_path):
    first, *others = plans(runs, tmp_path, BY_OBD, (1, 2, 4))
    assert others == [first, first]


def test_the_plan_from_moments_keeps_the_same_channels(runs, tmp_path):
    kept = [json.loads(text)["history"][-1]["plan"]["kept"] for text in plans(runs, tmp_path, BY_OBC, (1, 4))]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("fault", "code", "sentence"),
    [
        ("die", 9, "another process of this run ended or cannot be reached"),
        ("nan", 2, "calibration batch 2"),
        ("oops", 2, "process 1 of this run: only here"),
    ],
)
def test_a_process_that_fails_ends_all_with_one_sentence(runs, tmp_path, fault, code, sentence):
    codes, outputs = runs(2, (*BY_OBD, "--output", "slim"), tmp_path, FAULT=fault)
    assert codes == [2, code]
    assert outputs[0][0] == ""
    assert outputs[0][1].startswith("archscan: ")
    assert outputs[0][1].count("\n") == 1
    assert sentence in outputs[0][1]
    assert outputs[1] == ("", "")
    assert not [path for path in tmp_path.iterdir() if "slim" in path.name]


def test_what_all_processes_refuse_is_said_once(runs, tmp_path):
    (tmp_path / "here").mkdir()
    for arguments in (SLIM[:3], (*BY_OBD, "--output", "here")):
        codes, outputs = runs(2, arguments, tmp_path)
        assert codes == [2, 2]
        assert outputs[0][1].count("\n") == 1
        assert outputs[1] == ("", "")


def test_processes_train_together_between_rounds(runs, tmp_path):
    training = ("lenet5", "--weights", "random", *DIGITS, "--target-flops", "0.5", "--rounds", "2", "--device", "cpu")
    training += ("--finetune-epochs", "1", "--finetune-samples", "96", "--criterion", "obd", "--json")
    for count in (1, 2):
        codes, outputs = runs(count, (*training, "--output", str(count)), tmp_path)
        assert not any(codes), outputs
        assert outputs[1:] == [("", "")] * (count - 1)
        history = json.loads(outputs[0][0])["history"]
        assert [(run["round"], run["processes"]) for run in history] == [(1, count), (2, count)]
    codes, outputs = runs(2, (*training[:-1], "--output", "out", "--num-classes", "7"), tmp_path)
    assert codes == [2, 2]
    assert outputs[0][1].count("\n") == 1
    assert "it cannot learn them" in outputs[0][1]
    assert not (tmp_path / "out").exists()


def test_other_commands_are_done_by_the_first_process(runs, tmp_path):
    codes, outputs = runs(2, ("criteria", "--json"), tmp_path)
    assert codes == [0, 0]
    assert json.loads(outputs[0][0])
    assert outputs[1] == ("", "")


# ---------------------------------------------------------------- without processes


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_turns_are_all_batches_once_and_draws_follow_the_sample(count):
    batches = [torch.zeros(size, 1) for size in (3, 1, 4, 2)]
    whole = torch.rand(10, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    seen, seeds = [], set()
    for rank in range(count):
        own = list(turns(iter(batches), Place(torch.device("cpu"), rank, count)))
        assert own  # a process without a batch follows the first
        assert all(turn.counts for turn in own) == (rank < len(batches))
        for turn in own:
            drawn = torch.rand(len(turn.batch), 1, dtype=torch.float64, generator=turn.draw(7))
            assert torch.equal(drawn, whole[turn.first_sample : turn.first_sample + len(turn.batch)])
            seeds.add(turn.seed(7))
            seen += [turn.number] * turn.counts
    assert sorted(seen) == [1, 2, 3, 4]
    assert len(seeds) == 4


def test_the_first_refused_batch_is_the_one_that_all_hear_of():
    class Three(Place):
        def share(self, value):
            mine, _ = value
            return [(mine, None), ([1, 4], BadInput("batch 8")), ([2, 5], None)]

    with pytest.raises(BadInput, match="batch 8"):
        gather(lambda turn: turn.number, [], Three(torch.device("cpu"), 0, 3))
