"""Time capture + grouping against Torch-Pruning's dependency graph + listing of all groups, on the same networks.

Both sides get the same network and the same input in the same process, in turn, on one thread; the first round warms
up and is not counted. The growth of peak memory is measured apart, each side in a process of its own. Times are CPU
seconds, so that what else the machine does counts little. Writes ``reports/trace.json`` and ``reports/trace.md``.

python scripts/bench_trace.py
python scripts/bench_trace.py --scaling    # also time and memory against the number of ops, up to 1000 layers
"""

import argparse
import gc
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarking import MALLOC, growth_mib, origin, provenance, require_peer, restart_with_quiet_memory, table, write

import archscan  # before timm, which brings torchvision

import numpy as np  # isort: skip
import torch  # isort: skip
from torch import Tensor, nn  # isort: skip

from archscan.reference_nets import cifar_resnet  # isort: skip
from archscan.sources import open_subject  # isort: skip
from timm.models.densenet import DenseNet  # isort: skip

NETWORKS = ("timm:resnet50", "timm:densenet201", "timm:efficientnet_b0", "timm:convnext_tiny", "timm:inception_v4")
INPUT_SIZES = {"timm:inception_v4": 299}
LAYERS = (50, 98, 200, 500, 1000)
LARGE = ("densenet264", "timm:hrnet_w64")
"""What is measured beside CIFAR ResNets of `LAYERS` layers; no peer's network has a name for a DenseNet-264."""

PEER_LIMIT_S = 75


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
    if network.startswith("resnet-"):
        return cifar_resnet(int(network.partition("-")[2])).eval(), torch.randn(1, 3, 32, 32)
    if network == "densenet264":
        return DenseNet(growth_rate=32, block_config=(6, 12, 64, 48)).eval(), torch.randn(1, 3, 224, 224)
    subject = open_subject(network, weights="random", input_size=INPUT_SIZES.get(network))
    return subject.model.eval().requires_grad_(True), subject.example_input


def timed(side: str, model: nn.Module, example: Tensor) -> tuple[float, tuple[int, int]]:
    """Run one side once: CPU seconds and counts."""
    gc.collect()
    start = time.process_time()
    counts = SIDES[side](model, example)
    return time.process_time() - start, counts


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


def _in_fresh_process(network: str, *what: str, quiet_memory: bool) -> "subprocess.CompletedProcess[str]":
    """Run this script on one network in a process of its own."""
    command = [sys.executable, __file__, "--networks", network, *what]
    environment = {name: value for name, value in os.environ.items() if quiet_memory or name not in MALLOC}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def growth_in_fresh_process(side: str, network: str) -> float | None:
    """Measure by how much one run raises the peak resident memory of a process that has everything loaded, in MiB."""
    done = _in_fresh_process(network, "--growth-of", side, quiet_memory=False)
    done.check_returncode()
    return json.loads(done.stdout.split()[-1])


def growth(side: str, network: str) -> float | None:
    """Measure the growth in this process, after a warm-up on a tiny network that loads what is loaded lazily."""
    SIDES[side](cifar_resnet(8).eval(), torch.randn(1, 3, 32, 32))
    model, example = opened(network)
    gc.collect()
    return growth_mib(lambda: SIDES[side](model, example))


def peer_seconds(network: str) -> float | str:
    """Time the peer once in a fresh process; say what went wrong where it fails or takes over `PEER_LIMIT_S`."""
    done = _in_fresh_process(network, "--time-of", "torch-pruning", quiet_memory=True)
    if done.returncode == 0:
        return float(json.loads(done.stdout.split()[-1]))
    if done.returncode == -signal.SIGXCPU:
        return f"over {PEER_LIMIT_S} s"
    return (done.stderr.strip().splitlines() or ["crashed"])[-1][:120]


def limited_seconds(side: str, network: str) -> float:
    """Time one side in this process, which is ended `PEER_LIMIT_S` after the start of the run."""
    SIDES[side](cifar_resnet(8).eval(), torch.randn(1, 3, 32, 32))
    model, example = opened(network)
    gc.collect()
    end = math.ceil(time.process_time()) + PEER_LIMIT_S
    resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
    return timed(side, model, example)[0]


def scaling(layers: Sequence[int], others: Sequence[str], repeats: int, alone: bool) -> list[dict[str, Any]]:
    """Measure CIFAR ResNets of growing depth, and other large networks, against their number of ops.

    Args:
        layers: Depths of the ResNets, which are rounded to what there is.
        others: Names of further networks.
        repeats: Runs of archscan; their median counts.
        alone: Measure archscan's time only, and neither memory nor the peer.
    """
    depths = {f"resnet-{depth}": depth for depth in (6 * max(1, (wanted - 2) // 6) + 2 for wanted in layers)}
    rows = []
    for network in (*depths, *others):
        model, example = opened(network)
        graph = archscan.couple(model, example).graph
        assert graph is not None
        row: dict[str, Any] = {"network": network, "layers": depths.get(network), "ops": len(graph.nodes)}
        row["seconds"] = median(timed("archscan", model, example)[0] for _ in range(repeats))
        row["growth_mib"] = None if alone else growth_in_fresh_process("archscan", network)
        row["peer_seconds"] = "not run" if alone else peer_seconds(network)
        rows.append(row)
        print(f"{network}: {row['seconds']:.3f} s, peer {row['peer_seconds']}", file=sys.stderr)
    return rows


def exponent(rows: Sequence[Mapping[str, Any]], what: str) -> float | None:
    """Fit how a quantity grows with the number of ops, over the networks of one kind: 1 is linear."""
    points = [(row["ops"], row[what]) for row in rows if row["layers"] and row[what]]
    if len(points) < 3:
        return None
    logs = np.log(np.array(points, dtype=float))
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


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
        f"same process, same network, in turn; CPU seconds, medians of {repeats} after one warm-up. The ratio is "
        "archscan's time over the peer's: below 1 is faster. Groups of archscan: those that may be cut + those that "
        "may not (input, output); the peer lists the network's output among its groups. Memory is what one run adds to "
        "the peak resident memory of a fresh process, with the allocator's own settings.",
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
        parts += ["## Against the number of ops", *_scaling_text(scaled)]
    return "\n\n".join(parts if rows else parts[:1] + parts[2:3] + parts[4:])


def _scaling_text(scaled: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write the table of scaling and what follows from it."""
    lines = [
        (
            row["network"],
            str(row["ops"]),
            f"{row['seconds']:.3f}",
            f"{1e6 * row['seconds'] / row['ops']:.0f}",
            mib(row["growth_mib"]),
            row["peer_seconds"] if isinstance(row["peer_seconds"], str) else f"{row['peer_seconds']:.2f}",
        )
        for row in scaled
    ]
    header = ("network", "ops", "archscan [s]", "µs per op", "memory [MiB]", "Torch-Pruning [s]")
    text = (
        "CIFAR ResNets of growing depth, a DenseNet of 264 layers (growth 32, blocks of 6, 12, 64 and 48) and "
        f"HRNet-W64. Torch-Pruning runs once, in a fresh process, for {PEER_LIMIT_S} CPU seconds at most."
    )
    found = [(what, exponent(scaled, name)) for what, name in (("time", "seconds"), ("memory", "growth_mib"))]
    fits = [f"{what} as ops^{power:.2f}" for what, power in found if power is not None]
    growth = [f"Over the ResNets, {' and '.join(fits)} (1 is linear)."] if fits else []
    return [text, table(header, lines), *growth]


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), help="names as archscan takes them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--scaling", nargs="*", type=int, metavar="LAYERS", help="also ResNets of these depths; of none: all, and more"
    )
    parser.add_argument("--output", type=Path, default=Path("reports/trace"), help="stem of the files to write")
    parser.add_argument("--growth-of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--time-of", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    require_peer()
    warnings.simplefilter("ignore")  # the peer's, of parameters that it does not know
    if options.growth_of:
        print(json.dumps(growth(options.growth_of, options.networks[0])))
        return
    if options.time_of:
        torch.set_num_threads(1)
        print(json.dumps(limited_seconds(options.time_of, options.networks[0])))
        return
    restart_with_quiet_memory(threads=1)
    rows = []
    for network in options.networks:
        rows.append(measure(network, options.repeats))
        print(f"{network}: {rows[-1].archscan_s:.3f} s, peer {rows[-1].peer_s:.3f} s", file=sys.stderr)
    layers = options.scaling or LAYERS if options.scaling is not None else ()
    alone = options.scaling != []
    scaled = scaling(layers, () if alone else LARGE, options.repeats, alone) if layers else []
    made = provenance(threads=1)
    data = {**made, "repeats": options.repeats, "networks": [asdict(row) for row in rows], "scaling": scaled}
    write(options.output, data, markdown(rows, scaled, made, options.repeats))


if __name__ == "__main__":
    main()
