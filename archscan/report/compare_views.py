"""What renderers say of a `Comparison`: numbers → sentences and choices of rows, without layout.

Terminal and page say the same. The decision that is not obvious: where results differ by their budgets alone, which of
them no other beats says nothing, since all of them are on the front; there the verdict tells what both ends lose.
"""

from archscan.report.compare import Comparison, GroupKept, QualityAxis
from archscan.report.views import listed, percent


def verdict(comparison: Comparison) -> str:
    """Say in one sentence what was compared, and which results no other beats."""
    kept = [result.keep_ratio.macs for result in comparison.results]
    span = (
        percent(kept[0])
        if percent(min(kept)) == percent(max(kept))
        else f"{percent(min(kept))} to {percent(max(kept))}"
    )
    said = f"{len(comparison.results)} results of {comparison.model}, at {span} of its MACs"
    if not comparison.fronts:
        return f"{said}."
    best, quality = comparison.fronts[0], comparison.qualities[0]
    if is_sweep(comparison):
        least, most = (at(range(len(kept)), key=kept.__getitem__) for at in (min, max))
        ends = " to ".join(f"{quality_text(quality, place)} at {percent(kept[place])}" for place in (most, least))
        return f"{len(kept)} budgets of {comparison.model}: {quality.name} {ends} of the MACs."
    by = "accuracy" if quality.kind == "accuracy" else "saliency lost"
    if len(best.results) == len(comparison.results):
        return f"{said}; by {by} and MACs, none is beaten by another."
    names = listed(best.results) if len(best.results) <= 3 else f"{len(best.results)} of them"
    return f"{said}; by {by} and MACs, no other result beats {names}."


def quality_text(quality: QualityAxis, place: int) -> str:
    """Write one value, with the change from the dense network where it is an accuracy."""
    value = quality.values[place]
    if quality.kind == "saliency":
        return f"{value:.4g}"
    change = "" if quality.dense is None else f" ({100 * (value - quality.dense):+.1f})"
    return f"{percent(value)}{change}"


def most_different(comparison: Comparison, limit: int) -> tuple[GroupKept, ...]:
    """Return the groups whose kept fractions lie furthest apart, furthest first."""

    def spread(group: GroupKept) -> float:
        known = [kept for kept in group.kept if kept is not None]
        return (max(known) - min(known)) / group.units if group.units and len(known) > 1 else 0.0

    rows = [group for group in comparison.groups if spread(group) > 0]
    return tuple(sorted(rows, key=lambda group: -spread(group))[:limit])


def unbeaten(comparison: Comparison) -> tuple[str, ...]:
    """Name the results that no other beats, by MACs and by the first quality; none where that tells nothing apart."""
    best = comparison.fronts[0].results if comparison.fronts else ()
    return best if len(best) < len(comparison.results) else ()


def is_sweep(comparison: Comparison) -> bool:
    """Say whether the results differ by their budgets only, so that they have an order of their own."""
    return (
        set(comparison.differing) <= {"target"} and len({result.keep_ratio.macs for result in comparison.results}) > 1
    )
