"""``archscan list [PATTERN]``: the networks that can be opened."""

import argparse
import sys

from archscan.arguments import Parser


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of ``archscan list [PATTERN]``."""
    parser = Parser(prog="archscan list", allow_abbrev=False, description="List the networks that archscan can open.")
    parser.add_argument("pattern", nargs="?", metavar="PATTERN", help="a shell pattern such as 'resnet*'")
    return parser


def run(parsed: argparse.Namespace, command_line: str) -> None:
    """Print one name a line."""
    from archscan import pipeline

    sys.stdout.writelines(f"{name}\n" for name in pipeline.list_command(parsed.pattern))
