"""Random small CNNs for hypothesis, and what must hold of each: it is refused with a reason, or proven equal.

A network is a `Program`: a list of instructions, each the name of a pattern and a few small integers, that one module
interprets. Whatever the integers are, the program is a network that runs, so hypothesis can shrink it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from archscan.capture import capture
from archscan.costs import constant_sizes, cost_model
from archscan.errors import ArchscanError, BadInput, UnsupportedOp
from archscan.follow import CannotFollow
from archscan.groups import Coupling, couple
from archscan.rebuild import rebuild
from archscan.same_statistics import run_with_same_statistics
from archscan.settle import narrowed, settle
from tests import random_layers as layers
from tests.masked import masked, random_kept, randomised

SIDES = {1: (11,), 2: (6, 5), 3: (4, 3, 4)}
WIDTHS = (4, 6, 8, 3, 12, 2)
MAX_CHANNELS, MAX_PLACES = 40, 256
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Instruction:
    """One pattern: its name, which earlier activations it takes (counted back from the last), and two choices."""

    pattern: str
    first: int = 0
    second: int = 0
    variant: int = 0
    width: int = 0


@dataclass(frozen=True)
class Program:
    """A network: size of its input, its patterns, and what it returns."""

    dims: int = 2
    instructions: tuple[Instruction, ...] = ()
    head: int = 0
    nested: bool = False


def _norm(dims: int, channels: int, variant: int) -> nn.Module:
    groups = next(count for count in (4, 2, 3, 1) if channels % count == 0)
    if variant >= 3:
        return nn.GroupNorm(groups, channels)
    if variant == 2:
        return layers.INSTANCE_NORM[dims - 1](channels, affine=True)
    return layers.BATCH_NORM[dims - 1](channels, affine=variant == 0)


def _activation(channels: int, variant: int) -> nn.Module:
    choices: tuple[Callable[[], nn.Module], ...] = (
        nn.ReLU,
        lambda: nn.ReLU(inplace=True),
        nn.SiLU,
        nn.GELU,
        lambda: nn.PReLU(channels),
        nn.Hardswish,
        nn.Dropout,
    )
    return choices[variant % len(choices)]()


def _grouped(dims: int, channels: int, variant: int, width: int) -> nn.Module:
    groups = next(count for count in ((2, 4, 3, 1), (4, 2, 3, 1), (channels,))[variant % 3] if channels % count == 0)
    outputs = channels * (2 if variant >= 3 else 1) if groups == channels else groups * max(1, width // groups)
    return layers.conv(dims, channels, outputs, 3, groups=groups, bias=variant % 2 == 0)


def _transposed(dims: int, channels: int, variant: int, width: int) -> nn.Module:
    groups = (1, 2, channels)[variant % 3]
    groups = groups if channels % groups == 0 else 1
    outputs = channels if groups == channels else groups * max(1, width // groups)
    return layers.TRANSPOSED[dims - 1](channels, outputs, 2, stride=2 if variant < 3 else 1, groups=groups)


def _resample(dims: int, x: Tensor, variant: int) -> nn.Module:
    if variant < 2 and min(x.shape[2:]) > 1:
        return (layers.MAX_POOL, layers.AVG_POOL)[variant][dims - 1](2, ceil_mode=True)
    return nn.Upsample(scale_factor=2) if variant < 4 else nn.AdaptiveAvgPool1d(3) if dims == 1 else nn.Identity()


def _normed_weight(dims: int, channels: int, variant: int, width: int) -> nn.Module:
    wrap = nn.utils.parametrizations.weight_norm if variant % 2 == 0 else nn.utils.parametrizations.spectral_norm
    return wrap(layers.conv(dims, channels, width, 3))


PATTERNS: Mapping[str, Callable[[int, Tensor, Tensor, int, int], nn.Module]] = {
    "conv": lambda d, x, y, v, w: layers.conv(d, x.shape[1], w, 1 + 2 * (v % 2), stride=1 + (v >= 4), bias=v < 3),
    "norm": lambda d, x, y, v, w: _norm(d, x.shape[1], v),
    "activation": lambda d, x, y, v, w: _activation(x.shape[1], v + w),
    "binary": lambda d, x, y, v, w: layers.Binary(d, x, y, v),
    "concat": lambda d, x, y, v, w: layers.Concat(d, x, y, v),
    "split": lambda d, x, y, v, w: layers.Split(x.shape[1], v),
    "pick": lambda d, x, y, v, w: layers.Pick(d, x.shape[1], v),
    "shuffle": lambda d, x, y, v, w: layers.Shuffle(2 if x.shape[1] % 2 == 0 else 1, v % 3),
    "grouped": lambda d, x, y, v, w: _grouped(d, x.shape[1], v, w),
    "transposed": lambda d, x, y, v, w: _transposed(d, x.shape[1], v, w),
    "squeeze": lambda d, x, y, v, w: layers.SqueezeExcite(d, x.shape[1], v % 3),
    "twice": lambda d, x, y, v, w: layers.Twice(d, x.shape[1], v % 3),
    "slice_add": lambda d, x, y, v, w: layers.SliceAdd(d, x.shape[1], v % 3),
    "reorder": lambda d, x, y, v, w: layers.Reorder(x.shape[1], v),
    "pad": lambda d, x, y, v, w: layers.Pad(d, v),
    "resample": lambda d, x, y, v, w: _resample(d, x, v),
    "functional": lambda d, x, y, v, w: layers.Functional(d, x.shape[1], w, v),
    "standardised": lambda d, x, y, v, w: layers.Standardised(d, x.shape[1], w, v),
    "channels_last": lambda d, x, y, v, w: layers.ChannelsLast(x.shape[1], w, v % 3),
    "across": lambda d, x, y, v, w: layers.AcrossChannels(d, x.shape[1], v % 5),
    "selective": lambda d, x, y, v, w: layers.SelectiveKernel(d, x.shape[1]),
    "normed_weight": lambda d, x, y, v, w: _normed_weight(d, x.shape[1], v, w),
    "attention": lambda d, x, y, v, w: layers.Attention(x.shape[1], w),
}
"""Pattern → its module, from the rank of space, two activations, a variant of 0 to 5, and a width."""

TWO_INPUTS = (layers.Binary, layers.Concat)


class RandomCNN(nn.Module):
    """The interpreter of a program."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.head_kind = program.head
        self.steps: list[tuple[str, tuple[int, ...]]] = []
        self.stem, self.body = layers.conv(program.dims, 3, 8, 3), nn.ModuleDict()
        self.unused = nn.Conv2d(3, 5, 1)
        with torch.no_grad():
            values = [self.stem.eval()(torch.zeros(2, 3, *SIDES[program.dims]))]
            for number, instruction in enumerate(program.instructions):
                self._add(f"{instruction.pattern}{number}", program, instruction, values)
        channels, places = values[-1].shape[1], values[-1][0, 0].numel()
        self.fc = nn.Linear(channels * (places if program.head == 1 else 1), 5)
        self.dense = layers.conv(program.dims, channels, 4)
        self.side = nn.Linear(values[len(values) // 2].shape[1], 3)

    def _add(self, name: str, program: Program, instruction: Instruction, values: list[Tensor]) -> None:
        first, second = (len(values) - 1 - back % len(values) for back in (instruction.first, instruction.second))
        width = WIDTHS[instruction.width % len(WIDTHS)]
        x, y = values[first], values[second]
        least = {"split": 3, "pick": 2}.get(instruction.pattern, 1)
        halves = instruction.pattern == "split" and instruction.variant in (0, 3)
        if x.shape[1] < least or (halves and x.shape[1] % 2):
            return
        module = PATTERNS[instruction.pattern](program.dims, x, y, instruction.variant, width)
        args = (first, second) if isinstance(module, TWO_INPUTS) else (first,)
        found = module.eval()(*(values[number].clone() for number in args))
        outputs = found if isinstance(found, tuple) else (found,)
        if any(out.shape[1] > MAX_CHANNELS or out[0, 0].numel() > MAX_PLACES for out in outputs):
            return
        self.body[name] = nn.Sequential(nn.Sequential(module)) if program.nested and len(args) == 1 else module
        self.steps.append((name, args))
        values.extend(outputs)

    def forward(self, x: Tensor) -> Any:
        values = [self.stem(x)]
        for name, args in self.steps:
            found = self.body[name](*(values[number] for number in args))
            values.extend(found if isinstance(found, tuple) else (found,))
        last = values[-1]
        if self.head_kind == 1:
            return self.fc(last.flatten(1))
        if self.head_kind == 2:
            return self.dense(F.relu(last))
        logits = self.fc(last.mean(layers.space(last)))
        if self.head_kind == 3:
            side = values[len(values) // 2]
            return {"logits": logits, "side": (self.side(side.flatten(2).mean(2)),)}
        return logits


def _program(dims: int, drawn: list[tuple[int, ...]], salt: int, head: int, nested: bool) -> Program:
    """Spread what was drawn over the patterns: hypothesis likes to draw one thing several times."""
    names = list(PATTERNS)
    listed = [
        Instruction(
            names[(pattern + salt * place) % len(names)], first, second, (variant + salt // 7 * place) % 6, width
        )
        for place, (pattern, first, second, variant, width) in enumerate(drawn, start=1)
    ]
    return Program(dims, tuple(listed), head, nested)


def programs(max_size: int = 8) -> st.SearchStrategy[Program]:
    """Draw a network, 2-D more often than 1-D and 3-D; smaller numbers are simpler."""
    back, choice = st.integers(0, 4), st.integers(0, 5)
    drawn = st.tuples(st.integers(0, len(PATTERNS) - 1), back, back, choice, choice)
    listed = st.lists(drawn, min_size=1, max_size=max_size)
    dims = st.sampled_from([2, 2, 1, 3])
    return st.builds(_program, dims, listed, st.integers(0, 999), st.integers(0, 3), st.booleans())


@dataclass(frozen=True)
class Outcome:
    """What became of a random network, and the reason.

    ``equal`` (also ``with the same statistics``), ``mixing`` where those cannot be played back, ``refused``, or
    ``cannot follow``.
    """

    kind: str
    reason: str = ""
    removed: int = 0


def _outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tree_flatten(model(x.clone()))[0]


def _clear(error: ArchscanError) -> str:
    """See that a refusal is a sentence that says something."""
    message = str(error)
    assert len(message) > 20, message
    assert "\n" not in message, message
    return message


def _check_price(coupling: Coupling, slim: nn.Module, x: Tensor, widths: list[int]) -> None:
    """See that the price of the widths is that of the slim network, captured again."""
    full = np.array([group.steps for group in coupling.groups])
    assert coupling.graph is not None
    assert coupling.sizes is not None
    predicted = cost_model(coupling.graph, coupling.sizes, coupling.parameters, full)
    graph = capture(slim, x)
    own = cost_model(graph, constant_sizes(graph), {}, np.zeros(0, dtype=np.int64))
    assert predicted.evaluate("macs", np.array(widths)) == own.evaluate("macs", np.zeros(0, dtype=np.int64))
    assert predicted.evaluate("params", np.array(widths)) == sum(tensor.numel() for tensor in slim.parameters())


def check(program: Program, seed: int) -> Outcome:
    """Slim the network of a program at random and prove it.

    Raises:
        AssertionError: It is wrong.
    """
    torch.manual_seed(seed)
    model = randomised(RandomCNN(program), seed)
    x = torch.randn(2, 3, *SIDES[program.dims], dtype=torch.float64)
    dense = _outputs(model, x)
    try:
        coupling = couple(model, x)
    except (UnsupportedOp, BadInput) as error:
        return Outcome("refused", _clear(error))
    kept = random_kept(coupling, seed)
    try:
        slim = rebuild(model, x, coupling, kept).model.eval()
    except CannotFollow:
        try:
            coupling = settle(model, x, coupling, kept).coupling
            kept = narrowed(coupling, seed)
            slim = rebuild(model, x, coupling, kept).model.eval()
        except CannotFollow as error:
            return Outcome("cannot follow", _clear(error))
    found = _outputs(slim, x)
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in dense]
    _check_price(coupling, slim, x, [len(kept[group.name][0]) for group in coupling.groups])
    removed = sum((group.steps - len(kept[group.name][0])) * len(group.units) for group in coupling.groups)
    reference, kind = masked(model, coupling, kept), "equal"
    if coupling.mixing:
        assert all(bool(tensor.isfinite().all()) for tensor in found)
        played = run_with_same_statistics(reference, slim, coupling, lambda network: _outputs(network, x))
        if played is None:
            return Outcome("mixing", coupling.mixing[0], removed)
        expected, found, kind = played.expected, played.found, "equal with the same statistics"
    else:
        expected = _outputs(reference, x)
    scale = max(float(tensor.abs().max()) for tensor in expected)
    error_ = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
    assert error_ <= TOLERANCE * max(scale, 1e-30), f"the outputs differ by {error_:.3g} of {scale:.3g}"
    return Outcome(kind, "", removed)
