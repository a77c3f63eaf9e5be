"""Run a network again without what comes before the first change: calls of its modules → outputs kept from one run.

A `Replay` mode wraps forward passes on one batch. The first, `keep`, runs everything and keeps what modules returned;
the later ones mask units where they are consumed, and a module whose contractions all come before the first masked one
is not run: it returns what it returned then. That is half of the work on average, for any network.

The decision that is not obvious: what is skipped is whole module calls, not single ops, since then BatchNorms and
activations are skipped as well, and since a tensor that is overwritten after a module returned it shows by its version
counter; only those few are copied. Whether skipping changes anything is for the caller to check, with `skips` off.

Contractions are numbered as `capture.ContractionMode` does, from 0 at every call of the model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from archscan.capture import ContractionMode
from archscan.errors import BadInput
from archscan.groups import Consumer, Coupling

CACHE_BYTES = 1 << 30
"""What kept outputs of one batch may take; the innermost modules' are given up first."""


@dataclass
class _Call:
    """One call of a module.

    Attributes:
        module: Which.
        depth: Of nested calls around it.
        start: Contractions run before it.
        stop: Contractions run after it.
        after: Number of the next call that is not inside this one.
        output: What it returned; None where it is not kept.
        version: Of each returned tensor, when it was returned.
        overwritten: Whether a returned tensor was overwritten later on.
    """

    module: nn.Module
    depth: int
    start: int
    stop: int = 0
    after: int = 0
    output: Any = None
    version: tuple[int, ...] = ()
    overwritten: bool = False


class Replay(ContractionMode):
    """Mask units in a running model, and skip what cannot notice.

    Attributes:
        skips: Whether module calls before the first masked contraction are skipped.
    """

    def __init__(self, model: nn.Module, coupling: Coupling, device: torch.device) -> None:
        super().__init__()
        self.skips = True
        self._model = model
        self._device = device
        self._consumers: dict[int, list[Consumer]] = {}
        for consumer in coupling.consumers:
            self._consumers.setdefault(consumer.contraction, []).append(consumer)
        self._calls: list[_Call] = []
        self._keeping = False
        self._overwritten: list[bool] | None = None  # of each call, whether its output is; None before the first run
        self._deepest = -1  # no output of a call nested deeper than this is kept
        self._next = self._depth = self._model_calls = self._contractions = 0
        self._masked: dict[int, list[tuple[Consumer, Tensor]]] = {}
        self._first = 0
        self._running = False

    def keep(self, run: Callable[[], Any]) -> Any:
        """Run with nothing masked, and keep what modules return for the same batch.

        The first time it runs twice, since which outputs are overwritten later on shows at the end only.
        """
        if self._overwritten is None:
            self._run_keeping(run)
            self._learn()
        return self._run_keeping(run)

    def _run_keeping(self, run: Callable[[], Any]) -> Any:
        self._masked, self._calls, self._model_calls, self._keeping = {}, [], 0, True
        try:
            with self:
                result = run()
        finally:
            self._keeping = False
        self._require_placed()
        return result

    def masked(self, units: Sequence[int], run: Callable[[], Any]) -> Any:
        """Run with the channels of `units` zeroed wherever they are consumed."""
        removed = set(units)
        self._masked = {}
        for number, consumers in self._consumers.items():
            for consumer in consumers:
                channels = [index for index, unit in enumerate(consumer.units.tolist()) if unit in removed]
                if channels:
                    place = (consumer, torch.tensor(channels, device=self._device))
                    self._masked.setdefault(number, []).append(place)
        self._first = min(self._masked, default=self._contractions)
        with self:
            return run()

    def forget(self) -> None:
        """Let go of everything kept."""
        self._calls = []

    @contextmanager
    def installed(self) -> Iterator["Replay"]:
        """Watch the calls of all modules, and put everything back."""
        watched = [module for module in self._model.modules() if not isinstance(module, torch.jit.ScriptModule)]
        own = {module: module.__dict__["forward"] for module in watched if "forward" in module.__dict__}
        try:
            for module in watched:
                module.forward = partial(self._call, module, module.forward)
            yield self
        finally:
            self.forget()
            for module in watched:
                if module in own:
                    module.forward = own[module]
                else:
                    del module.__dict__["forward"]

    def on_contraction(
        self, number: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run contraction `number` on operands whose removed channels are zero."""
        operands = list(args)
        for consumer, channels in self._masked.get(number, ()) if self._running else ():
            operands[consumer.operand] = _zeroed(consumer, channels, operands[consumer.operand])
        return func(*operands, **kwargs)

    # Calls of modules -------------------------------------------------------------------------------------------------

    def _call(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if module is self._model:
            return self._call_model(forward, *args, **kwargs)
        if not self._running:
            return forward(*args, **kwargs)
        if not self.skips:
            return forward(*args, **kwargs)
        if self._keeping:
            return self._kept(module, forward, *args, **kwargs)
        call = self._calls[self._next] if self._next < len(self._calls) else None
        if call is None or call.module is not module:
            raise BadInput(
                "the model calls other modules when units are removed, so that no loss change can be measured; audit a"
                " model whose forward does not branch on values"
            )
        if call.output is not None and call.stop <= self._first:
            self._next, self.count = call.after, call.stop
            return tree_map(_copied, call.output) if call.overwritten else call.output
        self._next += 1
        return forward(*args, **kwargs)

    def _call_model(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._running, self.count, self._next, self._depth = True, 0, 0, 0
        self._model_calls += 1
        try:
            return forward(*args, **kwargs)
        finally:
            self._running, self._contractions = False, self.count

    def _kept(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        number = len(self._calls)
        call = _Call(module, self._depth, self.count)
        self._calls.append(call)
        self._depth += 1
        output = forward(*args, **kwargs)
        self._depth -= 1
        call.stop, call.after = self.count, len(self._calls)
        if call.stop == call.start:
            return output
        if self._overwritten is None:
            call.output, call.version = output, _versions(output)
        elif call.depth <= self._deepest:
            call.overwritten = self._overwritten[number]
            call.output = tree_map(_copied, output) if call.overwritten else output
        return output

    def _learn(self) -> None:
        """See, after the first run, which outputs were overwritten and how many can be kept."""
        sizes: dict[int, int] = {}
        seen: set[int] = set()
        for call in self._calls:
            call.overwritten = call.version != _versions(call.output)
            for tensor in _tensors(call.output):
                if call.overwritten or id(tensor) not in seen:
                    sizes[call.depth] = sizes.get(call.depth, 0) + tensor.nbytes
                    seen.add(id(tensor))
        self._overwritten = [call.overwritten for call in self._calls]
        total = 0
        for depth in sorted(sizes):
            total += sizes[depth]
            if total <= CACHE_BYTES:
                self._deepest = depth
        if self._model_calls != 1:
            self.skips = False  # what one call of the model returned says nothing about the next

    def _require_placed(self) -> None:
        if self._consumers and self._contractions <= (last := max(self._consumers)):
            raise BadInput(
                f"the model ran {self._contractions} contractions, but capture saw at least {last + 1}; capture the"
                " model as it is run, and let loss_fn call the model itself"
            )


def _zeroed(consumer: Consumer, channels: Tensor, activation: Any) -> Tensor:
    size = activation.shape[consumer.axis] if isinstance(activation, Tensor) else None
    if size != len(consumer.units):
        raise BadInput(
            f"the input of {consumer.module or 'the model'} (contraction {consumer.contraction}) has not the"
            f" {len(consumer.units)} channels that capture saw; capture the model again, as it is run"
        )
    return activation.index_fill(consumer.axis, channels, 0)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]


def _versions(output: Any) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in _tensors(output))


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
