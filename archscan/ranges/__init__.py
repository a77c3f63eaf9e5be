"""Which values each activation can take, whatever finite input the network gets: recorded run, tensors → `Range`s.

Interval arithmetic along the recorded ops (Moore 1966), element by element, so that borders made by padding count.
Parameters and buffers are points, the input is anything; `rules` says how an op bounds its result. An op that is
monotone runs on lower and on upper ends; one without a rule runs where all that it reads are points.

The decision that is not obvious: views run on both ends too, so that writing in place through a view is seen by whoever
shares the memory, as in the network itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from archscan.graph import Graph, Node, Ref, leaves_of
from archscan.ranges.rules import BOUNDED_BELOW, INF, MONOTONE, RULES, Range, anything, point

__all__ = ["Range", "WritesParameter", "ranges"]

_UNWRITTEN = ("empty", "new_empty", "empty_like")


class WritesParameter(Exception):
    """The run writes into a parameter or a buffer, so that they are not what their paths say."""


def ranges(graph: Graph, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Node, Callable[[int], Range]]]:
    """Go through a recorded run; give each op before it runs, and what looks up the range of a value at that time.

    Args:
        graph: The run, in eval mode.
        tensors: Parameters and buffers by path.

    Raises:
        WritesParameter: An op writes into one of them.
    """
    known: dict[int, Range] = {}
    last_use = {number: place for place, node in enumerate(graph.nodes) for number in node.tensors}

    def look_up(number: int) -> Range:
        if number not in known:
            value = graph.values[number]
            tensor = tensors.get(value.name) if value.kind in ("parameter", "buffer") else None
            known[number] = anything(value.shape) if tensor is None else point(tensor)
        return known[number]

    with torch.no_grad():
        for place, node in enumerate(graph.nodes):
            yield node, look_up
            _run(graph, node, look_up, known)
            for number in (*node.tensors, *node.outputs):
                if number is not None and last_use.get(number, -1) <= place:
                    known.pop(number, None)


def _run(graph: Graph, node: Node, look_up: Callable[[int], Range], known: dict[int, Range]) -> None:
    """Bound the results of one op; what it writes in place is written in place."""
    read = [look_up(number) for number in node.tensors]
    found = _results(node, look_up, read)
    outputs = [number for number in node.outputs if number is not None]
    if node.op._schema.is_mutable:
        _write(node, look_up, found[0] if found else None)
        found = []
    for number, result in zip(outputs, [*found, *[None] * len(outputs)], strict=False):
        if number in known and node.op._schema.is_mutable:
            continue
        known[number] = _shaped(result, graph.values[number].shape)


def _shaped(result: Range | None, shape: tuple[int, ...]) -> Range:
    """Spread a result over the shape that the run saw; views keep their memory."""
    if result is None:
        return anything(shape)
    if result.low.shape == shape:
        return result
    try:
        return Range(result.low.expand(shape).clone(), result.high.expand(shape).clone())
    except RuntimeError:  # a size that float64 on the CPU gives otherwise, such as that of saved statistics
        return anything(shape)


def _write(node: Node, look_up: Callable[[int], Range], result: Range | None) -> None:
    """Put a result where the op puts it; anything that is written otherwise may be anything."""
    for place, argument in enumerate(node.op._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        for leaf in leaves_of([given]):
            if not isinstance(leaf, Ref):
                continue
            own = look_up(leaf.value)
            if own.is_memory:
                raise WritesParameter(node.where())
            shaped = _shaped(result if place == 0 else None, tuple(own.low.shape))
            own.low.copy_(shaped.low)
            own.high.copy_(shaped.high)


def _results(node: Node, look_up: Callable[[int], Range], read: Sequence[Range]) -> list[Range | None]:
    name = node.op._schema.name.removeprefix("aten::")
    name = name.removesuffix("_") if node.op._schema.is_mutable else name
    if name in RULES:
        bound = RULES[name](*_filled(node.args, look_up), **_filled_kwargs(node, look_up))
        if bound is not None:
            return [bound]
    if name in MONOTONE or _is_view(node):
        return _on_both_ends(node, look_up)
    random = torch.Tag.nondeterministic_seeded in node.op.tags
    if read and not random and name not in _UNWRITTEN and all(each.is_point for each in read):
        return _on_both_ends(node, look_up)
    return [_bounded_below(node, read[0])] if name in BOUNDED_BELOW else []


def _is_view(node: Node) -> bool:
    returns = node.op._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def _on_both_ends(node: Node, look_up: Callable[[int], Range]) -> list[Range | None]:
    """Run an op on the lower and on the upper ends of what it reads."""
    mutable = node.op._schema.is_mutable

    def run(side: str) -> list[Any]:
        def end(number: int) -> Tensor:
            tensor: Tensor = getattr(look_up(number), side)
            return tensor.clone() if mutable else tensor

        kwargs = {key: value for key, value in _filled_kwargs(node, end).items() if key not in ("device", "dtype")}
        return leaves_of(node.op(*_filled(node.args, end), **kwargs))

    try:
        lows, highs = run("low"), run("high")
    except (RuntimeError, TypeError, IndexError, NotImplementedError):  # an op that float64 on the CPU lacks
        return []
    pairs = zip(lows, highs, strict=True)
    return [_sound(low, high) if isinstance(low, Tensor) else None for low, high in pairs]


def _sound(low: Tensor, high: Tensor) -> Range:
    """Take what could not be computed for anything."""
    if low.is_floating_point() and bool((low.isnan() | high.isnan()).any()):
        return Range(low.nan_to_num(-INF, INF, -INF), high.nan_to_num(INF, INF, -INF))
    return Range(low, high)


def _filled(arguments: Any, look_up: Callable[[int], Any]) -> Any:
    if isinstance(arguments, Ref):
        return look_up(arguments.value)
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(_filled(each, look_up) for each in arguments)
    return arguments


def _filled_kwargs(node: Node, look_up: Callable[[int], Any]) -> dict[str, Any]:
    return {key: _filled(value, look_up) for key, value in node.kwargs.items()}


def _bounded_below(node: Node, data: Range) -> Range | None:
    exact = _run_on(node, torch.where(data.fixed, data.low, torch.zeros_like(data.low)))
    if exact is None:
        return None
    below = torch.where(data.low < 0, torch.full_like(data.low, -0.4), torch.zeros_like(data.low))
    return Range(torch.where(data.fixed, exact, below), torch.where(data.fixed, exact, data.high.clamp(min=0)))


def _run_on(node: Node, data: Tensor) -> Tensor | None:
    try:
        result = node.op(data.clone(), *node.args[1:], **node.kwargs)
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    return result if isinstance(result, Tensor) else None
