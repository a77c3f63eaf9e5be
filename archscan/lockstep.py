"""Run two networks in lockstep: original, slim network, batches → what both have at each layer or block, by depth.

Each batch's forward pass runs in a thread of its own, which rests wherever outputs can be compared: at a layer
(`rehearsal.Place`), or where the slim network enters a block of layers and the original leaves it. What a resting
forward pass holds is what it needs to go on, so that nothing is computed twice and nothing else is stored: repairing
every layer, on inputs that the repaired layers before it produce, costs one forward pass of either network, however
deep it is, and works for any forward that Python can run.

The decision that is not obvious: threads for control, not for speed. Only one of them runs at any time.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from archscan.errors import BadInput
from archscan.rehearsal import SUMS, Numbered, Place, function_name, norm_arguments


@dataclass(frozen=True, eq=False)
class Meeting:
    """What both networks have for one batch at a place.

    Attributes:
        args: Positional arguments of the slim network's call of the layer; the first is its input.
        kwargs: Keyword arguments of the same call.
        norm: Arguments of the BatchNorm behind it, by name; None where there is none.
        shortcut: What the slim network adds; None where it adds nothing.
        target: What the original network has there; the slim network's input until it is known.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    norm: Mapping[str, Any] | None
    shortcut: Tensor | None
    target: Tensor


@dataclass(frozen=True, eq=False)
class BlockMeeting:
    """What both networks have for one batch at a block of layers.

    Attributes:
        inputs: What the slim network's block reads.
        target: What the original's block returns.
    """

    inputs: Tensor
    target: Tensor


_RUNNING = threading.local()
"""Knows in each thread which forward pass it runs, for hooks, which are told the module only."""


class _Stopped(BaseException):
    """Unwinds a resting forward pass that nobody will go on with; no model should catch it."""


class _Forward(Numbered):
    """A forward pass that rests at places; subclasses say where, and what they have there."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.model, self.images = model, images
        self._found: Any = None
        self._stopped = self._finished = False
        self._go, self._resting = threading.Semaphore(0), threading.Semaphore(0)
        self._future: Future[None] | None = None

    def start(self, pool: ThreadPoolExecutor) -> None:
        """Get ready; nothing runs yet."""
        self._future = pool.submit(self._run)

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._stopped:
                _RUNNING.forward = self
                with torch.no_grad(), self:
                    self.model(self.images)
        except _Stopped:
            pass
        finally:
            self._finished = True
            self._resting.release()

    def rest(self, found: Any) -> None:
        """Hand over what was found, and go on when told to."""
        self._found = found
        self._resting.release()
        self._go.acquire()
        self._found = None
        if self._stopped:
            raise _Stopped

    def advance(self) -> Any:
        """Let the forward pass run to its next rest and give what it found there; None at its end."""
        self._go.release()
        self._resting.acquire()
        if self._finished and self._future is not None:
            self._future.result()  # raises what the forward raised
        return self._found

    def stop(self) -> None:
        """Unwind it where it rests."""
        self._stopped = True
        self._go.release()


class _Original(_Forward):
    def __init__(self, model: nn.Module, images: Tensor, places: Sequence[Place]) -> None:
        super().__init__(model, images)
        self.places = {place.last_call: place for place in places}

    def on_call(self, number: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if number in self.places:
            self.rest((self.places[number], result))
        return result


class _Slim(_Forward):
    def __init__(self, model: nn.Module, images: Tensor, places: Sequence[Place]) -> None:
        super().__init__(model, images)
        self.by_call = {
            call: place
            for place in places
            for call in (place.call, place.norm_call, place.sum_call)
            if call is not None
        }
        self.made: dict[Place, list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]] = {}

    def on_call(self, number: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = self.by_call.get(number)
        if place is None:
            return func(*args, **kwargs)
        self._require_same(place, number, function_name(func))
        if number == place.sum_call:
            self.rest((place, self._meeting(place, args[1 - place.branch])))
            args[place.branch].copy_(self._again(place))
            return func(*args, **kwargs)
        self.made.setdefault(place, []).append((func, args, kwargs))
        if number != place.last_call:
            return func(*args, **kwargs)
        self.rest((place, self._meeting(place, None)))
        return self._again(place)

    def _require_same(self, place: Place, number: int, name: str) -> None:
        norm, total = number == place.norm_call, number == place.sum_call
        if name not in ({"batch_norm"} if norm else SUMS if total else {place.function}):
            expected = "a BatchNorm" if norm else "a sum" if total else place.function
            raise BadInput(
                f"the slim network runs {name or 'something else'} where the original runs {expected} for "
                f"{place.weight}; choose a repair other than least squares"
            )

    def _meeting(self, place: Place, shortcut: Tensor | None) -> Meeting:
        calls = self.made[place]
        _, args, kwargs = calls[0]
        norm = norm_arguments(*calls[1][1:]) if len(calls) > 1 else None
        return Meeting(args, kwargs, norm, shortcut, target=args[0])

    def _again(self, place: Place) -> Tensor:
        """Compute the branch once more, with the weights as they are now."""
        layer, *norms = self.made.pop(place)
        value = layer[0](*layer[1], **layer[2])
        for func, args, kwargs in norms:
            value = func(value, *args[1:], **kwargs)
        return value


def lockstep(
    original: nn.Module, slim: nn.Module, places: Sequence[Place], batches: Sequence[Tensor]
) -> Generator[tuple[Place, list[Meeting]], None, None]:
    """Run both networks over all batches; yield each place with what every batch has there.

    Weights, biases and running means of the slim network may be changed in place between two places, those of the place
    that was yielded last: what comes after is computed with them. Both networks have to be in eval mode.

    Args:
        original: The network that is right; its places.
        slim: The same with fewer channels.
        places: In the order of `rehearse`.
        batches: Images, on the networks' device.

    Raises:
        BadInput: The slim network calls other functions than the original.
    """
    pairs = [(_Original(original, images, places), _Slim(slim, images, places)) for images in batches]
    with _started(pairs):
        for place in places:
            met = _met(pairs, place, place.weight)
            yield place, [replace(ours, target=target) for target, ours in met]
            del met


class _AtBlocks(_Forward):
    """Rests in the hooks of `lockstep_blocks`."""

    def on_call(self, number: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


def lockstep_blocks(
    original: nn.Module, slim: nn.Module, paths: Sequence[str], batches: Sequence[Tensor]
) -> Generator[tuple[str, list[BlockMeeting]], None, None]:
    """Run both networks over all batches; yield each block with what the slim one reads and the original one returns.

    The slim network's block may be changed before the generator goes on, and run, which leaves what was yielded as it
    is. Both networks have to be in eval mode.

    Args:
        original: The network that is right.
        slim: The same with fewer channels.
        paths: Modules that take one tensor and return one, none inside another, in the order in which they run.
        batches: Images, on the networks' device.

    Raises:
        BadInput: The slim network runs other modules than the original.
    """

    def rest(path: str, found: Tensor) -> None:
        forward = getattr(_RUNNING, "forward", None)
        if forward is not None:
            forward.rest((path, found))

    def leave(path: str, _module: nn.Module, _args: Any, output: Any) -> None:
        rest(path, output)

    def enter(path: str, _module: nn.Module, args: Any) -> None:
        rest(path, args[0])

    pairs = [(_AtBlocks(original, images), _AtBlocks(slim, images)) for images in batches]
    handles = [original.get_submodule(path).register_forward_hook(partial(leave, path)) for path in paths]
    handles += [slim.get_submodule(path).register_forward_pre_hook(partial(enter, path)) for path in paths]
    try:
        with _started(pairs):
            for path in paths:
                yield path, [BlockMeeting(inputs, target) for target, inputs in _met(pairs, path, path)]
    finally:
        for handle in handles:
            handle.remove()


_Pairs = Sequence[tuple[_Forward, _Forward]]


@contextmanager
def _started(pairs: _Pairs) -> Iterator[None]:
    """Get all forward passes ready, let them run to their ends after the block, and unwind them if it is left early."""
    forwards = [forward for pair in pairs for forward in pair]
    with ThreadPoolExecutor(max_workers=max(1, len(forwards))) as pool:
        for forward in forwards:
            forward.start(pool)
        try:
            yield
            for forward in forwards:
                forward.advance()
        finally:
            for forward in forwards:
                forward.stop()


def _met(pairs: _Pairs, at: object, name: str) -> list[tuple[Any, Any]]:
    """Let all forward passes run to their next rest, and give what original and slim network have there."""
    met = [(first.advance(), second.advance()) for first, second in pairs]
    if any(found is None or found[0] != at for pair in met for found in pair):
        raise BadInput(
            f"the slim network's forward differs from the original's at {name}; choose a repair other than least "
            "squares"
        )
    return [(target, ours) for (_, target), (_, ours) in met]
