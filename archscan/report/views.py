"""What renderers show: `Report` → verdict, banners and the rows of tables, still numbers and sentences without layout.

Terminal and HTML print the same rows, so the two can never disagree. The decision that is not obvious: the tree of
modules is cut where the cost is. Starting at the root, a branch is opened while it holds more than half of the MACs, so
DenseNet's ``features`` opens into blocks while the stages of a ResNet stay one row each.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from archscan.bottlenecks import Bottleneck
from archscan.report.model import NOISE, RANDOM_WEIGHTS, GroupRow, ModuleRow, Report

INPUT_NOTE = "1 MAC = 1 FLOP"
NEGLIGIBLE = 0.0005
"""Branches below this share of the MACs are summed into one row."""

SHARE_NOTE = "a layer counts for the group it reads and for the group it writes, so shares add up to more than 100%"


@dataclass(frozen=True)
class Banner:
    """Something that changes what all the numbers mean."""

    title: str
    text: str


@dataclass(frozen=True)
class CostRow:
    """One cost before and after; ``after`` and ``kept`` are None in a scan."""

    name: str
    before: int
    after: int | None
    origin: str

    @property
    def kept(self) -> float | None:
        """Kept fraction."""
        return None if self.after is None or not self.before else self.after / self.before


@dataclass(frozen=True)
class FrozenRow:
    """All groups that were frozen for one reason."""

    reason: str
    groups: tuple[GroupRow, ...]

    @property
    def channels(self) -> int:
        """Channels of all of them."""
        return sum(group.units for group in self.groups)


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


@dataclass(frozen=True)
class Widths:
    """Channels over a set of groups."""

    groups: int
    units: int
    kept: int

    @property
    def keep_ratio(self) -> float:
        """Kept fraction; 1 where there are no channels."""
        return self.kept / self.units if self.units else 1.0


def si(number: int, unit: str = "") -> str:
    """Return four significant digits with an SI prefix before the unit: 4089184256 → ``4.089 G``."""
    for limit, prefix in ((10**15, "P"), (10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= limit * 0.99995:
            return f"{number / limit:#.4g} {prefix}{unit}"
    return f"{number} {unit}".strip()


def percent(fraction: float | None) -> str:
    """Return one decimal: 0.5996 → ``60.0%``; a dash for None."""
    return "-" if fraction is None else f"{100 * fraction:.1f}%"


def plural(count: int, noun: str) -> str:
    """Return ``1 group`` or ``2 groups``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def verdict(report: Report) -> str:
    """Say in one sentence what came out."""
    if report.keep_ratio is None or report.target is None:
        free = widths(report, frozen=False)
        return (
            f"{report.model} costs {si(report.before.macs, 'MACs')} and has {si(report.before.params)} parameters; "
            f"{free.groups:,} of its {plural(len(report.groups), 'channel group')} may be slimmed, "
            f"{free.units:,} channels in all."
        )
    asked = f" (asked for: at most {percent(report.target.ratio)})"
    by_macs = report.target.kind == "macs"
    return (
        f"{report.model} was slimmed to {percent(report.keep_ratio.macs)} of its MACs{asked if by_macs else ''} and "
        f"{percent(report.keep_ratio.params)} of its parameters{'' if by_macs else asked}; {_proof(report)}."
    )


def _proof(report: Report) -> str:
    proof = report.verification
    if proof is None:
        return "it was not verified"
    if not proof.passed:
        return "VERIFICATION FAILED"
    if not proof.applicable:
        return "equality with the masked original cannot be asked for, all other checks passed"
    return "the slim network computes what the plan says"


def banners(report: Report) -> tuple[Banner, ...]:
    """Return what must not be overlooked: random weights, synthetic data, a failed verification."""
    found = []
    if report.verification is not None and not report.verification.passed:
        found.append(Banner("VERIFICATION FAILED", "The rebuilt network is not the masked original; do not use it."))
    if report.weights is not None and report.weights.kind == "random" and report.command == "slim":
        why = f" ({report.weights.reason})" if report.weights.reason else ""
        text = f"Scores reflect initialisation, not training{why}. Give trained weights with --weights FILE."
        found.append(Banner("RANDOM WEIGHTS", text))
    if report.data is not None and report.data.kind == "synthetic" and report.command == "slim":
        text = "Scores come from noise, not from images. Give real ones with --data DIR."
        found.append(Banner("SYNTHETIC DATA", text))
    return tuple(found)


def further_warnings(report: Report) -> tuple[str, ...]:
    """Return the warnings that no banner says."""
    shown = (RANDOM_WEIGHTS, NOISE) if banners(report) else ()
    return tuple(warning for warning in report.warnings if not warning.startswith(shown))


def cost_rows(report: Report) -> tuple[CostRow, ...]:
    """Return MACs, parameters and activations before and after."""
    before, after = report.before, report.after
    return (
        CostRow("MACs", before.macs, after.macs if after else None, f"counted, {INPUT_NOTE}"),
        CostRow("Parameters", before.params, after.params if after else None, "counted"),
        CostRow("Activations", before.activations, after.activations if after else None, "counted, layer outputs"),
    )


def input_line(report: Report) -> str:
    """Say for which input the costs are."""
    return f"one input of {' x '.join(map(str, report.input_shape[1:]))}"


def widths(report: Report, *, frozen: bool | None = None) -> Widths:
    """Return channels over all groups, or over the frozen or the free ones only."""
    groups = [group for group in report.groups if frozen is None or group.frozen == frozen]
    return Widths(len(groups), sum(group.units for group in groups), sum(group.kept for group in groups))


def top_givers(report: Report, limit: int) -> tuple[GroupRow, ...]:
    """Return the groups that gave most: removed fraction times share of the MACs, largest first."""
    gave = [group for group in report.groups if group.kept < group.units]
    gave.sort(key=lambda group: (-(1 - group.kept / group.units) * group.macs_share, group.depth))
    return tuple(gave[:limit])


def costliest_groups(report: Report, limit: int) -> tuple[GroupRow, ...]:
    """Return the groups with the largest share of the MACs."""
    return tuple(sorted(report.groups, key=lambda group: (-group.macs_share, group.depth))[:limit])


def coupling_line(report: Report) -> str:
    """Say how layers hang together: how many channels go alone, and the group that ties most layers."""
    if not report.groups:
        return "no channel groups were found"
    widest = max(report.groups, key=lambda group: (len(group.members), -group.depth))
    layers = len({member for group in report.groups for member in group.members})
    return (
        f"{plural(layers, 'layer')} in {plural(len(report.groups), 'channel group')}; "
        f"{widest.name} ties most, {plural(len(widest.members), 'layer')} that must lose the same channels"
    )


def bottleneck_rows(report: Report) -> tuple[tuple[Bottleneck, GroupRow], ...]:
    """Return each bottleneck with the group that it names; a name that no group has is left out."""
    by_name = {group.name: group for group in report.groups}
    return tuple((item, by_name[item.group]) for item in report.bottlenecks if item.group in by_name)


def frozen_by_reason(report: Report) -> tuple[FrozenRow, ...]:
    """Return the frozen groups by reason, the reason with most channels first."""
    by_reason: dict[str, list[GroupRow]] = defaultdict(list)
    for group in report.groups:
        if group.frozen:
            by_reason[group.reason].append(group)
    rows = [FrozenRow(reason, tuple(groups)) for reason, groups in by_reason.items()]
    return tuple(sorted(rows, key=lambda row: (-row.channels, row.reason)))


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


def verification_line(report: Report) -> str:
    """Say what the verification measured."""
    proof = report.verification
    if proof is None:
        return "not run: a scan rebuilds nothing"
    if not proof.applicable:
        outcome = "Shapes, finiteness and a training step were checked instead: " + (
            "passed." if proof.passed else "FAILED."
        )
        return f"Equality does not apply ({proof.reason}). {outcome}"
    outcome = "passed" if proof.passed else "FAILED"
    error = "no number" if proof.max_abs_error is None else f"{proof.max_abs_error:.1e}"
    bound = "" if proof.tolerance is None else f", tolerance {proof.tolerance:.1e}"
    how = f", {proof.reason}" if proof.passed and proof.reason else ""
    return f"{outcome}: rebuilt network against masked original{how}, largest difference {error}{bound} (measured)"


def accuracy_line(report: Report) -> str | None:
    """Say the top-1 accuracies, or None where none was measured."""
    if report.accuracy is None:
        return None
    before, after = report.accuracy.before, report.accuracy.after
    change = "" if before is None or after is None else f" ({100 * (after - before):+.1f} points)"
    known = [f"{percent(value)} {when}" for value, when in ((before, "before"), (after, "after")) if value is not None]
    return f"{', '.join(known)}{change}; top-1, measured on {plural(report.accuracy.samples, 'image')}"


def saliency_line(report: Report) -> str | None:
    """Compare the saliency that the plan lost with the uniform plan's; None in a scan."""
    lost = report.saliency_lost
    if lost is None:
        return None
    against = (
        f", {lost.plan / lost.uniform:.2f} x that of uniform widths at the same budget" if lost.uniform > 0 else ""
    )
    return f"{lost.plan:.4g}{against} (estimated by {report.criterion})"


def data_line(report: Report) -> str | None:
    """Say what the scores were measured on; None where there were no data."""
    data = report.data
    if data is None:
        return None
    images = {
        "folder": "images from a folder",
        "zip": "images from a zip file",
        "digits": "images of handwritten digits",
        "synthetic": "synthetic images",
        "given": "images given",
    }.get(data.kind, f"images ({data.kind})")
    labels = "with their labels" if data.labels == "dataset" else "labels drawn from the model's own predictions"
    classes = f" of {data.classes:,} classes" if data.classes > 1 else ""
    skipped = f"; {plural(len(data.skipped), 'file')} skipped as unreadable" if data.skipped else ""
    return f"{data.images:,} {images}{classes}, {labels}{skipped}"


def seconds_line(report: Report) -> str | None:
    """Say what took how long, the slowest stage first; None where no stage was timed."""
    stages = sorted(report.seconds.items(), key=lambda stage: -stage[1])
    if not stages:
        return None
    named = ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages if seconds >= 0.05)
    return f"{sum(report.seconds.values()):.1f} s (measured)" + (f": {named}" if named else "")


def weights_line(report: Report) -> str | None:
    """Say where the weights come from; None where none were needed."""
    if report.weights is None:
        return None
    source = f": {report.weights.source}" if report.weights.source else ""
    return f"{report.weights.kind}{source}"
