"""``archscan show DIR``: print a saved result again."""

import argparse

from archscan.arguments import Parser, add_printing, add_saved, read_printing
from archscan.commands.printing import print_findings, print_report


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of ``archscan show DIR``."""
    parser = Parser(prog="archscan show", allow_abbrev=False, description="Print a saved result again.")
    add_saved(parser)
    printed = add_printing(parser.add_argument_group("output"))
    printed.add_argument("--findings", action="store_true", help="print every finding in full, and nothing else")
    return parser


def run(parsed: argparse.Namespace, command_line: str) -> None:
    """Print the report of a saved result."""
    from archscan import pipeline

    report = pipeline.show_command(parsed.folder)
    if parsed.findings:
        print_findings(report)
    else:
        print_report(report, read_printing(parsed), parsed.folder)
