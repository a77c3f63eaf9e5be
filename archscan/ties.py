"""Make groups of one width: coupling, names of channel groups → a coupling in which they lose channels together.

A forward that reads one number for two widths (the channels of a split and of its reshaped attention) can follow if
both change by the same fraction. Units and their numbers stay; only the way in which they are grouped changes.

The decision that is not obvious: fibres of different lengths are folded to their greatest common divisor first, so that
one step of the joint group is the same fraction of each width: 160 channels and 5 heads of 32 become ten fibres of 32.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from archscan.errors import BadInput
from archscan.groups import ChannelGroup, Coupling
from archscan.sizes import Size, SizeOfValue


@dataclass(frozen=True, eq=False)
class _Renumbered:
    """Sizes in terms of other groups.

    Attributes:
        sizes: In terms of the old ones.
        moves: Old group number → the new one, and how many old steps make one new step.
    """

    sizes: SizeOfValue
    moves: Mapping[int, tuple[int, int]]

    def __call__(self, value: int) -> tuple[Size, ...]:
        """Give the size of each axis of value number `value`."""
        return tuple(self.one(size) for size in self.sizes(value))

    def one(self, size: Size) -> Size:
        """Rewrite one size."""
        per_step: Counter[int] = Counter()
        for group, indices in size.per_step.items():
            number, folds = self.moves[group]
            per_step[number] += indices * folds
        return Size(size.constant, dict(per_step))


def can_be_tied(groups: Sequence[ChannelGroup]) -> bool:
    """Say whether groups have a common step, and may change at all."""
    return math.gcd(*(group.steps for group in groups)) > 1 and all(group.frozen is None for group in groups)


def tie(coupling: Coupling, names: Sequence[str]) -> Coupling:
    """Return a coupling in which the named groups are one, called as the first of them; the given one is unchanged.

    Raises:
        BadInput: A name is no group's, or the groups cannot be tied.
    """
    chosen = [group for group in coupling.groups if group.name in set(names)]
    if len(chosen) < max(2, len(set(names))) or not can_be_tied(chosen):
        raise BadInput(f"{', '.join(names)} cannot keep one width: name two or more groups that share a common step")
    steps = math.gcd(*(group.steps for group in chosen))
    joint = ChannelGroup(
        name=chosen[0].name,
        units=tuple(row for group in chosen for fibre in group.units for row in _folded(fibre, steps)),
        channels_per_step=min(group.channels_per_step * group.steps // steps for group in chosen),
        members=tuple(dict.fromkeys(member for group in chosen for member in group.members)),
        frozen=None,
        summed=any(group.summed for group in chosen),
    )
    groups = [joint if group is chosen[0] else group for group in coupling.groups if group not in chosen[1:]]
    number = {group.name: index for index, group in enumerate(groups)}
    tied = {group.name for group in chosen}
    moves = {
        index: (number[joint.name], group.steps // steps) if group.name in tied else (number[group.name], 1)
        for index, group in enumerate(coupling.groups)
    }
    sizes = None if coupling.sizes is None else _renumbered(coupling.sizes, moves)
    rewrite = _Renumbered(lambda _: (), moves).one
    parameters = {path: tuple(rewrite(size) for size in axes) for path, axes in coupling.parameters.items()}
    return replace(coupling, groups=tuple(groups), sizes=sizes, parameters=parameters)


def _renumbered(sizes: SizeOfValue, moves: Mapping[int, tuple[int, int]]) -> _Renumbered:
    """Rewrite sizes in terms of other groups, once also where they were rewritten before."""
    if not isinstance(sizes, _Renumbered):
        return _Renumbered(sizes, moves)
    joint = {group: (moves[number][0], folds * moves[number][1]) for group, (number, folds) in sizes.moves.items()}
    return _Renumbered(sizes.sizes, joint)


def _folded(fibre: Sequence[int], steps: int) -> list[tuple[int, ...]]:
    return [tuple(fibre[start : start + steps]) for start in range(0, len(fibre), steps)]
