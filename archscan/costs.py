"""MACs, parameters and activations as functions of widths that do not exist yet: `Graph`, sizes → `CostModel`.

All numbers are per image; one multiply-accumulate is one FLOP, as `mac_table` counts it. Memory is counted in elements:
what is held at the same time (see `liveness`), what ops allocate, and what they read and write. Measured time is no
count; a model of it can be attached (`CostModel.with_timing`).

Data format: every cost is a sum of terms, each a coefficient times a product of sizes that are linear in the groups'
widths. At most two sizes of a term depend on widths, so a cost is a quadratic form in the widths (`Quadratic`): that
is what the planner works on.

The decision that is not obvious: a run is recorded at batch 2, and an op whose output depends on the input counts
half; one that prepares weights (a standardised convolution) counts in full, since it runs once for the whole batch.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from scipy import sparse

from archscan.errors import BadInput, UnsupportedOp
from archscan.graph import Graph, Node
from archscan.liveness import moments, shared_input, storages
from archscan.mac_table import (
    IGNORED,
    MAC_HANDLES,
    MISSED_BY_FVCORE,
    Call,
    Size,
    SizeOf,
    Sizes,
    counts_as_activation,
)

__all__ = [
    "BudgetKind",
    "CostKind",
    "CostModel",
    "Quadratic",
    "Size",
    "SizeOf",
    "Sizes",
    "constant_sizes",
    "cost_model",
]

CostKind = Literal["macs", "params", "activations", "outputs", "traffic"]
"""What adds up over modules; ``outputs`` is what ops allocate, ``traffic`` what they read and write, in elements."""

BudgetKind = Literal["macs", "params", "latency", "memory"]
"""What can be limited; ``memory`` is the most elements that are held at the same time."""

_TermKind = Literal[CostKind, "held"]
_KINDS: tuple[CostKind, ...] = get_args(CostKind)


@dataclass(frozen=True, eq=False)
class Quadratic:
    """A cost as a quadratic form, C(w) = constant + linear · w + w' matrix w, exact in integers.

    Attributes:
        constant: What no width changes.
        linear_G: Per kept step of each group.
        matrix_GG: Per product of two groups' kept steps; not symmetric in general.
    """

    constant: int
    linear_G: np.ndarray
    matrix_GG: np.ndarray

    def at(self, widths_G: np.ndarray) -> int:
        """Evaluate for given widths."""
        return int(self.constant + self.linear_G @ widths_G + widths_G @ self.matrix_GG @ widths_G)


@dataclass(frozen=True, eq=False)
class _Polynomial:
    """Sum over terms t of coefficient_t × product over j of size[factors_tj]; the last size is the constant 1."""

    coefficient_T: np.ndarray
    factors_TK: np.ndarray
    modules_T: tuple[str, ...]

    def terms(self, sizes_VB: np.ndarray) -> np.ndarray:
        values_TB = np.broadcast_to(self.coefficient_T[:, None], (len(self.coefficient_T), sizes_VB.shape[1])).copy()
        for column in range(self.factors_TK.shape[1]):
            values_TB *= sizes_VB[self.factors_TK[:, column]]
        return values_TB

    def part(self, terms: np.ndarray) -> "_Polynomial":
        """Sum over some of the terms only."""
        return _Polynomial(
            self.coefficient_T[terms], self.factors_TK[terms], tuple(self.modules_T[term] for term in terms.tolist())
        )


@dataclass(frozen=True, eq=False)
class CostModel:
    """Costs of a network per image, for any widths of its groups.

    Attributes:
        full_widths_G: Kept steps of every group in the dense network.
        uncounted: Ops with arithmetic that is not counted, in the order of execution; fvcore does not count them
            either.
        missed_by_fvcore: Functions that are counted here and not by fvcore, in the order of execution.
    """

    full_widths_G: np.ndarray
    uncounted: tuple[str, ...]
    missed_by_fvcore: tuple[str, ...]
    _slopes_VG: sparse.csr_array
    _constants_V: np.ndarray
    _polynomials: Mapping[CostKind, _Polynomial]
    _held: _Polynomial
    _moments: tuple[np.ndarray, ...]
    _timing: Quadratic | None = None

    def evaluate(self, kind: CostKind, widths_G: np.ndarray) -> int:
        """Price one choice of widths, in MACs, parameters or elements; `widths_G` holds kept steps per group."""
        return int(self.evaluate_many(kind, np.asarray(widths_G)[None])[0])

    def evaluate_many(self, kind: CostKind, widths_BG: np.ndarray) -> np.ndarray:
        """Price many choices of widths at once; int64 of shape [B]."""
        return np.asarray(self._terms(kind, widths_BG).sum(axis=0))

    def by_module(self, kind: CostKind, widths_G: np.ndarray) -> dict[str, int]:
        """Price one choice of widths by the path of the module whose forward ran the op, or that owns the parameter."""
        values_T = self._terms(kind, np.asarray(widths_G)[None])[:, 0]
        total: Counter[str] = Counter()
        for module, value in zip(self._polynomials[kind].modules_T, values_T.tolist(), strict=True):
            total[module] += value
        return dict(total)

    def limited(self, kind: BudgetKind, widths_G: np.ndarray) -> int:
        """Price what a budget can limit: the largest of its `quadratics`."""
        if kind == "macs" or kind == "params":
            return self.evaluate(kind, widths_G)
        if kind == "latency":
            return self._measured().at(np.asarray(widths_G))
        values_T = self._held.terms(self._sizes(np.asarray(widths_G)[None]))[:, 0]
        return max((int(values_T[terms].sum()) for terms in self._moments), default=0)

    def quadratics(self, kind: BudgetKind) -> tuple[Quadratic, ...]:
        """Write what a budget limits as quadratic forms in the widths, none of which may exceed it.

        Raises:
            UnsupportedOp: Some term is a product of three sizes that all depend on widths.
        """
        if kind == "macs" or kind == "params":
            return (self.quadratic(kind),)
        if kind == "latency":
            return (self._measured(),)
        return tuple(self._quadratic(self._held.part(terms)) for terms in self._moments)

    def with_timing(self, timing: Quadratic) -> "CostModel":
        """Return the same costs with a model of the measured time, in units of its choice."""
        return replace(self, _timing=timing)

    def _measured(self) -> Quadratic:
        if self._timing is None:
            raise BadInput("a budget on latency needs a latency model of this network; none was measured")
        return self._timing

    def quadratic(self, kind: CostKind) -> Quadratic:
        """Write one cost as a quadratic form in the widths; refusals as in `quadratics`."""
        return self._quadratic(self._polynomials[kind])

    def _quadratic(self, polynomial: _Polynomial) -> Quadratic:
        factors_TK = polynomial.factors_TK
        if factors_TK.shape[1] > 2:
            one = len(self._constants_V) - 1
            term = int(np.argmax((factors_TK != one).sum(axis=1)))
            raise UnsupportedOp(
                f"{polynomial.modules_T[term]} costs a product of three widths; protect one of its channel groups"
            )
        shape = (len(self._constants_V),) * 2
        pairs_VV = sparse.coo_array(
            (polynomial.coefficient_T, (factors_TK[:, 0], factors_TK[:, 1])), shape=shape
        ).tocsr()
        constants_V, slopes_VG = self._constants_V, self._slopes_VG
        return Quadratic(
            constant=int(constants_V @ (pairs_VV @ constants_V)),
            linear_G=slopes_VG.T @ (pairs_VV @ constants_V) + slopes_VG.T @ (pairs_VV.T @ constants_V),
            matrix_GG=(slopes_VG.T @ pairs_VV @ slopes_VG).toarray(),
        )

    def _terms(self, kind: CostKind, widths_BG: np.ndarray) -> np.ndarray:
        return self._polynomials[kind].terms(self._sizes(widths_BG))

    def _sizes(self, widths_BG: np.ndarray) -> np.ndarray:
        """Evaluate all sizes; shape [sizes, B]."""
        widths_BG = np.asarray(widths_BG)
        groups = len(self.full_widths_G)
        if widths_BG.ndim != 2 or widths_BG.shape[1] != groups or widths_BG.dtype.kind not in "iu":
            got = f"{widths_BG.dtype} of shape {widths_BG.shape[1:]}"
            raise BadInput(f"widths must be whole numbers, one for each of {groups} channel groups; got {got}")
        return np.asarray(self._slopes_VG @ widths_BG.T.astype(np.int64) + self._constants_V[:, None])


class _Terms:
    """Collect terms; sizes that differ by a factor only are stored once, the factor goes into the coefficient."""

    def __init__(self, full_widths_G: Sequence[int], fixed: Collection[int] = ()) -> None:
        self.full_widths_G, self.fixed = full_widths_G, frozenset(fixed)
        self.sizes: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}
        self.rows: dict[_TermKind, list[tuple[int, tuple[int, ...], str]]] = {kind: [] for kind in get_args(_TermKind)}

    def add(self, kind: _TermKind, factors: Iterable[int | Size], module: str, batch_size: int = 1) -> None:
        coefficient, variable = 1, []
        for factor in factors:
            if isinstance(factor, int):
                coefficient *= factor
            else:
                scale, number = self._intern(factor)
                coefficient *= scale
                variable += number
        if coefficient % batch_size == 0:  # else the batch was summed away before, and the op costs what it costs once
            coefficient //= batch_size
        self.rows[kind].append((coefficient, tuple(sorted(variable)), module))

    def _intern(self, size: Size) -> tuple[int, list[int]]:
        steps = tuple(sorted((group, indices) for group, indices in size.per_step.items() if indices))
        stays = sum(indices * self.full_widths_G[group] for group, indices in steps if group in self.fixed)
        constant, steps = size.constant + stays, tuple(step for step in steps if step[0] not in self.fixed)
        if not steps:
            return constant, []
        scale = math.gcd(constant, *(indices for _, indices in steps))
        key = (constant // scale, tuple((group, indices // scale) for group, indices in steps))
        return scale, [self.sizes.setdefault(key, len(self.sizes))]

    def polynomial(self, kind: _TermKind) -> _Polynomial:
        rows, one = self.rows[kind], len(self.sizes)
        degree = max([2, *(len(variable) for _, variable, _ in rows)])
        factors_TK = np.full((len(rows), degree), one, dtype=np.int64)
        for row, (_, variable, _) in enumerate(rows):
            factors_TK[row, : len(variable)] = variable
        coefficient_T = np.array([coefficient for coefficient, _, _ in rows], dtype=np.int64)
        return _Polynomial(coefficient_T, factors_TK, tuple(module for _, _, module in rows))

    def matrices(self) -> tuple[sparse.csr_array, np.ndarray]:
        entries = [(row, group, indices) for (_, steps), row in self.sizes.items() for group, indices in steps]
        rows, columns, values = np.array(entries, dtype=np.int64).reshape(-1, 3).T
        shape = (len(self.sizes) + 1, len(self.full_widths_G))
        constants_V = np.array([*(constant for constant, _ in self.sizes), 1], dtype=np.int64)
        return sparse.coo_array((values, (rows, columns)), shape=shape).tocsr(), constants_V


def cost_model(
    graph: Graph,
    size_of: SizeOf,
    parameters: Mapping[str, Sizes],
    full_widths_G: np.ndarray,
    fixed: Collection[int] = (),
) -> CostModel:
    """Price a recorded run.

    Args:
        graph: The run, in eval mode.
        size_of: Size of each axis of each value that the run saw.
        parameters: Size of each axis of each parameter, by path.
        full_widths_G: Kept steps of every group in the dense network.
        fixed: Numbers of the groups that never change: their widths are numbers here, whatever is evaluated.

    Raises:
        BadInput: A size does not come to the recorded one at full widths: it belongs to another run.
    """
    full = [int(width) for width in full_widths_G]
    terms = _Terms(full, fixed)
    checked = _checked(graph, size_of, full)
    uncounted: dict[str, None] = {}
    missed: dict[str, None] = {}
    for node in graph.nodes:
        op = node.op._schema.name
        handle = MAC_HANDLES.get(op)
        if handle is None:
            name = op.removeprefix("aten::")
            if name not in IGNORED and name.removesuffix("_") not in IGNORED:
                uncounted[op] = None
            continue
        if node.function in MISSED_BY_FVCORE:
            missed[node.function] = None
        call = Call(node, checked)
        factors = handle(call)
        if factors is None:
            continue
        terms.add("macs", factors, node.module, _batch_share(graph, node, factors))
        if counts_as_activation(node, op):
            terms.add("activations", call.output, node.module, _batch_share(graph, node, call.output))
    for path, sizes in parameters.items():
        terms.add("params", sizes, path.rpartition(".")[0])
    held = _add_memory(terms, graph, checked)
    slopes_VG, constants_V = terms.matrices()
    polynomials: dict[CostKind, _Polynomial] = {kind: terms.polynomial(kind) for kind in _KINDS}
    full_G = np.array(full, dtype=np.int64)
    return CostModel(
        full_G, tuple(uncounted), tuple(missed), slopes_VG, constants_V, polynomials, terms.polynomial("held"), held
    )


def _add_memory(terms: _Terms, graph: Graph, size_of: SizeOf) -> tuple[np.ndarray, ...]:
    """Add what ops allocate, read, write and hold; return the terms of each moment's held values."""

    def add(kind: _TermKind, number: int, module: str) -> None:
        terms.add(kind, size_of(number), module, graph.batch_size if graph.values[number].per_sample else 1)

    for node, new in zip(graph.nodes, storages(graph).new, strict=True):
        for number in new:
            add("outputs", number, node.module)
        writes = [number for number in node.outputs if number in new or number in node.tensors]
        if writes or shared_input(node) is None:
            for number in (*node.tensors, *writes):
                add("traffic", number, node.module)
    sets = moments(graph)
    place = {number: row for row, number in enumerate(sorted(frozenset().union(*sets)))}
    for number in place:
        add("held", number, "")
    return tuple(np.array(sorted(place[number] for number in held)) for held in sets)


def _batch_share(graph: Graph, node: Node, factors: Iterable[int | Size]) -> int:
    """Say by what the count of an op is divided to come to that of a batch of one.

    A product of two matrices that both hold the batch mixes its samples, and costs its square.
    """
    first = node.outputs[0]
    if first is None or not graph.values[first].per_sample:
        return 1
    mixes = node.op is torch.ops.aten.mm.default and all(graph.values[number].per_sample for number in node.tensors)
    return graph.batch_size ** (list(factors).count(Size(graph.batch_size, {})) if mixes else 1)


def _checked(graph: Graph, size_of: SizeOf, full: Sequence[int]) -> SizeOf:
    """Look sizes up once, and hold them against the recorded shapes."""
    known: dict[int, Sizes] = {}

    def look_up(number: int) -> Sizes:
        if number not in known:
            sizes = size_of(number)
            shape = tuple(size.at(full) for size in sizes)
            if shape != graph.values[number].shape:
                raise BadInput(
                    f"value {number} ({graph.values[number].name or graph.values[number].kind}) has shape "
                    f"{graph.values[number].shape} in the recorded run but {shape} by its sizes; use this run's sizes"
                )
            known[number] = sizes
        return known[number]

    return look_up


def constant_sizes(graph: Graph) -> SizeOf:
    """Sizes that depend on no width: what a network costs as it is."""
    sizes: dict[int, Sizes] = {}

    def look_up(number: int) -> Sizes:
        if number not in sizes:
            sizes[number] = tuple(Size(length, {}) for length in graph.values[number].shape)
        return sizes[number]

    return look_up
