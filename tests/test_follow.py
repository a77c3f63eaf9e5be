"""Sizes that a forward hard-codes: they are found, written down, and reported where they are out of reach."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import archscan  # noqa: F401 - before anything that may import torchvision
from archscan.capture import capture
from archscan.divergence import divergence
from archscan.follow import CannotFollow, Clue, attributes_of, follow
from archscan.groups import couple
from archscan.rebuild import apply, predict, rebuild
from archscan.surgery import Cut, Surgery, named_tensors


class Splits(nn.Module):
    """A forward that hard-codes a split in two attributes, one of them a list, and the groups of a fixed blur."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.kernel, self.parts, self.blurred = 3, [3, 5], 8
        self.register_buffer("blur", torch.ones(8, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(self.stem(x), self.blur, groups=self.blurred)
        a, b = torch.split(y, self.parts, 1)
        return self.head(torch.cat([a.relu(), b], 1)) + self.right(self.left(x))


def test_split_sizes_and_groups_follow() -> None:
    model, x = Splits(), torch.randn(2, 3, 4, 4)
    graph = capture(model, x)
    blur = (Cut(0, (1, 2, 3, 4, 7)),)
    slim = apply(
        model, Surgery({"stem.weight": blur, "stem.bias": blur, "blur": blur, "head.weight": (Cut(1, blur[0].kept),)})
    )
    new_sizes = {8: 5, 3: 2}
    predicted = [
        tuple(
            new_sizes.get(size, size) if axis == 1 and len(value.shape) == 4 else size
            for axis, size in enumerate(value.shape)
        )
        for value in graph.values
    ]
    for number, value in enumerate(graph.values):
        if value.kind == "parameter":
            predicted[number] = tuple(dict(named_tensors(slim))[value.name].shape)
        elif value.kind == "buffer":
            predicted[number] = (5, 1, 1, 1)
        elif value.kind == "input":
            predicted[number] = value.shape
        elif value.shape[1] == 5:
            predicted[number] = (2, 3, 4, 4)
    found = attributes_of(follow(slim, x, graph, predicted, {}))
    assert found == {"": {"blurred": 5, "parts": (2, 3)}}
    assert slim.parts == [2, 3]
    assert slim.kernel == 3
    assert slim(x).shape == (2, 2, 4, 4)
    again = apply(
        model,
        Surgery({"stem.weight": blur, "stem.bias": blur, "blur": blur, "head.weight": (Cut(1, blur[0].kept),)}, found),
    )
    torch.testing.assert_close(again(x), slim(x))


class PaddedShortcut(nn.Module):
    """The option-A shortcut of a CIFAR ResNet: channels of zeros before and after, equally many at first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 2)
        self.pad_before, self.pad_after = 2, 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        shortcut = F.pad(x, (0, 0, 0, 0, self.pad_before, self.pad_after))
        return self.head((self.body(x) + shortcut).mean((2, 3)))


@pytest.mark.parametrize("places", [(0, 2, 3, 5), (1, 2, 6, 7), (0, 1, 2, 4), (3, 4, 6, 7), (2, 3, 4, 5)])
def test_amounts_of_padding_follow_in_order(places: tuple[int, ...]) -> None:
    model, x = PaddedShortcut(), torch.randn(2, 3, 5, 5)
    inner = tuple(place - 2 for place in places if 2 <= place < 6)
    cuts = {
        "stem.weight": (Cut(0, inner),),
        "stem.bias": (Cut(0, inner),),
        "body.weight": (Cut(0, places), Cut(1, inner)),
        "body.bias": (Cut(0, places),),
        "head.weight": (Cut(1, places),),
    }
    graph, slim = capture(model, x), apply(model, Surgery(cuts))
    named = dict(named_tensors(slim))
    sizes = {4: len(inner), 8: len(places)}
    predicted = [
        tuple(named[value.name].shape)
        if value.kind == "parameter"
        else (value.shape[0], sizes.get(value.shape[1], value.shape[1]), *value.shape[2:])
        if len(value.shape) > 1 and value.kind == "activation" and value.shape[1] > 2
        else value.shape
        for value in graph.values
    ]
    for node in graph.nodes:  # the transposed weight of the linear layer
        if node.op is torch.ops.aten.t.default:
            predicted[node.outputs[0]] = (len(places), 2)
    pad = next(number for number, node in enumerate(graph.nodes) if node.op is torch.ops.aten.constant_pad_nd.default)
    before, after = sum(place < 2 for place in places), sum(place >= 6 for place in places)
    follow(slim, x, graph, predicted, {pad: [(2, before), (2, after)]})
    assert (slim.pad_before, slim.pad_after) == (before, after)


class PlainNorms(nn.Module):
    """A LayerNorm without parameters, whose size only its attribute tells."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(3, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x)))


class Stubborn(nn.Module):
    """A forward with a number in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).reshape(len(x), 6, -1).sum(1)


def test_number_in_the_code_is_reported_with_its_module() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), Stubborn()), torch.randn(2, 3, 4, 4)
    graph = capture(model, x)
    half = (Cut(0, (0, 1, 2)),)
    slim = apply(model, Surgery({"1.inner.weight": half, "1.inner.bias": half}))
    named = dict(named_tensors(slim))
    predicted = [
        tuple(named[value.name].shape)
        if value.kind == "parameter"
        else (2, 3, *value.shape[2:])
        if value.shape[1:2] == (6,)
        else value.shape
        for value in graph.values
    ]
    with pytest.raises(CannotFollow, match="the forward of 1 cannot run") as caught:
        follow(slim, x, graph, predicted, {})
    assert caught.value.module == "1"


class ThreeParts(nn.Module):
    """A split by one list of sizes, the first two equal: the width of either may change alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 9, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)
        self.parts, self.unread = [4, 4, 1], 4

    def forward(self, x: Tensor) -> Tensor:
        first, second, gate = torch.split(self.stem(x), self.parts, 1)
        return (self.first(first) + self.second(second)) * gate


@pytest.mark.parametrize("widths", [(3, 4), (4, 3), (2, 3), (3, 3)])
def test_of_equal_sizes_in_one_attribute_some_may_stay(widths: tuple[int, int]) -> None:
    model, x = ThreeParts(), torch.randn(2, 3, 5, 5)
    coupling = couple(model, x)
    live = [group for group in coupling.groups if group.frozen is None and group.steps == 4]
    wanted = {group.name: width for group, width in zip(live, widths, strict=True)}
    kept = {
        group.name: (tuple(range(wanted.get(group.name, group.steps))),) * len(group.units) for group in coupling.groups
    }
    slim = rebuild(model, x, coupling, kept)
    assert slim.surgery.attributes == {"": {"parts": (*widths, 1)}}


class StubbornWithSizes(Stubborn):
    """Attributes that equal the number in the code, none of which is read."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(20):
            setattr(self, f"unread_{number}", 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).reshape(len(x), 6, 4, 4).sum(1)


def test_attributes_that_no_forward_reads_are_never_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, runs = nn.Sequential(nn.Conv2d(3, 3, 1), StubbornWithSizes()), torch.randn(2, 3, 4, 4), []
    graph = capture(model, x)
    half = (Cut(0, (0, 1, 2)),)
    slim = apply(model, Surgery({"1.inner.weight": half, "1.inner.bias": half}))
    sizes = {(6,): (3,), (6, 3, 1, 1): (3, 3, 1, 1), (2, 6, 4, 4): (2, 3, 4, 4)}
    predicted = [sizes.get(value.shape, value.shape) for value in graph.values]
    monkeypatch.setattr("archscan.follow.divergence", lambda *given: runs.append(given) or divergence(*given))
    with pytest.raises(CannotFollow, match="is invalid for input of size 96"):  # what PyTorch said
        follow(slim, x, graph, predicted, {})
    assert len(runs) == 1
    assert type(slim[1]) is StubbornWithSizes


class Table(nn.Module):
    """A shape in an attribute that only a method reads, not a forward."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.table, self.table_shape = nn.Parameter(torch.randn(5 * heads)), (5, heads)

    def shaped(self) -> Tensor:
        return self.table.view(self.table_shape)


class Heads(nn.Module):
    """Heads whose number shows only times the batch; a reshape has to copy with several of them, and not with one."""

    def __init__(self, heads: int = 4, hidden: int = 9) -> None:
        super().__init__()
        self.heads, self.mix, self.head = heads, nn.Linear(8, 2 * heads), nn.Linear(2 * heads, 8)
        self.bias, self.up, self.down = Table(heads), nn.Linear(8, hidden), nn.Linear(hidden, 8)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixed(x) * self.bias.shaped().sum()
        return self.head(mixed) + self.down(self.up(x).relu())

    def mixed(self, x: Tensor) -> Tensor:
        mixed = self.mix(x).transpose(1, 2).reshape(len(x) * self.heads, 2, -1)
        return mixed.relu().view(len(x), 2 * self.heads, -1).transpose(1, 2).contiguous()


class HeadsAlone(Heads):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixed(x))


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_a_reshape_is_the_same_whether_or_not_it_copies(heads: int) -> None:
    model, x = Heads(), torch.randn(2, 5, 8)
    assert divergence(Heads(heads), x, capture(model, x), None, {}) is None


@pytest.mark.parametrize(
    ("dense", "slim"),
    [
        (((4, 9), (6, 9), (5, 9)), ((3, 9), (4, 9), (2, 9))),
        (((4, 9), (4, 4), (5, 9)), ((3, 9), (4, 2), (2, 9))),  # what helps in the first block is wrong in the second
    ],
)
def test_factors_and_what_methods_read_follow_in_every_block(
    dense: tuple[tuple[int, int], ...], slim: tuple[tuple[int, int], ...]
) -> None:
    model, x = nn.Sequential(*(Heads(*sizes) for sizes in dense)), torch.randn(2, 5, 8)
    wanted = nn.Sequential(*(Heads(*sizes) for sizes in slim))
    cuts = {
        name: tuple(Cut(axis, tuple(range(size))) for axis, size in enumerate(tensor.shape))
        for name, tensor in named_tensors(wanted)
    }
    predicted = [value.shape for value in capture(wanted, x).values]
    found = attributes_of(follow(apply(model, Surgery(cuts)), x, capture(model, x), predicted, {}))
    expected = {}
    for number, ((heads, _), (fewer, _)) in enumerate(zip(dense, slim, strict=True)):
        if fewer < heads:
            expected |= {f"{number}": {"heads": fewer}, f"{number}.bias": {"table_shape": (5, fewer)}}
    assert found == expected


def test_a_size_that_shows_only_as_a_factor_follows() -> None:
    model, wanted, x = HeadsAlone(4), HeadsAlone(3), torch.randn(2, 5, 8)
    cuts = {
        name: tuple(Cut(axis, tuple(range(size))) for axis, size in enumerate(tensor.shape))
        for name, tensor in named_tensors(wanted)
    }
    predicted = [value.shape for value in capture(wanted, x).values]
    found = attributes_of(follow(apply(model, Surgery(cuts)), x, capture(model, x), predicted, {}))
    assert found == {"": {"heads": 3}}


class Cube(nn.Module):
    """A shape in an attribute, all of whose sizes are the same at first; the last one is the width."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.table, self.shape = nn.Parameter(torch.randn(16 * width)), (4, 4, width)
        self.up, self.down = nn.Linear(6, width), nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x) * self.table.view(self.shape).sum((0, 1)))


def cubes(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(Cube(width) for width in widths))


def _follow_cubes(widths: tuple[int, ...], likely: tuple[Clue, ...] = ()) -> tuple[Clue, ...]:
    model, wanted, x = cubes(*[4] * len(widths)), cubes(*widths), torch.randn(2, 6)
    cuts = {
        name: tuple(Cut(axis, tuple(range(size))) for axis, size in enumerate(tensor.shape))
        for name, tensor in named_tensors(wanted)
    }
    predicted = [value.shape for value in capture(wanted, x).values]
    clues = follow(apply(model, Surgery(cuts)), x, capture(model, x), predicted, {}, likely)
    assert attributes_of(clues) == {f"{number}": {"shape": (4, 4, width)} for number, width in enumerate(widths)}
    return clues


def test_what_helped_once_is_not_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Any] = []
    monkeypatch.setattr("archscan.follow.divergence", lambda *given: runs.append(given) or divergence(*given))
    clues = _follow_cubes((3, 2, 3, 1, 3, 2))
    assert len(runs) < 10  # of one block: seven ways to change a shape of three equal sizes
    runs.clear()
    _follow_cubes((2, 3, 3, 2, 1, 1), clues)
    assert len(runs) == 2


class Branches(nn.Module):
    """A Res2Net-like block: one width in an attribute, by which the channels are split between two convolutions."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 2 * width, 1), nn.Conv2d(width, 3, 1), nn.Conv2d(width, 3, 1)
        self.width, self.scale = width, 2

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.split(self.stem(x), self.width, 1)
        return self.first(first) + self.second(second)


def deep() -> nn.Sequential:
    return nn.Sequential(*(Branches(width) for width in (3, 4, 4, 5)))


@pytest.mark.parametrize("make", [Branches, deep, PaddedShortcut, PlainNorms])
def test_coupling_foretells_the_run(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn((2, 3) if make is PlainNorms else (2, 3, 5, 5))
    coupling = couple(model, x)
    kept = {
        group.name: tuple(
            tuple(range(group.steps) if group.frozen is not None else range(group.steps - 1)) for _ in group.units
        )
        for group in coupling.groups
    }
    slim = rebuild(model, x, coupling, kept)
    predicted, _ = predict(coupling, kept)
    graph = capture(slim.model, x)
    assert predicted == [value.shape for value in graph.values]
    assert slim.surgery.attributes
    assert Surgery.from_json(json.loads(json.dumps(slim.surgery.to_json())), model) == slim.surgery
    torch.testing.assert_close(apply(model, slim.surgery)(x), slim.model(x), rtol=0, atol=0)


def test_interruption_leaves_no_mode_behind() -> None:
    class Interrupted(Branches):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            if self.width < 4:
                raise KeyboardInterrupt
            return x

    model, x = Interrupted(), torch.randn(2, 3, 4, 4)
    coupling = couple(model, x)
    kept = {
        group.name: tuple(tuple(range(group.steps - (group.frozen is None))) for _ in group.units)
        for group in coupling.groups
    }
    with pytest.raises(KeyboardInterrupt):
        rebuild(model, x, coupling, kept)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert not torch.nn.modules.module._global_forward_pre_hooks
