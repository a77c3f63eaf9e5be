"""What renderers show: `Report` → verdict, banners and the rows of tables, still numbers and sentences without layout.

Terminal and HTML print the same rows, so the two can never disagree. The decision that is not obvious: sentences that
compare before and after name how each number came about, counted, measured or estimated, in the sentence itself.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from archscan.findings import Bottleneck
from archscan.report.model import NOISE, RANDOM_WEIGHTS, Environment, GroupRow, Report, Verification

INPUT_NOTE = "1 MAC = 1 FLOP"
PEAK_NOTE = "counted, live activations"
COST_NOUNS = {"macs": "MACs", "params": "parameters", "memory": "peak activation memory", "latency": "measured time"}
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


def listed(names: Sequence[str]) -> str:
    """Write names as a list in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def verdict(report: Report) -> str:
    """Say in one sentence what came out."""
    if report.keep_ratio is None or report.target is None:
        free = widths(report, frozen=False)
        return (
            f"{report.model} costs {si(report.before.macs, 'MACs')} and has {si(report.before.params)} parameters; "
            f"{free.groups:,} of its {plural(len(report.groups), 'channel group')} may be slimmed, "
            f"{free.units:,} channels in all."
        )
    if report.lossless is not None:
        gone = report.lossless
        return (
            f"{report.model} lost {plural(gone.channels, 'channel')} that did nothing, in "
            f"{plural(gone.groups, 'channel group')}, and keeps {percent(report.keep_ratio.macs)} of its MACs and "
            f"{percent(report.keep_ratio.params)} of its parameters; it computes what the original does."
        )
    if report.command == "widen":
        wider = sum(group.kept > group.units for group in report.groups)
        return (
            f"{report.model} was widened at {plural(wider, 'channel group')}, to {percent(report.keep_ratio.macs)} of "
            f"its MACs and {percent(report.keep_ratio.params)} of its parameters; {_proof(report)}{_trained(report)}."
        )
    *first, last = _kept_shares(report)
    return f"{report.model} was slimmed to {', '.join(first)} and {last}; {_proof(report)}{_trained(report)}."


def _trained(report: Report) -> str:
    epochs = [row for run in report.history for row in run.epochs]
    if not epochs:
        return ""
    found = epochs[-1].eval_accuracy
    gave = "of training came after" if found is None else f"of training brought it to {percent(found)} accuracy"
    return f"; {plural(len(epochs), 'epoch')} {gave}"


def _kept_shares(report: Report) -> list[str]:
    """Say of which cost how much is kept: MACs and parameters always, what a target is on, and what was measured."""
    asked = {target.kind: target.ratio for target in (report.target, *report.further_targets) if target is not None}
    kept = {kind: ratio for kind, ratio in _keep_ratios(report).items() if ratio is not None}
    return [
        f"{percent(ratio)} of its {COST_NOUNS[kind]}"
        + (f" (asked for: {'' if kind == 'latency' else 'at most '}{percent(asked[kind])})" if kind in asked else "")
        for kind, ratio in kept.items()
        if kind != "memory" or kind in asked
    ]


def _keep_ratios(report: Report) -> dict[str, float | None]:
    before, after, keep = report.before.peak_bytes, report.after, report.keep_ratio
    return {
        "macs": None if keep is None else keep.macs,
        "params": None if keep is None else keep.params,
        "memory": None if after is None or after.peak_bytes is None or not before else after.peak_bytes / before,
        "latency": None if report.latency is None else report.latency.ratio,
    }


def _proof(report: Report) -> str:
    proof = report.verification
    if proof is None:
        return "it was not verified"
    if not proof.passed:
        return "VERIFICATION FAILED"
    if not proof.applicable:
        return "equality with the masked original cannot be asked for, all other checks passed"
    if report.command == "widen":
        return f"the new network computes what the {'plan says' if top_givers(report, 1) else 'original does'}"
    return "the slim network computes what the plan says"


def banners(report: Report) -> tuple[Banner, ...]:
    """Return what must not be overlooked: random weights, synthetic data, a failed verification."""
    found = []
    if report.verification is not None and not report.verification.passed:
        found.append(Banner("VERIFICATION FAILED", "The rebuilt network is not the masked original; do not use it."))
    if report.weights is not None and report.weights.kind == "random" and report.command != "scan":
        why = f" ({report.weights.reason})" if report.weights.reason else ""
        text = f"Scores reflect initialisation, not training{why}. Give trained weights with --weights FILE."
        found.append(Banner("RANDOM WEIGHTS", text))
    if report.data is not None and report.data.kind == "synthetic" and report.command != "scan":
        text = "Scores come from noise, not from images. Give real ones with --data DIR."
        found.append(Banner("SYNTHETIC DATA", text))
    return tuple(found)


def further_warnings(report: Report) -> tuple[str, ...]:
    """Return the warnings that no banner says."""
    shown = (RANDOM_WEIGHTS, NOISE) if banners(report) else ()
    return tuple(warning for warning in report.warnings if not warning.startswith(shown))


def cost_rows(report: Report) -> tuple[CostRow, ...]:
    """Return MACs, parameters, activations and peak memory before and after."""
    before, after = report.before, report.after
    peak = before.peak_bytes
    return (
        CostRow("MACs", before.macs, after.macs if after else None, f"counted, {INPUT_NOTE}"),
        CostRow("Parameters", before.params, after.params if after else None, "counted"),
        CostRow("Activations", before.activations, after.activations if after else None, "counted, layer outputs"),
        *(() if peak is None else (CostRow("Peak bytes", peak, after.peak_bytes if after else None, PEAK_NOTE),)),
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


def wider_groups(report: Report) -> tuple[GroupRow, ...]:
    """Return the groups that got wider, by depth."""
    return tuple(group for group in report.groups if group.kept > group.units)


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


def stuck_groups(report: Report) -> frozenset[str]:
    """Return the names of the groups that are capacity bottlenecks."""
    found = [
        name for item in report.findings if (item.kind, item.level) == ("capacity", "group") for name in item.where
    ]
    return frozenset(found or (item.group for item in report.bottlenecks))


def frozen_by_reason(report: Report) -> tuple[FrozenRow, ...]:
    """Return the frozen groups by reason, the reason with most channels first."""
    by_reason: dict[str, list[GroupRow]] = defaultdict(list)
    for group in report.groups:
        if group.frozen:
            by_reason[group.reason].append(group)
    rows = [FrozenRow(reason, tuple(groups)) for reason, groups in by_reason.items()]
    return tuple(sorted(rows, key=lambda row: (-row.channels, row.reason)))


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
    how = f", {proof.reason}" if proof.passed and proof.reason else ""
    wider = report.command == "widen" and not top_givers(report, 1)
    against = "original" if wider else "masked original"
    return f"{outcome}: rebuilt network against {against}{how}, largest difference {_differing(proof)} (measured)"


def _differing(proof: Verification) -> str:
    """Say how far outputs are apart; relative to the largest, since random weights make outputs of any size."""
    if proof.max_abs_error is None:
        return "no number"
    unit, of = (proof.largest_output, " of the largest output") if proof.largest_output else (1.0, "")
    bound = "" if proof.tolerance is None else f", tolerance {proof.tolerance / unit:.0e}"
    return f"{proof.max_abs_error / unit:.1e}{of}{bound}"


def lossless_line(report: Report) -> str | None:
    """Say how far a network without its dead channels is from the original; None where a budget decided."""
    found = report.lossless
    if found is None:
        return None
    images = (
        "not compared on images"
        if found.error_on_images is None
        else f"{found.error_on_images:.1e} on {plural(found.images, 'image')}"
    )
    return (
        f"against the original with nothing masked, largest difference {found.error_on_noise:.1e} on noise, tolerance "
        f"{found.tolerance:.1e}, and {images} (measured)"
    )


def accuracy_line(report: Report) -> str | None:
    """Say the top-1 accuracies, or None where none was measured."""
    if report.accuracy is None:
        return None
    before, after = report.accuracy.before, report.accuracy.after
    change = "" if before is None or after is None else f" ({100 * (after - before):+.1f} points)"
    known = [f"{percent(value)} {when}" for value, when in ((before, "before"), (after, "after")) if value is not None]
    return f"{', '.join(known)}{change}; top-1, measured on {plural(report.accuracy.samples, 'image')}"


def latency_line(report: Report) -> str | None:
    """Say the measured times and how they were measured; None where they were not."""
    time = report.latency
    if time is None:
        return None
    after = ""
    if time.after_ms is not None and time.ratio is not None:
        after = f" before, {_milliseconds(time.after_ms, time.after_iqr_ms)} after: {percent(time.ratio)}"
    if time.ratio_low is not None and time.ratio_high is not None:
        after += f" (95% interval {percent(time.ratio_low)} to {percent(time.ratio_high)})"
    how = f"batch {time.batch}, {plural(time.threads, 'thread')}, {time.format}, {time.device}"
    return f"{_milliseconds(time.before_ms, time.before_iqr_ms)}{after}; {how}, measured {time.rounds:,} times in turns"


def _milliseconds(median: float, spread: float | None) -> str:
    return f"{median:.4g} ms" + ("" if spread is None else f" (IQR {spread:.2g})")


def saliency_line(report: Report) -> str | None:
    """Compare the saliency that the plan lost with the uniform plan's; None where nothing could be lost."""
    lost = report.saliency_lost
    if lost is None or (report.command == "widen" and not top_givers(report, 1)):
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


def machine_line(environment: Environment | None) -> str | None:
    """Say what was computed on; None where that was not kept."""
    return None if environment is None else f"{environment.device}, {environment.threads} threads"


def versions_line(archscan: str, environment: Environment | None) -> str:
    """Say which versions a report was made with."""
    return f"archscan {archscan}" + (f", torch {environment.torch}, Python {environment.python}" if environment else "")
