"""`Report` → one self-contained HTML file.

All names are escaped: by Jinja2 in the text, as JSON in the data, and by the scripts as text nodes (see `page`).

The decision that is not obvious is who draws what. What has to be there on paper, in a mail's preview and without a
script (keep ratios, shares, the matrix of criteria) is drawn by the template. Charts that take zooming, opening and
pointing (treemap, distributions, the budget curve) are Plotly's. The graph of groups has a layout of its own that no
plotting library draws.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from jinja2 import Template
from markupsafe import Markup

from archscan.findings import Finding
from archscan.report import handover, page_data, views
from archscan.report.advice import finding_command
from archscan.report.branches import branch_rows
from archscan.report.model import Report
from archscan.report.page import fill, template

STYLES = ("report.css", "page.css")
SCRIPTS = ("report.js", "network_model.js", "network_layout.js", "network.js", "plotly.js", "charts.js", "page.js")
MEMBERS_SHOWN = 20
BOTTLENECKS_SHOWN = 12
FINDINGS_SHOWN = 6

FINDING_KINDS = {
    "capacity": "too narrow",
    "redundancy": "too wide",
    "dead": "dead channels",
    "duplicate": "duplicate channels",
    "cost": "where the cost is",
    "width": "width and hardware",
}


class Card(NamedTuple):
    """One number at the head of the page.

    Attributes:
        name: What it is.
        large: The number that is read first.
        unit: What follows it, small.
        fraction: Of the bar below; None for no bar.
        detail: Before and after.
        origin: Counted or measured, and how.
        exact: All digits.
    """

    name: str
    large: str
    unit: str
    fraction: float | None
    detail: str
    origin: str
    exact: str = ""


def render_html(report: Report) -> str:
    """Return the page as text."""
    groups = sorted(report.groups, key=lambda group: group.depth)
    data = page_data.page_data(report)
    values = _summary(report) | _pictures(report, groups, data) | _tables(report, groups) | _handover(report)
    slim = report.after is not None
    return fill(
        _template(),
        STYLES,
        SCRIPTS,
        model=report.model,
        eyebrow="report" if slim else "scan",
        report=report,
        slim=slim,
        groups=groups,
        data=data,
        drawn=values["branches"] or values["has_spread"] or values["has_curve"] or data["training"],
        contents=_contents(report, values),
        **values,
    )


@cache
def _template() -> Template:
    return template("template.html.j2", members=_members, dotted=_dotted, state=page_data.state, facts=_facts)


def _summary(report: Report) -> dict[str, Any]:
    """Collect what is said in words and single numbers."""
    return {
        "verdict": views.verdict(report),
        "banners": [(banner.title, banner.text) for banner in views.banners(report)],
        "warnings": views.further_warnings(report),
        "cards": _cards(report),
        "input_line": views.input_line(report),
        "everything": views.widths(report),
        "free": views.widths(report, frozen=False),
        "findings": [replace(item, option=finding_command(report, item)) for item in report.findings],
        "proof": views.verification_line(report).rstrip(".") if report.verification is not None else "",
        "findings_shown": FINDINGS_SHOWN,
        "kinds": FINDING_KINDS,
        "bottlenecks": views.bottleneck_rows(report),
        "shown": BOTTLENECKS_SHOWN,
        "checks": _checks(report),
        "provenance": _provenance(report),
    }


def _pictures(report: Report, groups: Sequence[Any], data: dict[str, Any]) -> dict[str, Any]:
    costs = [("macs", "MACs"), ("params", "parameters"), ("bytes", "activation bytes"), ("time", "time")]
    detail = report.saliency
    return {
        "largest_share": max((group.macs_share for group in groups), default=0.0) or 1.0,
        "widest": max([1.0, *(group.kept / group.units for group in groups if group.units)]),
        "stages": page_data.stages(groups),
        "branches": branch_rows(report),
        "cost_kinds": [(kind, name) for kind, name in costs if data["modules"][kind] is not None],
        "has_spread": detail is not None and any(max(row.quantiles, default=0) > 0 for row in detail.groups),
        "has_curve": data["curve"] is not None,
        "agreement": detail.agreement if detail else None,
    }


def _tables(report: Report, groups: Sequence[Any]) -> dict[str, Any]:
    return {
        "stuck": views.stuck_groups(report),
        "places": {group.name: place for place, group in enumerate(groups)},
        "frozen": views.frozen_by_reason(report),
        "share_note": views.SHARE_NOTE,
        "coupling": views.coupling_line(report),
        "layers": page_data.layer_rows(report),
        "has_bytes": any(row.activation_bytes is not None for row in report.modules),
        "has_time": any(row.time_ms is not None for row in report.modules),
    }


def _handover(report: Report) -> dict[str, Any]:
    return {"trainings": handover.training_lines(report), "epochs": handover.epoch_lines(report)}


def _contents(report: Report, values: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("findings", "Findings", values["findings"] or values["bottlenecks"]),
        ("widths", "Widths", report.groups),
        ("network", "Network", report.groups),
        ("costs", "Cost", values["branches"]),
        ("saliency", "Saliency", values["has_spread"] or values["has_curve"] or values["agreement"]),
        ("training", "Training", report.history),
        ("groups", "Groups", report.groups),
        ("layers", "Layers", report.groups and values["layers"]),
        ("frozen", "Frozen", values["frozen"]),
        ("exports", "Exports", report.exports),
        ("checks", "Checks", report.after),
        ("made", "Provenance", True),
    ]
    return [(place, name) for place, name, there in rows if there]


def _cards(report: Report) -> list[Card]:
    cards = []
    for row in views.cost_rows(report):
        before = views.si(row.before)
        if row.after is None:
            cards.append(Card(row.name, before, "", None, "", row.origin, f"{row.before:,}"))
        else:
            exact = f"{row.before:,} → {row.after:,}"
            change = f"{before} → {views.si(row.after)}"
            unit = "kept" if row.after <= row.before else "of the original"
            cards.append(Card(row.name, views.percent(row.kept), unit, row.kept or 0.0, change, row.origin, exact))
    latency, accuracy = report.latency, report.accuracy
    if latency is not None:
        origin = f"measured on {latency.device}, batch {latency.batch}, {views.plural(latency.threads, 'thread')}"
        if latency.ratio is None or latency.after_ms is None:
            cards.append(Card("Latency", f"{latency.before_ms:.3g} ms", "", None, "", origin))
        else:
            change = f"{latency.before_ms:.3g} → {latency.after_ms:.3g} ms"
            cards.append(Card("Latency", views.percent(latency.ratio), "kept", latency.ratio, change, origin))
    if accuracy is not None and accuracy.after is not None:
        before = "dense not measured" if accuracy.before is None else f"before: {views.percent(accuracy.before)}"
        origin = f"measured on {views.plural(accuracy.samples, 'image')}"
        cards.append(Card("Top-1 accuracy", views.percent(accuracy.after), "", accuracy.after, before, origin))
    return cards


def _facts(item: Finding) -> list[tuple[str, str]]:
    """List what a finding says in numbers: what doing as it says gives, and how sure it is."""
    saving = item.saving
    exact = saving and (
        f"{views.si(saving.macs, 'MACs')} and {views.si(saving.params)} parameters"
        + (", with no loss" if saving.lossless else "")
    )
    rows = [
        ("gain", item.gain),
        ("saves", exact),
        ("confidence", None if item.confidence is None else f"{100 * item.confidence:.0f}%"),
        ("measured on", item.measured_on),
    ]
    return [(name, line) for name, line in rows if line]


def _checks(report: Report) -> list[tuple[str, str]]:
    rows = [
        ("Verification", views.verification_line(report)),
        ("Lossless", views.lossless_line(report)),
        ("Latency", views.latency_line(report)),
        ("Accuracy", views.accuracy_line(report)),
        ("Recovery", report.recovery),
        ("Saliency lost", views.saliency_line(report)),
    ]
    return [(name, line) for name, line in rows if line]


def _provenance(report: Report) -> list[tuple[str, str]]:
    rows = [
        ("Weights", views.weights_line(report)),
        ("Scored on", views.data_line(report)),
        ("Criterion", report.criterion),
        ("Seed", str(report.seed)),
        ("Time", views.seconds_line(report)),
        ("Machine", views.machine_line(report.environment)),
        ("Versions", views.versions_line(report.archscan, report.environment)),
    ]
    return [(name, line) for name, line in rows if line]


def _dotted(name: str) -> Markup:
    """Escape a path and let it break after its dots only."""
    return Markup("<wbr>").join(part + "." for part in name.split("."))[:-1]


def _members(members: tuple[str, ...]) -> str:
    more = f" and {len(members) - MEMBERS_SHOWN:,} more" if len(members) > MEMBERS_SHOWN else ""
    return ", ".join(members[:MEMBERS_SHOWN]) + more
