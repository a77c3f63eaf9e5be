"""``archscan compare DIR DIR …``: saved folders → `Comparison`, and its page.

Only ``plan.json`` and ``summary.json`` are read: no network is built, so that folders from other people, or without
their weights, can be compared. The decision that is not obvious: results are named by as little of their paths as tells
them apart, since ``flops0.6`` says more in a table and beside a line than a path does.
"""

from collections.abc import Sequence
from pathlib import Path

from archscan.errors import BadInput
from archscan.folders import check_place, write_whole
from archscan.opening import refusing_bad_files
from archscan.options import CompareOptions
from archscan.report.compare import Comparison, Given, compare
from archscan.report.compare_html import render_comparison_html
from archscan.saved import read_result


@refusing_bad_files
def compare_command(options: CompareOptions) -> Comparison:
    """Read the results, compare them, and write the page where one is wanted.

    Raises:
        BadInput: A folder is no result, there are fewer than two, they are of different networks, or the page cannot be
            written.
    """
    if options.page is not None:
        check_page(options.page, overwrite=options.overwrite)
    comparison = compare_folders(options.folders)
    if options.page is not None:
        write_page(comparison, options.page)
    return comparison


def compare_folders(folders: Sequence[Path]) -> Comparison:
    """Compare saved results of one network.

    Raises:
        BadInput: See `compare_command`.
    """
    if len(folders) < 2:
        raise BadInput("one result alone cannot be compared; give two or more folders")
    twice = next((folder for place, folder in enumerate(folders) if _is_one_of(folder, folders[:place])), None)
    if twice is not None:
        raise BadInput(f"{twice} is given twice; give each result once")
    given = []
    for name, folder in zip(short_names(folders), folders, strict=True):
        report, _, plans = read_result(folder)
        given.append(Given(name, str(folder), report, plans[-1].provenance))
    return compare(given)


def short_names(folders: Sequence[Path]) -> tuple[str, ...]:
    """Name folders by as many of the last parts of their paths as tell them apart."""
    paths = [folder.resolve() for folder in folders]
    deepest = max(len(path.parts) for path in paths)
    for parts in range(1, deepest + 1):
        names = tuple("/".join(path.parts[-parts:]) for path in paths)
        if len(set(names)) == len(paths):
            break
    return names


def check_page(page: Path, *, overwrite: bool) -> Path:
    """See, before any work, that a page can be written.

    Raises:
        BadInput: It is a folder, exists without `overwrite`, has another ending, or cannot be written.
    """
    page = page.expanduser()
    if page.suffix != ".html":
        raise BadInput(f"{page} does not end in .html; give the page a name such as compare.html")
    if page.is_dir():
        raise BadInput(f"{page} is a folder; give the page a name of its own")
    if page.exists() and not overwrite:
        raise BadInput(f"{page} exists; pass --overwrite, or choose another file")
    parent = page.absolute().parent
    check_place(parent, (parent, *parent.parents))
    return page


def write_page(comparison: Comparison, page: Path) -> None:
    """Write the comparison as one file, in place of the one that is there.

    Raises:
        BadInput: The disk refuses.
    """
    page = page.expanduser()
    page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(page, render_comparison_html(comparison))


def _is_one_of(folder: Path, others: Sequence[Path]) -> bool:
    return any(folder.resolve() == other.resolve() for other in others)
