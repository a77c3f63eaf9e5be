"""What the arguments of the commands share: parser, groups of options, and values (text → checked value).

Only the standard library is imported, so that ``--help`` and a mistyped option answer at once. The decision that is not
obvious: names of models and criteria are not checked here, since that would import torch; the pipeline checks them.
"""

import argparse
import difflib
import math
import re
from pathlib import Path
from typing import NoReturn

from archscan.errors import BadInput
from archscan.options import (
    REAL_SAMPLES,
    SYNTHETIC_SAMPLES,
    DataOptions,
    ModelOptions,
    OutputOptions,
    RunOptions,
)

MOST_THREADS = 1024
"""OpenMP crashes the process when it cannot start as many threads as it was told to."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, raised as the refusal that every other stage raises."""

    def error(self, message: str) -> NoReturn:
        """Refuse.

        Raises:
            BadInput: Always.
        """
        raise BadInput(f"{message[0].lower()}{message[1:]}{self._near(message)} (see {self.prog} --help)")

    def _near(self, message: str) -> str:
        """Name the options that a mistyped one may mean."""
        typed = re.match(r"unrecognized arguments: (?:.* )?(--[\w-]+)", message)
        if typed is None:
            return ""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        close = [name for name in known if typed[1].lstrip("-") in name.split("-")]  # --flops for --target-flops
        close = close or difflib.get_close_matches(typed[1], known, n=2, cutoff=0.7)
        return f"; did you mean {' or '.join(close[:3])}?" if close else ""


class Version(argparse.Action):
    """Print the version, which is looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print, and end the process."""
        from archscan.report.model import installed_version

        print(f"archscan {installed_version()}")
        parser.exit()


def add_model(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add MODEL and what decides how it is built; return the group."""
    group = parser.add_argument_group("model")
    model = "a timm, torchvision or reference name, path/to/file.py:factory, or a saved folder"
    group.add_argument("model", metavar="MODEL", help=model)
    group.add_argument("--input-size", type=parse_size, metavar="N|H,W", help="in pixels (default: the network's own)")
    classes = "width of the classifier (default: the network's own)"
    group.add_argument("--num-classes", type=parse_count, metavar="N", help=classes)
    return group


def add_weights(group: argparse._ActionsContainer) -> None:
    """Add where the weights of MODEL come from."""
    group.add_argument("--weights", default="auto", metavar="W", help="auto (default), pretrained, random, or a FILE")


def add_saved(parser: argparse.ArgumentParser) -> None:
    """Add DIR, for the commands that work on a saved result."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that archscan saved")


def add_protect(group: argparse._ArgumentGroup) -> None:
    """Add the layers that keep their width."""
    words = "layers that keep their width: 'layer4.*'"
    group.add_argument("--protect", nargs="+", action="extend", default=[], metavar="PATTERN", help=words)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add calibration and evaluation images, and how they are fed."""
    group = parser.add_argument_group("data")
    default = DataOptions()
    source = "a DIR or ZIP of images, one folder per class; digits; or synthetic (default)"
    group.add_argument("--data", default=default.source, metavar="DATA", help=source)
    samples = f"images to score and to repair on (default: {REAL_SAMPLES}, or {SYNTHETIC_SAMPLES} synthetic ones)"
    group.add_argument("--samples", type=parse_count, default=default.samples, metavar="N", help=samples)
    group.add_argument("--eval-data", metavar="DATA", help="images to measure accuracy on: a DIR, a ZIP, or digits")
    add_batch_size(group, default.batch_size)
    add_scale(group)


def add_scale(group: argparse._ActionsContainer) -> None:
    """Add how pixels are scaled."""
    scale = "per channel, on the scale 0 to 1 (default: the network's)"
    group.add_argument("--mean", type=parse_numbers, metavar="A,B,C", help=scale)
    group.add_argument("--std", type=parse_positive_numbers, metavar="A,B,C", help=scale)


def add_batch_size(group: argparse._ActionsContainer, default: int) -> None:
    """Add the number of images per forward pass."""
    words = "images per forward pass (default: %(default)s)"
    group.add_argument("--batch-size", type=parse_count, default=default, metavar="N", help=words)


def add_run(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add device and threads; return the group."""
    group = parser.add_argument_group("run")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    group.add_argument("--threads", type=parse_threads, metavar="N", help="CPU threads (default: torch's choice)")
    return group


def add_seed(group: argparse._ActionsContainer) -> None:
    """Add the seed."""
    group.add_argument("--seed", type=parse_whole, default=0, metavar="N", help="of everything random (default: 0)")


def add_output(
    parser: argparse.ArgumentParser, folder: str, overwrite: str = "replace an existing folder"
) -> argparse._ArgumentGroup:
    """Add where files go; return the group, for `add_printing`.

    Args:
        parser: Of a command that writes files.
        folder: Help of ``--output``.
        overwrite: Help of ``--overwrite``.
    """
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, metavar="DIR", help=folder)
    group.add_argument("--overwrite", action="store_true", help=overwrite)
    return group


def add_printing(
    group: argparse._ActionsContainer, what: str = "the summary", short: str = "the verdict only"
) -> argparse._MutuallyExclusiveGroup:
    """Add in which form to print, of which one is chosen; `what` and `short` are named in the help of them."""
    printed = group.add_mutually_exclusive_group()
    printed.add_argument("--json", action="store_true", help=f"print {what} as JSON and nothing else")
    printed.add_argument("--quiet", action="store_true", help=f"print {short}")
    return printed


# -------------------------------------------------------------- values


def parse_ratio(text: str) -> float:
    """Read a kept fraction in (0, 1]."""
    if text.endswith("%"):
        share = parse_number(text[:-1])
        raise argparse.ArgumentTypeError(f"{text!r} is a percentage; write it as a fraction, {share / 100:g}")
    ratio = parse_number(text)
    if not 0 < ratio <= 1:
        hint = f"; {ratio:g}% is written {ratio / 100:g}" if 2 <= ratio < 100 else ""
        raise argparse.ArgumentTypeError(f"{text} is not a kept fraction above 0 and at most 1 (0.6 keeps 60%){hint}")
    return ratio


def parse_number(text: str) -> float:
    """Read a finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number


def parse_whole(text: str) -> int:
    """Read a whole number from 0 on."""
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def parse_count(text: str) -> int:
    """Read a whole number from 1 on."""
    number = parse_whole(text)
    if number == 0:
        raise argparse.ArgumentTypeError("0 is too few; at least 1 is needed")
    return number


def parse_threads(text: str) -> int:
    """Read a number of threads that a machine can start."""
    number = parse_count(text)
    if number > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{number} threads are more than any machine has use for")
    return number


def parse_auto_or_count(text: str) -> int | None:
    """Read a whole number from 1 on, or ``auto``, which is None."""
    return None if text == "auto" else parse_count(text)


def parse_size(text: str) -> tuple[int, int]:
    """Read N or H,W in pixels."""
    if re.fullmatch(r"\d+[^\d,.]\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is written with a comma: {re.sub('[^0-9]', ',', text)}")
    sides = [parse_count(side) for side in text.split(",")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is neither one side N nor H,W")
    return sides[0], sides[-1]


def parse_numbers(text: str) -> tuple[float, ...]:
    """Read numbers with commas between them."""
    return tuple(parse_number(part) for part in text.split(","))


def parse_positive_numbers(text: str) -> tuple[float, ...]:
    """Read numbers above 0 with commas between them."""
    numbers = parse_numbers(text)
    if min(numbers) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} holds a number that is not above 0")
    return numbers


# -------------------------------------------------------------- options


def read_model(parsed: argparse.Namespace) -> ModelOptions:
    """Return what `add_model` and `add_weights` were given."""
    return ModelOptions(parsed.model, parsed.weights, parsed.input_size, parsed.num_classes)


def read_data(parsed: argparse.Namespace) -> DataOptions:
    """Return what `add_data` was given."""
    return DataOptions(parsed.data, parsed.samples, parsed.eval_data, parsed.batch_size, parsed.mean, parsed.std)


def read_run(parsed: argparse.Namespace) -> RunOptions:
    """Return what `add_run` and `add_seed` were given."""
    return RunOptions(parsed.device, parsed.threads, parsed.seed)


def read_output(parsed: argparse.Namespace) -> OutputOptions:
    """Return what `add_output` and `add_printing` were given."""
    return OutputOptions(parsed.output, parsed.overwrite, parsed.json, parsed.quiet)


def read_printing(parsed: argparse.Namespace) -> OutputOptions:
    """Return what `add_printing` was given, for the commands that save nothing."""
    return OutputOptions(json=parsed.json, quiet=parsed.quiet)
