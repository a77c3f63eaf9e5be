"""`Exported` → what the terminal shows, by rich."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from archscan.report.drawing import FAINT, TITLE, single_line
from archscan.report.model import Exported


def render_exports(exports: Sequence[Exported], folder: Path) -> RenderableType:
    """Return a table of files: size, parameters, and how far from PyTorch each was."""
    table = Table(box=None, pad_edge=False, header_style=FAINT, padding=(0, 2, 0, 0))
    table.add_column("file", no_wrap=True)
    for header in ("MB", "parameters", "batch", "max abs error"):
        table.add_column(header, justify="right", no_wrap=True)
    for entry in exports:
        table.add_row(
            Text(entry.file),
            f"{entry.file_bytes / 1e6:.2f}",
            f"{entry.parameters:,}",
            "any" if entry.batch_size is None else str(entry.batch_size),
            f"{entry.max_abs_error:.2g}",
        )
    checks = (Text(f"{entry.file}: {_opset(entry)}{entry.checked_by}", style=FAINT) for entry in exports)
    title = Text(f"Exported to {folder}, each file loaded and run beside PyTorch", style=TITLE)
    return Group(title, Text(""), table, Text(""), *checks)


def _opset(entry: Exported) -> str:
    return "" if entry.opset is None else f"opset {entry.opset}, "


def render_exports_short(exports: Sequence[Exported], folder: Path) -> RenderableType:
    """Return one line: what ``--quiet`` prints."""
    worst = max(entry.max_abs_error for entry in exports)
    names = ", ".join(entry.file for entry in exports)
    line = f"exported {names} to {folder}; each was run again, off by at most {worst:.2g}"
    return single_line(line)
