"""What layers read from each unit on the calibration images: model, coupling, batches → `Activations`, in one pass.

At every place of a gate: least and largest value of each unit over all images and positions; at some positions of each
image, sums for the covariance of each group's units at the first place that reads all of them, and random projections
of each unit's centred values, by which units that say the same are told (Johnson and Lindenstrauss 1984). Sums are
float64.

Shape suffixes: U units, P units of one group, N samples, J positions, K projections.

The decision that is not obvious: positions are taken on a grid that shifts from sample to sample, `POSITIONS` of each
image, and signs of projections follow from the sample's number, so that nothing depends on the split into batches or
on the number of processes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from archscan.capture import ContractionMode, train_mode
from archscan.errors import BadInput
from archscan.gates import Progress
from archscan.groups import Consumer, Coupling
from archscan.losses import Batch, LossFn, SampledLabelLoss
from archscan.probes import device_and_dtype
from archscan.processes import Place
from archscan.sharding import ALONE, Turn, gather, on_device, sample_count, turns

POSITIONS = 16
"""Positions of each image that covariances and projections look at."""

PROJECTIONS = 16

WIDEST = 4096
"""Wider groups get no covariance, which takes 8 bytes times the square of their width."""

SAME = 1e-7
"""One minus the correlation, below which two units are called the same; rounding in float32 leaves some 1e-12."""


@dataclass(frozen=True, eq=False)
class Activations:
    """What was read from each unit.

    Attributes:
        samples: Images seen.
        least_U: Least value anywhere, over all places that read the unit; +inf where none does.
        largest_U: Largest one; -inf where none does.
        constant_U: Whether each place reads one value only; places may differ.
        covariance_by_group: Group number → covariance [P, P] of its units at one place, in the order of their numbers.
        twins_by_group: Group number → sets of units (numbers) of which each is an affine function of the others at
            every place.
    """

    samples: int
    least_U: np.ndarray
    largest_U: np.ndarray
    constant_U: np.ndarray
    covariance_by_group: dict[int, np.ndarray]
    twins_by_group: dict[int, tuple[tuple[int, ...], ...]]

    @property
    def silent_U(self) -> np.ndarray:
        """Which units were 0 everywhere, on every image; boolean."""
        return (self.least_U == 0) & (self.largest_U == 0)


@lru_cache(maxsize=64)
def _grid(count: int, first_sample: int, samples: int, rows: int) -> tuple[Tensor, Tensor]:
    """Pick positions [rows, J] of `count`, and draw signs [rows · J, K] for them, by the numbers of the samples."""
    wanted = min(count, POSITIONS)
    spaced = torch.arange(wanted) * count // wanted
    frames = rows // samples
    columns, signs = [], []
    for row in range(rows):
        columns.append((7 * (first_sample + row // frames) + spaced) % count)
        generator = torch.Generator().manual_seed(first_sample * frames + row)
        signs.append(torch.randint(2, (wanted, PROJECTIONS), generator=generator))
    return torch.stack(columns), 2.0 * torch.cat(signs).double() - 1.0


class _PlaceSums:
    """Sums over what one place reads of one group, on the model's device.

    Args:
        group: Number of the group.
        units_P: The units that it reads.
        channels_PE: The channels of each unit, several where positions were flattened into channels.
        with_gram: Whether to sum up for a covariance.
        device: Of the sums.
    """

    def __init__(
        self, group: int, units_P: np.ndarray, channels_PE: np.ndarray, with_gram: bool, device: torch.device
    ) -> None:
        self.group, self.units_P = group, units_P
        self.order = torch.from_numpy(channels_PE.reshape(-1)).to(device)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        size = len(units_P)
        self.low_P, self.high_P = zeros(size) + torch.inf, zeros(size) - torch.inf
        self.total_P, self.active_P = zeros(size), zeros(size)
        self.projected_PK, self.signs_K = zeros(size, PROJECTIONS), zeros(PROJECTIONS)
        self.gram_PP = zeros(size, size) if with_gram else None
        self.rows = zeros(1)

    def add(self, values_NCJ: Tensor, first_sample: int, samples: int) -> None:
        """Add what one batch gives the place to read."""
        values = values_NCJ[:, self.order].reshape(len(values_NCJ), len(self.units_P), -1)
        self.low_P = torch.minimum(self.low_P, values.amin((0, 2)).double())
        self.high_P = torch.maximum(self.high_P, values.amax((0, 2)).double())
        columns, signs = _grid(values.shape[2], first_sample, samples, len(values))
        index = columns[:, None].expand(-1, values.shape[1], -1).to(values.device)
        picked = values.gather(2, index).transpose(0, 1).flatten(1).double()
        signs = signs.to(picked.device)
        self.total_P += picked.sum(1)
        self.active_P += (picked != 0).sum(1)
        self.projected_PK += picked @ signs
        self.signs_K += signs.sum(0)
        self.rows += picked.shape[1]
        if self.gram_PP is not None:
            self.gram_PP += picked @ picked.T

    def merge(self, place: Place) -> None:
        """Add up what all processes saw."""
        sums = (self.total_P, self.active_P, self.projected_PK, self.signs_K, self.gram_PP, self.rows)
        for values in sums:
            if values is not None:
                place.sum(values)
        ends = place.share((self.low_P.cpu(), self.high_P.cpu()))
        device = self.low_P.device
        self.low_P = torch.stack([low for low, _ in ends]).amin(0).to(device)
        self.high_P = torch.stack([high for _, high in ends]).amax(0).to(device)

    def same_PP(self) -> np.ndarray:
        """Say of each pair of units whether one is an affine function of the other here; two constants are."""
        mean_P = self.total_P / self.rows
        directions_PK = nn.functional.normalize(self.projected_PK - mean_P[:, None] * self.signs_K, dim=1)
        known_P = self.active_P >= 2 * PROJECTIONS
        same_PP = (directions_PK @ directions_PK.T).abs() > 1 - SAME
        constant_P = self.low_P == self.high_P
        same_PP &= known_P[:, None] & known_P & ~constant_P[:, None] & ~constant_P
        return np.asarray((same_PP | (constant_P[:, None] & constant_P)).cpu().numpy())

    def covariance_PP(self) -> np.ndarray:
        """Give the covariance of the units over the positions that were picked."""
        assert self.gram_PP is not None
        mean_P = self.total_P / self.rows
        return np.asarray((self.gram_PP / self.rows - mean_P[:, None] * mean_P).cpu().numpy())


_Places = dict[int, list[tuple[Consumer, list[_PlaceSums]]]]
"""Contraction → its places, and their sums by group."""


class _Observer(ContractionMode):
    """Hands what each place reads to its sums, while the model runs inside this mode."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places = places
        self.running, self.first_sample, self.samples = False, 0, 1

    def enter_model(self, _module: nn.Module, _args: Any) -> None:
        """Number contractions from 0."""
        self.running, self.count = True, 0

    def leave_model(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Stop looking."""
        self.running = False

    def on_contraction(
        self, number: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Look at the operands and run the contraction."""
        for consumer, listed in self.places.get(number, ()) if self.running else ():
            data = args[consumer.operand] if consumer.operand < len(args) else None
            if not isinstance(data, Tensor) or data.shape[consumer.axis] != len(consumer.units):
                raise BadInput(
                    f"the input of {consumer.module or 'the model'} is not what capture saw; capture the model as it is"
                    " run"
                )
            values = data.detach().movedim(consumer.axis, 1)
            for sums in listed:
                sums.add(values.reshape(*values.shape[:2], -1), self.first_sample, self.samples)
        return func(*args, **kwargs)


def observe(
    model: nn.Module,
    coupling: Coupling,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    *,
    progress: Progress | None = None,
    place: Place = ALONE,
) -> Activations:
    """Run the calibration batches once, without gradients, and look at what layers read; nothing is changed.

    Args:
        model: The network, run in eval mode; batches are moved to its device.
        coupling: Places of the gates. Units of frozen groups are not looked at.
        batches: Calibration batches.
        loss_fn: What runs the model on a batch; its value is not used.
        progress: Reports batches done.
        place: Which process this is, of those that share the batches out.

    Raises:
        BadInput: There is no batch, or the model ran differently from its capture.
    """
    device, _ = device_and_dtype(model)
    places = _places(coupling, device)
    observer = _Observer(places)
    total = len(batches) if isinstance(batches, Sized) else 0

    def look(turn: Turn) -> int:
        batch = on_device(turn.batch, device)
        observer.first_sample, observer.samples = turn.first_sample, sample_count(batch)
        if isinstance(loss_fn, SampledLabelLoss):
            loss_fn.seek(turn.first_sample)
        with observer:
            loss_fn(model, batch)
        if progress is not None:
            progress(turn.number, total)
        return observer.samples

    hooks = (
        model.register_forward_pre_hook(observer.enter_model),
        model.register_forward_hook(observer.leave_model, always_call=True),
    )
    try:
        with train_mode(model, False), torch.no_grad():
            own = (turn for turn in turns(batches, place) if turn.counts)
            samples = sum(gather(look, own, place))
    finally:
        for hook in hooks:
            hook.remove()
    if not samples:
        raise BadInput("there is no calibration batch; pass at least one")
    found = [sums for readers in places.values() for _, listed in readers for sums in listed]
    if place.count > 1:
        for sums in found:
            sums.merge(place)
    return _summarised(coupling, found, samples)


def _places(coupling: Coupling, device: torch.device) -> _Places:
    """Prepare sums for every place, by group; the first place that reads all of a group gets its covariance."""
    group_of_unit = np.full(coupling.unit_count + 1, -1)
    for number, group in enumerate(coupling.groups):
        if group.frozen is None:
            group_of_unit[np.array(group.units)] = number
    places: _Places = {}
    with_gram: set[int] = set()
    for consumer in coupling.consumers:
        group_of_channel = group_of_unit[consumer.units]
        listed = []
        for number in np.unique(group_of_channel[group_of_channel >= 0]).tolist():
            channels = np.flatnonzero(group_of_channel == number)
            for units_P, channels_PE in _by_unit(consumer.units[channels], channels):
                width = sum(map(len, coupling.groups[number].units))
                first = number not in with_gram and len(units_P) == width <= WIDEST
                with_gram |= {number} if first else set()
                listed.append(_PlaceSums(number, units_P, channels_PE, first, device))
        if listed:
            places.setdefault(consumer.contraction, []).append((consumer, listed))
    return places


def _by_unit(units_C: np.ndarray, channels_C: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Give units [P] and their channels [P, E], one pair for each number of channels that units have."""
    units_P, counts_P = np.unique(units_C, return_counts=True)
    order = channels_C[np.argsort(units_C, kind="stable")]
    starts_P = np.cumsum(counts_P) - counts_P
    for count in np.unique(counts_P).tolist():
        own = counts_P == count
        yield units_P[own], order[starts_P[own][:, None] + np.arange(count)]


def _summarised(coupling: Coupling, found: Sequence[_PlaceSums], samples: int) -> Activations:
    """Put together what all places saw of each unit."""
    least_U, largest_U = np.full(coupling.unit_count, np.inf), np.full(coupling.unit_count, -np.inf)
    constant_U = np.zeros(coupling.unit_count, dtype=bool)
    for sums in found:
        constant_U[sums.units_P] = True
    for sums in found:
        low_P, high_P = sums.low_P.cpu().numpy(), sums.high_P.cpu().numpy()
        least_U[sums.units_P] = np.minimum(least_U[sums.units_P], low_P)
        largest_U[sums.units_P] = np.maximum(largest_U[sums.units_P], high_P)
        constant_U[sums.units_P] &= low_P == high_P
    by_group: dict[int, list[_PlaceSums]] = {}
    for sums in found:
        by_group.setdefault(sums.group, []).append(sums)
    covariances = {sums.group: sums.covariance_PP() for sums in found if sums.gram_PP is not None}
    twins = {number: _twins(listed, constant_U) for number, listed in by_group.items()}
    return Activations(
        samples, least_U, largest_U, constant_U, covariances, {number: sets for number, sets in twins.items() if sets}
    )


def _twins(listed: Sequence[_PlaceSums], constant_U: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Find sets of units of a group that say the same wherever one of them is read."""
    units = np.unique(np.concatenate([sums.units_P for sums in listed]))
    same = ~(constant_U[units][:, None] | constant_U[units])
    for sums in listed:
        own = np.isin(units, sums.units_P)
        here = np.equal.outer(~own, ~own) & ~own[:, None]
        here[np.ix_(own, own)] = sums.same_PP()
        same &= here
    _, label = connected_components(coo_array(same), directed=False)
    sets = (units[label == number] for number in np.flatnonzero(np.bincount(label) > 1))
    return tuple(tuple(members.tolist()) for members in sets)
