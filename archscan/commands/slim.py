"""``archscan MODEL``: slim a network to a budget."""

import argparse
import shlex
from dataclasses import replace

from archscan.arguments import (
    Parser,
    Version,
    add_data,
    add_model,
    add_output,
    add_protect,
    add_run,
    parse_auto_or_count,
    parse_count,
    parse_ratio,
    parse_whole,
)
from archscan.commands.export import add_export
from archscan.commands.printing import print_report, progress_for
from archscan.errors import BadInput, is_first, said_once
from archscan.options import (
    DEFAULT_CRITERION,
    DEFAULT_ROUNDS,
    LEAST_SQUARES_CRITERION,
    BudgetOptions,
    DataOptions,
    ModelOptions,
    OutputOptions,
    RunOptions,
    SlimOptions,
)

EXAMPLES = """
examples:
  archscan resnet50 --target-flops 0.6 --data images/
                                 keep 60% of the MACs, scored on your images
  archscan scan resnet50         costs and channel groups; nothing is slimmed
  archscan list 'resnet*'        networks that can be opened
  archscan show reports/resnet50-flops0.6
                                 print a saved result again
  archscan evaluate reports/resnet50-flops0.6 --data images/
  archscan finetune reports/resnet50-flops0.6 --data images/
  archscan export reports/resnet50-flops0.6 --format onnx
  archscan criteria              what can score channels, and when to use it
  archscan audit resnet50 --data images/
                                 which criterion is right about this network

One MAC is one FLOP here. Each command has its own help: archscan scan --help.
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of ``archscan MODEL``."""
    parser = Parser(
        prog="archscan",
        allow_abbrev=False,
        description="Find what bottlenecks a CNN, slim it to a budget, and prove the slim network.",
        usage="archscan MODEL (--target-flops R | --target-params R) [options]\n"
        "       archscan scan MODEL | list [PATTERN] | show DIR | criteria\n"
        "       archscan audit MODEL --data D | evaluate DIR --data D\n"
        "       archscan finetune DIR --data D | export DIR --format F",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    model = add_model(parser)
    model.add_argument("--weights", default="auto", metavar="W", help="auto (default), pretrained, random, or a FILE")
    budget = parser.add_argument_group("budget")
    budget.add_argument(
        "--target-flops", type=parse_ratio, metavar="R", help="keep at most this fraction of the MACs: 0.6"
    )
    budget.add_argument(
        "--target-params", type=parse_ratio, metavar="R", help="keep at most this fraction of the parameters"
    )
    budget.add_argument(
        "--round-to", type=parse_auto_or_count, metavar="N", help="widths in multiples of N (default: auto)"
    )
    budget.add_argument(
        "--min-width", type=parse_count, metavar="N", help="leave no group fewer channels (default: auto)"
    )
    add_protect(budget)
    add_data(parser)
    scores = parser.add_argument_group("scores and repair")
    named = (
        "one that archscan criteria lists, a+b for the mean of ranks, or auto, which audits some on your images "
        f"(default: {DEFAULT_CRITERION}, and {LEAST_SQUARES_CRITERION} before ls)"
    )
    scores.add_argument("--criterion", metavar="NAME", help=named)
    recover = (
        "repair after slimming: none, BatchNorm statistics (bn), mean outputs (bias), or weights by least squares "
        "(ls, the default for networks with BatchNorm where data are real)"
    )
    rounds = "slim in N steps, each repaired, and scored anew before the next (default: %(default)s)"
    scores.add_argument("--rounds", type=parse_count, default=DEFAULT_ROUNDS, metavar="N", help=rounds)
    effects = "what a set of channels costs: the sum of their saliencies (default), or what their interactions say"
    scores.add_argument("--set-effects", choices=("additive", "quadratic"), default="additive", help=effects)
    scores.add_argument("--recover", choices=("none", "bn", "bias", "ls"), help=recover)
    machine = add_run(parser)
    machine.add_argument("--seed", type=parse_whole, default=0, metavar="N", help="of everything random (default: 0)")
    add_export(add_output(parser, folder=True))
    return parser


def read_options(parsed: argparse.Namespace, command_line: str) -> SlimOptions:
    """Return what ``archscan MODEL`` was asked for.

    Raises:
        BadInput: Where there is not exactly one target.
    """
    return SlimOptions(
        model=ModelOptions(parsed.model, parsed.weights, parsed.input_size, parsed.num_classes),
        budget=_budget(parsed),
        data=DataOptions(parsed.data, parsed.samples, parsed.eval_data, parsed.batch_size, parsed.mean, parsed.std),
        run=RunOptions(parsed.device, parsed.threads, parsed.seed),
        output=OutputOptions(parsed.output, parsed.overwrite, parsed.json, parsed.quiet),
        criterion=parsed.criterion,
        recover=parsed.recover,
        rounds=parsed.rounds,
        set_effects=parsed.set_effects,
        exports=parsed.export,
        command_line=command_line,
    )


def run(parsed: argparse.Namespace, command_line: str) -> None:
    """Slim, save, and print the report; under ``torchrun`` the first process prints."""
    with said_once():
        options = read_options(parsed, command_line)
    from archscan import pipeline

    shown = options.output if is_first() else replace(options.output, quiet=True)
    saved = pipeline.slim_command(options, progress_for(shown))
    if is_first():
        print_report(saved.report, options.output, saved.folder)


def _budget(parsed: argparse.Namespace) -> BudgetOptions:
    flops, params = parsed.target_flops, parsed.target_params
    if flops is not None and params is not None:
        raise BadInput("--target-flops and --target-params were both given; give one target.")
    rules = (parsed.round_to, parsed.min_width, tuple(parsed.protect))
    if flops is not None:
        return BudgetOptions("macs", flops, *rules)
    if params is not None:
        return BudgetOptions("params", params, *rules)
    raise BadInput(
        "no target was given; add one, such as --target-flops 0.6 to keep 60% of the MACs, "
        f"or analyse without slimming: archscan scan {shlex.quote(parsed.model)}"
    )
