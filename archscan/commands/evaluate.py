"""``archscan evaluate DIR --data DATA``: accuracy of a saved result, and of the original where it is at hand."""

import argparse

from archscan.arguments import Parser, add_batch_size, add_printing, add_run, add_saved, parse_count, read_printing
from archscan.commands.printing import print_evaluation, progress_for
from archscan.options import EvaluateOptions, RunOptions


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of ``archscan evaluate DIR --data DATA``."""
    parser = Parser(
        prog="archscan evaluate",
        allow_abbrev=False,
        description="Measure a saved result's accuracy, and the dense original's where its weights are at hand.",
    )
    add_saved(parser)
    parser.add_argument("--data", required=True, metavar="DATA", help="images with labels: a DIR, a ZIP, or digits")
    parser.add_argument("--samples", type=parse_count, metavar="N", help="use at most so many images (default: all)")
    add_batch_size(parser, EvaluateOptions.batch_size)
    add_run(parser)
    add_printing(parser.add_argument_group("output"))
    return parser


def read_options(parsed: argparse.Namespace, command_line: str) -> EvaluateOptions:
    """Return what ``archscan evaluate DIR --data DATA`` was asked for."""
    return EvaluateOptions(
        folder=parsed.folder,
        source=parsed.data,
        samples=parsed.samples,
        batch_size=parsed.batch_size,
        run=RunOptions(parsed.device, parsed.threads),
        output=read_printing(parsed),
        command_line=command_line,
    )


def run(parsed: argparse.Namespace, command_line: str) -> None:
    """Measure, and print the accuracy."""
    options = read_options(parsed, command_line)
    from archscan import pipeline

    print_evaluation(pipeline.evaluate_command(options, progress_for(options.output)), options.output)
