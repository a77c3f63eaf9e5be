"""Time capture + grouping against Torch-Pruning's dependency graph + listing of all groups, on the same networks.

Both sides get the same network and the same input in the same process, in turn, on one thread; the first round warms
up and is not counted. The growth of peak memory is measured apart, each side in a process of its own. Writes
``reports/trace.json`` and ``reports/trace.md``.

python scripts/bench_trace.py
python scripts/bench_trace.py --scaling        # the time per op of ResNets of 50 to 1000 layers, archscan alone
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarking import MALLOC, growth_mib, origin, provenance, require_peer, restart_with_quiet_memory, table, write

import archscan  # before timm, which brings torchvision

import torch  # isort: skip
from torch import Tensor, nn  # isort: skip

from archscan.reference_nets import cifar_resnet  # isort: skip
from archscan.sources import open_subject  # isort: skip

NETWORKS = ("timm:resnet50", "timm:densenet201", "timm:efficientnet_b0", "timm:convnext_tiny", "timm:inception_v4")
INPUT_SIZES = {"timm:inception_v4": 299}
LAYERS = (50, 98, 200, 500, 1000)


@dataclass(frozen=True)
class Row:
    """One network: medians over the repeats; groups of archscan that may be cut, and frozen ones; growth of memory."""

    network: str
    input_shape: tuple[int, ...]
    archscan_s: float
    peer_s: float
    ratio: float
    archscan_groups: int
    archscan_frozen_groups: int
    peer_groups: int
    archscan_growth_mib: float | None
    peer_growth_mib: float | None
    archscan_runs_s: tuple[float, ...]
    peer_runs_s: tuple[float, ...]


def ours(model: nn.Module, example: Tensor) -> tuple[int, int]:
    """Capture and group; count groups that may be cut and groups that may not."""
    groups = archscan.couple(model, example).groups
    frozen = sum(group.frozen is not None for group in groups)
    return len(groups) - frozen, frozen


def theirs(model: nn.Module, example: Tensor) -> tuple[int, int]:
    """Build the dependency graph and list all its groups; count them."""
    import torch_pruning

    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    return len(list(graph.get_all_groups())), 0


SIDES: dict[str, Callable[[nn.Module, Tensor], tuple[int, int]]] = {"archscan": ours, "torch-pruning": theirs}


def opened(network: str) -> tuple[nn.Module, Tensor]:
    """Open a network with random weights, which play no part here, and an input of the size it was made for."""
    subject = open_subject(network, weights="random", input_size=INPUT_SIZES.get(network))
    return subject.model.eval().requires_grad_(True), subject.example_input


def timed(side: str, model: nn.Module, example: Tensor) -> tuple[float, tuple[int, int]]:
    """Run one side once: seconds and counts."""
    gc.collect()
    start = time.perf_counter()
    counts = SIDES[side](model, example)
    return time.perf_counter() - start, counts


def measure(network: str, repeats: int) -> Row:
    """Time both sides in turn, then ask fresh processes for memory."""
    model, example = opened(network)
    counts = {side: timed(side, model, example)[1] for side in SIDES}  # the warm-up
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(repeats):
        for side in sorted(SIDES, reverse=bool(number % 2)):
            seconds[side].append(timed(side, model, example)[0])
    us, them = (median(seconds[side]) for side in SIDES)
    growth = {side: growth_in_fresh_process(side, network) for side in SIDES}
    return Row(
        network,
        tuple(example.shape),
        us,
        them,
        us / them,
        *counts["archscan"],
        counts["torch-pruning"][0],
        growth["archscan"],
        growth["torch-pruning"],
        tuple(seconds["archscan"]),
        tuple(seconds["torch-pruning"]),
    )


def growth_in_fresh_process(side: str, network: str) -> float | None:
    """Measure by how much one run raises the peak resident memory of a process that has everything loaded, in MiB."""
    command = [sys.executable, __file__, "--networks", network, "--growth-of", side]
    environment = {name: value for name, value in os.environ.items() if name not in MALLOC}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.split()[-1])


def growth(side: str, network: str) -> float | None:
    """Measure the growth in this process, after a warm-up on a tiny network that loads what is loaded lazily."""
    SIDES[side](cifar_resnet(8).eval(), torch.randn(1, 3, 32, 32))
    model, example = opened(network)
    gc.collect()
    return growth_mib(lambda: SIDES[side](model, example))


def scaling(layers: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Time archscan alone on CIFAR ResNets of growing depth."""
    rows = []
    for depth in layers:
        blocks_depth = 6 * max(1, (depth - 2) // 6) + 2
        model, example = cifar_resnet(blocks_depth).eval(), torch.randn(1, 3, 32, 32)
        graph = archscan.couple(model, example).graph
        assert graph is not None
        seconds = median(timed("archscan", model, example)[0] for _ in range(repeats))
        rows.append({"layers": blocks_depth, "ops": len(graph.nodes), "seconds": seconds})
        print(f"{blocks_depth} layers: {seconds:.3f} s", file=sys.stderr)
    return rows


def mib(growth: float | None) -> str:
    """Write an amount of memory that may not have been measurable."""
    return "n/a" if growth is None else f"{growth:.1f}"


def markdown(rows: Sequence[Row], scaled: Sequence[dict[str, Any]], made: dict[str, Any], repeats: int) -> str:
    """Write the report."""
    body = [
        (
            row.network,
            "x".join(map(str, row.input_shape[1:])),
            f"{row.archscan_s:.3f}",
            f"{row.peer_s:.3f}",
            f"{row.ratio:.2f}",
            f"{row.archscan_groups} + {row.archscan_frozen_groups}",
            str(row.peer_groups),
            mib(row.archscan_growth_mib),
            mib(row.peer_growth_mib),
        )
        for row in rows
    ]
    header = ("network", "input", "archscan [s]", "Torch-Pruning [s]", "ratio", "groups", "groups, peer")
    parts = [
        "# Capture and grouping",
        f"`archscan.couple` against Torch-Pruning's `DependencyGraph().build_dependency` and `list(get_all_groups())`: "
        f"same process, same network, in turn; medians of {repeats} after one warm-up. The ratio is archscan's time "
        "over the peer's: below 1 is faster. Groups of archscan: those that may be cut + those that may not (input, "
        "output); the peer lists the network's output among its groups. Memory is what one run adds to the peak "
        "resident memory of a fresh process, with the allocator's own settings.",
        origin(made),
        table((*header, "memory [MiB]", "memory, peer [MiB]"), body),
    ]
    if rows:
        faster = sum(row.ratio < 1 for row in rows)
        slowest = max(rows, key=lambda row: row.ratio)
        parts.append(
            f"archscan takes less time on {faster} of {len(rows)} networks; its largest ratio is {slowest.ratio:.2f}, "
            f"on {slowest.network}."
        )
    if scaled:
        lines = [
            (str(row["layers"]), str(row["ops"]), f"{row['seconds']:.3f}", f"{1e6 * row['seconds'] / row['ops']:.0f}")
            for row in scaled
        ]
        text = "Capture and grouping of CIFAR ResNets of growing depth, archscan alone."
        parts += ["## Scaling", text, table(("layers", "ops", "seconds", "µs per op"), lines)]
    return "\n\n".join(parts if rows else parts[:1] + parts[2:3] + parts[4:])


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), help="names as archscan takes them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scaling", nargs="*", type=int, metavar="LAYERS", help="time ResNets of these depths as well")
    parser.add_argument("--output", type=Path, default=Path("reports/trace"), help="stem of the files to write")
    parser.add_argument("--growth-of", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    require_peer()
    warnings.simplefilter("ignore")  # the peer's, of parameters that it does not know
    if options.growth_of:
        print(json.dumps(growth(options.growth_of, options.networks[0])))
        return
    restart_with_quiet_memory(threads=1)
    rows = []
    for network in options.networks:
        rows.append(measure(network, options.repeats))
        print(f"{network}: {rows[-1].archscan_s:.3f} s, peer {rows[-1].peer_s:.3f} s", file=sys.stderr)
    layers = options.scaling or LAYERS if options.scaling is not None else ()
    scaled = scaling(layers, options.repeats)
    made = provenance(threads=1)
    data = {**made, "repeats": options.repeats, "networks": [asdict(row) for row in rows], "scaling": scaled}
    write(options.output, data, markdown(rows, scaled, made, options.repeats))


if __name__ == "__main__":
    main()
