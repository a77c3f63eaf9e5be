"""The page of the classical results: what was measured → Markdown and figures. `reproduce_classics.py` imports it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmarking import origin, table

PAPER_LEFT = {1: (58, 14), 2: (39, 15), 3: (39, 4)}
"""Weights before and after OBS, by MONK's problem: the 76, 62 and 90 % of Hassibi and Stork (1993)."""

COLOURS = {"obs": "#D55E00", "obd": "#0072B2", "magnitude": "#009E73", "random": "#999999"}
"""Told apart by colour-blind readers too (Okabe and Ito 2008)."""


@dataclass(frozen=True)
class XorDeletion:
    """One deletion from one trained network.

    Attributes:
        seed: Of the network.
        method: Which criterion chose the weight.
        least_error: Whether retraining after no other deletion leaves a smaller error, up to 5 %.
        solvable: Whether the network can still be retrained to solve the problem.
        solves: Whether it solves it as it is, without retraining.
        error: Mean squared error as it is.
    """

    seed: int
    method: str
    least_error: bool
    solvable: bool
    solves: bool
    error: float


@dataclass(frozen=True)
class MonkPruning:
    """One network pruned as far as training accuracy lets it.

    Attributes:
        problem: 1 to 3.
        seed: Of training set and network.
        method: Criterion.
        retrained: Whether what is left was trained where deleting alone lost patterns.
        weights: Before.
        left: After.
        train: Accuracy on the training set, before; after, it is no less.
        test_before: Accuracy on all 432 vectors.
        test_after: Likewise.
    """

    problem: int
    seed: int
    method: str
    retrained: bool
    weights: int
    left: int
    train: float
    test_before: float
    test_after: float


@dataclass(frozen=True)
class LenetPoint:
    """LeNet with some weights left, nothing retrained.

    Attributes:
        seed: Of network and training.
        method: Criterion.
        kept: Share of weights.
        loss: Cross-entropy on the training images.
        accuracy: On unseen digits.
    """

    seed: int
    method: str
    kept: float
    loss: float
    accuracy: float


# Figures --------------------------------------------------------------------------------------------------------------


def _axes(width: float, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "archscan", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(width, 3.2), layout="constrained", **options)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def plot_xor(deletions: Sequence[XorDeletion], path: Path) -> None:
    """Draw each network's error right after one deletion, by method; hollow where the weight was a wrong one."""
    figure, axes = _axes(5)
    methods = list(dict.fromkeys(entry.method for entry in deletions))
    for place, method in enumerate(methods):
        own = sorted((entry for entry in deletions if entry.method == method), key=lambda entry: entry.seed)
        shift = np.linspace(-0.25, 0.25, len(own))
        for right in (True, False):
            chosen = [(x, entry.error) for x, entry in zip(shift, own, strict=True) if entry.least_error is right]
            if chosen:
                xs, ys = zip(*chosen, strict=True)
                face = COLOURS[method] if right else "none"
                axes.scatter(np.add(xs, place), ys, s=16, facecolors=face, edgecolors=COLOURS[method])
    axes.axhline(0.25, color="0.6", linewidth=0.8, linestyle=":")
    axes.set(ylim=(0, 0.26), ylabel="mean squared error after one deletion", title="XOR, 2-2-1, nothing retrained")
    axes.set_xticks(range(len(methods)), methods)
    _save(figure, path)


def plot_monks(prunings: Sequence[MonkPruning], path: Path) -> None:
    """Draw the share of weights removed, by problem and method, with the paper's."""
    figure, panels = _axes(8.5, 3, sharey=True)
    for problem, axes in enumerate(panels, start=1):
        for place, method in enumerate(dict.fromkeys(entry.method for entry in prunings)):
            for retrained in (False, True):
                shares = removed_shares(prunings, problem, method, retrained)
                x = place + (0.17 if retrained else -0.17)
                face = "none" if retrained else COLOURS[method]
                axes.scatter(np.full(len(shares), x), shares, s=14, facecolors=face, edgecolors=COLOURS[method])
                axes.hlines(np.mean(shares), x - 0.13, x + 0.13, color=COLOURS[method], linewidth=2)
        before, after = PAPER_LEFT[problem]
        axes.axhline(100 * (1 - after / before), color="0.4", linewidth=0.8, linestyle=":")
        axes.set(title=f"MONK {problem}")
        axes.set_xticks(range(3), ["obs", "obd", "magnitude"])
    panels[0].set_ylabel("weights removed in %\n(hollow: retrained)")
    _save(figure, path)


def plot_lenet(points: Sequence[LenetPoint], path: Path) -> None:
    """Draw loss on the training images and accuracy on unseen ones against the share of weights that are left."""
    figure, panels = _axes(8.5, 2)
    for method in dict.fromkeys(point.method for point in points):
        for seed in sorted({point.seed for point in points}):
            own = [point for point in points if (point.method, point.seed) == (method, seed)]
            label, kept = method if seed == 0 else None, [100 * point.kept for point in own]
            panels[0].plot(kept, [point.loss for point in own], color=COLOURS[method], marker=".", label=label)
            panels[1].plot(kept, [100 * point.accuracy for point in own], color=COLOURS[method], marker=".")
    for axes in panels:
        axes.set(xscale="log", xlabel="weights left in %")
    panels[0].set(yscale="log", ylabel="cross-entropy on training digits", title="LeNet-5, nothing retrained")
    panels[1].set(ylabel="accuracy on unseen digits in %")
    panels[0].legend(frameon=False)
    _save(figure, path)


# Page -----------------------------------------------------------------------------------------------------------------


def removed_shares(prunings: Sequence[MonkPruning], problem: int, method: str, retrained: bool) -> list[float]:
    """Give the percentage of weights removed for each seed."""
    chosen = (p for p in prunings if (p.problem, p.method, p.retrained) == (problem, method, retrained))
    return [100 * (1 - entry.left / entry.weights) for entry in chosen]


def markdown(data: Mapping[str, Any], figures: str) -> str:
    """Write the page."""
    deletions = [XorDeletion(**row) for row in data["xor"]]
    prunings = [MonkPruning(**row) for row in data["monks"]]
    points = [LenetPoint(**row) for row in data["lenet"]]
    parts = [
        "# The classical results of pruning by second derivatives",
        "A unit is a single weight here; scores and updates are the package's `obs`, `obd`, `magnitude` and `random`,"
        " from the gradients of the outputs by the weights (the Gauss-Newton matrix, which Hassibi and Stork 1993 use,"
        " too). What differs from the defaults for networks: the update of `obs` is damped by"
        f" {data['dampening']:g} of the mean diagonal, as its score is, and not by 1.",
        origin(data),
        *_xor(deletions, data["xor_tried"], figures),
        *_monks(prunings, figures),
        *(_lenet(points, data["lenet_images"], figures) if points else ()),
    ]
    return "\n\n".join(parts)


def _xor(deletions: Sequence[XorDeletion], tried: int, figures: str) -> list[str]:
    methods = list(dict.fromkeys(entry.method for entry in deletions))
    rows, right = [], {}
    for method in methods:
        own = [entry for entry in deletions if entry.method == method]
        right[method] = sum(entry.least_error for entry in own)
        counts = [sum(getattr(entry, name) for entry in own) for name in ("least_error", "solvable", "solves")]
        errors = [entry.error for entry in own]
        rows.append([method, *(f"{count} of {len(own)}" for count in counts), f"{np.median(errors):.1e}"])
    networks = len({entry.seed for entry in deletions})
    only = right["obs"] == networks and all(right[m] < networks for m in methods if m != "obs")
    verdict = (
        "**Agrees with the paper** (“only OBS deletes the correct weights from a trained XOR network in every case”)."
        if only
        else "**Does not agree with the paper**, which says that only OBS deletes the correct weights in every case."
    )
    return [
        "## XOR (Hassibi and Stork 1993)",
        f"2-2-1 networks with 9 weights, trained from {tried} seeds; {networks} of them solve the problem, the others"
        " end in local minima, and are left out. One weight is deleted. The truth is found by brute force: each of the"
        " 9 is deleted in turn and the network trained again; the correct weight is the one that leaves the least error"
        " (within 5 %), and a harmless one leaves the problem solvable. The last two columns are before any"
        " retraining.",
        table(["criterion", "correct weight", "harmless weight", "still solved", "median squared error"], rows),
        f"![Error after one deletion]({figures}-xor.svg)",
        "A point is a network, hollow where the weight was not the correct one; dotted is a constant answer.",
        verdict,
    ]


def _monks(prunings: Sequence[MonkPruning], figures: str) -> list[str]:
    rows, agrees = [], []
    for problem, (before, after) in PAPER_LEFT.items():
        paper = 100 * (1 - after / before)
        for method in dict.fromkeys(entry.method for entry in prunings):
            for retrained in (False, True):
                shares = removed_shares(prunings, problem, method, retrained)
                own = [p for p in prunings if (p.problem, p.method, p.retrained) == (problem, method, retrained)]
                rows.append(
                    [
                        f"MONK {problem}, {method}{', retrained' if retrained else ''}",
                        f"{np.mean(shares):.0f} ± {np.std(shares):.0f}",
                        f"{min(shares):.0f} to {max(shares):.0f}",
                        f"{paper:.0f}" if method == "obs" else "",
                        f"{100 * np.mean([p.train for p in own]):.1f}",
                        f"{100 * np.mean([p.test_before for p in own]):.1f} → "
                        f"{100 * np.mean([p.test_after for p in own]):.1f}",
                    ]
                )
        agrees.append(
            f"MONK {problem}: "
            + " and ".join(
                f"{np.mean(shares):.0f} % ({sum(share >= paper - 1 for share in shares)} of {len(shares)} seeds)"
                for shares in (removed_shares(prunings, problem, "obs", retrained) for retrained in (False, True))
            )
            + f" against {paper:.0f} %"
        )
    header = ["problem, criterion", "removed in %", "range", "paper", "train in %", "test in %"]
    return [
        "## MONK's problems (Thrun et al. 1991; Hassibi and Stork 1993)",
        "All 432 attribute vectors from the rules; random training sets of the original sizes (124, 169, 122; 5 % of"
        " the labels of the third are wrong), a new one for each seed; 17 inputs, 3, 2 and 2 hidden units, 58, 39 and"
        " 39 weights, with weight decay. The weight of least saliency is deleted again and again until a training"
        " pattern would be lost; the test set plays no part in that. “Retrained”: where deleting alone would lose one,"
        " what is left is trained for at most 60 evaluations, and the deletion stands if that brings it back. Mean and"
        " standard deviation over seeds.",
        table(header, rows),
        f"![Weights removed]({figures}-monks.svg)",
        f"`obs`, without and with retraining, against the paper (dotted), and by how many seeds that is reached:"
        f" {'; '.join(agrees)}.",
        _monks_verdict(prunings),
    ]


def _monks_verdict(prunings: Sequence[MonkPruning]) -> str:
    def mean(method: str, retrained: bool) -> float:
        return float(np.mean([np.mean(removed_shares(prunings, p, method, retrained)) for p in PAPER_LEFT]))

    alone, again = ({method: mean(method, way) for method in ("obs", "obd", "magnitude")} for way in (False, True))
    rival = max(alone["obd"], alone["magnitude"])
    said = "**agrees with the paper**" if alone["obs"] > rival else "**does not agree with the paper**"
    return (
        f"Over the three problems and without retraining, `obs` removes {alone['obs']:.0f} %, `obd` {alone['obd']:.0f}"
        f" % and `magnitude` {alone['magnitude']:.0f} %, which {said}: OBS permits to remove more weights than other"
        f" methods for the same error on the training set. With retraining it is {again['obs']:.0f}, {again['obd']:.0f}"
        f" and {again['magnitude']:.0f} %: {again['obs'] - max(again['obd'], again['magnitude']):+.0f} points for"
        f" `obs`, after {alone['obs'] - rival:+.0f} without: it gives the others what the update of `obs` gives."
    )


def _lenet(points: Sequence[LenetPoint], images: int, figures: str) -> list[str]:
    methods = list(dict.fromkeys(point.method for point in points))
    kept = list(dict.fromkeys(point.kept for point in points))

    def of(method: str, share: float, name: str) -> list[float]:
        return [getattr(p, name) for p in points if (p.method, p.kept) == (method, share)]

    rows = [
        [
            f"{100 * share:.3g} %",
            *(f"{np.mean(of(m, share, 'loss')):.3f} ± {np.std(of(m, share, 'loss')):.3f}" for m in methods),
            *(f"{100 * np.mean(of(m, share, 'accuracy')):.1f}" for m in methods),
        ]
        for share in kept
    ]
    wins = sum(np.mean(of("obd", share, "loss")) <= np.mean(of("magnitude", share, "loss")) for share in kept[1:])
    header = ["weights left", *(f"loss, {m}" for m in methods), *(f"accuracy, {m}" for m in methods)]
    seeds = len({point.seed for point in points})
    return [
        "## LeNet (LeCun et al. 1990)",
        f"LeNet-5 (20-50-500-10, 431,080 weights) trained on 1,297 of scikit-learn's digits, {seeds} seeds. Every"
        f" weight is scored once, on {images} training images, and the weights of least saliency are set to zero;"
        " nothing is retrained. Loss on the training images (mean ± standard deviation), accuracy in % on"
        " the 500 unseen ones.",
        table(header, rows),
        f"![Loss and accuracy]({figures}-lenet.svg)",
        f"`obd` leaves the smaller loss at {wins} of {len(kept) - 1} sizes"
        + (
            ": **agrees with the paper**."
            if wins > 0.8 * (len(kept) - 1)
            else ", which the paper does not lead to expect."
        )
        + " The paper's network has 2,578 free weights, shared ones counted once, and its own digits.",
    ]
