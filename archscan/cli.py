"""The command line: arguments → one function of the pipeline → printed report and exit code.

No logic lives here. Everything heavy is imported inside the handlers. ``archscan MODEL`` is the default command: a
first argument that is no command's name starts a slimming. Under ``torchrun`` slimming and fine-tuning have use for
all processes; the first one alone does what else there is.
"""

import difflib
import os
import shlex
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence

from archscan.commands import audit, compare, criteria, evaluate, export, finetune, scan, show, slim, sweep, widen
from archscan.commands import list as list_networks
from archscan.errors import ArchscanError, BadInput, OtherEnded, is_first, said_once

EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; those of the process by default.

    Returns:
        The exit code: 0 done, 2 bad input, 3 verification failed, 130 interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if many:
        signal.signal(signal.SIGTERM, _on_end)
    try:
        _dispatch(arguments)
        sys.stdout.flush()
        return 0
    except ArchscanError as error:
        if many:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if is_first() or not isinstance(error, OtherEnded):
            print(f"archscan: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        if is_first():
            print(f"archscan: {str(error) or 'interrupted'}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`head`, a closed pager) has all that it wanted; what Python flushes at exit must go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _on_end(_signal: int, _frame: object) -> None:
    """End as when interrupted, so that nothing is left half-written; further signals would end that too."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt("ended from outside, as torchrun does when another process of the run ended")


def _dispatch(typed: Sequence[str]) -> None:
    typed = ["--help"] if list(typed) == ["help"] else typed
    command = typed[0] if typed and typed[0] in COMMANDS else None
    if command not in (None, "finetune") and not is_first():
        return
    make_parser, handler = COMMANDS[command] if command else (slim.make_parser, slim.run)
    parser, arguments = make_parser(), typed[1:] if command else typed
    command_line = shlex.join(("archscan", *typed))
    try:
        with said_once():
            parsed = parser.parse_args(arguments)
    except SystemExit:  # how argparse ends --help and --version
        return
    except BadInput as error:
        remedy = None if command else _mistaken_command(typed)
        if remedy is None:
            raise
        raise BadInput(remedy) from error
    handler(parsed, command_line)


def _mistaken_command(typed: Sequence[str]) -> str | None:
    """Say what was meant where the arguments of a slimming hold a command, or begin with what looks like one.

    Without an option before it, a second argument that is no option can only follow a command.
    """
    later = next((argument for argument in typed[1:] if argument in COMMANDS), None)
    if later:
        return f"a command comes first: archscan {later} …"
    if len(typed) < 2 or any(argument.startswith("-") for argument in typed[:2]):
        return None
    first, rest = typed[0], shlex.join(typed[1:])
    if first in _SLIMMING:
        return f"slimming has no command of its own; leave out {first!r}: archscan {rest}"
    close = difflib.get_close_matches(first, COMMANDS, n=1)
    hint = f"; did you mean archscan {close[0]}?" if close else "; archscan --help lists them"
    return f"{first!r} is not a command{hint}"


_SLIMMING = ("slim", "prune", "compress", "run", "shrink")
"""What people try as the name of the default command."""

COMMANDS: dict[str, tuple[Callable[[], ArgumentParser], Callable[[Namespace, str], None]]] = {
    "scan": (scan.make_parser, scan.run),
    "list": (list_networks.make_parser, list_networks.run),
    "show": (show.make_parser, show.run),
    "evaluate": (evaluate.make_parser, evaluate.run),
    "export": (export.make_parser, export.run),
    "finetune": (finetune.make_parser, finetune.run),
    "audit": (audit.make_parser, audit.run),
    "criteria": (criteria.make_parser, criteria.run),
    "widen": (widen.make_parser, widen.run),
    "compare": (compare.make_parser, compare.run),
    "sweep": (sweep.make_parser, sweep.run),
}
"""What the first argument may say; a model of the same name is opened as ``timm:scan``."""
