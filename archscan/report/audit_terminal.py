"""`AuditReport` → what the terminal shows, by rich; drawn as `report.drawing` draws, without lines."""

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from archscan.report import audit as numbers
from archscan.report.audit import AuditReport, cell, change, factor, number
from archscan.report.drawing import (
    FAINT,
    KEPT,
    STUCK,
    WIDE,
    Fitted,
    clean,
    columns,
    command_lines,
    headline,
    pairs,
    section,
    sentences,
    single_line,
)


def render_audit(report: AuditReport, saved_to: Path | None = None) -> RenderableType:
    """Return everything that an audit prints.

    Args:
        report: Its numbers.
        saved_to: The folder that it was written to, None where there is none.
    """
    parts = [*headline(numbers.verdict(report))]
    parts += section("Rank correlation with the measured loss change", _rank_table(report), numbers.SCORE_NOTE)
    parts += section("Size of the predictions", _scale_table(report), numbers.SCALE_NOTE)
    parts += section("What this rests on", pairs(numbers.basis_rows(report)))
    parts += [*sentences("Warnings", report.warnings, STUCK), *sentences("Notes", report.notes)]
    if saved_to is not None:
        parts += command_lines(f"Saved to {saved_to}", [("read", str(saved_to / "audit.html"))])
    return Group(*parts)


def render_audit_verdict(report: AuditReport) -> RenderableType:
    """Return the verdict: what ``--quiet`` prints."""
    return single_line(numbers.verdict(report))


def _rank_table(report: AuditReport) -> Fitted:
    def build(width: int) -> Table:
        wide = width >= WIDE
        budgets = [f"at {100 * made.kept:g}%" for made in report.criteria[0].plans][None if wide else -1 :]
        table = columns("criterion", "score", "units", *(["in groups"] if wide else []), "sets", *budgets)
        for place, row in enumerate(report.criteria):
            name = f"{row.name} *" if row.tied and place else row.name
            style = KEPT if not place else "" if row.tied else FAINT
            within = [number(row.within.spearman.value)] if wide else []
            losses = [change(made.loss_change) for made in row.plans][None if wide else -1 :]
            cells = (number(row.score), cell(row.units.spearman), *within, cell(row.sets.spearman), *losses)
            table.add_row(clean(name), *cells, style=style)
        return table

    return Fitted(build)


def _scale_table(report: AuditReport) -> Fitted:
    def build(width: int) -> Table:
        wide = width >= WIDE
        table = columns("criterion", "units", *(["in groups"] if wide else []), "sets", "as a form", "ratio", "spread")
        for row in report.criteria:
            form = "-" if row.quadratic is None else number(row.quadratic.pearson.value)
            within = [number(row.within.pearson.value)] if wide else []
            cells = (cell(row.units.pearson), *within, number(row.sets.pearson.value), form)
            spread = "-" if row.spread is None else f"{factor(row.spread)} x"
            table.add_row(clean(row.name), *cells, factor(row.ratio), spread)
        return table

    return Fitted(build)
