"""`Report` → what the terminal shows, by rich.

Only banners get a frame, and only where the output is a terminal; see `drawing` for all else.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import IO

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from archscan.findings import Finding
from archscan.report import handover, views
from archscan.report.advice import finding_command
from archscan.report.branches import BranchRow, branch_rows
from archscan.report.drawing import (
    BAD,
    FAINT,
    KEPT,
    STUCK,
    TITLE,
    TOP,
    WIDE,
    Bar,
    Fitted,
    clean,
    columns,
    command_lines,
    heading,
    headline,
    pairs,
    section,
    sentences,
    single_line,
)
from archscan.report.model import Evaluation, GroupRow, Report
from archscan.report.views import percent, plural, si

IN_FULL = 3
"""Findings that are told in full; of the others the headings say enough, and the HTML report has all."""


class PlainConsole(Console):
    """A console that lets a closed pipe be the caller's business instead of ending the process."""

    def on_broken_pipe(self) -> None:
        """Hand the `BrokenPipeError` that rich caught back to the caller."""
        raise


def console(file: IO[str] | None = None, *, width: int | None = None, colour: bool | None = None) -> Console:
    """Return a console that prints names as they are: no markup, no emoji codes, no guessed highlighting.

    Args:
        file: Where it prints; standard output by default.
        width: In columns; the terminal's by default, 80 where there is none.
        colour: Whether to; by default where the file is a terminal.
    """
    return PlainConsole(file=file, width=width, force_terminal=colour, markup=False, emoji=False, highlight=False)


def render(report: Report, saved_to: Path | None = None) -> RenderableType:
    """Return everything that a run prints.

    Args:
        report: Its numbers.
        saved_to: The folder of the result, None where nothing was saved.
    """
    banners = views.banners(report)
    sections = _scan_sections(report) if report.command == "scan" else _slim_sections(report)
    return Group(
        *headline(views.verdict(report)),
        *(_BannerBox(banner) for banner in banners),
        *([Text("")] if banners else []),
        *sections,
        *_remarks(report),
        *_next_commands(report, saved_to),
    )


def render_findings(report: Report) -> RenderableType:
    """Return every finding in full, as the HTML report has them; a sentence where there is none."""
    if not report.findings:
        return Text("There are no findings.")
    return Group(*heading("Findings", "the first is the one to act on first"), *_findings_in_full(report))


def show(renderable: RenderableType, on: Console) -> None:
    """Print; where the output is no terminal, without the spaces that pad tables to the right.

    Raises:
        BrokenPipeError: Where the reader has gone.
    """
    if on.is_terminal:
        on.print(renderable, crop=False)
        return
    with on.capture() as capture:
        on.print(renderable, crop=False)
    on.file.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def render_verdict(report: Report) -> RenderableType:
    """Return the verdict and the banners' titles: what ``--quiet`` prints."""
    return single_line(views.verdict(report), (banner.title for banner in views.banners(report)))


def render_evaluation(evaluation: Evaluation) -> RenderableType:
    """Return the accuracies of a saved result and of the dense original."""
    accuracy = evaluation.accuracy
    table = columns("network", "top-1")
    table.add_row("dense original", "weights not at hand" if accuracy.before is None else percent(accuracy.before))
    table.add_row("slim", percent(accuracy.after))
    title = f"{evaluation.model}: accuracy measured on {accuracy.samples:,} images"
    remarks = [*evaluation.notes]
    if evaluation.skipped:
        remarks.append(f"{plural(len(evaluation.skipped), 'file')} skipped as unreadable.")
    return Group(*section(title, table), *(Text(clean(remark)) for remark in remarks))


@dataclass(frozen=True)
class _BannerBox:
    """A banner: framed on a terminal, between exclamation marks elsewhere."""

    banner: views.Banner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        text = Text.assemble((f" {self.banner.title} ", BAD), "  ", clean(self.banner.text))
        if console.is_terminal:
            yield Panel(text, box=box.HEAVY, border_style="red")
        else:
            yield Text(f"!!! {self.banner.title} !!! {clean(self.banner.text)}")


def _slim_sections(report: Report) -> Iterator[RenderableType]:
    yield from section(f"Cost of {views.input_line(report)}", _cost_table(report))
    wider = views.wider_groups(report)
    if wider:
        more = f", {len(wider) - TOP:,} more in the report" if len(wider) > TOP else ""
        yield from section("Groups that got wider", Fitted(_group_table(wider[:TOP], STUCK)), f"by depth{more}")
    givers = views.top_givers(report, TOP)
    if givers:
        table = _with_totals(_group_table(givers, KEPT), givers, views.widths(report))
        yield from section("Groups that gave most", table, "by the share of the MACs that went")
    yield from _bottleneck_section(report)
    yield from _finding_section(report)
    yield from _frozen_section(report)
    lines = [
        ("Verification", views.verification_line(report)),
        ("Lossless", views.lossless_line(report)),
        ("Accuracy", views.accuracy_line(report) or "not measured; give labelled images with --eval-data DIR"),
        ("Latency", views.latency_line(report)),
        ("Recovery", report.recovery),
        *(("Training", line) for line in handover.training_lines(report)),
        ("Saliency lost", views.saliency_line(report)),
        ("Scored on", views.data_line(report)),
        ("Weights", views.weights_line(report)),
        ("Time", views.seconds_line(report)),
        *(("Exported", f"{entry.file}: {handover.export_line(entry)}") for entry in report.exports),
    ]
    yield from section("Checks", pairs([(name, line) for name, line in lines if line]))


def _scan_sections(report: Report) -> Iterator[RenderableType]:
    yield from section(f"Cost of {views.input_line(report)}", _cost_table(report))
    branches = branch_rows(report)
    if branches:
        yield from section("Where the MACs go", _branch_table(branches))
    groups = views.costliest_groups(report, TOP)
    if groups:
        yield from section("Costliest channel groups", _scan_group_table(report, groups), views.SHARE_NOTE)
    yield from _finding_section(report)
    yield from section("Coupling", Text(clean(views.coupling_line(report))))
    yield from _frozen_section(report)


def _cost_table(report: Report) -> Table:
    slim = report.after is not None
    table = columns("", *(["before", "after", "kept", ":"] if slim else ["dense"]), "origin:")
    for row in views.cost_rows(report):
        cells: list[RenderableType] = [row.name, si(row.before)]
        if row.after is not None:
            cells += [si(row.after), percent(row.kept), Bar(row.kept or 0.0, KEPT)]
        table.add_row(*cells, Text(row.origin, style=FAINT))
    return table


def _group_table(groups: Sequence[GroupRow], style: str) -> Callable[[int], Table]:
    def build(width: int) -> Table:
        bars = width >= WIDE
        table = columns("group", "channels", "kept", "ratio", *(["", "of MACs"] if bars else ["of MACs"]))
        for group in groups:
            ratio = group.kept / group.units if group.units else 1.0
            cells = [clean(group.name), f"{group.units:,}", f"{group.kept:,}", percent(ratio)]
            table.add_row(*cells, *([Bar(ratio, style)] if bars else []), percent(group.macs_share))
        return table

    return build


def _with_totals(build: Callable[[int], Table], shown: Sequence[GroupRow], everything: views.Widths) -> Fitted:
    def totals(width: int) -> Table:
        table = build(width)
        units, kept = (sum(group.units for group in shown), sum(group.kept for group in shown))
        others = views.Widths(everything.groups - len(shown), everything.units - units, everything.kept - kept)
        if others.groups:
            table.add_row(plural(others.groups, "other group"), *_width_cells(others), style=FAINT)
        table.add_row("all groups", *_width_cells(everything), style=TITLE)
        return table

    return Fitted(totals)


def _width_cells(widths: views.Widths) -> tuple[str, str, str]:
    return f"{widths.units:,}", f"{widths.kept:,}", percent(widths.keep_ratio)


def _scan_group_table(report: Report, groups: Sequence[GroupRow]) -> Table:
    table = columns("group", "channels", "layers", "of MACs", "state:")
    for group in groups:
        cells = (f"{group.units:,}", f"{len(group.members):,}", percent(group.macs_share))
        table.add_row(clean(group.name), *cells, "frozen" if group.frozen else "free")
    everything = views.widths(report)
    if everything.groups > len(groups):
        others = plural(everything.groups - len(groups), "other group")
        table.add_row(others, f"{everything.units - sum(group.units for group in groups):,}", style=FAINT)
    table.add_row("all groups", f"{everything.units:,}", style=TITLE)
    return table


def _branch_table(branches: Sequence[BranchRow]) -> Table:
    table = columns("module", "MACs", "share", ":", "parameters")
    largest = max(branch.macs_share for branch in branches) or 1.0
    for branch in branches:
        bar = Bar(branch.macs_share / largest, KEPT)
        table.add_row(clean(branch.path), si(branch.macs), percent(branch.macs_share), bar, si(branch.params))
    macs, params = sum(row.macs for row in branches), sum(row.params for row in branches)
    table.add_row("whole network", si(macs), percent(1.0), "", si(params), style=TITLE)
    return table


def _finding_section(report: Report) -> Iterator[RenderableType]:
    if not report.findings:
        return
    short = f"; all {len(report.findings):,} in full: archscan show DIR --findings"
    yield from heading("Findings", f"the first is the one to act on first{short if report.findings[IN_FULL:] else ''}")
    yield from _findings_in_full(report, IN_FULL)
    others = report.findings[IN_FULL:TOP]
    yield from (_finding_head(item) for item in others)
    yield from [Text("")] if others else []


def _findings_in_full(report: Report, most: int | None = None) -> Iterator[RenderableType]:
    for item in report.findings[:most]:
        yield from (*_finding_lines(item, finding_command(report, item)), Text(""))


def _finding_lines(item: Finding, option: str) -> Iterator[RenderableType]:
    """Yield a heading, the sentences, and the command in a line of its own that never wraps, inside of nothing."""
    yield _finding_head(item)
    gain = f" Gain: {item.gain}." if item.gain else ""
    yield Padding(Text(clean(f"{item.seen} {item.why} {item.remedy}{gain}")), (0, 0, 0, 6), expand=False)
    if option:
        yield Text(f"      {clean(option)}", style=KEPT, no_wrap=True, overflow="ignore")


def _finding_head(item: Finding) -> RenderableType:
    others = f" and {len(item.where) - 1:,} more" if len(item.where) > 1 else ""
    sure = "" if item.confidence is None else f", {100 * item.confidence:.0f}% sure"
    on = f", on {item.measured_on}" if item.measured_on else ""
    where = item.where[0] if item.where and item.where[0] else "the model itself"
    said = (clean(f"{item.kind}: {where}{others}"), TITLE), (clean(f"{sure}{on}"), FAINT)
    return Padding(Text.assemble((f"{item.rank:>2}  ", FAINT), *said), (0, 0, 0, 2), expand=False)


def _bottleneck_section(report: Report) -> Iterator[RenderableType]:
    """Yield the bottlenecks of a report without findings, which say the same and more."""
    rows = views.bottleneck_rows(report)
    if not rows or report.findings:
        return
    more = f", {len(rows) - TOP:,} more in the report" if len(rows) > TOP else ""
    note = f"the free groups together kept {percent(rows[0][0].network_keep_ratio)}{more}"
    table = Fitted(_group_table([group for _, group in rows[:TOP]], STUCK))
    sentence = Padding(Text(clean(rows[0][0].sentence)), (1, 0, 0, 0))
    yield from section("Capacity bottlenecks: they gave nothing, or little", Group(table, sentence), note)


def _frozen_section(report: Report) -> Iterator[RenderableType]:
    rows = views.frozen_by_reason(report)
    if not rows:
        return
    table = columns("why", "groups", "channels", "for example:")
    for row in rows:
        table.add_row(clean(row.reason), str(len(row.groups)), f"{row.channels:,}", clean(row.groups[0].name))
    yield from section("Frozen, and why", table)


def _remarks(report: Report) -> Iterator[RenderableType]:
    yield from sentences("Warnings", views.further_warnings(report), STUCK)
    yield from sentences("Notes", report.notes)


def _next_commands(report: Report, saved_to: Path | None) -> Iterator[RenderableType]:
    if report.command == "scan":
        yield from command_lines("Next", [("slim", f"archscan {quote(report.model)} --target-flops 0.6")])
    if saved_to is not None:
        commands = [
            ("read", str(saved_to / "report.html")),
            ("load", f"archscan.load({str(saved_to)!r})"),
            ("measure", f"archscan evaluate {quote(str(saved_to))} --data DIR"),
        ]
        yield from command_lines(f"Saved to {saved_to}", commands)
