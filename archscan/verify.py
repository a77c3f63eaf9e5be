"""Is the slim network the masked original, and does it cost what the plan says? → `Verification`.

The reference is the original with the *consumer* slices of the removed units set to zero (`masked_original`): nobody
reads them any more, nothing else is changed. The slim network must compute the same. Slices of normalisations, biases
and producers keep their values in the reference, so an index that is off by one anywhere shows in the outputs.

The decision that is not obvious: the comparison is made twice, on the network as it is and on a copy whose
normalisation statistics, affine parameters, biases and layer scales are random, because a freshly initialised or a
sparsely trained network is full of zeros and ones that hide a wrong index.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from archscan.capture import split_input, train_mode
from archscan.errors import RebuildMismatch
from archscan.groups import Coupling
from archscan.rebuild import apply
from archscan.surgery import Kept, Surgery, kept_units, named_tensors

TOLERANCE: Mapping[torch.dtype, float] = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest error that rounding may explain, relative to the largest output; deep networks lose some six digits."""

FLOAT64_PARAMETERS = 100_000_000
"""Networks with more parameters than this are compared in float32, to save memory."""


@dataclass(frozen=True)
class Verification:
    """What the comparison of the slim network with the masked original found.

    Attributes:
        applicable: Whether the two must be equal; they need not be where a normalisation mixes channels.
        reason: Why it does not apply, or what failed; empty where all is well.
        max_abs_error: Largest absolute difference of any output; None where it does not apply.
        tolerance: The largest difference that passes, in units of the output; None where it does not apply.
        dtype: The arithmetic of the comparison, ``float64`` or ``float32``.
        passed: Whether the slim network is right, as far as could be seen.
    """

    applicable: bool
    reason: str
    max_abs_error: float | None
    tolerance: float | None
    dtype: str
    passed: bool


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


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Copy a model and give it normalisation statistics, affine parameters, layer scales and biases that hide nothing.

    Scales are drawn from [0.5, 1.5], running variances multiplied by as much, running means and biases moved by a
    normal deviate; weights that are all zero (zero-initialised last layers) are drawn from a normal distribution.

    Args:
        model: The original, left unchanged.
        seed: Seed of the draws; the global generators are not touched.
    """
    result = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for module in result.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if id(tensor) in done or not tensor.is_floating_point():
                continue
            done.add(id(tensor))
            _randomize_tensor(module, name, tensor.detach(), generator)
    return result


def _randomize_tensor(module: nn.Module, name: str, tensor: Tensor, generator: torch.Generator) -> None:
    def uniform() -> Tensor:
        return (torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5).to(tensor)

    def normal() -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    contracts = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear)) and name == "weight"
    one_axis = tensor.numel() == max(tensor.shape, default=1)
    if name == "running_var":
        tensor.mul_(uniform())
    elif name == "running_mean":
        variance = getattr(module, "running_var", None)
        scale = variance.detach().sqrt() if isinstance(variance, Tensor) else torch.ones_like(tensor)
        tensor.add_(0.3 * scale * normal())
    elif name in module._buffers:
        return
    elif one_axis and not contracts:
        if name.endswith("bias") or name == "beta":
            tensor.add_(0.3 * normal())
        else:
            tensor.copy_(uniform())
    elif not tensor.any():
        tensor.copy_(normal() / max(tensor[0].numel(), 1) ** 0.5)


def _convert(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, tree
    )


def _run(model: nn.Module, inputs: Any) -> list[Tensor]:
    args, kwargs = split_input(inputs)
    with train_mode(model, False), torch.no_grad():
        return output_tensors(model(*args, **kwargs))


def _run_in(model: nn.Module, inputs: Any, dtype: torch.dtype) -> list[Tensor]:
    """Run a model, or a copy in another arithmetic; integer inputs and tensors stay as they are."""
    if any(tensor.is_floating_point() and tensor.dtype != dtype for _, tensor in named_tensors(model)):
        model = copy.deepcopy(model).to(dtype)
    return _run(model, _convert(inputs, dtype))


def _run_both(reference: nn.Module, rebuilt: nn.Module, inputs: Any) -> tuple[list[Tensor], list[Tensor], torch.dtype]:
    """Run two models in float64 where that can be afforded and every op of theirs can do it, else in float32."""
    parameters = sum(parameter.numel() for parameter in reference.parameters())
    devices = {tensor.device.type for tensor in reference.parameters()}
    if parameters <= FLOAT64_PARAMETERS and "mps" not in devices:
        try:
            expected = _run_in(reference, inputs, torch.float64)
        except (RuntimeError, NotImplementedError):  # a forward that casts to float32 somewhere, or no memory
            expected = []
        if expected:
            return expected, _run_in(rebuilt, inputs, torch.float64), torch.float64
    return _run_in(reference, inputs, torch.float32), _run_in(rebuilt, inputs, torch.float32), torch.float32


def _compare(expected: list[Tensor], found: list[Tensor], dtype: torch.dtype, tolerance: float | None) -> Verification:
    relative = TOLERANCE[dtype] if tolerance is None else tolerance
    name = str(dtype).removeprefix("torch.")
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return Verification(True, "the outputs have other shapes", None, None, name, False)
    scale = max((float(tensor.abs().max()) for tensor in expected if tensor.numel()), default=0.0)
    pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True) if a.numel()]
    if not all(bool(a.isfinite().all()) and bool(b.isfinite().all()) for a, b in pairs):
        return Verification(True, "an output is not finite", None, None, name, False)
    error = max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
    allowed = relative * scale
    passed = error <= allowed
    reason = "" if passed else f"the outputs differ by {error:.3g} where rounding explains {allowed:.3g}"
    return Verification(True, reason, error, allowed, name, passed)


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
    return Verification(False, f"{why}; {problem}" if problem else why, None, None, name, not problem)


def _training_problem(model: nn.Module, inputs: Any) -> str:
    """Take one backward pass in train mode, on a copy and a batch of two; say what is wrong with it."""
    learner = copy.deepcopy(model).train()
    two = tree_map(lambda leaf: torch.cat([leaf, leaf])[:2] if isinstance(leaf, Tensor) and leaf.ndim else leaf, inputs)
    args, kwargs = split_input(two)
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
        Where statistics are taken over channels, ``applicable`` is False and the outputs' shapes, finiteness and one
        training step have been checked instead.
    """
    if coupling.mixing:
        places = ", ".join(coupling.mixing[:3]) + (" …" if len(coupling.mixing) > 3 else "")
        return _check_sanity(original, rebuilt, inputs, f"statistics are taken over channels ({places})")
    expected, found, dtype = _run_both(masked_original(original, coupling, kept), rebuilt, inputs)
    return _compare(expected, found, dtype, tolerance)


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
    structure = verify(random, apply(random, surgery), coupling, kept, inputs)
    if not structure.passed:
        return replace(structure, reason=f"with randomised normalisation, {structure.reason}")
    return max(plain, structure, key=lambda found: (found.max_abs_error or 0.0) / (found.tolerance or 1.0))


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
