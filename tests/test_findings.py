"""Findings: planted bottlenecks, planted waste, savings held against rebuilt networks, ranks and their JSON."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from archscan.activations import observe
from archscan.errors import BadInput
from archscan.findings import (
    Finding,
    GroupUse,
    GroupWidth,
    ModuleCost,
    Saving,
    capacity_bottlenecks,
    cost_findings,
    ranked,
)
from archscan.findings.capacity import stands_out
from archscan.findings.confidence import Planned, Replans, Votes, replan
from archscan.findings.redundancy import far_below
from archscan.gates import collect
from archscan.groups import couple
from archscan.losses import classification_loss
from archscan.recount import recount
from archscan.report import views
from archscan.report.model import Report
from archscan.report.terminal import console, render
from archscan.results import SlimSettings, report_of
from archscan.slimming import analyse, slim
from archscan.surgery import kept_units
from archscan.widths import WidthRule

SIZE = 8


class Narrow(nn.Module):
    """A narrow layer that everything goes through, between wide ones that mostly repeat themselves."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 32, 3, padding=1)
        self.narrow = nn.Conv2d(32, 8, 3, padding=1)
        self.again = nn.Conv2d(8, 32, 3, padding=1)
        self.head = nn.Linear(32, 8)

    def forward(self, x):
        x = torch.relu(self.narrow(torch.relu(self.wide(x))))
        return self.head(torch.relu(self.again(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def narrow():
    """Eight signals, all needed: each is spread over four channels of the wide layers, one of which does nearly all."""
    torch.manual_seed(0)
    model = Narrow().eval()
    with torch.no_grad():
        weak = torch.tensor([1.0, 0.05, 0.05, 0.05]).repeat(8)
        model.wide.weight.copy_(torch.randn(8, 3, 3, 3).repeat_interleave(4, 0) * weak[:, None, None, None])
        model.wide.bias.zero_()
        for layer in (model.narrow, model.again):
            layer.weight.mul_(0.0)
            layer.bias.zero_()
        for signal in range(8):
            model.narrow.weight[signal, 4 * signal : 4 * signal + 4, 1, 1] = 1.0
            model.again.weight[4 * signal : 4 * signal + 4, signal, 1, 1] = weak[:4]
            model.head.weight[:, 4 * signal : 4 * signal + 4] = 0.0
            model.head.weight[signal, 4 * signal : 4 * signal + 4] = 3.0
    return model


def images(count, batch=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for start in range(0, count, batch):
        size = min(batch, count - start)
        pairs.append((torch.randn(size, 3, SIZE, SIZE, generator=generator), torch.arange(start, start + size) % 8))
    return pairs


def slimmed(model, target=0.5, **options):
    return slim(model, torch.zeros(1, 3, SIZE, SIZE), target_flops=target, data=images(64), **options)


@pytest.fixture(scope="module")
def found(narrow):
    return slimmed(narrow, criterion="obd", settings=SlimSettings(WidthRule(round_to=1)))


# ---------------------------------------------------------------- capacity


def test_a_planted_bottleneck_is_found_with_confidence(found):
    capacity = [each for each in found.findings if each.kind == "capacity"]
    assert [each.where for each in capacity] == [("narrow",)]
    (finding,) = capacity
    assert finding.numbers["keep_ratio"] == 1.0
    assert finding.numbers["keep_ratio"] > finding.numbers["network_keep_ratio"]
    assert finding.confidence >= 0.75
    assert finding.measured_on == "64 images"
    assert finding.option == "archscan widen MODEL --only narrow --factor 2 --keep-flops"
    report = report_of(found)
    assert [item.group for item in report.bottlenecks] == ["narrow"]
    assert report.bottlenecks[0].confidence == finding.confidence


def test_what_widening_costs_is_what_a_wider_network_costs(found, narrow):
    wider = Narrow()
    wider.narrow, wider.again = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    before, after = (recount(model, torch.zeros(1, 3, SIZE, SIZE)).macs for model in (narrow, wider))
    (finding,) = (each for each in found.findings if each.kind == "capacity")
    assert finding.numbers["extra_macs_share"] == pytest.approx(after / before - 1, rel=1e-12)


def use(name, units, kept, frozen=False, share=0.2):
    return GroupUse(name, units, kept, 1, frozen, share)


def test_frozen_tiny_and_cheap_groups_are_no_bottlenecks():
    groups = [
        use("gave", 64, 16),
        use("stuck", 64, 64),
        use("frozen", 64, 64, frozen=True),
        use("tiny", 4, 4),
        use("cheap", 64, 64, share=0.001),
    ]
    assert [item.group for item in capacity_bottlenecks(groups, 0.5)] == ["stuck"]
    unsure = capacity_bottlenecks(groups, 0.5, {"stuck": 0.4})
    assert unsure == ()
    assert capacity_bottlenecks(groups, 0.5, {"stuck": 0.6})[0].confidence == 0.6


def test_where_most_groups_gave_nothing_none_of_them_stands_out():
    groups = [use("gave", 64, 32), *(use(f"kept{i}", 64, 64) for i in range(5))]
    network = 1 - 32 / (6 * 64)
    assert stands_out(1.0, network)
    assert capacity_bottlenecks(groups, network) == ()


@given(st.floats(0, 1), st.floats(0, 1))
def test_no_group_is_too_narrow_and_too_wide(keep, network):
    assert not (stands_out(keep, network) and far_below(keep, network))
    assert not stands_out(keep, network) or keep >= network
    assert not far_below(keep, network) or keep <= network + 1e-9


# ---------------------------------------------------------------- confidence


@pytest.fixture(scope="module")
def statistics():
    torch.manual_seed(0)
    model = Narrow().eval()
    analysis = analyse(model, torch.zeros(1, 3, SIZE, SIZE))
    needs = frozenset({"sample_gradient", "gradient"})
    found = collect(model, analysis.coupling, images(24), classification_loss, needs)
    saliency_U = np.square(found.sample_gradient_NU).mean(0) / 2
    rule = WidthRule(round_to=1)
    return Planned(analysis.coupling.groups, analysis.costs, rule, saliency_U, "obd", 0.5), found


def test_replans_are_deterministic_and_differ_by_seed(statistics):
    first, again, other = (replan(*statistics, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.resampled_RG, again.resampled_RG)
    assert not np.array_equal(first.resampled_RG, other.resampled_RG)
    assert first.criteria == ("taylor-fo", "taylor-abs", "loss-change", "mfac")
    assert first.budgets == (0.8, 0.6)
    assert first.resampled_RG.shape == (16, len(statistics[0].groups))


def test_without_gradients_budgets_alone_vote(statistics):
    planned, found = statistics
    replans = replan(planned, replace(found, sample_gradient_NU=None), 0)
    assert (len(replans.resampled_RG), replans.criteria) == (0, ())
    votes = replans.votes(lambda keep_G: keep_G > 0.9)
    assert all(vote.resamples is None and vote.criteria is None and vote.budgets is not None for vote in votes)


def test_votes_are_shares_and_confidence_is_the_least():
    replans = Replans(np.array([[1.0, 0.2], [1.0, 1.0]]), np.array([[0.1, 1.0]]), np.zeros((0, 2)), ("obd",), ())
    assert replans.votes(lambda keep_G: keep_G > 0.5) == (Votes(1.0, 0.0, None), Votes(0.5, 1.0, None))
    assert Votes(1.0, 0.5, None).confidence == 0.5
    assert Votes(None, None, 1.0).confidence == 0.5
    assert Votes(None, None, 0.2).confidence == 0.2
    assert Votes(None, None, None).confidence is None


# ---------------------------------------------------------------- redundancy


class Wasteful(nn.Module):
    """A network with silent, constant and repeated channels, and a layer that hardly matters."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.idle = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head((x + 1e-3 * self.beside(x)).mean((2, 3)))

    def beside(self, x):
        return torch.relu(self.idle(x))


@pytest.fixture(scope="module")
def wasteful():
    torch.manual_seed(0)
    model = Wasteful().eval()
    with torch.no_grad():
        model.first.bias[[2, 5]] = -1000.0  # silent on any image that is not absurd
        model.first.weight[7], model.first.bias[7] = 0.0, 1.5  # a constant
        model.first.weight[9], model.first.bias[9] = 2 * model.first.weight[8], 2 * model.first.bias[8]  # repeats 8
        model.first.weight[10], model.first.bias[10] = 3 * model.first.weight[8], 3 * model.first.bias[8]
    return model


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_silent_constant_and_repeated_channels_are_seen(wasteful, batch):
    coupling = couple(wasteful, torch.zeros(1, 3, SIZE, SIZE))
    before = {name: value.clone() for name, value in wasteful.state_dict().items()}
    seen = observe(wasteful, coupling, images(32, batch), classification_loss)
    number = next(i for i, group in enumerate(coupling.groups) if group.name == "first")
    units = np.array(coupling.groups[number].units[0])
    assert np.flatnonzero(seen.silent_U[units]).tolist() == [2, 5]
    assert np.flatnonzero(seen.constant_U[units]).tolist() == [2, 5, 7]
    assert {number: tuple(members) for number, members in seen.twins_by_group.items()} == {
        number: (tuple(units[[8, 9, 10]].tolist()),)
    }
    assert seen.samples == 32
    assert all(torch.equal(before[name], value) for name, value in wasteful.state_dict().items())
    assert not wasteful._forward_hooks
    assert not wasteful._forward_pre_hooks


def test_covariances_are_those_of_a_straight_computation(wasteful):
    coupling = couple(wasteful, torch.zeros(1, 3, SIZE, SIZE))
    one = [(x[:, :, :4, :4], y) for x, y in images(8, 4)]  # 16 positions: all of them are looked at
    seen = observe(wasteful, coupling, one, classification_loss)
    number = next(i for i, group in enumerate(coupling.groups) if group.name == "first")
    with torch.no_grad():
        read = torch.cat([torch.relu(wasteful.first(x)) for x, _ in one]).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(
        torch.from_numpy(seen.covariance_by_group[number]), torch.cov(read, correction=0), rtol=1e-5, atol=1e-7
    )


def test_units_that_were_flattened_keep_all_their_positions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * SIZE * SIZE, 8)).eval()
    with torch.no_grad():
        model[0].bias[1] = -1000.0
    coupling = couple(model, torch.zeros(1, 3, SIZE, SIZE))
    seen = observe(model, coupling, images(8), classification_loss)
    number = next(i for i, group in enumerate(coupling.groups) if group.name == "0")
    assert seen.silent_U[list(coupling.groups[number].units[0])].tolist() == [False, True, *[False] * 4]
    assert seen.covariance_by_group[number].shape == (6, 6)


def test_scaled_and_shifted_channels_repeat_and_nearly_equal_ones_do_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(256, 8)).eval()
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = -2 * model[0].weight[1], 3 - 2 * model[0].bias[1]
        model[0].weight[5] = model[0].weight[2] + 0.01 * torch.randn(3, 3, 3)
    coupling = couple(model, torch.zeros(1, 3, SIZE, SIZE))
    seen = observe(model, coupling, images(16), classification_loss)
    number = next(i for i, group in enumerate(coupling.groups) if group.name == "0")
    units = coupling.groups[number].units[0]
    assert seen.twins_by_group == {number: ((units[1], units[4]),)}


def test_no_batch_is_refused(wasteful):
    with pytest.raises(BadInput, match="no calibration batch"):
        observe(wasteful, couple(wasteful, torch.zeros(1, 3, SIZE, SIZE)), [], classification_loss)


@pytest.fixture(scope="module")
def waste_found(wasteful):
    return slimmed(wasteful, 0.6, criterion="obd", settings=SlimSettings(WidthRule(round_to=1)))


def test_what_was_silent_and_repeated_has_the_saving_of_a_rebuilt_network(waste_found, wasteful):
    by_word = {each.seen.split(",")[0].split()[-1]: each for each in waste_found.findings if each.kind != "redundancy"}
    dense = recount(wasteful, torch.zeros(1, 3, SIZE, SIZE)).macs
    for kind, gone in (("active", 2), ("constant", 1), ("group", 2)):
        narrow = Wasteful()
        narrow.first, narrow.second = nn.Conv2d(3, 16 - gone, 3, padding=1), nn.Conv2d(16 - gone, 16, 3, padding=1)
        counted = recount(narrow, torch.zeros(1, 3, SIZE, SIZE)).macs
        parameters = [sum(p.numel() for p in model.parameters()) for model in (wasteful, narrow)]
        assert by_word[kind].saving == Saving(dense - counted, parameters[0] - parameters[1])
        assert by_word[kind].where == ("first",)
        assert by_word[kind].numbers["channels"] == gone
        assert by_word[kind].measured_on == "64 images"


def test_the_remedy_for_silent_channels_takes_them_at_no_loss(waste_found, wasteful):
    (finding,) = (each for each in waste_found.findings if "never active" in each.seen)
    words = finding.option.split()
    assert words[0::2] == ["--target-flops", "--round-to"]
    result = slimmed(wasteful, float(words[1]), criterion="obd", settings=SlimSettings(WidthRule(int(words[3]))))
    group = next(each for each in result.analysis.coupling.groups if each.name == "first")
    stays = kept_units(result.analysis.coupling, result.plan.kept)[list(group.units[0])]
    assert not stays[[2, 5]].any()
    assert result.plan.saliency_lost == 0


def lopsided(width=24):
    """A layer of which three channels matter, among others of which all do."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, width, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(width, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 8)),
    )
    with torch.no_grad():
        model[4].weight[:, :3] *= 10
        model[4].weight[:, 3:] *= 1e-3
    return model.eval()


def test_a_layer_that_hardly_matters_is_redundant():
    result = slimmed(lopsided(), 0.5, criterion="obd", settings=SlimSettings(WidthRule(round_to=1)))
    (finding,) = (each for each in result.findings if each.kind == "redundancy")
    kept = len(result.plan.kept["2"][0])
    assert finding.where == ("2",)
    assert finding.numbers["keep_ratio"] == kept / 24
    assert far_below(kept / 24, finding.numbers["network_keep_ratio"])
    assert finding.confidence >= 0.5
    dense, narrow = lopsided(), lopsided(kept)
    macs = [recount(model, torch.zeros(1, 3, SIZE, SIZE)).macs for model in (dense, narrow)]
    parameters = [sum(p.numel() for p in model.parameters()) for model in (dense, narrow)]
    assert finding.saving == Saving(macs[0] - macs[1], parameters[0] - parameters[1])
    assert 0 < finding.numbers["saliency_share_lost"] < 0.01
    assert 0 < finding.numbers["activation_rank"] <= 24


def test_noise_is_not_watched(wasteful):
    result = slim(wasteful, torch.zeros(1, 3, SIZE, SIZE), target_flops=0.6, criterion="obd")
    assert not {each.kind for each in result.findings} & {"dead", "duplicate"}
    assert all(each.measured_on in ("", "32 images of synthetic noise") for each in result.findings)


def test_the_command_says_what_it_measured_on_and_does_not_watch_noise(typed):
    ran = typed("lenet5", "--weights", "random", "--target-flops", "0.5", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["findings"]
    assert {each["measured_on"] for each in found} <= {"", "32 images of synthetic noise"}
    assert "32 images of synthetic noise" in {each["measured_on"] for each in found if each["kind"] != "cost"} or not [
        each for each in found if each["kind"] in ("capacity", "redundancy")
    ]
    assert not [each for each in found if each["kind"] in ("dead", "duplicate") and each["measured_on"]]


def test_findings_are_the_same_again(waste_found, wasteful):
    again = slimmed(wasteful, 0.6, criterion="obd", settings=SlimSettings(WidthRule(round_to=1)))
    assert again.findings == waste_found.findings


# ---------------------------------------------------------------- cost


def layer(path, macs, **costs):
    return ModuleCost(path, macs, costs.pop("params", 10), **costs)


def kinds(modules, groups=()):
    return [(each.kind, each.where) for each in cost_findings(modules, groups, "cpu, 1 threads, batch 1")]


def test_layers_whose_time_is_far_from_their_macs_are_found():
    modules = [layer(f"conv{i}", 100, time_ms=1.0) for i in range(10)]
    modules.append(layer("depthwise", 10, time_ms=5.0, macs_per_byte=0.7, bound="memory"))
    (finding,) = cost_findings(modules, (), "cpu, 1 threads, batch 1")
    assert (finding.where, finding.option) == (("depthwise",), "--target-latency 0.6")
    assert finding.numbers["time_share"] == pytest.approx(1 / 3)
    assert finding.numbers["macs_share"] == pytest.approx(10 / 1010)
    assert "bound by memory at 0.7 MACs per byte" in finding.why
    assert finding.measured_on == "cpu, 1 threads, batch 1"


def test_modules_without_macs_count_together():
    modules = [layer(f"conv{i}", 100, time_ms=1.0) for i in range(10)]
    modules += [layer(f"norm{i}", 0, time_ms=0.5) for i in range(10)]
    (finding,) = cost_findings(modules, ())
    assert len(finding.where) == 10
    assert finding.numbers["time_share"] == pytest.approx(1 / 3)


def test_untimed_networks_are_judged_by_what_they_write():
    even = [layer(f"conv{i}", 100, activation_bytes=100) for i in range(10)]
    assert kinds(even) == []
    assert kinds([*even, layer("wide", 10, activation_bytes=900)]) == [("cost", ("wide",))]
    timed = [replace(each, time_ms=1.0) for each in even]
    assert kinds([*timed, layer("wide", 100, activation_bytes=9000, time_ms=1.0)]) == []


def test_few_layers_with_half_of_the_macs_and_heavy_layers_are_found():
    modules = [layer(f"conv{i}", 10, params=5) for i in range(20)]
    assert kinds([*modules, layer("dear", 300, params=5)]) == [("cost", ("dear",))]
    assert kinds([*modules, layer("fc", 1, params=5000)]) == [("cost", ("fc",))]
    assert kinds([]) == []


def test_awkward_widths_are_named_and_weighed_by_cost():
    groups = [GroupWidth("even", 64, 0.5), GroupWidth("odd", 27, 0.3), GroupWidth("worse", 33, 0.2)]
    groups.append(GroupWidth("narrow", 3, 0.1))
    (finding,) = cost_findings([], groups)
    assert (finding.kind, finding.where, finding.option) == ("width", ("odd", "worse"), "--round-to 8")
    expected = (0.3 * (1 - 27 / 32) + 0.2 * (1 - 33 / 40)) / 1.1
    assert finding.numbers["idle_share"] == pytest.approx(expected)
    assert (finding.numbers["multiples_of_8"], finding.numbers["multiples_of_32"]) == (1, 1)
    assert cost_findings([], groups[:1]) == ()


# ---------------------------------------------------------------- ranks and reports


def saving_of(share, confidence=None, lossless=False, kind="redundancy"):
    numbers = {"macs_share_saved": share, "params_share_saved": 0.0}
    return Finding(
        0, kind, "group", ("a",), "s", "w", "r", confidence=confidence, saving=Saving(1, 1, lossless), numbers=numbers
    )


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.booleans()), max_size=8))
def test_ranks_count_from_one_and_what_is_free_comes_first(rows):
    found = ranked([saving_of(*row) for row in rows])
    assert [each.rank for each in found] == list(range(1, len(rows) + 1))
    free = [each.saving.lossless for each in found]
    assert free == sorted(free, reverse=True)
    worth = [each.numbers["macs_share_saved"] * each.confidence for each in found if not each.saving.lossless]
    assert worth == sorted(worth, reverse=True)


def test_reports_say_the_same_everywhere(waste_found):
    report = report_of(waste_found)
    assert [each.rank for each in report.findings] == list(range(1, len(report.findings) + 1))
    assert Report.from_json(report.to_json()).findings == report.findings
    on = console(width=300, colour=False)
    with on.capture() as capture:
        on.print(render(report))
    printed = " ".join(capture.get().split())
    for each in report.findings[:8]:
        assert f"{each.rank} {each.kind}: {each.where[0]}" in printed
    for each in report.findings[:3]:
        for sentence in (each.seen, each.why, each.remedy, each.option):
            assert sentence in printed
    assert report.findings[3].seen not in printed
    assert views.lossless_line(report) is None


def test_every_sentence_is_one(found, waste_found):
    for each in (*report_of(found).findings, *report_of(waste_found).findings):
        for sentence in (each.seen, each.why, each.remedy):
            assert sentence.endswith(".")
            assert sentence.count(". ") == 0
