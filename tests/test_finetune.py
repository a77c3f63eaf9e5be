"""Fine-tuning: what is learned, that a killed run loses nothing, that many processes are one, and what is refused."""

# ruff: noqa: NPY002 - timm draws from the global generator, which must be left alone

import doctest
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

import archscan
from archscan import saving, training
from archscan.errors import BadInput
from archscan.processes import Place
from archscan.report.training import EpochRow, Moment
from archscan.saving import distinct_tensors
from archscan.sources import Preprocessing
from archscan.training import TrainSettings, train
from archscan.training.checkpoints import (
    Checkpoint,
    pack_optimizer,
    read_checkpoint,
    unpack_optimizer,
    write_checkpoint,
)
from archscan.training.distillation import distillation_loss
from archscan.training.images import open_epochs, seeded_everywhere
from archscan.training.settings import choose, choose_batch_size
from archscan.training.trainer import Job, Teacher, run

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALL = Preprocessing((16, 16), (0.5,), (0.5,))


class Tiny(nn.Module):
    """Everything that has a state: BatchNorm, dropout, and a buffer that no state dict holds."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(4 * 7 * 7, 10)
        self.register_buffer("scale", torch.tensor(1.0), persistent=False)

    def forward(self, x):
        return self.head(self.drop(torch.relu(self.norm(self.conv(x))).flatten(1))) * self.scale


def tiny(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tiny().eval()


def equal(a, b):
    first, second = distinct_tensors(a), distinct_tensors(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job(teacher=None, **kwargs):
    asked = TrainSettings(**{"epochs": 3, "samples": 64, "batch_size": 32, **kwargs})
    images = open_epochs("digits", SMALL, asked, Place(CPU))
    return Job(tiny(), images, asked, Teacher(teacher, "none" if teacher is None else "given"), None, Place(CPU))


# ---------------------------------------------------------------- loss and settings


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_loss_is_the_formula(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    labels, weight = torch.tensor([0, 3, 6, 1, 1]), 0.7
    hard = soft = 0.0
    for s, t, label in zip(student.detach().double(), teacher.double(), labels, strict=True):
        hard -= math.log(math.exp(s[label]) / sum(math.exp(v) for v in s)) / 5
        p, q = ([math.exp(v / temperature) for v in values] for values in (t, s))
        p, q = ([v / sum(values) for v in values] for values in (p, q))
        soft += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 5
    found = distillation_loss(student, labels, teacher, weight, temperature, 0.0)
    assert found.item() == pytest.approx((1 - weight) * hard + weight * temperature**2 * soft, rel=1e-5)
    assert distillation_loss(student, labels, None, weight, temperature, 0.0).item() == pytest.approx(hard, rel=1e-5)
    found.backward()
    assert student.grad.abs().sum() > 0


@given(
    images=st.integers(64, 2_000_000),
    processes=st.integers(1, 8),
    side=st.sampled_from([28, 32, 224]),
    mixup=st.sampled_from([0.0, 0.2]),
)
def test_defaults_fit_any_size_of_data(images, processes, side, mixup):
    asked = TrainSettings(mixup=mixup)
    batch = choose_batch_size(asked, images, side, processes)
    chosen = choose(asked, images, batch, side, has_batchnorm=True)
    assert batch % processes == 0
    assert batch // processes >= 2
    assert batch <= images
    assert not mixup or batch // processes % 2 == 0
    assert chosen.steps == images // batch
    assert chosen.warmup_steps <= chosen.steps
    assert 10 <= chosen.epochs <= 50
    assert 0 < chosen.lr <= 0.04


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"lr": 0.0}, "trains nothing"),
        ({"lr": math.nan}, "lr is nan"),
        ({"mixup": -1.0}, "mixup"),
        ({"distill_weight": 1.5}, "from 0 to 1"),
        ({"workers": 1.5}, "whole"),
        ({"batch_size": 200, "samples": 100}, "more than the 100 images"),
        ({"batch_size": 1}, "BatchNorm needs two"),
        ({"batch_size": 31, "mixup": 0.2}, "even"),
        ({"optimizer": "nonsense"}, "nonsense"),
        ({"lr": 1e30, "optimizer": "sgd"}, "smaller --lr"),
    ],
)
def test_impossible_settings_are_refused(change, words):
    with pytest.raises(BadInput, match=words):
        run(job(**change))


# ---------------------------------------------------------------- images


def test_batches_follow_from_seed_and_epoch_alone():
    asked = TrainSettings(samples=50, batch_size=16, seed=3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    whole = open_epochs("digits", SMALL, asked, Place(CPU))
    first, second = list(whole.epoch(0)), list(whole.epoch(1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])
    assert len(first) == 3
    assert not torch.equal(first[0][0], second[0][0])
    parts = [list(open_epochs("digits", SMALL, asked, Place(CPU, rank, 2)).epoch(1)) for rank in range(2)]
    for (images, labels), (a, b) in zip(second, zip(*parts, strict=True), strict=True):
        assert torch.equal(images[0::2], a[0])
        assert torch.equal(images[1::2], b[0])
        assert torch.equal(labels[1::2], b[1])


def test_large_images_are_the_same_from_workers(tmp_path):
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for number in range(12):
            Image.fromarray(rng.integers(0, 256, (90, 80, 3), dtype=np.uint8)).save(tmp_path / "image.png")
            archive.write(tmp_path / "image.png", f"class{number % 2}/{number}.png")
        archive.writestr("class1/zz.png", b"not an image")
    wanted = Preprocessing((72, 72), (0.5,) * 3, (0.5,) * 3)
    asked = {workers: TrainSettings(batch_size=4, workers=workers) for workers in (0, 1)}
    found = {}
    for workers, each in asked.items():
        epochs = open_epochs(tmp_path / "images.zip", wanted, each, Place(CPU))
        found[workers] = [*epochs.epoch(0), *epochs.epoch(1)]
        assert len(epochs.damaged) == 1
        del epochs
    for (a, labels), (b, others) in zip(found[0], found[1], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(labels, others)
    assert found[0][0][0].shape == (4, 3, 72, 72)


# ---------------------------------------------------------------- the loop


@pytest.mark.parametrize(
    "kwargs", [{}, {"ema": True}, {"amp": True}, {"mixup": 0.2, "cutmix": 1.0}, {"optimizer": "adamw"}], ids=str
)
def test_training_learns_and_leaves_everything_else_alone(kwargs):
    asked = job(teacher=tiny(1), lr=0.05 if "optimizer" not in kwargs else 0.01, **kwargs)
    model, random_state = tiny(), torch.get_rng_state()
    trained = run(asked)
    rows = trained.history.epochs
    assert [row.epoch for row in rows] == [1, 2, 3]
    assert rows[-1].train_loss < rows[0].train_loss
    assert equal(asked.model, model)
    assert equal(asked.teacher.model, tiny(1))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not trained.model.training
    assert all(parameter.requires_grad for parameter in trained.model.parameters())
    assert (rows[0].train_accuracy is None) == ("mixup" in kwargs)
    assert rows[-1].lr < rows[0].lr


def test_the_moving_average_lags_behind():
    last, average = run(job()), run(job(ema=True))
    assert last.history.epochs[-1].train_loss == average.history.epochs[-1].train_loss
    assert not equal(last.model, average.model)


def test_a_teacher_is_followed_without_labels():
    """With the whole weight on the teacher, the student ends nearer to it, on images that it learned from."""
    asked = job(teacher=tiny(1), distill_weight=1.0, epochs=8, lr=0.1)
    images = torch.cat([batch for batch, _ in asked.images.epoch(0)])

    def distance(model):
        with torch.no_grad():
            return float((model(images).softmax(1) - asked.teacher.model(images).softmax(1)).abs().sum(1).mean())

    assert distance(run(asked).model) < 0.5 * distance(asked.model)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_optimizers_go_through_a_file(tmp_path, name):
    def made():
        model = tiny()
        return model, timm.optim.create_optimizer_v2(model, name, lr=0.1, weight_decay=0.1)

    model, optimizer = made()
    model(torch.ones(2, 1, 16, 16)).sum().backward()
    optimizer.step()
    tensors, state = pack_optimizer(optimizer)
    write_checkpoint(tmp_path / "c", Checkpoint(tensors, {"optimizer": state}))
    read = read_checkpoint(tmp_path / "c")
    _, other = made()
    unpack_optimizer(other, read.tensors, read.state["optimizer"])
    again = pack_optimizer(other)
    assert again[0].keys() == tensors.keys()
    assert all(torch.equal(again[0][key], tensors[key]) for key in tensors)
    assert again[1] == state


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    file = tmp_path / "c"
    write_checkpoint(file, Checkpoint({"a": torch.zeros(2)}, {"n": 1}))
    with pytest.raises(BadInput, match="JSON"):
        write_checkpoint(file, Checkpoint({}, {"n": object()}))
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(BadInput, match="No space left"):
        write_checkpoint(file, Checkpoint({}, {"n": 2}))
    assert read_checkpoint(file).state["n"] == 1
    assert list(tmp_path.iterdir()) == [file]
    file.write_bytes(b"nonsense")
    with pytest.raises(BadInput, match="cannot be read"):
        read_checkpoint(file)


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "kwargs", [{"ema": True}, {"optimizer": "adamw", "mixup": 0.4}, {"amp": True, "smoothing": 0.1}], ids=str
)
@pytest.mark.parametrize("stop_at", [0, 2])
def test_a_resumed_run_ends_bit_for_bit_the_same(tmp_path, one_thread, kwargs, stop_at):
    whole = run(job(teacher=tiny(1), **kwargs))
    file = tmp_path / "c"

    def save(checkpoint):
        write_checkpoint(file, checkpoint)
        if len(checkpoint.state["history"]) == stop_at:
            raise Stop

    with pytest.raises(Stop):
        run(job(teacher=tiny(1), **kwargs), save=save)
    torch.rand(7)
    np.random.rand(7)
    resumed = run(job(teacher=tiny(1), **kwargs), resume_from=read_checkpoint(file))
    assert equal(resumed.model, whole.model)
    assert [row.train_loss for row in resumed.history.epochs] == [row.train_loss for row in whole.history.epochs]
    assert [row.lr for row in resumed.history.epochs] == [row.lr for row in whole.history.epochs]


@pytest.mark.parametrize("change", [{"seed": 1}, {"epochs": 4}, {"lr": 0.3}, {"samples": 96}, {"ema": True}], ids=str)
def test_another_run_is_not_resumed(change):
    kept = []
    run(job(epochs=1), save=kept.append)
    with pytest.raises(BadInput, match=f"has {next(iter(change)).replace('samples', 'images')} = "):
        run(job(**{"epochs": 1, **change}), resume_from=kept[0])


# ---------------------------------------------------------------- the command

QUICK = ("--data", "digits", "--samples", "96", "--batch-size", "32", "--epochs", "6", "--threads", "1")


def test_a_killed_command_goes_on_to_the_same_result(typed, saved, tmp_path):
    folder = tmp_path / "run"
    arguments = ("finetune", str(saved), *QUICK, "--ema")
    command = [sys.executable, "-m", "archscan", *arguments, "--output", str(folder), "--quiet"]
    with subprocess.Popen(command, cwd=ROOT) as process:
        log = tmp_path / "run.training" / "log.jsonl"
        while not log.exists() or not log.read_text().count("\n"):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not folder.exists()
    assert (tmp_path / "run.training" / "checkpoint.safetensors").exists()
    refused = typed(*arguments, "--output", folder)
    assert refused.code == 2
    assert "--resume" in refused.err
    assert typed(*arguments, "--output", folder, "--resume", "--quiet").code == 0
    assert typed(*arguments, "--output", tmp_path / "whole", "--quiet").code == 0
    resumed, whole = (load_file(tmp_path / name / saving.TENSORS) for name in ("run", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not (tmp_path / "run.training" / "checkpoint.safetensors").exists()
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in saved.iterdir())


def test_the_result_is_a_folder_like_any_other(typed, saved, tmp_path):
    arguments = ("finetune", saved, "--data", "digits", "--eval-data", "digits", "--samples", "256", "--epochs", "2")
    done = typed(*arguments, "--json")
    assert done.code == 0, done.err
    folder = Path(f"{saved}-finetuned")
    summary = json.loads((folder / "summary.json").read_text())
    assert json.loads(done.out) == summary
    (history,) = summary["history"]
    assert history["teacher"] == "the dense original"
    assert len(history["epochs"]) == 2
    assert history["epochs"][-1]["eval_accuracy"] == summary["accuracy"]["after"]
    assert summary["accuracy"]["before"] is not None
    lines = (tmp_path / "saved-finetuned.training" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history["epochs"]
    before, after = (json.loads((path / "plan.json").read_text()) for path in (saved, folder))
    assert before == after
    assert not equal(archscan.load(saved), archscan.load(folder))
    assert "Fine-tuned for 2 epochs on 256 images, taught by the dense original." in " ".join(
        typed("show", folder).out.split()
    )
    measured = json.loads(typed("evaluate", folder, "--data", "digits", "--json").out)
    assert measured["accuracy"]["after"] == summary["accuracy"]["after"]
    again = typed("finetune", folder, *QUICK, "--teacher", saved, "--output", folder, "--overwrite", "--quiet")
    assert again.code == 0, again.err
    assert len(json.loads((folder / "summary.json").read_text())["history"]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "synthetic"], "no classes to learn"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "digits", "--resume"], "no unfinished run"),
        (["--data", "digits", "--teacher", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--data", "digits", "--epochs", "0"], "at least 1"),
        (["--data", "digits", "--smoothing", "2"], "between 0 and 1"),
        (["--data", "digits", "--lr", "-1"], "below 0"),
        (["--data", "digits", "--opt", "nonsense", "--samples", "64"], "nonsense"),
        (["--data", "digits", "--output", "saved"], "exists"),
    ],
)
def test_the_command_refuses_in_one_line(typed, saved, arguments, words):
    done = typed("finetune", saved, *arguments)
    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1
    assert not Path(f"{saved}-finetuned").exists()


def test_the_dense_original_teaches_only_where_it_is_at_hand(typed, saved, lenet5_file, tmp_path):
    plan = json.loads((saved / "plan.json").read_text())
    plan["history"][0]["plan"]["provenance"]["weights"] = {"kind": "random", "origin": "", "reason": ""}
    (saved / "plan.json").write_text(json.dumps(plan))
    assert "were random" in typed("finetune", saved, *QUICK, "--teacher", "dense").err
    assert typed("finetune", saved, *QUICK, "--epochs", "1", "--json").out.count("There was no teacher") == 1
    given = typed("finetune", saved, *QUICK, "--epochs", "1", "--teacher", lenet5_file, "--output", "b", "--json")
    assert json.loads(given.out)["history"][0]["teacher"] == str(lenet5_file)


# ---------------------------------------------------------------- many processes

SECOND = """
import os, sys, torch
import archscan
from archscan.training import train
from tests.test_finetune import SMALL, Dies, Plain, settings_of
torch.set_num_threads(1)
train(Plain(), "digits", preprocessing=SMALL, settings=settings_of())
os.environ["MASTER_PORT"] = sys.argv[1]
train(Plain(), "digits", preprocessing=SMALL, settings=settings_of(), teacher=Dies(3))
"""


SURVIVOR = """
import os, sys, torch
import archscan
from archscan.errors import OtherEnded
from archscan.training import train
from tests.test_finetune import SMALL, Dies, Plain, settings_of

torch.set_num_threads(1)
os.environ["MASTER_PORT"] = sys.argv[1]
try:
    train(Plain(), "digits", preprocessing=SMALL, settings=settings_of(), teacher=Dies(0))
except OtherEnded as error:
    print(error, flush=True)
    os._exit(7)  # gloo's destructor may wait for ever for threads that wait for the dead process
"""


class Dies(nn.Module):
    """A teacher that ends its process at some call, as a machine does that loses its power."""

    def __init__(self, last_call):
        super().__init__()
        self.calls_left = last_call

    def forward(self, x):
        self.calls_left -= 1
        if self.calls_left == 0:
            os._exit(9)
        return torch.zeros(len(x), 10)


class Plain(nn.Module):
    """No BatchNorm and no dropout: the mean gradient of two halves is that of the whole."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv, self.head = nn.Conv2d(1, 4, 3, stride=2), nn.Linear(4 * 7 * 7, 10)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).flatten(1))


def settings_of():
    return TrainSettings(epochs=2, samples=96, batch_size=32, lr=0.05, optimizer="sgd")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def test_two_processes_do_the_work_of_one_and_notice_a_death(monkeypatch, one_thread):
    alone = train(Plain(), "digits", preprocessing=SMALL, settings=settings_of())
    first, second = free_port(), free_port()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": first, "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    other = [sys.executable, "-c", SECOND, second]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(other, cwd=ROOT, env={**one, "RANK": "1"}) as process:
        both = train(Plain(), "digits", preprocessing=SMALL, settings=settings_of())
        left = [sys.executable, "-c", SURVIVOR, second]
        survivor = subprocess.run(left, cwd=ROOT, env=one, capture_output=True, text=True, timeout=120)
    assert survivor.returncode == 7, survivor.stderr
    assert "another process of this run ended" in survivor.stdout
    assert process.returncode == 9
    assert both.history.processes == 2
    losses = [row.train_loss for row in alone.history.epochs]
    assert [row.train_loss for row in both.history.epochs] == pytest.approx(losses, rel=1e-5)
    for found, expected in zip(both.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- Python, timm, the view


def test_the_example_in_the_documentation_runs():
    assert doctest.testmod(training).failed == 0
    assert doctest.testmod(training).attempted > 0


def test_batches_from_python():
    torch.manual_seed(0)
    batches = [(torch.randn(16, 1, 16, 16), torch.randint(0, 10, (16,))) for _ in range(3)]
    trained = archscan.finetune(tiny(), batches, settings=TrainSettings(epochs=2))
    assert trained.history.images == 48
    assert trained.history.epochs[1].train_loss < trained.history.epochs[0].train_loss
    for bad, words in [
        (iter(batches), "can be counted"),
        ([], "no batch"),
        ([(batches[0][0], None)], "not a pair"),
        ([(batches[0][0], batches[0][1] + 10)], "is not among"),
        ("digits", "pass preprocessing"),
    ]:
        with pytest.raises(BadInput, match=words):
            archscan.finetune(tiny(), bad)
    with pytest.raises(BadInput, match="leave those settings out"):
        archscan.finetune(tiny(), batches, settings=TrainSettings(batch_size=8))


def test_a_folder_from_python(saved, tmp_path):
    asked = TrainSettings(epochs=1, samples=64, batch_size=32)
    trained = archscan.finetune(saved, "digits", output=tmp_path / "out", settings=asked)
    assert equal(trained.model, archscan.load(tmp_path / "out"))
    with pytest.raises(BadInput, match="that archscan saved"):
        archscan.finetune(tmp_path, "digits")


def test_timm_builds_a_slim_network_and_trains_it(saved, tmp_path, monkeypatch, capsys):
    from archscan import timm_entrypoint

    model = timm.create_model("archscan", folder=str(saved))
    assert model.training
    assert equal(model, archscan.load(saved))
    config = timm.data.resolve_data_config(model=model)
    assert config["input_size"] == (1, 28, 28)
    assert model.num_classes == 10
    optimizer = timm.optim.create_optimizer_v2(model, "sgd", lr=0.1)
    nn.functional.cross_entropy(model(torch.ones(4, 1, 28, 28)), torch.arange(4)).backward()
    optimizer.step()
    assert not equal(model, archscan.load(saved))
    for wrong, words in [({}, "folder=DIR"), ({"num_classes": 5}, "num_classes 10"), ({"drop_rate": 0.5}, "drop_rate")]:
        where = {"folder": saved} if wrong else {}
        with pytest.raises(BadInput, match=words):
            timm.create_model("archscan", **where, **wrong)
    timm.create_model("archscan", folder=saved, num_classes=10, in_chans=1, drop_rate=0.0, checkpoint_path="")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, timm\nprint(len(list(timm.create_model('archscan', folder=sys.argv[1]).parameters())))"
    )
    monkeypatch.setattr(sys, "argv", ["x", str(script), str(saved)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    timm_entrypoint.main()
    assert capsys.readouterr().out == "8\n"


def test_the_live_view():
    from archscan.commands.training_view import render_moment

    row = EpochRow(1, 0.04, 0.5, 0.8, 0.75, 1234.0, 61.0)
    console = Console(width=110, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(render_moment(Moment(2, 10, 30, 100, 0.4321, 0.881, 1250.0, 3725.0, (row,))))
    text = capture.get()
    for part in ("epoch 2/10", "loss 0.432", "accuracy 88.1%", "1,250 images/s", "1:02:05 left", "0.04", "75.0%"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 110


@settings(max_examples=20)
@given(st.lists(st.integers(0, 2**32), min_size=1, max_size=3))
def test_seeding_leaves_the_generators_alone(numbers):
    before = torch.get_rng_state(), random.getstate()
    with seeded_everywhere(*numbers):
        first = torch.rand(3), random.random(), np.random.rand()
    with seeded_everywhere(*numbers):
        assert torch.equal(torch.rand(3), first[0])
        assert (random.random(), np.random.rand()) == first[1:]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
