"""`Comparison` → what the terminal shows, by rich; drawn as `report.drawing` draws, without lines.

Results are numbered, so that the table of groups has room for one narrow column each.
"""

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from archscan.report import compare_views as views
from archscan.report.compare import Comparison
from archscan.report.drawing import (
    BAD,
    FAINT,
    KEPT,
    TOP,
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
from archscan.report.views import percent, si

NAME_ROOM, COLUMN = 40, 6
"""Columns that the name and the width of a group take, and the ratio of one result."""


def render_comparison(comparison: Comparison, page: Path | None = None) -> RenderableType:
    """Return everything that a comparison prints.

    Args:
        comparison: Its views.
        page: Where its page was written, None where there is none.
    """
    parts = [*headline(views.verdict(comparison))]
    for alarm in comparison.alarms:
        title, _, text = alarm.partition(": ")
        parts += [Text.assemble((f" {clean(title)} ", BAD), f"  {clean(text)}"), Text("")]
    dense, sides = comparison.before, " x ".join(map(str, comparison.input_shape[1:]))
    of = f"dense: {si(dense.macs, 'MACs')} for one input of {sides}, {si(dense.params)} parameters"
    table: RenderableType = Fitted(lambda width: _result_table(comparison, width))
    if views.unbeaten(comparison):
        table = Group(table, Text("* no other result is as cheap in MACs and as good", style=FAINT))
    parts += section("Results", table, of)
    if comparison.differing:
        parts += section("What differs, by result", _differing(comparison))
    parts += _group_section(comparison)
    if comparison.shared:
        parts += section("The same for all", pairs(comparison.shared.items()))
    parts += sentences("Not compared", comparison.notes)
    if page is not None:
        parts += command_lines("Page", [("read", str(page))])
    return Group(*parts)


def render_comparison_verdict(comparison: Comparison) -> RenderableType:
    """Return the verdict and the titles of the alarms: what ``--quiet`` prints."""
    return single_line(views.verdict(comparison), (alarm.partition(":")[0] for alarm in comparison.alarms))


def _result_table(comparison: Comparison, width: int) -> Table:
    wide = width >= WIDE
    further = [axis for axis in comparison.costs if axis.kind not in ("macs", "params")]
    heads = [*(["MACs"] if wide else []), "MACs kept" if not wide else "kept", *(["params"] if wide else [])]
    heads += [
        "params kept" if not wide else "kept",
        *("memory" if axis.kind == "memory" else "time" for axis in further),
    ]
    heads += ["top-1" if axis.kind == "accuracy" else "saliency lost" for axis in comparison.qualities]
    table = columns("", "result:", *heads)
    unbeaten = views.unbeaten(comparison)
    for place, result in enumerate(comparison.results):
        cells = [*([si(result.after.macs)] if wide else []), percent(result.keep_ratio.macs)]
        cells += [*([si(result.after.params)] if wide else []), percent(result.keep_ratio.params)]
        cells += [percent(axis.kept[place]) for axis in further]
        cells += [views.quality_text(axis, place) for axis in comparison.qualities]
        name = Text(clean(result.name), style=KEPT if result.name in unbeaten else "")
        name.append(" *" if unbeaten and result.name in unbeaten else "")
        table.add_row(str(place + 1), name, *cells)
    return table


def _differing(comparison: Comparison) -> Table:
    """List the settings that differ, each with its values and the numbers of the results that have them."""
    lines = []
    for name in comparison.differing:
        places: dict[str, list[str]] = {}
        for place, result in enumerate(comparison.results, start=1):
            places.setdefault(result.settings.get(name, "none"), []).append(str(place))
        lines.append((name, "; ".join(f"{value} ({', '.join(held)})" for value, held in places.items())))
    return pairs(lines)


def _group_section(comparison: Comparison) -> Iterator[RenderableType]:
    rows = views.most_different(comparison, TOP)
    if not rows:
        return

    def build(width: int) -> Table:
        shown = max(2, (width - NAME_ROOM) // COLUMN)
        table = columns("group", "channels", *(str(place + 1) for place in range(len(comparison.results))[:shown]))
        for group in rows:
            ratios = (
                "-" if kept is None or not group.units else f"{100 * kept / group.units:.0f}%"
                for kept in group.kept[:shown]
            )
            table.add_row(clean(group.name), f"{group.units:,}", *ratios)
        if len(comparison.results) > shown:
            table.add_row(f"results {shown + 1} to {len(comparison.results)}: in the page", style=FAINT)
        return table

    yield from section(
        "Groups that were kept most differently", Fitted(build), "kept fraction of the channels, by result"
    )
