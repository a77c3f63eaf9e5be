"""Training between the rounds of a slimming: what is put back, trained, proven and recorded, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import archscan
from archscan import retraining, stages
from archscan.errors import BadInput, RebuildMismatch
from archscan.groups import couple
from archscan.processes import Place
from archscan.rebuild import apply, rebuild, surgery_for
from archscan.report.handover import episodes
from archscan.report.training import TrainingRun
from archscan.rounds import put_back, rows_between
from archscan.saving import distinct_tensors
from archscan.sources import Preprocessing
from archscan.surgery import named_tensors
from archscan.training import TrainSettings
from archscan.training.images import LaterEpochs
from tests.masked import random_kept, randomised
from tests.nets import CASES

ALONE = Place(torch.device("cpu"))
DIGITS = Preprocessing((12, 12), (0.5,), (0.5,))


class Small(nn.Module):
    """A residual network for digits; batch normalisation is optional, since its statistics move in training."""

    def __init__(self, norm=True):
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, stride=2, bias=not norm)
        self.norm = nn.BatchNorm2d(12) if norm else nn.Identity()
        self.inner, self.outer = nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.head((x + self.outer(torch.relu(self.inner(x)))).mean((2, 3)))


def small(**kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Small(**kwargs).eval()


def batches(count=4, size=16):
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(count * size) % 10
    images = torch.randn(count * size, 1, 12, 12, generator=generator) + labels[:, None, None, None] / 5
    return list(zip(images.split(size), labels.split(size), strict=True))


def slimmed(model, rounds=2, recover="none", **kwargs):
    asked = archscan.SlimSettings(archscan.WidthRule(round_to=1), rounds=rounds, recover=recover)
    example = torch.zeros(1, 1, 12, 12)
    return archscan.slim(model, example, target_flops=0.5, data=batches(), criterion="obd", settings=asked, **kwargs)


def training(**kwargs):
    return archscan.Finetuning(batches(), settings=TrainSettings(**{"epochs": 1, "lr": 0.05, **kwargs}))


# ---------------------------------------------------------------- weights put back


def values(model):
    return torch.cat([tensor.detach().flatten().double() for tensor in distinct_tensors(model).values()])


@pytest.mark.parametrize("name", CASES)
def test_trained_weights_go_back_to_where_they_came_from(name):
    model = randomised(CASES[name].make())
    example = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    coupling = couple(model, example)
    cut = rebuild(model, example, coupling, random_kept(coupling, seed=3))
    assert torch.equal(values(put_back(model, cut.model, cut.surgery)), values(model))
    with torch.no_grad():
        for number, tensor in enumerate(distinct_tensors(cut.model).values()):
            tensor.add_(number + 1)
    whole = put_back(model, cut.model, cut.surgery)
    assert torch.equal(values(apply(whole, cut.surgery)), values(cut.model))
    slim_count, changed = values(cut.model).numel(), int((values(whole) != values(model)).sum())
    assert changed == slim_count


def test_a_network_that_was_changed_is_not_put_back():
    model, example = small(), torch.randn(2, 1, 12, 12)
    coupling = couple(model, example)
    cut = rebuild(model, example, coupling, random_kept(coupling, seed=1))
    with pytest.raises(RebuildMismatch, match="cannot be put back"):
        put_back(model, model, cut.surgery)


@pytest.mark.parametrize("name", ["plain", "dense-concat", "grouped-places", "depthwise", "padded-shortcut"])
def test_rows_of_a_later_round_are_found_in_the_earlier_one(name):
    model = randomised(CASES[name].make())
    coupling = couple(model, torch.randn(2, 3, 12, 12, dtype=torch.float64))
    first = random_kept(coupling, seed=3)
    second = {group: tuple(steps[: max(1, len(steps) // 2)] for steps in kept) for group, kept in first.items()}
    before, after = surgery_for(coupling, first), surgery_for(coupling, {**second, **frozen(coupling, first)})
    with torch.no_grad():
        for _, tensor in named_tensors(model):  # every value is the number of its row
            if tensor.ndim:
                tensor.copy_(torch.arange(len(tensor)).view(-1, *(1,) * (tensor.ndim - 1)).expand_as(tensor))
    left, wanted = dict(named_tensors(apply(model, before))), dict(named_tensors(apply(model, after)))
    found = rows_between(before, after).cuts
    assert found
    for tensor, (cut,) in found.items():
        rows = left[tensor].flatten(1) if left[tensor].ndim > 1 else left[tensor][:, None]
        assert rows[list(cut.kept), 0].tolist() == wanted[tensor].reshape(len(wanted[tensor]), -1)[:, 0].tolist()


def frozen(coupling, kept):
    return {group.name: kept[group.name] for group in coupling.groups if group.frozen}


# ---------------------------------------------------------------- rounds


@pytest.mark.parametrize("recover", ["none", "ls"])
def test_each_round_goes_on_with_what_the_one_before_learned(monkeypatch, recover):
    seen = []

    def spy(asked, model, *rest):
        trained = retraining.train_round(asked, model, *rest)
        seen.append((model, trained.model))
        return trained

    monkeypatch.setattr(stages, "train_round", spy)
    model = small()
    before = values(model).clone()
    made = slimmed(model, rounds=3, recover=recover, finetune=training())
    assert torch.equal(values(model), before)
    assert equal(seen[-1][1], made.model)
    learned = [seen[0][1].stem.weight, seen[1][1].stem.weight]
    for number, weights in enumerate(learned):
        later = seen[number + 1][0].stem.weight
        if recover == "none":
            assert torch.isin(later, weights).all()
        assert not torch.isin(later, model.stem.weight).any()
    assert made.verification.passed
    assert made.verification.max_abs_error < 1e-9
    kept = [run.macs_kept for run in made.trainings]
    assert [run.round for run in made.trainings] == [1, 2, 3]
    assert kept == [each.macs / made.plan.before.macs for each in made.rounds]
    assert kept[0] > kept[1] > kept[2] <= 0.5
    assert {run.teacher for run in made.trainings} == {"the dense original"}
    assert made.plan.provenance["finetune_epochs"] == 1


def equal(a, b):
    return torch.equal(values(a), values(b))


def test_a_training_that_changes_nothing_changes_nothing():
    model = small(norm=False)
    plain = slimmed(model, rounds=3)
    made = slimmed(model, rounds=3, finetune=training(lr=1e-12, weight_decay=0.0))
    assert made.plan.kept == plain.plan.kept
    torch.testing.assert_close(values(made.model), values(plain.model), rtol=0, atol=1e-8)


def test_training_between_rounds_helps():
    def loss(model):
        with torch.no_grad():
            return float(sum(nn.functional.cross_entropy(model(images), labels) for images, labels in batches()))

    model = archscan.finetune(small(norm=False), batches(), settings=TrainSettings(epochs=20, lr=1e-2)).model
    untrained = loss(slimmed(model).model)
    alternated = loss(slimmed(model, finetune=training(epochs=5, lr=1e-3)).model)
    assert loss(model) < alternated < 0.9 * untrained


def test_the_result_is_one_slimming_that_loads(tmp_path):
    made = slimmed(small(), recover="ls", finetune=training(epochs=2))
    folder = made.save(tmp_path / "out")
    assert equal(archscan.load(folder, small()), made.model)
    assert len(json.loads((folder / "plan.json").read_text())["history"]) == 1
    summary = json.loads((folder / "summary.json").read_text())
    assert [len(run["epochs"]) for run in summary["history"]] == [2, 2]
    assert "Fine-tuned for 2 epochs after each of 2 rounds on 64 images, taught by the dense original." in made.notes
    assert any(note.startswith("Each round was proven and repaired, before") for note in made.notes)
    assert made.seconds["fine-tune"] > 0


def test_rounds_go_through_the_epochs_of_one_training(monkeypatch):
    numbers = []
    monkeypatch.setattr(LaterEpochs, "epoch", counting(numbers, LaterEpochs.epoch))
    slimmed(small(), rounds=3, finetune=training(epochs=2))
    assert numbers == [0, 1, 2, 3, 4, 5]


def counting(numbers, epoch):
    def counted(self, number):
        numbers.append(self.first + number)
        return epoch(self, number)

    return counted


@pytest.mark.parametrize(
    ("finetune", "words"),
    [
        (archscan.Finetuning(None), "needs labelled images"),
        (archscan.Finetuning("digits"), "pass preprocessing"),
        (archscan.Finetuning("synthetic", DIGITS), "no classes to learn"),
        (archscan.Finetuning(iter(())), "can be counted"),
        (archscan.Finetuning(batches(), eval_data="digits"), "pass preprocessing"),
        (2, "pass archscan.Finetuning"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_the_work(finetune, words, monkeypatch):
    monkeypatch.setattr(stages, "collect", None)
    with pytest.raises(BadInput, match=words):
        slimmed(small(), finetune=finetune)


def test_somebody_else_can_teach():
    made = slimmed(small(), finetune=archscan.Finetuning(batches(), teacher=small(), settings=TrainSettings(epochs=1)))
    assert made.trainings[0].teacher == "a given network"


# ---------------------------------------------------------------- the command

QUICK = [
    "--data",
    "digits",
    "--samples",
    "64",
    "--target-flops",
    "0.5",
    "--rounds",
    "2",
    "--finetune-epochs",
    "1",
    "--finetune-samples",
    "128",
]


def test_the_command_alternates(typed, lenet5_file, tmp_path):
    arguments = ("lenet5", "--weights", lenet5_file, *QUICK, "--eval-data", "digits", "--criterion", "magnitude")
    done = typed(*arguments, "--recover", "none", "--output", "out", "--json")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    runs = summary["history"]
    assert [(run["round"], run["images"], run["teacher"]) for run in runs] == [
        (1, 128, "the dense original"),
        (2, 128, "the dense original"),
    ]
    assert runs[1]["epochs"][-1]["eval_accuracy"] == summary["accuracy"]["after"]
    again = typed("out", *QUICK[:6], "--finetune-epochs", "1", "--finetune-samples", "128", "--output", "b", "--json")
    (run,) = json.loads(again.out)["history"]
    assert run["teacher"] == "the dense original"
    assert (run["round"], len(json.loads(Path("b/plan.json").read_text())["history"])) == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--target-flops 0.5 --finetune-epochs 1", "noise has no classes"),
        ("--target-flops 0.5 --data digits --finetune-samples 64", "no effect where nothing is trained"),
        ("--lossless --data digits --finetune-epochs 1", "leave out --finetune-epochs"),
        ("--target-flops 0.5 --data digits --finetune-epochs 0", "at least 1"),
        ("--target-flops 0.5 --data digits --finetune-epochs 1 --num-classes 7", "it cannot learn them"),
        ("--target-flops 0.5 --data digits --finetune-epochs 1 --finetune-samples 1", "BatchNorm needs two"),
    ],
)
def test_the_command_refuses_in_one_line(typed, arguments, words):
    done = typed("lenet5", "--weights", "random", *arguments.split())
    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1
    assert not Path("reports").exists()


# ---------------------------------------------------------------- files besides the result


@pytest.mark.parametrize(
    "command",
    [
        f"lenet5 --weights random {' '.join(QUICK)}",
        "lenet5 --weights dead.safetensors --lossless",
        "widen lenet5 --weights random --only conv1",
        "finetune saved --data digits --samples 64 --epochs 1",
        "sweep lenet5 --weights random --targets 0.9,0.8 --criterion magnitude",
    ],
    ids=lambda command: command.split()[-1 if "lossless" in command else 0],
)
def test_every_command_that_writes_a_result_exports_it(typed, saved, lenet5_file, command):
    weights = load_file(lenet5_file)
    for name in ("conv1.weight", "conv1.bias"):
        weights[name][0] = 0
    save_file(weights, "dead.safetensors")
    done = typed(*command.split(), "--export", "pt2,script", "--output", "out", "--quiet")
    assert done.code == 0, done.err
    for folder in sorted(Path("out").glob("flops*")) or [Path("out")]:
        summary = json.loads((folder / "summary.json").read_text())
        assert [entry["file"] for entry in summary["exports"]] == ["model.pt2", "model.ts.pt"]
        for entry in summary["exports"]:
            assert (entry["parameters"], entry["max_abs_error"] < 1e-5) == (summary["after"]["params"], True)
            assert (folder / entry["file"]).stat().st_size == entry["file_bytes"]
        assert "model.pt2" in (folder / "report.html").read_text()
        assert "model.ts.pt: " in typed("show", folder).out
    assert typed(*command.split(), "--export", "jpeg", "--output", "other").code == 2


def test_the_page_and_the_terminal_tell_of_training_and_exports(typed, saved):
    assert typed("finetune", saved, "--data", "digits", "--samples", "64", "--epochs", "2", "--quiet").code == 0
    assert typed("export", "saved-finetuned", "--format", "pt2", "--quiet").code == 0
    page, shown = (
        Path("saved-finetuned/report.html").read_text(),
        " ".join(typed("show", "saved-finetuned").out.split()),
    )
    assert page.count('id="exports"') == page.count('id="training"') == 1
    assert "2 epochs on 64 images, sgd" not in page  # LeNet has no BatchNorm
    assert "2 epochs on 64 images, adamw with a learning rate up to" in shown
    assert "taught by the dense original: loss" in shown
    assert "any batch size, off by at most" in shown
    untold = Path("saved/report.html").read_text()
    assert 'id="exports"' not in untold
    assert 'id="training"' not in untold


def test_rounds_are_one_episode_and_other_trainings_their_own():
    def run(number):
        return TrainingRun(1, 1, "sgd", 0.1, 0.0, "none", 1, False, False, 0, None, (), round=number)

    history = [run(number) for number in (1, 2, 3, None, None, 1, 1, 2)]
    assert [[run.round for run in runs] for runs in episodes(history)] == [[1, 2, 3], [None], [None], [1], [1, 2]]
