"""The state that coupling rules share: labels handed out, united, frozen, and counted.

A label is a positive integer, one per index of one axis of one parameter or buffer (or of a padding). Rules only
*record*: pairs that are one unit, labels that must stay with the reason, grids whose rows must keep equal counts.
`groups` reads the record once, at the end.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from archscan.coupling import planes

Planes = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class TensorAxis:
    """Labels of one axis of a parameter or buffer; 2-D where they depend on axis 0 (grouped convolution)."""

    tensor: str
    axis: int
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Read:
    """A contraction of an activation with a weight.

    Attributes:
        contraction: Its running number.
        operand: Position of the activation among the arguments of the Python-level call.
        axis: The axis of the activation that is summed over, counted from the end.
        labels: Labels along that axis.
        passed_to: Where a grouped convolution hands each channel on within its own group, the label of one output of
            that group; 0 elsewhere.
        weight: Path of the weight; empty where it is computed.
        module: Path of the module in whose forward the call is.
    """

    contraction: int
    operand: int
    axis: int
    labels: Tensor
    passed_to: Tensor
    weight: str
    module: str


@dataclass(frozen=True, eq=False)
class Grid:
    """Labels of which every row must keep the same number.

    Attributes:
        labels: The labels; rows run along the last axis.
        where: Place, for a reason.
        rows_may_go: Whether rows may go as a whole too, as heads may where channels were unfolded into [head, place];
            what is left must then be a grid again, of rows along the last axis but one.
        in_step: Whether rows must lose the same places, unless they go as a whole.
        partner: Rows that go with these where either go as a whole: the outputs of a grouped convolution.
    """

    labels: Tensor
    where: str
    rows_may_go: bool = False
    in_step: bool = False
    partner: Tensor | None = None


@dataclass(frozen=True, eq=False)
class WholeRows:
    """Rows of channels, such as the heads of an attention, that go as a whole if that leaves any to choose from.

    Attributes:
        rows: Matrices of labels; the k-th rows of all of them are one unit, if rows go as a whole.
        stays: Labels that stay as they are then: places that all rows share.
        otherwise_stays: Labels that stay as they are if rows do not go as a whole.
        otherwise_united: Labels that are united place by place in that case.
        where: Place, for a reason.
    """

    rows: tuple[Tensor, ...]
    stays: tuple[Tensor, ...]
    otherwise_stays: tuple[Tensor, ...]
    otherwise_united: tuple[tuple[Tensor, Tensor], ...]
    where: str


@dataclass(frozen=True, eq=False)
class Mixing:
    """Labels over which statistics are taken at one place.

    Attributes:
        labels: One row of labels for each statistic.
        if_written: Whether it counts only where a layer writes these labels. The norm of a weight over what it *reads*
            is the same whether a slice is zero or gone.
    """

    labels: Tensor
    if_written: bool


@dataclass
class Record:
    """What the rules found, for `groups` to read."""

    next_label: int = 1
    axes: dict[tuple[str, int], TensorAxis] = field(default_factory=dict)
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    whole_rows: list[WholeRows] = field(default_factory=list)
    mixing: dict[str, list[Mixing]] = field(default_factory=dict)
    written: list[Tensor] = field(default_factory=list)
    consumed: list[Tensor] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    _marks: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    _marked: int = 0

    def written_marks(self) -> Tensor:
        """Mark the labels that a layer writes; a bool for each label. Each vector of them is looked at once."""
        if len(self._marks) < self.next_label:
            self._marks = torch.cat([self._marks, torch.zeros(self.next_label, dtype=torch.bool)])  # room for more
        for labels in self.written[self._marked :]:
            self._marks[labels] = True
        self._marked = len(self.written)
        return self._marks

    def fresh(self, count: int) -> Tensor:
        """Hand out `count` new labels."""
        labels = torch.arange(self.next_label, self.next_label + count)
        self.next_label += count
        return labels

    def unite(self, left: Tensor, right: Tensor) -> None:
        """Record that labels at the same place are one unit; a label that meets 0 is left as it is."""
        if left is right:
            return
        axes = sorted({*planes.varying(left), *planes.varying(right)})
        left, right = torch.broadcast_tensors(planes.compress(left, axes), planes.compress(right, axes))
        self.pairs.append((left.reshape(-1), right.reshape(-1)))

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Record that these labels must stay, and why."""
        self.frozen.append((planes.compress(labels).reshape(-1), reason))

    def balance(self, grid: Tensor, where: str, rows_may_go: bool = False) -> None:
        """Record that every row of a grid of labels, along its last axis, must keep the same number; see `Grid`."""
        if grid.numel() > grid.shape[-1]:
            self.grids.append(Grid(grid, where, rows_may_go))

    def balance_groups(self, inner: Tensor, outer: Tensor, where: str) -> None:
        """Record that groups must keep equal numbers of inputs, and of outputs, or go as a whole."""
        self.grids += [Grid(inner, where, rows_may_go=True, partner=outer), Grid(outer, where, rows_may_go=True)]

    def keep_in_step(self, grid: Tensor, where: str) -> None:
        """Record that every row of a grid of labels must lose the same places, or go as a whole."""
        self.grids.append(Grid(grid, where, rows_may_go=True, in_step=True))

    def mix(self, place: str, plane: Tensor, axes: Iterable[int], *, if_written: bool = False) -> None:
        """Record that statistics are taken over these axes: a slim network is not the masked original then."""
        over = sorted(set(planes.varying(plane)) & set(axes))
        if over:
            rest = [axis for axis in planes.varying(plane) if axis not in over]
            labels = planes.matrix(plane, [*rest, *over]).reshape(-1, math.prod(plane.shape[axis] for axis in over))
            self.mixing.setdefault(place, []).append(Mixing(labels, if_written))

    def tensor_planes(self, name: str, shape: Sequence[int], groups: int | None) -> Planes:
        """Label every axis of a parameter or buffer, the same labels whenever it is asked again.

        Args:
            name: Path of the tensor.
            shape: Its size.
            groups: Number of convolution groups where it is a convolution's weight, else None. A convolution's kernel
                axes get no labels, and the labels of its axis 1 depend on the group that axis 0 is in.
        """
        count = groups or 1
        axes = range(len(shape)) if groups is None else range(min(2, len(shape)))
        result = []
        for axis in axes:
            grouped = axis == 1 and count > 1
            if shape[axis] == 1 and not grouped:
                continue
            if (name, axis) not in self.axes:
                if grouped:
                    by_group = self.fresh(count * shape[1]).reshape(count, 1, shape[1])
                    labels = by_group.expand(count, shape[0] // count, shape[1]).reshape(shape[0], shape[1])
                else:
                    labels = self.fresh(shape[axis])
                self.axes[name, axis] = TensorAxis(name, axis, labels)
            labels = self.axes[name, axis].labels
            if grouped:
                result.append(labels.reshape(*labels.shape, *[1] * (len(shape) - 2)).expand(tuple(shape)))
            else:
                result.append(planes.along(labels, shape, axis))
        return tuple(result)
