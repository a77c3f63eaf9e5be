"""Measure the accuracy that is left at each FLOPs level: archscan's criteria and repairs, beside Torch-Pruning's.

Every network is slimmed to the same MACs from the same calibration images; nothing is fine-tuned. Both sides are also
measured with BatchNorm recalibrated on the same images. Each point goes to a cache as soon as it is measured, and
``--resume`` takes it from there. Writes ``reports/accuracy.{json,md}`` and one plot for each network.

python scripts/bench_accuracy.py --resume
python scripts/bench_accuracy.py --networks resnet56_cifar --methods default,obd --seeds 0,1,2 --resume
"""

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from accuracy_report import DEFAULT, Point, Setting, markdown, plot
from benchmarking import (
    Cache,
    counted_macs,
    names,
    numbers,
    open_cifar,
    parser_on_cifar,
    provenance,
    require_cache,
    require_peer,
    restart_with_quiet_memory,
    write,
)
from rich.console import Console

import archscan  # before timm, which brings torchvision

from torch import nn  # isort: skip

from archscan.criteria import criterion  # isort: skip
from archscan.data import calibration_images, evaluation_images  # isort: skip
from archscan.errors import ArchscanError  # isort: skip
from archscan.evaluation import top_one  # isort: skip
from archscan.reconstruct import repair  # isort: skip
from archscan.planner import Budget  # isort: skip
from archscan.recover import recalibrate_batchnorm  # isort: skip
from archscan.report.progress import progress_on  # isort: skip
from archscan.slimming import slim_each  # isort: skip
from archscan.sources import Subject  # isort: skip

NETWORKS = ("resnet20_cifar", "resnet56_cifar")
RATIOS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
METHODS = (DEFAULT, "obd", "taylor-fo", "taylor-abs", "sosp-h", "sosp-i", "magnitude", "bn-scale", "random")
PEERS = tuple(f"{name}/kept/iterative" for name in ("random", "l1", "l2", "lamp", "fpgm", "bn-scale", "taylor"))
PEERS = (*PEERS, "hessian/kept/iterative", "obdc/kept/iterative")
RECOVERIES = ("none", "bn", "bias", "ls", "blocks")


@dataclass(frozen=True)
class Bench:
    """What is needed to measure points of one network for one seed."""

    network: str
    subject: Subject
    scored: Sequence[Any]
    recalibration: Sequence[Any]
    evaluation: Sequence[Any]
    dense_macs: int
    recoveries: Sequence[str]
    seed: int

    def finish(self, point: Point, model: nn.Module, accuracy: dict[str, float]) -> Point:
        """Add what was kept, and the accuracy as it is and recalibrated."""
        kept = counted_macs(model, self.subject.example_input) / self.dense_macs
        found = dict(accuracy)
        if "none" in self.recoveries:
            found["none"] = self.measured(model)
        if "bn" in self.recoveries:
            found["bn"] = self.measured(recalibrate_batchnorm(model, self.recalibration).model)
        return Point(**{**asdict(point), "macs": kept, "accuracy": found})

    def measured(self, model: nn.Module) -> float:
        """Evaluate."""
        return top_one(model, self.evaluation).accuracy


def of_method(bench: Bench, method: str, ratios: Sequence[float]) -> Iterator[Point]:
    """Slim with archscan to each ratio: by a criterion in one go and then repaired, or as the defaults do."""
    model, example = bench.subject.model, bench.subject.example_input
    name = None if method == DEFAULT else method
    settings = archscan.SlimSettings(recover="blocks" if method == DEFAULT else "none", seed=bench.seed)
    budgets = [Budget("macs", ratio) for ratio in ratios]
    results = slim_each(model, example, budgets, data=bench.scored, criterion=name, settings=settings)
    for ratio in ratios:
        start = time.perf_counter()
        point = Point(bench.network, "archscan", method, ratio, bench.seed)
        try:
            result = next(results)
        except ArchscanError as error:  # after which there is no other result
            yield Point(**{**asdict(point), "failure": str(error)})
            return
        point = Point(**{**asdict(point), "seconds": time.perf_counter() - start})
        if method == DEFAULT:
            kept = counted_macs(result.model, example) / bench.dense_macs
            yield Point(**{**asdict(point), "macs": kept, "accuracy": {"blocks": bench.measured(result.model)}})
            continue
        repaired = {
            level: bench.measured(repair(model, result.model, result.surgery, bench.scored, level).model)
            for level in ("bias", "ls", "blocks")
            if level in bench.recoveries
        }
        yield bench.finish(point, result.model, repaired)


def of_peer(bench: Bench, text: str, ratios: Sequence[float]) -> Iterator[Point]:
    """Slim with Torch-Pruning in one way to each ratio."""
    from torch_pruning_peer import CRASHES, parse_peer, pruned

    start, left = time.perf_counter(), sorted(ratios, reverse=True)
    failure: str | None = None
    found: list[tuple[float, nn.Module]] = []
    try:  # what came before a crash stays in the list
        found.extend(pruned(parse_peer(text), bench.subject.model, bench.subject.example_input, bench.scored, left))
    except CRASHES as error:
        failure = (str(error).splitlines() or [type(error).__name__])[0]
    seconds = (time.perf_counter() - start) / len(left)
    for ratio, model in found:
        yield bench.finish(Point(bench.network, "torch-pruning", text, ratio, bench.seed, seconds=seconds), model, {})
    for ratio in left[len(found) :]:
        yield Point(bench.network, "torch-pruning", text, ratio, bench.seed, failure=failure)


def _read_point(entry: dict[str, Any]) -> Point:
    return Point(**entry)


# Run ------------------------------------------------------------------------------------------------------------------


def options_of() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_on_cifar(__doc__, "reports/accuracy")
    parser.add_argument("--networks", type=names, default=list(NETWORKS))
    parser.add_argument("--methods", type=names, default=list(METHODS), help=f"{DEFAULT}, or criteria, by comma")
    parser.add_argument("--peers", type=names, default=list(PEERS), help="importance/shortcuts/schedule, by comma")
    parser.add_argument("--recoveries", type=names, default=list(RECOVERIES), help="levels to measure, by comma")
    parser.add_argument("--ratios", type=numbers, default=list(RATIOS))
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in names(text)], default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=512, help="images to score and to repair on")
    parser.add_argument("--recalibration-samples", type=int, default=2048)
    parser.add_argument("--eval-samples", type=int, default=None, help="default: all")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--resume", action="store_true", help="take what was measured from the cache")
    parser.add_argument("--report", action="store_true", help="only write the report on what was measured, all of it")
    return parser.parse_args()


def check(options: argparse.Namespace) -> None:
    """Leave with one sentence where the options make no sense, before anything is measured."""
    for method in options.methods:
        if method != DEFAULT:
            criterion(method)
    if options.peers:
        require_peer()
        from torch_pruning_peer import parse_peer

        for text in options.peers:
            try:
                parse_peer(text)
            except ValueError:
                raise SystemExit(f"{text!r} is no way to use the peer; choose from {', '.join(PEERS)}") from None
    require_cache(options)
    if options.samples % options.batch_size:
        raise SystemExit("--samples must be a multiple of --batch-size, so that all batches are of one size")
    if strange := set(options.recoveries) - set(RECOVERIES):
        raise SystemExit(f"{sorted(strange)[0]!r} is no recovery; choose from {', '.join(RECOVERIES)}")


def benches(options: argparse.Namespace, name: str) -> Iterator[tuple[Bench, float]]:
    """Open a network once for each seed of the calibration images, with its dense accuracy."""
    subject = open_cifar(options.data, name)
    found = evaluation_images(
        options.data / "cifar10-val.zip", subject.preprocessing, samples=options.eval_samples, batch_size=125
    )
    evaluation = list(found.batches())
    dense = top_one(subject.model, evaluation).accuracy
    macs = counted_macs(subject.model, subject.example_input)
    wanted = max(options.samples, options.recalibration_samples)
    for seed in options.seeds:
        source = options.data / "cifar10-train.zip"
        images = calibration_images(
            source, subject.preprocessing, samples=wanted, batch_size=options.batch_size, seed=seed
        )
        batches = list(images.batches())
        scored = batches[: options.samples // options.batch_size]
        yield Bench(name, subject, scored, batches, evaluation, macs, options.recoveries, seed), dense


def main() -> None:
    """Measure and write the report."""
    options = options_of()
    check(options)
    restart_with_quiet_memory(options.threads)
    warnings.simplefilter("ignore")  # the peer's
    console = Console(stderr=True)
    setting = Setting(options.samples, options.recalibration_samples, options.eval_samples, options.batch_size)
    cache = Cache(options.output / "cache.jsonl", asdict(setting), _read_point, resume=options.resume)
    ratios = sorted(set(options.ratios), reverse=True)
    jobs = [("archscan", name) for name in options.methods] + [("torch-pruning", text) for text in options.peers]
    dense: dict[str, float] = {}
    with progress_on(console)("Slimming and evaluating") as step:
        done, total = 0, len(options.networks) * len(options.seeds) * len(jobs)
        for network in options.networks:
            for bench, accuracy in benches(options, network):
                dense[network] = accuracy
                for side, method in jobs:
                    step(done, total)
                    done += 1
                    left = [ratio for ratio in ratios if (network, side, method, ratio, bench.seed) not in cache.points]
                    left = [] if options.report else left
                    measure = of_method if side == "archscan" else of_peer
                    for point in measure(bench, method, left) if left else ():
                        cache.put(point)
                        console.print(json.dumps(asdict(point)), soft_wrap=True, highlight=False)
    points = [point for point in cache.points.values() if point.network in dense]
    made = provenance(options.threads)
    data = {**made, "archscan_version": archscan.__version__, "setting": asdict(setting), "dense_accuracy": dense}
    write(
        options.output, {**data, "points": [asdict(point) for point in points]}, markdown(points, setting, dense, made)
    )
    for network in dense:
        plot(network, points, dense[network], options.output.with_name(f"{options.output.name}-{network}.svg"))


if __name__ == "__main__":
    main()
