"""Saving and loading: bit for bit, whole or not at all, and nothing in a folder is trusted."""

import copy
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import archscan  # noqa: F401 - before anything that may import torchvision
from archscan import saving
from archscan.errors import BadInput
from archscan.planner import Budget, Costs, Plan
from archscan.rebuild import apply, rebuild, surgery_for
from archscan.recipes import Recipe, build
from archscan.saving import Step, check_target, load, read_history, read_json, read_steps, save
from archscan.surgery import Cut, Surgery
from tests import hand_couplings as hand

RECIPE = Recipe("reference", "lenet5", {})


def plan(kept: Mapping[str, Any]) -> Plan:
    return Plan(kept, Budget("macs", 0.5), Costs(10, 9, 8), Costs(5, 4, 3), 0.5, 0.75, {"seed": 0})


def fresh(make: Callable[[], hand.Case]) -> nn.Module:
    torch.manual_seed(99)
    return make().model


def saved(folder: Path, make: Callable[[], hand.Case], recipe: Recipe | None = RECIPE) -> nn.Module:
    torch.manual_seed(0)
    case = make()
    slim = rebuild(case.model, case.inputs, case.coupling, case.kept)
    save(folder, slim.model, [Step(plan(case.kept), slim.surgery)], recipe, {"model": "tiny"}, "<!doctype html>")
    return slim.model


def assert_same(a: nn.Module, b: nn.Module) -> None:
    first, second = saving.distinct_tensors(a), saving.distinct_tensors(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)


@pytest.mark.parametrize("make", hand.EXACT, ids=lambda make: make.__name__)
def test_loaded_network_is_the_saved_one_bit_for_bit(tmp_path: Path, make: Callable[[], hand.Case]) -> None:
    slim = saved(tmp_path / "out", make, recipe=None)
    original = fresh(make)
    before = copy.deepcopy(original)
    loaded = load(tmp_path / "out", model=original)
    assert_same(loaded, slim)
    assert_same(original, before)
    inputs = make().inputs
    torch.testing.assert_close(loaded(inputs), slim.eval()(inputs), rtol=0, atol=0)
    loaded.train()(inputs).sum().backward()
    assert not loaded.training or all(parameter.grad is not None for parameter in loaded.parameters())


def test_recipe_builds_the_architecture(tmp_path: Path) -> None:
    slim = saved(tmp_path / "out", hand.chain)
    asked: list[Recipe] = []

    def make(recipe: Recipe) -> nn.Module:
        asked.append(recipe)
        return fresh(hand.chain)

    assert_same(load(tmp_path / "out", build=make), slim)
    assert asked == [RECIPE]


def test_reference_network_by_its_own_recipe(tmp_path: Path) -> None:
    model = build(RECIPE)
    name, weight = next((name, weight) for name, weight in model.named_parameters() if weight.ndim == 2)
    surgery = Surgery({name: (Cut(1, tuple(range(1, weight.shape[1]))),)})
    slim = apply(model, surgery)
    save(tmp_path / "out", slim, [Step(plan({}), surgery)], RECIPE, {}, "")
    assert_same(load(tmp_path / "out"), slim)


def test_a_network_that_was_slimmed_twice(tmp_path: Path) -> None:
    case = hand.chain()
    once = rebuild(case.model, case.inputs, case.coupling, case.kept)
    second = Surgery({"first.weight": (Cut(0, (0, 2)),), "first.bias": (Cut(0, (0, 2)),)})
    twice = apply(once.model, second)
    save(tmp_path / "out", twice, [Step(plan(case.kept), once.surgery), Step(plan({}), second)], None, {}, "")
    assert_same(load(tmp_path / "out", model=fresh(hand.chain)), twice)
    steps = read_history(tmp_path / "out", model=fresh(hand.chain))
    assert steps == (Step(plan(case.kept), once.surgery), Step(plan({}), second))
    recipe, plans = read_steps(tmp_path / "out")
    assert recipe is None
    assert plans == (plan(case.kept), plan({}))


def test_shared_tensors_other_dtypes_and_unlisted_buffers(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.register_buffer("hidden", torch.randn(3), persistent=False)
            self.register_buffer("view", torch.randn(2, 6).T)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model = Net().half()
    model.twin = model.hidden[:2]
    model.register_buffer("part", model.view[:3])
    save(tmp_path / "out", model, [Step(plan({}), Surgery({}))], None, {}, "")
    original = Net()
    original.register_buffer("part", torch.zeros(3, 2))
    loaded = load(tmp_path / "out", model=original)
    assert_same(loaded, model)
    assert loaded.b.weight is loaded.a.weight


def test_files_are_readable_and_hold_no_pickle(tmp_path: Path) -> None:
    saved(tmp_path / "out", hand.grouped)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["plan.json", "model.safetensors", "summary.json", "report.html"]
    )
    data = read_json(tmp_path / "out" / "plan.json")
    assert data["format"] == 1
    assert data["recipe"] == {"source": "reference", "name": "lenet5", "kwargs": {}}
    rows = data["history"][0]["surgery"]["cuts"]["1.weight"][1]["rows"]
    assert rows == [[2, [[0, 2], [3, 4]]], [2, [[1, 4]]]]
    assert max(map(len, (tmp_path / "out" / "plan.json").read_text().splitlines())) < 200
    assert read_json(tmp_path / "out" / "summary.json") == {"model": "tiny"}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


# --- writing ---------------------------------------------------------------------------------------------------------


def test_existing_folder_needs_overwrite(tmp_path: Path) -> None:
    saved(tmp_path / "out", hand.chain)
    with pytest.raises(BadInput, match="overwrite"):
        saved(tmp_path / "out", hand.residual)
    case = hand.residual()
    slim = rebuild(case.model, case.inputs, case.coupling, case.kept)
    steps = [Step(plan(case.kept), slim.surgery)]
    save(tmp_path / "out", slim.model, steps, None, {}, "", overwrite=True)
    assert_same(load(tmp_path / "out", model=fresh(hand.residual)), slim.model)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_overwriting_never_deletes_what_archscan_did_not_write(tmp_path: Path) -> None:
    saved(tmp_path / "out", hand.chain)
    (tmp_path / "out" / "thesis.tex").write_text("\\documentclass{article}")
    with pytest.raises(BadInput, match=r"thesis\.tex"):
        check_target(tmp_path / "out", overwrite=True)


def test_targets_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        check_target(tmp_path / "file", overwrite=True)
    with pytest.raises(BadInput, match="not a folder that can be written"):
        check_target(tmp_path / "file" / "out")
    assert check_target(tmp_path / "new" / "deep" / "out") == tmp_path / "new" / "deep" / "out"
    monkeypatch.setattr(saving.os, "access", lambda *_: False)
    with pytest.raises(BadInput, match="not a folder that can be written"):
        check_target(tmp_path / "out")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("existing", [False, True])
def test_interruption_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, existing: bool
) -> None:
    slim = saved(tmp_path / "out", hand.chain) if existing else hand.chain().model
    before = [tmp_path / "out"] if existing else []

    def fail(*_: Any, **__: Any) -> None:
        raise error

    for place in ("save_file", "_json"):
        with monkeypatch.context() as patch:
            patch.setattr(saving, place, fail)
            with pytest.raises((KeyboardInterrupt, BadInput)):
                save(tmp_path / "out", slim, [], None, {}, "", overwrite=True)
        assert list(tmp_path.iterdir()) == before
    if existing:
        assert_same(load(tmp_path / "out", model=fresh(hand.chain)), slim)


def test_interruption_between_the_two_renames_restores_the_old_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slim, rename = saved(tmp_path / "out", hand.chain), Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / "out", slim, [], None, {}, "", overwrite=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert_same(load(tmp_path / "out", model=fresh(hand.chain)), slim)


# --- folders of unknown origin ---------------------------------------------------------------------------------------


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / "plan.json").read_text())
    new = change(data)
    (folder / "plan.json").write_text(json.dumps(data if new is None else new))


def step(data: dict[str, Any]) -> dict[str, Any]:
    return data["history"][0]


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no table": lambda data: [],
    "other format": lambda data: data.update(format=3),
    "huge format": lambda data: data.update(format=10**300),
    "format is text": lambda data: data.update(format="1"),
    "format is true": lambda data: data.update(format=True),
    "no history": lambda data: data.pop("history"),
    "empty history": lambda data: data.update(history=[]),
    "history is text": lambda data: data.update(history="x"),
    "step without surgery": lambda data: step(data).pop("surgery"),
    "extra key": lambda data: data.update(run="rm"),
    "recipe is text": lambda data: data.update(recipe="reference:lenet5"),
    "unknown source": lambda data: data["recipe"].update(source="pickle"),
    "edited plan": lambda data: step(data)["plan"]["kept"].update(first=[[5, 1]]),
    "huge cost": lambda data: step(data)["plan"]["after"].update(macs=10**40),
    "index too large": lambda data: step(data)["surgery"]["cuts"]["first.weight"][0].update(kept=[[0, 10**15]]),
    "negative index": lambda data: step(data)["surgery"]["cuts"]["first.weight"][0].update(kept=[[-3, 1]]),
    "unsorted": lambda data: step(data)["surgery"]["cuts"]["first.weight"][0].update(kept=[[3, 4], [0, 2]]),
    "fewer kept": lambda data: step(data)["surgery"]["cuts"]["first.weight"][0].update(kept=[[0, 2]]),
    "a cut is missing": lambda data: step(data)["surgery"]["cuts"].pop("first.weight"),
    "path trick": lambda data: step(data)["surgery"]["cuts"].update({"../../x": [{"axis": 0, "kept": [[0, 1]]}]}),
    "dunder": lambda data: step(data)["surgery"]["attributes"].update(first={"__class__": 1}),
    "walk": lambda data: step(data)["surgery"]["attributes"].update({"first.weight": {"data": 1}}),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS.keys())
def test_edited_plan_is_refused_in_one_sentence(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    saved(tmp_path / "out", hand.chain)
    edited(tmp_path / "out", change)
    with pytest.raises(BadInput) as caught:
        load(tmp_path / "out", model=fresh(hand.chain))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"format": ' + "9" * 5000 + "}", "\x00", "NaN"])
def test_plan_that_is_not_json(tmp_path: Path, text: str) -> None:
    saved(tmp_path / "out", hand.chain)
    (tmp_path / "out" / "plan.json").write_text(text)
    with pytest.raises(BadInput, match=r"plan\.json"):
        load(tmp_path / "out", model=fresh(hand.chain))


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors"])
def test_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match="no folder"):
        load(tmp_path / "nowhere")
    saved(tmp_path / "out", hand.chain)
    (tmp_path / "out" / name).unlink()
    with pytest.raises(BadInput, match=re.escape(name)):
        load(tmp_path / "out", model=fresh(hand.chain))


def test_damaged_or_foreign_tensors(tmp_path: Path) -> None:
    saved(tmp_path / "out", hand.chain)
    path = tmp_path / "out" / "model.safetensors"
    good, tensors = path.read_bytes(), load_file(path)
    for bad in (b"", good[:100], good[:-10], (2**62).to_bytes(8, "little") + good[8:], b"PK\x03\x04" + good):
        path.write_bytes(bad)
        with pytest.raises(BadInput, match=r"model\.safetensors cannot be read"):
            load(tmp_path / "out", model=fresh(hand.chain))
    for change in ({"more": torch.zeros(1)}, {"first.weight": torch.zeros(1)}, {"first.bias": None}):
        wrong = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(wrong, path)
        with pytest.raises(BadInput, match="does not fit the model"):
            load(tmp_path / "out", model=fresh(hand.chain))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "out", hand.chain)
    for make in (hand.residual, hand.grouped):
        with pytest.raises(BadInput, match="no tensor"):
            load(tmp_path / "out", model=fresh(make))
    wider = fresh(hand.chain)
    wider.head = nn.Linear(16, 6)
    with pytest.raises(BadInput, match=r"head\."):
        load(tmp_path / "out", model=wider)


def test_folder_without_recipe_says_what_to_pass(tmp_path: Path) -> None:
    saved(tmp_path / "out", hand.chain, recipe=None)
    with pytest.raises(BadInput, match=r"no recipe.*pass model="):
        load(tmp_path / "out")


def test_code_named_by_a_folder_is_never_run(tmp_path: Path) -> None:
    code = tmp_path / "evil.py"
    code.write_text("raise SystemExit('was run')")
    slim = saved(tmp_path / "out", hand.chain, recipe=Recipe("file", f"{code}:make", {}))
    with pytest.raises(BadInput, match=r"does not run.*pass model="):
        load(tmp_path / "out")
    assert_same(load(tmp_path / "out", model=fresh(hand.chain)), slim)


def test_recipe_cannot_ask_for_more_than_was_saved(tmp_path: Path) -> None:
    saved(tmp_path / "out", hand.chain, recipe=Recipe("reference", "lenet5", {"num_classes": 10**6}))

    def make(_: Recipe) -> nn.Module:
        raise AssertionError("was built")

    with pytest.raises(BadInput, match="num_classes"):
        load(tmp_path / "out", build=make)


def test_unbalanced_groups_of_an_edited_plan_are_bad_input(tmp_path: Path) -> None:
    case = hand.grouped()
    slim = rebuild(case.model, case.inputs, case.coupling, case.kept)
    save(tmp_path / "out", slim.model, [Step(plan(case.kept), surgery_for(case.coupling, case.kept))], None, {}, "")
    edited(
        tmp_path / "out",
        lambda data: step(data)["surgery"]["cuts"]["1.weight"][0].update(kept=[[0, 3], [7, 8]]),
    )
    with pytest.raises(BadInput, match="must be equal"):
        load(tmp_path / "out", model=fresh(hand.grouped))


def test_saved_folder_can_be_moved(tmp_path: Path) -> None:
    slim = saved(tmp_path / "out", hand.chain)
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    assert_same(load(tmp_path / "elsewhere", model=fresh(hand.chain)), slim)
