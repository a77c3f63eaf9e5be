"""The curve of loss against cost, and the other numbers that only pictures need."""

import itertools

import numpy as np
import pytest
import torch

from archscan.criteria import score
from archscan.detailing import CHEAP_NEEDS, agreement_of, layer_links, saliency_detail
from archscan.gate_statistics import GateStatistics
from archscan.planner import Budget, plan
from archscan.reference_nets import cifar_resnet
from archscan.slimming import analyse
from archscan.tradeoff import tradeoff
from archscan.widths import WidthRule, choices
from tests.nets import CASES, INPUT

RULE = WidthRule(round_to=1)


def analysed(case):
    torch.manual_seed(0)
    return analyse(CASES[case].make().eval(), INPUT)


def saliency_of(analysis, seed=0):
    return np.random.default_rng(seed).gamma(0.5, size=analysis.coupling.unit_count)


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_the_curve_is_the_lower_hull_of_all_plans(kind):
    analysis = analysed("residual")
    groups, saliency_U, rule = analysis.coupling.groups, saliency_of(analysis), WidthRule(round_to=2)
    table = choices(groups, saliency_U, rule)
    rows = [range(last + 1) for last in table.last_G]
    assert np.prod([len(row) for row in rows]) < 100_000
    columns_BG = np.array(list(itertools.product(*rows)))
    groups_G = np.arange(len(groups))
    kept_B = analysis.costs.evaluate_many(kind, table.steps_GN[groups_G, columns_BG])
    kept_B = kept_B / analysis.costs.evaluate(kind, analysis.costs.full_widths_G)
    lost_B = table.losses_GN[groups_G, columns_BG].sum(1)
    best, _ = tradeoff(groups, saliency_U, analysis.costs, kind, rule)
    assert (best[0].kept, best[0].lost) == (1.0, 0.0)
    assert best[-1].kept == pytest.approx(kept_B.min())
    for point in best:
        cheaper_B = kept_B <= point.kept + 1e-12
        assert point.lost <= 1.1 * lost_B[cheaper_B].min() + 1e-12


def test_curves_fall_and_rise_and_even_widths_lose_more():
    analysis = analyse(cifar_resnet(20).eval(), torch.zeros(1, 3, 32, 32))
    groups, saliency_U = analysis.coupling.groups, saliency_of(analysis)
    best, even = tradeoff(groups, saliency_U, analysis.costs, "macs", RULE)
    for points in (best, even):
        kept, lost = ([getattr(point, name) for point in points] for name in ("kept", "lost"))
        assert kept == sorted(kept, reverse=True)
        assert lost == sorted(lost)
    assert len(best) > 15
    for point in even:
        assert np.interp(-point.kept, [-each.kept for each in best], [each.lost for each in best]) <= point.lost + 1e-9


def test_the_plan_lies_on_its_curve():
    analysis = analyse(cifar_resnet(20).eval(), torch.zeros(1, 3, 32, 32))
    groups, saliency_U = analysis.coupling.groups, saliency_of(analysis)
    made = plan(groups, saliency_U, analysis.costs, Budget("macs", 0.6), RULE)
    detail = saliency_detail(groups, analysis.costs, saliency_U, made, RULE)
    expected = np.interp(-0.6, [-point.kept for point in detail.curve], [point.lost for point in detail.curve])
    assert made.saliency_lost == pytest.approx(expected, rel=0.1)
    assert detail.curve_of == "macs"


def test_a_group_is_spread_out_and_priced():
    analysis = analysed("residual")
    groups, saliency_U = analysis.coupling.groups, saliency_of(analysis)
    made = plan(groups, saliency_U, analysis.costs, Budget("macs", 0.7), RULE)
    detail = saliency_detail(groups, analysis.costs, saliency_U, made, RULE)
    full_G = analysis.costs.full_widths_G
    for place, (group, row) in enumerate(zip(groups, detail.groups, strict=True)):
        values = saliency_U[np.array(group.units).ravel()]
        assert row.quantiles[2] == pytest.approx(np.median(values), rel=1e-5)
        assert list(row.quantiles) == sorted(row.quantiles)
        if group.frozen is None:
            one_less_G = full_G - (np.arange(len(groups)) == place)
            saved = analysis.costs.evaluate("macs", full_G) - analysis.costs.evaluate("macs", one_less_G)
            # the first step saves its slope less the curvature, which only layers that read what they write have
            assert row.per_mac == pytest.approx(values.sum() / group.steps / saved, rel=0.1)
        else:
            assert row.per_mac is None


def test_links_join_what_layers_read_and_write():
    analysis = analysed("residual")
    groups = analysis.coupling.groups
    reads = {
        (member.module, place) for place, group in enumerate(groups) for member in group.members if member.role == "in"
    }
    links = layer_links(groups)
    assert {(link.path, place) for link in links for place in link.reads} == reads
    assert all(link.reads or link.writes for link in links)
    assert len({link.path for link in links}) == len(links)


def test_agreement_is_spearmans_over_free_units():
    analysis = analysed("residual")
    units = analysis.coupling.unit_count
    generator = np.random.default_rng(0)
    statistics = GateStatistics(
        units,
        batch_sizes=(8,),
        sample_gradient_NU=generator.normal(size=(8, units)),
        weight_norm_U=generator.gamma(1.0, size=units),
        group_U=np.zeros(units, dtype=np.int64),
    )
    needs = frozenset({"sample_gradient", "weight_norm", "group"})
    used_U = score("obd", statistics)
    found = agreement_of("obd", used_U, statistics, needs, analysis.coupling)
    assert found.criteria[0] == "obd"
    assert {"magnitude", "taylor-abs"} < set(found.criteria)
    assert "taylor-fo" not in found.criteria  # needs what was not collected
    free = sorted(
        unit for group in analysis.coupling.groups if group.frozen is None for row in group.units for unit in row
    )
    ranks = [np.argsort(np.argsort(score(name, statistics)[free])) for name in ("obd", "magnitude")]
    expected = np.corrcoef(ranks)[0, 1]
    assert found.spearman[0][found.criteria.index("magnitude")] == pytest.approx(expected, abs=6e-4)


def test_there_is_no_agreement_with_nothing():
    analysis = analysed("residual")
    statistics = GateStatistics(analysis.coupling.unit_count)
    used_U = saliency_of(analysis)
    assert agreement_of("random", used_U, statistics, frozenset(), analysis.coupling) is None
    assert {"weight_norm", "group"} <= CHEAP_NEEDS
