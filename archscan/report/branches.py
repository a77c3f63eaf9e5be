"""Where the cost is in the tree of modules: `Report` → some rows that together are the network.

The decision that is not obvious: the tree is cut where the cost is. Starting at the root, a branch is opened while it
holds more than half of the MACs, so DenseNet's ``features`` opens into blocks while the stages of a ResNet stay one row
each.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from archscan.report.model import ModuleRow, Report

NEGLIGIBLE = 0.0005
"""Branches below this share of the MACs are summed into one row."""


@dataclass(frozen=True)
class BranchRow:
    """One branch of the module tree with everything below it.

    Attributes:
        path: Module path; ``(own ops)`` marks what an opened module computes itself.
        macs: Dense.
        params: Dense.
        macs_after: In the slim network; None in a scan.
        macs_share: Fraction of the dense network's MACs.
    """

    path: str
    macs: int
    params: int
    macs_after: int | None
    macs_share: float


def branch_rows(report: Report, limit: int = 16) -> tuple[BranchRow, ...]:
    """Cut the module tree into at most ``limit`` branches that together are the network, in the order of execution."""
    if not report.modules:
        return ()
    total = _macs(report.modules) or 1
    branches = _cut(report.modules, total)
    largest = sorted(branches, key=lambda path: -_macs(branches[path]))
    shown = set(largest if len(largest) <= limit else largest[: limit - 1])
    shown -= {path for path in shown if _macs(branches[path]) < NEGLIGIBLE * total}
    hidden = [path for path in branches if path not in shown]
    rows = [_branch_row(path, branches[path], total) for path in branches if path in shown]
    if hidden:
        name = hidden[0] if len(hidden) == 1 else f"({len(hidden)} others)"
        rows.append(_branch_row(name, [row for path in hidden for row in branches[path]], total))
    return tuple(rows)


def _cut(modules: Sequence[ModuleRow], total: int) -> dict[str, list[ModuleRow]]:
    """Open the branch that holds more than half of the MACs, again and again; at most one does."""
    branches = {"": list(modules)}
    while True:
        path = max(branches, key=lambda path: _macs(branches[path]))
        prefix = f"{path}." if path else ""
        below = any(row.path != path and row.path.startswith(prefix) for row in branches[path])
        if not below or 2 * _macs(branches[path]) <= total:
            return branches
        opened: dict[str, list[ModuleRow]] = {}
        for name, rows in branches.items():
            opened.update(_children(name, rows) if name == path else {name: rows})
        branches = opened


def _children(path: str, rows: Sequence[ModuleRow]) -> dict[str, list[ModuleRow]]:
    prefix = f"{path}." if path else ""
    children: dict[str, list[ModuleRow]] = defaultdict(list)
    for row in rows:
        own = f"{path} (own ops)".strip()
        children[own if row.path == path else prefix + row.path[len(prefix) :].split(".", 1)[0]].append(row)
    return children


def _branch_row(path: str, rows: Sequence[ModuleRow], total: int) -> BranchRow:
    after = [row.macs_after for row in rows if row.macs_after is not None]
    return BranchRow(
        path=path or "(own ops)",
        macs=_macs(rows),
        params=sum(row.params for row in rows),
        macs_after=sum(after) if len(after) == len(rows) else None,
        macs_share=_macs(rows) / total,
    )


def _macs(rows: Sequence[ModuleRow]) -> int:
    return sum(row.macs for row in rows)
