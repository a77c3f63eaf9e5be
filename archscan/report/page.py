"""What all pages share: template, styles and scripts → one self-contained HTML text.

Style and scripts are inline, and a page forbids itself every request, so it opens offline and can be mailed. All that
is filled in is escaped by Jinja2. The decision that is not obvious: Plotly's package ships only its full bundle of
4.8 MB, so a page carries that compressed, 1.9 MB as text, and unpacks it once it shows (see ``plotly.js``).
"""

import base64
import gzip
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from archscan.report.views import percent, si

HERE = Path(__file__).parent


def template(name: str, **filters: Callable[..., Any]) -> Template:
    """Read a template.

    Args:
        name: Of its file, beside this one.
        filters: What it calls besides ``si``, ``percent`` and ``count``.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(si=si, percent=percent, count=_count, **filters)
    return environment.get_template(name)


def joined(names: Sequence[str]) -> str:
    """Return the text of style sheets or of scripts, one after the other."""
    return "".join((HERE / name).read_text(encoding="utf-8") for name in names)


def fill(
    wanted: Template, styles: Sequence[str], scripts: Sequence[str], *, plotly: str | None = None, **values: Any
) -> str:
    """Return a page as text.

    Args:
        wanted: Its template, which extends ``base.html.j2``.
        styles: Names of its style sheets, in order.
        scripts: Names of its scripts, in order.
        plotly: Plotly's script as `packed_plotly` gives it, the default.
        values: What the template shows.
    """
    return wanted.render(
        style=Markup(joined(styles)),
        script=Markup(f'"use strict";\n{joined(scripts)}'),
        plotly=Markup(packed_plotly() if plotly is None else plotly),
        **values,
    )


@cache
def packed_plotly() -> str:
    """Return Plotly's script, compressed, in letters; the same on every run."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 6, mtime=0)).decode()


def _count(number: int) -> str:
    return f"{number:,}"
