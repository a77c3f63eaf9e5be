"""A training while it lasts: `Moment`s → a live view on the terminal, by rich.

The view is gone when the training is done: what stays on the screen is the report. In a pipe nothing is drawn.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import IO

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from archscan.report.terminal import console
from archscan.report.training import EpochRow, Moment

_ROWS = 10
_BAR_WIDTH = 24


@contextmanager
def watching(stream: IO[str], *, hidden: bool = False) -> Iterator[Callable[[Moment], None]]:
    """Show a training on a terminal for the duration of a ``with`` block.

    Args:
        stream: Where to draw; nothing is drawn unless it is a terminal.
        hidden: Draw nothing in any case.
    """
    place = console(stream)
    if hidden or not place.is_terminal:
        yield lambda _moment: None
        return
    live = Live(console=place, transient=True, auto_refresh=False)

    def show(moment: Moment) -> None:
        live.start()  # with the first moment, so that bars before and after have the terminal to themselves
        live.update(render_moment(moment), refresh=True)
        if len(moment.rows) == moment.epochs:
            live.stop()

    try:
        yield show
    finally:
        live.stop()


def render_moment(moment: Moment) -> RenderableType:
    """Return one line for the present epoch, below a table of the last ones."""
    bar = Table.grid(padding=(0, 2))
    left = "?" if moment.seconds_left is None else str(timedelta(seconds=round(moment.seconds_left)))
    bar.add_row(
        Text(f"epoch {moment.epoch}/{moment.epochs}", style="bold"),
        ProgressBar(moment.steps, moment.step, width=_BAR_WIDTH),
        Text(f"loss {moment.loss:.3f}"),
        Text("" if moment.accuracy is None else f"accuracy {moment.accuracy:.1%}"),
        Text(f"{moment.images_per_second:,.0f} images/s"),
        Text(f"{left} left", style="dim"),
    )
    return Group(_table(moment.rows), bar) if moment.rows else bar


def _table(rows: Sequence[EpochRow]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for header in ("epoch", "learning rate", "loss", "accuracy in training", "evaluated", "images/s", "seconds"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows[-_ROWS:]:
        table.add_row(
            str(row.epoch),
            f"{row.lr:.2g}",
            f"{row.train_loss:.3f}",
            "" if row.train_accuracy is None else f"{row.train_accuracy:.1%}",
            "" if row.eval_accuracy is None else f"{row.eval_accuracy:.1%}",
            f"{row.images_per_second:,.0f}",
            f"{row.seconds:.0f}",
        )
    return table
