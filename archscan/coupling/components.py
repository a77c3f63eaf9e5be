"""From recorded labels to connected components: what is one unit, what is frozen, what must keep equal counts.

The decision that is not obvious: whether the heads of an attention go as a whole cannot be known before everything is
united. So it is tried: first all rows that may go as a whole are units; those of which that leaves nothing to choose
from are taken back, and what they contract stays as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from archscan.coupling.labels import Grid, Mixing, Record, WholeRows

Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Fibres:
    """A grid whose rows keep equal counts: components [row][place], each row of one kind and disjoint from the rest."""

    rows: tuple[tuple[int, ...], ...]
    where: str


@dataclass(frozen=True, eq=False)
class Components:
    """Resolved components: what each is, by component number."""

    of_label: np.ndarray
    signature: np.ndarray
    reason: Mapping[int, str]
    fibres: tuple[Fibres, ...]


def resolve(record: Record) -> Components:
    """Number the units; take back whole rows that leave nothing to choose from."""
    taken_back: set[int] = set()
    while True:
        units = _resolve(record, taken_back)
        through = _passed_through(record, units)
        useless = {number for number, rows in enumerate(record.whole_rows) if not _is_useful(rows, units, through)}
        if useless <= taken_back:
            return units
        taken_back |= useless


def _passed_through(record: Record, units: Components) -> np.ndarray:
    """Mark the components that layers both write and read."""
    return marked(units.of_label, record.written) & marked(units.of_label, record.consumed)


def _is_useful(choice: WholeRows, units: Components, through: np.ndarray) -> bool:
    """Whether some whole rows may go and others stay."""
    found = np.unique(units.of_label[choice.rows[0].numpy()])
    return len(found) > 1 and all(through[c] and c not in units.reason for c in found.tolist())


def _resolve(record: Record, taken_back: set[int]) -> Components:
    """Number the units; tie grids that disagree until those that are left can be planned as fibres."""
    pairs, frozen, grids = list(record.pairs), list(record.frozen), list(record.grids)
    for number, choice in enumerate(record.whole_rows):
        if number in taken_back:
            pairs.extend((left.reshape(-1), right.reshape(-1)) for left, right in choice.otherwise_united)
            frozen.extend((labels, choice.where) for labels in choice.otherwise_stays)
            grids.extend(Grid(labels, choice.where) for labels in choice.rows)
        else:
            joined = torch.cat(choice.rows, dim=1)
            pairs.append(_tied(joined[:, :1], joined))
            frozen.extend((labels, choice.where) for labels in choice.stays)
    count = -1
    while True:
        of_label = _connected(pairs, record.next_label)
        reason = {0: ""} | _frozen_components(record, frozen, of_label)
        reason[int(of_label[0])] = "not a channel"
        signature = _signatures(record, of_label)
        ties, fibres = _constraints(grids, of_label, reason, signature)
        if not ties:
            return Components(of_label, signature, reason, fibres)
        if count == int(of_label.max()):  # tying them changed nothing
            frozen.extend((grid, "its rows could not keep equal counts") for grid in ties)
        count = int(of_label.max())
        pairs.extend(_tied(grid[:1], grid) for grid in ties)


def _tied(first: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return first.expand(labels.shape).reshape(-1), labels.reshape(-1)


def _frozen_components(record: Record, frozen: Sequence[tuple[Tensor, str]], of_label: np.ndarray) -> dict[int, str]:
    reasons: dict[int, str] = {}
    for labels, reason in frozen:
        labels = labels.reshape(-1)
        for component in np.unique(of_label[labels[labels > 0].numpy()]).tolist():
            reasons.setdefault(component, reason)
    written, consumed = marked(of_label, record.written), marked(of_label, record.consumed)
    for component in np.flatnonzero(written != consumed).tolist():
        reasons.setdefault(component, "not read by a later layer" if written[component] else "not written by a layer")
    return reasons


def marked(of_label: np.ndarray, vectors: Sequence[Tensor]) -> np.ndarray:
    """Mark the components that any of these label vectors touches; shape [components]."""
    marks = np.zeros(int(of_label.max()) + 1, dtype=bool)
    for labels in vectors:
        marks[of_label[labels.numpy()]] = True
    return marks


def _signatures(record: Record, of_label: np.ndarray) -> np.ndarray:
    """Fingerprint of the multiset of (tensor, axis) that each component lies in, by component number.

    A sum of one random 64-bit number per occurrence: two components share it if their multisets are equal, and
    otherwise with probability 2^-64.
    """
    keys = np.random.default_rng(0).integers(1, 2**63, size=len(record.axes), dtype=np.uint64)
    signature = np.zeros(int(of_label.max()) + 1, dtype=np.uint64)
    for key, entry in zip(keys, record.axes.values(), strict=True):
        np.add.at(signature, of_label[entry.labels.reshape(-1).numpy()], key)
    return signature


def _constraints(
    grids: Sequence[Grid], of_label: np.ndarray, reason: dict[int, str], signature: np.ndarray
) -> tuple[list[Tensor], tuple[Fibres, ...]]:
    """Sort the grids into those that must be tied place by place and those that can be fibres."""
    ties = [labels for grid in grids if (labels := _torn(grid, of_label)) is not None]
    open_grids = [(grid, labels) for grid in grids if (labels := _unmet(grid, of_label)) is not None]
    ties += [labels for grid, labels in open_grids if grid.in_step]
    if ties:
        return ties, ()
    unmet = [(labels, grid.where) for grid, labels in open_grids]
    stays = _hold(unmet, of_label, reason)
    fibres: dict[frozenset[frozenset[int]], tuple[Fibres, Tensor]] = {}
    for labels, where in unmet:
        free = torch.from_numpy(~stays[of_label[labels.numpy()]])
        if not free.any():
            continue
        labels = labels[free].reshape(len(labels), -1)
        components = np.sort(of_label[labels.numpy()], axis=1)
        if bool((components == components[0]).all()):
            continue  # what differs between the rows stays
        rows = tuple(dict.fromkeys(tuple(dict.fromkeys(row)) for row in of_label[labels.numpy()].tolist()))
        key = frozenset(frozenset(row) for row in rows)
        if _planable(rows, labels.shape[1], signature):
            fibres.setdefault(key, (Fibres(rows, where), labels))
        else:
            ties.append(labels)
    owner: dict[int, frozenset[frozenset[int]]] = {}
    for key, (candidate, labels) in fibres.items():
        for component in {component for row in candidate.rows for component in row}:
            other = owner.setdefault(component, key)
            if other != key:
                ties.extend([labels, fibres[other][1]])
                break
    return ties, tuple(candidate for candidate, _ in fibres.values())


def _torn(grid: Grid, of_label: np.ndarray) -> Tensor | None:
    """Rows and their partners, [place, row], that must yet be united as a whole; None where all is well."""
    if grid.partner is None:
        return None
    sides = [of_label[labels.numpy()] for labels in (grid.labels, grid.partner)]
    whole = [bool((side == side[:, :1]).all()) and len(np.unique(side)) > 1 for side in sides]
    if not any(whole) or (all(whole) and bool((sides[0][:, 0] == sides[1][:, 0]).all())):
        return None
    return torch.cat([grid.labels, grid.partner], dim=1).T


def _unmet(grid: Grid, of_label: np.ndarray) -> Tensor | None:
    """Rows of labels that might keep unequal numbers; None where they cannot."""
    labels = grid.labels
    while True:
        rows = labels.reshape(-1, labels.shape[-1])
        components = of_label[rows.numpy()]
        ordered = components if grid.in_step else np.sort(components, axis=1)
        if bool((ordered == ordered[0]).all()):
            return None
        if not grid.rows_may_go or not bool((components == components[:, :1]).all()):
            return rows
        if labels.ndim < 3:
            return None
        labels = labels[..., 0]


def _hold(unmet: Sequence[tuple[Tensor, str]], of_label: np.ndarray, reason: dict[int, str]) -> np.ndarray:
    """Freeze grids whose rows have unequal numbers of frozen channels; mark the frozen components, [components]."""
    stays = np.zeros(int(of_label.max()) + 1, dtype=bool)
    stays[list(reason)] = True
    count = -1
    while count != len(reason):
        count = len(reason)
        for labels, where in unmet:
            components = of_label[labels.numpy()]
            held = stays[components].sum(axis=1)
            if held.min() == held.max():
                continue
            for component in np.unique(components).tolist():
                reason.setdefault(component, f"must keep as many channels as a frozen part ({where})")
            stays[components.reshape(-1)] = True
    return stays


def _planable(rows: tuple[tuple[int, ...], ...], width: int, signature: np.ndarray) -> bool:
    """Whether rows are disjoint, equally long, evenly repeated, and each of one signature."""
    lengths = {len(row) for row in rows}
    disjoint = sum(len(row) for row in rows) == len({component for row in rows for component in row})
    homogeneous = all(len(set(signature[list(row)].tolist())) == 1 for row in rows)
    return len(lengths) == 1 and width % len(rows[0]) == 0 and disjoint and homogeneous


def _connected(united: Pairs, size: int) -> np.ndarray:
    """Number the connected components of the united labels; entry i belongs to label i, entry 0 to "not a channel"."""
    none = torch.zeros(0, dtype=torch.int64)
    pairs = np.stack([torch.cat([none, *side]).numpy() for side in zip((none, none), *united, strict=True)])
    pairs = pairs[:, (pairs[0] != pairs[1]) & (pairs > 0).all(axis=0)]
    matrix = coo_matrix((np.ones(pairs.shape[1], dtype=np.int8), (pairs[0], pairs[1])), shape=(size, size))
    return connected_components(matrix, directed=False)[1].astype(np.int64)


def mixing_places(record: Record, may_go: np.ndarray, unit: np.ndarray) -> tuple[str, ...]:
    """Name the places where a statistic is taken over channels of which some may go and others stay.

    Args:
        record: What the rules found.
        may_go: Whether a label belongs to a unit that may be removed, by label.
        unit: Unit of each label, -1 where it belongs to none.
    """
    written = record.written_marks().numpy()

    def mixes(found: Mixing) -> bool:
        labels = found.labels.numpy()
        goes = may_go[labels] & (written[labels] | (not found.if_written))
        return bool((goes.any(axis=1) & (unit[labels] != unit[labels][:, :1]).any(axis=1)).any())

    return tuple(place for place, found in record.mixing.items() if any(map(mixes, found)))
