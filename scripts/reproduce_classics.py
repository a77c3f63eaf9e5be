"""Reproduce what made weight pruning by second derivatives known: XOR, the MONK's problems, and LeNet's OBD curve.

A unit is a single weight here; the criteria are the package's own. Writes ``reports/classics.md``, its JSON
and three figures ``reports/images/classics-*.svg``.

python scripts/reproduce_classics.py
python scripts/reproduce_classics.py --seeds 3 --lenet-seeds 1 --lenet-images 20 --output /tmp/classics
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from benchmarking import provenance, restart_with_quiet_memory, write
from classic_problems import Perceptron, Task, fresh, monk, pruned, xor
from classics_report import LenetPoint, MonkPruning, XorDeletion, markdown, plot_lenet, plot_monks, plot_xor
from rich.console import Console
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F
from train_lenet import train

from archscan.criteria import criterion, obs
from archscan.data import calibration_images, evaluation_images
from archscan.gate_statistics import GateStatistics
from archscan.report.progress import progress_on
from archscan.sources import open_subject

METHODS = ("obs", "obd", "magnitude")
MONKS_DECAY = (3e-4, 1e-3, 1e-3)
XOR_DECAY, XOR_SOLVED = 1e-4, 0.03
LENET_METHODS = ("obd", "magnitude", "random")
LENET_KEPT = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.055, 0.04, 0.027, 0.018, 0.012)
_TRIES = 8
_ROWS_AT_ONCE = 4


# XOR ------------------------------------------------------------------------------------------------------------------


def xor_error(network: Perceptron, task: Task) -> float:
    """Compute the mean squared error."""
    return float(np.square(network.outputs(task.inputs_NI) - task.targets_N).mean())


def xor_deletions(seed: int) -> list[XorDeletion]:
    """Delete one weight by each criterion, and each weight for the truth; none where training found no solution."""
    task = xor()
    network = fresh(task, seed, 1.0).trained(task, XOR_DECAY)
    if xor_error(network, task) > XOR_SOLVED:
        return []
    weights = range(len(network.weight_W))
    truth = [xor_error(network.without(w, task, "magnitude").trained(task, XOR_DECAY), task) for w in weights]
    found = []
    for method in METHODS:
        weight = int(network.scores(task, method).argmin())
        smaller = network.without(weight, task, method)
        found.append(
            XorDeletion(
                seed,
                method,
                truth[weight] <= 1.05 * min(truth),
                truth[weight] <= XOR_SOLVED,
                smaller.accuracy(task) == 1,
                xor_error(smaller, task),
            )
        )
    return found


# MONK's problems ------------------------------------------------------------------------------------------------------


def monk_prunings(problem: int, seed: int) -> list[MonkPruning]:
    """Train a network, and prune it by each criterion with and without retraining."""
    task, decay = monk(problem, seed), MONKS_DECAY[problem - 1]
    candidates = (fresh(task, 1000 * attempt + seed, 0.5).trained(task, decay, 400) for attempt in range(_TRIES))
    network = next(candidates)
    while problem != 3 and network.accuracy(task) < 1:  # the noise of the third is not to be learned
        network = next(candidates)
    found = []
    for method in METHODS:
        for retrained in (False, True):
            smaller = pruned(network, task, method, decay, retrain=retrained)
            found.append(
                MonkPruning(
                    problem,
                    seed,
                    method,
                    retrained,
                    len(network.left_W),
                    int(smaller.left_W.sum()),
                    network.accuracy(task),
                    network.accuracy(task, test=True),
                    smaller.accuracy(task, test=True),
                )
            )
    return found


# LeNet ----------------------------------------------------------------------------------------------------------------


def lenet_points(seed: int, images: int) -> list[LenetPoint]:
    """Train LeNet-5 on digits, and delete ever more weights by each criterion."""
    subject = open_subject("lenet5", weights="random", seed=seed)
    training = calibration_images("digits", subject.preprocessing, samples=1297, batch_size=64, seed=seed)
    unseen = evaluation_images("digits", subject.preprocessing, batch_size=1000)
    torch.manual_seed(seed)
    train(subject.model, training, epochs=12, learning_rate=2e-3)
    seen, test = (
        tuple(torch.cat(parts) for parts in zip(*chosen.batches(), strict=True)) for chosen in (training, unseen)
    )
    parts = list(gauss_newton_scores(subject.model, seen[0][:images], seed))
    found = []
    for method in LENET_METHODS:
        order = np.argsort(np.mean([part[method] for part in parts], axis=0), kind="stable")
        for kept in LENET_KEPT:
            loss, _ = measured(subject.model, order, kept, seen)
            _, accuracy = measured(subject.model, order, kept, test)
            found.append(LenetPoint(seed, method, kept, loss, accuracy))
    return found


def gauss_newton_scores(model: nn.Module, images_NCHW: Tensor, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Score each weight as a unit by every method, on some images at a time.

    A sample has one row per class c: √(C p_c) ∂ log p_c / ∂w · w. Their mean square is the diagonal of the Gauss–Newton
    matrix of the cross-entropy, with no label drawn, times w²; `obd` averages over rows, so that its scores of equal
    parts average to its score of all.
    """
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
    weight_W = torch.cat([tensor.flatten() for tensor in parameters.values()])

    def log_probabilities(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return F.log_softmax(functional_call(model, weights, (image[None],))[0], 0)

    for part in images_NCHW.split(_ROWS_AT_ONCE):
        slopes = vmap(jacrev(log_probabilities), (None, 0))(parameters, part)
        rows_NCW = torch.cat([slope.flatten(2) for slope in slopes.values()], 2)
        with torch.no_grad():
            p_NC = model(part).softmax(1)
        rows_NW = (rows_NCW * (p_NC * p_NC.shape[1]).sqrt()[:, :, None]).flatten(0, 1) * weight_W
        norm_W = weight_W.abs().double().numpy()
        statistics = GateStatistics(len(norm_W), seed, sample_gradient_NU=rows_NW.numpy(), weight_norm_U=norm_W)
        yield {method: criterion(method).score(statistics) for method in LENET_METHODS}


def measured(model: nn.Module, order: np.ndarray, kept: float, batch: Sequence[Tensor]) -> tuple[float, float]:
    """Compute loss and accuracy with all but the last weights in `order` set to zero; the model is left unchanged."""
    mask_W = torch.zeros(len(order))
    mask_W[torch.from_numpy(order[len(order) - round(kept * len(order)) :].copy())] = 1
    sizes = [tensor.numel() for tensor in model.parameters()]
    masks = mask_W.split(sizes)
    named = zip(model.named_parameters(), masks, strict=True)
    masked = {name: tensor.detach() * mask.view_as(tensor) for (name, tensor), mask in named}
    with torch.no_grad():
        logits = functional_call(model, masked, (batch[0],))
    return float(F.cross_entropy(logits, batch[1])), float((logits.argmax(1) == batch[1]).float().mean())


# Run ------------------------------------------------------------------------------------------------------------------


def options_of() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="of each MONK's problem; XOR gets four times as many")
    parser.add_argument("--lenet-seeds", type=int, default=3, help="0 leaves LeNet out")
    parser.add_argument("--lenet-images", type=int, default=100, help="to score LeNet's weights on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("reports/classics"), help="stem of the files")
    return parser.parse_args()


def main() -> None:
    """Run the three experiments and write the page."""
    options = options_of()
    restart_with_quiet_memory(options.threads)
    obs.UPDATE_DAMPENING = obs.DAMPENING  # gates of a network are held tight; Hassibi and Stork hold weights loosely
    progress = progress_on(Console(stderr=True))
    with progress("XOR") as step:
        deletions: list[XorDeletion] = []
        for seed in range(4 * options.seeds):
            deletions += xor_deletions(seed)
            step(seed + 1, 4 * options.seeds)
    with progress("MONK's problems") as step:
        prunings: list[MonkPruning] = []
        for number in range(3 * options.seeds):
            prunings += monk_prunings(number // options.seeds + 1, number % options.seeds)
            step(number + 1, 3 * options.seeds)
    with progress("LeNet") as step:
        points: list[LenetPoint] = []
        for seed in range(options.lenet_seeds):
            points += lenet_points(seed, options.lenet_images)
            step(seed + 1, options.lenet_seeds)
    images, name = options.output.parent / "images", options.output.name
    images.mkdir(parents=True, exist_ok=True)
    plot_xor(deletions, images / f"{name}-xor.svg")
    plot_monks(prunings, images / f"{name}-monks.svg")
    if points:
        plot_lenet(points, images / f"{name}-lenet.svg")
    made = provenance(options.threads)
    tried = {"xor_tried": 4 * options.seeds, "lenet_images": options.lenet_images, "dampening": obs.DAMPENING}
    data = {**made, **tried}
    for name, rows in (("xor", deletions), ("monks", prunings), ("lenet", points)):
        data[name] = [asdict(row) for row in rows]
    write(options.output, data, markdown(data, f"images/{name}"))


if __name__ == "__main__":
    main()
