"""Widening: copies leave what a network computes, the rest pays for them, and what cannot be copied is refused."""

import importlib
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import archscan
from archscan.commands.widen import make_parser, read_options
from archscan.errors import BadInput, InfeasibleBudget, RebuildMismatch
from archscan.groups import couple
from archscan.options import BudgetOptions, DataOptions, ModelOptions, OutputOptions, RunOptions, WidenOptions
from archscan.planner import Plan
from archscan.randomize import randomize
from archscan.rebuild import apply, rebuild, surgery_for
from archscan.recount import fvcore_macs
from archscan.results import Analysis
from archscan.slimming import analyse
from archscan.surgery import MAX_REPEATS, Cut, Surgery
from archscan.verify import masked_original, output_tensors
from archscan.widening import WidenSettings, widen
from archscan.widening.copies import all_sources, sources_of, stretched, wider_steps
from archscan.widening.trial import Bench, try_wider
from tests.nets import CASES, INPUT, Depthwise, Grouped, Plain

COMPUTED = "not itself the weight that reads"
TOGETHER = "taken together"
EQUALLY = "copied equally often"

REFUSED = {
    "native-shuffle": {"conv2": TOGETHER},
    "standardised-weight": {"conv1": TOGETHER},
    "channel-attention": {"conv": TOGETHER},
    "weight-norm": {"conv1": COMPUTED},
    "weight-norm-transposed": {"conv1": TOGETHER, "conv2": TOGETHER},
}
"""Groups that copies would change, and why."""

UNEQUALLY = {**REFUSED, "channels-last": {"stem": EQUALLY}}
UNEQUALLY |= {name: {"conv": EQUALLY} for name in ("group-norm", "group-norms-in-turn")}
UNEQUALLY |= {
    name: dict.fromkeys(REFUSED[name], EQUALLY)
    for name in ("native-shuffle", "standardised-weight", "channel-attention", "weight-norm-transposed")
}
"""The same where some channels are copied and others are not."""


def made(name):
    torch.manual_seed(0)
    model = randomize(CASES[name].make(), 1).double().eval()
    images = torch.randn(INPUT.shape).double()
    return model, images, couple(model, images)


def live(coupling):
    return [group for group in coupling.groups if group.frozen is None]


def repeated(group, times):
    steps = tuple(step for step in range(group.steps) for _ in range(times(step)))
    return (steps,) * len(group.units)


def twice(_step):
    return 2


def some(step):
    return 1 + step % 2


def differ(model, other, images):
    """Largest difference of any output, relative to the largest output."""
    with torch.no_grad():
        pairs = list(zip(output_tensors(model.eval()(images)), output_tensors(other.eval()(images)), strict=True))
    return max(float((a - b).abs().max()) for a, b in pairs) / max(float(a.abs().max()) for a, _ in pairs)


# --- every coupling pattern ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_each_group_alone_leaves_what_the_network_computes(name):
    model, images, coupling = made(name)
    for group in live(coupling):
        times = twice if group.name in UNEQUALLY.get(name, ()) else some
        if group.name not in REFUSED.get(name, ()):
            kept = all_sources(coupling.groups, {group.name: repeated(group, times)})
            assert differ(model, rebuild(model, images, coupling, kept).model, images) < 1e-9, group.name


@pytest.mark.parametrize("name", CASES)
def test_all_groups_at_once_or_the_reason_why_not(name):
    model, images, coupling = made(name)
    analysis = analyse(model, images)
    sources = {group.name: repeated(group, twice) for group in live(coupling)}
    trial = try_wider(Bench(model, images, images, 0), analysis, sources)
    expected = REFUSED.get(name, {})
    assert set(trial.refused) == set(expected)
    assert all(expected[group] in why for group, why in trial.refused.items())
    assert set(trial.sources) == set(sources) - set(expected)
    wider = trial.rebuilt.model
    assert differ(model, wider, images) < 1e-9
    assert (trial.verification.proof, trial.verification.passed) == ("masked original", True)
    widths_G = np.array([len(steps[0]) for steps in all_sources(coupling.groups, trial.sources).values()])
    assert analysis.costs.evaluate("params", widths_G) == sum(parameter.numel() for parameter in wider.parameters())
    torch.stack([out.square().sum() for out in output_tensors(wider.train()(images))]).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in wider.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", sorted(UNEQUALLY))
def test_copying_some_channels_only_is_refused_with_its_reason(name):
    model, images, coupling = made(name)
    sources = {group.name: repeated(group, some) for group in live(coupling)}
    trial = try_wider(Bench(model, images, images, 0), analyse(model, images), sources)
    assert set(trial.refused) == set(UNEQUALLY[name])
    assert all(UNEQUALLY[name][group] in why for group, why in trial.refused.items())


def test_a_depthwise_convolution_gets_more_groups_and_a_grouped_one_wider_groups():
    model, images, coupling = made("depthwise-multiplier")
    kept = all_sources(coupling.groups, {"expand": repeated(coupling.groups[1], some)})
    dw = rebuild(model, images, coupling, kept).model.dw
    assert (dw.groups, dw.in_channels, dw.out_channels, tuple(dw.weight.shape[:2])) == (12, 12, 24, (24, 1))
    model, images, coupling = made("grouped-places")
    kept = all_sources(
        coupling.groups, {name: repeated(g, twice) for g in live(coupling) if (name := g.name) != "conv3"}
    )
    conv = rebuild(model, images, coupling, kept).model.conv2
    assert (conv.groups, conv.in_channels, conv.out_channels, tuple(conv.weight.shape[:2])) == (2, 32, 32, (32, 16))
    model, images, coupling = made("grouped-whole")
    kept = all_sources(coupling.groups, {"conv1": repeated(coupling.groups[1], some)})
    surgery = rebuild(model, images, coupling, kept).surgery
    assert surgery.cuts["conv1.weight"][0].kept == (
        0,
        1,
        2,
        3,
        2,
        3,
        4,
        5,
        6,
        7,
        6,
        7,
        8,
        9,
        10,
        11,
        10,
        11,
        12,
        13,
        14,
        15,
        14,
        15,
    )
    assert surgery.cuts["conv2.weight"] == (replace(surgery.cuts["conv1.weight"][0], repeats="whole"),)
    assert surgery.cuts["conv3.weight"][0].repeats == "split"


# --- shares ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_shares_add_up_exactly_and_are_unequal(data):
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    model = nn.Linear(columns, rows).to(dtype)
    with torch.no_grad():
        model.weight.mul_(data.draw(st.sampled_from([1e-3, 1.0, 100.0])))
    times = data.draw(st.lists(st.integers(1, 5), min_size=columns, max_size=columns))
    kept = tuple(np.repeat(np.arange(columns), times).tolist())
    cut = Cut(1, kept, "split") if len(kept) > columns else Cut(1, kept)
    wide = apply(model, Surgery({"weight": (cut,)})).weight.detach().double()
    summed = torch.zeros(rows, columns, dtype=torch.float64).index_add_(1, torch.tensor(kept), wide)
    assert torch.equal(summed, model.weight.detach().double())
    if dtype in (torch.float32, torch.float64):
        for column, often in enumerate(times):
            copies = wide[:, [place for place, source in enumerate(kept) if source == column]]
            assert len(torch.unique(copies[0])) == often


def test_a_surgery_always_gives_the_same_network():
    model, images, coupling = made("plain")
    kept = all_sources(coupling.groups, {g.name: repeated(g, twice) for g in live(coupling)})
    first, second = (rebuild(model, images, coupling, kept) for _ in range(2))
    again = apply(model, first.surgery).state_dict()
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name])
        assert torch.equal(tensor, again[name])


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam])
def test_copies_part_in_training(optimiser):
    model, images, coupling = made("plain")
    kept = all_sources(coupling.groups, {"conv1": repeated(live(coupling)[0], twice)})
    wide = rebuild(model, images, coupling, kept).model.train()
    assert torch.equal(wide.conv1.weight[0], wide.conv1.weight[1])
    steps = optimiser(wide.parameters(), lr=0.01)
    labels = torch.arange(len(images)) % 5
    for _ in range(3):
        steps.zero_grad()
        nn.functional.cross_entropy(wide(images), labels).backward()
        steps.step()
    apart = (wide.conv1.weight[0::2] - wide.conv1.weight[1::2]).abs().amax((1, 2, 3))
    assert bool((apart > 1e-5).all())


def test_the_original_is_untouched_and_the_memory_format_kept():
    model = Plain().to(memory_format=torch.channels_last)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    coupling = couple(model, INPUT)
    wide = apply(
        model, surgery_for(coupling, all_sources(coupling.groups, {"conv1": repeated(coupling.groups[1], twice)}))
    )
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert wide.conv2.weight.is_contiguous(memory_format=torch.channels_last)


# --- which steps are copied ------------------------------------------------------------------------------------------


GROUPED = live(couple(Grouped(2), INPUT))


@settings(max_examples=60, deadline=None)
@given(st.floats(1.01, 4), st.integers(0, 2**31))
def test_every_step_is_there_and_the_most_salient_ones_most_often(factor, seed):
    for group in GROUPED:
        saliency_U = np.random.default_rng(seed).random(1 + max(map(max, group.units)))
        for units, steps in zip(group.units, sources_of(group, factor, saliency_U), strict=True):
            assert len(steps) == wider_steps(group, factor) > group.steps
            assert list(steps) == sorted(steps)
            counts = np.bincount(steps, minlength=group.steps)
            assert counts.min() >= 1
            assert counts.max() - counts.min() <= 1
            order = np.argsort(-saliency_U[list(units)], kind="stable")
            assert (np.diff(counts[order]) <= 0).all()


def test_widths_keep_to_the_multiples_that_they_were():
    by_name = {group.name: group for group in live(couple(Plain(), INPUT))}
    assert [wider_steps(by_name["conv1"], factor) for factor in (1.01, 1.4, 1.6, 2, 3)] == [16, 16, 16, 16, 24]
    assert [wider_steps(by_name["conv2"], factor) for factor in (1.01, 1.7, 2)] == [16, 20, 24]


def test_the_planner_sees_wider_groups_as_frozen_and_pays_their_price():
    model = Plain()
    analysis = analyse(model, INPUT)
    sources = {"conv1": repeated(analysis.coupling.groups[1], twice)}
    seen = stretched(analysis.coupling.groups, analysis.costs, sources)
    wide = rebuild(model, INPUT, analysis.coupling, all_sources(analysis.coupling.groups, sources)).model
    assert seen.costs.evaluate("macs", seen.costs.full_widths_G) == fvcore_macs(wide, INPUT[:1])
    assert {group.name for group in seen.groups if group.frozen == "widened"} == {"conv1"}


# --- from Python -----------------------------------------------------------------------------------------------------


def labelled(count=16):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(count, 3, 12, 12, generator=generator), torch.arange(count) % 5) for _ in range(2)]


def only(*names, **more):
    return WidenSettings(only=names, **more)


def test_bottlenecks_of_a_slimming_are_what_gets_wider():
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(width) for width in (16, 8, 16, 16)]
    convs = [nn.Conv2d(*widths, 3, padding=1) for widths in pairwise((3, 16, 8, 16, 16))]
    layers = [layer for conv, norm in zip(convs, norms, strict=True) for layer in (conv, norm, nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).eval()
    with torch.no_grad():  # most of what the wide layers hold is next to nothing, and the narrow one is never silent
        for norm in (norms[0], *norms[2:]):
            norm.weight[4:] = 1e-3
        norms[1].bias.fill_(2.0)
    slim = archscan.slim(model, INPUT, target_flops=0.5, data=labelled())
    seen = [bottleneck["group"] for bottleneck in slim.summary["bottlenecks"]]
    wide = widen(model, INPUT, data=labelled())
    assert seen == list(wide.widened) == ["3"]
    assert wide.notes[0].startswith("Bottlenecks: slimmed to 50% of the MACs the network keeps")
    assert ": 3 " in wide.notes[0]
    assert differ(model, wide.model, INPUT.new_ones(INPUT.shape)) < 1e-5
    assert wide.verification.max_abs_error < 1e-9
    assert wide.plan.after.macs > wide.plan.before.macs
    assert wide.summary["command"] == "widen"


def test_others_pay_for_it():
    torch.manual_seed(0)
    model = randomize(Plain(), 0)
    wide = widen(model, INPUT, data=labelled(), settings=only("conv1", keep_flops=True, recover="bn"))
    assert wide.plan.after.macs <= wide.plan.before.macs
    assert len(wide.plan.kept["conv1"][0]) == 16
    assert len(wide.plan.kept["conv2"][0]) < 12
    assert fvcore_macs(wide.model, INPUT[:1]) == wide.plan.after.macs
    unrepaired = apply(model, wide.surgery).double()
    masked = masked_original(model, wide.analysis.coupling, wide.plan.kept).double()
    assert differ(masked, unrepaired, torch.randn(INPUT.shape).double()) < 1e-9
    assert "recalibrated on 32 images" in wide.recovery
    assert not torch.equal(wide.model.bn2.running_mean, unrepaired.bn2.running_mean.float())


def test_no_more_macs_than_before_whatever_gets_wider():
    model = randomize(CASES["squeeze-excite"].make(), 0)
    for names in (("reduce",), ("conv2",), ("reduce", "conv2")):
        wide = widen(model, INPUT, criterion="magnitude", settings=only(*names, keep_flops=True))
        assert wide.plan.after.macs <= wide.plan.before.macs
        assert wide.widened == names


def test_a_network_with_statistics_over_channels_pays_too():
    model = CASES["channels-last"].make()
    wide = widen(model, INPUT, criterion="magnitude", settings=only("fc1", keep_flops=True))
    assert wide.verification.proof == "same statistics"
    assert wide.plan.widened == ("fc1",)
    assert len(wide.plan.kept["stem"][0]) < 8


def test_saved_and_loaded_bit_for_bit_and_slimmed_again(tmp_path):
    torch.manual_seed(0)
    model = randomize(Depthwise(), 0)
    wide = widen(model, INPUT, criterion="magnitude", settings=only("project", keep_flops=True))
    folder = wide.save(tmp_path / "wide")
    loaded = archscan.load(folder, model=Depthwise())
    state = wide.model.state_dict()
    assert list(loaded.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert [type(module) for module in loaded.modules()] == [type(module) for module in wide.model.modules()]
    assert repr(loaded) == repr(wide.model)
    saved = json.loads((folder / "plan.json").read_text())
    assert saved["format"] == 2
    assert Plan.from_json(saved["history"][0]["plan"]) == wide.plan
    slim = archscan.slim(loaded, INPUT, target_flops=0.7, criterion="magnitude")
    again = replace(slim, history=archscan.saving.read_history(folder, model=Depthwise())).save(tmp_path / "again")
    last = archscan.load(again, model=Depthwise()).state_dict()
    assert all(torch.equal(tensor, last[name]) for name, tensor in slim.model.state_dict().items())


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("plain", only("conv9"), "no channel group is called 'conv9'; did you mean 'conv2' or 'conv1'"),
        ("plain", only("fc"), "fc cannot get wider: network output"),
        ("plain", only("conv1", protect=("conv1",)), "conv1 cannot get wider: protected by 'conv1'"),
        (
            "weight-norm",
            only("conv1"),
            f"conv1 cannot get wider: conv2.parametrizations.weight.original1 is {COMPUTED}",
        ),
        ("group-norm", only("conv", factor=1.5), "GroupNorm at norm.0"),
        ("channel-attention", only("conv"), "convolution over channels at slide"),
    ],
)
def test_what_cannot_get_wider(name, settings, sentence):
    with pytest.raises(BadInput) as caught:
        widen(CASES[name].make(), INPUT, criterion="magnitude", settings=settings)
    assert sentence in str(caught.value)


def test_a_group_that_cannot_get_wider_is_left_as_it_is():
    wide = widen(CASES["weight-norm"].make(), INPUT, criterion="random", settings=only("conv1", "conv2"))
    assert wide.widened == ("conv2",)
    assert list(wide.refused) == ["conv1"]
    assert any(note.startswith("conv1 was not widened: ") for note in wide.notes)


def test_others_that_cannot_pay():
    settings = only("conv1", keep_flops=True, factor=8, rule=archscan.WidthRule(min_width=4))
    with pytest.raises(InfeasibleBudget, match=r"cannot pay for a network that costs \d\.\d\d times the MACs"):
        widen(Plain(), INPUT, criterion="magnitude", settings=settings)


def test_no_bottleneck():
    with pytest.raises(BadInput, match="no channel group stands out as a bottleneck at 100% of the MACs"):
        widen(Plain(), INPUT, criterion="magnitude", settings=WidenSettings(find_at=1.0))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"factor": 1}, "must be above 1"),
        ({"factor": 17.0}, "at most 16"),
        ({"factor": True}, "must be above 1"),
        ({"only": "conv1"}, r"pass a tuple of patterns: \('conv1',\)"),
        ({"recover": "ls", "keep_flops": True}, "repaired by 'bn' or 'none'"),
        ({"recover": "bn"}, "leave out recover='bn'"),
    ],
)
def test_settings_that_make_no_sense(arguments, sentence):
    with pytest.raises(BadInput, match=sentence):
        WidenSettings(**arguments)


def test_repair_without_images_or_batchnorm():
    settings = only("conv1", keep_flops=True, recover="bn")
    with pytest.raises(BadInput, match="needs real images"):
        widen(Plain(), INPUT, settings=settings)
    with pytest.raises(BadInput, match="no BatchNorm"):
        widen(CASES["no-batch-norm"].make(), INPUT, data=labelled(), settings=settings)


def test_a_defect_of_several_groups_together_is_no_refusal(monkeypatch):
    model, images, coupling = made("plain")
    widen_both = Bench.widen

    def wrong(bench, coupling, sources):
        rebuilt, proof = widen_both(bench, coupling, sources)
        return rebuilt, replace(proof, passed=len(sources) < 2, reason="planted")

    monkeypatch.setattr(Bench, "widen", wrong)
    sources = {group.name: repeated(group, twice) for group in live(coupling)}
    with pytest.raises(RebuildMismatch, match=r"planted.*though each group alone can be widened"):
        try_wider(Bench(model, images, images, 0), analyse(model, images), sources)


class Fixed(nn.Module):
    """A forward with a width in its code."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6 * 100, 5)

    def forward(self, x):
        return self.fc(self.conv2(self.conv1(x).relu()).relu().reshape(-1, 600))


def test_a_width_that_a_forward_holds():
    with pytest.raises(BadInput, match="conv2 cannot get wider: the forward of the model hard-codes a width"):
        widen(Fixed(), INPUT, criterion="magnitude", settings=only("conv2"))
    assert widen(Fixed(), INPUT, criterion="magnitude", settings=only("conv1")).widened == ("conv1",)


# --- files of unknown origin -----------------------------------------------------------------------------------------


def test_wide_surgeries_survive_json():
    for name in ("plain", "grouped-places", "grouped-whole", "depthwise", "flatten", "heads"):
        model, images, coupling = made(name)
        kept = all_sources(coupling.groups, {g.name: repeated(g, some) for g in live(coupling)})
        surgery = rebuild(model, images, coupling, kept).surgery
        assert Surgery.from_json(json.loads(json.dumps(surgery.to_json())), model) == surgery


@pytest.mark.parametrize(
    "cut",
    [
        {"axis": 0, "kept": [[0, 1], [0, 1]]},
        {"axis": 0, "kept": [[0, 4], [0, 4]], "repeats": None},
        {"axis": 0, "kept": [[0, 4], [0, 4]], "repeats": "often"},
        {"axis": 0, "kept": [[0, 4], [0, 4]], "repeats": ["copied"]},
        {"axis": 0, "kept": [[0, 4], [0, 4]], "repeats": "copied", "more": 1},
        {"axis": 0, "kept": [[0, 5]], "repeats": "copied"},
        {"axis": 0, "kept": [[3, 1]], "repeats": "copied"},
        {"axis": 0, "kept": [[0, 4]] * (MAX_REPEATS + 1), "repeats": "copied"},
        {"axis": 1, "rows": [[4, [[0, 3]] * (MAX_REPEATS + 1)]], "repeats": "split"},
    ],
)
def test_surgery_json_that_does_not_fit_is_refused(cut):
    with pytest.raises(BadInput, match="the plan does not fit this model"):
        Surgery.from_json({"cuts": {"weight": [cut]}, "attributes": {}}, nn.Linear(3, 4))


@pytest.mark.parametrize(
    ("new", "fits"), [(8, True), (1, True), (3 * MAX_REPEATS + 1, False), (10**30, False), (-1, False)]
)
def test_attributes_grow_only_with_the_network(new, fits):
    data = {"cuts": {"weight": [{"axis": 1, "kept": [[0, 3], [0, 3]], "repeats": "split"}]}}
    data["attributes"] = {"": {"in_features": new}}
    if fits:
        assert Surgery.from_json(data, nn.Linear(3, 4)).attributes[""]["in_features"] == new
    else:
        with pytest.raises(BadInput, match="can only grow so far from"):
            Surgery.from_json(data, nn.Linear(3, 4))


@pytest.mark.parametrize(
    ("steps", "complaint"),
    [([0, 0, 2], "repeats steps"), ([1, 1], "repeats steps"), ([1, 0, 1], "not sorted"), ([0, 1, 0], "not sorted")],
)
def test_plans_with_odd_sources_are_refused(steps, complaint):
    model = Plain()
    plan = widen(model, INPUT, criterion="magnitude", settings=only("conv1")).plan.to_json()
    assert Plan.from_json(plan).widened == ("conv1",)
    with pytest.raises(BadInput, match=complaint):
        Plan.from_json({**plan, "kept": {**plan["kept"], "conv1": [steps]}})
    with pytest.raises(BadInput, match="macs grow"):
        Plan.from_json({**plan, "kept": {**plan["kept"], "conv1": [list(range(8))]}})


def test_sources_of_another_network_are_refused():
    analysis: Analysis = analyse(Plain(), INPUT)
    groups = analysis.coupling.groups
    kept = all_sources(groups, {"conv1": ((0, 0, 1, 2, 3, 4, 5, 6),)})
    with pytest.raises(BadInput, match="or all of them with some repeated"):
        surgery_for(analysis.coupling, kept)
    with pytest.raises(BadInput, match=r"fc' is frozen \(network output\)"):
        surgery_for(analysis.coupling, all_sources(groups, {"fc": ((0, 0, 1, 1, 2, 2, 3, 3, 4, 4),)}))


def test_a_folder_that_grows_beyond_its_tensors_is_refused(tmp_path):
    folder = widen(Plain(), INPUT, criterion="magnitude", settings=only("conv1")).save(tmp_path / "wide")
    plan = json.loads((folder / "plan.json").read_text())
    step, rows, history = plan["history"][0], 5, []
    for _ in range(4):
        cut = {"axis": 0, "kept": [[0, rows]] * MAX_REPEATS, "repeats": "copied"}
        history.append({**step, "surgery": {"cuts": {"fc.weight": [cut]}, "attributes": {}}})
        rows *= MAX_REPEATS
    (folder / "plan.json").write_text(json.dumps({**plan, "history": history}))
    with pytest.raises(BadInput, match="widens the network beyond anything"):
        archscan.load(folder, model=Plain())


def test_formats_of_tomorrow_are_refused(tmp_path):
    folder = widen(Plain(), INPUT, criterion="magnitude", settings=only("conv1")).save(tmp_path / "wide")
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**plan, "format": 3}))
    with pytest.raises(BadInput, match="reads formats up to 2"):
        archscan.load(folder, model=Plain())


# --- from the command line -------------------------------------------------------------------------------------------


def test_command_line(typed):
    opened = ["widen", "lenet5", "--weights", "random", "--only", "conv2", "--data", "digits", "--samples", 64]
    ran = typed(*opened, "--eval-data", "digits", "--output", "out")
    assert ran.code == 0, ran.err
    printed = " ".join(ran.out.split())
    assert "the new network computes what the original does" in printed
    assert "against original" in printed
    shown = json.loads(typed("show", "out", "--json").out)
    assert shown["command"] == "widen"
    assert shown["accuracy"]["before"] == shown["accuracy"]["after"] > 0
    assert typed("evaluate", "out", "--data", "digits", "--samples", 64).code == 0
    assert typed("out", "--target-flops", 0.5, "--output", "again", "--quiet").code == 0
    report = json.loads(typed(*opened, "--keep-flops", "--output", "paid", "--json").out)
    assert report["after"]["macs"] <= report["before"]["macs"]
    assert {row["name"] for row in report["groups"] if row["kept"] > row["units"]} == {"conv2"}


def test_the_experiment_says_no_more_than_its_seeds_allow(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    report = importlib.import_module("expand_prune_report")

    def points(*gaps):
        for seed, gap in enumerate(gaps):
            for way, accuracy in ((report.WIDE, 0.8 + gap), (report.EVEN, 0.8)):
                yield report.Point(seed, way, "scratch", 2, 2, {}, 0.7, accuracy, accuracy, 1, 1, 1.0)

    verdicts = {
        (0.01,): "one seed tells nothing",
        (0.01, 0.03): "not told apart",
        (0.02, 0.021, 0.022): "better",
        (-0.02, -0.021, -0.022): "worse",
    }
    for gaps, verdict in verdicts.items():
        found = report.differences(list(points(*gaps)))
        assert [gap.verdict for gap in found] == [verdict] * 2
        assert found[0].mean == pytest.approx(100 * np.mean(gaps))
    half_width = report.differences(list(points(0.01, 0.03)))[0].half_width
    assert half_width == pytest.approx(12.706 * np.std([1, 3], ddof=1) / 2**0.5, rel=1e-4)


EVERY_OPTION = """
resnet20_cifar --weights w.safetensors --input-size 32 --num-classes 7 --factor 1.5 --keep-flops --find-at 0.6
--only a.* b --only c --round-to 4 --min-width 2 --protect d --data d.zip --samples 64 --eval-data digits
--batch-size 8 --mean 0.5 --std 0.2 --criterion obs --recover none --device cpu --threads 2 --seed 7
--output out --overwrite --quiet
"""


def test_every_option_arrives():
    parsed = make_parser().parse_args(EVERY_OPTION.split())
    assert read_options(parsed, "as typed") == WidenOptions(
        ModelOptions("resnet20_cifar", "w.safetensors", (32, 32), 7),
        BudgetOptions("macs", 0.6, 4, 2, ("d",)),
        DataOptions("d.zip", 64, "digits", 8, (0.5,), (0.2,)),
        RunOptions("cpu", 2, 7),
        OutputOptions(Path("out"), overwrite=True, quiet=True),
        "obs",
        1.5,
        keep_flops=True,
        only=("a.*", "b", "c"),
        recover="none",
        command_line="as typed",
    )
    assert read_options(make_parser().parse_args(["x"]), "") == WidenOptions(ModelOptions("x"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--factor", "1"), "makes nothing wider"),
        (("--factor", "20"), "at most 16"),
        (("--recover", "bn"), "would have no effect"),
        (("--recover", "bn", "--keep-flops"), "needs real images"),
        (("--only", "nope"), "no channel group is called 'nope'"),
        (("--criterion", "obf"), "obf"),
    ],
)
def test_command_line_refusals(typed, arguments, sentence):
    ran = typed("widen", "lenet5", "--weights", "random", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert sentence in ran.err
    assert ran.err.startswith("archscan: ")
