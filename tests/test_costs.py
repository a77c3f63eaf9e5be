import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from archscan.capture import capture
from archscan.costs import CostModel, Size, constant_sizes, cost_model
from archscan.errors import BadInput, UnsupportedOp
from archscan.mac_table import IGNORED, MAC_HANDLES, register
from archscan.recount import recount

with warnings.catch_warnings():
    warnings.simplefilter(
        "ignore", DeprecationWarning
    )  # fvcore compiles a loss with torch.jit.script when it is imported
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis

NO_WIDTHS = np.zeros(0, dtype=np.int64)


def count_as_is(model: nn.Module, x: torch.Tensor) -> CostModel:
    """Price a network without groups: every size is constant."""
    graph = capture(model, x)
    parameters = {name: tuple(Size(n, {}) for n in p.shape) for name, p in model.named_parameters()}
    return cost_model(graph, constant_sizes(graph), parameters, NO_WIDTHS)


def with_widths(model: nn.Module, x: torch.Tensor, widths: list[int], fixed: tuple[int, ...] = ()) -> CostModel:
    """Price a network in which an axis belongs to a group if it is a multiple of one of the (coprime) widths."""

    def size(length: int) -> Size:
        for group, width in enumerate(widths):
            if length % width == 0:
                return Size(0, {group: length // width})
        return Size(length, {})

    graph = capture(model, x)
    parameters = {name: tuple(size(n) for n in p.shape) for name, p in model.named_parameters()}
    full = np.array(widths)
    return cost_model(graph, lambda i: tuple(size(n) for n in graph.values[i].shape), parameters, full, fixed)


def fvcore_total(model: nn.Module, x: torch.Tensor, analysis: type = FlopCountAnalysis) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated, and warns of every value that it fixes
        return analysis(model.eval(), x).unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()


def build(name: str) -> nn.Module:
    source, _, architecture = name.partition(":")
    if source == "timm":
        import timm

        return timm.create_model(architecture)
    import torchvision

    options = {"init_weights": False} if architecture in ("googlenet", "vgg11") else {}
    return getattr(torchvision.models, architecture)(weights=None, **options)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("timm:resnet50", 64),
        ("timm:mobilenetv3_large_100", 64),
        ("timm:efficientnet_b0", 64),
        ("timm:convnext_tiny", 64),
        ("timm:densenet121", 64),
        ("timm:regnety_004", 64),
        ("timm:res2net50_26w_4s", 64),
        ("timm:inception_v4", 96),
        ("timm:resnetv2_50x1_bit", 64),
        ("torchvision:googlenet", 64),
        ("torchvision:vgg11", 64),
        ("torchvision:shufflenet_v2_x1_0", 64),
        ("torchvision:alexnet", 64),
    ],
)
def test_real_networks_cost_what_fvcore_says(name, pixels):
    model, x = build(name).eval(), torch.zeros(1, 3, pixels, pixels)
    costs = count_as_is(model, x)
    assert costs.uncounted == ()
    assert costs.evaluate("macs", NO_WIDTHS) == fvcore_total(model, x)
    assert costs.evaluate("activations", NO_WIDTHS) == fvcore_total(model, x, ActivationCountAnalysis)
    assert costs.evaluate("params", NO_WIDTHS) == sum(p.numel() for p in model.parameters())


class Calls(nn.Module):
    """A module whose forward is one function of the input and a square weight."""

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 6))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight)


def standardised(x, weight):
    rows = F.batch_norm(weight.reshape(1, 6, 6), None, None, training=True).reshape(6, 6, 1, 1)
    return F.conv2d(x, rows)


ONE_OP = {
    "conv": lambda x, w: F.conv2d(x, w[:, :, None, None].expand(6, 6, 3, 3), stride=2, padding=1),
    "depthwise": lambda x, w: F.conv2d(x, w[:, :1, None, None], groups=6),
    "conv-transposed": lambda x, w: F.conv_transpose2d(x, w[:, :, None, None].expand(6, 6, 2, 2), stride=2),
    "conv1d": lambda x, w: F.conv1d(x.flatten(2), w[:, :, None]),
    "linear-on-tokens": lambda x, w: F.linear(x.flatten(2).transpose(1, 2), w, w[0]),
    "linear-without-bias": lambda x, w: F.linear(x.flatten(2).transpose(1, 2), w),
    "matmul": lambda x, w: x.flatten(2).transpose(1, 2) @ w,
    "mm": lambda x, w: torch.mm(x.mean((2, 3)), w),
    "bmm": lambda x, w: torch.bmm(x.flatten(2), x.flatten(2).transpose(1, 2)),
    "einsum": lambda x, w: torch.einsum("abc,abd->acd", x.flatten(2), x.flatten(2)),
    "batch-norm": lambda x, w: F.batch_norm(x, w[0].detach(), w[1].detach(), w[2], w[3]),
    "batch-norm-without-affine": lambda x, w: F.batch_norm(x, w[0].detach(), w[1].detach()),
    "batch-norm-of-the-weight": standardised,
    "instance-norm": lambda x, w: F.instance_norm(x, weight=w[0], bias=w[1]),
    "layer-norm": lambda x, w: F.layer_norm(x, (8, 8)),
    "layer-norm-affine": lambda x, w: F.layer_norm(x.transpose(1, 3), (6,), w[0], w[1]),
    "group-norm": lambda x, w: F.group_norm(x, 3),
    "group-norm-affine": lambda x, w: F.group_norm(x, 3, w[0], w[1]),
    "nearest": lambda x, w: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x, w: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "adaptive-pool-1": lambda x, w: F.adaptive_avg_pool2d(x, 1),
    "adaptive-pool-2": lambda x, w: F.adaptive_avg_pool2d(x, 2),
    "plain-mean": lambda x, w: x.mean((2, 3)),
    "elementwise": lambda x, w: torch.relu(x * 2 + 1).softmax(1),
}


@pytest.mark.parametrize("op", ONE_OP)
def test_each_op_costs_what_fvcore_says(op):
    model, x = Calls(ONE_OP[op]).eval(), torch.ones(1, 6, 8, 8)
    costs = count_as_is(model, x)
    assert costs.uncounted == ()
    assert costs.evaluate("macs", NO_WIDTHS) == fvcore_total(model, x)
    if (
        op != "einsum"
    ):  # fvcore asks the einsum, archscan the product that it becomes: the same elements in another order
        assert costs.evaluate("activations", NO_WIDTHS) == fvcore_total(model, x, ActivationCountAnalysis)


@pytest.mark.parametrize("op", ["conv", "depthwise", "conv-transposed", "conv1d", "linear-on-tokens", "matmul", "bmm"])
def test_products_cost_half_of_what_torch_counts(op):
    model, x = Calls(ONE_OP[op]).eval(), torch.ones(1, 6, 8, 8)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() > 0
    assert 2 * count_as_is(model, x).evaluate("macs", NO_WIDTHS) == counter.get_total_flops()


def slim_me(a: int, b: int, c: int) -> nn.Sequential:
    """Dense, depthwise, pointwise and transposed convolutions, norms, a pool and a flattened classifier."""
    return nn.Sequential(
        nn.Conv2d(3, a, 3, padding=1),
        nn.BatchNorm2d(a),
        nn.Conv2d(a, a, 3, stride=2, padding=1, groups=a),
        nn.ReLU(inplace=True),
        nn.Conv2d(a, b, 1, bias=False),
        nn.GroupNorm(1, b),
        nn.ConvTranspose2d(b, c, 2, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(c * 4, 13),
    )


@pytest.mark.parametrize("widths", [(5, 7, 11), (4, 6, 10), (1, 1, 1), (5, 2, 9), (3, 7, 1)])
def test_hypothetical_widths_cost_what_a_network_of_these_widths_costs(widths):
    x = torch.zeros(1, 3, 16, 16)
    costs = with_widths(slim_me(5, 7, 11), x, [5, 7, 11])
    narrow = slim_me(*widths)
    asked = np.array(widths)
    assert costs.evaluate("macs", asked) == fvcore_total(narrow, x)
    assert costs.evaluate("params", asked) == sum(p.numel() for p in narrow.parameters())
    assert costs.evaluate("activations", asked) == fvcore_total(narrow, x, ActivationCountAnalysis)


class Concatenated(nn.Module):
    """Two copies of a features and the image side by side, so that an axis is 3 + 2 a."""

    def __init__(self, a: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, a, 1)
        self.second = nn.Conv2d(3 + 2 * a, 17, 3)

    def forward(self, x):
        features = self.first(x)
        return self.second(torch.cat([x, features, features], 1))


@pytest.mark.parametrize("width", [5, 4, 1])
def test_an_axis_that_is_only_partly_of_a_group_is_priced(width):
    model, x = Concatenated(5), torch.zeros(1, 3, 8, 8)
    graph = capture(model, x)
    known = {5: Size(0, {0: 1}), 13: Size(3, {0: 2})}

    def sizes(shape):
        return tuple(known.get(n, Size(n, {})) for n in shape)

    parameters = {name: sizes(p.shape) for name, p in model.named_parameters()}
    costs = cost_model(graph, lambda number: sizes(graph.values[number].shape), parameters, np.array([5]))
    narrow, asked = Concatenated(width), np.array([width])
    assert costs.evaluate("macs", asked) == fvcore_total(narrow, x)
    assert costs.evaluate("params", asked) == sum(p.numel() for p in narrow.parameters())
    form = costs.quadratic("macs")
    assert form.constant + form.linear_G @ asked + asked @ form.matrix_GG @ asked == costs.evaluate("macs", asked)


def test_costs_by_module_are_fvcores_and_sum_to_the_total():
    model, x = slim_me(5, 7, 11).eval(), torch.zeros(1, 3, 16, 16)
    costs = with_widths(model, x, [5, 7, 11])
    by_module = costs.by_module("macs", costs.full_widths_G)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).by_module()
    assert by_module == {name: count for name, count in reference.items() if name and count}
    for kind in ("macs", "params", "activations"):
        total = costs.evaluate(kind, costs.full_widths_G)
        assert sum(costs.by_module(kind, costs.full_widths_G).values()) == total


SLIM_COSTS = with_widths(slim_me(5, 7, 11), torch.zeros(1, 3, 16, 16), [5, 7, 11])


@settings(max_examples=25, deadline=None)
@given(widths=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 11)), min_size=1, max_size=5))
def test_three_evaluations_agree(widths):
    widths_BG = np.array(widths)
    for kind in ("macs", "params", "activations"):
        form = SLIM_COSTS.quadratic(kind)
        quadratic = [form.constant + form.linear_G @ w + w @ form.matrix_GG @ w for w in widths_BG]
        one_by_one = [SLIM_COSTS.evaluate(kind, w) for w in widths_BG]
        many = SLIM_COSTS.evaluate_many(kind, widths_BG)
        assert many.dtype == np.int64
        assert many.tolist() == one_by_one == quadratic


def test_costs_grow_with_every_width():
    full = SLIM_COSTS.full_widths_G
    for group, kind in itertools.product(range(3), ("macs", "params", "activations")):
        narrower = full - np.eye(3, dtype=np.int64)[group]
        assert SLIM_COSTS.evaluate(kind, narrower) < SLIM_COSTS.evaluate(kind, full)


def attend(x, w):
    """Attention whose values are wider than its queries and keys, over twice as many queries as keys."""
    tokens = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(
        tokens[:, :, :4] @ w[:4], tokens[:, ::2] @ w, torch.cat([tokens] * 2, 2)[:, ::2]
    )


def test_unknown_ops_are_listed_as_uncounted():
    costs = count_as_is(Calls(lambda x, w: torch.fft.rfft(attend(x, w)).abs()).eval(), torch.ones(1, 6, 8, 8))
    assert (costs.uncounted, costs.missed_by_fvcore) == (("aten::_fft_r2c",), ("scaled_dot_product_attention",))


def test_attention_is_counted_where_fvcore_misses_it():
    model, x = Calls(attend).eval(), torch.ones(1, 6, 8, 8)
    products = 64 * 32 * 6 + 64 * 32 * 12
    costs, counted = count_as_is(model, x), recount(model, x)
    assert counted.added == {"scaled_dot_product_attention": products}
    assert f"{products:,} MACs" in counted.notes[0]
    assert costs.evaluate("macs", NO_WIDTHS) == counted.macs == fvcore_total(model, x) + products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x)
    assert counter.get_total_flops() == 2 * counted.macs
    assert costs.evaluate("activations", NO_WIDTHS) == fvcore_total(model, x, ActivationCountAnalysis)


def test_products_between_the_samples_of_a_batch_are_priced_at_one_sample():
    model, x = Calls(lambda x, w: (rows := x.flatten(1)) @ rows.t() @ rows), torch.ones(1, 6, 8, 8)
    assert count_as_is(model, x).evaluate("macs", NO_WIDTHS) == fvcore_total(model, x) == 2 * 384


def test_no_op_is_both_free_and_counted():
    assert not {op.removeprefix("aten::") for op in MAC_HANDLES} & IGNORED


@pytest.mark.parametrize("op", ["aten::convolution", "aten::relu"])
def test_a_second_cost_for_an_op_is_refused(op):
    before = dict(MAC_HANDLES)
    with pytest.raises(BadInput, match=op):
        register(op)(lambda call: call.output)
    assert before == MAC_HANDLES


def test_sizes_of_another_run_are_refused():
    model = slim_me(5, 7, 11)
    graph = capture(model, torch.zeros(1, 3, 16, 16))
    other = capture(model, torch.zeros(1, 3, 8, 8))
    with pytest.raises(BadInput, match="recorded run"):
        cost_model(graph, constant_sizes(other), {}, NO_WIDTHS)


@pytest.mark.parametrize("widths", [[1, 2], [1.0, 2.0, 3.0], [[1, 2, 3]]])
def test_widths_that_do_not_fit_are_refused(widths):
    with pytest.raises(BadInput, match="3 channel groups"):
        SLIM_COSTS.evaluate("macs", np.array(widths))


def test_a_width_that_never_changes_is_a_number():
    model = Calls(lambda x, w: torch.bmm(x.flatten(2), x.flatten(2).transpose(1, 2)))
    costs = with_widths(model, torch.zeros(1, 5, 7, 1), [5, 7], fixed=(1,))
    assert costs.evaluate("macs", np.array([3, 7])) == 3 * 3 * 7
    assert costs.quadratic("macs").at(np.array([3, 7])) == 3 * 3 * 7


def test_a_product_of_three_widths_is_priced_but_has_no_quadratic_form():
    model = Calls(lambda x, w: torch.bmm(x.flatten(2), x.flatten(2).transpose(1, 2)))
    costs = with_widths(model, torch.zeros(1, 5, 7, 1), [5, 7])
    assert costs.evaluate("macs", np.array([3, 2])) == 3 * 3 * 2
    with pytest.raises(UnsupportedOp, match="three widths"):
        costs.quadratic("macs")


class Products(nn.Module):
    """Products of queries and keys for each head, as torchvision's MaxViT writes them."""

    def forward(self, x):
        rows = x.flatten(3)
        return torch.einsum("B H I D, B H J D -> B H I J", rows, rows)


def test_a_second_count_of_an_einsum_is_exact_where_fvcore_rounds():
    x = torch.randn(1, 3, 49, 32)
    assert recount(Products(), x).macs == 3 * 49 * 49 * 32
    assert recount(Products(), x).by == "fvcore"
    analysis = FlopCountAnalysis(Products(), x)
    analysis.unsupported_ops_warnings(False)
    assert analysis.total() != 3 * 49 * 49 * 32
