"""``archscan criteria``: what channels can be scored by."""

import argparse
import json
import sys
from dataclasses import asdict

from archscan.arguments import Parser


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of ``archscan criteria``."""
    description = "List the criteria that channels can be scored by: formula, needs, cost, source, advice."
    parser = Parser(prog="archscan criteria", allow_abbrev=False, description=description)
    parser.add_argument("--json", action="store_true", help="print the table as JSON and nothing else")
    return parser


def run(parsed: argparse.Namespace, command_line: str) -> None:
    """Print the table."""
    from archscan.criteria import criteria_table
    from archscan.report.criteria import render_criteria
    from archscan.report.terminal import console, show

    if parsed.json:
        rows = [asdict(row) for row in criteria_table()]
        sys.stdout.write(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    else:
        show(render_criteria(), console(sys.stdout))
