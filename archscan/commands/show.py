"""``archscan show DIR``: print a saved result again."""

import argparse

from archscan.arguments import Parser, add_printing, add_saved, read_printing
from archscan.commands.printing import print_report


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of ``archscan show DIR``."""
    parser = Parser(prog="archscan show", allow_abbrev=False, description="Print a saved result again.")
    add_saved(parser)
    add_printing(parser.add_argument_group("output"))
    return parser


def run(parsed: argparse.Namespace, command_line: str) -> None:
    """Print the report of a saved result."""
    from archscan import pipeline

    print_report(pipeline.show_command(parsed.folder), read_printing(parsed), parsed.folder)
