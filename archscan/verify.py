"""Is the slim network the masked original, and does it cost what the plan says? → `Verification`.

The reference is the original with the *consumer* slices of the removed units set to zero (`masked_original`): nobody
reads them any more, nothing else is changed. The slim network must compute the same. Slices of normalisations, biases
and producers keep their values in the reference, so an index that is off by one anywhere shows in the outputs.

The decision that is not obvious: the comparison is made twice, on the network as it is and on a copy whose
normalisation statistics, affine parameters, biases and layer scales are random, because a freshly initialised or a
sparsely trained network is full of zeros and ones that hide a wrong index. Where statistics are taken over channels,
both networks are given the same ones (see `same_statistics`).
"""

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from archscan.capture import split_input, train_mode
from archscan.errors import RebuildMismatch
from archscan.groups import Coupling
from archscan.randomize import near_activations, randomize
from archscan.rebuild import apply
from archscan.same_statistics import Played, run_with_same_statistics
from archscan.surgery import Kept, Surgery, kept_units, named_tensors

TOLERANCE: Mapping[torch.dtype, float] = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest error that rounding may explain, relative to the largest output; deep networks lose some six digits."""

FLOAT64_PARAMETERS = 100_000_000
"""Networks with more parameters than this are compared in float32, to save memory."""

MOST_TOLERANCE = 1e-6
"""Largest error that may be put down to rounding in float64, where it is measured that the network amplifies it."""

_ROUNDING = 2.0**-50
"""How far inputs are moved to see what rounding does, relative to each value: by some last digits of float64."""

_ROUNDINGS = 100.0
"""Every op rounds, where the inputs are moved once: how much more than that movement rounding explains."""

LEAST_EFFECT = 1e-5
"""A proof says little where all that was removed would have changed the outputs by less than this fraction."""

Proof = Literal["masked original", "same statistics", "sanity"]
"""How a network was verified: against the masked original; against it, both with the same statistics over channels; or
by shapes, finiteness and a training step only."""


@dataclass(frozen=True)
class Verification:
    """What the comparison of the slim network with the masked original found.

    Attributes:
        applicable: Whether the two were compared; where a normalisation mixes channels in a way that cannot be played
            back, they are not.
        reason: Why they were not, on what condition they were, or what failed; empty where there is nothing to say.
        max_abs_error: Largest absolute difference of any output; None where it does not apply.
        tolerance: The largest difference that passes, in units of the output; None where it does not apply.
        dtype: The arithmetic of the comparison, ``float64`` or ``float32``.
        passed: Whether the slim network is right, as far as could be seen.
        proof: What was done.
        largest_output: Largest magnitude of the masked original's outputs, which the tolerance is relative to; None
            where it does not apply.
    """

    applicable: bool
    reason: str
    max_abs_error: float | None
    tolerance: float | None
    dtype: str
    passed: bool
    proof: Proof = "masked original"
    largest_output: float | None = None


def output_tensors(output: Any) -> list[Tensor]:
    """List all tensors of a model's output: a tensor, tuple, dict, or an object with tensors as attributes."""
    found: list[Tensor] = []
    for leaf in tree_flatten(output)[0]:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type):
            found.extend(value for value in vars(leaf).values() if isinstance(value, Tensor))
    return found


def masked_original(model: nn.Module, coupling: Coupling, kept: Kept) -> nn.Module:
    """Copy a model and set to zero every weight slice that would read a removed unit.

    A weight of a depthwise convolution, whose output *is* the unit that it reads, keeps its values: its output is read
    through a zero further on, and zeroing it too would hide a consumer that was forgotten.

    Args:
        model: The original, left unchanged.
        coupling: What coupling said about it.
        kept: Kept steps of every channel group, per fibre.

    Returns:
        A model of the original's shapes.
    """
    stays = kept_units(coupling, kept)
    masked = copy.deepcopy(model)
    tensors = dict(named_tensors(masked))
    for name, axes in coupling.tensors.items():
        rows = next((axis.units for axis in axes if axis.axis == 0 and axis.units.ndim == 1), None)
        for owners in axes:
            if owners.role != "in":
                continue
            removed = ~stays[owners.units]
            if owners.units.ndim == 2 and rows is not None:
                removed &= owners.units != rows[:, None]
            if removed.any():
                _zero(tensors[name], owners.axis, removed)
    return masked


def _zero(tensor: Tensor, axis: int, removed: np.ndarray) -> None:
    """Zero the indices of an axis, or the (row, index) pairs of axis 0 and an axis."""
    mask = torch.from_numpy(removed).to(tensor.device)
    lead = (len(removed), *(1,) * (axis - 1)) if removed.ndim == 2 else (1,) * axis
    mask = mask.view(*lead, removed.shape[-1], *(1,) * (tensor.ndim - axis - 1))
    tensor.detach().masked_fill_(mask, 0.0)


def _convert(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, tree
    )


def _run(model: nn.Module, inputs: Any) -> list[Tensor]:
    args, kwargs = split_input(inputs)
    with train_mode(model, False), torch.no_grad():
        return output_tensors(model(*args, **kwargs))


def _in_arithmetic(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give a model, or a copy in another arithmetic; integers stay as they are."""
    if any(tensor.is_floating_point() and tensor.dtype != dtype for _, tensor in named_tensors(model)):
        return copy.deepcopy(model).to(dtype)
    return model


@dataclass(frozen=True, eq=False)
class _Pair:
    """The networks of one comparison; `masked` is nobody else's, so that it may be converted in place."""

    original: nn.Module
    masked: nn.Module
    slim: nn.Module
    coupling: Coupling

    def play(self, inputs: Any, dtype: torch.dtype, effect: bool) -> Played | None:
        """Run masked original and slim network, with the same statistics where the coupling says that channels mix."""
        slim, converted = _in_arithmetic(self.slim, dtype), _convert(inputs, dtype)
        masked = self.masked.to(dtype)

        def run(model: nn.Module) -> list[Tensor]:
            return _run(model, converted)

        if not self.coupling.mixing:
            return Played(run(masked), run(slim), [], 0, 0)
        original = _in_arithmetic(self.original, dtype) if effect else None
        return run_with_same_statistics(masked, slim, self.coupling, run, original)

    def play_at_best(self, inputs: Any, effect: bool) -> tuple[Played | None, torch.dtype]:
        """Do so in float64 where that can be afforded and every op can do it, else in float32."""
        parameters = sum(parameter.numel() for parameter in self.masked.parameters())
        devices = {tensor.device.type for tensor in self.masked.parameters()}
        if parameters <= FLOAT64_PARAMETERS and "mps" not in devices:
            try:
                return self.play(inputs, torch.float64, effect), torch.float64
            except (RuntimeError, NotImplementedError):  # a forward that casts to float32 somewhere, or no memory
                pass
        return self.play(inputs, torch.float32, effect), torch.float32


def _compare(played: Played, dtype: torch.dtype, tolerance: float | None) -> Verification:
    relative = TOLERANCE[dtype] if tolerance is None else tolerance
    name = str(dtype).removeprefix("torch.")
    expected, found = played.expected, played.found
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return Verification(True, "the outputs have other shapes", None, None, name, False)
    if not all(bool(tensor.isfinite().all()) for tensor in (*expected, *found)):
        return Verification(True, "an output is not finite", None, None, name, False)
    largest = _largest(expected)
    error, allowed = _difference(expected, found), relative * largest
    passed = error <= allowed
    reason = "" if passed else f"the outputs differ by {error:.3g} where rounding explains {allowed:.3g}"
    return Verification(True, reason, error, allowed, name, passed, largest_output=largest)


def _largest(tensors: list[Tensor]) -> float:
    return max((float(tensor.abs().max()) for tensor in tensors if tensor.numel()), default=0.0)


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True) if a.numel()]
    return max((float((a - b).abs().max()) for a, b in pairs), default=0.0)


def _with_statistics(found: Verification, played: Played, coupling: Coupling) -> Verification:
    """Say on what condition the networks were compared, and whether that proves anything."""
    found = replace(found, proof="same statistics")
    if not found.passed:
        return found
    reason = f"with the original's statistics over channels ({_places(coupling)})"
    reason += f", {found.reason}" if found.reason else ""
    effect = _difference(played.expected, played.unmasked) if played.unmasked else None
    if effect is not None and effect < LEAST_EFFECT * _largest(played.expected):
        reason += f", which says little, since all that was removed would change the outputs by {effect:.1e} only"
    return replace(found, reason=reason)


def _places(coupling: Coupling) -> str:
    return ", ".join(coupling.mixing[:3]) + (" …" if len(coupling.mixing) > 3 else "")


def _check_sanity(original: nn.Module, rebuilt: nn.Module, inputs: Any, why: str) -> Verification:
    """Check what holds of any right network: its outputs' shapes, finite numbers, and a training step."""
    expected, found = _run(original, inputs), _run(rebuilt, inputs)
    problem = ""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        problem = "the outputs have other shapes"
    elif not all(bool(tensor.isfinite().all()) for tensor in found):
        problem = "an output is not finite"
    else:
        problem = _training_problem(rebuilt, inputs)
    name = str(next((tensor.dtype for tensor in found), torch.float32)).removeprefix("torch.")
    return Verification(False, f"{why}; {problem}" if problem else why, None, None, name, not problem, "sanity")


def _measured_tolerance(pair: _Pair, inputs: Any, played: Played) -> float:
    """Measure how far rounding moves the masked original's outputs, relative to the largest; at least the usual."""
    draws = torch.Generator().manual_seed(0)

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        noise = torch.randn(leaf.shape, generator=draws, dtype=torch.float64).to(leaf.device)
        return leaf.double() * (1 + _ROUNDING * noise)

    again = pair.play(tree_map(moved, inputs), torch.float64, False)
    usual = TOLERANCE[torch.float64]
    if again is None:
        return usual
    largest = max(_largest(played.expected), torch.finfo(torch.float64).tiny)
    explained = _ROUNDINGS * _difference(played.expected, again.expected) / largest
    return max(usual, min(explained, MOST_TOLERANCE))


def _at_batch_of_two(inputs: Any) -> Any:
    return tree_map(
        lambda leaf: torch.cat([leaf, leaf])[:2] if isinstance(leaf, Tensor) and leaf.ndim else leaf, inputs
    )


def _training_problem(model: nn.Module, inputs: Any) -> str:
    """Take one backward pass in train mode, on a copy and a batch of two; say what is wrong with it."""
    learner = copy.deepcopy(model).train()
    args, kwargs = split_input(_at_batch_of_two(inputs))
    with torch.random.fork_rng(), torch.enable_grad():
        outputs = [tensor for tensor in output_tensors(learner(*args, **kwargs)) if tensor.requires_grad]
        if not outputs:
            return "no output can be trained"
        torch.stack([tensor.float().square().mean() for tensor in outputs]).sum().backward()
    gradients = [parameter.grad for parameter in learner.parameters() if parameter.grad is not None]
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        return "a gradient of the training step is not finite"
    return "" if gradients else "no parameter gets a gradient in training"


def verify(
    original: nn.Module,
    rebuilt: nn.Module,
    coupling: Coupling,
    kept: Kept,
    inputs: Any,
    *,
    tolerance: float | None = None,
) -> Verification:
    """Compare a slim network with the masked original, in eval mode; neither is changed.

    Args:
        original: The network that was slimmed.
        rebuilt: The slim network.
        coupling: What coupling said about the original.
        kept: Kept steps of every channel group, per fibre.
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        tolerance: Largest error that passes, as a fraction of the largest output; by default `TOLERANCE` of the
            arithmetic that was used.

    Returns:
        What was found. Where statistics are taken over channels, both networks are given those of the masked original;
        where they cannot be, ``applicable`` is False and the outputs' shapes, finiteness and one training step have
        been checked instead.
    """
    pair = _Pair(original, masked_original(original, coupling, kept), rebuilt, coupling)
    return _verify(pair, inputs, tolerance, effect=False)


def _verify(pair: _Pair, inputs: Any, tolerance: float | None, effect: bool) -> Verification:
    try:
        return _verify_on(pair, inputs, tolerance, effect)
    except ValueError:  # a normalisation refuses single values, which a batch of one gives it at small inputs
        found = _verify_on(pair, _at_batch_of_two(inputs), tolerance, effect)
        how = "at a batch of two, since one of the networks cannot normalise the single values of a batch of one"
        return replace(found, reason="; ".join(part for part in (found.reason, how) if part))


def _verify_on(pair: _Pair, inputs: Any, tolerance: float | None, effect: bool) -> Verification:
    played, dtype = pair.play_at_best(inputs, effect)
    if played is None:
        why = f"statistics are taken over channels ({_places(pair.coupling)})"
        return _check_sanity(pair.original, pair.slim, inputs, why)
    found = _compare(played, dtype, tolerance)
    if not found.passed and tolerance is None and dtype == torch.float64:
        found = _compare(played, dtype, _measured_tolerance(pair, inputs, played))
        if found.passed:
            found = replace(found, reason="where the network amplifies rounding, which was measured")
    return _with_statistics(found, played, pair.coupling) if pair.coupling.mixing else found


def prove(
    original: nn.Module,
    rebuilt: nn.Module,
    surgery: Surgery,
    coupling: Coupling,
    kept: Kept,
    inputs: Any,
    *,
    seed: int = 0,
) -> Verification:
    """Compare as `verify` does, on the network as it is and on a randomised copy; return the worse of the two.

    Args:
        original: The network that was slimmed.
        rebuilt: The slim network.
        surgery: What turned the one into the other; it is applied to the randomised copy too.
        coupling: What coupling said about the original.
        kept: Kept steps of every channel group, per fibre.
        inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        seed: Seed of the randomised copy.
    """
    plain = verify(original, rebuilt, coupling, kept, inputs)
    if not plain.applicable or not plain.passed:
        return plain
    random = randomize(original, seed)
    masked = masked_original(random, coupling, kept)
    with suppress(ValueError):  # a normalisation refuses single values, see `_verify`
        near_activations(masked, partial(_run, inputs=inputs), seed, twin=random)
    pair = _Pair(random, masked, apply(random, surgery), coupling)
    structure = _verify(pair, inputs, None, effect=True)
    if not structure.passed:
        return replace(structure, reason=f"with randomised normalisation, {structure.reason}")
    worse = max(plain, structure, key=lambda found: (found.max_abs_error or 0.0) / (found.tolerance or 1.0))
    return replace(worse, reason=structure.reason) if structure.applicable else plain


def check_price(rebuilt: nn.Module, *, counted_macs: int, predicted_macs: int, predicted_params: int) -> None:
    """See that the slim network costs exactly what the plan says.

    Args:
        rebuilt: The slim network; its parameters are counted here.
        counted_macs: An independent count of its MACs per sample (fvcore's).
        predicted_macs: The plan's MACs per sample.
        predicted_params: The plan's parameters.

    Raises:
        RebuildMismatch: One of them differs.
    """
    params = sum(parameter.numel() for parameter in rebuilt.parameters())
    for what, counted, predicted in (("MACs", counted_macs, predicted_macs), ("parameters", params, predicted_params)):
        if counted != predicted:
            raise RebuildMismatch(
                f"the slim network has {counted:,} {what} where the plan says {predicted:,}; please report this network"
            )
