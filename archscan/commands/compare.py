"""``archscan compare DIR DIR …``: several saved results of one network side by side."""

import argparse
from pathlib import Path

from archscan.arguments import Parser, add_printing, read_printing
from archscan.commands.printing import print_comparison
from archscan.options import CompareOptions


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of ``archscan compare DIR DIR …``."""
    parser = Parser(
        prog="archscan compare",
        allow_abbrev=False,
        description="Put saved results of one network side by side: budgets, criteria, repairs.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders that archscan saved")
    output = parser.add_argument_group("output")
    page = "also write a page that opens offline: widths of every result, accuracy or saliency lost against cost"
    output.add_argument("--output", type=Path, metavar="FILE.html", help=page)
    output.add_argument("--overwrite", action="store_true", help="replace an existing page")
    add_printing(output, "the comparison")
    return parser


def read_options(parsed: argparse.Namespace) -> CompareOptions:
    """Return what ``archscan compare DIR DIR …`` was asked for."""
    return CompareOptions(tuple(parsed.folders), parsed.output, parsed.overwrite, read_printing(parsed))


def run(parsed: argparse.Namespace, command_line: str) -> None:
    """Compare, write the page, and print the tables."""
    options = read_options(parsed)
    from archscan.comparing import compare_command

    print_comparison(compare_command(options), options.output, options.page)
