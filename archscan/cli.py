"""The command line: arguments → one function of the pipeline → printed report and exit code.

No logic lives here. Everything heavy is imported inside the handlers. ``archscan MODEL`` is the default command: a
first argument that is no command's name starts a slimming.
"""

import os
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from archscan.arguments import (
    evaluate_options,
    evaluate_parser,
    list_parser,
    printing,
    scan_options,
    scan_parser,
    show_parser,
    slim_options,
    slim_parser,
)
from archscan.errors import ArchscanError, BadInput
from archscan.options import OutputOptions, ProgressFactory

if TYPE_CHECKING:
    from archscan.report.model import Evaluation, Report

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
    try:
        _dispatch(arguments)
        sys.stdout.flush()
        return 0
    except ArchscanError as error:
        print(f"archscan: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("archscan: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`head`, a closed pager) has all that it wanted; what Python flushes at exit must go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(typed: Sequence[str]) -> None:
    command = typed[0] if typed and typed[0] in COMMANDS else None
    make_parser, handler = COMMANDS[command] if command else (slim_parser, _slim)
    parser, arguments = make_parser(), typed[1:] if command else typed
    command_line = shlex.join(("archscan", *typed))
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit:  # how argparse ends --help and --version
        return
    except BadInput as error:
        later = next((argument for argument in typed[1:] if argument in COMMANDS), None)
        if command is None and later:
            raise BadInput(f"{error}; a command comes first: archscan {later} …") from error
        raise
    handler(parsed, command_line)


def _slim(parsed: Namespace, command_line: str) -> None:
    options = slim_options(parsed, command_line)
    from archscan import pipeline

    saved = pipeline.slim_command(options, _progress(options.output))
    _print_report(saved.report, options.output, saved.folder)


def _scan(parsed: Namespace, command_line: str) -> None:
    options = scan_options(parsed, command_line)
    from archscan import pipeline

    _print_report(pipeline.scan_command(options, _progress(options.output)), options.output)


def _list(parsed: Namespace, command_line: str) -> None:
    from archscan import pipeline

    sys.stdout.writelines(f"{name}\n" for name in pipeline.list_command(parsed.pattern))


def _show(parsed: Namespace, command_line: str) -> None:
    from archscan import pipeline

    _print_report(pipeline.show_command(parsed.folder), printing(parsed), parsed.folder)


def _evaluate(parsed: Namespace, command_line: str) -> None:
    options = evaluate_options(parsed, command_line)
    from archscan import pipeline

    _print_evaluation(pipeline.evaluate_command(options, _progress(options.output)), options.output)


def _progress(output: OutputOptions) -> ProgressFactory:
    from archscan.report.progress import progress_on
    from archscan.report.terminal import console

    return progress_on(console(sys.stderr), hidden=output.quiet)


def _print_report(report: "Report", output: OutputOptions, folder: Path | None = None) -> None:
    from archscan.report.model import json_text
    from archscan.report.terminal import console, render, render_verdict, show

    if output.json:
        sys.stdout.write(json_text(report))
    else:
        show(render_verdict(report) if output.quiet else render(report, folder), console(sys.stdout))


def _print_evaluation(evaluation: "Evaluation", output: OutputOptions) -> None:
    from archscan.report.model import json_text
    from archscan.report.terminal import console, render_evaluation, show

    if output.json:
        sys.stdout.write(json_text(evaluation))
    else:
        show(render_evaluation(evaluation), console(sys.stdout))


COMMANDS: dict[str, tuple[Callable[[], ArgumentParser], Callable[[Namespace, str], None]]] = {
    "scan": (scan_parser, _scan),
    "list": (list_parser, _list),
    "show": (show_parser, _show),
    "evaluate": (evaluate_parser, _evaluate),
}
"""What the first argument may say; a model of the same name is opened as ``timm:scan``."""
