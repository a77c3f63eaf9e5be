"""``archscan export DIR --format F``: a saved result in formats that run without archscan."""

import argparse
import json
import sys
from dataclasses import asdict

from archscan.arguments import Parser, add_output, add_printing, add_saved, parse_count, read_printing
from archscan.commands.printing import progress_for

FORMATS = ("onnx", "pt2", "script")
"""The names in `archscan.exporters.FORMATS`, which takes torch to import."""


def parse_formats(text: str) -> tuple[str, ...]:
    """Read names of formats with commas between them."""
    names = tuple(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no export format; choose from {', '.join(FORMATS)}")
    return names


def parse_batch(text: str) -> int | None:
    """Read a number of samples, or ``dynamic``, which is None."""
    return None if text == "dynamic" else parse_count(text)


def add_export(parser: argparse._ActionsContainer) -> None:
    """Add ``--export`` to a command that saves a result."""
    words = "also write these formats, each run and compared: onnx, pt2, script (with commas between)"
    parser.add_argument("--export", type=parse_formats, default=(), metavar="F", help=words)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of ``archscan export DIR --format F``."""
    parser = Parser(
        prog="archscan export",
        allow_abbrev=False,
        description="Write a saved network as ONNX, as a torch.export program, or as TorchScript; run each file beside "
        "PyTorch; and write the architecture, layer by layer, before and after.",
    )
    add_saved(parser)
    formats = "onnx, pt2 (torch.export), script (TorchScript), with commas between"
    parser.add_argument("--format", type=parse_formats, required=True, metavar="F", help=formats)
    batch = "samples per batch that the files take; dynamic (default) is any number"
    parser.add_argument("--batch", type=parse_batch, default=None, metavar="N", help=batch)
    parser.add_argument("--opset", type=parse_count, metavar="N", help="ONNX opset (default: PyTorch's own)")
    output = add_output(parser, "of the files (default: the saved folder itself)", "replace existing files")
    add_printing(output, "what was exported", "one line only")
    return parser


def run(parsed: argparse.Namespace, command_line: str) -> None:
    """Export, and print what was written."""
    from archscan.exporters import ExportSettings, export_saved
    from archscan.report.exports import render_exports, render_exports_short
    from archscan.report.terminal import console, show

    output = read_printing(parsed)
    settings = ExportSettings(parsed.batch, parsed.opset, parsed.overwrite)
    exports = export_saved(parsed.folder, parsed.format, parsed.output, settings, progress_for(output))
    where = parsed.output or parsed.folder
    if output.json:
        sys.stdout.write(json.dumps([asdict(entry) for entry in exports], indent=2) + "\n")
    else:
        show((render_exports_short if output.quiet else render_exports)(exports, where), console(sys.stdout))
