"""`Comparison` → one self-contained HTML file, drawn in the style of the report page, of which it has the scripts.

The decision that is not obvious: results that differ by their budget
alone have an order, and are coloured along one scale; all others get colours (Okabe and Ito, 2008) and markers that
have none. Every result is named where it is drawn, so that no colour has to be told from another.
"""

from functools import cache
from typing import Any

from jinja2 import Template

from archscan.report import compare_views as views
from archscan.report.compare import Comparison
from archscan.report.model import GroupRow
from archscan.report.page import fill, template
from archscan.report.page_data import stages

STYLES = ("report.css", "page.css", "compare.css")
SCRIPTS = ("report.js", "plotly.js", "compare.js")
SHORT = {"saliency": "saliency lost", "accuracy": "top-1"}


def render_comparison_html(comparison: Comparison, *, plotly: str | None = None) -> str:
    """Return the page as text.

    Args:
        comparison: Its views.
        plotly: Plotly's script as `packed_plotly` gives it, the default.
    """
    return fill(
        _template(),
        STYLES,
        SCRIPTS,
        plotly=plotly,
        model=comparison.model,
        eyebrow="comparison",
        verdict=views.verdict(comparison),
        banners=[alarm.partition(": ")[::2] for alarm in comparison.alarms],
        data=page_data(comparison),
        drawn=True,
        comparison=comparison,
        sides=" x ".join(map(str, comparison.input_shape[1:])),
        further=[axis for axis in comparison.costs if axis.kind not in ("macs", "params")],
        unbeaten=views.unbeaten(comparison),
        short=SHORT,
        free=[group for group in comparison.groups if not group.frozen],
    )


def page_data(comparison: Comparison) -> dict[str, Any]:
    """Return what the scripts draw from, as JSON values; groups that are frozen everywhere are left out."""
    free = [group for group in comparison.groups if not group.frozen]
    rows = [GroupRow(group.name, group.units, group.units, False, "", (), 0.0, 0.0, 0) for group in free]
    return {
        "names": [result.name for result in comparison.results],
        "kept": [result.keep_ratio.macs for result in comparison.results],
        "ordered": views.is_sweep(comparison),
        "costs": [{"kind": axis.kind, "name": axis.name, "values": list(axis.kept)} for axis in comparison.costs],
        "qualities": [
            {
                "kind": axis.kind,
                "name": axis.name,
                "values": list(axis.values),
                "dense": axis.dense,
            }
            for axis in comparison.qualities
        ],
        "fronts": {f"{front.quality} {front.cost}": list(front.results) for front in comparison.fronts},
        "groups": [{"name": group.name, "units": group.units, "kept": list(group.kept)} for group in free],
        "stages": [list(stage) for stage in stages(rows)],
    }


@cache
def _template() -> Template:
    return template("compare.html.j2", quality=views.quality_text)
