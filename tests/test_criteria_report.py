"""What ``archscan criteria`` prints."""

import io

import pytest

from archscan.criteria import criteria_table
from archscan.options import DEFAULT_CRITERION
from archscan.report.criteria import render_criteria
from archscan.report.terminal import console, show


@pytest.mark.parametrize("width", [60, 80, 140])
def test_every_criterion_is_told_whole_at_any_width(width: int) -> None:
    file = io.StringIO()
    show(render_criteria(), console(file, width=width, colour=False))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(" ".join(line.split()) for line in lines)
    for row in criteria_table():
        assert any(line.split()[:1] == [row.name] for line in lines)
        for text in (row.summary, row.score, row.needs, row.cost, row.source):
            assert " ".join(text.split()) in words.replace(f"{row.name} ", "", 0), (row.name, text)
    assert words.count("[default]") == 1
    default = next(row for row in criteria_table() if row.name == DEFAULT_CRITERION)
    assert f"{default.summary} [default]" in words
