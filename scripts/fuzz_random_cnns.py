"""Prove thousands of random CNNs, and shrink every one that is wrong.

    python scripts/fuzz_random_cnns.py --examples 10000
    nice -n 19 python scripts/fuzz_random_cnns.py --minutes 10    # goes on where the last run stopped

The networks are those of the test suite (`tests.random_cnn`), drawn by hypothesis from another seed for each block.
Each run is added to ``reports/fuzz.json``, so that many networks can be seen in pieces.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import archscan  # noqa: F401 - before anything that imports torchvision

# isort: split
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.random_cnn import Program, check, programs

BLOCK = 250
"""Networks that are drawn from one seed; a failure ends its block."""

REASONS = 30
"""Reasons of refusals that are kept, the most frequent first."""


def prove_block(
    number: int, examples: int, longest: int, outcomes: Counter[str], reasons: Counter[str]
) -> dict[str, Any] | None:
    """Prove a block of networks, counting what becomes of each; return the smallest that is wrong, and how."""

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(program=programs(longest), draw=st.integers(0, 999))
    def prove(program: Program, draw: int) -> None:
        last[:] = [f"check({program!r}, seed={draw})"]
        outcome = check(program, draw)
        outcomes[outcome.kind] += 1
        if outcome.reason:
            reasons[f"{outcome.kind}: {_without_places(outcome.reason)}"] += 1

    last: list[str] = []
    try:
        prove()
    except Exception as error:  # a network may fail in any way; hypothesis has shrunk it by now
        message = (str(error).strip().splitlines() or [""])[0]
        return {"seed": number, "network": last[0], "error": f"{type(error).__name__}: {message}"}
    return None


def _without_places(reason: str) -> str:
    """Cut what differs between two networks with one reason: module paths, shapes and numbers."""
    reason = re.sub(r"(?<= at )\S+|(?<= of )\w+\d\S*", "…", reason)
    return re.sub(r"\(\d[\d, ]*\)|\[\d[\d, -]*\]|\b\d+\b", "#", reason)[:160]


def _commit() -> str:
    folder = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.strip()


def _write(path: Path, runs: list[dict[str, Any]]) -> None:
    """Write all runs with their totals."""
    totals: Counter[str] = Counter()
    for run in runs:
        totals.update(run["outcomes"])
    data = {
        "examples": totals.total(),
        "outcomes": dict(totals.most_common()),
        "wrong": sum(len(r["wrong"]) for r in runs),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**data, "runs": runs}, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prove thousands of random CNNs.")
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, help="stop after the block in which so many CPU minutes are over")
    parser.add_argument("--longest", type=int, default=10, help="patterns in one network, at most")
    parser.add_argument(
        "--first-seed", type=int, help="seed of the first block; by default, where the last run stopped"
    )
    parser.add_argument("--output", type=Path, default=Path("reports/fuzz.json"))
    return parser.parse_args()


def main() -> None:
    """Run the blocks, and exit with 1 where any network is wrong."""
    options = _arguments()
    runs = json.loads(options.output.read_text(encoding="utf-8"))["runs"] if options.output.is_file() else []
    first = options.first_seed
    if first is None:
        first = max((run["seeds"][1] + 1 for run in runs), default=0)
    torch.set_num_threads(1)
    outcomes, reasons = Counter[str](), Counter[str]()
    wrong: list[dict[str, Any]] = []
    blocks = -(-options.examples // BLOCK)
    for number in range(blocks):
        size = min(BLOCK, options.examples - number * BLOCK)
        found = prove_block(first + number, size, options.longest, outcomes, reasons)
        if found:
            wrong.append(found)
            print(f"WRONG {found['network']}\n    {found['error']}", flush=True)
        counts = ", ".join(f"{count:,} {kind}" for kind, count in outcomes.most_common())
        print(f"block {number + 1}/{blocks}: {counts}; {time.process_time():.0f} s", flush=True)
        run = {"seeds": [first, first + number], "block": BLOCK, "longest": options.longest, "commit": _commit()}
        run |= {"examples": outcomes.total(), "outcomes": dict(outcomes.most_common()), "wrong": wrong}
        run |= {"reasons": dict(reasons.most_common(REASONS)), "cpu_s": round(time.process_time())}
        _write(options.output, [*runs, run])
        if options.minutes is not None and time.process_time() > 60 * options.minutes:
            break
    print(f"{outcomes.total():,} networks were refused with a reason or proven; {len(wrong)} blocks found a wrong one")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
