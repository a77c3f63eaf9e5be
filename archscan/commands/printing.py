"""What every command prints with: progress bars on standard error, reports on standard output."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from archscan.options import OutputOptions, ProgressFactory

if TYPE_CHECKING:
    from archscan.report.compare import Comparison
    from archscan.report.model import Evaluation, Report


def progress_for(output: OutputOptions) -> ProgressFactory:
    """Show progress on standard error, unless only the verdict is wanted."""
    from archscan.report.progress import progress_on
    from archscan.report.terminal import console

    return progress_on(console(sys.stderr), hidden=output.quiet)


def print_report(report: "Report", output: OutputOptions, folder: Path | None = None) -> None:
    """Print a report in the form that was asked for."""
    from archscan.report.model import json_text
    from archscan.report.terminal import console, render, render_verdict, show

    if output.json:
        sys.stdout.write(json_text(report))
    else:
        show(render_verdict(report) if output.quiet else render(report, folder), console(sys.stdout))


def print_findings(report: "Report") -> None:
    """Print every finding of a report in full."""
    from archscan.report.terminal import console, render_findings, show

    show(render_findings(report), console(sys.stdout))


def print_evaluation(evaluation: "Evaluation", output: OutputOptions) -> None:
    """Print an accuracy in the form that was asked for."""
    from archscan.report.model import json_text
    from archscan.report.terminal import console, render_evaluation, show

    if output.json:
        sys.stdout.write(json_text(evaluation))
    else:
        show(render_evaluation(evaluation), console(sys.stdout))


def print_comparison(comparison: "Comparison", output: OutputOptions, page: Path | None = None) -> None:
    """Print a comparison in the form that was asked for."""
    from archscan.report.compare import json_text
    from archscan.report.compare_terminal import render_comparison, render_comparison_verdict
    from archscan.report.terminal import console, show

    if output.json:
        sys.stdout.write(json_text(comparison))
    else:
        what = render_comparison_verdict(comparison) if output.quiet else render_comparison(comparison, page)
        show(what, console(sys.stdout))
