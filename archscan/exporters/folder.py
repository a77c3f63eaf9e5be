"""Exports of a saved result: a folder → networks before and after, files beside them, and the summary that lists them.

Files are written into a folder beside the target and renamed into it one by one when all of them are checked, so that
an interruption leaves no half-written file, and a refusal none at all.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from archscan import recipes, saving
from archscan.errors import BadInput
from archscan.exporters.layers import ARCHITECTURE, list_layers, render_layers
from archscan.exporters.network import DATA_SUFFIX
from archscan.folders import beside, check_place, write_whole
from archscan.rebuild import apply
from archscan.recipes import seeded
from archscan.report.html import render_html
from archscan.report.model import Exported, Report, json_text
from archscan.saved import read_result

_LARGEST_INPUT = 2**28
"""Numbers in one input that a folder may ask for."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A network before and after its last slimming, and the report on it.

    Attributes:
        before: Its architecture; the weights may be anything.
        after: The slim network.
        report: Of that slimming.
    """

    before: nn.Module
    after: nn.Module
    report: Report


def open_pair(folder: Path, original: nn.Module | None) -> Pair:
    """Open a saved result.

    Args:
        folder: What archscan saved.
        original: The architecture with any weights, where the folder has no recipe of it.

    Raises:
        BadInput: A file is missing, damaged or edited, or the architecture is needed.
    """
    report, recipe, _ = read_result(folder)
    steps = saving.read_history(folder, original)
    if original is None:
        assert recipe is not None, "a folder without a recipe has no history without its original"
        original = recipes.build(recipe)
    after = saving.load(folder, original)
    before = original
    for step in steps[:-1]:
        before = apply(before, step.surgery)
    return Pair(before, after, report)


def example_of(report: Report) -> torch.Tensor:
    """Draw one input of the size that a report is about.

    Raises:
        BadInput: The size is none that a network takes.
    """
    shape = report.input_shape
    if not shape or min(shape) < 1 or math.prod(shape) > _LARGEST_INPUT:
        raise BadInput(f"the summary tells of inputs of shape {shape}, which cannot be; pass example_input=")
    with seeded(0):
        return torch.randn(1, *shape)


def check_free(target: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """See, before any work, that files can be written to a folder.

    Raises:
        BadInput: The folder cannot be written to, or has such a file and `overwrite` is not asked for.
    """
    check_place(target, (target, *target.parents))
    for name in names:
        if (target / name).exists() and not overwrite:
            raise BadInput(
                f"{target / name} exists; pass --overwrite (overwrite=True), or choose another output folder"
            )


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give a folder to write into; at the end its files are renamed into the target, after an error none.

    Raises:
        BadInput: The disk refuses.
    """
    with beside(target) as partial:
        yield partial
        target.mkdir(exist_ok=True)
        names = sorted(path.name for path in partial.iterdir())
        for name in reversed(names):  # external data before the file that is of no use without them
            (partial / name).replace(target / name)
            if f"{name}{DATA_SUFFIX}" not in names:
                (target / f"{name}{DATA_SUFFIX}").unlink(missing_ok=True)


def write_architecture(pair: Pair, folder: Path) -> None:
    """Write ``architecture.txt``."""
    text = render_layers(list_layers(pair.before, pair.after, pair.report), pair.report)
    (folder / ARCHITECTURE).write_text(text, encoding="utf-8")


def record(folder: Path, report: Report, exported: Sequence[Exported]) -> Report:
    """Add exports to the summary and the page of a saved result, in place of older ones of the same format.

    Returns:
        The report with the exports in it.

    Raises:
        BadInput: The disk refuses.
    """
    new = {entry.format for entry in exported}
    kept = (entry for entry in report.exports if entry.format not in new)
    changed = replace(report, exports=(*kept, *exported))
    write_whole(folder / saving.SUMMARY, json_text(changed))
    write_whole(folder / saving.REPORT, render_html(changed))
    return changed
