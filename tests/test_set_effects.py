"""What sets of units cost together: against dense matrices and exhaustive search."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from archscan.errors import BadInput
from archscan.groups import ChannelGroup
from archscan.planner import Budget, WidthRule, plan
from archscan.set_effects import SetEffects, refine, removed_units, set_effects
from archscan.slimming import analyse


def gradients(samples, units, seed, rank=None):
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(samples, rank or units)) @ generator.normal(size=(rank or units, units))
    return mixed * generator.exponential(size=units)


def dense(effects):
    form = effects.factors_NU.T @ effects.factors_NU / len(effects.factors_NU)
    return (1 - effects.shrinkage) * form + effects.shrinkage * np.diag(np.diag(form))


factors = st.builds(gradients, st.integers(2, 12), st.just(8), st.integers(0, 2**32 - 1), st.integers(1, 8))
sets = st.lists(st.booleans(), min_size=8, max_size=8).map(np.array)


@given(factors=factors, shrinkage=st.floats(0, 1), removed=sets)
def test_loss_and_marginals_are_those_of_the_dense_form(factors, shrinkage, removed):
    effects = SetEffects(factors, shrinkage)
    form = dense(effects)
    loss = effects.loss(removed)
    assert loss == pytest.approx(0.5 * form[np.ix_(removed, removed)].sum(), abs=1e-9 * np.abs(form).sum())
    for unit, marginal in enumerate(effects.marginals(removed)):
        with_it, without = removed.copy(), removed.copy()
        with_it[unit], without[unit] = True, False
        change = effects.loss(with_it) - effects.loss(without)
        assert marginal == pytest.approx(change, abs=1e-9 * np.abs(form).sum())


def test_shrinkage_is_the_variance_of_pairs_over_their_squares():
    values = gradients(20, 6, seed=0)
    pairs = values[:, :, None] * values[:, None, :]
    off = ~np.eye(6, dtype=bool)
    expected = (pairs.var(0) / 19)[off].sum() / np.square(pairs.mean(0))[off].sum()
    assert set_effects(values).shrinkage == pytest.approx(expected)
    assert 0 < expected < 1


def test_noise_is_shrunk_away_and_what_is_common_is_not():
    generator = np.random.default_rng(0)
    assert set_effects(generator.normal(size=(64, 500))).shrinkage > 0.9
    common = generator.normal(size=(64, 1)) @ np.ones((1, 500)) + 0.1 * generator.normal(size=(64, 500))
    assert set_effects(common).shrinkage < 0.1


def test_one_sample_is_refused():
    with pytest.raises(BadInput, match="two samples"):
        set_effects(np.ones((1, 3)))


def test_gates_that_nothing_depends_on_have_no_effects():
    assert set_effects(np.zeros((4, 3))).shrinkage == 1.0


# --- plans


def group(name, first, steps, fibres=1):
    units = tuple(tuple(range(first + f * steps, first + (f + 1) * steps)) for f in range(fibres))
    return ChannelGroup(name, units, 1, (), None)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 9))
def test_swaps_find_the_best_set_of_a_small_group_or_come_close(seed, count):
    effects = SetEffects(gradients(6, 10, seed, rank=4), 0.2)
    one = [group("g", 0, 10)]
    start = {"g": (tuple(range(count, 10)),)}
    kept = refine(one, effects, start, lambda _: start)
    found = effects.loss(removed_units(one, kept, effects, None))

    def loss_of(chosen):
        return effects.loss(np.isin(np.arange(10), chosen))

    best = min(loss_of(chosen) for chosen in itertools.combinations(range(10), count))
    single = np.argsort(effects.single_U)[:count]
    assert best - 1e-12 <= found <= loss_of(range(count)) + 1e-12
    for out, back in itertools.product(np.flatnonzero(~np.isin(np.arange(10), kept["g"][0])), kept["g"][0]):
        swapped = removed_units(one, kept, effects, None)
        swapped[out], swapped[back] = False, True
        assert effects.loss(swapped) >= found - 1e-6 * np.abs(dense(effects)).max()
    assert len(kept["g"][0]) == 10 - count == len(set(kept["g"][0]))
    assert len(single) == count


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 3)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def chain():
    return analyse(Chain(), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ratio", [0.4, 0.7])
def test_a_plan_with_set_effects_is_near_the_best_of_all_sets(chain, seed, ratio):
    groups, costs = chain.coupling.groups, chain.costs
    free = [unit for g in groups if g.frozen is None for unit in g.units[0]]
    values = np.zeros((6, chain.coupling.unit_count))
    values[:, free] = gradients(6, len(free), seed, rank=5)
    effects = SetEffects(values, 0.3)
    budget, rule = Budget("macs", ratio), WidthRule(1)
    found = plan(groups, effects.single_U, costs, budget, rule, effects=effects)
    alone = plan(groups, effects.single_U, costs, budget, rule)
    additive = effects.loss(removed_units(groups, alone.kept, effects, None))
    limit = budget.limit(found.before.macs)
    best = np.inf
    for chosen in itertools.product([False, True], repeat=len(free)):
        removed = np.zeros(chain.coupling.unit_count, dtype=bool)
        removed[free] = chosen
        widths = np.array([int((~removed[list(g.units[0])]).sum()) for g in groups])
        if widths.min() > 0 and costs.evaluate("macs", widths) <= limit:
            best = min(best, effects.loss(removed))
    assert found.after.macs <= limit
    assert best - 1e-12 <= found.saliency_lost <= additive + 1e-12
    assert ratio > 0.5 or found.saliency_lost <= 1.15 * best
    assert found.saliency_lost <= found.saliency_lost_uniform
    assert found.saliency_lost == pytest.approx(effects.loss(removed_units(groups, found.kept, effects, None)))
    assert found == plan(groups, effects.single_U, costs, budget, rule, effects=effects)


def test_of_two_doubles_one_stays(chain):
    groups, costs = chain.coupling.groups, chain.costs
    first, second = (list(g.units[0]) for g in groups if g.frozen is None)
    values = np.zeros((64, chain.coupling.unit_count))
    values[:, first + second] = np.random.default_rng(0).normal(size=(64, 10))
    values[:, first[1]] = values[:, first[0]] = 0.6 * values[:, first[0]]  # 0.36 each, 1.44 together
    effects = SetEffects(values, 0.0)
    budget, rule = Budget("macs", 0.55), WidthRule(1)
    names = [g.name for g in groups if g.frozen is None]
    alone = plan(groups, effects.single_U, costs, budget, rule).kept[names[0]][0]
    together = plan(groups, effects.single_U, costs, budget, rule, effects=effects).kept[names[0]][0]
    assert not {0, 1} & set(alone)
    assert {0, 1} & set(together)


def test_units_that_are_gone_stay_away_and_cost_nothing(chain):
    groups, costs = chain.coupling.groups, chain.costs
    gone = np.zeros(chain.coupling.unit_count, dtype=bool)
    first = next(g for g in groups if g.frozen is None)
    gone[first.units[0][2]] = True
    values = gradients(6, len(gone), seed=1)
    effects = set_effects(values)
    made = plan(groups, effects.single_U, costs, Budget("macs", 0.6), WidthRule(1), gone_U=gone, effects=effects)
    assert 2 not in made.kept[first.name][0]
    removed = removed_units(groups, made.kept, effects, gone)
    assert not removed[gone].any()
    assert made.saliency_lost == pytest.approx(effects.loss(removed))
