"""Prove thousands of random CNNs, and shrink every one that is wrong.

    python scripts/fuzz_random_cnns.py --examples 10000

The networks are those of the test suite (`tests.random_cnn`), drawn by hypothesis from another seed for each block.
"""

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import archscan  # noqa: F401 - before anything that imports torchvision

# isort: split
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.random_cnn import Program, check, programs

BLOCK = 500
"""Networks that are drawn from one seed; a failure ends its block."""


def prove_block(number: int, examples: int, longest: int, outcomes: Counter[str]) -> str:
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

    last: list[str] = []
    try:
        prove()
    except Exception as error:  # a network may fail in any way; hypothesis has shrunk it by now
        message = (str(error).strip().splitlines() or [""])[0]
        return f"{last[0]}\n    {type(error).__name__}: {message}"
    return ""


def main() -> None:
    """Run the blocks, and exit with 1 where any network is wrong."""
    parser = argparse.ArgumentParser(description="Prove thousands of random CNNs.")
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--longest", type=int, default=10, help="patterns in one network, at most")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first block")
    options = parser.parse_args()
    torch.set_num_threads(1)
    outcomes, wrong, start = Counter[str](), [], time.monotonic()
    blocks = -(-options.examples // BLOCK)
    for number in range(blocks):
        size = min(BLOCK, options.examples - number * BLOCK)
        found = prove_block(options.first_seed + number, size, options.longest, outcomes)
        if found:
            wrong.append(found)
            print(f"WRONG {found}", flush=True)
        counts = ", ".join(f"{count:,} {kind}" for kind, count in outcomes.most_common())
        print(f"block {number + 1}/{blocks}: {counts}; {time.monotonic() - start:.0f} s", flush=True)
    print(f"{outcomes.total():,} networks were refused with a reason or proven; {len(wrong)} blocks found a wrong one")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
