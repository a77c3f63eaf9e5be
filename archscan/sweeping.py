"""``archscan sweep MODEL``: options → one folder for each budget, a page that compares them, and the `Comparison`.

The network is opened, scored and evaluated once; each result is what ``archscan MODEL`` would have made of its budget.
The decision that is not obvious: results are written one by one, each whole, and compared as they lie on disk. What an
interrupted sweep left is as good as any other result, and ``archscan compare`` takes it.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from archscan.comparing import check_page, compare_folders, write_page
from archscan.errors import BadInput
from archscan.opening import refusing_bad_files, use_machine
from archscan.options import ProgressFactory, SlimOptions, SweepOptions
from archscan.pipeline import budget_name, slim_and_save
from archscan.processes import Place
from archscan.report.compare import Comparison
from archscan.saved import is_saved
from archscan.sources import Subject

PAGE = "compare.html"


@dataclass(frozen=True)
class Swept:
    """What a sweep made: the comparison of its results, and the page."""

    comparison: Comparison
    page: Path


@refusing_bad_files
def sweep_command(options: SweepOptions, progress: ProgressFactory) -> Swept:
    """Run ``archscan sweep MODEL``: open and score once; for each budget plan, rebuild, prove, repair, measure, save.

    Raises:
        ArchscanError: Something asked for cannot be had; where that is known before the work, nothing is written.
    """
    asked = [_at(options.slim, ratio) for ratio in options.ratios]
    place = Place(use_machine(options.slim.run))
    saved = list(slim_and_save(asked, lambda subject: _folders(subject, asked), place, progress))
    comparison = compare_folders([each.folder for each in saved])
    page = saved[0].folder.parent / PAGE
    write_page(comparison, page)
    return Swept(comparison, page)


def _at(options: SlimOptions, ratio: float) -> SlimOptions:
    return replace(options, budget=replace(options.budget, ratio=ratio))


def _folders(subject: Subject, asked: list[SlimOptions]) -> list[Path]:
    """Lay out the folders of the results, with room for the page."""
    output = asked[0].output
    folder = output.folder or Path("reports") / f"{subject.name}-sweep"
    if is_saved(str(folder)):
        raise BadInput(f"{folder} is a saved result; choose another folder for the results of a sweep")
    check_page(folder / PAGE, overwrite=output.overwrite)
    return [folder / budget_name(options) for options in asked]
