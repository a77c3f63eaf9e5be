"""Share calibration batches out over processes: all batches → this process's turns → the results of all.

Process r of n takes batches r, r + n, …, of the same boundaries as one process has, and everybody gets all results in
the order of the batches. The decision that is not obvious: what is random follows from the place of a batch among all
of them, never from what this process did before, so that the results do not depend on the number of processes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from archscan.errors import BadInput
from archscan.processes import Place

ALONE = Place(torch.device("cpu"))
"""The one process of a run without ``torchrun``."""

_STRIDE = 0x9E3779B97F4A7C15  # odd, so that no two batches share a seed
_Found = TypeVar("_Found")


@dataclass(frozen=True, eq=False)
class Turn:
    """One batch of this process.

    Attributes:
        batch: The batch.
        number: Its number among all batches, from 1.
        first_sample: How many samples are in the batches before it.
        counts: False where another process does this batch, and this one follows only to learn of the network's layers.
    """

    batch: Any
    number: int
    first_sample: int
    counts: bool = True

    def seed(self, seed: int) -> int:
        """Give the batch a seed of its own, the first batch that of the run."""
        return (seed + (self.number - 1) * _STRIDE) % (1 << 63)

    def draw(self, seed: int, per_sample: int = 1) -> torch.Generator:
        """Give a generator that has drawn so many float64 numbers for each sample of the batches before."""
        generator = torch.Generator().manual_seed(seed)
        torch.rand(self.first_sample, per_sample, dtype=torch.float64, generator=generator)
        return generator


def turns(batches: Iterable[Any], place: Place) -> Iterator[Turn]:
    """Go through all batches and give this process's; the first one, not to be counted, where it has none.

    Raises:
        BadInput: A batch has no samples.
    """
    total, first_sample, spare = 0, 0, None
    for total, batch in enumerate(batches, start=1):
        samples = sample_count(batch)
        turn = Turn(batch, total, first_sample)
        if (total - 1) % place.count == place.rank:
            spare = None
            yield turn
        elif total == 1:
            spare = replace(turn, counts=False)
        first_sample += samples
    if spare is not None and total <= place.rank:
        yield spare


def gather(found: Callable[[Turn], _Found], own: Iterable[Turn], place: Place) -> list[_Found]:
    """Do this process's turns and give what all processes found, in the order of the batches.

    Raises:
        BadInput: A batch was refused, here or elsewhere: the first one of them, in all processes alike.
    """
    results: list[_Found] = []
    refused: BadInput | None = None
    try:
        for turn in own:
            result = found(turn)
            if turn.counts:
                results.append(result)
    except BadInput as error:
        refused = error
    shares = place.share((results, refused))
    failures = [(len(done) * place.count + rank, error) for rank, (done, error) in enumerate(shares) if error]
    if failures:
        raise min(failures, key=lambda failure: failure[0])[1]
    return [done[step] for step in range(len(shares[0][0])) for done, _ in shares if step < len(done)]


def sample_count(batch: Any, kind: str = "calibration") -> int:
    """Count samples: the leading size of the batch's first tensor.

    Args:
        batch: Tensors in tuples and dicts.
        kind: What a refusal calls the batch.

    Raises:
        BadInput: It has none.
    """
    for leaf in tree_flatten(batch)[0]:
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf):
            return len(leaf)
    raise BadInput(f"a {kind} batch holds no tensor with samples on its leading axis; pass tuples or dicts of tensors")


def on_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch, or of an example input."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)
