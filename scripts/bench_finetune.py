"""Measure what fine-tuning gives back to slim networks: archscan's, Torch-Pruning's, and the architecture from scratch.

Every network is slimmed to the same MACs from the same calibration images and trained by the same recipe (`archscan
finetune`'s defaults: SGD, cosine, the dense network as teacher) on the same images in the same order. The one from
scratch has archscan's architecture and new weights, and may have a learning rate of its own. Each point goes to a cache
as soon as it is measured, and ``--resume`` takes it from there. Writes ``reports/finetune.{json,md}``.

python scripts/bench_finetune.py --amp --resume
python scripts/bench_finetune.py --networks resnet20_cifar --ratios 0.5 --epochs 1 --samples 2000 --eval-samples 500
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarking import (
    Cache,
    add_training,
    counted_macs,
    names,
    numbers,
    open_cifar,
    origin,
    parser_on_cifar,
    provenance,
    require_cache,
    require_peer,
    restart_with_quiet_memory,
    table,
    write,
)
from rich.console import Console

import archscan  # before timm, which brings torchvision

import torch  # isort: skip
from torch import nn  # isort: skip

from archscan.data import ImageSet, calibration_images, evaluation_images  # isort: skip
from archscan.evaluation import top_one  # isort: skip
from archscan.sources import Subject  # isort: skip
from archscan.training import TrainSettings, open_epochs, train  # isort: skip
from archscan.training.images import AugmentedImages  # isort: skip
from archscan.processes import Place  # isort: skip

NETWORKS = ("resnet20_cifar", "resnet56_cifar")
RATIOS = (0.5, 0.3)
PEERS = ("l2/kept/iterative", "taylor/kept/iterative")
ARCHSCAN, SCRATCH, PEER = "archscan", "from scratch", "Torch-Pruning"
_CALIBRATION_BATCH = 64


@dataclass(frozen=True)
class Point:
    """One network after its training.

    Attributes:
        network: Name of the dense network.
        way: How the slim one came about.
        ratio: Asked for.
        macs: Kept fraction of the dense MACs.
        before: Top-1 in [0, 1] before the first epoch.
        after: After the last.
        curve: After each.
        lr: Peak of the learning rate.
        seconds: Of the training.
    """

    network: str
    way: str
    ratio: float
    macs: float
    before: float
    after: float
    curve: tuple[float, ...]
    lr: float
    seconds: float

    @property
    def key(self) -> tuple[str, str, float]:
        """What tells points apart."""
        return self.network, self.way, self.ratio


@dataclass(frozen=True, eq=False)
class Bench:
    """What all points of one network share."""

    network: str
    subject: Subject
    scored: Sequence[Any]
    images: AugmentedImages
    evaluation: ImageSet
    settings: TrainSettings
    scratch_lr: float
    device: torch.device

    def slimmed(self, way: str, ratio: float) -> nn.Module:
        """Make the network to train."""
        model, example = self.subject.model, self.subject.example_input
        if way.startswith(PEER):
            from torch_pruning_peer import parse_peer, pruned

            ((_, network),) = pruned(parse_peer(way.removeprefix(PEER).strip()), model, example, self.scored, [ratio])
            for parameter in network.parameters():
                parameter.grad = None
            return network
        settings = archscan.SlimSettings(recover="blocks", seed=self.settings.seed)
        slim = archscan.slim(model, example, target_flops=ratio, data=self.scored, settings=settings).model
        return untrained(slim, self.settings.seed) if way == SCRATCH else slim

    def measure(self, way: str, ratio: float) -> Point:
        """Slim, train, evaluate."""
        model = self.slimmed(way, ratio)
        example = self.subject.example_input
        kept = counted_macs(model, example) / counted_macs(self.subject.model, example)
        lr = self.scratch_lr if way == SCRATCH else self.settings.lr
        trained = train(
            model,
            self.images,
            eval_data=self.evaluation,
            teacher=self.subject.model,
            settings=TrainSettings(**{**asdict(self.settings), "lr": lr}),
            device=self.device,
        )
        history = trained.history
        curve = tuple(row.eval_accuracy or 0.0 for row in history.epochs)
        before = history.accuracy_before or 0.0
        return Point(self.network, way, ratio, kept, before, curve[-1], curve, history.lr, history.seconds)


def untrained(model: nn.Module, seed: int) -> nn.Module:
    """Copy an architecture with new weights: those of convolutions after He et al. (2015), the rest PyTorch's own."""
    fresh = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return fresh


def _read_point(entry: dict[str, Any]) -> Point:
    return Point(**{**entry, "curve": tuple(entry["curve"])})


# Run ------------------------------------------------------------------------------------------------------------------


def options_of() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_on_cifar(__doc__, "reports/finetune")
    parser.add_argument("--networks", type=names, default=list(NETWORKS))
    parser.add_argument("--ratios", type=numbers, default=list(RATIOS))
    parser.add_argument("--peers", type=names, default=list(PEERS), help="importance/shortcuts/schedule, by comma")
    parser.add_argument("--calibration-samples", type=int, default=512, help="images to score and to repair on")
    parser.add_argument("--samples", type=int, default=None, help="images to train on (default: all)")
    parser.add_argument("--eval-samples", type=int, default=None, help="default: all")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=None, help="default: archscan finetune's")
    parser.add_argument("--lr", type=float, default=None, help="default: archscan finetune's")
    parser.add_argument("--scratch-lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="with --resume: only write the report on what is there")
    add_training(parser)
    return parser.parse_args()


def open_bench(options: argparse.Namespace, name: str) -> Bench:
    """Open a network and its images."""
    subject = open_cifar(options.data, name)
    settings = TrainSettings(
        epochs=options.epochs,
        lr=options.lr,
        batch_size=options.batch_size,
        samples=options.samples,
        amp=options.amp,
        workers=options.workers,
        seed=options.seed,
    )
    wanted, source = subject.preprocessing, options.data / "cifar10-train.zip"
    count, device = options.calibration_samples, torch.device(options.device)
    size = min(_CALIBRATION_BATCH, count)
    scored = calibration_images(source, wanted, samples=count, batch_size=size, seed=options.seed)
    evaluation = evaluation_images(
        options.data / "cifar10-val.zip", wanted, samples=options.eval_samples, batch_size=125
    )
    images = open_epochs(source, wanted, settings, Place(device))
    return Bench(name, subject, list(scored.batches()), images, evaluation, settings, options.scratch_lr, device)


def markdown(points: Sequence[Point], dense: dict[str, float], made: dict[str, Any], setting: dict[str, Any]) -> str:
    """Write the table; differences are to the dense network on the same images."""
    rows = [
        (
            f"{point.network} {point.way}",
            f"{point.ratio:g}",
            f"{point.macs:.3f}",
            f"{point.before:.1%}",
            f"{point.after:.1%}",
            f"{100 * (point.after - dense[point.network]):+.1f}",
            f"{point.lr:g}",
            f"{point.seconds:.0f}",
        )
        for point in points
    ]
    header = ("network", "FLOPs asked for", "kept", "before", "after", "to dense, points", "peak lr", "seconds")
    accuracies = ", ".join(f"{name} {value:.1%}" for name, value in dense.items())
    asked = ", ".join(f"{key} {value}" for key, value in setting.items() if value is not None)
    return "\n\n".join(
        [
            "# Accuracy after fine-tuning",
            f"Top-1 on the evaluation images; the dense networks: {accuracies}. One seed. Setting: {asked}.",
            table(header, rows),
            origin(made),
        ]
    )


def measured(bench: Bench, options: argparse.Namespace, known: Mapping[tuple[Any, ...], Point]) -> Iterator[Point]:
    """Yield the points of a network that are known, and measure the others unless only a report is wanted."""
    for ratio in sorted(options.ratios, reverse=True):
        for way in (ARCHSCAN, *(f"{PEER} {peer}" for peer in options.peers), SCRATCH):
            key = (bench.network, way, ratio)
            if key in known:
                yield known[key]
            elif not options.report:
                yield bench.measure(way, ratio)


def main() -> None:
    """Measure and write the report."""
    options = options_of()
    require_cache(options)
    if options.peers:
        require_peer()
    restart_with_quiet_memory(options.threads)
    console = Console(stderr=True)
    named = (
        "epochs",
        "batch_size",
        "lr",
        "scratch_lr",
        "samples",
        "eval_samples",
        "calibration_samples",
        "seed",
        "amp",
    )
    setting = {name: getattr(options, name) for name in named}
    cache = Cache(options.output / "cache.jsonl", setting, _read_point, resume=options.resume)
    points, dense = [], {}
    start = time.perf_counter()
    for name in options.networks:
        bench = open_bench(options, name)
        dense[name] = top_one(bench.subject.model, bench.evaluation.batches()).accuracy
        for point in measured(bench, options, cache.points):
            points.append(point)
            if point.key not in cache.points:
                cache.put(point)
            console.print(json.dumps(asdict(point)), soft_wrap=True, highlight=False)
    made = provenance(options.threads)
    if options.device == "cuda":
        made["machine"]["cpu"] += f" with {torch.cuda.get_device_name()}"
    data = {**made, "setting": setting, "dense_accuracy": dense, "seconds": time.perf_counter() - start}
    write(
        options.output, {**data, "points": [asdict(point) for point in points]}, markdown(points, dense, made, setting)
    )


if __name__ == "__main__":
    main()
