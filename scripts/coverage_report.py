"""Write the records of the coverage sweep as ``coverage.json`` and as a page to read, ``coverage.md``."""

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarking import origin
from coverage_attention import without_place

SLOW_S = 10.0
"""Networks that take longer to capture and group are listed."""

FROZEN_AIM = 0.02
"""Networks without attention should keep the width of fewer of their convolution channels than this share."""

Record = dict[str, Any]


def verdict(record: Record) -> str:
    """Say in one word how a network fared: ``equal``, ``same statistics`` or ``failed``."""
    if record["problems"]:
        return "failed"
    return "equal" if all(plan["applicable"] for plan in record["plans"].values()) else "same statistics"


def frozen_share(record: Record) -> float | None:
    """Give the share of convolution channels that keep their width; None where there are none."""
    frozen = record.get("frozen", {})
    return frozen["frozen"] / frozen["channels"] if frozen.get("channels") else None


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines.extend("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)
    return [*lines, ""]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _totals(records: Sequence[Record]) -> list[str]:
    rows = []
    for source in ("timm", "torchvision"):
        own = [record for record in records if record["network"].startswith(f"{source}:")]
        counts = Counter(map(verdict, own))
        passed = len(own) - counts["failed"]
        share = _percent(passed / len(own)) if own else ""
        rows.append([source, len(own), counts["equal"], counts["same statistics"], counts["failed"], share])
    header = ["source", "networks", "equal", "same statistics", "failed", "passed, %"]
    return ["## Totals", "", *_table(header, rows)]


def _modules(records: Sequence[Record]) -> list[str]:
    by_module: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_module[record["module"]].append(record)
    rows = []
    for module, own in sorted(by_module.items()):
        verdicts = Counter(map(verdict, own))
        channels = sum(record.get("frozen", {}).get("channels", 0) for record in own)
        frozen = sum(record.get("frozen", {}).get("frozen", 0) for record in own)
        times = [record["couple_s"] for record in own if record.get("couple_s")]
        time = f"{statistics.median(times):.2f}" if times else ""
        counts = [verdicts[name] or "" for name in ("equal", "same statistics", "failed")]
        rows.append([module, len(own), *counts, _percent(frozen / channels) if channels else "", time, _ended(own)])
    header = ["module", "networks", "equal", "same statistics", "failed", "frozen, %", "capture + grouping, s (median)"]
    header.append("Torch-Pruning ends")
    return ["## By module", "", *_table(header, rows)]


def _ended(records: Sequence[Record]) -> str:
    """Say of how many networks Torch-Pruning returns one that runs, among those that it was given."""
    given = [record["peer"] for record in records if "peer" in record]
    return f"{sum('groups_s' in peer for peer in given)} of {len(given)}" if given else ""


def _failures(records: Sequence[Record]) -> list[str]:
    rows = [
        [record["network"], problem["check"], problem["cause"]] for record in records for problem in record["problems"]
    ]
    return ["## What failed", "", *(_table(["network", "check", "cause"], rows) if rows else ["Nothing.", ""])]


def _reasons(frozen: Mapping[str, Any]) -> str:
    reasons: Counter[str] = Counter()
    for reason, count in frozen["reasons"].items():
        reasons[without_place(reason)] += count
    return "; ".join(f"{count} {reason}" for reason, count in reasons.most_common(4))


def _freezes(records: Sequence[Record]) -> list[str]:
    shares = [(record, frozen_share(record)) for record in records]
    plain = [share for record, share in shares if share is not None and not record.get("attention")]
    below = sum(share < FROZEN_AIM for share in plain)
    rows = [
        [record["network"], record["frozen"]["channels"], _percent(share), _reasons(record["frozen"])]
        for record, share in sorted(shares, key=lambda pair: -(pair[1] or 0.0))
        if share
    ]
    return [
        "## Convolution channels that keep their width",
        "",
        "Output channels of convolutions, without the network's own outputs, after every group was narrowed that can "
        f"be. Of {len(plain)} networks without attention, {below} keep under {100 * FROZEN_AIM:.0f} %; those that keep "
        "none are not listed.",
        "",
        *_table(["network", "channels", "kept, %", "reasons (channels)"], rows),
    ]


def _attention(records: Sequence[Record]) -> list[str]:
    rows = []
    for record in records:
        found = record.get("attention")
        if found:
            whole = sum(found.values())
            slimmed = sum(count for how, count in found.items() if how.startswith("slimmed"))
            detail = "; ".join(f"{count} {how}" for how, count in found.items())
            rows.append([record["network"], _percent(slimmed / whole), detail])
    return [
        "## Attention",
        "",
        "Networks that multiply activations by activations, and what becomes of the channels that are multiplied, "
        "and that such a module writes for itself (queries, keys, values); the stream around it is slimmed like any "
        "other.",
        "",
        *_table(["network", "may be slimmed, %", "channels, by treatment"], rows),
    ]


def _settled(records: Sequence[Record]) -> list[str]:
    rows = []
    for record in records:
        cuts = [*record.get("plans", {}).values(), record.get("everywhere", {})]
        rows += [
            [record["network"], note]
            for note in dict.fromkeys(note for cut in cuts for note in cut.get("kept_width", ()))
        ]
    if not rows:
        return []
    text = "What was tied or frozen because a forward cannot follow, and other remarks on the plans."
    header = ["network", "note"]
    return [
        "<details><summary>Forwards that hard-code a width</summary>",
        "",
        text,
        "",
        *_table(header, rows),
        "</details>",
        "",
    ]


def _spread(name: str, times: Sequence[float]) -> list[object]:
    return [name, len(times), f"{statistics.median(times):.2f}", f"{_quantile(times, 0.9):.2f}", f"{max(times):.2f}"]


def _times(records: Sequence[Record]) -> list[str]:
    timed = [record for record in records if record.get("couple_s")]
    if not timed:
        return []
    both = [record for record in timed if "archscan_s" in record.get("peer", {})]
    failed = [record for record in timed if "error" in record.get("peer", {})]
    rows = [_spread("archscan", [record["couple_s"] for record in timed])]
    if both:
        rows.append(_spread("archscan, once, beside Torch-Pruning", [record["peer"]["archscan_s"] for record in both]))
        rows.append(_spread("Torch-Pruning", [record["peer"]["groups_s"] for record in both]))
    slow = [[record["network"], f"{record['couple_s']:.1f}"] for record in timed if record["couple_s"] > SLOW_S]
    stages: dict[str, list[float]] = defaultdict(list)
    for record in timed:
        for stage, seconds in record.get("stage_s", {}).items():
            stages[stage].append(seconds)
    stages["all checks"] = [sum(record.get("stage_s", {}).values()) for record in timed]
    late = sum("out of time" in record["peer"]["error"] for record in failed)
    peer = (
        ", once, and then its magnitude pruner as documented, without help for the network. Of "
        f"{len(failed) + len(both)} networks that it was given (the smallest of each module first), it raises an error "
        f"on {len(failed) - late}, does not end in 75 s on {late}, and returns a network that runs on {len(both)}; "
        "whether those compute what they should was not looked at."
        if failed or both
        else "."
    )
    header = ["", "networks", "median", "90 %", "longest"]
    return [
        "## Time to capture and group",
        "",
        "CPU seconds of one thread, the better of two runs, without building the network. Torch-Pruning: "
        f"`build_dependency` and listing all groups{peer}",
        "",
        *_table(header, rows),
        f"Over {SLOW_S:.0f} s: " + (", ".join(f"{name} ({seconds} s)" for name, seconds in slow) or "none") + ".",
        "",
        "The sweep itself, CPU seconds per network:",
        "",
        *_table(header, [_spread(stage, seconds) for stage, seconds in stages.items()]),
    ]


def _everything(records: Sequence[Record]) -> list[str]:
    rows = []
    for record in records:
        peer = record.get("peer", {})
        theirs = f"{peer['groups_s']:.2f}" if "groups_s" in peer else peer.get("error", "")
        errors = [plan.get("proof", {}).get("error") for plan in record.get("plans", {}).values()]
        errors.append(record.get("everywhere", {}).get("proof", {}).get("error"))
        worst = max((error for error in errors if error is not None), default=None)
        rows.append(
            [
                record["network"],
                f"{record['params'] / 1e6:.1f}" if "params" in record else "",
                "x".join(map(str, record.get("input", [])[1:])),
                record.get("dtype", ""),
                verdict(record),
                "" if worst is None else f"{worst:.0e}",
                _percent(frozen_share(record)),
                record.get("ops", ""),
                f"{record['couple_s']:.2f}" if record.get("couple_s") else "",
                theirs,
                record.get("peak_mib", ""),
                record.get("commit", ""),
            ]
        )
    header = [
        "network",
        "parameters, M",
        "input",
        "arithmetic",
        "verdict",
        "largest relative error",
        "frozen, %",
        "ops",
    ]
    header += ["capture + grouping, s", "Torch-Pruning, s", "peak, MiB", "commit"]
    return ["<details><summary>All networks</summary>", "", *_table(header, rows), "</details>", ""]


def _left_out(left_out: Mapping[str, str], module_of: Callable[[str], str]) -> list[str]:
    by_module: dict[tuple[str, str], list[str]] = defaultdict(list)
    for network, reason in left_out.items():
        by_module[module_of(network), reason].append(network)
    rows = [[module, len(own), own[0], reason] for (module, reason), own in sorted(by_module.items())]
    return ["## Left out", "", *_table(["module", "networks", "the first", "reason"], rows)]


_CHECKS = (
    "Each network is randomised (weights, normalisation, layer scales), opened at the smallest input that it takes, in "
    "float64 (float32 for the largest), and slimmed three times: to 0.6 of its MACs (or half-way to what its frozen "
    "parts allow) by magnitude and by random scores, and with every group narrowed at random that may be. Each "
    "slim network must equal the masked original; where statistics are taken over channels, with those of the masked "
    "original played back in it (“same statistics”). Its price must be fvcore's count to the MAC, and what fvcore "
    "misses that of `FlopCounterMode`; the target must be met; a training step must change the parameters that it "
    "changes in the masked original; what is saved must load as the same classes and give the same outputs, bit by bit."
)


def write_report(
    folder: Path,
    records: Sequence[Record],
    left_out: Mapping[str, str],
    module_of: Callable[[str], str],
    made: Mapping[str, Any],
) -> None:
    """Write both files.

    Args:
        folder: Where to.
        records: One per network.
        left_out: Networks that are not swept, with the reason.
        module_of: Names the module of a network.
        made: Command, versions and machine, as `benchmarking.provenance` gives them.
    """
    records = sorted(records, key=lambda record: record["network"])
    data = {**made, "records": records, "left_out": dict(left_out)}
    (folder / "coverage.json").write_text(json.dumps(data) + "\n", encoding="utf-8")
    commits = Counter(record.get("commit", "") for record in records)
    by_commit = ", ".join(f"{commit} ({count})" for commit, count in commits.most_common() if commit)
    lines = [
        "# Coverage: every CNN of timm and torchvision",
        "",
        origin(made) + (f" Records by commit: {by_commit}." if by_commit else ""),
        "",
        _CHECKS,
        "",
        *_totals(records),
        *_failures(records),
        *_modules(records),
        *_attention(records),
        *_freezes(records),
        *_settled(records),
        *_times(records),
        *_left_out(left_out, module_of),
        *_everything(records),
    ]
    (folder / "coverage.md").write_text("\n".join(lines), encoding="utf-8")
