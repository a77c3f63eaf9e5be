"""Repeat SOSP's expand-prune experiment in small: do wider bottlenecks help more than parameters spread evenly?

For each seed a CIFAR ResNet is trained from scratch and slimmed, which shows its capacity bottlenecks (Nonnenmacher et
al. 2022, fig. 3). They are widened, and beside that every channel group is widened by one factor that comes to the same
number of parameters. Both are trained like the first network, from scratch and on from where it was (the copies of a
function-preserving widening); the first network itself is trained on too, which is the control. Each is then slimmed to
the MACs of the first network and fine-tuned. Every network of one seed sees the same images in the same order.

Each point goes to a cache as soon as it is measured, and ``--resume`` takes it from there. Writes
``reports/expand-prune.{json,md}``.

python scripts/reproduce_expand_prune.py --network resnet56_cifar --epochs 60 --finetune-epochs 20 --seeds 0,1,2 --amp
python scripts/reproduce_expand_prune.py --samples 1000 --epochs 2 --finetune-epochs 1 --eval-samples 500 --seeds 0
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from bench_finetune import untrained
from benchmarking import (
    Cache,
    add_training,
    counted_macs,
    names,
    numbers,
    parser_on_cifar,
    provenance,
    restart_with_quiet_memory,
    write,
)
from expand_prune_report import CONTROL, EVEN, WIDE, Point, differences, markdown
from rich.console import Console

import archscan  # before timm, which brings torchvision

import torch  # isort: skip
from torch import Tensor, nn  # isort: skip

from archscan.data import ImageSet, calibration_images, evaluation_images  # isort: skip
from archscan.errors import ArchscanError, BadInput  # isort: skip
from archscan.processes import Place  # isort: skip
from archscan.rebuild import rebuild  # isort: skip
from archscan.slimming import analyse  # isort: skip
from archscan.sources import Subject, open_subject  # isort: skip
from archscan.training import TrainSettings, open_epochs, train  # isort: skip
from archscan.training.images import AugmentedImages  # isort: skip
from archscan.widening.copies import all_sources, sources_of  # isort: skip

_BATCH = 64
_BISECTIONS = 20


@dataclass(frozen=True)
class Bench:
    """What one seed is measured with."""

    subject: Subject
    images: AugmentedImages
    calibration: Sequence[tuple[Tensor, Tensor]]
    evaluation: ImageSet
    options: argparse.Namespace
    seed: int

    def trained(self, model: nn.Module, epochs: int, lr: float | None) -> tuple[nn.Module, float]:
        """Train; give the network and its top-1 accuracy on the evaluation images."""
        settings = TrainSettings(epochs=epochs, lr=lr, amp=self.options.amp, seed=self.seed)
        device = torch.device(self.options.device)
        done = train(model.to(device), self.images, eval_data=self.evaluation, settings=settings, device=device)
        return done.model, float(done.history.epochs[-1].eval_accuracy or 0.0)

    def slimmed(self, model: nn.Module, ratio: float) -> nn.Module:
        """Slim to a fraction of the MACs, with the default criterion and repair."""
        settings = archscan.SlimSettings(recover=self.options.recover, seed=self.seed)
        example = self.subject.example_input
        return archscan.slim(model, example, target_flops=ratio, data=self.calibration, settings=settings).model


@dataclass(frozen=True, eq=False)
class Arm:
    """One network to train: where it comes from, and what it costs."""

    way: str
    start: str
    model: nn.Module
    widened: Mapping[str, int]
    params: int
    macs: int


def arms(bench: Bench, dense: nn.Module) -> Iterator[Arm]:
    """Make the networks of one seed: the control, wider bottlenecks, and everything wider for as many parameters."""
    options, example = bench.options, bench.subject.example_input
    settings = archscan.WidenSettings(factor=options.factor, find_at=options.find_at, seed=bench.seed)
    wide = archscan.widen(dense, example, data=bench.calibration, settings=settings)
    before, after = wide.plan.before, wide.plan.after
    yield Arm(CONTROL, "grown", dense, {}, before.params, before.macs)
    widths = {name: len(wide.plan.kept[name][0]) for name in wide.widened}
    for start in options.starts:
        chosen = wide.model if start == "grown" else untrained(wide.model, bench.seed)
        yield Arm(WIDE, start, chosen, widths, after.params, after.macs)
    even, widths, params, macs = evenly_wider(bench, dense, wide.saliency_U, after.params)
    for start in options.starts:
        chosen = even if start == "grown" else untrained(even, bench.seed)
        yield Arm(EVEN, start, chosen, widths, params, macs)


def evenly_wider(
    bench: Bench, dense: nn.Module, saliency_U: np.ndarray, most_params: int
) -> tuple[nn.Module, dict[str, int], int, int]:
    """Widen all groups by the largest factor that needs no more parameters than were spent on the bottlenecks."""
    example = bench.subject.example_input
    analysis = analyse(dense, example)
    groups, costs = analysis.coupling.groups, analysis.costs

    def kept(factor: float) -> dict[str, tuple[tuple[int, ...], ...]]:
        free = [group for group in groups if group.frozen is None]
        return all_sources(groups, {g.name: sources_of(g, factor, saliency_U, rounding=1) for g in free})

    def price(kind: Any, factor: float) -> int:
        chosen = kept(factor)
        return costs.evaluate(kind, np.array([len(chosen[group.name][0]) for group in groups]))

    low, high = 1.0, 16.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if price("params", middle) <= most_params else (low, middle)
    if price("params", low) > most_params:
        raise BadInput("wider bottlenecks cost less than one channel more in every group; pass a larger --factor")
    network = rebuild(dense, example, analysis.coupling, kept(low)).model.eval()
    widths = {g.name: len(kept(low)[g.name][0]) for g in groups if g.frozen is None}
    return network, widths, price("params", low), price("macs", low)


def measure(bench: Bench, arm: Arm, dense_accuracy: float, dense_macs: int) -> Point:
    """Train, slim to the MACs of the first network, fine-tune."""
    options, start_s = bench.options, time.perf_counter()
    trained, accuracy = bench.trained(arm.model, options.epochs, options.lr)
    slim = trained if arm.macs <= dense_macs else bench.slimmed(trained, dense_macs / arm.macs)
    tuned, after = bench.trained(slim, options.finetune_epochs, options.finetune_lr)
    return Point(
        seed=bench.seed,
        way=arm.way,
        start=arm.start,
        params=arm.params,
        macs=arm.macs,
        widened=dict(arm.widened),
        dense=dense_accuracy,
        trained=accuracy,
        slim=after,
        slim_params=sum(parameter.numel() for parameter in tuned.parameters()),
        slim_macs=counted_macs(tuned.cpu(), bench.subject.example_input),
        seconds=time.perf_counter() - start_s,
    )


def measure_seed(bench: Bench, cache: Cache[Point], tell: Callable[[str], None]) -> None:
    """Measure all networks of one seed that the cache lacks."""
    options, seed = bench.options, bench.seed
    wanted = [(CONTROL, "grown"), *((way, start) for way in (WIDE, EVEN) for start in options.starts)]
    if all((seed, *pair) in cache.points for pair in wanted):
        return
    start_s = time.perf_counter()
    dense, accuracy = bench.trained(untrained(bench.subject.model, seed), options.epochs, options.lr)
    tell(f"seed {seed}: trained to {100 * accuracy:.1f}% in {time.perf_counter() - start_s:.0f} s")
    dense = dense.cpu()
    dense_macs = counted_macs(dense, bench.subject.example_input)
    for arm in arms(bench, dense):
        if (seed, arm.way, arm.start) in cache.points:
            continue
        point = measure(bench, arm, accuracy, dense_macs)
        cache.put(point)
        after = f"{100 * point.trained:.1f}%, slim {100 * point.slim:.1f}%"
        tell(f"seed {seed}: {arm.way}, {arm.start}: {after} in {point.seconds:.0f} s")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_on_cifar(__doc__, "reports/expand-prune")
    parser.add_argument("--network", default="resnet20_cifar", help="a CIFAR network of archscan list 'reference:*'")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=None, help="training images (default: all)")
    parser.add_argument("--eval-samples", type=int, default=None, help="evaluation images (default: all)")
    parser.add_argument("--calibration-samples", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=30, help="of every training but the last")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--finetune-epochs", type=int, default=10, help="of the slim networks")
    parser.add_argument("--finetune-lr", type=float, default=None, help="default: archscan finetune's")
    parser.add_argument("--factor", type=float, default=2.0, help="new width of a bottleneck over its old one")
    parser.add_argument("--find-at", type=float, default=0.5, help="kept MACs at which bottlenecks are looked for")
    parser.add_argument("--starts", type=names, default=["scratch", "grown"], help="how wider networks begin")
    parser.add_argument("--recover", choices=("none", "bn", "ls"), default="ls", help="repair after slimming")
    add_training(parser)
    return parser.parse_args()


def open_bench(options: argparse.Namespace, seed: int) -> Bench:
    """Open network and images for one seed."""
    subject = open_subject(f"reference:{options.network}", weights="random", seed=seed)
    source, wanted = options.data / "cifar10-train.zip", subject.preprocessing
    count = options.calibration_samples
    settings = TrainSettings(samples=options.samples, workers=options.workers, seed=seed)
    place = Place(torch.device(options.device))
    calibration = calibration_images(source, wanted, samples=count, batch_size=min(_BATCH, count), seed=seed)
    evaluation = evaluation_images(
        options.data / "cifar10-val.zip", wanted, samples=options.eval_samples, batch_size=256, seed=0
    )
    images = open_epochs(source, wanted, settings, place)
    return Bench(subject, images, list(calibration.batches()), evaluation, options, seed)


def main() -> None:
    """Measure and write."""
    options = parse()
    restart_with_quiet_memory(options.threads)
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    apart = ("data", "output", "resume", "seeds", "threads", "device", "workers", "starts")
    setting = {name: value for name, value in vars(options).items() if name not in apart}
    cache = Cache(options.output / "cache.jsonl", setting, lambda entry: Point(**entry), resume=options.resume)
    try:
        for seed in options.seeds:
            measure_seed(open_bench(options, int(seed)), cache, console.print)
    except ArchscanError as error:
        raise SystemExit(str(error)) from error
    made = provenance(options.threads)
    if options.device == "cuda":
        made["machine"]["cpu"] += f" with {torch.cuda.get_device_name()}"
    found = list(cache.points.values())
    gaps = [{**asdict(gap), "verdict": gap.verdict} for gap in differences(found)]
    data = {**made, "setting": setting, "points": [asdict(point) for point in found], "differences": gaps}
    write(options.output, data, markdown(found, setting, made))


if __name__ == "__main__":
    main()
