"""Dead channels: what is proven dead changes no output, and ``--lossless`` removes just that."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import archscan
from archscan.capture import capture
from archscan.dead_units import dead_units, lossless_kept
from archscan.errors import BadInput, RebuildMismatch
from archscan.groups import couple
from archscan.lossless import remove_dead
from archscan.ranges import Range, ranges
from archscan.ranges.rules import rule
from archscan.rebuild import rebuild
from archscan.recount import recount
from archscan.report.model import Report
from archscan.results import SlimSettings, report_of
from archscan.verify import output_tensors
from archscan.widths import WidthRule
from tests.masked import randomised
from tests.nets import CASES, INPUT

ANY_STEPS = WidthRule(round_to=1, min_width=1)


def dead_by_group(model, inputs):
    coupling = couple(model, inputs)
    dead_U = dead_units(model, coupling)
    found = {group.name: [int(i) for i in np.flatnonzero(dead_U[list(group.units[0])])] for group in coupling.groups}
    return {name: steps for name, steps in found.items() if steps}


class Planted(nn.Module):
    """Channels of `first` that are dead in several ways, and some that only look like it."""

    def __init__(self, activation=None):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.activation = activation or nn.ReLU()
        self.second = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.activation(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


def planted(activation=None):
    torch.manual_seed(0)
    model = Planted(activation).eval()
    with torch.no_grad():
        model.norm.weight[0], model.norm.bias[0] = 0.0, -0.5  # dead by the norm
        model.norm.weight[1], model.norm.bias[1] = 0.0, 0.0  # dead by the norm
        model.norm.weight[2], model.norm.bias[2] = 0.0, 0.5  # a constant other than 0
        model.first.weight[3] = 0.0  # a constant of 0 after the norm
        model.second.weight[:, 4] = 0.0  # nobody reads it
        model.norm.weight[5], model.norm.bias[5] = 1e-4, -10.0  # as good as dead on any image, but not for any input
        model.second.weight[2], model.second.bias[2] = 0.0, -1.0  # dead by weights
        model.head.weight[:, 6] = 0.0  # nobody reads it
    return model


def test_finds_what_is_dead_and_nothing_else():
    assert dead_by_group(planted(), torch.zeros(1, 3, 8, 8)) == {"first": [0, 1, 3, 4], "second": [2, 6]}


@pytest.mark.parametrize(
    ("activation", "dead"),
    [
        (nn.ReLU6(), [0, 1, 3, 4]),
        (nn.LeakyReLU(), [1, 3, 4]),
        (nn.SiLU(), [1, 3, 4]),
        (nn.GELU(), [1, 3, 4]),
        (nn.Hardswish(), [1, 3, 4]),
        (nn.Sigmoid(), [4]),
        (nn.Softplus(), [4]),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), [0, 1, 3, 4]),
        (nn.Sequential(nn.ReLU(inplace=True), nn.AvgPool2d(2)), [0, 1, 3, 4]),
        (nn.Softmax(dim=2), [4]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_knows_what_activations_make_of_a_constant(activation, dead):
    found = dead_by_group(planted(activation), torch.zeros(1, 3, 8, 8))
    assert found["first"] == dead


def test_a_bounded_input_can_be_dead_by_the_bias():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 3)
    )
    with torch.no_grad():
        reach = model[2].weight.clamp(min=0).sum((1, 2, 3))
        model[2].bias.copy_(-reach + torch.tensor([-0.01, 0.01, -0.5, 0.5, 0.0]))
    found = dead_by_group(model.eval(), torch.zeros(1, 3, 8, 8))
    assert found == {"2": [0, 2]}


def test_channels_of_a_residual_stream_live_as_long_as_anything_is_added():
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.branch, self.last = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.head = nn.Conv2d(6, 4, 1)

        def forward(self, x):
            x = torch.relu(self.norm(self.stem(x)))
            return self.head(torch.relu(x + self.last(self.branch(x))))

    model = Stream().eval()
    with torch.no_grad():
        model.norm.weight[:3], model.norm.bias[:3] = 0.0, 0.0
        model.last.weight[1:5], model.last.bias[1:5] = 0.0, -1.0
    assert dead_by_group(model, torch.zeros(1, 3, 6, 6)) == {"stem": [1, 2]}


def test_statistics_over_channels_keep_all_channels_alive():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.GroupNorm(1, 8), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight[:2], model[0].bias[:2] = 0.0, 0.0
        model[2].weight[:2], model[2].bias[:2] = 0.0, 0.0
    assert dead_by_group(model, torch.zeros(1, 3, 6, 6)) == {}


def plant_zeros(model, seed):
    """Zero rows, columns and scales at random, and make some shifts negative, where that leaves finite outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            before = tensor.clone()
            tensor[torch.rand(len(tensor), generator=generator) < 0.4] = 0.0
            if tensor.ndim > 1:
                tensor[:, torch.rand(tensor.shape[1], generator=generator) < 0.2] = 0.0
            else:
                tensor[torch.rand(len(tensor), generator=generator) < 0.2] *= -1
            if not all(output.isfinite().all() for output in output_tensors(model(INPUT.double()))):
                tensor.copy_(before)  # a standardised weight divides by its own deviation
    return model


@pytest.mark.parametrize("name", CASES)
def test_what_is_called_dead_changes_no_output(name):
    torch.manual_seed(0)
    found = 0
    for seed in range(2):
        model = plant_zeros(randomised(CASES[name].make(), seed), seed)
        coupling = couple(model, INPUT.double())
        kept = lossless_kept(coupling.groups, dead_units(model, coupling), ANY_STEPS)
        inputs = torch.randn(2, 3, 12, 12, dtype=torch.float64)
        smaller = rebuild(model, inputs, coupling, kept).model.eval()
        expected, got = output_tensors(model(inputs)), output_tensors(smaller(inputs))
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
        found += sum(group.steps - len(kept[group.name][0]) for group in coupling.groups)
    assert found or CASES[name].mixing or name in NOTHING_SEEN


NOTHING_SEEN = {
    "heads",
    "fused-heads",
    "multi-query",
    "linear-attention",
    "relative-places",
    "grouped-heads",
    "one-head",
    "cross-covariance",
}
"""Read by products of activations, which count as alive."""


@pytest.mark.parametrize("name", ["residual", "depthwise-multiplier", "squeeze-excite", "slice-add", "sub-pixel"])
def test_ranges_hold_what_the_network_computes(name):
    model = plant_zeros(randomised(CASES[name].make(), 1), 1)
    graph = capture(model, INPUT.double())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    seen = {}

    def see(path):
        return lambda _module, inputs: seen.update({path: inputs[0].clone()})

    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(see(path))
    model(torch.randn(2, 3, 12, 12, dtype=torch.float64))
    checked = 0
    for node, look_up in ranges(graph, tensors):
        if node.op is torch.ops.aten.convolution.default and node.module in seen:
            held = look_up(node.args[0].value)
            value = seen.pop(node.module)
            assert (value >= held.low - 1e-9).all()
            assert (value <= held.high + 1e-9).all()
            checked += 1
    assert checked


def test_two_rules_for_one_op_are_refused():
    with pytest.raises(ValueError, match="has a rule"):
        rule("relu")(lambda data: Range(data.low, data.high))


# ---------------------------------------------------------------- removing them


def test_remove_dead_removes_them_and_computes_the_same():
    model = planted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(6, 3, 8, 8)
    result = remove_dead(model, torch.zeros(1, 3, 8, 8), data=[(images, None)])
    assert [result.model.first.out_channels, result.model.second.out_channels] == [8, 6]
    with torch.no_grad():
        torch.testing.assert_close(result.model(images), model(images), rtol=1e-5, atol=1e-6)
    assert (result.lossless.channels, result.lossless.groups, result.lossless.images) == (6, 2, 6)
    assert result.lossless.error_on_noise < 1e-12
    assert result.lossless.error_on_images < 1e-5
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_it_saves_is_what_a_recount_finds():
    result = archscan.remove_dead(planted(), torch.zeros(1, 3, 8, 8))
    (finding,) = (each for each in result.findings if each.kind == "dead")
    parameters = [sum(p.numel() for p in model.parameters()) for model in (planted(), result.model)]
    assert finding.saving.params == parameters[0] - parameters[1]
    counted = [recount(model, torch.zeros(1, 3, 8, 8)).macs for model in (planted(), result.model)]
    assert finding.saving.macs == counted[0] - counted[1]
    assert finding.saving.macs >= 64 * (9 * 3 * (12 - 8) + 9 * (12 * 8 - 8 * 6)) + (8 - 6) * 4
    assert finding.saving.lossless


def test_its_report_says_so_and_reads_back(tmp_path):
    result = remove_dead(planted(), torch.zeros(1, 3, 8, 8), settings=SlimSettings(WidthRule(round_to=4)))
    report = report_of(result)
    assert Report.from_json(report.to_json()) == report
    assert report.saliency_lost is None
    assert result.model.second.out_channels == 8  # 6 is no multiple of 4
    loaded = archscan.load(result.save(tmp_path / "out"), model=planted())
    inputs = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(inputs), result.model(inputs))


def test_refuses_where_nothing_is_dead_or_an_option_would_do_nothing():
    torch.manual_seed(0)
    model = Planted()
    with pytest.raises(BadInput, match="no channel that may be removed is dead"):
        remove_dead(model, torch.zeros(1, 3, 8, 8))
    with pytest.raises(BadInput, match="nothing is scored or repaired"):
        remove_dead(model, torch.zeros(1, 3, 8, 8), settings=SlimSettings(recover="bn"))


def test_a_network_that_does_not_compute_the_same_is_refused(monkeypatch):
    def wrong(model, coupling):
        dead_U = dead_units(model, coupling)
        dead_U[coupling.groups[1].units[0][7]] = True
        return dead_U

    monkeypatch.setattr("archscan.lossless.dead_units", wrong)
    with pytest.raises(RebuildMismatch, match="does not compute what it did"):
        remove_dead(planted(), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    "options",
    [("--target-flops", "0.5"), ("--criterion", "obd"), ("--recover", "bn"), ("--rounds", "2"), ("--latency",)],
    ids=lambda options: options[0],
)
def test_lossless_leaves_no_room_for_other_options(typed, options):
    ran = typed("lenet5", "--lossless", *options)
    assert ran.code == 2
    assert "--lossless removes what changes no output" in ran.err
    assert ran.err.count("\n") == 1


def test_the_command_saves_what_is_left(typed, tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom tests.test_dead_units import planted\n\n\ndef make():\n    return planted()\n"
    )
    ran = typed("net.py:make", "--input-size", "8", "--lossless", "--output", "out")
    assert ran.code == 0, ran.err
    assert "lost 6 channels that did nothing" in ran.out.replace("\n", " ")
    assert "against the original with nothing masked" in " ".join(ran.out.split())


def test_equal_counts_limit_what_goes():
    groups = couple(CASES["shuffle"].make(), INPUT).groups
    group = next(each for each in groups if len(each.units) == 2)
    dead_U = np.zeros(1 + max(max(fibre) for each in groups for fibre in each.units), dtype=bool)
    dead_U[list(group.units[0][:2])] = True
    dead_U[group.units[1][3]] = True
    kept = lossless_kept([replace(group)], dead_U, ANY_STEPS)
    assert [len(fibre) for fibre in kept[group.name]] == [3, 3]
    assert 3 not in kept[group.name][1]
