"""One finding about a network: numbers → a sentence each on what was seen, why it matters and what to do.

Everything is plain JSON, so that terminal, HTML page and ``summary.json`` say the same. The decision that is not
obvious: what a finding saves is kept apart from its sentence, as whole numbers that were priced by the cost model, so
that a test can hold them against a network that was really rebuilt.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FindingKind = Literal["capacity", "redundancy", "dead", "duplicate", "cost", "width"]


@dataclass(frozen=True)
class Saving:
    """What doing as a finding says takes off the dense network's costs, counted.

    Attributes:
        macs: Multiply-accumulates for one input; one MAC is one FLOP.
        params: Parameters.
        lossless: Whether the network computes the same without them, for any input.
    """

    macs: int
    params: int
    lossless: bool = False


@dataclass(frozen=True)
class Finding:
    """Something about a network that its user can act on.

    Attributes:
        rank: Place among the findings, from 1; the one to act on first.
        kind: ``capacity`` (too narrow), ``redundancy`` (too wide), ``dead`` and ``duplicate`` (channels that do
            nothing of their own), ``cost`` (where time or MACs go), ``width`` (unfortunate for the hardware).
        level: What `where` names: channel ``group``s or ``module``s.
        where: Their names, the first the most telling.
        seen: What was seen, with its numbers.
        why: Why it matters.
        remedy: What to do.
        option: The command line that does it, or the option to pass; empty where there is none.
        gain: What to expect of it, in words.
        confidence: How sure, in [0, 1]; None where the finding is counted or proven, not estimated.
        measured_on: What it was measured on, such as ``256 images``; empty where nothing was measured.
        saving: Exact costs that it takes off; None where it takes none.
        numbers: What the sentences say, by name, with units in the names.
    """

    rank: int
    kind: FindingKind
    level: Literal["group", "module"]
    where: tuple[str, ...]
    seen: str
    why: str
    remedy: str
    option: str = ""
    gain: str = ""
    confidence: float | None = None
    measured_on: str = ""
    saving: Saving | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
