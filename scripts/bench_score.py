"""Time each criterion against a plain forward + backward pass of the same batches, and against Torch-Pruning.

A row is one job, such as collecting and scoring by one criterion, in a process of its own: it warms up, its peak
memory is read, and then the job and a forward + backward pass (eval-mode BatchNorm, gradients of all weights) are timed
in turn. Capture and grouping are left out on both sides; `bench_trace.py` times them. Writes ``reports/score.json`` and
``reports/score.md``.

python scripts/bench_score.py
python scripts/bench_score.py --rows obd,sosp-h --repeats 1
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

from benchmarking import MALLOC, origin, peak_rss_mib, provenance, require_peer, table, write

import archscan  # before timm, which brings torchvision

import torch  # isort: skip
from torch import Tensor, nn  # isort: skip
from torch.nn.functional import cross_entropy  # isort: skip

from archscan.criteria import CRITERIA, score  # isort: skip
from archscan.gates import collect  # isort: skip
from archscan.losses import classification_loss  # isort: skip
from archscan.sources import open_subject  # isort: skip

EVAL_STEP, TRAIN_STEP = "forward + backward, eval mode", "forward + backward, train mode"
PEER_TAYLOR, PEER_HESSIAN = "Torch-Pruning Taylor", "Torch-Pruning Hessian"
TARGETS = {
    **dict.fromkeys(("taylor-fo", "taylor-abs", "obd", "snip", "laplace-snr"), 1.0),
    **dict.fromkeys(("obs", "mfac", "cbs"), 1.5),
    "sosp-h": 3.0,
}
"""What is aimed at, in forward + backward passes."""

Batches = Sequence[tuple[Tensor, Tensor]]
Job = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One job: medians over the repeats, memory in MiB.

    Attributes:
        name: A criterion, or what else was timed.
        seconds: For all batches.
        step_seconds: A forward + backward pass over all batches in eval mode, timed in turn with the job.
        ratio: Median over the repeats of one by the other.
        before_mib: Peak memory before the job, with model and images loaded.
        peak_mib: Peak memory after it.
    """

    name: str
    seconds: float
    step_seconds: float
    ratio: float
    before_mib: float
    peak_mib: float


def train_step(model: nn.Module, batches: Batches, *, training: bool) -> None:
    """Run the loss forward and backward, with gradients of all weights."""
    model.train(training)
    model.zero_grad()
    for images, labels in batches:
        cross_entropy(model(images), labels).backward()
    model.eval()


def of_criterion(name: str, model: nn.Module, example: Tensor, batches: Batches) -> Job:
    """Prepare collecting and scoring by one criterion."""
    coupling = archscan.couple(model, example)
    needs = CRITERIA[name].needs
    return lambda: score(name, collect(model, coupling, batches, classification_loss, needs))


def of_peer(name: str, model: nn.Module, example: Tensor, batches: Batches) -> Job:
    """Prepare the peer's importance of all groups but the classifier's, as its documentation does it."""
    import torch_pruning

    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)]
    groups = list(graph.get_all_groups(ignored_layers=classifier))

    def taylor() -> None:
        model.zero_grad()
        for images, labels in batches:
            cross_entropy(model(images), labels).backward()
        importance = torch_pruning.importance.GroupTaylorImportance()
        for group in groups:
            importance(group)

    def hessian() -> None:
        importance = torch_pruning.importance.GroupHessianImportance()
        importance.zero_grad()
        for images, labels in batches:
            for loss in cross_entropy(model(images), labels, reduction="none"):
                model.zero_grad()
                loss.backward(retain_graph=True)
                importance.accumulate_grad(model)
        for group in groups:
            importance(group)

    return taylor if name == PEER_TAYLOR else hessian


def job_of(name: str, model: nn.Module, example: Tensor, batches: Batches) -> Job:
    """Prepare what a row times."""
    if name in (EVAL_STEP, TRAIN_STEP):
        return lambda: train_step(model, batches, training=name == TRAIN_STEP)
    return (of_peer if name in (PEER_TAYLOR, PEER_HESSIAN) else of_criterion)(name, model, example, batches)


def measure(name: str, options: argparse.Namespace) -> Row:
    """Time one job in this process."""
    torch.manual_seed(0)
    subject = open_subject(options.network, weights="random", input_size=options.input_size)
    model, example = subject.model.requires_grad_(True), subject.example_input
    size = (options.batch_size, *example.shape[1:])
    labels = torch.randint(subject.num_classes, (options.batches, options.batch_size))
    batches = [(torch.randn(size), labels[number]) for number in range(options.batches)]
    job = job_of(name, model, example, batches)
    before = peak_rss_mib()
    job()  # the warm-up
    peak = peak_rss_mib()
    model.zero_grad()
    train_step(model, batches, training=False)
    seconds: list[tuple[float, float]] = []
    for number in range(options.repeats):
        model.zero_grad()
        jobs: list[Job] = [job, lambda: train_step(model, batches, training=False)]
        spent = [timed(run) for run in (jobs[::-1] if number % 2 else jobs)]
        seconds.append((spent[-1], spent[0]) if number % 2 else (spent[0], spent[1]))
    own, steps = zip(*seconds, strict=True)
    return Row(name, median(own), median(steps), median(a / b for a, b in seconds), before, peak)


def timed(job: Job) -> float:
    """Run a job: seconds."""
    gc.collect()
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def in_fresh_process(name: str, options: argparse.Namespace) -> Row:
    """Measure a row in a process of its own, all with the same environment."""
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": str(options.threads)}
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    row = Row(**json.loads(done.stdout.splitlines()[-1]))
    print(f"{name}: {row.seconds:.2f} s, {row.ratio:.2f} x, {row.peak_mib:.0f} MiB", file=sys.stderr)
    return row


def markdown(rows: Sequence[Row], made: dict[str, Any], options: argparse.Namespace) -> str:
    """Write the report."""
    by_name = {row.name: row for row in rows}
    train = by_name.get(TRAIN_STEP)
    body = []
    for row in rows:
        target = TARGETS.get(row.name)
        body.append(
            (
                row.name,
                f"{row.seconds:.2f}",
                f"{row.ratio:.2f}",
                "" if train is None else f"{row.ratio / train.ratio:.2f}",
                "" if target is None else f"≤ {target:g}",
                f"{row.peak_mib:.0f}",
                f"{row.peak_mib - row.before_mib:.0f}",
            )
        )
    header = ("job", "seconds", "x eval step", "x train step", "aim", "peak memory [MiB]", "of which the job's [MiB]")
    aims = {name: limit for name, limit in TARGETS.items() if name in by_name}
    met = [name for name, limit in aims.items() if by_name[name].ratio <= limit]
    missed = [f"{name} ({by_name[name].ratio:.2f} for {aims[name]:g})" for name in aims if name not in met]
    verdict = f"Aims met against the eval-mode step: {', '.join(met) or 'none'}; missed: {', '.join(missed) or 'none'}."
    for peer in (PEER_TAYLOR, PEER_HESSIAN):
        if peer in by_name:
            cheaper = [name for name in CRITERIA if name in by_name and by_name[name].ratio < by_name[peer].ratio]
            verdict += f" Faster than {peer} ({by_name[peer].ratio:.2f}): {', '.join(cheaper) or 'none'}."
    return "\n\n".join(
        (
            f"# Scoring {options.network}",
            f"{options.batches} batches of {options.batch_size} images of noise, side {options.input_size}, random "
            "weights; time to collect statistics over all batches and to score all units, capture and grouping apart. "
            "A step is a plain forward + backward pass over the same batches with gradients of all weights, with "
            "BatchNorm in eval mode (as criteria run it) or in train mode. Each row is a process of its own, in which "
            f"job and eval-mode step are timed in turn: medians of {options.repeats} after one warm-up. Torch-Pruning "
            "runs as its documentation says: Taylor on the accumulated gradients, Hessian with one backward pass for "
            "each sample; each with the importance of all groups but the classifier's.",
            origin(made),
            table(header, body),
            verdict,
        )
    )


def main() -> None:
    """Measure all rows and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [EVAL_STEP, TRAIN_STEP, *CRITERIA, PEER_TAYLOR, PEER_HESSIAN]
    parser.add_argument("--network", default="timm:resnet50")
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--rows", default=",".join(name for name in every if "," not in name), help="criteria, by comma"
    )
    parser.add_argument("--output", type=Path, default=Path("reports/score"), help="stem of the files to write")
    parser.add_argument("--only", choices=every, help=argparse.SUPPRESS)
    options = parser.parse_args()
    require_peer()
    if options.only:
        warnings.simplefilter("ignore")  # the peer's
        torch.set_num_threads(options.threads)
        print(json.dumps(asdict(measure(options.only, options))))
        return
    wanted = [EVAL_STEP, TRAIN_STEP, *(name for name in options.rows.split(",") if name)]
    if unknown := sorted(set(wanted) - set(every)):
        raise SystemExit(f"there is no row {unknown[0]!r}; choose from {', '.join(every[2:])}")
    rows = [in_fresh_process(name, options) for name in wanted]
    os.environ.update({**MALLOC, "OMP_NUM_THREADS": str(options.threads)})
    made = provenance(options.threads)
    data = {**made, "network": options.network, "input_size": options.input_size, "batch_size": options.batch_size}
    data |= {"batches": options.batches, "repeats": options.repeats, "rows": [asdict(row) for row in rows]}
    write(options.output, data, markdown(rows, made, options))


if __name__ == "__main__":
    main()
