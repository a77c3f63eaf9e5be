"""What everything printed is drawn with, by rich: titles and sections, tables, bars, sentences, commands.

The decision that is not obvious: nothing is drawn with lines. Sections are told apart by a bold title and white space,
so that the same text reads well in colour, without, at 80 columns, and piped into a file. Names come from models and
from saved folders: they are printed as `Text`, never as markup, with control characters replaced.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

TOP = 8
"""Rows of a table of groups; the HTML report has them all."""

BAR_WIDTH = 12
WIDE = 96
"""Columns from which on tables have all their columns; below, names need the room."""

KEPT, STUCK, BAD, TITLE, FAINT = "green", "yellow", "bold white on red", "bold", "dim"


def headline(sentence: str) -> Iterator[RenderableType]:
    """Yield what stands first: the verdict, with room around it."""
    yield from (Text(""), Text(clean(sentence), style=TITLE), Text(""))


def single_line(sentence: str, alarms: Iterable[str] = ()) -> RenderableType:
    """Return a verdict and the titles of alarms in a line that never wraps: what ``--quiet`` prints."""
    titles = "".join(f" [{alarm.lower()}]" for alarm in alarms)
    line = Text(clean(sentence) + titles, no_wrap=True, overflow="ignore")
    return Group(line)  # a bare Text is wrapped by the console whatever it says of itself


def section(title: str, body: RenderableType, note: str = "") -> Iterator[RenderableType]:
    """Yield a title and what stands below it."""
    yield from heading(title, note)
    yield Padding(body, (0, 0, 1, 2), expand=False)


def heading(title: str, note: str = "") -> Iterator[RenderableType]:
    """Yield a title and its note."""
    yield Text(clean(title), style=TITLE)
    if note:
        yield Padding(Text(note, style=FAINT), (0, 0, 0, 2), expand=False)


def sentences(title: str, said: Sequence[str], style: str = "") -> Iterator[RenderableType]:
    """Yield a section with a dash before each sentence; nothing where there are none."""
    if said:
        lines = Table.grid(padding=(0, 1, 0, 0))
        for sentence in said:
            lines.add_row("-", Text(clean(sentence), style=style))
        yield from section(title, lines)


def command_lines(title: str, typed: Sequence[tuple[str, str]]) -> Iterator[RenderableType]:
    """Yield lines that never wrap, so that they can be pasted from a narrow terminal."""
    yield Text(clean(title), style=TITLE)
    for name, command in typed:
        yield Text.assemble((f"  {name:<9}", FAINT), clean(command), no_wrap=True, overflow="ignore")
    yield Text("")


def columns(*headers: str) -> Table:
    """Return a table without lines: the first column and those whose header ends in a colon are aligned left."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=FAINT)
    for place, header in enumerate(headers):
        left = place == 0 or header.endswith(":")
        made.add_column(header.rstrip(":"), justify="left" if left else "right", overflow="fold")
    return made


def pairs(lines: Iterable[tuple[str, str]]) -> Table:
    """Return names, each with what is said of it."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column("", no_wrap=True, style=FAINT)
    made.add_column("", overflow="fold")
    for name, line in lines:
        made.add_row(name, clean(line))
    return made


def clean(text: str) -> str:
    """Replace what could steer a terminal: names come from models and from folders that other people made."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


@dataclass(frozen=True)
class Fitted:
    """A table that is built when the width is known."""

    build: Callable[[int], Table]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield self.build(options.max_width)


@dataclass(frozen=True)
class Bar:
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
