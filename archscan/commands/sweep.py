"""``archscan sweep MODEL --targets R,R,…``: one scoring, several budgets."""

import argparse

from archscan.arguments import (
    Parser,
    add_data,
    add_model,
    add_output,
    add_printing,
    add_weights,
    parse_ratio,
)
from archscan.commands.export import add_export
from archscan.commands.printing import print_comparison, progress_for
from archscan.commands.slim import add_machine, add_scores, add_widths, read_slim
from archscan.options import BudgetOptions, SweepOptions, TargetKind

KINDS: dict[str, TargetKind] = {"flops": "macs", "params": "params", "latency": "latency", "memory": "memory"}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of ``archscan sweep MODEL``."""
    parser = Parser(
        prog="archscan sweep",
        allow_abbrev=False,
        description="Score the channels of a network once, slim it to several budgets, and compare the results. "
        "Each is saved as soon as it is done.",
    )
    add_weights(add_model(parser))
    budget = parser.add_argument_group("budgets")
    targets = "keep at most these fractions, one result each: 0.9,0.8,0.7"
    budget.add_argument("--targets", type=parse_ratios, required=True, metavar="R,R", help=targets)
    of = "what they are fractions of: the MACs (flops, default), params, latency or memory"
    budget.add_argument("--of", choices=tuple(KINDS), default="flops", help=of)
    add_widths(budget)
    add_data(parser)
    add_scores(parser)
    add_machine(parser)
    output = add_output(parser, "of the results (default: reports/MODEL-sweep)", "replace results in it")
    add_printing(output, "the comparison")
    add_export(output)
    return parser


def parse_ratios(text: str) -> tuple[float, ...]:
    """Read several kept fractions with commas between them."""
    ratios = tuple(parse_ratio(part) for part in text.split(","))
    names = [f"{ratio:g}" for ratio in ratios]
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise argparse.ArgumentTypeError(f"{text!r} asks for {twice} twice")
    if len(ratios) < 2:
        raise argparse.ArgumentTypeError(f"{text} is one budget, which archscan MODEL slims to; give two or more")
    return ratios


def read_options(parsed: argparse.Namespace, command_line: str) -> SweepOptions:
    """Return what ``archscan sweep MODEL`` was asked for.

    Raises:
        BadInput: Where an option would have no effect.
    """
    rules = (parsed.round_to, parsed.min_width, tuple(parsed.protect))
    budget = BudgetOptions(KINDS[parsed.of], parsed.targets[0], *rules)
    return SweepOptions(read_slim(parsed, budget, command_line), parsed.targets)


def run(parsed: argparse.Namespace, command_line: str) -> None:
    """Sweep, and print the comparison."""
    options = read_options(parsed, command_line)
    from archscan.sweeping import sweep_command

    output = options.slim.output
    swept = sweep_command(options, progress_for(output))
    print_comparison(swept.comparison, output, swept.page)
