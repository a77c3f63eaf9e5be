"""Outputs on meta are those of the ops, the first time and when they are remembered."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import archscan.meta_shapes
from archscan.capture import capture
from archscan.divergence import divergence
from archscan.rebuild import hollow
from archscan.spies import Spies

ATEN = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def facts(result: Any) -> list[Any]:
    outputs = result if isinstance(result, tuple) else (result,)
    return [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device.type) for tensor in outputs]


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    outputs: dict[Any, Any] = {}
    monkeypatch.setattr(archscan.meta_shapes, "_remembered", outputs)
    return outputs


CASES = {
    "relu": (ATEN.relu.default, (meta(2, 3, 4, 4),), {}),
    "relu, channels last": (ATEN.relu.default, (meta(2, 3, 4, 4).to(memory_format=torch.channels_last),), {}),
    "relu, transposed": (ATEN.relu.default, (meta(2, 3, 4).transpose(1, 2),), {}),
    "sum that broadcasts": (ATEN.add.Tensor, (meta(2, 3, 1), meta(3, 4)), {}),
    "sum of two types": (ATEN.add.Tensor, (meta(2, 3, dtype=torch.float32), meta(2, 3)), {}),
    "mean": (ATEN.mean.dim, (meta(2, 3, 4, 4), [2, 3], True), {}),
    "cat": (ATEN.cat.default, ([meta(2, 3, 4), meta(2, 5, 4)], 1), {}),
    "several outputs": (ATEN.max_pool2d_with_indices.default, (meta(2, 3, 8, 8), [2, 2]), {}),
    "convolution": (
        ATEN.convolution.default,
        (meta(2, 3, 8, 8), meta(5, 3, 3, 3), None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1),
        {},
    ),
    "batch norm": (
        ATEN.native_batch_norm.default,
        (meta(2, 3, 4, 4), meta(3), meta(3), meta(3), meta(3), True, 0.1, 1e-5),
        {},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_are_those_of_the_op(case: tuple[Any, Any, Any], remembered: dict[Any, Any]) -> None:
    op, args, kwargs = case
    expected = facts(op(*args, **kwargs))
    assert facts(archscan.meta_shapes.run(op, args, kwargs)) == expected
    known = len(remembered)
    assert facts(archscan.meta_shapes.run(op, args, kwargs)) == expected
    assert len(remembered) == known == (op is not ATEN.native_batch_norm.default)


def test_numbers_that_are_equal_are_not_the_same(remembered: dict[Any, Any]) -> None:
    whole = meta(2, dtype=torch.int64)
    dtypes = [archscan.meta_shapes.run(ATEN.mul.Tensor, (whole, number), {}).dtype for number in (1, 1.0, True)]
    assert dtypes == [torch.int64, torch.float32, torch.int64]
    assert len(remembered) == 3


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (ATEN.view.default, (meta(2, 3), [6])),  # shares its input's memory
        (ATEN.add_.Tensor, (meta(2, 3), 1.0)),  # changes its input
        (ATEN.bernoulli.default, (meta(2, 3),)),  # random
        (ATEN.relu.default, (torch.ones(2, 3),)),  # has values
        (ATEN.abs.default, (meta(2, 3, dtype=torch.complex64),)),
        (ATEN.unbind.int, (meta(2, 3),)),
    ],
    ids=str,
)
def test_what_sizes_do_not_decide_is_not_remembered(op: Any, args: Any, remembered: dict[Any, Any]) -> None:
    archscan.meta_shapes.run(op, args, {})
    assert not remembered


def test_in_place_ops_return_their_input(remembered: dict[Any, Any]) -> None:
    data = meta(2, 3)
    assert archscan.meta_shapes.run(ATEN.relu_.default, (data,), {}) is data


def test_all_is_forgotten_before_it_is_too_much(remembered: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archscan.meta_shapes, "_MOST", 3)
    for size in range(1, 6):
        archscan.meta_shapes.run(ATEN.relu.default, (meta(size),), {})
        assert len(remembered) <= 3
    assert remembered


class Cached(nn.Module):
    """Caches a table, which a change of mode drops, and reads a transposed input."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Parameter(torch.ones(4)), nn.Linear(5, 4)
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "Cached":
        self.cache = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type not in self.cache:
            self.cache[x.device.type] = self.table * 2
        return self.body(x.transpose(1, 2)) * self.cache[x.device.type]


@pytest.mark.parametrize("bare", [False, True])
def test_a_network_runs_every_time_as_it_was_recorded(bare: bool) -> None:
    model, x = Cached().eval(), torch.randn(2, 5, 3)
    graph = capture(model, x)
    for _ in range(2):
        assert divergence(hollow(model, graph) if bare else model, x, graph, None, {}) is None


class Sizes(nn.Module):
    """Sizes that a forward reads, writes, and leaves alone."""

    width = 5

    def __init__(self) -> None:
        super().__init__()
        self.read, self.parts, self.left, self.calls, self.name = 3, [1, 2], 4, 0, "sizes"

    def forward(self) -> int:
        self.calls += 1
        return self.read + sum(self.parts) + self.width + len(self.name)


def test_sizes_that_are_read_are_noted_by_module() -> None:
    wide = Sizes()
    wide.width = 7
    model = nn.ModuleDict({"plain": Sizes(), "wide": wide})
    spies = Spies(model)
    for _ in range(2):
        with spies.watching() as reads:
            assert (model["plain"](), model["wide"]()) == (16, 18)
        assert reads == {"": set(), "plain": {"read", "parts", "calls"}, "wide": {"read", "parts", "calls", "width"}}
    assert type(model["plain"]) is Sizes
    assert vars(wide)["calls"] == 2


class Optional(nn.Module):
    """An attribute that only some modules of a class have, and which a forward may remove."""

    def __init__(self, width: int | None) -> None:
        super().__init__()
        if width is not None:
            self.width = width

    def forward(self) -> int:
        if not hasattr(self, "width"):
            return 0
        width = self.width
        del self.width
        return width


def test_an_attribute_may_be_missing() -> None:
    model = nn.ModuleDict({"with": Optional(3), "without": Optional(None)})
    with Spies(model).watching() as reads:
        assert (model["with"](), model["without"](), model["with"]()) == (3, 0, 0)
    assert reads == {"": set(), "with": {"width"}, "without": set()}
