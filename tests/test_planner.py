import copy
import itertools
import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from archscan.capture import capture
from archscan.costs import CostModel, Size, constant_sizes, cost_model
from archscan.errors import BadInput, InfeasibleBudget
from archscan.groups import ChannelGroup, Member
from archscan.knapsack import Problem, State
from archscan.planner import Budget, Plan, WidthRule, check_fits, plan, protect, uniform_plan
from archscan.reference_nets import cifar_resnet
from archscan.search import lagrangian, search, uniform
from archscan.slimming import analyse
from archscan.widths import allowed_steps, best_steps, choices


def group(
    name: str, first_unit: int, steps: int, *, fibres: int = 1, channels_per_step: int = 1, frozen=None
) -> ChannelGroup:
    units = tuple(tuple(range(first_unit + f * steps, first_unit + (f + 1) * steps)) for f in range(fibres))
    members = (Member(f"{name}.weight", 0, "out"), Member(f"{name}_norm.bias", 0, "affine"))
    return ChannelGroup(name, units, channels_per_step, members, frozen)


def chain_of_groups(widths: list[int]) -> list[ChannelGroup]:
    first = [0, *itertools.accumulate(widths)]
    return [group(f"stage{i}.conv", first[i], width) for i, width in enumerate(widths)]


def price(model: nn.Module, x: torch.Tensor, widths: list[int]) -> CostModel:
    """Price a network whose widths are told apart by their lengths, which nothing else in it has."""
    number = {width: i for i, width in enumerate(widths)}

    def size(length: int) -> Size:
        return Size(0, {number[length]: 1}) if length in number else Size(length, {})

    graph = capture(model, x)
    parameters = {name: tuple(size(n) for n in p.shape) for name, p in model.named_parameters()}
    return cost_model(graph, lambda v: tuple(size(n) for n in graph.values[v].shape), parameters, np.array(widths))


SMALL = [16, 17, 18]


@cache
def small_costs() -> CostModel:
    """Three groups in a chain: every price depends on its neighbours' widths."""
    layers = [
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 17, 3, stride=2, padding=1),
        nn.Conv2d(17, 18, 1),
        nn.Conv2d(18, 5, 3),
    ]
    return price(nn.Sequential(*layers), torch.zeros(1, 3, 12, 12), SMALL)


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, first: int, second: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, first, 1), nn.BatchNorm2d(first)),
            *(nn.Conv2d(first, second, 3, stride, 1), nn.BatchNorm2d(second)),
            *(nn.Conv2d(second, outputs, 1), nn.BatchNorm2d(outputs)),
        )
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        return self.body(x) + self.shortcut(x)


@cache
def resnet50_like() -> tuple[CostModel, list[int]]:
    """A ResNet-50 whose 37 widths are all different, so that lengths tell groups apart."""
    blocks, widths, inputs = [], [63], 63
    for stage, (count, outputs) in enumerate(zip([3, 4, 6, 3], [264, 520, 1032, 2056], strict=True)):
        widths.append(outputs)
        for block in range(count):
            first = 64 * 2**stage + 16 * block + 1
            widths += [first, first + 8]
            blocks.append(Bottleneck(inputs, first, first + 8, outputs, 2 if stage and not block else 1))
            inputs = outputs
    with torch.device("meta"):
        stem = [nn.Conv2d(3, 63, 7, 2, 3), nn.MaxPool2d(3, 2, 1)]
        model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))
    return price(model, torch.zeros(1, 3, 224, 224), widths), widths


def kept_steps(result: Plan) -> list[int]:
    return [len(fibres[0]) for fibres in result.kept.values()]


def exhaustive(groups, saliency, costs, budget, rule, most: float) -> tuple[int, float]:
    """Try every combination of allowed widths that loses no more than `most`.

    Returns:
        Half percents of the limit that are left unspent, and the least loss of all that leave so few.
    """
    widths = [allowed_steps(g, rule) for g in groups]
    limit = budget.limit(costs.evaluate(budget.kind, costs.full_widths_G))
    combinations = np.array(list(itertools.product(*widths)))
    lost = np.array([sum(lowest_sum(g, saliency, k) for g, k in zip(groups, row, strict=True)) for row in combinations])
    cost = costs.evaluate_many(budget.kind, combinations)
    gap = ((limit - cost) // (0.005 * limit))[fits := (cost <= limit) & (lost <= most * (1 + 1e-9))]
    return int(gap.min()), float(lost[fits][gap == gap.min()].min())


def lowest_sum(g: ChannelGroup, saliency: np.ndarray, keep: int) -> float:
    return sum(float(np.sort(saliency[list(fibre)])[: g.steps - keep].sum()) for fibre in g.units)


saliencies = st.builds(
    lambda seed, power: np.random.default_rng(seed).exponential(size=sum(SMALL)) ** power,
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.5, 1.0, 3.0]),
)
budgets = st.builds(Budget, st.sampled_from(["macs", "params"]), st.floats(0.2, 0.97))


# --- optimality


@settings(max_examples=40, deadline=None)
@given(saliency=saliencies, budget=budgets)
def test_plan_equals_exhaustive_search(saliency, budget):
    groups, rule, costs = chain_of_groups(SMALL), WidthRule(round_to=2), small_costs()
    found = plan(groups, saliency, costs, budget, rule)
    gap, loss = exhaustive(groups, saliency, costs, budget, rule, found.saliency_lost_uniform)
    limit = budget.limit(getattr(found.before, budget.kind))
    assert (limit - getattr(found.after, budget.kind)) // (0.005 * limit) == gap
    assert found.saliency_lost == pytest.approx(loss, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(saliency=saliencies, budget=budgets, rule=st.sampled_from([WidthRule(), WidthRule(4), WidthRule(1, 3)]))
def test_plan_keeps_its_promises(saliency, budget, rule):
    groups, costs = chain_of_groups(SMALL), small_costs()
    results = [make(groups, saliency, costs, budget, rule) for make in (plan, uniform_plan)]
    for result in results:
        widths = np.array(kept_steps(result))
        dense = costs.evaluate(budget.kind, costs.full_widths_G)
        cost = costs.evaluate(budget.kind, widths)
        assert cost == getattr(result.after, budget.kind) <= budget.ratio * dense
        allowed = [allowed_steps(g, rule) for g in groups]
        assert all(width in options for width, options in zip(widths, allowed, strict=True))
        for number, options in enumerate(allowed):  # as close below as the steps allow: none of them still fits
            for wider in options[options.index(widths[number]) + 1 :][:1]:
                trial = widths.copy()
                trial[number] = wider
                assert costs.evaluate(budget.kind, trial) > budget.ratio * dense
        removed = [
            saliency[unit]
            for g in groups
            for fibre, kept in zip(g.units, result.kept[g.name], strict=True)
            for step, unit in enumerate(fibre)
            if step not in kept
        ]
        assert result.saliency_lost == pytest.approx(sum(removed))
        assert all(list(fibre) == sorted(set(fibre)) for fibres in result.kept.values() for fibre in fibres)
    assert results[0].saliency_lost <= results[0].saliency_lost_uniform * (1 + 1e-9)
    assert results[0].saliency_lost_uniform == results[1].saliency_lost


@settings(max_examples=10, deadline=None)
@given(saliency=saliencies, budget=budgets)
def test_plan_is_deterministic(saliency, budget):
    groups = chain_of_groups(SMALL)
    first, second = (plan(groups, saliency, small_costs(), budget, WidthRule(1), seed=3) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("seed", range(5))
def test_search_is_no_worse_than_any_of_its_starts(seed):
    costs, widths = resnet50_like()
    saliency = np.random.default_rng(seed).exponential(size=sum(widths)) ** 3
    table = choices(chain_of_groups(widths), saliency, WidthRule())
    problem = Problem(table, (costs.quadratic("macs"),), (costs.evaluate("macs", costs.full_widths_G) // 2,))
    starts = [State(problem, uniform(problem)), *lagrangian(State(problem, table.last_G))]
    found = State(problem, search(problem, seed=0, restarts=0))
    assert found.feasible
    assert all(start.feasible and found.loss <= start.loss * (1 + 1e-9) for start in starts)


@pytest.mark.parametrize("ratio", [0.9, 0.6, 0.3])
def test_a_large_network_lands_just_below_the_budget(ratio):
    costs, widths = resnet50_like()
    groups = chain_of_groups(widths)
    scales = np.random.default_rng(0).lognormal(sigma=2, size=len(widths))
    saliency = np.random.default_rng(1).exponential(size=sum(widths)) * np.repeat(scales, widths)
    result = plan(groups, saliency, costs, Budget("macs", ratio), WidthRule())
    assert ratio - 0.005 <= result.after.macs / result.before.macs <= ratio
    assert result.saliency_lost < result.saliency_lost_uniform


@pytest.mark.parametrize("ratio", [0.8, 0.5])
def test_a_costly_group_of_little_saliency_does_not_keep_the_plan_from_landing(ratio):
    analysis = analyse(cifar_resnet(56), torch.zeros(1, 3, 32, 32))  # one step of its stream costs up to 2 %
    saliency = np.random.default_rng(0).random(analysis.coupling.unit_count)
    result = plan(analysis.coupling.groups, saliency, analysis.costs, Budget("macs", ratio), WidthRule())
    assert ratio * 0.995 <= result.after.macs / result.before.macs <= ratio
    assert result.saliency_lost <= result.saliency_lost_uniform


def test_landing_costs_no_more_saliency_than_the_uniform_plan():
    saliency = np.concatenate([np.full(16, 1e6), np.full(17, 1e6), np.full(18, 1e-6)])  # to land would cost the dear
    result = plan(chain_of_groups(SMALL), saliency, small_costs(), Budget("macs", 0.97), WidthRule(8))
    assert result.saliency_lost <= result.saliency_lost_uniform


def test_a_cheap_group_is_cut_rather_than_a_precious_one():
    saliency = np.concatenate([np.full(16, 1.0), np.full(17, 1e-3), np.full(18, 1.0)])
    result = plan(chain_of_groups(SMALL), saliency, small_costs(), Budget("macs", 0.6), WidthRule(1))
    first, second, third = kept_steps(result)
    assert (first, third) == (16, 18)
    assert second < 17


# --- widths and units


@pytest.mark.parametrize(
    ("steps", "per_step", "rule", "expected"),
    [
        (64, 1, WidthRule(), [8, 16, 24, 32, 40, 48, 56, 64]),
        (32, 1, WidthRule(), [4, 8, 12, 16, 20, 24, 28, 32]),
        (63, 1, WidthRule(), [*range(4, 63, 4), 63]),
        (16, 1, WidthRule(), [2, 4, 6, 8, 10, 12, 14, 16]),
        (5, 1, WidthRule(), [1, 2, 3, 4, 5]),
        (8, 16, WidthRule(), [1, 2, 3, 4, 5, 6, 7, 8]),
        (16, 6, WidthRule(8), [4, 8, 12, 16]),
        (20, 1, WidthRule(8), [8, 16, 20]),
        (20, 1, WidthRule(64), [20]),
        (20, 1, WidthRule(4, min_width=9), [12, 16, 20]),
        (20, 2, WidthRule(4, min_width=30), [16, 18, 20]),
        (20, 1, WidthRule(4, min_width=99), [20]),
    ],
)
def test_allowed_widths(steps, per_step, rule, expected):
    assert allowed_steps(group("g", 0, steps, channels_per_step=per_step), rule) == expected


def test_a_frozen_group_keeps_everything_even_where_its_saliency_is_unknown():
    groups = chain_of_groups(SMALL)
    groups[1] = replace(groups[1], frozen="the model returns it")
    saliency = np.ones(sum(SMALL))
    saliency[20] = np.nan
    result = plan(groups, saliency, small_costs(), Budget("macs", 0.5), WidthRule())
    assert result.kept[groups[1].name] == (tuple(range(17)),)


def test_each_fibre_keeps_its_own_best_units():
    grouped = group("g", 0, 4, fibres=2, channels_per_step=2)
    saliency = np.array([1.0, 2, 3, 4, 40, 30, 20, 10])
    table = choices([grouped], saliency, WidthRule(1))
    assert table.steps_GN.tolist() == [[1, 2, 3, 4]]
    assert table.losses_GN.tolist() == [[1 + 2 + 3 + 10 + 20 + 30, 1 + 2 + 10 + 20, 1 + 10, 0]]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1, groups=1))
    graph = capture(model, torch.zeros(1, 3, 2, 2))

    def size_of(value):
        return tuple(Size(0, {0: 2}) if n == 8 else Size(n, {}) for n in graph.values[value].shape)

    result = plan([grouped], saliency, cost_model(graph, size_of, {}, np.array([4])), Budget("macs", 0.5), WidthRule(1))
    assert result.kept == {"g": ((2, 3), (0, 1))}


def test_equal_saliencies_keep_the_lower_indices_and_cut_evenly():
    result = plan(chain_of_groups(SMALL), np.zeros(sum(SMALL)), small_costs(), Budget("macs", 0.5), WidthRule(1))
    for fibres in result.kept.values():
        assert fibres == (tuple(range(len(fibres[0]))),)
    assert result.saliency_lost == 0
    assert np.ptp(np.array(kept_steps(result)) / SMALL) < 0.1


def test_among_many_equals_the_lower_indices_stay():
    saliency = np.random.default_rng(0).integers(0, 3, 300).astype(float)
    expected = sorted(sorted(range(300), key=lambda unit: (-saliency[unit], unit))[:130])
    assert best_steps(group("g", 0, 300), saliency, 130) == (tuple(expected),)


def test_uniform_keeps_about_the_same_fraction_of_every_group():
    saliency = np.random.default_rng(0).exponential(size=sum(SMALL))
    result = uniform_plan(chain_of_groups(SMALL), saliency, small_costs(), Budget("macs", 0.5), WidthRule(1))
    assert np.ptp(np.array(kept_steps(result)) / SMALL) < 0.1


def test_a_ratio_of_one_keeps_everything():
    result = plan(chain_of_groups(SMALL), np.ones(sum(SMALL)), small_costs(), Budget("params", 1.0), WidthRule())
    assert kept_steps(result) == SMALL
    assert result.before == result.after


def test_negative_saliency_is_allowed_and_the_budget_still_used():
    saliency = np.random.default_rng(0).normal(size=sum(SMALL))
    result = plan(chain_of_groups(SMALL), saliency, small_costs(), Budget("macs", 0.7), WidthRule(1))
    assert 0.65 < result.after.macs / result.before.macs <= 0.7


# --- refusals


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, float("nan"), float("inf"), "0.5", None, True])
def test_impossible_ratios_are_refused(ratio):
    with pytest.raises(BadInput, match="ratio"):
        Budget("macs", ratio)


@pytest.mark.parametrize("options", [{"round_to": 0}, {"round_to": -8}, {"min_width": 0}, {"round_to": 2.5}])
def test_impossible_width_rules_are_refused(options):
    with pytest.raises(BadInput, match="channels"):
        WidthRule(**options)


@pytest.mark.parametrize("make", [plan, uniform_plan])
def test_an_infeasible_budget_names_the_reachable_range_and_its_end_is_feasible(make):
    groups, saliency, rule = chain_of_groups(SMALL), np.ones(sum(SMALL)), WidthRule(8)
    with pytest.raises(InfeasibleBudget, match=r"reachable: 0\.\d{3} to 1\.000 of the dense MACs") as refusal:
        make(groups, saliency, small_costs(), Budget("macs", 0.01), rule)
    lowest = float(str(refusal.value).split("reachable: ")[1].split()[0])
    assert kept_steps(make(groups, saliency, small_costs(), Budget("macs", lowest), rule)) == [8, 8, 8]
    with pytest.raises(InfeasibleBudget):
        make(groups, saliency, small_costs(), Budget("macs", lowest - 0.002), rule)


def test_nothing_to_remove_is_infeasible():
    groups = [replace(g, frozen="protected") for g in chain_of_groups(SMALL)]
    with pytest.raises(InfeasibleBudget, match=r"nothing of the MACs can be saved"):
        plan(groups, np.ones(sum(SMALL)), small_costs(), Budget("macs", 0.9), WidthRule())


def test_a_ratio_below_one_always_removes_something():
    result = plan(chain_of_groups(SMALL), np.ones(sum(SMALL)), small_costs(), Budget("macs", 1 - 1e-15), WidthRule())
    assert result.after.macs < result.before.macs


def test_a_network_that_costs_nothing_is_refused():
    graph = capture(nn.ReLU(), torch.zeros(1, 3))
    costs = cost_model(graph, constant_sizes(graph), {}, np.array([16]))
    with pytest.raises(BadInput, match="no parameters to save"):
        plan(chain_of_groups([16]), np.ones(16), costs, Budget("params", 0.5), WidthRule())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_saliency_that_is_not_finite_is_refused_by_the_groups_name(bad):
    saliency = np.ones(sum(SMALL))
    saliency[20] = bad
    with pytest.raises(BadInput, match=r"stage1\.conv is not finite"):
        plan(chain_of_groups(SMALL), saliency, small_costs(), Budget("macs", 0.5), WidthRule())


def test_input_that_does_not_belong_together_is_refused():
    saliency, budget = np.ones(sum(SMALL)), Budget("macs", 0.5)
    with pytest.raises(BadInput, match="one number for each"):
        plan(chain_of_groups(SMALL), saliency[:-1], small_costs(), budget, WidthRule())
    with pytest.raises(BadInput, match="other channel groups"):
        plan(chain_of_groups(SMALL[:2]), saliency, small_costs(), budget, WidthRule())
    twins = [replace(g, name="twin") for g in chain_of_groups(SMALL)]
    with pytest.raises(BadInput, match="same name"):
        plan(twins, saliency, small_costs(), budget, WidthRule())


# --- protection


@pytest.mark.parametrize("pattern", ["stage1", "stage1.conv", "stage1*", "*1.conv", "stage1.conv_norm"])
def test_protect_freezes_what_matches(pattern):
    protected = protect(chain_of_groups(SMALL), [pattern])
    assert [g.frozen for g in protected] == [None, f"protected by {pattern!r}", None]


def test_protect_keeps_an_earlier_reason_and_does_not_change_its_input():
    groups = chain_of_groups(SMALL)
    groups[0] = replace(groups[0], frozen="it is the output")
    before = list(groups)
    assert [g.frozen for g in protect(groups, ["stage*"])] == ["it is the output", *["protected by 'stage*'"] * 2]
    assert groups == before
    assert protect(groups, []) == tuple(groups)


def test_a_pattern_that_matches_nothing_is_refused_with_the_closest_names():
    with pytest.raises(BadInput, match=r"'stag1' matches no layer; did you mean 'stage1'"):
        protect(chain_of_groups(SMALL), ["stage0", "stag1"])
    with pytest.raises(BadInput, match="matches no layer"):
        protect(chain_of_groups(SMALL), ["stage"])


# --- JSON


def example_plan() -> Plan:
    saliency = np.random.default_rng(0).exponential(size=sum(SMALL))
    result = plan(chain_of_groups(SMALL), saliency, small_costs(), Budget("macs", 0.5), WidthRule())
    return replace(result, provenance={"criterion": "random", "seed": 0})


def test_a_plan_survives_json():
    result = example_plan()
    assert Plan.from_json(json.loads(json.dumps(result.to_json()))) == result


EDITS = {
    "no kept": lambda d: d.pop("kept"),
    "unknown entry": lambda d: d.update(extra=1),
    "kept is a list": lambda d: d.update(kept=[]),
    "group is text": lambda d: d["kept"].update({"stage0.conv": "012"}),
    "no fibres": lambda d: d["kept"].update({"stage0.conv": []}),
    "empty fibre": lambda d: d["kept"].update({"stage0.conv": [[]]}),
    "negative": lambda d: d["kept"].update({"stage0.conv": [[-1, 0]]}),
    "huge": lambda d: d["kept"].update({"stage0.conv": [[0, 10**30]]}),
    "fraction": lambda d: d["kept"].update({"stage0.conv": [[0.5]]}),
    "boolean": lambda d: d["kept"].update({"stage0.conv": [[True]]}),
    "unsorted": lambda d: d["kept"].update({"stage0.conv": [[1, 0]]}),
    "repeated": lambda d: d["kept"].update({"stage0.conv": [[1, 1]]}),
    "unequal fibres": lambda d: d["kept"].update({"stage0.conv": [[0, 1], [0]]}),
    "budget kind": lambda d: d["budget"].update(kind="energy"),
    "budget kind is a list": lambda d: d["budget"].update(kind=["macs"]),
    "budget ratio": lambda d: d["budget"].update(ratio=7),
    "budget is a number": lambda d: d.update(budget=0.5),
    "cost is text": lambda d: d["after"].update(macs="1"),
    "cost is huge": lambda d: d["before"].update(macs=10**40),
    "cost is missing": lambda d: d["before"].pop("macs"),
    "cost grows": lambda d: d["after"].update(macs=d["before"]["macs"] + 1),
    "saliency is NaN": lambda d: d.update(saliency_lost=float("nan")),
    "saliency is text": lambda d: d.update(saliency_lost_uniform="0"),
    "provenance is a list": lambda d: d.update(provenance=[]),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_plan_is_refused(edit):
    data = copy.deepcopy(example_plan().to_json())
    EDITS[edit](data)
    with pytest.raises(BadInput):
        Plan.from_json(data)


@pytest.mark.parametrize("data", [None, [], "plan", 3])
def test_what_is_no_plan_is_refused(data):
    with pytest.raises(BadInput):
        Plan.from_json(data)


def test_a_plan_of_another_network_is_refused():
    result = example_plan()
    check_fits(result, chain_of_groups(SMALL))
    for other in ([16, 17], [16, 17, 18, 19], [16, 3, 18]):
        with pytest.raises(BadInput, match="another network"):
            check_fits(result, chain_of_groups(other))
