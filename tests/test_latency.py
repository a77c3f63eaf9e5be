"""Measured time, counted memory, and plans for both; no test asserts how long anything takes."""

import doctest
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import archscan
import archscan.latency.roofline as peaks
from archscan import cli
from archscan.capture import capture
from archscan.costs import constant_sizes, cost_model
from archscan.errors import BadInput, InfeasibleBudget
from archscan.groups import ChannelGroup
from archscan.latency import (
    LatencySetup,
    cache,
    compare,
    latency_model,
    module_times,
    modules,
    replay,
    steps,
    timing,
    width_steps,
)
from archscan.latency import model as fitting
from archscan.latency.pairs import Timing
from archscan.latency.roofline import Roofline, measured_roofline
from archscan.latency.timing import Comparison, Latency, median_ratio, timed_rounds
from archscan.liveness import may_copy_or_share, moments
from archscan.pace import corrected, plan_and_time, time_warnings, timed
from archscan.planner import Budget, Plan, plan, uniform_plan
from archscan.replan import Wish
from archscan.report import views
from archscan.report.model import Report
from archscan.slimming import SlimSettings, analyse, slim
from archscan.widths import WidthRule
from tests.nets import CASES, INPUT, DenseConcat, Plain, Residual

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ARCHSCAN_CACHE", str(tmp_path / "cache"))


def seeded(make):
    torch.manual_seed(0)
    return make()


# ---------------------------------------------------------------- timing


def test_the_examples_run():
    assert doctest.testmod(timing).failed == 0
    assert doctest.testmod(timing).attempted > 0


def test_a_measurement_says_how_it_was_made_and_leaves_the_model_as_it_was():
    model, before = seeded(Plain), torch.get_num_threads()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.bn1.eval()
    batches = []
    handle = model.register_forward_pre_hook(lambda _module, args: batches.append(len(args[0])))
    found = archscan.measure_latency(model, INPUT[:1], batch=3, threads=1, repeats=4)
    handle.remove()
    assert set(batches) == {3}
    assert (found.batch, found.threads, found.runs, found.format) == (3, 1, 4, "contiguous")
    assert found.device
    assert json.loads(json.dumps(found.to_json())) == found.to_json()
    assert torch.get_num_threads() == before
    assert model.training
    assert not model.bn1.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_channels_last_is_for_a_copy():
    model, seen = seeded(Plain), []
    handle = model.register_forward_pre_hook(
        lambda module, args: seen.append(
            (args[0].is_contiguous(memory_format=torch.channels_last), module.conv2.weight.stride())
        )
    )
    found = archscan.measure_latency(model, INPUT, batch=2, channels_last=True, repeats=2)
    handle.remove()
    assert found.format == "channels_last"
    assert seen[-1] == (True, (72, 1, 24, 8))
    assert model.conv2.weight.stride() == (72, 9, 3, 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"threads": 1.5}, "threads is 1.5"),
        ({"repeats": True}, "repeats is True"),
        *([] if torch.cuda.is_available() else [({"device": "cuda"}, "no CUDA device")]),
    ],
)
def test_setups_without_sense_are_refused(options, says):
    with pytest.raises(BadInput, match=says):
        archscan.measure_latency(Plain(), INPUT, **options)


def test_a_model_that_cannot_take_the_batch_is_refused():
    class OneByOne(Plain):
        def forward(self, x):
            assert len(x) == 1, "one by one"
            return super().forward(x)

    with pytest.raises(BadInput, match="batch of 4 on cpu: one by one"):
        archscan.measure_latency(OneByOne(), INPUT[:1], batch=4)


def test_networks_run_in_turns_and_the_first_is_first_in_every_other_round():
    order = []
    times = timed_rounds([lambda: order.append("a"), lambda: order.append("b")], 4, CPU)
    assert "".join(order[-8:]) == "abbaabba"
    assert times.shape == (4, 2)
    assert (times > 0).all()


def test_the_ratio_is_fair_where_the_machine_is_not():
    load_R = np.exp(np.random.default_rng(0).normal(size=60))
    ratio, low, high = median_ratio(np.stack([load_R, 0.6 * load_R], 1))
    assert ratio == pytest.approx(0.6)
    assert low == pytest.approx(0.6) == high
    noisy = np.stack([load_R, 0.6 * load_R * np.exp(np.random.default_rng(1).normal(0, 0.2, 60))], 1)
    ratio, low, high = median_ratio(noisy)
    assert low < ratio < high
    assert (ratio, low, high) == median_ratio(noisy)
    assert high - low < 0.2


def test_a_comparison_measures_both_alike():
    found = compare(seeded(Plain), seeded(Residual), INPUT, LatencySetup(2, repeats=5))
    assert found.before.runs == found.after.runs == 5
    assert found.ratio_low <= found.ratio <= found.ratio_high
    assert set(found.to_json()) == {"before", "after", "ratio", "ratio_low", "ratio_high"}


# ---------------------------------------------------------------- modules


class Clock:
    """A clock that only the network's own ops move on."""

    def __init__(self):
        self.now = 0

    def perf_counter_ns(self):
        return self.now


def test_every_moment_is_charged_to_the_module_that_runs(monkeypatch):
    clock = Clock()

    class Takes(nn.Module):
        def __init__(self, *milliseconds, inner=()):
            super().__init__()
            self.milliseconds = milliseconds
            self.inner = nn.ModuleList(inner)

        def forward(self, x):
            for place, milliseconds in enumerate(self.milliseconds):
                clock.now += milliseconds * 1_000_000
                if place < len(self.inner):
                    x = self.inner[place](x)
            return x

    shared = Takes(5)
    model = Takes(1, 2, 4, inner=[Takes(10, 20, inner=[shared]), shared])
    model.weight = nn.Parameter(torch.zeros(1))
    monkeypatch.setattr(modules, "time", clock)
    found = {row.path: row.self_ms for row in module_times(model, INPUT, LatencySetup(repeats=3))}
    assert found == {"": 1 + 2 + 4, "inner.0": 10 + 20, "inner.0.inner.0": 5 + 5}


def test_the_time_of_modules_is_by_the_paths_of_the_counted_costs():
    model = seeded(Residual)
    found = {row.path for row in module_times(model, INPUT, LatencySetup(repeats=2))}
    assert found >= set(analyse(model, INPUT).costs.by_module("macs", analyse(model, INPUT).costs.full_widths_G))
    assert not model._forward_hooks
    assert not torch.nn.modules.module._global_forward_hooks


# ---------------------------------------------------------------- what is kept


def test_numbers_are_kept_by_what_they_depend_on():
    with cache.kept_table("ops", {"device": "a"}) as table:
        table["x"] = 1.5
    with cache.kept_table("ops", {"device": "a"}) as table:
        assert table == {"x": 1.5}
    with cache.kept_table("ops", {"device": "b"}) as table:
        assert table == {}


@pytest.mark.parametrize("text", ["", "[1]", '{"x": "long", "y": -1, "z": NaN}', "[" * 100_000])
def test_a_damaged_cache_is_none(text):
    with cache.kept_table("ops", {}) as table:
        table["x"] = 1.0
    (file,) = cache.folder().iterdir()
    file.write_text(text)
    with cache.kept_table("ops", {}) as table:
        assert table == {}


def test_a_cache_that_cannot_be_written_is_none(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARCHSCAN_CACHE", str(tmp_path / "file"))
    with cache.kept_table("ops", {}) as table:
        table["x"] = 1.0
    with cache.kept_table("ops", {}) as table:
        assert table == {}


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("ARCHSCAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "archscan"


def test_the_roofline_is_measured_once(monkeypatch):
    asked = []

    def milliseconds(run, device):
        asked.append(run)
        return 2.0

    monkeypatch.setattr(peaks, "milliseconds", milliseconds)
    monkeypatch.setattr(peaks, "SIDE", {"cpu": 8})
    monkeypatch.setattr(peaks, "COPIED_BYTES", {"cpu": 64})
    found = measured_roofline(LatencySetup())
    assert found == Roofline(8**3 / 0.002, 2 * 64 / 0.002)
    assert found.bound(found.ridge_macs_per_byte * 0.99) == "memory"
    assert found.bound(found.ridge_macs_per_byte) == "compute"
    runs = len(asked)
    assert measured_roofline(LatencySetup()) == found
    assert len(asked) == runs


# ---------------------------------------------------------------- memory, counted


class InPlace(nn.Module):
    """x (3) is read by a conv to 8, relu in place, a view of it, a conv to 2 that reads the view."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = F.relu_(self.a(x))
        return self.b(y.view(len(y), 8, -1, 1))


@pytest.mark.parametrize(
    ("make", "per_place"),
    [
        (InPlace, 3 + 8),  # the input and what a makes of it; later 8 and 2
        (Plain, 12 + 12),  # what bn2 reads and writes
        (Residual, 8 + 8 + 8),  # what waits for the addition, what bn2 reads and writes
        (DenseConcat, 6 + 4 + 10 + 10),  # both features, their concatenation, its norm
    ],
)
def test_peak_memory_by_hand(make, per_place):
    costs = analyse(seeded(make), torch.zeros(1, 3, 6, 6)).costs
    assert costs.limited("memory", costs.full_widths_G) == per_place * 36


class Reshaped(nn.Module):
    """Reads one of two views of its input after writing to one of them."""

    def __init__(self, written, read):
        super().__init__()
        self.written, self.read = written, read

    def forward(self, x):
        whole = x * 2
        views = {"whole": whole, "flat": whole.flatten(1)}
        views[self.written].relu_()
        return views[self.read] + 1


@pytest.mark.parametrize(("written", "read", "same"), [("flat", "flat", True), ("flat", "whole", False)])
def test_memory_may_be_shared_or_not_where_nobody_reads_what_was_written_to_the_other(written, read, same):
    graph = capture(Reshaped(written, read), INPUT)
    place = next(number for number, node in enumerate(graph.nodes) if node.op == torch.ops.aten.view.default)
    assert may_copy_or_share(graph, place) == same


def test_no_moment_lies_within_its_neighbour():
    found = moments(capture(seeded(DenseConcat), INPUT))
    assert len(found) > 3
    assert not any(first <= second or second <= first for first, second in pairwise(found))


@pytest.mark.parametrize("name", ["plain", "residual", "dense-concat", "squeeze-excite", "grouped-places", "heads"])
def test_predicted_memory_and_traffic_are_those_of_the_slim_network(name):
    model = seeded(CASES[name].make)
    made = slim(model, INPUT, target_memory=0.8, criterion="magnitude", settings=SlimSettings(WidthRule(1)))
    graph, none = capture(made.model, INPUT), np.zeros(0, dtype=np.int64)
    parameters = {name: tuple(archscan.costs.Size(n, {}) for n in p.shape) for name, p in made.model.named_parameters()}
    again = cost_model(graph, constant_sizes(graph), parameters, none)
    costs = made.analysis.costs
    widths = np.array([len(made.plan.kept[group.name][0]) for group in made.analysis.coupling.groups])
    assert made.plan.after.memory == again.limited("memory", none)
    assert made.plan.after.memory <= 0.8 * made.plan.before.memory
    assert again.by_module("outputs", none) == costs.by_module("outputs", widths)
    assert again.by_module("traffic", none) == costs.by_module("traffic", widths)


# ---------------------------------------------------------------- several budgets


def combinations(groups):
    return np.stack(np.meshgrid(*(np.arange(1, g.steps + 1) if g.frozen is None else [g.steps] for g in groups)), -1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("make", [Plain, Residual, DenseConcat])
def test_all_budgets_are_met_as_well_as_any_widths_meet_them(make, seed):
    analysis = analyse(seeded(make), INPUT)
    groups, costs = analysis.coupling.groups, analysis.costs
    generator = np.random.default_rng(seed)
    saliency_U = generator.exponential(size=analysis.coupling.unit_count)
    ratios = generator.uniform(0.5, 0.9, 3).tolist()
    budget = Budget("macs", ratios[0], (Budget("params", ratios[1]), Budget("memory", ratios[2])))
    made = plan(groups, saliency_U, costs, budget, WidthRule(1))
    after = {part.kind: getattr(made.after, part.kind) for part in budget.parts}
    limits = {part.kind: part.limit(getattr(made.before, part.kind)) for part in budget.parts}
    assert all(after[kind] <= limits[kind] for kind in after)
    every = combinations(groups).reshape(-1, len(groups))
    fits = [widths for widths in every if all(costs.limited(kind, widths) <= limits[kind] for kind in limits)]
    losses = [
        sum(np.sort(saliency_U[list(g.units[0])])[: g.steps - w].sum() for g, w in zip(groups, widths, strict=True))
        for widths in fits
    ]
    even = uniform_plan(groups, saliency_U, costs, budget, WidthRule(1))
    assert min(losses) - 1e-9 <= made.saliency_lost <= even.saliency_lost + 1e-9
    assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made


def wide():
    """Enough groups and widths that not all combinations are tried."""
    layers, channels = [], 3
    for width in (24, 32, 40, 28, 36):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


@pytest.mark.parametrize("seed", range(2))
def test_a_larger_search_meets_all_budgets_and_leaves_no_room(seed):
    analysis = analyse(seeded(wide), torch.zeros(1, 3, 8, 8))
    groups, costs = analysis.coupling.groups, analysis.costs
    generator = np.random.default_rng(seed)
    saliency_U = generator.exponential(size=analysis.coupling.unit_count)
    macs, params, memory = generator.uniform(0.4, 0.8, 3).tolist()
    budget = Budget("macs", macs, (Budget("params", params), Budget("memory", max(memory, 0.6))))
    made = plan(groups, saliency_U, costs, budget, WidthRule(1), seed=seed)
    kept = {part.kind: getattr(made.after, part.kind) / getattr(made.before, part.kind) for part in budget.parts}
    assert all(kept[part.kind] <= part.ratio for part in budget.parts)
    widths = np.array([len(made.kept[group.name][0]) for group in groups])
    for place, group in enumerate(groups):
        if widths[place] < group.steps:  # no step of any group would still fit
            wider = widths + (np.arange(len(groups)) == place)
            assert any(
                costs.limited(part.kind, wider) > part.limit(getattr(made.before, part.kind)) for part in budget.parts
            )
    for part in budget.parts:  # no plan within all budgets loses less than the best within one of them
        alone = plan(groups, saliency_U, costs, Budget(part.kind, part.ratio), WidthRule(1), seed=seed)
        assert alone.saliency_lost <= made.saliency_lost * 1.02
    even = uniform_plan(groups, saliency_U, costs, budget, WidthRule(1))
    assert made.saliency_lost <= even.saliency_lost


def test_budgets_that_make_no_sense_are_refused():
    with pytest.raises(BadInput, match="one for each kind"):
        Budget("macs", 0.5, (Budget("macs", 0.4),))
    with pytest.raises(BadInput, match="'energy'"):
        Budget("energy", 0.5)
    analysis = analyse(Plain(), INPUT)
    saliency = np.ones(analysis.coupling.unit_count)
    with pytest.raises(BadInput, match="none was measured"):
        plan(analysis.coupling.groups, saliency, analysis.costs, Budget("latency", 0.5), WidthRule())
    with pytest.raises(InfeasibleBudget, match="peak activation memory"):
        plan(analysis.coupling.groups, saliency, analysis.costs, Budget("memory", 0.01), WidthRule())


# ---------------------------------------------------------------- modelled time


@pytest.mark.parametrize("name", sorted(CASES))
def test_ops_run_by_themselves_at_any_widths(name):
    coupling = analyse(seeded(CASES[name].make), INPUT).coupling
    generator = np.random.default_rng(0)
    widths = [g.steps if g.frozen else int(generator.integers(1, g.steps + 1)) for g in coupling.groups]
    for place in replay.timed_nodes(coupling.graph):
        op = replay.shaped(coupling.graph, coupling.sizes, coupling.graph.nodes[place], widths, 3)
        if op.node.op == torch.ops.aten.index.Tensor:  # its indices are no numbers of any size
            assert replay.replay_ms(op, LatencySetup(), CPU) is None
            continue
        args, kwargs = replay._call(op, LatencySetup(), CPU)
        result = op.node.op(*args, **kwargs)
        shape = tuple((result if isinstance(result, torch.Tensor) else result[0]).shape)
        if op.node.op != torch.ops.aten.constant_pad_nd.default:  # how much is added to channels is not adapted
            assert shape == op.output
        assert replay.replay_ms(op, LatencySetup(), CPU) > 0


def law(of, *_):
    """Let an op take what a made-up machine would take."""
    read = sum(np.prod(shape) for shape, weight in zip(of.shapes, of.weights, strict=True) if not weight)
    macs = np.prod(of.output) * np.prod(of.shapes[1][1:]) if "convolution" in str(of.node.op) else 0
    return float(1e-3 + 2e-6 * read + 3e-6 * np.prod(of.output) + 5e-7 * macs)


@pytest.mark.parametrize("batch", [1, 5])
def test_a_machine_that_follows_the_law_is_modelled_exactly(monkeypatch, batch):
    monkeypatch.setattr(fitting, "replay_ms", law)
    coupling = analyse(seeded(wide), torch.zeros(1, 3, 8, 8)).coupling
    full = np.array([group.steps for group in coupling.groups])
    model = latency_model(coupling, LatencySetup(batch))
    price = model.quadratic(coupling.sizes, full)

    def total(widths):
        nodes = (coupling.graph.nodes[place] for place in replay.timed_nodes(coupling.graph))
        return sum(law(replay.shaped(coupling.graph, coupling.sizes, node, widths, batch)) for node in nodes)

    for share in (0.3, 0.55, 0.8):
        widths = np.where([g.frozen is None for g in coupling.groups], np.maximum((full * share).astype(int), 1), full)
        assert price.at(widths) / price.at(full) == pytest.approx(total(widths) / total(full), rel=0.01)
    assert price.at(full) == pytest.approx(fitting.TICKS, rel=1e-9)
    assert (price.linear_G >= 0).all()
    assert (price.matrix_GG >= 0).all()


def test_what_was_measured_is_not_measured_again(monkeypatch):
    coupling, asked = analyse(seeded(Plain), INPUT).coupling, []
    monkeypatch.setattr(fitting, "replay_ms", lambda of, *_: asked.append(of.key) or law(of))
    latency_model(coupling, LatencySetup())
    assert len(asked) == fitting.PASSES * len(set(asked))
    before = len(asked)
    again = latency_model(coupling, LatencySetup())
    assert len(asked) == before
    assert not again.unmodelled
    latency_model(coupling, LatencySetup(2))
    assert len(asked) > before


@pytest.mark.parametrize(("hardware", "expected"), [(16, 16), (8, 8), (1, 1), (2, 2)])
def test_steps_of_the_hardware_are_found(monkeypatch, hardware, expected):
    def stepped(of, *_):
        up = [-(-shape[0] // hardware) * -(-shape[1] // hardware) for shape in of.shapes[1:2]]
        return float(np.prod(up) * hardware**2)

    monkeypatch.setattr(fitting, "replay_ms", stepped)
    model = nn.Sequential(nn.Conv2d(3, 512, 1), nn.ReLU(), nn.Conv2d(512, 256, 1), nn.ReLU(), nn.Conv2d(256, 8, 1))
    found = width_steps(analyse(model, INPUT).coupling, LatencySetup(), 0.8)
    assert found == {"0": expected, "2": expected}


def test_measured_steps_rule_where_no_rounding_is_given():
    units = tuple(range(64))
    group = ChannelGroup("a", (units,), 1, (), None)
    allowed = archscan.widths.allowed_steps
    assert allowed(group, WidthRule(measured={"a": 16})) == [16, 32, 48, 64]
    assert allowed(group, WidthRule(measured={"b": 16})) == allowed(group, WidthRule())
    assert allowed(group, WidthRule(4, measured={"a": 16})) == list(range(4, 65, 4))
    assert steps.LEAST_WIDTHS * 2 * steps.FINER[-1] >= 256


# ---------------------------------------------------------------- plans for a time


def timed_analysis(monkeypatch, budget):
    monkeypatch.setattr(fitting, "replay_ms", law)
    model = seeded(wide)
    analysis = analyse(model, torch.zeros(1, 3, 8, 8))
    return model, *timed(analysis, WidthRule(), budget, LatencySetup(), archscan.options.silent)


def fake_compare(monkeypatch, ratio_of):
    """Let a network take the share of the time that a function of its share of the parameters says."""
    seen = []

    def compared(before, after, *_):
        share = sum(p.numel() for p in after.parameters()) / sum(p.numel() for p in before.parameters())
        seen.append(ratio_of(share))
        return Comparison(latency(1.0), latency(seen[-1]), seen[-1], seen[-1], seen[-1])

    monkeypatch.setattr("archscan.pace.compare", compared)
    return seen


def latency(milliseconds):
    return Latency(milliseconds, 0.1, 9, 1, 1, "contiguous", "a machine")


@pytest.mark.parametrize(
    "ratio_of", [lambda s: s, lambda s: 0.3 + 0.7 * s, lambda s: s**1.5, lambda s: s**0.6], ids=range(4)
)
def test_a_plan_is_corrected_until_its_time_is_right(monkeypatch, ratio_of):
    budget = Budget("latency", 0.7)
    model, analysis, rule = timed_analysis(monkeypatch, budget)
    seen = fake_compare(monkeypatch, ratio_of)
    wish = Wish(budget, rule, 0, setup=LatencySetup())
    saliency = np.random.default_rng(0).exponential(size=analysis.coupling.unit_count)
    made = plan_and_time(model, torch.zeros(1, 3, 8, 8), analysis, saliency, wish, archscan.options.silent)
    assert seen[-1] == pytest.approx(0.7, rel=0.05)
    assert len(seen) <= 4
    assert made.plan.budget == budget


def test_a_time_that_cannot_be_had_keeps_the_closest_plan(monkeypatch):
    budget = Budget("latency", 0.5)
    model, analysis, rule = timed_analysis(monkeypatch, budget)
    seen = fake_compare(monkeypatch, lambda s: 0.9 + 0.1 * s)
    wish = Wish(budget, rule, 0, setup=LatencySetup())
    saliency = np.ones(analysis.coupling.unit_count)
    made = plan_and_time(model, torch.zeros(1, 3, 8, 8), analysis, saliency, wish, archscan.options.silent)
    share = sum(p.numel() for p in made.rebuilt.model.parameters()) / sum(p.numel() for p in model.parameters())
    assert 0.9 + 0.1 * share == min(seen)
    wish = replace(wish, budget=Budget("latency", 0.001))
    with pytest.raises(InfeasibleBudget, match="measured time"):
        plan_and_time(model, torch.zeros(1, 3, 8, 8), analysis, saliency, wish, archscan.options.silent)


def test_the_correction_follows_the_line_through_the_dense_network():
    assert corrected(0.6, 0.7, 0.6) == pytest.approx(1 - 0.4 / 0.75)
    assert corrected(0.6, 0.6, 0.6) == pytest.approx(0.6)
    assert corrected(0.6, 1.1, 0.6) == pytest.approx(0.6 * 0.6 / 1.1)
    assert 0 < corrected(0.6, 0.9999, 0.1) < 0.6


def test_it_is_said_when_the_time_did_not_follow():
    plain = slim(seeded(Plain), INPUT, target_flops=0.5, criterion="magnitude", settings=SlimSettings(WidthRule(1)))

    def timing_of(ratio):
        both = Comparison(latency(1.0), latency(ratio), ratio, ratio, ratio)
        return Timing(both, {}, {}, Roofline(1.0, 1.0))

    (sentence,) = time_warnings(timing_of(0.95), plain.plan)
    assert "time only to 95.0%" in sentence
    assert "batch 1, 1 threads" in sentence
    assert time_warnings(timing_of(0.6), plain.plan) == []
    asked = replace(plain.plan, budget=Budget("latency", 0.8))
    assert "80.0% was asked for" in time_warnings(timing_of(0.95), asked)[0]
    assert time_warnings(timing_of(0.83), asked) == []


def test_a_target_on_time_from_python(monkeypatch):
    monkeypatch.setattr(fitting, "replay_ms", law)
    model = seeded(Residual)
    settings = SlimSettings(WidthRule(1), latency=LatencySetup(2, repeats=3))
    result = slim(model, INPUT, target_latency=0.8, target_flops=0.9, criterion="magnitude", settings=settings)
    assert result.plan.budget == Budget("macs", 0.9, (Budget("latency", 0.8),))
    assert result.plan.after.macs <= 0.9 * result.plan.before.macs
    assert result.verification.passed
    summary = result.summary
    assert summary["latency"]["batch"] == 2
    assert summary["target"] == {"kind": "macs", "ratio": 0.9}
    assert summary["further_targets"] == [{"kind": "latency", "ratio": 0.8}]
    assert {row["bound"] for row in summary["modules"] if row["macs"]} <= {"memory", "compute"}
    report = Report.from_json(summary)
    assert "of its measured time (asked for: 80.0%)" in views.verdict(report)
    assert "batch 2, 1 thread, contiguous" in views.latency_line(
        replace(report, latency=replace(report.latency, threads=1))
    )
    assert views.cost_rows(report)[3].before == report.before.peak_bytes >= report.after.peak_bytes


def test_without_a_measurement_nothing_is_said_of_time():
    result = slim(seeded(Plain), INPUT, target_flops=0.6, criterion="magnitude")
    assert result.timing is None
    assert result.summary["latency"] is None
    assert views.latency_line(Report.from_json(result.summary)) is None
    assert not cache.folder().exists()


def test_the_command_line_measures_and_says_so(capsys, tmp_path):
    folder = str(tmp_path / "result")
    words = ["reference:lenet5", "--target-flops", "0.7", "--target-params", "0.6", "--criterion", "magnitude"]
    assert cli.main([*words, "--latency", "--latency-batch", "2", "--threads", "1", "--output", folder]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "70.0%)" in printed
    assert "at most 60.0%)" in printed
    assert "of its measured time;" in printed
    assert "batch 2, 1 thread, contiguous" in printed
    assert cli.main(["show", folder, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["latency"]["threads"] == 1
    assert [row["kind"] for row in (summary["target"], *summary["further_targets"])] == ["macs", "params"]
    assert all(kept <= asked for kept, asked in zip(summary["keep_ratio"].values(), (0.7, 0.6), strict=True))
