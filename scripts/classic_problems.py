"""The networks and problems on which weight pruning was first compared: XOR and the MONK's problems.

A perceptron has one hidden layer; hidden and output units are logistic. Its free parameters lie in one vector: weights
into the hidden layer, row by row, biases of the hidden units, weights into the output, bias of the output. All count as
weights, as they do in the literature. Everything is float64. `reproduce_classics.py`, beside this file, imports it.

Shape suffixes: N samples, I inputs, H hidden units, W weights, U weights that are left.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import least_squares
from scipy.special import expit

from archscan.criteria import criterion
from archscan.gate_statistics import GateStatistics

ATTRIBUTES = (3, 3, 2, 3, 4, 2)
"""Values that each attribute of the MONK's problems takes."""

MONKS_TRAINING = (124, 169, 122)
MONKS_HIDDEN = (3, 2, 2)
MONKS_NOISE = (0.0, 0.0, 0.05)
"""Size of the training set, hidden units and share of wrong training labels (Thrun et al. 1991), by problem."""

_RETRAINING_STEPS = 60


@dataclass(frozen=True, eq=False)
class Task:
    """Patterns with targets 0 and 1.

    Attributes:
        inputs_NI: To train on.
        targets_N: Likewise.
        all_inputs_NI: To test on.
        all_targets_N: Likewise.
        hidden: Hidden units of the network that the literature trains.
    """

    inputs_NI: np.ndarray
    targets_N: np.ndarray
    all_inputs_NI: np.ndarray
    all_targets_N: np.ndarray
    hidden: int


@dataclass(frozen=True, eq=False)
class Perceptron:
    """A network, some of whose weights may be gone.

    Attributes:
        hidden: H.
        weight_W: All weights, 0 where they are gone.
        left_W: Which are left.
    """

    hidden: int
    weight_W: np.ndarray
    left_W: np.ndarray

    def outputs(self, inputs_NI: np.ndarray) -> np.ndarray:
        """Compute the output for each pattern, shape [N]."""
        return self._run(inputs_NI)[1]

    def jacobian(self, inputs_NI: np.ndarray) -> np.ndarray:
        """Differentiate the outputs by all weights, shape [N, W]."""
        hidden_NH, output_N = self._run(inputs_NI)
        slope_N = output_N * (1 - output_N)
        _, _, out_H, _ = self._parts(inputs_NI.shape[1])
        below_NH = slope_N[:, None] * out_H * hidden_NH * (1 - hidden_NH)
        weights = (below_NH[:, :, None] * inputs_NI[:, None, :]).reshape(len(inputs_NI), -1)
        return np.hstack([weights, below_NH, slope_N[:, None] * hidden_NH, slope_N[:, None]])

    def trained(self, task: Task, decay: float, steps: int | None = None) -> "Perceptron":
        """Minimise ½ mean (output − target)² + ½ decay ‖w‖² over the weights that are left, from where they are."""

        def at(left_U: np.ndarray) -> Perceptron:
            weight_W = np.zeros(len(self.weight_W))
            weight_W[self.left_W] = left_U
            return Perceptron(self.hidden, weight_W, self.left_W)

        share = len(task.targets_N) ** -0.5

        def residuals(left_U: np.ndarray) -> np.ndarray:
            error_N = at(left_U).outputs(task.inputs_NI) - task.targets_N
            return np.concatenate([share * error_N, decay**0.5 * left_U])

        def slopes(left_U: np.ndarray) -> np.ndarray:
            jacobian_NU = at(left_U).jacobian(task.inputs_NI)[:, self.left_W]
            return np.vstack([share * jacobian_NU, decay**0.5 * np.eye(len(left_U))])

        if not self.left_W.any():
            return self
        return at(least_squares(residuals, self.weight_W[self.left_W], slopes, method="lm", max_nfev=steps).x)

    def without(self, weight: int, task: Task, method: str) -> "Perceptron":
        """Delete a weight; where the criterion has an update, let the others make up for it."""
        left_W = self.left_W.copy()
        left_W[weight] = False
        gates_W = left_W.astype(np.float64)
        row = criterion(method)
        if row.update is not None:
            gone_U = np.flatnonzero(self.left_W) == weight
            gates_W[self.left_W] = row.update(self.statistics(task), gone_U)
        return Perceptron(self.hidden, np.where(left_W, self.weight_W * gates_W, 0.0), left_W)

    def scores(self, task: Task, method: str) -> np.ndarray:
        """Score the weights that are left by a criterion, shape [U]."""
        return criterion(method).score(self.statistics(task))

    def statistics(self, task: Task) -> GateStatistics:
        """Make each weight a unit, whose gate's gradient is the output's by the weight, times the weight.

        F = E[g gᵀ] is then the Gauss–Newton matrix of the squared error, which Hassibi and Stork (1993) take for its
        Hessian, in units of the weights.
        """
        weight_U = self.weight_W[self.left_W]
        gradients_NU = self.jacobian(task.inputs_NI)[:, self.left_W] * weight_U
        return GateStatistics(len(weight_U), sample_gradient_NU=gradients_NU, weight_norm_U=np.abs(weight_U))

    def accuracy(self, task: Task, *, test: bool = False) -> float:
        """Count patterns on the right side of one half."""
        inputs_NI, targets_N = (task.all_inputs_NI, task.all_targets_N) if test else (task.inputs_NI, task.targets_N)
        return float(((self.outputs(inputs_NI) > 0.5) == (targets_N > 0.5)).mean())

    def _parts(self, inputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        into = self.hidden * inputs
        weight_W = self.weight_W
        return (
            weight_W[:into].reshape(self.hidden, inputs),
            weight_W[into : into + self.hidden],
            weight_W[into + self.hidden : into + 2 * self.hidden],
            float(weight_W[-1]),
        )

    def _run(self, inputs_NI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        into_HI, bias_H, out_H, bias = self._parts(inputs_NI.shape[1])
        hidden_NH = expit(inputs_NI @ into_HI.T + bias_H)
        return hidden_NH, expit(hidden_NH @ out_H + bias)


def fresh(task: Task, seed: int, spread: float) -> Perceptron:
    """Draw a network's weights from a normal distribution."""
    count = task.hidden * (task.inputs_NI.shape[1] + 2) + 1
    return Perceptron(task.hidden, np.random.default_rng(seed).normal(0, spread, count), np.ones(count, dtype=bool))


# Problems -------------------------------------------------------------------------------------------------------------


def xor() -> Task:
    """Give the four patterns of exclusive or, on −1 and 1, for two hidden units."""
    inputs_NI = np.array(list(product((-1.0, 1.0), repeat=2)))
    targets_N = (inputs_NI[:, 0] != inputs_NI[:, 1]).astype(np.float64)
    return Task(inputs_NI, targets_N, inputs_NI, targets_N, 2)


def monk(problem: int, seed: int) -> Task:
    """Give a MONK's problem, 1 to 3: all 432 attribute vectors, and a random training set of the literature's size.

    The rules (Thrun et al. 1991): a1 = a2 or a5 = 1; exactly two attributes have their first value; (a5 = 3 and a4 = 1)
    or (a5 ≠ 4 and a2 ≠ 3), with 5 % of the training labels wrong.
    """
    vectors = np.array(list(product(*(range(1, size + 1) for size in ATTRIBUTES))))
    a1, a2, _, a4, a5, _ = vectors.T
    rules = (
        (a1 == a2) | (a5 == 1),
        (vectors == 1).sum(1) == 2,
        ((a5 == 3) & (a4 == 1)) | ((a5 != 4) & (a2 != 3)),
    )
    targets_N = rules[problem - 1].astype(np.float64)
    inputs_NI = np.hstack([vectors[:, [i]] == np.arange(1, size + 1) for i, size in enumerate(ATTRIBUTES)])
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(vectors), MONKS_TRAINING[problem - 1], replace=False)
    seen_N = targets_N[chosen].copy()
    wrong = rng.choice(len(chosen), round(MONKS_NOISE[problem - 1] * len(chosen)), replace=False)
    seen_N[wrong] = 1 - seen_N[wrong]
    every_NI = inputs_NI.astype(np.float64)
    return Task(every_NI[chosen], seen_N, every_NI, targets_N, MONKS_HIDDEN[problem - 1])


# Pruning --------------------------------------------------------------------------------------------------------------


def pruned(network: Perceptron, task: Task, method: str, decay: float, *, retrain: bool) -> Perceptron:
    """Delete the weight of least saliency again and again, as long as no training pattern is lost that was right.

    Args:
        network: Trained.
        task: Its problem.
        method: A criterion's name.
        decay: Of the retraining.
        retrain: Whether to train what is left where a deletion alone would lose patterns.

    Returns:
        The smallest network that is as accurate on the training set as the first.
    """
    least = network.accuracy(task)
    while network.left_W.any():
        weight = int(np.flatnonzero(network.left_W)[network.scores(task, method).argmin()])
        smaller = network.without(weight, task, method)
        if smaller.accuracy(task) < least and retrain:
            smaller = smaller.trained(task, decay, _RETRAINING_STEPS)
        if smaller.accuracy(task) < least:
            break
        network = smaller
    return network
