"""`Report` → what the scripts of the page draw from: plain lists, the paths of layers written once and then counted.

The decision that is not obvious: the page's data are separate from ``summary.json``. A group of a DenseNet has some
hundred members and each of them a long path; as places in one list of paths the page stays small.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from statistics import median
from typing import Any, NamedTuple

from archscan.report import views
from archscan.report.details import CurvePoint, GroupSaliency
from archscan.report.handover import learning_curves
from archscan.report.model import GroupRow, ModuleRow, Report

FEWEST_STAGES = 3
LETTERS = 130
"""What fits below the widest chart."""


class Stage(NamedTuple):
    """Neighbours in depth order that lie in one branch of the module tree; the label is empty where it has no room."""

    groups: int
    label: str


def page_data(report: Report) -> dict[str, Any]:
    """Return everything that the scripts need, as JSON values."""
    paths = dict.fromkeys([*(link.path for link in report.links), *(row.path for row in report.modules)])
    paths |= dict.fromkeys(member for group in report.groups for member in group.members)
    place = {path: number for number, path in enumerate(paths)}
    groups = sorted(report.groups, key=lambda group: group.depth)
    return {
        "slim": report.after is not None,
        "criterion": report.criterion or "",
        "layers": list(place),
        "groups": _groups(report, groups, place),
        "links": _links(report, groups, place),
        "modules": _modules(report.modules, place),
        "curve": _curve(report),
        "training": learning_curves(report),
    }


def state(group: GroupRow, stuck: Iterable[str]) -> str:
    """Name the state of a group as the style sheet does."""
    if group.kept > group.units:
        return "wider"
    return "frozen" if group.frozen else "stuck" if group.name in stuck else "kept"


def stages(groups: Sequence[GroupRow]) -> tuple[Stage, ...]:
    """Cut the groups, in depth order, at the boundaries of the first level of modules that has several."""
    names = [group.name for group in groups]
    deepest = max((name.count(".") for name in names), default=0) + 1
    for level in range(1, deepest + 1):
        heads = [".".join(name.split(".")[:level]) for name in names]
        if len(set(heads)) >= FEWEST_STAGES or level == deepest:
            return tuple(_stage(head, len(list(run)), len(groups)) for head, run in groupby(heads))
    return ()


def _stage(head: str, groups: int, of_groups: int) -> Stage:
    label = head.rpartition(".")[2]
    return Stage(groups, label if len(label) <= LETTERS * groups / of_groups else "")


def _groups(report: Report, groups: Sequence[GroupRow], place: Mapping[str, int]) -> list[dict[str, Any]]:
    stuck = views.stuck_groups(report)
    spread = {row.group: row for row in report.saliency.groups} if report.saliency else {}
    usual = _usual_density(spread.values())
    return [
        {
            "name": group.name,
            "units": group.units,
            "kept": group.kept,
            "state": state(group, stuck),
            "reason": group.reason,
            "members": [place[member] for member in group.members],
            "macs": group.macs_share,
            "params": group.params_share,
            "quantiles": list(spread[group.name].quantiles) if group.name in spread else [],
            "density": _relative(spread.get(group.name), usual),
        }
        for group in groups
    ]


def _links(report: Report, groups: Sequence[GroupRow], place: Mapping[str, int]) -> list[list[Any]]:
    """Give each link by places in depth order; what no group has is left out, since summaries can be edited."""
    depth = {id(group): number for number, group in enumerate(groups)}
    order = [depth[id(group)] for group in report.groups]
    return [
        [place[link.path], *([order[each] for each in ends if each < len(order)] for ends in (link.reads, link.writes))]
        for link in report.links
    ]


def _usual_density(spread: Iterable[GroupSaliency]) -> float:
    positive = [row.per_mac for row in spread if row.per_mac]
    return median(positive) if positive else 0.0


def _relative(row: GroupSaliency | None, usual: float) -> float | None:
    return None if row is None or row.per_mac is None or not usual else float(f"{row.per_mac / usual:.4g}")


def _modules(rows: Sequence[ModuleRow], place: Mapping[str, int]) -> dict[str, Any]:
    """Give one list for each cost that every module has, and None for the others."""
    return {
        "layer": [place[row.path] for row in rows],
        "macs": [row.macs for row in rows],
        "params": [row.params for row in rows],
        "after": _column([row.macs_after for row in rows]),
        "bytes": _column([row.activation_bytes for row in rows]),
        "time": _column([row.time_ms for row in rows]),
    }


def _column(values: Sequence[float | None]) -> list[float] | None:
    """Read what is missing as nothing, unless everything is."""
    return None if all(value is None for value in values) else [value or 0 for value in values]


def _curve(report: Report) -> dict[str, Any] | None:
    detail, target = report.saliency, report.target
    if detail is None or target is None or report.keep_ratio is None or report.saliency_lost is None:
        return None
    if report.command != "slim" or not detail.curve:
        return None
    return {
        "kind": "MACs" if detail.curve_of == "macs" else "parameters",
        "best": _points(detail.curve),
        "uniform": _points(detail.uniform),
        "chosen": [getattr(report.keep_ratio, detail.curve_of), report.saliency_lost.plan],
    }


def _points(points: Sequence[CurvePoint]) -> list[list[float]]:
    return [[point.kept, point.lost] for point in points]


class LayerRow(NamedTuple):
    """One row of the table of layers: its costs, and the channels that it writes or carries."""

    cost: ModuleRow
    width: str


def layer_rows(report: Report) -> tuple[LayerRow, ...]:
    """List the modules that cost anything, with the widths of what they write."""
    groups = report.groups
    carried: dict[str, list[GroupRow]] = {}
    for group in groups:
        for member in group.members:
            carried.setdefault(member, []).append(group)
    written = {link.path: [groups[each] for each in link.writes if each < len(groups)] for link in report.links}
    reading = {link.path for link in report.links if link.reads and not link.writes}
    rows = []
    for row in report.modules:
        mine = written.get(row.path) or ([] if row.path in reading else carried.get(row.path, []))
        rows.append(LayerRow(row, _width(mine, slim=report.after is not None)))
    return tuple(rows)


def _width(groups: Sequence[GroupRow], *, slim: bool) -> str:
    units, kept = sum(group.units for group in groups), sum(group.kept for group in groups)
    if not groups:
        return ""
    return f"{units:,} → {kept:,}" if slim and kept != units else f"{units:,}"
