"""Measure the accuracy that each criterion leaves a CIFAR ResNet, beside Torch-Pruning, on real weights and images.

Every network is slimmed to the same MACs from the same calibration images, then evaluated as it is and with BatchNorm
recalibrated. Nothing is fine-tuned. Writes ``reports/criteria-resnet56.json`` and ``.md``; each point goes to a cache
as soon as it is measured, and ``--resume`` takes it from there.

python scripts/bench_criteria.py
python scripts/bench_criteria.py --seeds 0,1,2 --resume
python scripts/bench_criteria.py --criteria obd,sosp-h --peers "" --ratios 0.5 --eval-samples 1000
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarking import counted_macs, provenance, require_peer, restart_with_quiet_memory, write
from criteria_report import Point, Setting, markdown
from rich.console import Console

import archscan  # before timm, which brings torchvision

from torch import nn  # isort: skip

from archscan.criteria import CRITERIA, criterion  # isort: skip
from archscan.data import calibration_images, evaluation_images  # isort: skip
from archscan.errors import ArchscanError  # isort: skip
from archscan.evaluation import top_one  # isort: skip
from archscan.recover import recalibrate_batchnorm  # isort: skip
from archscan.report.progress import progress_on  # isort: skip
from archscan.sources import Subject, open_subject  # isort: skip

PEERS = tuple(
    f"{importance}/{shortcuts}/{schedule}"
    for importance in ("taylor", "l2")
    for shortcuts in ("as-is", "kept", "conv")
    for schedule in ("one-shot", "iterative")
)
RATIOS = (0.8, 0.6, 0.5)
ROUND = 0.05
STREAM = ("bn1", "layer*.bn2")
"""The BatchNorms after what `/kept` protects; a protected convolution would keep its inputs as well."""
WAYS = ("", "kept", "rounds")


@dataclass(frozen=True)
class Bench:
    """What is needed to measure points for one seed."""

    subject: Subject
    scored: Sequence[Any]
    recalibration: Sequence[Any]
    evaluation: Sequence[Any]
    dense_macs: int
    setting: Setting
    seed: int

    def finish(self, model: nn.Module, side: str, method: str, ratio: float, seconds: float) -> Point:
        """Evaluate a slim network, as it is and recalibrated."""
        kept = counted_macs(model, self.subject.example_input) / self.dense_macs
        raw = top_one(model, self.evaluation).accuracy
        repaired = recalibrate_batchnorm(model, self.recalibration).model
        recalibrated = top_one(repaired, self.evaluation).accuracy
        return Point(side, method, ratio, self.seed, kept, raw, recalibrated, seconds)


def of_criterion(bench: Bench, method: str, ratios: Sequence[float]) -> Iterator[Point]:
    """Slim with archscan by one criterion to each ratio."""
    for ratio in ratios:
        start = time.perf_counter()
        try:
            model = slimmed(bench, method, ratio)
        except ArchscanError as error:
            yield Point("archscan", method, ratio, bench.seed, failure=str(error))
            continue
        yield bench.finish(model, "archscan", method, ratio, time.perf_counter() - start)


def slimmed(bench: Bench, method: str, ratio: float) -> nn.Module:
    """Slim once; or, with ``/rounds``, in steps of 5 % of the dense MACs, scored anew before each."""
    name, _, way = method.partition("/")
    example, model = bench.subject.example_input, bench.subject.model
    settings = archscan.SlimSettings(
        archscan.WidthRule(bench.setting.round_to),
        protect=STREAM if way == "kept" else (),
        recover="none",
        seed=bench.seed,
    )
    rounds = max(1, round((1 - ratio) / ROUND)) if way == "rounds" else 1
    for number in range(1, rounds + 1):
        kept = 1 - (1 - ratio) * number / rounds if number < rounds else ratio
        target = kept if rounds == 1 else min(1.0, kept * bench.dense_macs / counted_macs(model, example))
        model = archscan.slim(
            model, example, target_flops=target, data=bench.scored, criterion=name, settings=settings
        ).model
    return model


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
        yield bench.finish(model, "torch-pruning", text, ratio, seconds)
    for ratio in left[len(found) :]:
        yield Point("torch-pruning", text, ratio, bench.seed, failure=failure)


class Cache:
    """Points in a file of JSON lines, each written with its setting."""

    def __init__(self, path: Path, setting: Setting, resume: bool) -> None:
        self.path, self.setting = path, asdict(setting)
        self.points: dict[tuple[str, str, float, int], Point] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            path.unlink(missing_ok=True)
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            entry = json.loads(line)
            if entry.pop("setting") == self.setting:
                self.put(Point(**entry), save=False)

    def put(self, point: Point, save: bool = True) -> None:
        """Remember a point."""
        self.points[point.key] = point
        if save:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**asdict(point), "setting": self.setting}) + "\n")


# Run ------------------------------------------------------------------------------------------------------------------


def options_of() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    default_data = Path(os.environ.get("ARCHSCAN_DATA", "../shared/data"))
    parser.add_argument("--model", default="resnet56_cifar", help="weights: <model without _cifar>_cifar10.safetensors")
    parser.add_argument("--data", type=Path, default=default_data, help="folder of weights and images")
    parser.add_argument(
        "--criteria",
        type=names,
        default=list(CRITERIA),
        help="archscan's, by comma, each with /kept or /rounds where wanted (default: all)",
    )
    parser.add_argument("--peers", type=names, default=list(PEERS), help="importance/shortcuts/schedule, by comma")
    parser.add_argument("--ratios", type=lambda text: [float(part) for part in names(text)], default=list(RATIOS))
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in names(text)], default=[0])
    parser.add_argument("--samples", type=int, default=512, help="images to score on")
    parser.add_argument("--recalibration-samples", type=int, default=2048)
    parser.add_argument("--eval-samples", type=int, default=None, help="default: all")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--round-to", type=int, default=None, help="of archscan's widths (default: its own)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="take what was measured from the cache")
    parser.add_argument("--output", type=Path, default=Path("reports/criteria-resnet56"), help="stem of the files")
    return parser.parse_args()


def check(options: argparse.Namespace) -> None:
    """Leave with one sentence where the options make no sense, before anything is measured."""
    for method in options.criteria:
        name, _, way = method.partition("/")
        criterion(name)
        if way not in WAYS:
            raise SystemExit(f"{method} is no way to use a criterion; choose from {', '.join(WAYS[1:])}")
    if options.peers:
        require_peer()
        from torch_pruning_peer import parse_peer

        for text in options.peers:
            try:
                parse_peer(text)
            except ValueError:
                raise SystemExit(f"{text!r} is no way to use the peer; choose from {', '.join(PEERS)}") from None
    if options.samples % options.batch_size:
        raise SystemExit("--samples must be a multiple of --batch-size, so that all batches are of one size")


def calibration(options: argparse.Namespace, subject: Subject, seed: int) -> list[Any]:
    """Read the batches to recalibrate on; to score on, there are the first of them."""
    wanted = max(options.samples, options.recalibration_samples)
    source = options.data / "cifar10-train.zip"
    found = calibration_images(source, subject.preprocessing, samples=wanted, batch_size=options.batch_size, seed=seed)
    return list(found.batches())


def main() -> None:
    """Measure and write the report."""
    options = options_of()
    check(options)
    restart_with_quiet_memory(options.threads)
    warnings.simplefilter("ignore")  # the peer's
    console = Console(stderr=True)
    weights = options.data / f"{options.model.removesuffix('_cifar')}_cifar10.safetensors"
    subject = open_subject(f"reference:{options.model}", weights=str(weights))
    found = evaluation_images(
        options.data / "cifar10-val.zip", subject.preprocessing, samples=options.eval_samples, batch_size=125
    )
    evaluation = list(found.batches())
    setting = Setting(
        options.model,
        options.samples,
        options.recalibration_samples,
        len(found),
        options.batch_size,
        options.round_to,
    )
    cache = Cache(options.output / "cache.jsonl", setting, options.resume)
    dense = top_one(subject.model, evaluation).accuracy
    macs = counted_macs(subject.model, subject.example_input)
    ratios = sorted(set(options.ratios), reverse=True)
    jobs = [(seed, "archscan", name) for seed in options.seeds for name in options.criteria]
    jobs += [(seed, "torch-pruning", text) for seed in options.seeds for text in options.peers]
    with progress_on(console)("Slimming and evaluating") as step:
        for number, (seed, side, method) in enumerate(sorted(jobs, key=lambda job: job[0])):
            step(number, len(jobs))
            left = [ratio for ratio in ratios if (side, method, ratio, seed) not in cache.points]
            if not left:
                continue
            batches = calibration(options, subject, seed)
            scored = batches[: options.samples // options.batch_size]
            bench = Bench(subject, scored, batches, evaluation, macs, setting, seed)
            for point in (of_criterion if side == "archscan" else of_peer)(bench, method, left):
                cache.put(point)
                console.print(json.dumps(asdict(point)), soft_wrap=True, highlight=False)
    wanted = {(side, method, ratio, seed) for seed, side, method in jobs for ratio in ratios}
    points = [point for key, point in cache.points.items() if key in wanted]
    made = provenance(options.threads)
    data = {**made, "archscan_version": archscan.__version__, "setting": asdict(setting), "dense_accuracy": dense}
    data |= {"dense_macs": macs, "points": [asdict(point) for point in points]}
    write(options.output, data, markdown(points, ratios, setting, dense, made))


if __name__ == "__main__":
    main()
