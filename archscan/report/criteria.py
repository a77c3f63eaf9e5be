"""The table of criteria → what ``archscan criteria`` prints, by rich.

The decision that is not obvious: a criterion is a paragraph, not a row of six columns, so that formula and advice read
well at 80 columns.
"""

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from archscan.criteria import CriterionRow, criteria_table
from archscan.options import DEFAULT_CRITERION
from archscan.report.drawing import FAINT, TITLE

LEGEND = (
    "Larger saliency means keep. g is the gradient of one image's loss by the gate that multiplies unit u wherever it "
    "is read, E the mean over images, F = E[g g'], H the Hessian by the gates. Labels stand for the loss of labelled "
    "images, or of any other data with a loss of their own; where there are no labels, they are drawn from the "
    "network's own predictions. The cost is for each batch of images.",
    "Join names by plus signs to average ranks, on the scale of the first: --criterion obd+magnitude.",
)


def render_criteria() -> RenderableType:
    """Return every criterion with advice, formula, what it needs and costs, and its source."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in criteria_table():
        table.add_row(Text(row.name, style=TITLE), _paragraph(row))
    return Group(
        Text("Criteria: how a unit's saliency is scored", style=TITLE),
        Text(""),
        Padding(table, (0, 0, 0, 2), expand=False),
        *(Padding(Text(line, style=FAINT), (0, 0, 1, 2), expand=False) for line in LEGEND),
    )


def _paragraph(row: CriterionRow) -> RenderableType:
    default = " [default]" if row.name == DEFAULT_CRITERION else ""
    return Group(
        Text(f"{row.summary}{default}"),
        Text(f"s_u = {row.score}"),
        Text(f"needs {row.needs}; costs {row.cost}; {row.source}", style=FAINT),
        Text(""),
    )
