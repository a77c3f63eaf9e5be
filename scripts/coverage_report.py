"""Write the records of the coverage sweep as ``coverage.json`` and as a page to read, ``coverage.md``."""

import json
import platform
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

import archscan

Record = dict[str, Any]


def verdict(record: Record) -> str:
    """Say in one word how a network fared: ``equal``, ``same statistics`` or ``failed``."""
    if record["problems"]:
        return "failed"
    return "equal" if all(plan["applicable"] for plan in record["plans"].values()) else "same statistics"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines.extend("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)
    return [*lines, ""]


def _totals(records: Sequence[Record]) -> list[str]:
    by_module: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_module[record["module"]].append(record)
    rows = []
    for module, own in sorted(by_module.items()):
        verdicts = Counter(map(verdict, own))
        channels = sum(record.get("frozen", {}).get("channels", 0) for record in own)
        frozen = sum(record.get("frozen", {}).get("frozen", 0) for record in own)
        times = [record["couple_s"] for record in own if "couple_s" in record]
        share = f"{100 * frozen / channels:.1f}" if channels else ""
        time = f"{statistics.median(times):.2f}" if times else ""
        counts = [verdicts[name] for name in ("equal", "same statistics", "failed")]
        rows.append([module, len(own), *counts, share, time])
    header = ["module", "networks", "equal", "same statistics", "failed", "frozen, %", "capture + grouping, s (median)"]
    return ["## By module", "", *_table(header, rows)]


def _failures(records: Sequence[Record]) -> list[str]:
    rows = [
        [record["network"], problem["check"], problem["cause"]] for record in records for problem in record["problems"]
    ]
    return ["## What failed", "", *(_table(["network", "check", "cause"], rows) if rows else ["Nothing.", ""])]


def _freezes(records: Sequence[Record]) -> list[str]:
    reasons: dict[str, Counter[str]] = {}
    for record in records:
        frozen = record.get("frozen")
        if frozen and frozen["frozen"]:
            reasons[record["network"]] = Counter(frozen["reasons"])
    rows = [
        [name, sum(found.values()), "; ".join(f"{count} {reason}" for reason, count in found.most_common(4))]
        for name, found in reasons.items()
    ]
    return [
        "## Convolution channels that keep their width",
        "",
        "Output channels of convolutions, without the network's own outputs.",
        "",
        *_table(["network", "channels", "reasons"], rows),
    ]


def _times(records: Sequence[Record]) -> list[str]:
    timed = [record for record in records if "couple_s" in record]
    rows = []
    for record in sorted(timed, key=lambda record: -float(record["couple_s"])):
        peer = record.get("peer", {})
        theirs = f"{peer['groups_s']:.2f}" if "groups_s" in peer else peer.get("error", "")
        rows.append([record["network"], record["ops"], f"{record['couple_s']:.3f}", theirs])
    if not timed:
        return []
    median = statistics.median(record["couple_s"] for record in timed)
    return [
        "## Time to capture and group",
        "",
        f"Median {median:.2f} s, longest {max(record['couple_s'] for record in timed):.2f} s; one thread, the better "
        "of two runs, without building the network. Torch-Pruning: `build_dependency` and listing all groups.",
        "",
        *_table(["network", "ops", "archscan, s", "Torch-Pruning, s"], rows),
    ]


def _left_out(left_out: Mapping[str, str]) -> list[str]:
    reasons: dict[str, list[str]] = defaultdict(list)
    for network, reason in left_out.items():
        reasons[reason].append(network)
    rows = [[len(own), own[0], reason] for reason, own in reasons.items()]
    return ["## Left out", "", *_table(["networks", "the first", "reason"], rows)]


def write_report(folder: Path, records: Sequence[Record], left_out: Mapping[str, str], command: str) -> None:
    """Write both files.

    Args:
        folder: Where to.
        records: One per network.
        left_out: Networks that are not swept, with the reason.
        command: What was typed, for the page.
    """
    records = sorted(records, key=lambda record: record["network"])
    versions = {
        "archscan": archscan.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "torchvision": torchvision.__version__,
    }
    data = {"command": command, "versions": versions, "records": records, "left_out": dict(left_out)}
    (folder / "coverage.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    verdicts = Counter(map(verdict, records))
    lines = [
        "# Coverage: every CNN of timm and torchvision",
        "",
        f"`python {command}`, with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
        f"{len(records)} networks: {verdicts['equal']} equal the masked original, {verdicts['same statistics']} equal "
        f"it with the same statistics (a normalisation mixes channels), {verdicts['failed']} failed.",
        "",
        "Each is slimmed to 0.6 of its MACs (or half-way to what its frozen parts allow) twice, by random scores and "
        "by magnitude; the slim network is compared with the masked original in float64, also with randomised "
        "normalisation; its price is recounted by fvcore and `FlopCounterMode`; it takes a training step; it is saved "
        "and loaded.",
        "",
        *_totals(records),
        *_failures(records),
        *_freezes(records),
        *_times(records),
        *_left_out(left_out),
    ]
    (folder / "coverage.md").write_text("\n".join(lines), encoding="utf-8")
