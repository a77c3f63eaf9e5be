"""`AuditReport` → what the terminal shows, by rich; drawn as `report.terminal` draws, without lines."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from archscan.report import audit as numbers
from archscan.report.audit import AuditReport, cell, change, factor, number
from archscan.report.terminal import FAINT, KEPT, STUCK, TITLE, _clean, _commands, _Fitted, _pairs, _section, _table

WIDE = 96
"""Columns from which on the tables are whole; below, correlations within groups and gentle plans are left out."""


def render_audit(report: AuditReport, saved_to: Path | None = None) -> RenderableType:
    """Return everything that an audit prints.

    Args:
        report: Its numbers.
        saved_to: The folder that it was written to, None where there is none.
    """
    parts: list[RenderableType] = [Text(""), Text(_clean(numbers.verdict(report)), style=TITLE), Text("")]
    parts += _section("Rank correlation with the measured loss change", _rank_table(report), numbers.SCORE_NOTE)
    parts += _section("Size of the predictions", _scale_table(report), numbers.SCALE_NOTE)
    lines = [
        ("Measured", numbers.measured_line(report)),
        ("Scored on", numbers.scored_line(report)),
        ("Ceiling", numbers.ceiling_line(report)),
        ("Own plans", numbers.own_line(report)),
        *((f"No {name}", reason) for name, reason in report.unscored.items()),
    ]
    parts += _section("What this rests on", _pairs([(name, line) for name, line in lines if line]))
    parts += _remarks(report)
    if saved_to is not None:
        parts += _commands(f"Saved to {saved_to}", [("read", str(saved_to / "audit.html"))])
    return Group(*parts)


def render_audit_verdict(report: AuditReport) -> RenderableType:
    """Return the verdict: what ``--quiet`` prints."""
    return Group(Text(_clean(numbers.verdict(report)), no_wrap=True, overflow="ignore"))


def _rank_table(report: AuditReport) -> _Fitted:
    def build(width: int) -> Table:
        wide = width >= WIDE
        budgets = [f"at {100 * made.kept:g}%" for made in report.criteria[0].plans][None if wide else -1 :]
        table = _table("criterion", "score", "units", *(["in groups"] if wide else []), "sets", *budgets)
        for place, row in enumerate(report.criteria):
            name = f"{row.name} *" if row.tied and place else row.name
            style = KEPT if not place else "" if row.tied else FAINT
            within = [number(row.within.spearman.value)] if wide else []
            losses = [change(made.loss_change) for made in row.plans][None if wide else -1 :]
            cells = (number(row.score), cell(row.units.spearman), *within, cell(row.sets.spearman), *losses)
            table.add_row(_clean(name), *cells, style=style)
        return table

    return _Fitted(build)


def _scale_table(report: AuditReport) -> _Fitted:
    def build(width: int) -> Table:
        wide = width >= WIDE
        table = _table("criterion", "units", *(["in groups"] if wide else []), "sets", "as a form", "ratio", "spread")
        for row in report.criteria:
            form = "-" if row.quadratic is None else number(row.quadratic.pearson.value)
            within = [number(row.within.pearson.value)] if wide else []
            cells = (cell(row.units.pearson), *within, number(row.sets.pearson.value), form)
            spread = "-" if row.spread is None else f"{factor(row.spread)} x"
            table.add_row(_clean(row.name), *cells, factor(row.ratio), spread)
        return table

    return _Fitted(build)


def _remarks(report: AuditReport) -> Iterator[RenderableType]:
    for title, style, sentences in (("Warnings", STUCK, report.warnings), ("Notes", "", report.notes)):
        if sentences:
            lines = Table.grid(padding=(0, 1, 0, 0))
            for sentence in sentences:
                lines.add_row("-", Text(_clean(sentence), style=style))
            yield from _section(title, lines)
