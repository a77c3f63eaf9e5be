"""Time slim networks against their dense originals, and against Torch-Pruning's at the same MACs.

For each network, with random weights, which time does not depend on: archscan at a share of the MACs; archscan at the
same share of the measured time (eager PyTorch, at each batch size); Torch-Pruning at the same MACs, widths in multiples
of 1 and of 8. All of them and the dense network run in turns in eager PyTorch, under `torch.compile` and, on the CPU,
in ONNX Runtime; a ratio is the median over rounds in which all ran. Writes ``reports/latency.json`` and
``reports/latency.md``, each point to a cache at once, so that ``--resume`` goes on.

python scripts/bench_latency.py --threads 2
python scripts/bench_latency.py --networks resnet18 --input-size 64 --batches 1 --runtimes eager --repeats 3
"""

import argparse
import copy
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarking import (
    Cache,
    counted_macs,
    names,
    origin,
    provenance,
    require_peer,
    restart_with_quiet_memory,
    table,
    write,
)

import archscan  # before timm, which brings torchvision

import numpy as np  # isort: skip
import torch  # isort: skip
from torch import Tensor, nn  # isort: skip

from archscan.errors import ArchscanError  # isort: skip
from archscan.exporters import ExportSettings  # isort: skip
from archscan.exporters.network import prepare  # isort: skip
from archscan.exporters.onnx_file import FILE, write_onnx  # isort: skip
from archscan.latency import LatencySetup  # isort: skip
from archscan.latency.timing import Run, device_name, median_ratio, ready, threads, timed_rounds  # isort: skip
from archscan.slimming import SlimSettings  # isort: skip
from archscan.sources import open_subject  # isort: skip

NETWORKS = "resnet50,mobilenetv2_100,efficientnet_b0,densenet121,convnext_tiny"
RUNTIMES = ("eager", "compile", "onnx")
DENSE, FLOPS, LATENCY = "dense", "archscan, MACs", "archscan, time"
PEERS = {"Torch-Pruning, multiples of 1": 1, "Torch-Pruning, multiples of 8": 8}
BISECTIONS = 10

Networks = dict[str, nn.Module]


@dataclass(frozen=True)
class Point:
    """One network at one batch size in one runtime, measured beside the others.

    Attributes:
        network: Name of the dense original.
        batch: Images per forward pass.
        runtime: One of `RUNTIMES`.
        variant: Which network.
        macs: Kept share of the MACs.
        median_ms: Of one forward pass.
        iqr_ms: Interquartile range.
        ratio: Share of the dense network's time, the median over rounds.
        low: Lower end of its 95% interval.
        high: Upper end.
        rounds: How often each ran.
        machine: What it ran on.
    """

    network: str
    batch: int
    runtime: str
    variant: str
    macs: float
    median_ms: float
    iqr_ms: float
    ratio: float
    low: float
    high: float
    rounds: int
    machine: str

    @property
    def key(self) -> tuple[str, int, str, str]:
        """What tells points apart."""
        return self.network, self.batch, self.runtime, self.variant


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=names, default=names(NETWORKS))
    parser.add_argument("--input-size", type=int, default=None, help="in pixels (default: each network's own)")
    parser.add_argument("--ratio", type=float, default=0.6, help="kept share of MACs, and of time")
    parser.add_argument("--batches", type=names, default=["1", "16"])
    parser.add_argument("--runtimes", type=names, default=list(RUNTIMES))
    parser.add_argument("--criterion", default="magnitude")
    parser.add_argument("--repeats", type=int, default=None, help="rounds (default: by time)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on with what was measured")
    parser.add_argument("--output", type=Path, default=Path("reports/latency"), help="stem of the files")
    return parser.parse_args()


def main() -> None:
    """Measure, and write the report."""
    options = read_arguments()
    require_peer()
    restart_with_quiet_memory(options.threads)
    torch.set_num_threads(options.threads)
    made = provenance(options.threads)
    apart = ("output", "resume", "networks", "batches", "runtimes")
    setting = {name: value for name, value in vars(options).items() if name not in apart}
    path = options.output.with_name(f"{options.output.name}.cache.jsonl")
    cache = Cache(path, setting, lambda entry: Point(**entry), resume=options.resume)
    failures: dict[str, str] = {}
    for name in options.networks:
        for point in measured(name, options, cache.points, failures):
            cache.put(point)
    points = [point for point in cache.points.values() if point.network in options.networks]
    data = {**made, "setting": setting, "failures": failures, "points": [vars(each) for each in points]}
    write(options.output, data, markdown(data, points))


def measured(
    name: str, options: argparse.Namespace, known: Mapping[tuple[object, ...], Point], failures: dict[str, str]
) -> Iterator[Point]:
    """Yield the points of one network that are not known."""
    missing = [
        (int(batch), runtime)
        for batch in options.batches
        for runtime in options.runtimes
        if (name, int(batch), runtime, DENSE) not in known and not (runtime == "onnx" and options.device == "cuda")
    ]
    if not missing:
        return
    size = None if options.input_size is None else (options.input_size,) * 2
    subject = open_subject(name, weights="random", input_size=size)
    dense, example = subject.model.eval().to(options.device), subject.example_input.to(options.device)
    fixed = {DENSE: dense, **at_equal_macs(name, dense, example, options, failures)}
    for batch in dict.fromkeys(batch for batch, _ in missing):
        setup = LatencySetup(batch, options.threads, repeats=options.repeats, device=options.device)
        networks = {**fixed, **at_equal_time(name, dense, example, setup, options, failures)}
        for runtime in (runtime for at, runtime in missing if at == batch):
            say(f"{name}, batch {batch}, {runtime}")
            yield from timed_in(runtime, name, networks, example, setup)


def at_equal_macs(
    name: str, dense: nn.Module, example: Tensor, options: argparse.Namespace, failures: dict[str, str]
) -> Networks:
    """Slim a network to the share of the MACs, by archscan and by the peer."""
    say(f"{name}: slimming to {options.ratio:g} of the MACs")
    found = {}
    try:
        found[FLOPS] = archscan.slim(dense, example, target_flops=options.ratio, criterion=options.criterion).model
    except ArchscanError as error:
        failures[f"{name}, {FLOPS}"] = str(error)
    for variant, multiple in PEERS.items():
        slim = peers_network(dense, example, options.ratio, multiple)
        if slim is None:
            failures[f"{name}, {variant}"] = "no pruning ratio gives a network of so few MACs that runs"
        else:
            found[variant] = slim
    return found


def at_equal_time(
    name: str,
    dense: nn.Module,
    example: Tensor,
    setup: LatencySetup,
    options: argparse.Namespace,
    failures: dict[str, str],
) -> Networks:
    """Slim a network to the share of the time at one batch size."""
    say(f"{name}: slimming to {options.ratio:g} of the time at batch {setup.batch}")
    settings = SlimSettings(latency=setup)
    try:
        result = archscan.slim(
            dense, example, target_latency=options.ratio, criterion=options.criterion, settings=settings
        )
    except ArchscanError as error:
        failures[f"{name}, {LATENCY}, batch {setup.batch}"] = str(error)
        return {}
    return {LATENCY: result.model}


def peers_network(dense: nn.Module, example: Tensor, ratio: float, multiple: int) -> nn.Module | None:
    """Bisect the peer's pruning ratio for the largest network not above a share of the MACs; None where none runs.

    The peer as its documentation uses it: group L2 norms, the same ratio in every layer.
    """
    import torch_pruning
    from torch_pruning_peer import CRASHES

    limit, low, high, best = ratio * counted_macs(dense, example), 0.0, 1.0, None
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        model = copy.deepcopy(dense).requires_grad_(True)
        classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
        try:
            torch_pruning.pruner.BasePruner(
                model,
                example,
                importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=middle,
                round_to=multiple,
                ignored_layers=classifier,
            ).step()
            enough = counted_macs(model, example) <= limit
        except CRASHES:
            high = middle
            continue
        if enough:
            high, best = middle, model
        else:
            low = middle
    return None if best is None else best.eval()


def timed_in(runtime: str, name: str, networks: Networks, example: Tensor, setup: LatencySetup) -> Iterator[Point]:
    """Run all networks in turns in one runtime."""
    device = torch.device(setup.device or "cpu")
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        stack.enter_context(threads(setup))
        runs: list[Run] = []
        for place, model in enumerate(networks.values()):
            if runtime == "onnx":
                runs.append(onnx_run(model, example, setup.batch, Path(folder) / str(place)))
            else:
                own = copy.deepcopy(model)
                if runtime == "compile":
                    own.compile()
                runs.append(stack.enter_context(ready(own, example, setup)))
        times_RK = timed_rounds(runs, setup.repeats, device)
    torch.compiler.reset()
    dense_macs = counted_macs(networks[DENSE], example)
    for column, (variant, model) in enumerate(networks.items()):
        low, median, high = np.quantile(times_RK[:, column], (0.25, 0.5, 0.75)).tolist()
        yield Point(
            name,
            setup.batch,
            runtime,
            variant,
            counted_macs(model, example) / dense_macs,
            median,
            high - low,
            *median_ratio(times_RK[:, [0, column]]),
            len(times_RK),
            device_name(device),
        )


def onnx_run(model: nn.Module, example: Tensor, batch: int, folder: Path) -> Callable[[], object]:
    """Export a network for one batch size, and return a function that runs it in ONNX Runtime."""
    import onnxruntime

    folder.mkdir()
    with warnings.catch_warnings(action="ignore"):
        write_onnx(prepare(model, example, ExportSettings(batch_size=batch)), folder)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: torch.cat([example] * batch)[:batch].numpy()}
    return lambda: session.run(None, given)


def markdown(data: Mapping[str, object], points: list[Point]) -> str:
    """Write the report."""
    setting = data["setting"]
    assert isinstance(setting, Mapping)
    parts = [
        "# Time of slim networks",
        f"Share of the dense network's time that is left at {setting['ratio']:g} of the MACs, and where that share of "
        "the time (eager, at this batch size) was asked for; in brackets the 95% interval, then the share of the MACs. "
        "Smaller is faster. All networks of a row ran in turns.",
        origin(data),
    ]
    machines = Counter(point.machine for point in points)
    if len(machines) > 1:
        parts.append(f"Points by machine: {', '.join(f'{name} ({count})' for name, count in machines.most_common())}.")
    variants = (FLOPS, LATENCY, *PEERS)
    by_key = {point.key: point for point in points}
    for runtime in dict.fromkeys(point.runtime for point in points):
        rows = []
        for network, batch in dict.fromkeys((point.network, point.batch) for point in points):
            dense = by_key.get((network, batch, runtime, DENSE))
            if dense is None:
                continue
            cells = [cell(by_key.get((network, batch, runtime, variant))) for variant in variants]
            rows.append([network, str(batch), f"{dense.median_ms:.1f} ± {dense.iqr_ms:.1f}", *cells])
        parts += [f"## {runtime}", table(["network", "batch", "dense, ms (IQR)", *variants], rows)]
    landed = [point for point in points if point.variant == LATENCY and point.runtime == "eager"]
    if landed:
        near = sum(abs(point.ratio / setting["ratio"] - 1) <= 0.05 for point in landed)
        parts.append(
            f"Of {len(landed)} networks that were slimmed to a share of the time, {near} landed within 5% of it."
        )
    failures = data["failures"]
    assert isinstance(failures, Mapping)
    parts += [f"- {where}: {why}" for where, why in failures.items()]
    return "\n\n".join(parts)


def cell(point: Point | None) -> str:
    """Write one measured point."""
    if point is None:
        return "-"
    return f"{point.ratio:.3f} ({point.low:.3f} to {point.high:.3f}), {point.macs:.3f}"


def say(text: str) -> None:
    """Tell whoever waits what is going on."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
