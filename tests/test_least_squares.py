"""The solver of one layer against dense least squares in float64."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from archscan import least_squares, positions
from archscan.least_squares import Effort, solve
from archscan.positions import Layer, Sample

ALL = Effort(rows_per_column=math.inf, ridges=(1e-14,))


def layer(groups=1, kernel=(3, 3), **options):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 4 // groups, *kernel, generator=generator, dtype=torch.float64)
    bias, scale, offset = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(3))
    return Layer(weight, bias, scale, offset, groups=groups, **options)


def forward(of, inputs, weight=None, bias=None, shortcut=None):
    """What the layer and what is behind it compute, by PyTorch's own convolution."""
    weight, bias = (new if new is not None else old for new, old in ((weight, of.weight), (bias, of.bias)))
    found = F.conv2d(F.pad(inputs, of.padding), weight, bias, of.stride, 0, of.dilation, of.groups)
    found = found * of.scale[:, None, None] + of.offset[:, None, None]
    return found if shortcut is None else found + shortcut


def samples(of, sizes, seed=0, shortcut=False):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    made = []
    for size in sizes:
        inputs = torch.randn(size, 4, 9, 8, generator=generator, dtype=torch.float64) + 0.3
        plain = forward(of, inputs)
        target = torch.einsum("oc,nchw->nohw", mix, plain) + 0.1 * torch.randn(
            plain.shape, generator=generator, dtype=torch.float64
        )
        made.append(Sample(inputs, target, shortcut=plain.sin() if shortcut else None))
    return made


def design(of, inputs):
    """The im2col matrix by convolving with every unit kernel, one group after the other; [G][rows, K]."""
    channels = of.weight.shape[1]
    matrices = []
    for group in range(of.groups):
        part = inputs[:, group * channels : (group + 1) * channels]
        unit = torch.eye(of.columns, dtype=torch.float64).reshape(of.columns, *of.weight.shape[1:])
        columns = F.conv2d(F.pad(part, of.padding), unit, None, of.stride, 0, of.dilation)
        matrices.append(columns.movedim(1, 3).reshape(-1, of.columns))
    return matrices


def dense(of, made, ridge=0.0):
    """Ridge regression towards the old weights by a dense solver, about the means; new weight and bias."""
    weights, biases = [], []
    outputs = len(of.weight) // of.groups
    for group in range(of.groups):
        own = slice(group * outputs, (group + 1) * outputs)
        x = torch.cat([design(of, sample.inputs)[group] for sample in made])
        behind = [0.0 if sample.shortcut is None else sample.shortcut for sample in made]
        y = torch.cat(
            [
                ((sample.target - extra - of.offset[:, None, None]) / of.scale[:, None, None])[:, own]
                .movedim(1, 3)
                .reshape(-1, outputs)
                for sample, extra in zip(made, behind, strict=True)
            ]
        )
        old = of.weight[own].flatten(1).T
        x_mean, y_mean = (x.mean(0), y.mean(0)) if of.intercept else (torch.zeros(x.shape[1]), of.bias[own])
        x, y = x - x_mean, y - y_mean
        unit = (x.T @ x).diagonal().mean()
        tall = torch.cat([x, (ridge * unit).sqrt() * torch.eye(of.columns, dtype=torch.float64)])
        change = torch.linalg.lstsq(tall, torch.cat([y - x @ old, torch.zeros_like(old)])).solution
        weights.append((old + change).T)
        biases.append(y_mean - x_mean @ (old + change) if of.intercept else of.bias[own])
    return torch.cat(weights).reshape(of.weight.shape), torch.cat(biases)


GEOMETRIES = {
    "plain": {},
    "strided": {"stride": (2, 3), "padding": (1, 2, 0, 1)},
    "dilated": {"dilation": (2, 1), "padding": (1, 1, 2, 2)},
    "grouped": {"groups": 2, "padding": (1, 1, 1, 1)},
    "pointwise": {"kernel": (1, 1)},
    "without intercept": {"intercept": False},
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_equals_dense_least_squares(name):
    of = layer(**GEOMETRIES[name])
    made = samples(of, [5, 3], shortcut=name == "strided")
    found = solve(of, made, made, ALL)
    weight, bias = dense(of, made)
    torch.testing.assert_close(found.weight, weight, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.bias, bias, rtol=1e-8, atol=1e-8)
    assert found.rows == sum(sample.target[:, 0].numel() for sample in made)
    error = sum((forward(of, s.inputs, weight, bias, s.shortcut) - s.target).square().sum() for s in made)
    targets = torch.cat([sample.target.movedim(1, 3).reshape(-1, 6) for sample in made])
    variance = (targets - targets.mean(0)).square().sum()
    assert found.error_after == pytest.approx(float(error / variance), rel=1e-8)
    assert found.error_after < found.error_before


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
@pytest.mark.parametrize("intercept", [True, False])
def test_ridge_pulls_towards_the_old_weights(ridge, intercept):
    of = layer(groups=1, intercept=intercept)
    made = samples(of, [4])
    found = solve(of, made, made, replace(ALL, ridges=(ridge,)))
    weight, bias = dense(of, made, ridge)
    torch.testing.assert_close(found.weight, weight, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.bias, bias, rtol=1e-8, atol=1e-8)
    assert found.ridge == ridge


def test_a_large_ridge_gives_back_the_old_weights():
    of = layer()
    made = samples(of, [4])
    found = solve(of, made, made, replace(ALL, ridges=(1e12,)))
    torch.testing.assert_close(found.weight, of.weight, rtol=0, atol=1e-10)
    assert not torch.allclose(found.bias, of.bias)


def test_streaming_equals_one_shot(monkeypatch):
    of = layer(rectified=True)
    (whole,) = samples(of, [12])
    once = solve(of, [whole], [whole], replace(ALL, ridges=(1e-3,)))
    parts = [Sample(x, t) for x, t in zip(whole.inputs.split(5), whole.target.split(5), strict=True)]
    monkeypatch.setattr(positions, "_CHUNK_VALUES", 1)
    streamed = solve(of, parts, parts, replace(ALL, ridges=(1e-3,)))
    torch.testing.assert_close(streamed.weight, once.weight, rtol=1e-10, atol=1e-10)
    assert streamed.error_after == pytest.approx(once.error_after)


def test_blocks_of_columns_come_close_to_all_at_once():
    of = layer()
    fit, unseen = samples(of, [8]), samples(of, [8], seed=5)
    whole = solve(of, fit, unseen, replace(ALL, ridges=(1e-6,)))
    blocks = solve(of, fit, unseen, replace(ALL, ridges=(1e-6,), block_columns=10))
    assert blocks.error_before == whole.error_before
    assert whole.error_after < blocks.error_after < 0.9 * whole.error_before
    one = solve(of, fit, unseen, replace(ALL, ridges=(1e-6,), block_columns=of.columns))
    assert torch.equal(one.weight, whole.weight)


def test_the_holdout_chooses_the_ridge_and_may_refuse():
    of = layer()
    noise = [Sample(sample.inputs, torch.randn_like(sample.target)) for sample in samples(of, [1])]
    right = [Sample(s.inputs, forward(of, s.inputs) + 1e-3 * s.target) for s in samples(of, [8], seed=3)]
    found = solve(of, noise, right, replace(ALL, ridges=(1e-2, 1e-6)))
    assert torch.equal(found.weight, of.weight)
    assert torch.equal(found.bias, of.bias)
    assert found.ridge == math.inf
    assert found.error_after == found.error_before


def test_what_is_right_already_is_left_alone():
    of = layer()
    made = [Sample(sample.inputs, forward(of, sample.inputs)) for sample in samples(of, [3])]
    found = solve(of, made, made, ALL)
    assert torch.equal(found.weight, of.weight)
    assert found.ridge == math.inf


def test_only_kept_outputs_of_the_original_count():
    of = layer()
    made = samples(of, [4])
    kept = torch.tensor([0, 2, 3, 5, 7, 8])
    wide = []
    for sample in made:
        target = torch.randn(4, 9, *sample.target.shape[2:], dtype=torch.float64)
        target[:, kept] = sample.target
        wide.append(Sample(sample.inputs, target, kept))
    assert torch.equal(solve(of, wide, wide, ALL).weight, solve(of, made, made, ALL).weight)


def test_outputs_that_batchnorm_multiplies_by_zero_keep_their_weights():
    of = layer()
    of = replace(of, scale=torch.cat([torch.zeros(1, dtype=torch.float64), of.scale[1:]]))
    made = samples(of, [4])
    found = solve(of, made, made, ALL)
    torch.testing.assert_close(found.weight[0], of.weight[0], rtol=0, atol=1e-12)
    assert not torch.allclose(found.weight[1], of.weight[1])
    assert torch.isfinite(found.weight).all()


def test_targets_that_a_rectifier_hides_are_not_asked_for():
    of = layer(rectified=True)
    made = samples(of, [8])
    errors = [
        solve(of, made, made, replace(ALL, ridges=(1e-6,), rectified_sweeps=sweeps)).error_after for sweeps in range(5)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[4] < 0.95 * errors[0]
    weight, bias = (each.clone().requires_grad_() for each in (of.weight, of.bias))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=400, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = sum((forward(of, s.inputs, weight, bias).relu() - s.target.relu()).square().sum() for s in made)
        value.backward()
        return value

    optimizer.step(loss)
    far = solve(of, made, made, replace(ALL, ridges=(1e-9,), rectified_sweeps=200))
    found, best = (
        float(sum((forward(of, s.inputs, *new).relu() - s.target.relu()).square().sum() for s in made))
        for new in ((far.weight, far.bias), (weight.detach(), bias.detach()))
    )
    assert found < 1.1 * best


def test_sweeps_end_where_the_gradient_of_ridge_and_one_sided_loss_vanishes():
    of, ridge = layer(rectified=True), 0.3
    made = samples(of, [6])
    effort = replace(ALL, ridges=(ridge,), rectified_sweeps=300)
    stream = least_squares._Stream(of, made, effort)
    *_, (change, (factor,)) = least_squares._sweeps(stream, stream, effort)
    weight = (of.weight + change.weight_GKO[0].T.reshape(of.weight.shape)).requires_grad_()
    bias = (of.bias + change.bias_GO[0]).requires_grad_()
    columns = design(of, torch.cat([sample.inputs for sample in made]))[0]
    unit = (columns - columns.mean(0)).square().sum(0).mean()
    loss = ridge * unit * (weight - of.weight).square().sum()
    for sample in made:
        p, t = forward(of, sample.inputs, weight, bias), sample.target
        error = torch.where(t > 0, t - p, p.clamp(min=0)) / of.scale[:, None, None]
        loss = loss + error.square().sum()
    gradients = torch.autograd.grad(loss, (weight, bias))
    size = unit * of.weight.abs().max()
    assert factor.ridge == ridge
    assert all(float(gradient.abs().max() / size) < 1e-6 for gradient in gradients)


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    size=st.tuples(st.integers(6, 9), st.integers(6, 9)),
    skip=st.integers(1, 4),
    start=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_thinned_columns_belong_to_thinned_outputs(kernel, stride, dilation, padding, size, skip, start):
    of = layer(kernel=kernel, stride=stride, dilation=dilation, padding=padding)
    inputs = torch.randn(2, 4, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs = F.conv2d(F.pad(inputs, padding), of.weight, None, stride, 0, dilation)
    assert of.output_size(inputs) == tuple(outputs.shape[2:])
    start = start[0] % skip, start[1] % skip
    thinned = positions.thinned(outputs, start, skip).flatten(2)
    columns = positions.columns_of(of, inputs, start, skip)
    torch.testing.assert_close(of.weight.flatten(1) @ columns, thinned, rtol=1e-12, atol=1e-12)
    assert Sample(inputs, outputs).fits(of)
    assert not Sample(inputs, outputs[:, :, 1:]).fits(of)


def test_fewer_positions_give_nearly_the_same():
    of = layer()
    fit, unseen = samples(of, [64, 64]), samples(of, [64], seed=4)
    full, thin = (solve(of, fit, unseen, Effort(rows_per_column=rows)) for rows in (math.inf, 32.0))
    assert thin.rows < full.rows
    assert thin.error_after == pytest.approx(full.error_after, rel=0.2)
