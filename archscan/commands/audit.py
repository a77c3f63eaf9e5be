"""``archscan audit MODEL --data D``: which criterion is right about this network."""

import argparse
import sys

from archscan.arguments import (
    Parser,
    add_batch_size,
    add_model,
    add_output,
    add_printing,
    add_run,
    add_scale,
    add_seed,
    add_weights,
    parse_count,
    read_data,
    read_model,
    read_output,
    read_run,
)
from archscan.commands.printing import progress_for
from archscan.options import AUDIT_SAMPLES, AuditOptions, DataOptions


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of ``archscan audit MODEL``."""
    parser = Parser(
        prog="archscan audit",
        allow_abbrev=False,
        description="Remove channels one by one and in sets, measure the loss, and rank the criteria by how well they "
        "predicted it. Nothing is slimmed.",
    )
    add_weights(add_model(parser))
    data = parser.add_argument_group("data")
    source = "labelled images, one folder per class: a DIR, a ZIP, or digits"
    data.add_argument("--data", required=True, metavar="DATA", help=source)
    samples = "images that the criteria score on (default: %(default)s)"
    data.add_argument("--samples", type=parse_count, default=AUDIT_SAMPLES, metavar="N", help=samples)
    held_out = "other images to measure losses on (default: %(default)s)"
    data.add_argument("--held-out", type=parse_count, default=AuditOptions.held_out, metavar="N", help=held_out)
    data.add_argument("--eval-data", metavar="DATA", help="where those come from (default: more of --data)")
    add_batch_size(data, DataOptions.batch_size)
    add_scale(data)
    audit = parser.add_argument_group("audit")
    names = "names with commas between them, or all (default)"
    audit.add_argument("--criterion", type=parse_names, metavar="A,B", help=names)
    units = "single channels to remove, over all groups (default: %(default)s)"
    audit.add_argument("--units", type=parse_at_least_three, default=AuditOptions.units, metavar="N", help=units)
    sets = "sets of channels to remove (default: %(default)s)"
    audit.add_argument("--sets", type=parse_at_least_three, default=AuditOptions.sets, metavar="N", help=sets)
    add_seed(add_run(parser))
    add_printing(add_output(parser, "of the audit (default: reports/MODEL-audit)"))
    return parser


def parse_names(text: str) -> tuple[str, ...] | None:
    """Read names of criteria with commas between them; ``all`` is None."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} leaves a name out between two commas")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names a criterion twice")
    return None if names == ("all",) else names


def parse_at_least_three(text: str) -> int:
    """Read a count from which on there is something to correlate."""
    number = parse_count(text)
    if number < 3:
        raise argparse.ArgumentTypeError(f"{number} removals are too few to correlate anything; 3 are the least")
    return number


def read_options(parsed: argparse.Namespace, command_line: str) -> AuditOptions:
    """Return what ``archscan audit MODEL`` was asked for."""
    return AuditOptions(
        model=read_model(parsed),
        data=read_data(parsed),
        run=read_run(parsed),
        output=read_output(parsed),
        criteria=parsed.criterion,
        units=parsed.units,
        sets=parsed.sets,
        held_out=parsed.held_out,
        command_line=command_line,
    )


def run(parsed: argparse.Namespace, command_line: str) -> None:
    """Audit, save, and print the ranking."""
    options = read_options(parsed, command_line)
    from archscan import auditing
    from archscan.report.audit import json_text
    from archscan.report.audit_terminal import render_audit, render_audit_verdict
    from archscan.report.terminal import console, show

    saved = auditing.audit_command(options, progress_for(options.output))
    if options.output.json:
        sys.stdout.write(json_text(saved.report))
    elif options.output.quiet:
        show(render_audit_verdict(saved.report), console(sys.stdout))
    else:
        show(render_audit(saved.report, saved.folder), console(sys.stdout))
