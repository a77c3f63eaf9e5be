"""``archscan show DIR``: print a saved result again."""

import argparse
from pathlib import Path

from archscan.arguments import Parser, add_output, printing
from archscan.commands.printing import print_report


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of ``archscan show DIR``."""
    parser = Parser(prog="archscan show", allow_abbrev=False, description="Print a saved result again.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that archscan saved")
    add_output(parser)
    return parser


def run(parsed: argparse.Namespace, command_line: str) -> None:
    """Print the report of a saved result."""
    from archscan import pipeline

    print_report(pipeline.show_command(parsed.folder), printing(parsed), parsed.folder)
