"""``archscan MODEL``: slim a network to a budget."""

import argparse
import shlex
from dataclasses import replace
from typing import get_args

from archscan.arguments import (
    Parser,
    Version,
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
    parse_ratio,
    read_data,
    read_model,
    read_output,
    read_run,
)
from archscan.commands.export import add_export
from archscan.commands.printing import print_report, progress_for
from archscan.errors import BadInput, is_first, said_once
from archscan.options import (
    DEFAULT_CRITERION,
    DEFAULT_ROUNDS,
    LEAST_SQUARES_CRITERION,
    BudgetOptions,
    Recovery,
    SlimOptions,
    TargetKind,
)

TARGETS = {
    "flops": "keep at most this fraction of the MACs: 0.6",
    "params": "keep at most this fraction of the parameters",
    "latency": "take this fraction of the time, measured here",
    "memory": "keep at most this fraction of the peak activation memory",
}

LATENCY_BATCH = 1

EXAMPLES = """
examples:
  archscan resnet50 --target-flops 0.6 --data images/
                                 keep 60% of the MACs, scored on your images
  archscan resnet50 --target-latency 0.6 --latency-batch 16
                                 take 60% of the time on this machine
  archscan widen resnet50 --data images/ --keep-flops
                                 widen what is too narrow, at the same MACs
  archscan sweep resnet50 --targets 0.9,0.7,0.5 --data images/
                                 several budgets from one scoring, compared
  archscan compare reports/a reports/b --output compare.html
                                 saved results side by side
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
        usage="archscan MODEL --target-{flops,params,latency,memory} R [options]\n"
        "       archscan MODEL --lossless [options]\n"
        "       archscan widen MODEL [--keep-flops] [options]\n"
        "       archscan sweep MODEL --targets R,R [options] | compare DIR DIR\n"
        "       archscan scan MODEL | list [PATTERN] | show DIR | criteria\n"
        "       archscan audit MODEL --data D | evaluate DIR --data D\n"
        "       archscan finetune DIR --data D | export DIR --format F",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    add_weights(add_model(parser))
    budget = parser.add_argument_group("budget (of several targets, all are met)")
    for name, words in TARGETS.items():
        budget.add_argument(f"--target-{name}", type=parse_ratio, metavar="R", help=words)
    lossless = "remove the channels that change no output, whatever the input, and nothing else; in place of a target"
    budget.add_argument("--lossless", action="store_true", help=lossless)
    add_widths(budget)
    add_data(parser)
    add_scores(parser)
    add_machine(parser)
    output = add_output(parser, "of the result (default: reports/MODEL-flopsR)")
    add_printing(output)
    add_export(output)
    return parser


def add_widths(group: argparse._ArgumentGroup) -> None:
    """Add which widths are allowed."""
    rounding = "widths in multiples of N (default: auto)"
    group.add_argument("--round-to", type=parse_auto_or_count, metavar="N", help=rounding)
    floor = "leave no group fewer channels (default: auto)"
    group.add_argument("--min-width", type=parse_count, metavar="N", help=floor)
    add_protect(group)


def add_scores(parser: argparse.ArgumentParser) -> None:
    """Add how channels are scored and what is repaired."""
    scores = parser.add_argument_group("scores and repair")
    named = (
        "one that archscan criteria lists, a+b for the mean of ranks, or auto, which audits some on your images "
        f"(default: {DEFAULT_CRITERION}, and {LEAST_SQUARES_CRITERION} before ls and blocks)"
    )
    scores.add_argument("--criterion", metavar="NAME", help=named)
    recover = (
        "repair after slimming: none, BatchNorm statistics (bn), mean outputs (bias), weights by least squares (ls), "
        "or these and then block by block (blocks, the default where data are real)"
    )
    rounds = "slim in N steps, each repaired, and scored anew before the next (default: %(default)s)"
    scores.add_argument("--rounds", type=parse_count, default=DEFAULT_ROUNDS, metavar="N", help=rounds)
    effects = "what a set of channels costs: the sum of their saliencies (default), or what their interactions say"
    scores.add_argument("--set-effects", choices=("additive", "quadratic"), default="additive", help=effects)
    scores.add_argument("--recover", choices=get_args(Recovery), help=recover)
    epochs = "after every round, train so many epochs on --data, taught by the dense original (default: no training)"
    scores.add_argument("--finetune-epochs", type=parse_count, metavar="N", help=epochs)
    samples = "images of --data to train on (default: all)"
    scores.add_argument("--finetune-samples", type=parse_count, metavar="N", help=samples)


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add where to compute, the seed, and whether to measure time."""
    machine = add_run(parser)
    add_seed(machine)
    machine.add_argument("--latency", action="store_true", help="measure the time before and after")
    batch = f"images per forward pass of which the time is measured (default: {LATENCY_BATCH})"
    machine.add_argument("--latency-batch", type=parse_count, metavar="N", help=batch)
    last = "measure the time with channels_last weights and images"
    machine.add_argument("--channels-last", action="store_true", help=last)


def read_options(parsed: argparse.Namespace, command_line: str) -> SlimOptions:
    """Return what ``archscan MODEL`` was asked for.

    Raises:
        BadInput: Where there is no target, or an option would have no effect.
    """
    return read_slim(parsed, _budget(parsed), command_line)


def read_slim(parsed: argparse.Namespace, budget: BudgetOptions, command_line: str) -> SlimOptions:
    """Return a slimming to a budget, with all that `add_scores`, `add_machine` and the shared groups were given.

    Raises:
        BadInput: Where an option would have no effect.
    """
    on_time = "latency" in (budget.kind, *(kind for kind, _ in budget.also))
    return SlimOptions(
        model=read_model(parsed),
        budget=budget,
        data=read_data(parsed),
        run=read_run(parsed),
        output=read_output(parsed),
        criterion=parsed.criterion,
        recover=parsed.recover,
        rounds=parsed.rounds,
        set_effects=parsed.set_effects,
        exports=parsed.export,
        command_line=command_line,
        latency_batch=_latency_batch(parsed, on_time=on_time),
        channels_last=parsed.channels_last,
        finetune_epochs=parsed.finetune_epochs,
        finetune_samples=parsed.finetune_samples,
    )


def run(parsed: argparse.Namespace, command_line: str) -> None:
    """Slim, save, and print the report; under ``torchrun`` the first process prints."""
    with said_once():
        options = read_options(parsed, command_line)
    if parsed.lossless:
        from archscan.lossless.command import lossless_command as command
    else:
        from archscan.pipeline import slim_command as command

    shown = options.output if is_first() else replace(options.output, quiet=True)
    saved = command(options, progress_for(shown))
    if is_first():
        print_report(saved.report, options.output, saved.folder)


def _budget(parsed: argparse.Namespace) -> BudgetOptions:
    targets: dict[TargetKind, float | None] = {
        "macs": parsed.target_flops,
        "params": parsed.target_params,
        "latency": parsed.target_latency,
        "memory": parsed.target_memory,
    }
    given = [(kind, ratio) for kind, ratio in targets.items() if ratio is not None]
    if parsed.lossless:
        _require_no_effect(parsed, bool(given))
        return BudgetOptions("macs", 1.0, parsed.round_to or 1, parsed.min_width, tuple(parsed.protect))
    if not given:
        raise BadInput(
            "no target was given; add one, such as --target-flops 0.6 to keep 60% of the MACs, "
            f"or analyse without slimming: archscan scan {shlex.quote(parsed.model)}"
        )
    (kind, ratio), *also = given
    return BudgetOptions(kind, ratio, parsed.round_to, parsed.min_width, tuple(parsed.protect), tuple(also))


def _require_no_effect(parsed: argparse.Namespace, has_target: bool) -> None:
    """Refuse what has no effect where only dead channels go.

    Raises:
        BadInput: Something was given that would have none.
    """
    given = {
        "a target": has_target,
        "--criterion": parsed.criterion is not None,
        "--recover": parsed.recover not in (None, "none"),
        "--rounds": parsed.rounds != DEFAULT_ROUNDS,
        "--set-effects": parsed.set_effects != "additive",
        "--finetune-epochs": parsed.finetune_epochs is not None,
        "--finetune-samples": parsed.finetune_samples is not None,
        "--latency": parsed.latency or parsed.latency_batch is not None or parsed.channels_last,
    }
    if named := [name for name, is_given in given.items() if is_given]:
        raise BadInput(f"--lossless removes what changes no output and nothing else; leave out {named[0]}")


def _latency_batch(parsed: argparse.Namespace, *, on_time: bool) -> int | None:
    if parsed.latency or on_time:
        return parsed.latency_batch or LATENCY_BATCH
    if parsed.latency_batch is not None or parsed.channels_last:
        named = "--channels-last" if parsed.latency_batch is None else "--latency-batch"
        raise BadInput(f"{named} has no effect where no time is measured; add --latency, or a target on time")
    return None
