"""`AuditReport` → one self-contained HTML file: the terminal's tables, and predicted against measured by criterion.

The decision that is not obvious: the charts are Plotly's alone, with its own buttons, and nothing is drawn without a
script. Every point is a channel or a set of them, and which one it is, and what lies in the crowd at the low end, takes
pointing and zooming; the tables say the rest.
"""

import json
from functools import cache
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jinja2 import Template
from markupsafe import Markup
from plotly.subplots import make_subplots

from archscan.report import audit as numbers
from archscan.report.audit import AuditedCriterion, AuditReport
from archscan.report.page import fill, template
from archscan.report.views import machine_line, versions_line

STYLES = ("report.css", "audit.css")
SCRIPTS = ("plotly.js", "audit.js")
COLUMNS = 3
PLOT_HEIGHT_PX = 290
DECADES = 6
"""What a horizontal axis shows at most."""

KINDS = {
    "unit": ("#0072b2", "circle"),
    "set of one group": ("#e69f00", "square"),
    "set of several groups": ("#d55e00", "diamond"),
}
"""Colour and marker of each kind of ablation; the colours of Okabe and Ito (2008)."""
FAINT = "#808891"


def render_html(report: AuditReport) -> str:
    """Return the page as text."""
    return fill(
        _template(),
        STYLES,
        SCRIPTS,
        model=report.model,
        eyebrow="audit",
        verdict=numbers.verdict(report),
        banners=[("", sentence) for sentence in report.warnings],
        data=_charts(report),
        drawn=True,
        report=report,
        score_note=numbers.SCORE_NOTE,
        scale_note=numbers.SCALE_NOTE,
        basis=numbers.basis_rows(report),
        provenance=_provenance(report),
        floor=floor_of(report),
    )


@cache
def _template() -> Template:
    return template(
        "audit.html.j2", cell=numbers.cell, number=numbers.number, factor=numbers.factor, change=numbers.change
    )


def floor_of(report: AuditReport) -> float:
    """Give the loss change at which everything smaller is drawn: the median standard error of the single units."""
    errors = [row.standard_error for row in report.ablations if row.kind == "unit" and row.standard_error]
    positive = [row.loss_change for row in report.ablations if row.loss_change > 0]
    return float(np.median(errors)) if errors else min(positive, default=1e-6)


def _charts(report: AuditReport) -> dict[str, Any]:
    """Return Plotly's data and layout, in JSON values."""
    rows = -(-len(report.criteria) // COLUMNS)
    titles = [
        f"{row.name}  ({numbers.number(row.units.spearman.value)}, {numbers.number(row.sets.spearman.value)})"
        for row in report.criteria
    ]
    figure = make_subplots(rows, COLUMNS, subplot_titles=titles, vertical_spacing=0.22 / rows, horizontal_spacing=0.06)
    for place, row in enumerate(report.criteria):
        for kind in KINDS:
            if report.of_kind(kind):
                trace = _trace(report, row, kind, legend=place == 0)
                figure.add_trace(trace, row=place // COLUMNS + 1, col=place % COLUMNS + 1)
    figure.update_xaxes(type="log", gridcolor="rgba(128,136,145,.25)", zeroline=False, exponentformat="power", dtick=1)
    figure.update_yaxes(type="log", gridcolor="rgba(128,136,145,.25)", zeroline=False, exponentformat="power", dtick=1)
    figure.update_layout(
        height=PLOT_HEIGHT_PX * rows + 60,
        margin={"l": 40, "r": 10, "t": 60, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": FAINT, "size": 12},
        legend={"orientation": "h", "y": 1.0 + 45 / (PLOT_HEIGHT_PX * rows), "yanchor": "bottom", "x": 0},
    )
    found: dict[str, Any] = json.loads(figure.to_json())
    return found


def _trace(report: AuditReport, row: AuditedCriterion, kind: str, *, legend: bool) -> go.Scatter:
    """Draw one kind of ablation; a prediction of 0 has no place on a logarithmic axis, and is drawn at its end."""
    places = report.of_kind(kind)
    colour, marker = KINDS[kind]
    least = _least(row.predicted)
    floor = floor_of(report)
    return go.Scatter(
        x=[max(row.predicted[place], least) for place in places],
        y=[max(report.ablations[place].loss_change, floor) for place in places],
        mode="markers",
        name=kind,
        legendgroup=kind,
        showlegend=legend,
        marker={"color": colour, "symbol": marker, "size": 6, "opacity": 0.65},
        customdata=[_label(report, place, row.predicted[place]) for place in places],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _least(predicted: tuple[float, ...]) -> float:
    """Give the prediction at which smaller ones are drawn: `DECADES` below the largest, if there are smaller ones."""
    positive = [value for value in predicted if value > 0]
    return max(min(positive), max(positive) / 10**DECADES) if positive else 1.0


def _label(report: AuditReport, place: int, predicted: float) -> str:
    ablation = report.ablations[place]
    groups = [Markup.escape(name) for name in ablation.groups]
    where = groups[0] if len(groups) == 1 else f"{len(groups)} groups"
    what = (
        f"unit {ablation.units[0]} of {where}" if ablation.kind == "unit" else f"{len(ablation.units)} units of {where}"
    )
    error = "" if ablation.standard_error is None else f" ± {ablation.standard_error:.2g}"
    return f"{what}<br>predicted {predicted:.4g}<br>measured {ablation.loss_change:+.4g}{error}"


def _provenance(report: AuditReport) -> list[tuple[str, str]]:
    weights = report.weights
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items())
    rows = [
        ("Weights", weights and f"{weights.kind}: {weights.source}"),
        ("Seed", str(report.seed)),
        ("Time", seconds and f"{seconds} s (measured)"),
        ("Machine", machine_line(report.environment)),
        ("Versions", versions_line(report.archscan, report.environment)),
    ]
    return [(name, line) for name, line in rows if line]
