"""Sizes of tensors as functions of the channel groups' widths: label planes + owners of labels → `Size` per axis."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from archscan.coupling import planes


@dataclass(frozen=True)
class Size:
    """The size of a tensor's axis as a linear function of the groups' widths.

    Attributes:
        constant: Indices that belong to no group.
        per_step: Group number → indices for each kept step of that group.
    """

    constant: int
    per_step: Mapping[int, int]

    def at(self, widths_G: Sequence[int] | np.ndarray) -> int:
        """Evaluate for given widths, in kept steps of each group."""
        return self.constant + sum(per_step * int(widths_G[group]) for group, per_step in self.per_step.items())


@dataclass(frozen=True, eq=False)
class Owners:
    """Who owns each label.

    Attributes:
        group: Group number by label, -1 where a label belongs to no group that may change.
        fibre: Fibre within the group, by label.
        step: Step within the fibre, by label.
        steps: Number of steps of each group.
    """

    group: np.ndarray
    fibre: np.ndarray
    step: np.ndarray
    steps: np.ndarray

    def size(self, labels: Tensor) -> Size:
        """Count the labels of one axis by group.

        A group counts where the axis holds every step of a fibre. An axis that holds the same single step of several
        fibres (the outer axis of an unfolded one) does not change, nor does a group of one step. Nor does, by this
        count, an axis that holds part of a fibre, as the pieces of an uneven split do: its size is no function of the
        widths, and where a plan would change it, the rebuilt network's sizes differ from the predicted ones and the
        group is frozen.
        """
        flat = labels.reshape(-1).numpy()
        group = self.group[flat]
        counts = np.bincount(group[group >= 0], minlength=len(self.steps))
        constant, per_step = int((group < 0).sum()), {}
        for index in np.flatnonzero(counts).tolist():
            steps, mine = int(self.steps[index]), group == index
            present = np.zeros(steps, dtype=bool)
            present[self.step[flat[mine]]] = True
            held = int(present.sum())
            if held == steps > 1 and counts[index] % steps == 0:
                per_step[index] = int(counts[index]) // steps
            else:
                constant += int(counts[index])
        return Size(constant, per_step)


SizeOfValue = Callable[[int], tuple[Size, ...]]
"""Value number of a `Graph` → the size of each axis."""


class ValueSizes:
    """Size of every axis of every value of a recorded run, computed when asked for."""

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], value_planes: Sequence[tuple[Tensor, ...]], owners: Owners
    ) -> None:
        self._shapes = shapes
        self._planes = value_planes
        self._owners = owners
        self._known: dict[tuple[int, ...], Size] = {}
        self._of_value: dict[int, tuple[Size, ...]] = {}

    def __call__(self, value: int) -> tuple[Size, ...]:
        """Give the size of each axis of value number `value`."""
        if value not in self._of_value:
            self._of_value[value] = self._sizes(value)
        return self._of_value[value]

    def _sizes(self, value: int) -> tuple[Size, ...]:
        sizes = [Size(extent, {}) for extent in self._shapes[value]]
        for plane in self._planes[value]:
            for axis in planes.varying(plane):
                size = self._axis(plane, axis)
                if size.per_step:
                    sizes[axis] = size
        return tuple(sizes)

    def _axis(self, plane: Tensor, axis: int) -> Size:
        labels = planes.vector(plane, axis)
        key = (labels.data_ptr(), labels.shape[0], labels.stride(0))
        if key not in self._known:
            self._known[key] = self._owners.size(labels)
        return self._known[key]
