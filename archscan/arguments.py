"""The arguments of every command: text → parsed namespace → frozen options.

Only the standard library is imported, so that ``--help`` and a mistyped option answer at once. The decision that is not
obvious: names of models and criteria are not checked here, since that would import torch; the pipeline checks them.
"""

import argparse
import math
import shlex
from pathlib import Path
from typing import NoReturn

from archscan.errors import BadInput
from archscan.options import (
    DEFAULT_CRITERION,
    REAL_SAMPLES,
    SYNTHETIC_SAMPLES,
    BudgetOptions,
    DataOptions,
    EvaluateOptions,
    ModelOptions,
    OutputOptions,
    RunOptions,
    ScanOptions,
    SlimOptions,
)

CRITERIA_HELP = "random, magnitude, bn-scale, taylor-fo, taylor-abs, taylor-so, obd, sosp-i, sosp-h"

MOST_THREADS = 1024
"""OpenMP crashes the process when it cannot start as many threads as it was told to."""

EXAMPLES = """
examples:
  archscan resnet50 --target-flops 0.6 --data images/
                                 keep 60% of the MACs, scored on your images
  archscan scan resnet50         costs and channel groups; nothing is slimmed
  archscan list 'resnet*'        networks that can be opened
  archscan show reports/resnet50-flops0.6
                                 print a saved result again
  archscan evaluate reports/resnet50-flops0.6 --data images/

One MAC is one FLOP here. Each command has its own help: archscan scan --help.
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, raised as the refusal that every other stage raises."""

    def error(self, message: str) -> NoReturn:
        """Refuse.

        Raises:
            BadInput: Always.
        """
        raise BadInput(f"{message[0].lower()}{message[1:]} (see {self.prog} --help)")


class _Version(argparse.Action):
    """Print the version, which is looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from archscan.report.model import installed_version

        print(f"archscan {installed_version()}")
        parser.exit()


def slim_parser() -> argparse.ArgumentParser:
    """Return the parser of ``archscan MODEL``."""
    parser = _Parser(
        prog="archscan",
        allow_abbrev=False,
        description="Find what bottlenecks a CNN, slim it to a budget, and prove the slim network.",
        usage="archscan MODEL (--target-flops R | --target-params R) [options]\n"
        "       archscan scan MODEL | list [PATTERN] | show DIR | evaluate DIR --data D",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    model = _add_model(parser)
    model.add_argument("--weights", default="auto", metavar="W", help="auto (default), pretrained, random, or a FILE")
    budget = parser.add_argument_group("budget")
    budget.add_argument("--target-flops", type=_ratio, metavar="R", help="keep at most this fraction of the MACs: 0.6")
    budget.add_argument(
        "--target-params", type=_ratio, metavar="R", help="keep at most this fraction of the parameters"
    )
    budget.add_argument("--round-to", type=_auto_or_count, metavar="N", help="widths in multiples of N (default: auto)")
    budget.add_argument("--min-width", type=_count, metavar="N", help="leave no group fewer channels (default: auto)")
    _add_protect(budget)
    _add_data(parser)
    scores = parser.add_argument_group("scores and repair")
    scores.add_argument(
        "--criterion", default=DEFAULT_CRITERION, metavar="NAME", help=f"{CRITERIA_HELP} (default: %(default)s)"
    )
    recover = (
        "repair after slimming: none, BatchNorm statistics (bn), mean outputs (bias), or weights by least squares "
        "(ls, the default for networks with BatchNorm where data are real)"
    )
    scores.add_argument("--recover", choices=("none", "bn", "bias", "ls"), help=recover)
    run = _add_run(parser)
    run.add_argument("--seed", type=_whole, default=0, metavar="N", help="of everything random (default: 0)")
    _add_output(parser, folder=True)
    return parser


def scan_parser() -> argparse.ArgumentParser:
    """Return the parser of ``archscan scan MODEL``."""
    description = "Analyse costs, channel groups and coupling; slim nothing."
    parser = _Parser(prog="archscan scan", allow_abbrev=False, description=description)
    _add_protect(_add_model(parser))
    _add_output(parser)
    return parser


def list_parser() -> argparse.ArgumentParser:
    """Return the parser of ``archscan list [PATTERN]``."""
    parser = _Parser(prog="archscan list", allow_abbrev=False, description="List the networks that archscan can open.")
    parser.add_argument("pattern", nargs="?", metavar="PATTERN", help="a shell pattern such as 'resnet*'")
    return parser


def show_parser() -> argparse.ArgumentParser:
    """Return the parser of ``archscan show DIR``."""
    parser = _Parser(prog="archscan show", allow_abbrev=False, description="Print a saved result again.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that archscan saved")
    _add_output(parser)
    return parser


def evaluate_parser() -> argparse.ArgumentParser:
    """Return the parser of ``archscan evaluate DIR --data DATA``."""
    parser = _Parser(
        prog="archscan evaluate",
        allow_abbrev=False,
        description="Measure a saved result's accuracy, and the dense original's where its weights are at hand.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that archscan saved")
    parser.add_argument("--data", required=True, metavar="DATA", help="images with labels: a DIR, a ZIP, or digits")
    parser.add_argument("--samples", type=_count, metavar="N", help="use at most so many images (default: all)")
    _add_batch_size(parser, EvaluateOptions.batch_size)
    _add_run(parser)
    _add_output(parser)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("model")
    model = "a timm, torchvision or reference name, path/to/file.py:factory, or a saved folder"
    group.add_argument("model", metavar="MODEL", help=model)
    group.add_argument("--input-size", type=_size, metavar="N|H,W", help="in pixels (default: the network's own)")
    classes = "width of the classifier (default: the network's own)"
    group.add_argument("--num-classes", type=_count, metavar="N", help=classes)
    return group


def _add_protect(group: argparse._ArgumentGroup) -> None:
    words = "layers that keep their width: 'layer4.*'"
    group.add_argument("--protect", nargs="+", action="extend", default=[], metavar="PATTERN", help=words)


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    default = DataOptions()
    source = "a DIR or ZIP of images, one folder per class; digits; or synthetic (default)"
    group.add_argument("--data", default=default.source, metavar="DATA", help=source)
    samples = f"images to score on (default: {REAL_SAMPLES}, or {SYNTHETIC_SAMPLES} synthetic ones)"
    group.add_argument("--samples", type=_count, default=default.samples, metavar="N", help=samples)
    group.add_argument("--eval-data", metavar="DATA", help="images to measure accuracy on: a DIR, a ZIP, or digits")
    _add_batch_size(group, default.batch_size)
    scale = "per channel, on the scale 0 to 1 (default: the network's)"
    group.add_argument("--mean", type=_numbers, metavar="A,B,C", help=scale)
    group.add_argument("--std", type=_positive_numbers, metavar="A,B,C", help=scale)


def _add_batch_size(group: argparse._ActionsContainer, default: int) -> None:
    words = "images per forward pass (default: %(default)s)"
    group.add_argument("--batch-size", type=_count, default=default, metavar="N", help=words)


def _add_run(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("run")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    group.add_argument("--threads", type=_thread_count, metavar="N", help="CPU threads (default: torch's choice)")
    return group


def _add_output(parser: argparse.ArgumentParser, *, folder: bool = False) -> None:
    group = parser.add_argument_group("output")
    if folder:
        group.add_argument("--output", type=Path, metavar="DIR", help="of the result (default: reports/MODEL-flopsR)")
        group.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    printed = group.add_mutually_exclusive_group()
    printed.add_argument("--json", action="store_true", help="print the summary as JSON and nothing else")
    printed.add_argument("--quiet", action="store_true", help="print the verdict only")


# -------------------------------------------------------------- values


def _ratio(text: str) -> float:
    ratio = _number(text)
    if not 0 < ratio <= 1:
        hint = f"; {ratio:g}% is written {ratio / 100:g}" if 1 < ratio < 100 else ""
        raise argparse.ArgumentTypeError(f"{text} is not a kept fraction above 0 and at most 1 (0.6 keeps 60%){hint}")
    return ratio


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _count(text: str) -> int:
    number = _whole(text)
    if number == 0:
        raise argparse.ArgumentTypeError("0 is too few; at least 1 is needed")
    return number


def _thread_count(text: str) -> int:
    number = _count(text)
    if number > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{number} threads are more than any machine has use for")
    return number


def _auto_or_count(text: str) -> int | None:
    return None if text == "auto" else _count(text)


def _size(text: str) -> tuple[int, int]:
    sides = [_count(side) for side in text.split(",")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is neither one side N nor H,W")
    return sides[0], sides[-1]


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_number(part) for part in text.split(","))


def _positive_numbers(text: str) -> tuple[float, ...]:
    numbers = _numbers(text)
    if min(numbers) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} holds a number that is not above 0")
    return numbers


# -------------------------------------------------------------- options


def slim_options(parsed: argparse.Namespace, command_line: str = "") -> SlimOptions:
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
        command_line=command_line,
    )


def scan_options(parsed: argparse.Namespace, command_line: str = "") -> ScanOptions:
    """Return what ``archscan scan MODEL`` was asked for."""
    model = ModelOptions(parsed.model, "random", parsed.input_size, parsed.num_classes)
    return ScanOptions(model, tuple(parsed.protect), printing(parsed), command_line)


def evaluate_options(parsed: argparse.Namespace, command_line: str = "") -> EvaluateOptions:
    """Return what ``archscan evaluate DIR --data DATA`` was asked for."""
    return EvaluateOptions(
        folder=parsed.folder,
        source=parsed.data,
        samples=parsed.samples,
        batch_size=parsed.batch_size,
        run=RunOptions(parsed.device, parsed.threads),
        output=printing(parsed),
        command_line=command_line,
    )


def printing(parsed: argparse.Namespace) -> OutputOptions:
    """Return how to print, for the commands that save nothing."""
    return OutputOptions(json=parsed.json, quiet=parsed.quiet)


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
