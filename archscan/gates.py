"""Differentiate the loss by one gate per unit: model, coupling, calibration batches → `GateStatistics`.

Unit u has a gate z_u = 1 that multiplies its channel where it is consumed (`Coupling.consumers`). Gates differ per
sample, z[n, u], so that one backward pass gives the gradient of each sample's own loss; parameters take no part in it.

Shape suffixes: B calibration batches, N samples, U units.

The decision that is not obvious: at z = 1 the gradient is the sum of a · dL/da over a channel's positions, so that
first-order statistics never multiply by a gate. A probe that passes the activation through reads that sum off in the
backward pass, and makes its output require grad, so that differentiation starts at the first gated consumer. Only
second-order statistics multiply by real gates and go backward twice. `probes` has the mechanics.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from archscan.errors import BadInput
from archscan.gate_statistics import GateStatistics, Need
from archscan.groups import Coupling
from archscan.layer_statistics import LayerMoments, LayerWatch
from archscan.losses import Batch, LossFn, SampledLabelLoss, classification_loss, drawn_label_loss, logits_of
from archscan.probes import Gates, device_and_dtype, hessian_diagonal, only_gates_differentiable
from archscan.processes import Place
from archscan.sharding import ALONE, Turn, gather, on_device, sample_count, turns
from archscan.sharpness import POWER_STEPS, groupwise_product, sharpness
from archscan.weight_statistics import weight_statistics

Progress = Callable[[int, int], None]
"""Called with (batches done, batches in all; 0 where the iterable has no length)."""

_SECOND_ORDER: frozenset[str] = frozenset({"hessian_ones", "hessian_diagonal"})
_BACKWARD: frozenset[str] = _SECOND_ORDER | {"gradient", "sample_gradient", "layer_gradients"}
_LAYERS: frozenset[str] = frozenset({"layer_inputs", "layer_gradients"})
_PASSES: frozenset[str] = _BACKWARD | _LAYERS | {"fisher_gradient"}


def collect(
    model: nn.Module,
    coupling: Coupling,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    needs: frozenset[Need],
    *,
    seed: int = 0,
    diagonal_probes: int = 8,
    progress: Progress | None = None,
    place: Place = ALONE,
) -> GateStatistics:
    """Collect the statistics in `needs` over all batches; the model is left unchanged.

    All but `sharpness` share one forward pass per batch, in eval mode. A sample is an index of the leading axis of the
    batch's first tensor; where an activation's leading axis is a multiple of that, each sample's frames are taken to be
    folded into it, one after the other. Units of frozen groups have no gate, and derivatives of 0.

    Args:
        model: The network, on any device; batches are moved there.
        coupling: Places of the gates and owners of the weights.
        batches: Calibration batches, taken one at a time; not touched where `needs` holds weight statistics only, and
            gone through several times for `sharpness`.
        loss_fn: Mean loss of a batch over its samples, each sample's loss depending on that sample alone.
        needs: What to collect.
        seed: Seeds label draws, Hutchinson probes and whatever is random in the model.
        diagonal_probes: Rademacher probes per sample for the Hessian diagonal. Exact where there are no more units;
            else the variance at unit u is the mean over samples n of Σ_{v≠u} H_n[u,v]², over (samples · probes).
        progress: Reports batches done.
        place: Which process this is, of those that share the batches out; all return the same, as one process does,
            but for the order in which moments of layers are summed up.

    Raises:
        BadInput: The batches, the loss or a gradient are unusable, or the model ran differently from its capture.
    """
    _check(needs, diagonal_probes)
    weights = place.share(weight_statistics(model, coupling, needs))[0]
    rows = _Rows()
    if needs & (_PASSES | {"sharpness"}):
        gates = Gates(coupling, *device_and_dtype(model))
        if "sharpness" in needs and isinstance(batches, Iterator):
            batches = list(batches)  # it gives its batches once only
        rows = _run_all(_Source(model, gates, loss_fn, batches, seed, diagonal_probes, progress, place), needs, weights)
    return GateStatistics(
        unit_count=coupling.unit_count,
        seed=seed,
        batch_sizes=tuple(rows.sizes),
        gradient_BU=rows.stacked("gradient"),
        sample_gradient_NU=rows.concatenated("sample_gradient"),
        fisher_gradient_NU=rows.concatenated("fisher_gradient"),
        hessian_ones_BU=rows.stacked("hessian_ones"),
        hessian_diagonal_U=rows.averaged("hessian_diagonal"),
        weight_norm_U=weights.get("weight_norm"),
        bn_scale_U=weights.get("bn_scale"),
        group_U=weights.get("group") if "group" in needs else None,
        summed_U=weights.get("summed"),
        read_norm_U=weights.get("read_norm") if "read_norm" in needs else None,
        sharpness_U=rows.sharpness_U,
        layer_inputs_L=rows.layer_inputs_L,
        layer_gradients_L=rows.layer_gradients_L,
    )


# One batch ------------------------------------------------------------------------------------------------------------


def _check(needs: frozenset[Need], diagonal_probes: int) -> None:
    if unknown := sorted(needs - set(get_args(Need))):
        raise BadInput(f"no gate statistic is called {unknown[0]!r}; choose from {', '.join(get_args(Need))}")
    if diagonal_probes < 1:
        raise BadInput(f"diagonal_probes is {diagonal_probes}; the Hessian diagonal takes at least 1")


@dataclass(frozen=True, eq=False)
class _Run:
    """One calibration batch on the model's device, and which one it is."""

    model: nn.Module
    gates: Gates
    loss_fn: LossFn
    batch: Batch
    turn: Turn
    seed: int

    @property
    def number(self) -> int:
        return self.turn.number


_Found = TypeVar("_Found")


@dataclass(frozen=True, eq=False)
class _Source:
    """Where runs come from, and how random numbers are drawn for them."""

    model: nn.Module
    gates: Gates
    loss_fn: LossFn
    batches: Iterable[Batch]
    seed: int
    diagonal_probes: int
    progress: Progress | None
    place: Place

    def gather(self, found: Callable[[_Run], _Found], number_of_pass: int, passes: int) -> list[_Found]:
        """Go through all batches once, counting passes from 0."""
        total = len(self.batches) if isinstance(self.batches, Sized) else 0

        def found_in(turn: Turn) -> _Found:
            batch = on_device(turn.batch, self.gates.device)
            result = found(_Run(self.model, self.gates, self.loss_fn, batch, turn, self.seed))
            if self.progress is not None:
                self.progress(number_of_pass * total + turn.number, passes * total)
            return result

        return gather(found_in, turns(self.batches, self.place), self.place)


@dataclass(frozen=True)
class _Rows:
    """Statistics of all batches, a size and a dict of arrays each."""

    found: Sequence[tuple[int, dict[Need, np.ndarray]]] = ()
    layer_inputs_L: tuple[LayerMoments, ...] | None = None
    layer_gradients_L: tuple[np.ndarray, ...] | None = None
    sharpness_U: np.ndarray | None = None

    @property
    def sizes(self) -> list[int]:
        return [size for size, _ in self.found]

    def rows(self, name: Need) -> list[np.ndarray]:
        return [by_name[name] for _, by_name in self.found if name in by_name]

    def stacked(self, name: Need) -> np.ndarray | None:
        return np.stack(rows) if (rows := self.rows(name)) else None

    def concatenated(self, name: Need) -> np.ndarray | None:
        return np.concatenate(rows) if (rows := self.rows(name)) else None

    def averaged(self, name: Need) -> np.ndarray | None:
        return np.average(rows, axis=0, weights=self.sizes) if (rows := self.rows(name)) else None


def _run_all(source: _Source, needs: frozenset[Need], weights: Mapping[str, np.ndarray]) -> _Rows:
    """Make all passes over the batches."""
    with only_gates_differentiable(source.model, source.gates, source.seed):
        rows = _first_pass(source, needs)
        if "sharpness" in needs:
            rows = replace(rows, sharpness_U=_sharpness(source, weights["group"], weights["read_norm"]))
    return rows


def _first_pass(source: _Source, needs: frozenset[Need]) -> _Rows:
    """Go through all batches once; all statistics but `sharpness` come from it."""
    watch = LayerWatch("layer_inputs" in needs, "layer_gradients" in needs) if needs & _LAYERS else None
    source.gates.watch = watch

    def found_in(run: _Run) -> tuple[int, dict[Need, np.ndarray]]:
        if watch is not None:
            watch.first_sample = run.turn.first_sample
        with _computing(run, needs):
            parts = _parts(run) if watch is None and needs & _SECOND_ORDER else [run]
            draw = run.turn.draw(run.seed)
            found = _joined([(part, _statistics(part, needs, draw, source.diagonal_probes)) for part in parts])
        for name, values in found.items():
            _require_finite(run, values, name)
        if watch is not None and not run.turn.counts:
            watch.forget()
        return sample_count(run.batch), {name: values.cpu().numpy() for name, values in found.items()}

    try:
        found = source.gather(found_in, 0, 1 + POWER_STEPS * ("sharpness" in needs))
    finally:
        source.gates.watch = None
    if not found:
        raise BadInput("there is no calibration batch; pass at least one")
    if watch is None:
        return _Rows(found)
    if source.place.count > 1:
        watch.merge(source.place, (len(found) - 1) % source.place.count)
    inputs = watch.input_moments() if watch.inputs else None
    return _Rows(found, inputs, watch.gradient_moments() if watch.gradients else None)


@contextmanager
def _computing(run: _Run, needs: frozenset[Need]) -> Iterator[None]:
    """Compute with the batch's own random numbers; turn what PyTorch says of it into a refusal."""
    if isinstance(run.loss_fn, SampledLabelLoss):
        run.loss_fn.seek(run.turn.first_sample)
    try:
        # Whoever makes the batches draws as if nothing was computed between them.
        with torch.random.fork_rng([run.gates.device] if run.gates.device.type == "cuda" else []):
            torch.manual_seed(run.turn.seed(run.seed))
            yield
    except RuntimeError as error:
        second = needs & (_SECOND_ORDER | {"sharpness"})
        remedy = "choose a first-order criterion" if second else "try a smaller batch or another loss_fn"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"calibration batch {run.number} cannot be differentiated: {reason}; {remedy}") from error


def _loss(run: _Run, *, multiply: bool, backward: bool = True) -> Tensor:
    """Run the model forward, with real gates or with probes."""
    run.gates.begin(sample_count(run.batch), multiply=multiply)
    # Fused attention kernels can be differentiated only once.
    attention = sdpa_kernel(SDPBackend.MATH) if multiply else nullcontext()
    with run.gates, attention, torch.set_grad_enabled(backward):
        loss = run.loss_fn(run.model, run.batch)
    run.gates.require_placed()
    _require_loss(run, loss, backward=backward)
    return loss


def _parts(run: _Run) -> list[_Run]:
    """Split a batch in two, so that going backward twice takes no more memory than a training step of the whole.

    Only where the loss is known to be a mean over samples that splits so; a user's own may read a batch in any way.
    """
    if not (run.loss_fn is classification_loss or isinstance(run.loss_fn, SampledLabelLoss)):
        return [run]
    samples = sample_count(run.batch)
    middle = -(-samples // 2)

    def part(half: slice) -> Batch:
        return tree_map(lambda leaf: leaf[half] if isinstance(leaf, Tensor) else leaf, run.batch)

    return [replace(run, batch=part(half)) for half in (slice(0, middle), slice(middle, samples))[:samples]]


def _joined(parts: Sequence[tuple[_Run, dict[Need, Tensor]]]) -> dict[Need, Tensor]:
    """Join the statistics of the parts of a batch: rows of samples one after the other, means by their numbers."""
    if len(parts) == 1:
        return parts[0][1]
    sizes = torch.tensor([sample_count(part.batch) for part, _ in parts], dtype=torch.float64)
    joined: dict[Need, Tensor] = {}
    for name in parts[0][1]:
        values = [found[name] for _, found in parts]
        if name in ("sample_gradient", "fisher_gradient"):
            joined[name] = torch.cat(values)
        else:
            joined[name] = torch.einsum("p,pu->u", (sizes / sizes.sum()).to(values[0].device), torch.stack(values))
    return joined


def _statistics(run: _Run, needs: frozenset[Need], draw: torch.Generator, diagonal_probes: int) -> dict[Need, Tensor]:
    """Compute one batch's statistics from one forward pass; backward passes are shared too."""
    second = bool(needs & _SECOND_ORDER)
    loss = _loss(run, multiply=second, backward=bool(needs & (_PASSES - {"layer_inputs"})))
    found: dict[Need, Tensor] = {}
    if needs & _BACKWARD:
        with nullcontext() if run.gates.watch is None else run.gates.watch.counting():
            gradient_NU = run.gates.gradient(loss, keep_graph="fisher_gradient" in needs, differentiable=second)
        found["gradient"] = gradient_NU.detach().double().mean(0)
        found["sample_gradient"] = gradient_NU.detach()
    if "hessian_ones" in needs:
        ones_NU = torch.ones_like(gradient_NU)
        found["hessian_ones"] = run.gates.hessian_product(gradient_NU, ones_NU).double().mean(0)
    if "hessian_diagonal" in needs:
        found["hessian_diagonal"] = hessian_diagonal(run.gates, gradient_NU, diagonal_probes)
    if "fisher_gradient" in needs:
        drawn = drawn_label_loss(logits_of(run.gates.output), draw)
        found["fisher_gradient"] = run.gates.gradient(drawn, keep_graph=False, differentiable=False)
    return {name: values for name, values in found.items() if name in needs}


def _sharpness(source: _Source, group_U: np.ndarray, norm_U: np.ndarray) -> np.ndarray:
    """Compute the largest absolute eigenvalue of each group by `sharpness`, with one pass for each product."""
    passes = count(1)

    def product(vector_U: np.ndarray) -> np.ndarray:
        def found_in(run: _Run) -> tuple[int, np.ndarray]:
            total_U = np.zeros(len(vector_U))
            draw = run.turn.draw(run.seed, per_sample=len(np.unique(group_U)))
            with _computing(run, frozenset({"sharpness"})):
                for part in _parts(run):
                    gradient_NU = run.gates.gradient(_loss(part, multiply=True), keep_graph=False, differentiable=True)
                    multiply = partial(run.gates.hessian_product, gradient_NU)
                    rows_NU = groupwise_product(multiply, vector_U, group_U, gradient_NU, draw, source.diagonal_probes)
                    _require_finite(run, rows_NU, "sharpness")
                    total_U += rows_NU.double().sum(0).cpu().numpy()
            return sample_count(run.batch), total_U

        found = source.gather(found_in, next(passes), 1 + POWER_STEPS)
        return sum((rows_U for _, rows_U in found), np.zeros(len(vector_U))) / sum(samples for samples, _ in found)

    return sharpness(product, group_U, norm_U)


def _require_loss(run: _Run, loss: Tensor, *, backward: bool) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise BadInput(f"loss_fn returned {kind}; it must return a scalar tensor, the mean over the batch")
    if not torch.isfinite(loss.detach()).all():
        raise BadInput(
            f"the loss of calibration batch {run.number} is {loss.item()}; check the weights and the images for NaN"
            " and infinity"
        )
    if backward and not loss.requires_grad:
        raise BadInput(
            f"the loss of calibration batch {run.number} does not depend on any gate; let the model run with gradients"
        )


def _require_finite(run: _Run, values: Tensor, name: Need) -> None:
    if torch.isfinite(values).all():
        return
    unit = int(torch.isfinite(values).reshape(-1, values.shape[-1]).all(0).logical_not().nonzero()[0])
    raise BadInput(
        f"the {name.replace('_', ' ')} of calibration batch {run.number} is not finite at the input of"
        f" {run.gates.reader_of(unit)}; check the weights and the images, or use float32"
    )
