"""`Report` → what the terminal shows, by rich.

The decision that is not obvious: nothing is drawn with lines. Sections are told apart by a bold title and white space,
so that the same text reads well in colour, without, at 80 columns, and piped into a file. Only banners get a frame, and
only where the output is a terminal. Names come from models and from saved folders: they are printed as `Text`, never as
markup, with control characters replaced.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import IO

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from archscan.findings import Finding
from archscan.report import handover, views
from archscan.report.branches import BranchRow, branch_rows
from archscan.report.model import Evaluation, GroupRow, Report
from archscan.report.views import percent, plural, si

TOP = 8
"""Rows of a table of groups; the HTML report has them all."""

BAR_WIDTH = 12
BARS_FROM_WIDTH = 96
"""Groups get bars from this many columns on; below, their names need the room."""

KEPT, STUCK, BAD, TITLE, FAINT = "green", "yellow", "bold white on red", "bold", "dim"


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
        Text(""),
        Text(_clean(views.verdict(report)), style=TITLE),
        Text(""),
        *(_BannerBox(banner) for banner in banners),
        *([Text("")] if banners else []),
        *sections,
        *_remarks(report),
        *_next_commands(report, saved_to),
    )


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
    titles = "".join(f" [{banner.title.lower()}]" for banner in views.banners(report))
    line = Text(_clean(views.verdict(report)) + titles, no_wrap=True, overflow="ignore")
    return Group(line)  # a bare Text is wrapped by the console whatever it says of itself


def render_evaluation(evaluation: Evaluation) -> RenderableType:
    """Return the accuracies of a saved result and of the dense original."""
    accuracy = evaluation.accuracy
    table = _table("network", "top-1")
    table.add_row("dense original", "weights not at hand" if accuracy.before is None else percent(accuracy.before))
    table.add_row("slim", percent(accuracy.after))
    title = f"{evaluation.model}: accuracy measured on {accuracy.samples:,} images"
    remarks = [*evaluation.notes]
    if evaluation.skipped:
        remarks.append(f"{plural(len(evaluation.skipped), 'file')} skipped as unreadable.")
    return Group(*_section(title, table), *(Text(_clean(remark)) for remark in remarks))


@dataclass(frozen=True)
class _BannerBox:
    """A banner: framed on a terminal, between exclamation marks elsewhere."""

    banner: views.Banner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        text = Text.assemble((f" {self.banner.title} ", BAD), "  ", _clean(self.banner.text))
        if console.is_terminal:
            yield Panel(text, box=box.HEAVY, border_style="red")
        else:
            yield Text(f"!!! {self.banner.title} !!! {_clean(self.banner.text)}")


def _slim_sections(report: Report) -> Iterator[RenderableType]:
    yield from _section(f"Cost of {views.input_line(report)}", _cost_table(report))
    wider = views.wider_groups(report)
    if wider:
        more = f", {len(wider) - TOP:,} more in the report" if len(wider) > TOP else ""
        yield from _section("Groups that got wider", _Fitted(_group_table(wider[:TOP], STUCK)), f"by depth{more}")
    givers = views.top_givers(report, TOP)
    if givers:
        table = _with_totals(_group_table(givers, KEPT), givers, views.widths(report))
        yield from _section("Groups that gave most", table, "by the share of the MACs that went")
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
    yield from _section("Checks", _pairs([(name, line) for name, line in lines if line]))


def _scan_sections(report: Report) -> Iterator[RenderableType]:
    yield from _section(f"Cost of {views.input_line(report)}", _cost_table(report))
    branches = branch_rows(report)
    if branches:
        yield from _section("Where the MACs go", _branch_table(branches))
    groups = views.costliest_groups(report, TOP)
    if groups:
        yield from _section("Costliest channel groups", _scan_group_table(report, groups), views.SHARE_NOTE)
    yield from _finding_section(report)
    yield from _section("Coupling", Text(_clean(views.coupling_line(report))))
    yield from _frozen_section(report)


def _cost_table(report: Report) -> Table:
    slim = report.after is not None
    table = _table("", *(["before", "after", "kept", ":"] if slim else ["dense"]), "origin:")
    for row in views.cost_rows(report):
        cells: list[RenderableType] = [row.name, si(row.before)]
        if row.after is not None:
            cells += [si(row.after), percent(row.kept), _Bar(row.kept or 0.0, KEPT)]
        table.add_row(*cells, Text(row.origin, style=FAINT))
    return table


def _group_table(groups: Sequence[GroupRow], style: str) -> Callable[[int], Table]:
    def build(width: int) -> Table:
        bars = width >= BARS_FROM_WIDTH
        table = _table("group", "channels", "kept", "ratio", *(["", "of MACs"] if bars else ["of MACs"]))
        for group in groups:
            ratio = group.kept / group.units if group.units else 1.0
            cells = [_clean(group.name), f"{group.units:,}", f"{group.kept:,}", percent(ratio)]
            table.add_row(*cells, *([_Bar(ratio, style)] if bars else []), percent(group.macs_share))
        return table

    return build


def _with_totals(build: Callable[[int], Table], shown: Sequence[GroupRow], everything: views.Widths) -> "_Fitted":
    def totals(width: int) -> Table:
        table = build(width)
        units, kept = (sum(group.units for group in shown), sum(group.kept for group in shown))
        others = views.Widths(everything.groups - len(shown), everything.units - units, everything.kept - kept)
        if others.groups:
            table.add_row(plural(others.groups, "other group"), *_width_cells(others), style=FAINT)
        table.add_row("all groups", *_width_cells(everything), style=TITLE)
        return table

    return _Fitted(totals)


def _width_cells(widths: views.Widths) -> tuple[str, str, str]:
    return f"{widths.units:,}", f"{widths.kept:,}", percent(widths.keep_ratio)


def _scan_group_table(report: Report, groups: Sequence[GroupRow]) -> Table:
    table = _table("group", "channels", "layers", "of MACs", "state:")
    for group in groups:
        cells = (f"{group.units:,}", f"{len(group.members):,}", percent(group.macs_share))
        table.add_row(_clean(group.name), *cells, "frozen" if group.frozen else "free")
    everything = views.widths(report)
    if everything.groups > len(groups):
        others = plural(everything.groups - len(groups), "other group")
        table.add_row(others, f"{everything.units - sum(group.units for group in groups):,}", style=FAINT)
    table.add_row("all groups", f"{everything.units:,}", style=TITLE)
    return table


def _branch_table(branches: Sequence[BranchRow]) -> Table:
    table = _table("module", "MACs", "share", ":", "parameters")
    largest = max(branch.macs_share for branch in branches) or 1.0
    for branch in branches:
        bar = _Bar(branch.macs_share / largest, KEPT)
        table.add_row(_clean(branch.path), si(branch.macs), percent(branch.macs_share), bar, si(branch.params))
    macs, params = sum(row.macs for row in branches), sum(row.params for row in branches)
    table.add_row("whole network", si(macs), percent(1.0), "", si(params), style=TITLE)
    return table


def _finding_section(report: Report) -> Iterator[RenderableType]:
    if not report.findings:
        return
    hidden = len(report.findings) - TOP
    note = f"the first is the one to act on first{f'; {hidden:,} more in the report' if hidden > 0 else ''}"
    lines = [line for item in report.findings[:TOP] for line in (*_finding_lines(item), Text(""))]
    yield from _section("Findings", Group(*lines[:-1]), note)


def _finding_lines(item: Finding) -> Iterator[RenderableType]:
    """Yield a heading, the sentences, and the command in a line of its own that never wraps."""
    others = f" and {len(item.where) - 1:,} more" if len(item.where) > 1 else ""
    sure = "" if item.confidence is None else f", {100 * item.confidence:.0f}% sure"
    on = f", on {item.measured_on}" if item.measured_on else ""
    where = item.where[0] if item.where and item.where[0] else "the model itself"
    head = _clean(f"{item.kind}: {where}{others}")
    yield Text.assemble((f"{item.rank:>2}  ", FAINT), (head, TITLE), (_clean(f"{sure}{on}"), FAINT))
    gain = f" Gain: {item.gain}." if item.gain else ""
    yield Padding(Text(_clean(f"{item.seen} {item.why} {item.remedy}{gain}")), (0, 0, 0, 4))
    if item.option:
        yield Text(f"    {_clean(item.option)}", style=KEPT, no_wrap=True, overflow="ignore")


def _bottleneck_section(report: Report) -> Iterator[RenderableType]:
    """Yield the bottlenecks of a report without findings, which say the same and more."""
    rows = views.bottleneck_rows(report)
    if not rows or report.findings:
        return
    more = f", {len(rows) - TOP:,} more in the report" if len(rows) > TOP else ""
    note = f"the free groups together kept {percent(rows[0][0].network_keep_ratio)}{more}"
    table = _Fitted(_group_table([group for _, group in rows[:TOP]], STUCK))
    sentence = Padding(Text(_clean(rows[0][0].sentence)), (1, 0, 0, 0))
    yield from _section("Capacity bottlenecks: they gave nothing, or little", Group(table, sentence), note)


def _frozen_section(report: Report) -> Iterator[RenderableType]:
    rows = views.frozen_by_reason(report)
    if not rows:
        return
    table = _table("why", "groups", "channels", "for example:")
    for row in rows:
        table.add_row(_clean(row.reason), str(len(row.groups)), f"{row.channels:,}", _clean(row.groups[0].name))
    yield from _section("Frozen, and why", table)


def _remarks(report: Report) -> Iterator[RenderableType]:
    for title, style, sentences in (("Warnings", STUCK, views.further_warnings(report)), ("Notes", "", report.notes)):
        if sentences:
            lines = Table.grid(padding=(0, 1, 0, 0))
            for sentence in sentences:
                lines.add_row("-", Text(_clean(sentence), style=style))
            yield from _section(title, lines)


def _next_commands(report: Report, saved_to: Path | None) -> Iterator[RenderableType]:
    if report.command == "scan":
        yield from _commands("Next", [("slim", f"archscan {quote(report.model)} --target-flops 0.6")])
    if saved_to is not None:
        commands = [
            ("read", str(saved_to / "report.html")),
            ("load", f"archscan.load({str(saved_to)!r})"),
            ("measure", f"archscan evaluate {quote(str(saved_to))} --data DIR"),
        ]
        yield from _commands(f"Saved to {saved_to}", commands)


def _commands(title: str, commands: Sequence[tuple[str, str]]) -> Iterator[RenderableType]:
    """Yield lines that never wrap, so that they can be pasted from a narrow terminal."""
    yield Text(_clean(title), style=TITLE)
    for name, command in commands:
        yield Text.assemble((f"  {name:<9}", FAINT), _clean(command), no_wrap=True, overflow="ignore")
    yield Text("")


def _section(title: str, body: RenderableType, note: str = "") -> Iterator[RenderableType]:
    yield Text(_clean(title), style=TITLE)
    if note:
        yield Padding(Text(note, style=FAINT), (0, 0, 0, 2), expand=False)
    yield Padding(body, (0, 0, 1, 2), expand=False)


def _table(*headers: str) -> Table:
    """Return a table without lines: the first column and those whose header ends in a colon are aligned left."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=FAINT)
    for place, header in enumerate(headers):
        left = place == 0 or header.endswith(":")
        table.add_column(header.rstrip(":"), justify="left" if left else "right", overflow="fold")
    return table


def _pairs(lines: Sequence[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True, style=FAINT)
    table.add_column("", overflow="fold")
    for name, line in lines:
        table.add_row(name, _clean(line))
    return table


def _clean(text: str) -> str:
    """Replace what could steer a terminal: names come from models and from folders that other people made."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


@dataclass(frozen=True)
class _Fitted:
    """A table that is built when the width is known."""

    build: Callable[[int], Table]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield self.build(options.max_width)


@dataclass(frozen=True)
class _Bar:
    """A fraction as a bar of fixed width."""

    fraction: float
    style: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        filled = min(BAR_WIDTH, max(0, round(self.fraction * BAR_WIDTH)))
        full, empty = (
            ("#", ".")
            if options.ascii_only
            else ("\N{BOX DRAWINGS HEAVY HORIZONTAL}", "\N{BOX DRAWINGS LIGHT HORIZONTAL}")
        )
        yield Text.assemble((full * filled, self.style), (empty * (BAR_WIDTH - filled), FAINT))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(BAR_WIDTH, BAR_WIDTH)
