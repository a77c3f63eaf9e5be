"""From recorded labels to connected components: what is one unit, what is frozen, what must keep equal counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from archscan.coupling.labels import Record


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
    """Number the units; tie grids that disagree until those that are left can be planned as fibres."""
    while True:
        of_label = _connected(record)
        reason = {0: ""} | _frozen_components(record, of_label)
        reason[int(of_label[0])] = "not a channel"
        signature = _signatures(record, of_label)
        ties, fibres = _constraints(record, of_label, reason, signature)
        if not ties:
            return Components(of_label, signature, reason, fibres)
        for grid in ties:
            record.unite(grid, grid[:1])


def _frozen_components(record: Record, of_label: np.ndarray) -> dict[int, str]:
    reasons: dict[int, str] = {}
    for labels, reason in record.frozen:
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
    record: Record, of_label: np.ndarray, reason: dict[int, str], signature: np.ndarray
) -> tuple[list[Tensor], tuple[Fibres, ...]]:
    """Sort the grids into those that must be tied place by place and those that can be fibres."""
    ties: list[Tensor] = []
    fibres: dict[frozenset[frozenset[int]], tuple[Fibres, Tensor]] = {}
    for grid, where in record.grids:
        grid_components = of_label[grid.numpy()]
        ordered = np.sort(grid_components, axis=1)
        if bool((ordered == ordered[0]).all()):
            continue
        held = [component for component in np.unique(grid_components).tolist() if component in reason]
        if held:
            for component in np.unique(grid_components).tolist():
                reason.setdefault(component, f"must keep as many channels as a frozen part ({where})")
            continue
        rows = tuple(dict.fromkeys(tuple(dict.fromkeys(row)) for row in grid_components.tolist()))
        key = frozenset(frozenset(row) for row in rows)
        if _planable(rows, grid_components.shape[1], signature):
            fibres.setdefault(key, (Fibres(rows, where), grid))
        else:
            ties.append(grid)
    owner: dict[int, frozenset[frozenset[int]]] = {}
    for key, (candidate, grid) in fibres.items():
        for component in {component for row in candidate.rows for component in row}:
            other = owner.setdefault(component, key)
            if other != key:
                ties.extend([grid, fibres[other][1]])
                break
    return ties, tuple(candidate for candidate, _ in fibres.values())


def _planable(rows: tuple[tuple[int, ...], ...], width: int, signature: np.ndarray) -> bool:
    """Whether rows are disjoint, equally long, evenly repeated, and each of one signature."""
    lengths = {len(row) for row in rows}
    disjoint = sum(len(row) for row in rows) == len({component for row in rows for component in row})
    homogeneous = all(len(set(signature[list(row)].tolist())) == 1 for row in rows)
    return len(lengths) == 1 and width % len(rows[0]) == 0 and disjoint and homogeneous


def _connected(record: Record) -> np.ndarray:
    """Number the connected components of the united labels; entry i belongs to label i, entry 0 to "not a channel"."""
    size = record.next_label
    none = torch.zeros(0, dtype=torch.int64)
    pairs = np.stack([torch.cat([none, *side]).numpy() for side in zip((none, none), *record.pairs, strict=True)])
    pairs = pairs[:, (pairs[0] != pairs[1]) & (pairs > 0).all(axis=0)]
    matrix = coo_matrix((np.ones(pairs.shape[1], dtype=np.int8), (pairs[0], pairs[1])), shape=(size, size))
    return connected_components(matrix, directed=False)[1].astype(np.int64)
