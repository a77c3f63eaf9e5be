"""Progress bars on standard error: a description → a callback that moves the bar.

A bar shows itself only on a terminal; in a pipe or with ``--quiet`` the callback does nothing, so that library code
never asks. Bars vanish when they are done: what stays on the screen is the result.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from archscan.options import ProgressCallback, ProgressFactory


class _Count(MofNCompleteColumn):
    """How much of how much is done; nothing where that is not known."""

    def render(self, task: Task) -> Text:
        """Write ``3/8``."""
        return super().render(task) if task.total else Text("")


def progress_on(console: Console, *, hidden: bool = False) -> ProgressFactory:
    """Return a function that opens one bar on the console for the duration of a ``with`` block.

    Args:
        console: Where bars are drawn; nothing is drawn unless it is a terminal.
        hidden: Draw nothing in any case.
    """

    @contextmanager
    def progress(description: str) -> Iterator[ProgressCallback]:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), _Count(), TimeRemainingColumn())
        disable = hidden or not console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=disable) as bar:
            task = bar.add_task(description, total=None)

            def advance(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total or None)  # 0 where nobody knows: the bar pulses

            yield advance

    return progress
