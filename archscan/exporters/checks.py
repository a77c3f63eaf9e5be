"""What every exported file is held against: batches of inputs, and the outputs that PyTorch gives for them.

The decision that is not obvious: the comparison is relative to the largest magnitude of each output, since other
runtimes sum in another order, and what that costs grows with the numbers that are summed. The absolute difference is
what the summary says.
"""

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from archscan.capture import split_input
from archscan.errors import BadInput, RebuildMismatch

RELATIVE_TOLERANCE = 1e-4
"""Of the largest magnitude of an output in float32; 32 machine epsilons where numbers are shorter."""

_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError)
"""What exporters raise for a model that they cannot follow; their own errors derive from these."""

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, eq=False)
class Trial:
    """One batch and what PyTorch makes of it.

    Attributes:
        batch_size: Samples in it.
        inputs: As the network takes them.
        outputs: All tensors of the output, in its order.
    """

    batch_size: int
    inputs: Any
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Agreement:
    """Largest differences from PyTorch, absolute and over the largest magnitude of the same output."""

    max_abs_error: float
    max_relative_error: float


def resize_batch(example_input: Any, batch_size: int, seed: int) -> Any:
    """Draw inputs like the example's with another batch size.

    Args:
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments. Every tensor of one or
            more axes has the batch first.
        batch_size: Samples wanted.
        seed: Of the draw; numbers are normal with the example's mean and spread, whole numbers repeat the example's.
    """
    generator = torch.Generator().manual_seed(seed)

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            return leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf
        shape = (batch_size, *leaf.shape[1:])
        if not leaf.is_floating_point():
            repeats = -(-batch_size // leaf.shape[0])
            return torch.cat([leaf.detach().cpu()] * repeats)[:batch_size]
        known = leaf.detach().double().cpu()
        spread = float(known.std(correction=0)) or 1.0
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * spread + known.mean()
        return drawn.to(leaf.dtype)

    return tree_map(resize, example_input)


def tensors_of(output: Any) -> tuple[Tensor, ...]:
    """List the tensors in an output, in its order."""
    return tuple(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def call(model: Callable[..., Any], inputs: Any) -> tuple[Tensor, ...]:
    """Run a network on what `resize_batch` gave."""
    args, kwargs = split_input(inputs)
    with torch.no_grad():
        return tensors_of(model(*args, **kwargs))


def make_trials(model: nn.Module, example_input: Any, batch_sizes: Sequence[int]) -> tuple[Trial, ...]:
    """Run the network on one drawn batch of each size.

    Raises:
        BadInput: It cannot take such a batch, or gives no tensor.
    """
    trials = []
    for seed, size in enumerate(batch_sizes):
        inputs = resize_batch(example_input, size, seed + 1)
        try:
            outputs = call(model, inputs)
        except _ERRORS as error:
            raise BadInput(
                f"the network itself cannot run a batch of {size} ({reason_of(error)}); if it takes one size only, "
                "give that: --batch N (batch_size=N)"
            ) from error
        if not outputs:
            raise BadInput("the network's output holds no tensor, so that there is nothing to export")
        if any(output.isnan().any() for output in outputs):
            raise BadInput("the network gives NaN for random inputs, so that no file can be compared with it; train it")
        trials.append(Trial(size, inputs, outputs))
    return tuple(trials)


def compare(name: str, run: Callable[[Any], Sequence[Tensor]], trials: Sequence[Trial]) -> Agreement:
    """Hold an exported file against PyTorch on every trial.

    Args:
        name: Of the file, for the message.
        run: Inputs → outputs, by the file.
        trials: What PyTorch gave.

    Raises:
        RebuildMismatch: Another number of outputs, other shapes, or numbers that are too far off.
    """
    worst = Agreement(0.0, 0.0)
    for trial in trials:
        found = run(trial.inputs)
        shapes = [tuple(output.shape) for output in found]
        expected = [tuple(output.shape) for output in trial.outputs]
        if shapes != expected:
            raise RebuildMismatch(
                f"{name} gives outputs of shape {shapes} for a batch of {trial.batch_size} where the network gives "
                f"{expected}; nothing was written"
            )
        for mine, reference in zip(found, trial.outputs, strict=True):
            error, relative = _difference(mine, reference)
            allowed = RELATIVE_TOLERANCE
            if reference.is_floating_point():
                allowed = max(allowed, 32 * torch.finfo(reference.dtype).eps)
            if not relative <= allowed:
                raise RebuildMismatch(
                    f"{name} is off by {error:.3g} for a batch of {trial.batch_size}, {relative:.2g} of its largest "
                    "output, since the network's code looks at sizes or values, or its numbers overflow; nothing was "
                    "written"
                )
            worst = Agreement(max(worst.max_abs_error, error), max(worst.max_relative_error, relative))
    return worst


def _difference(mine: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return the largest difference, absolute and over the reference's largest magnitude; NaN where not finite."""
    if reference.numel() == 0:
        return 0.0, 0.0
    ours, theirs = mine.double(), reference.double()
    error = float(torch.where(ours == theirs, 0.0, (ours - theirs).abs()).max())  # equal infinities are equal
    scale = float(theirs.abs().max())
    return error, 0.0 if error == 0 else error / scale if scale else float("inf")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep exporters from warning, logging and printing: what matters of it is checked by running the file."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def refusing(format_name: str, *, is_dynamic: bool) -> Iterator[None]:
    """Turn what an exporter raises into one sentence.

    Args:
        format_name: What is left without the exporter, for the message.
        is_dynamic: Whether any batch size was asked for.

    Raises:
        BadInput: The exporter cannot follow the network.
    """
    try:
        yield
    except _ERRORS as error:
        if is_dynamic and "Constraints violated (batch)" in str(error):
            raise BadInput(
                f"the network's code fixes the size of its batches, so that {format_name} cannot take any; give one: "
                "--batch 1 (batch_size=1)"
            ) from error
        raise BadInput(
            f"the network cannot be exported as {format_name} ({reason_of(error)}); leave {format_name} out"
        ) from error


def reason_of(error: BaseException) -> str:
    """Return the first line of the message that an error began with, without colours, cut where it is long."""
    while error.__cause__ is not None:
        error = error.__cause__
    plain = _COLOURS.sub("", str(error))
    text = next((line.strip() for line in plain.splitlines() if line.strip()), type(error).__name__)
    return (text if len(text) <= 160 else f"{text[:157]}…").rstrip(".:;")
