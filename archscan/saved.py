"""Open a folder that archscan saved: report, plans, network, and the dense original where its weights are at hand.

Everything in a folder may have been edited: numbers are bounded before anything is allocated for them, the two JSON
files must agree, and a folder can name weights of known networks but no code.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from archscan import saving
from archscan.errors import BadInput
from archscan.losses import logits_of
from archscan.planner import Plan
from archscan.recipes import MAX_SIDE_PIXELS, Recipe, seeded
from archscan.report.model import SUMMARY_FILE, Report, read_report
from archscan.sources import Preprocessing, Subject, WeightsInfo, open_subject

_INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")
_CROP_MODES = ("center", "squash", "border")
_LARGEST_INPUT = 2**28
"""Numbers in one input that a folder may ask for: 8192 x 8192 pixels of four channels."""

_FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, IndexError)


def is_saved(name: str) -> bool:
    """Say whether a name is that of a saved folder."""
    return (Path(name) / saving.PLAN).is_file()


def read_result(folder: Path) -> tuple[Report, Recipe | None, tuple[Plan, ...]]:
    """Read the numbers of a saved folder, its recipe, and its plans, without building anything.

    Raises:
        BadInput: A file is missing or damaged, or the two disagree.
    """
    if folder.is_file():
        raise BadInput(f"{folder} is a file; give a folder that archscan saved (a shell's DIR/*/ names folders only)")
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}; give one that archscan saved")
    report = read_report(folder / SUMMARY_FILE)
    recipe, plans = saving.read_steps(folder)
    plan, after = plans[-1], report.after
    if after is None or (plan.after.macs, plan.after.params) != (after.macs, after.params):
        raise BadInput(
            f"{folder}/{saving.PLAN} and {SUMMARY_FILE} do not tell of the same network; one of them was edited, "
            "so slim it again"
        )
    return report, recipe, plans


def open_saved(folder: Path) -> Subject:
    """Open a saved result as a network to work on.

    Raises:
        BadInput: The folder is damaged or edited, or was not made by the command line.
    """
    report, recipe, plans = read_result(folder)
    model = saving.load(folder)
    assert recipe is not None, "a folder without a recipe does not load"
    preprocessing = _preprocessing(plans[-1].provenance.get("preprocessing"), folder)
    with seeded(0):
        example = torch.randn(1, preprocessing.channels, *preprocessing.input_size)
    classes = _count_classes(model, example, folder)
    info = WeightsInfo("saved", str(folder), f"slimmed from {report.model}")
    if report.weights is not None and report.weights.kind == "random" and not report.history:
        info = WeightsInfo("random", str(folder), f"{folder} was made from random weights, and was not trained since")
    return Subject(model, example, recipe, folder.resolve().name, info, preprocessing, classes)


def open_original(folder: Path) -> nn.Module:
    """Build the dense network that a saved one came from, with its weights.

    Raises:
        BadInput: They were random, came with the model, or are not where they were.
    """
    _, recipe, plans = read_result(folder)
    weights = plans[0].provenance.get("weights")
    kind = weights.get("kind") if isinstance(weights, Mapping) else None
    if (
        recipe is None
        or recipe.source == "file"
        or not isinstance(weights, Mapping)
        or kind in ("given", "saved", None)
    ):
        raise BadInput("its weights came with the model")
    if kind not in ("file", "pretrained"):
        raise BadInput("its weights were random")
    source = str(weights.get("origin")) if kind == "file" else "pretrained"
    size = _preprocessing(plans[0].provenance.get("preprocessing"), folder).input_size
    classes = recipe.kwargs.get("num_classes")
    return open_subject(f"{recipe.source}:{recipe.name}", weights=source, num_classes=classes, input_size=size).model


def _preprocessing(recorded: Any, folder: Path) -> Preprocessing:
    """Read how images are prepared, trusting nothing."""
    names = {"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}
    if not isinstance(recorded, dict) or set(recorded) != names:
        raise BadInput(
            f"{folder} does not say how its images are prepared, since it was saved from Python; use archscan.load"
        )
    size, mean, std = (recorded[name] for name in ("input_size", "mean", "std"))
    sound = (
        _are_numbers(size, 1, MAX_SIDE_PIXELS)
        and all(type(side) is int for side in size)
        and len(size) == 2
        and _are_numbers(mean, -1e6, 1e6)
        and _are_numbers(std, 1e-6, 1e6)
        and len(mean) == len(std)
        and math.prod(size) * len(mean) <= _LARGEST_INPUT
        and _are_numbers([recorded["crop_pct"]], 0.01, 1.0)
        and recorded["interpolation"] in _INTERPOLATIONS
        and recorded["crop_mode"] in _CROP_MODES
    )
    if not sound:
        raise BadInput(f"{folder}/{saving.PLAN} asks for impossible images; it was edited, so slim the network again")
    return Preprocessing(
        (size[0], size[1]),
        tuple(mean),
        tuple(std),
        recorded["interpolation"],
        recorded["crop_pct"],
        recorded["crop_mode"],
    )


def _are_numbers(values: Any, least: float, most: float) -> bool:
    """Say whether this is a list of at least one number, all within bounds."""
    if not isinstance(values, list) or not values:
        return False
    return all(type(value) in (int, float) and least <= value <= most for value in values)


def _count_classes(model: nn.Module, example: torch.Tensor, folder: Path) -> int:
    try:
        with torch.no_grad():
            logits = logits_of(model(example))
    except _FORWARD_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(
            f"the network of {folder} cannot take images of the size in its {saving.PLAN} ({reason}); it was edited"
        ) from error
    if logits.ndim != 2:
        raise BadInput(f"the network of {folder} gives no class scores; use archscan.load")
    return logits.shape[1]
