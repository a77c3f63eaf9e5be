"""Draw what a run printed: a folder's ``summary.json`` → an SVG of the terminal.

The SVG is self-contained: rich's template loads a font from the network, which is left out here, so that the reader's
own monospace font is used. Run it as ``python scripts/picture.py reports/resnet50-flops0.6 --output terminal.svg``.
"""

import argparse
import io
import re
from pathlib import Path

from rich.console import CONSOLE_SVG_FORMAT

from archscan.report.model import SUMMARY_FILE, Report, read_report
from archscan.report.terminal import console, render

FONT_FACE = re.compile(r"@font-face \{\{.*?\}\}\s*", re.DOTALL)


def picture(report: Report, folder: Path, *, width: int, title: str) -> str:
    """Return the terminal's SVG.

    Args:
        report: The numbers.
        folder: Printed as the place of the result.
        width: In columns.
        title: Of the window.
    """
    terminal = console(io.StringIO(), width=width, colour=True)
    terminal.record = True
    terminal.print(render(report, folder))
    template = FONT_FACE.sub("", CONSOLE_SVG_FORMAT)
    return terminal.export_svg(title=title, code_format=template, unique_id="archscan")


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a saved result")
    parser.add_argument("--output", type=Path, required=True, help="the SVG")
    parser.add_argument("--width", type=int, default=100, help="in columns (default: 100)")
    options = parser.parse_args()
    report = read_report(options.folder / SUMMARY_FILE)
    svg = picture(report, options.folder, width=options.width, title=f"archscan {report.model}")
    options.output.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
