"""What a run records: `Graph` of `Node`s (ATen ops) and `Value`s (tensors). See `capture`, which makes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from archscan.meta_shapes import NORMALISATIONS

Kind = Literal["parameter", "buffer", "input", "activation", "constant"]


@dataclass(frozen=True)
class Ref:
    """A tensor argument of a node: the number of its `Value`."""

    value: int


@dataclass(frozen=True)
class Value:
    """One tensor of the run.

    Attributes:
        shape: Its size, at the batch size of the capture.
        kind: What made it.
        name: The parameter's or buffer's path in the model; empty otherwise.
        per_sample: Whether it depends on the model's input, and so grows with the batch.
    """

    shape: tuple[int, ...]
    kind: Kind
    name: str
    per_sample: bool


@dataclass(frozen=True)
class Node:
    """One executed ATen op.

    Attributes:
        op: The overload, such as ``aten.convolution.default``.
        args: Positional arguments, tensors as `Ref`.
        kwargs: Keyword arguments, tensors as `Ref`.
        outputs: The number of each output tensor, None where an output is no tensor.
        module: Path of the innermost module whose forward was running; empty for the model itself.
        function: Name of the Python function that issued the op, such as ``adaptive_avg_pool2d``.
        contraction: Running number of the contraction that issued the op, None outside contractions.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[int | None, ...]
    module: str
    function: str
    contraction: int | None

    @cached_property
    def tensors(self) -> tuple[int, ...]:
        """Numbers of all tensor arguments, in order."""
        leaves = leaves_of((*self.args, *self.kwargs.values()))
        return tuple(leaf.value for leaf in leaves if isinstance(leaf, Ref))

    def where(self) -> str:
        """Name the place of this op for a message."""
        return self.module or "the model's own forward"


def leaves_of(result: Any) -> list[Any]:
    """Everything in the nested lists and tuples that ATen ops take and return, which are simpler than pytrees."""
    if not isinstance(result, (list, tuple)):
        return [result]
    return [leaf for part in result for leaf in leaves_of(part)]


def replace_tensors(argument: Any, refer: Callable[[Tensor], Ref]) -> Any:
    """Copy an argument with its tensors replaced by references."""
    if isinstance(argument, Tensor):
        return refer(argument)
    if isinstance(argument, (list, tuple)):
        return type(argument)(replace_tensors(part, refer) for part in argument)
    return argument


def _plain(node: Node) -> tuple[str, ...]:
    """Arguments of a node that are no tensors."""
    leaves = leaves_of((*node.args, *node.kwargs.values()))
    return tuple(repr(leaf) for leaf in leaves if not isinstance(leaf, Ref))


@dataclass(frozen=True)
class Graph:
    """One recorded run.

    Attributes:
        values: All tensors, by number.
        nodes: All ops, in the order of execution.
        outputs: Numbers of the tensors that the model returned.
        batch_size: Leading size of the example input.
        training: Whether the model ran in train mode.
        module_types: The class of each module, by path.
    """

    values: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    batch_size: int
    training: bool
    module_types: Mapping[str, type]

    @cached_property
    def first_seen(self) -> tuple[tuple[int | None, ...], ...]:
        """Outputs of each node, None in place of those that were seen before, as in-place ops return."""
        seen: set[int | None] = {None}
        result = []
        for node in self.nodes:
            result.append(tuple(None if number in seen else number for number in node.outputs))
            seen.update(node.tensors, node.outputs)
        return tuple(result)

    def fingerprint(self) -> list[tuple[Any, ...]]:
        """What couples channels in this run; two runs with equal fingerprints couple the same ones.

        Ops with their places, arguments and wiring, tensors numbered by first use. Left out are ops on scalars (the
        counters of BatchNorm) and whether a BatchNorm takes its statistics from the batch.
        """
        numbers: dict[int, Any] = {}
        lines: list[tuple[Any, ...]] = []
        for node in self.nodes:
            read = node.tensors
            if read and not any(self.values[number].shape for number in read):
                continue
            for number in (*read, *(number for number in node.outputs if number is not None)):
                numbers.setdefault(number, (len(numbers), self.values[number].shape, self.values[number].name))
            plain = () if node.op in NORMALISATIONS else _plain(node)
            lines.append((node.op, node.module, tuple(numbers[number] for number in read), plain))
        return lines
