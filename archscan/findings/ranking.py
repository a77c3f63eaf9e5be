"""Which finding to act on first: findings → the same, numbered from 1.

What can be had for nothing comes first. The others go by the share of the network's MACs, parameters or time that they
concern, times their confidence. The decision that is not obvious: where a network spends (`cost`, `width`) explains
more than it remedies, so that it counts a quarter.
"""

from collections.abc import Iterable
from dataclasses import replace

from archscan.findings.finding import Finding

EXPLAINS = 0.25
_SAVED = ("macs_share_saved", "params_share_saved")
_SPENT = ("time_share", "activation_bytes_share", "params_share", "idle_share")


def ranked(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Order findings by what acting on them is worth, and number them; equals keep their order."""
    order = sorted(findings, key=lambda finding: (not _costs_nothing(finding), -worth(finding)))
    return tuple(replace(finding, rank=rank) for rank, finding in enumerate(order, start=1))


def _costs_nothing(finding: Finding) -> bool:
    return finding.saving is not None and finding.saving.lossless


def worth(finding: Finding) -> float:
    """Estimate the share of the network that acting on a finding concerns, in [0, 1]."""
    numbers = finding.numbers
    sure = 1.0 if finding.confidence is None else finding.confidence
    if finding.kind == "capacity":
        above = numbers["keep_ratio"] - numbers["network_keep_ratio"]
        return sure * numbers["macs_share"] * above / max(1 - numbers["network_keep_ratio"], 1e-9)
    if finding.kind in ("cost", "width"):
        own = numbers.get("macs_share", 0.0)
        spent = max((numbers[name] - own for name in _SPENT if name in numbers), default=own / 2)
        return EXPLAINS * sure * spent
    return sure * max(numbers[name] for name in _SAVED)
