"""Random CNNs: each is refused with a clear reason, or its slim network is the masked original."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import archscan  # noqa: F401 - before anything that may import torchvision
from tests.random_cnn import PATTERNS, Instruction, Program, check, programs

# The process is the same each time, and a slow machine is no failure.
_STEADY = settings(
    max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@_STEADY
@given(program=programs(), seed=st.integers(0, 3))
def test_random_network_is_refused_or_proven(program, seed):
    check(program, seed)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("variant", range(6))
def test_each_pattern_is_refused_or_proven(pattern, variant):
    before, after = Instruction("conv", variant=1, width=variant), Instruction("conv", variant=1, width=1)
    check(Program(instructions=(before, Instruction(pattern, 0, 1, variant, 2), after)), seed=variant)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("head", range(4))
def test_every_head_and_rank_is_proven(dims, head):
    listed = (Instruction("conv", variant=1), Instruction("norm"), Instruction("binary", second=1))
    outcome = check(Program(dims, listed, head, nested=True), seed=1)
    assert outcome.kind == "equal"
    assert outcome.removed


def test_zeros_after_channels_that_were_last_can_follow():
    listed = (Instruction("channels_last", variant=3), Instruction("channels_last", variant=2), Instruction("pad"))
    assert check(Program(instructions=listed), seed=0).kind == "equal with the same statistics"


def test_rows_that_differ_only_where_they_are_frozen_come_to_an_end():
    # The rows of the normalisation's groups were tied again and again: what differs between them could not be united.
    before = [("pad", 0, 0), ("pad", 0, 0), ("concat", 4, 0), ("slice_add", 2, 0), ("standardised", 0, 0)]
    after = [("slice_add", 0, 0), ("channels_last", 0, 0), ("norm", 4, 4)]
    listed = tuple(Instruction(name, first=first, variant=variant) for name, first, variant in [*before, *after])
    outcome = check(Program(instructions=listed, head=2), seed=283)
    assert (outcome.kind, outcome.removed) == ("equal with the same statistics", 3)


def test_a_reshape_that_no_longer_copies_does_not_let_a_relu_change_what_others_read():
    before = [("normed_weight", 0, 0, 5), ("channels_last", 0, 4, 0), ("standardised", 0, 0, 0)]
    after = [("shuffle", 1, 3, 0), ("resample", 0, 4, 0), ("activation", 0, 2, 1), ("pad", 4, 2, 0)]
    listed = tuple(Instruction(name, first, 0, variant, width) for name, first, variant, width in [*before, *after])
    outcome = check(Program(instructions=listed), seed=1)
    assert (outcome.kind, outcome.removed) == ("equal with the same statistics", 5)
