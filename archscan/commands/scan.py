"""``archscan scan MODEL``: costs, channel groups and coupling; nothing is slimmed."""

import argparse

from archscan.arguments import Parser, add_model, add_printing, add_protect, read_printing
from archscan.commands.printing import print_report, progress_for
from archscan.options import ModelOptions, ScanOptions


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of ``archscan scan MODEL``."""
    description = "Analyse costs, channel groups and coupling; slim nothing."
    parser = Parser(prog="archscan scan", allow_abbrev=False, description=description)
    add_protect(add_model(parser))
    add_printing(parser.add_argument_group("output"))
    return parser


def read_options(parsed: argparse.Namespace, command_line: str) -> ScanOptions:
    """Return what ``archscan scan MODEL`` was asked for."""
    model = ModelOptions(parsed.model, "random", parsed.input_size, parsed.num_classes)
    return ScanOptions(model, tuple(parsed.protect), read_printing(parsed), command_line)


def run(parsed: argparse.Namespace, command_line: str) -> None:
    """Analyse, and print the report."""
    options = read_options(parsed, command_line)
    from archscan import pipeline

    print_report(pipeline.scan_command(options, progress_for(options.output)), options.output)
