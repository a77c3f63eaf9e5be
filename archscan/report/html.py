"""`Report` → one self-contained HTML file.

Style, script and charts are inline, and the page forbids itself every request, so it opens offline and can be mailed.
All names are escaped by Jinja2. The decision that is not obvious: charts are drawn by the template as plain SVG bars.
Plotly's Python package ships only its full bundle (4.8 MB, against some 100 KB for the whole page), and bars of one
fraction each need no zoom; they print, follow the colour scheme and shrink to a phone without a script.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from archscan.report import views
from archscan.report.model import Report

HERE = Path(__file__).parent
MEMBERS_SHOWN = 20
BOTTLENECKS_SHOWN = 12


def render_html(report: Report) -> str:
    """Return the page as text."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(si=views.si, percent=views.percent, count=_count, members=_members, dotted=_dotted)
    bottlenecks = views.bottleneck_rows(report)
    return environment.get_template("template.html.j2").render(
        report=report,
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "report.js").read_text(encoding="utf-8")),
        verdict=views.verdict(report),
        banners=views.banners(report),
        warnings=views.further_warnings(report),
        costs=views.cost_rows(report),
        input_line=views.input_line(report),
        groups=sorted(report.groups, key=lambda group: group.depth),
        everything=views.widths(report),
        free=views.widths(report, frozen=False),
        bottlenecks=bottlenecks,
        shown=BOTTLENECKS_SHOWN,
        stuck={group.name for _, group in bottlenecks},
        largest_share=max((group.macs_share for group in report.groups), default=0.0) or 1.0,
        branches=views.branch_rows(report),
        frozen=views.frozen_by_reason(report),
        checks=_checks(report),
        provenance=_provenance(report),
        share_note=views.SHARE_NOTE,
        coupling=views.coupling_line(report),
    )


def write_html(report: Report, file: Path) -> None:
    """Write the page."""
    file.write_text(render_html(report), encoding="utf-8")


def _checks(report: Report) -> list[tuple[str, str]]:
    rows = [
        ("Verification", views.verification_line(report)),
        ("Accuracy", views.accuracy_line(report)),
        ("Recovery", report.recovery),
        ("Saliency lost", views.saliency_line(report)),
    ]
    return [(name, line) for name, line in rows if line]


def _provenance(report: Report) -> list[tuple[str, str]]:
    environment = report.environment
    machine = environment and f"{environment.device}, {environment.threads} threads"
    versions = environment and f"archscan {report.archscan}, torch {environment.torch}, Python {environment.python}"
    rows = [
        ("Weights", views.weights_line(report)),
        ("Scored on", views.data_line(report)),
        ("Criterion", report.criterion),
        ("Seed", str(report.seed)),
        ("Time", views.seconds_line(report)),
        ("Machine", machine),
        ("Versions", versions or f"archscan {report.archscan}"),
    ]
    return [(name, line) for name, line in rows if line]


def _count(number: int) -> str:
    return f"{number:,}"


def _dotted(name: str) -> Markup:
    """Escape a path and let it break after its dots only."""
    return Markup("<wbr>").join(part + "." for part in name.split("."))[:-1]


def _members(members: tuple[str, ...]) -> str:
    more = f" and {len(members) - MEMBERS_SHOWN:,} more" if len(members) > MEMBERS_SHOWN else ""
    return ", ".join(members[:MEMBERS_SHOWN]) + more
