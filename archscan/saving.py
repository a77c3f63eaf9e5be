"""Save a slim network as a folder, and load it: model, plans, surgeries ↔ files that hold no code.

The folder has ``plan.json`` (the recipe of the architecture, and one plan and surgery per time that it was slimmed),
``model.safetensors`` (every parameter and buffer, once), ``summary.json`` and ``report.html``, and appears whole (see
`folders`).

The decision that is not obvious: a folder may come from anybody. Loading imports nothing that it names, reads integers
only after they are known to fit the architecture, changes only integer attributes that exist, and only to smaller ones
(or somewhat larger ones, where a network got wider), and compares all shapes with the header of the tensor file before
it reads a tensor.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from archscan import __version__, recipes
from archscan.errors import BadInput, RebuildMismatch
from archscan.folders import check_replaceable, replacing
from archscan.planner import Plan
from archscan.rebuild import apply
from archscan.recipes import Recipe
from archscan.surgery import MAX_REPEATS, Surgery

PLAN, TENSORS, SUMMARY, REPORT = "plan.json", "model.safetensors", "summary.json", "report.html"
FORMAT, WIDENED = 1, 2
"""Version of the folder's layout; raised when an older archscan could not read it, as where a network got wider."""

EXPORTS = ("model.onnx", "model.onnx.data", "model.pt2", "model.ts.pt", "architecture.txt")
"""What an export may add to the folder."""

_OURS = frozenset({PLAN, TENSORS, SUMMARY, REPORT, *EXPORTS})
_MAX_JSON_BYTES = 256 * 2**20
_MAX_NUMBER = 65_536  # a recipe may ask for larger sizes only where the saved tensors have them


@dataclass(frozen=True)
class Step:
    """One time that a network was slimmed.

    Attributes:
        plan: What was kept and why.
        surgery: What that cut.
    """

    plan: Plan
    surgery: Surgery


def distinct_tensors(model: nn.Module) -> dict[str, Tensor]:
    """List every parameter and buffer once, under its first path; buffers that no state dict holds are among them."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


# --- saving ---------------------------------------------------------------------------------------------------------


def check_target(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """See, before any work, that a result can be written to a folder.

    Raises:
        BadInput: It is a file, exists without `overwrite`, holds what archscan did not write, or cannot be written.
    """
    return check_replaceable(folder, _OURS, "which archscan did not write", overwrite=overwrite)


def _json(data: Any) -> str:
    """Write JSON with one line per entry of a table, and the lists of numbers on one line."""
    return _pretty(data, 0) + "\n"


def _pretty(data: Any, depth: int) -> str:
    start, end = "\n" + "  " * (depth + 1), "\n" + "  " * depth
    if isinstance(data, Mapping) and data and depth < 6:
        entries = (f"{json.dumps(str(key))}: {_pretty(value, depth + 1)}" for key, value in data.items())
        return "{" + start + ("," + start).join(entries) + end + "}"
    if isinstance(data, list) and data and isinstance(data[0], Mapping) and depth < 3:
        return "[" + start + ("," + start).join(_pretty(value, depth + 1) for value in data) + end + "]"
    return json.dumps(data, separators=(",", ":"), allow_nan=False)


def _write(folder: Path, model: nn.Module, plan: Mapping[str, Any], summary: Mapping[str, Any], report: str) -> None:
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in distinct_tensors(model).items():
        saved = tensor.detach().cpu().contiguous()
        address = saved.untyped_storage().data_ptr()
        whole = saved.numel() * saved.element_size() == saved.untyped_storage().nbytes()
        # safetensors refuses tensors that share memory
        tensors[name] = saved if whole and address not in storages else saved.clone()
        storages.add(address)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})  # the order of several keys is not fixed
    (folder / PLAN).write_text(_json(plan), encoding="utf-8")
    numbers = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / SUMMARY).write_text(f"{numbers}\n", encoding="utf-8")
    (folder / REPORT).write_text(report, encoding="utf-8")
    (folder / TENSORS).chmod((folder / REPORT).stat().st_mode)  # safetensors makes its file private


def save(
    folder: str | os.PathLike[str],
    model: nn.Module,
    steps: Sequence[Step],
    recipe: Recipe | None,
    summary: Mapping[str, Any],
    report: str,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a result folder; it appears at once and whole, or not at all.

    Args:
        folder: Where to; parents are made.
        model: The slim network.
        steps: How it came about, from the architecture of the recipe on.
        recipe: How to build that architecture; None for a model that only its user can build.
        summary: Content of ``summary.json``.
        report: Content of ``report.html``.
        overwrite: Replace a result that is there.

    Returns:
        The folder.

    Raises:
        BadInput: See `check_target`; or the disk refuses.
    """
    target = check_target(folder, overwrite=overwrite)
    plan = {
        "format": WIDENED if any(step.plan.widened for step in steps) else FORMAT,
        "archscan": __version__,
        "recipe": None if recipe is None else recipe.to_json(),
        "history": [{"plan": step.plan.to_json(), "surgery": step.surgery.to_json()} for step in steps],
    }
    with replacing(target) as partial:
        _write(partial, model, plan, summary, report)
    return target


# --- loading --------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """Read one JSON file of a result folder.

    Raises:
        BadInput: It is missing, far too large, or not JSON.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise BadInput(f"{path} is larger than any that archscan writes; save the result again")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(
            f"{path} cannot be read ({error.strerror or error}); give a folder that archscan saved"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON that archscan wrote; save the result again") from error


def _read_plan(folder: Path) -> tuple[Recipe | None, list[Mapping[str, Any]]]:
    data = read_json(folder / PLAN)
    where = folder / PLAN
    if not isinstance(data, dict) or type(data.get("format")) is not int:
        raise BadInput(f"{where} is no plan of archscan; give a folder that archscan saved")
    if data["format"] not in (FORMAT, WIDENED):
        raise BadInput(
            f"{where} has format {str(data['format'])[:12]}, and this archscan {__version__} reads formats up to "
            f"{WIDENED}; install the version that wrote it"
        )
    history = data.get("history")
    if set(data) != {"format", "archscan", "recipe", "history"} or not isinstance(history, list) or not history:
        raise BadInput(f"{where} needs format, archscan, recipe and a history of steps; save the result again")
    if not all(isinstance(step, dict) and set(step) == {"plan", "surgery"} for step in history):
        raise BadInput(f"{where}: each step of the history needs a plan and a surgery; save the result again")
    return None if data["recipe"] is None else Recipe.from_json(data["recipe"]), history


def read_steps(folder: str | os.PathLike[str]) -> tuple[Recipe | None, tuple[Plan, ...]]:
    """Read the recipe and the plans of a result folder, without building anything.

    Raises:
        BadInput: ``plan.json`` is missing or is not what archscan wrote.
    """
    recipe, history = _read_plan(Path(folder))
    return recipe, tuple(Plan.from_json(step["plan"]) for step in history)


def _check_recipe_sizes(recipe: Recipe, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse a recipe that asks for more than the saved tensors can fill, before it is built."""
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    for key, value in recipe.kwargs.items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and abs(number) > max(largest, _MAX_NUMBER):
                raise BadInput(f"the recipe's {key} is larger than anything in {TENSORS}; load the folder unedited")


def _architecture(
    folder: Path,
    recipe: Recipe | None,
    model: nn.Module | None,
    build: Callable[[Recipe], nn.Module],
    shapes: Mapping[str, Sequence[int]],
) -> nn.Module:
    if model is not None:
        return model
    if recipe is None:
        raise BadInput(
            f"{folder} has no recipe of its architecture; pass model=, the original network with any weights"
        )
    if recipe.source == "file":
        raise BadInput(
            f"{folder} was made from code in {recipe.name!r}, which archscan does not run on behalf of a folder; "
            "pass model=, the original network with any weights"
        )
    _check_recipe_sizes(recipe, shapes)
    return build(recipe)


def _check_tensors(model: nn.Module, shapes: Mapping[str, Sequence[int]], where: Path) -> None:
    mine = {name: tuple(tensor.shape) for name, tensor in distinct_tensors(model).items()}
    odd = sorted(set(mine) ^ set(shapes))
    if odd:
        lacking = "the file" if odd[0] in mine else "the model"
        raise BadInput(
            f"{where} does not fit the model: {lacking} has no tensor {odd[0]!r}; use the original architecture"
        )
    for name, shape in mine.items():
        if tuple(shapes[name]) != shape:
            raise BadInput(
                f"{where} does not fit the model: {name!r} has shape {tuple(shapes[name])} where the plan gives "
                f"{shape}; load the folder unedited, with the original architecture"
            )


def _replay(
    folder: Path,
    model: nn.Module | None,
    build: Callable[[Recipe], nn.Module],
    shapes: Mapping[str, Sequence[int]],
) -> tuple[nn.Module, tuple[Step, ...]]:
    """Build the architecture and slim it as the folder says, each step checked against what it is applied to."""
    recipe, history = _read_plan(folder)
    result = _architecture(folder, recipe, model, build, shapes)
    most = MAX_REPEATS * max(_elements(result), sum(math.prod(shape) for shape in shapes.values()))
    steps: list[Step] = []
    for entry in history:
        steps.append(Step(Plan.from_json(entry["plan"]), Surgery.from_json(entry["surgery"], result)))
        try:
            _check_growth(folder, result, steps[-1].surgery, most)
            result = apply(result, steps[-1].surgery)
        except RebuildMismatch as error:
            raise BadInput(f"{folder / PLAN} does not fit its architecture ({error}); load it unedited") from error
    return result, tuple(steps)


def _elements(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in distinct_tensors(model).values())


def _check_growth(folder: Path, model: nn.Module, surgery: Surgery, most: int) -> None:
    """Refuse a surgery that would make more numbers than `most`, before any is made."""
    elements = 0
    for name, tensor in distinct_tensors(model).items():
        shape = list(tensor.shape)
        for cut in surgery.cuts.get(name, ()):
            shape[cut.axis] = len(cut.kept[0] if isinstance(cut.kept[0], tuple) else cut.kept)
        elements += math.prod(shape)
    if elements > most:
        raise BadInput(f"{folder / PLAN} widens the network beyond anything in {TENSORS}; load it unedited")


@contextmanager
def _open_tensors(folder: Path) -> Iterator[tuple[Any, dict[str, tuple[int, ...]]]]:
    """Open the tensor file of a result folder; yield it and the shapes in its header."""
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}; give one that archscan saved")
    try:
        with safe_open(folder / TENSORS, framework="pt") as file:
            yield file, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{folder / TENSORS} cannot be read ({error}); save the result again") from error


def read_history(
    folder: str | os.PathLike[str],
    model: nn.Module | None = None,
    build: Callable[[Recipe], nn.Module] = recipes.build,
) -> tuple[Step, ...]:
    """Read how a saved network came about, to save it again with one step more; arguments and refusals as in `load`."""
    with _open_tensors(Path(folder)) as (_, shapes):
        return _replay(Path(folder), model, build, shapes)[1]


def load(
    folder: str | os.PathLike[str],
    model: nn.Module | None = None,
    build: Callable[[Recipe], nn.Module] = recipes.build,
) -> nn.Module:
    """Load a slim network from a result folder, bit for bit as it was saved, in eval mode.

    Args:
        folder: What `save` wrote.
        model: The original architecture, with any weights; it is left unchanged. Needed where the folder has no recipe.
        build: Builds an architecture from a recipe.

    Raises:
        BadInput: A file is missing, damaged or edited, or does not fit the architecture.
    """
    with _open_tensors(Path(folder)) as (file, shapes):
        result, _ = _replay(Path(folder), model, build, shapes)
        _check_tensors(result, shapes, Path(folder) / TENSORS)
        with torch.no_grad():
            for name, tensor in distinct_tensors(result).items():
                saved = file.get_tensor(name)
                if tensor.dtype == saved.dtype:
                    tensor.copy_(saved)
                else:
                    tensor.data = saved.to(tensor.device, copy=True)  # products depend on how memory is aligned
    return result.eval()
