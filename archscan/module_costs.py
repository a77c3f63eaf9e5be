"""What each module costs, counted and measured: costs, widths, `Timing` → rows of a report.

The decision that is not obvious: bytes are counted at four per element, as in float32, whatever the network is in, and
for one input, while times are of a whole batch as it was measured.
"""

import numpy as np

from archscan.costs import CostModel
from archscan.latency import Timing
from archscan.report import model as numbers

ELEMENT_BYTES = 4


def module_rows(
    costs: CostModel, widths_G: np.ndarray | None, timing: Timing | None = None
) -> tuple[numbers.ModuleRow, ...]:
    """List the modules whose ops cost anything, those with MACs first.

    Args:
        costs: Costs as a function of the groups' kept steps.
        widths_G: Kept steps after planning; None in a scan.
        timing: The dense and the slim network, measured; None where they were not.
    """
    full_G = costs.full_widths_G
    macs, params, outputs, traffic = (
        costs.by_module(kind, full_G) for kind in ("macs", "params", "outputs", "traffic")
    )
    macs_after, outputs_after = (
        None if widths_G is None else costs.by_module(kind, widths_G) for kind in ("macs", "outputs")
    )
    rows = []
    for path in dict.fromkeys([*macs, *params, *outputs, *(timing.before_ms if timing else ())]):
        moved = ELEMENT_BYTES * traffic.get(path, 0)
        intensity = macs.get(path, 0) / moved if moved else None
        rows.append(
            numbers.ModuleRow(
                path,
                macs.get(path, 0),
                params.get(path, 0),
                None if macs_after is None else macs_after.get(path, 0),
                ELEMENT_BYTES * outputs.get(path, 0),
                None if outputs_after is None else ELEMENT_BYTES * outputs_after.get(path, 0),
                None if timing is None else timing.before_ms.get(path, 0.0),
                None if timing is None else timing.after_ms.get(path, 0.0),
                intensity,
                None if timing is None or intensity is None else timing.roofline.bound(intensity),
            )
        )
    return tuple(rows)


def cost_totals(costs: CostModel, widths_G: np.ndarray) -> numbers.CostTotals:
    """Count what a whole network costs at given widths."""
    macs, params, activations = (costs.evaluate(kind, widths_G) for kind in ("macs", "params", "activations"))
    return numbers.CostTotals(macs, params, activations, ELEMENT_BYTES * costs.limited("memory", widths_G))


def latency_of(timing: Timing | None) -> numbers.Latency | None:
    """Return what was measured of the whole networks."""
    if timing is None:
        return None
    of = timing.comparison
    return numbers.Latency(
        before_ms=of.before.median_ms,
        before_iqr_ms=of.before.iqr_ms,
        after_ms=of.after.median_ms,
        after_iqr_ms=of.after.iqr_ms,
        ratio=of.ratio,
        ratio_low=of.ratio_low,
        ratio_high=of.ratio_high,
        rounds=of.before.runs,
        batch=of.before.batch,
        threads=of.before.threads,
        format=of.before.format,
        device=of.before.device,
    )
