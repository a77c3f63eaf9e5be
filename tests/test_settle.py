"""What a forward ties or holds is found, and no more: groups that are tied, frozen as few as will do, and all else."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import archscan
from archscan.errors import BadInput, InfeasibleBudget
from archscan.follow import CannotFollow
from archscan.groups import Coupling, couple, freeze
from archscan.planner import Budget
from archscan.rebuild import rebuild
from archscan.recount import recount
from archscan.replan import Wish, plan_and_rebuild, priced
from archscan.results import Analysis
from archscan.settle import narrowed, settle
from archscan.surgery import kept_units
from archscan.ties import tie
from archscan.verify import prove
from archscan.widths import WidthRule

IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class TwoWidths(nn.Module):
    """One number for two widths: those of a part of the input, and of what is computed from it."""

    def __init__(self, channels: int = 12, part: int = 4) -> None:
        super().__init__()
        self.channels, self.part = channels, part
        self.inner, self.outer = nn.Conv2d(part, part + 1, 3, padding=1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = torch.split(x, [self.part, self.channels - self.part], 1)
        made, gate = torch.split(self.inner(first), [self.part, 1], 1)
        return x + self.outer(torch.cat([made * gate.sigmoid(), rest], 1))


class Reshaped(nn.Module):
    """The size of the input, read at run time, is the shape that heads are joined to."""

    def __init__(self, channels: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.each, self.heads = nn.Conv2d(channels, channels, 1), heads
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.each(x).reshape(len(x), self.heads, -1, *x.shape[2:]).relu()
        return x + self.out(heads.reshape(x.shape))


class Covariant(nn.Module):
    """Heads whose channels attend to each other, joined to the width of the input."""

    def __init__(self, channels: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.code = heads, nn.Conv2d(1, channels, 1)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        coded = x + self.code(torch.ones(len(x), 1, *x.shape[2:], dtype=x.dtype, device=x.device))
        tokens = coded.flatten(2).transpose(1, 2)
        n, places, width = tokens.shape
        q, k, v = self.qkv(tokens).reshape(n, places, 3, self.heads, -1).permute(2, 0, 3, 4, 1).unbind(0)
        made = (q @ k.transpose(2, 3) * 0.1).softmax(-1) @ v
        return x + self.out(made.permute(0, 3, 1, 2).reshape(n, places, width)).transpose(1, 2).reshape(x.shape)


class Held(nn.Module):
    """A number in the code holds one width of three."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 10, 1), nn.Conv2d(10, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).relu()).view(len(x), 10, -1).relu().view(len(x), 10, *x.shape[2:]))


class Chunks(nn.Module):
    """Uneven chunks, whose sizes follow from the sum of all."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(10, 10, 1, groups=10), nn.Conv2d(28, 12, 1)
        self.stem = nn.Conv2d(12, 28, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.stem(x).chunk(3, 1)
        first = self.one(first)
        return self.two(torch.cat([first, self.one(first + second), last], 1))


def network(*blocks: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 12, 1), *blocks, nn.Conv2d(12, 2, 1)).eval()


def check(model: nn.Module, coupling: Coupling, seed: int) -> None:
    """Cut at random; the slim network is proven and costs what was foretold."""
    kept = narrowed(coupling, seed, full=0.2)
    slim = rebuild(model, IMAGE, coupling, kept)
    assert prove(model, slim.model, slim.surgery, coupling, kept, IMAGE).passed
    widths_G = np.array([len(kept[group.name][0]) for group in coupling.groups])
    assert recount(slim.model, IMAGE).macs == priced(coupling).evaluate("macs", widths_G)
    params = sum(parameter.numel() for parameter in slim.model.parameters())
    assert params == priced(coupling).evaluate("params", widths_G)


def live(coupling: Coupling) -> dict[str, str]:
    """Name the groups that may change, with their fibres and steps."""
    return {g.name: f"{len(g.units)}x{g.steps}" for g in coupling.groups if g.frozen is None and g.steps > 1}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (TwoWidths, {"0": "2x4", "0#2": "1x8"}),
        (Reshaped, {"0": "6x4"}),
        (Covariant, {"0": "5x3"}),
        (Held, {"0": "1x12", "1.first": "1x8", "1.third": "1x12"}),
    ],
)
def test_as_little_as_possible_is_tied_or_frozen(make: Callable[[], nn.Module], expected: dict[str, str]) -> None:
    model = network(make())
    coupling = couple(model, IMAGE)
    with pytest.raises(CannotFollow):
        rebuild(model, IMAGE, coupling, narrowed(coupling, 0))
    settled = settle(model, IMAGE, coupling)
    assert live(settled.coupling) == expected
    assert len(settled.notes) == 1
    assert ("narrowed together" if make is not Held else "1.second keeps the full width") in settled.notes[0]
    assert settled.coupling.unit_count == coupling.unit_count
    for seed in range(3):
        check(model, settled.coupling, seed)


def test_uneven_chunks_keep_their_proportions() -> None:
    model = network(Chunks())
    settled = settle(model, IMAGE, couple(model, IMAGE))
    assert "1.stem" in live(settled.coupling)
    for seed in range(3):
        check(model, settled.coupling, seed)


def test_what_follows_is_left_alone() -> None:
    model = network(nn.Conv2d(12, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 1))
    coupling = couple(model, IMAGE)
    settled = settle(model, IMAGE, coupling)
    assert (settled.coupling, settled.notes) == (coupling, ())


def test_what_helped_once_is_done_in_every_block_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def trials(blocks: int) -> int:
        model, count = network(*(TwoWidths() for _ in range(blocks))), 0
        real = archscan.settle.rehearsed

        def counted(*arguments: object) -> object:
            nonlocal count
            count += 1
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr("archscan.settle.rehearsed", counted)
            settled = settle(model, IMAGE, couple(model, IMAGE))
        assert live(settled.coupling) == {"0": f"{blocks + 1}x4", "0#2": "1x8"}
        return count

    assert trials(7) == trials(3)


def test_planning_settles_once_and_says_so() -> None:
    model = network(TwoWidths(), Held(), TwoWidths())
    coupling = couple(model, IMAGE)
    saliency_U = np.random.default_rng(0).random(coupling.unit_count)
    wish = Wish(Budget("macs", 0.6), WidthRule(1), seed=0)
    fitted = plan_and_rebuild(model, IMAGE, Analysis(coupling, priced(coupling)), saliency_U, wish)
    slim, made = fitted.rebuilt, fitted.plan
    assert 0.5 < made.after.macs / made.before.macs <= 0.6
    assert recount(slim.model, IMAGE).macs == made.after.macs
    assert prove(model, slim.model, slim.surgery, fitted.analysis.coupling, made.kept, IMAGE).passed
    assert [note.partition(",")[0] for note in fitted.notes] == [
        "1.inner and 0 are narrowed together",
        "2.second keeps the full width",
        "3.inner and 2.third are narrowed together",
    ]
    wish = Wish(Budget("macs", 0.07), WidthRule(1), seed=0)
    with pytest.raises(InfeasibleBudget, match=r"2\.second keeps the full width"):
        plan_and_rebuild(model, IMAGE, Analysis(coupling, priced(coupling)), saliency_U, wish)


# --- tying ------------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(20, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.left(x), self.right(x)], 1))


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000))
def test_tied_groups_lose_the_same_fraction(seed: int) -> None:
    torch.manual_seed(0)
    model = Pair().eval()
    coupling = couple(model, IMAGE)
    tied = tie(coupling, ["right", "left"])
    assert live(tied) == {"left": "5x4"}
    (joint,) = (group for group in tied.groups if group.name == "left")
    assert joint.channels_per_step == 2
    assert {member.tensor for member in joint.members} >= {"left.weight", "right.weight", "out.weight"}
    kept = narrowed(tied, seed)
    assert (~kept_units(tied, kept)).sum() == 5 * (4 - len(kept["left"][0]))
    slim = rebuild(model, IMAGE, tied, kept).model
    assert slim.left.out_channels * 2 == slim.right.out_channels * 3
    check(model, tied, seed)


def test_groups_without_a_common_step_are_not_tied() -> None:
    model = Pair().eval()
    coupling = couple(model, IMAGE)
    for names, other in [
        (["left"], coupling),
        (["left", "wrong"], coupling),
        (["left", "right"], freeze(coupling, {"left": "so"})),
    ]:
        with pytest.raises(BadInput, match="cannot keep one width"):
            tie(other, names)
