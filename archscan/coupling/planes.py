"""Label planes: which channel every element of a tensor belongs to.

A plane is an int64 tensor of the shape of the value that it describes; 0 means "not a channel". A value carries several
planes where several of its axes are labelled (a convolution's weight: one along O, one along I). Planes are constant
over most axes and stay *expanded* there (stride 0), so a plane of [2, 512, 7, 7] holds 512 numbers. Every function here
keeps that property; the one that could destroy it, reshaping, works on the axes that vary and leaves the others out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


def varying(plane: Tensor) -> tuple[int, ...]:
    """Axes along which the labels may differ."""
    return tuple(axis for axis in range(plane.ndim) if plane.shape[axis] > 1 and plane.stride(axis) != 0)


def compress(plane: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    """Narrow every axis to one index but `axes` (default: those that vary)."""
    keep = varying(plane) if axes is None else axes
    for axis in range(plane.ndim):
        if plane.shape[axis] > 1 and axis not in keep:
            plane = plane.narrow(axis, 0, 1)
    return plane


def settle(plane: Tensor) -> Tensor:
    """Re-expand the axes along which a materialised plane turns out to be constant."""
    shape = plane.shape
    plane = compress(plane)
    for axis in varying(plane):
        first = plane.narrow(axis, 0, 1)
        if bool((plane == first).all()):
            plane = first
    return plane.expand(shape)


def along(labels: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """Lay a vector of labels along one axis of `shape`, constant over the rest."""
    return labels.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))]).expand(tuple(shape))


def vector(plane: Tensor, axis: int) -> Tensor:
    """Read the labels along one axis, at index 0 of all others."""
    axis %= plane.ndim
    for other in reversed(range(plane.ndim)):
        if other != axis:
            plane = plane.select(other, 0)
    return plane


def broadcast(plane: Tensor, shape: Sequence[int]) -> Tensor:
    """Broadcast a plane as PyTorch broadcasts the value it describes."""
    return plane.expand(tuple(shape))


def axis_groups(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Pair the shortest runs of old and new axes that hold the same number of elements.

    A reshape never moves an element from one run to another, so each pair can be looked at alone. Axes of size 1 join
    the run before them.
    """
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [], []
        size_left = size_right = 1
        if i < len(old):
            left.append(i)
            size_left, i = old[i], i + 1
        if j < len(new):
            right.append(j)
            size_right, j = new[j], j + 1
        while size_left != size_right:
            if size_left < size_right:
                left.append(i)
                size_left, i = size_left * old[i], i + 1
            else:
                right.append(j)
                size_right, j = size_right * new[j], j + 1
        while i < len(old) and old[i] == 1 and (j >= len(new) or new[j] != 1):
            left.append(i)
            i += 1
        while j < len(new) and new[j] == 1 and (i >= len(old) or old[i] != 1):
            right.append(j)
            j += 1
        yield left, right


@dataclass(frozen=True, eq=False)
class Reshaped:
    """What a reshape did to one plane.

    Attributes:
        plane: The plane of the new shape.
        merged: Labels over axes that were flattened although several of them vary, those axes only.
        split: Labels over axes that one axis was unfolded into, of which several vary, those axes only.
    """

    plane: Tensor
    merged: tuple[Tensor, ...]
    split: tuple[Tensor, ...]


def _grid(plane: Tensor, axes: Sequence[int]) -> Tensor | None:
    """Labels over those of `axes` that vary, at index 0 of all others; None unless at least two of them vary."""
    varies = [axis for axis in axes if axis in varying(plane)]
    return matrix(plane, varies) if len(varies) > 1 else None


def matrix(plane: Tensor, axes: Sequence[int]) -> Tensor:
    """Labels over the axes given, in their order, at index 0 of all others."""
    small = compress(plane, axes)
    order = [axis for axis in range(plane.ndim) if axis not in axes] + list(axes)
    return small.permute(order)[(0,) * (plane.ndim - len(axes))]


def rows(plane: Tensor, axis: int) -> Tensor:
    """Labels as a matrix [index along an axis, everything else that varies]."""
    others = [other for other in varying(plane) if other != axis]
    return matrix(plane, [axis, *others]).reshape(plane.shape[axis], -1)


def reshape(plane: Tensor, shape: Sequence[int]) -> Reshaped:
    """Reshape a plane, reporting where labelled axes were merged or split."""
    old, new = tuple(plane.shape), tuple(shape)
    if 0 in old:
        return Reshaped(plane.new_zeros(new), (), ())
    varies = set(varying(plane))
    small_old, small_new = list(old), list(new)
    pairs = list(axis_groups(old, new))
    for left, right in pairs:
        if not varies & set(left):
            for axis in left:
                small_old[axis] = 1
            for axis in right:
                small_new[axis] = 1
    small = plane[tuple(slice(0, 1) if size == 1 else slice(None) for size in small_old)]
    result = settle(small.reshape(small_new)).expand(new)
    merged = [_grid(plane, left) for left, right in pairs if len(left) > 1 and left != right]
    split = [_grid(result, right) for left, right in pairs if len(right) > 1]
    return Reshaped(
        result,
        tuple(grid for grid in merged if grid is not None),
        tuple(grid for grid in split if grid is not None),
    )
