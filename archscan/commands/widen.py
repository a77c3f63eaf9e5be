"""``archscan widen MODEL``: widen what is too narrow."""

import argparse

from archscan.arguments import (
    Parser,
    add_data,
    add_model,
    add_output,
    add_printing,
    add_protect,
    add_run,
    add_seed,
    add_weights,
    parse_auto_or_count,
    parse_count,
    parse_number,
    parse_ratio,
    read_data,
    read_model,
    read_output,
    read_run,
)
from archscan.commands.export import add_export
from archscan.commands.printing import print_report, progress_for
from archscan.options import DEFAULT_CRITERION, DEFAULT_FIND_AT, BudgetOptions, WidenOptions


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of ``archscan widen MODEL``."""
    parser = Parser(
        prog="archscan widen",
        allow_abbrev=False,
        description="Widen the layers that are too narrow: those that give up no channel under a budget. The wider "
        "network computes what the original does, and is ready to be trained on.",
    )
    add_weights(add_model(parser))
    widths = parser.add_argument_group("widths")
    factor = "new width over old (default: %(default)g)"
    widths.add_argument("--factor", type=parse_factor, default=WidenOptions.factor, metavar="F", help=factor)
    keep = "slim the other layers until the network costs no more MACs than before"
    widths.add_argument("--keep-flops", action="store_true", help=keep)
    find = "kept fraction of the MACs at which bottlenecks are looked for (default: %(default)g)"
    widths.add_argument("--find-at", type=parse_ratio, default=DEFAULT_FIND_AT, metavar="R", help=find)
    only = "widen these groups (archscan scan lists them) instead of the bottlenecks"
    widths.add_argument("--only", nargs="+", action="extend", default=[], metavar="PATTERN", help=only)
    rounding = "widths of the layers that pay, in multiples of N (default: auto)"
    widths.add_argument("--round-to", type=parse_auto_or_count, metavar="N", help=rounding)
    floor = "leave none of them fewer channels (default: auto)"
    widths.add_argument("--min-width", type=parse_count, metavar="N", help=floor)
    add_protect(widths)
    add_data(parser)
    scores = parser.add_argument_group("scores and repair")
    named = f"one that archscan criteria lists, or a+b for the mean of ranks (default: {DEFAULT_CRITERION})"
    scores.add_argument("--criterion", metavar="NAME", help=named)
    recover = "repair after --keep-flops: none, or BatchNorm statistics (bn, the default where data are real)"
    scores.add_argument("--recover", choices=("none", "bn"), help=recover)
    add_seed(add_run(parser))
    output = add_output(parser, "of the result (default: reports/MODEL-wideF)")
    add_printing(output)
    add_export(output)
    return parser


def parse_factor(text: str) -> float:
    """Read a number above 1."""
    factor = parse_number(text)
    if factor <= 1:
        raise argparse.ArgumentTypeError(f"{text} makes nothing wider; 2 doubles")
    return factor


def read_options(parsed: argparse.Namespace, command_line: str) -> WidenOptions:
    """Return what ``archscan widen MODEL`` was asked for."""
    return WidenOptions(
        model=read_model(parsed),
        budget=BudgetOptions("macs", parsed.find_at, parsed.round_to, parsed.min_width, tuple(parsed.protect)),
        data=read_data(parsed),
        run=read_run(parsed),
        output=read_output(parsed),
        criterion=parsed.criterion,
        factor=parsed.factor,
        keep_flops=parsed.keep_flops,
        only=tuple(parsed.only),
        recover=parsed.recover,
        exports=parsed.export,
        command_line=command_line,
    )


def run(parsed: argparse.Namespace, command_line: str) -> None:
    """Widen, save, and print the report."""
    options = read_options(parsed, command_line)
    from archscan.widening.command import widen_command

    saved = widen_command(options, progress_for(options.output))
    print_report(saved.report, options.output, saved.folder)
