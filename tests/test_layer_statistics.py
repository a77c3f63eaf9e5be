"""Second moments of layers against im2col matrices and gradients taken one sample at a time."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from archscan import layer_statistics
from archscan.errors import BadInput
from archscan.gate_statistics import GateStatistics
from archscan.groups import ChannelGroup, Consumer, Coupling
from archscan.layer_statistics import LayerMoments, read_call
from archscan.losses import classification_loss
from tests.gate_nets import CASES, CHAIN, FRAMES, GROUPED, RESIDUAL, Case, consumer, gather, images_and_labels

BOTH = ("layer_inputs", "layer_gradients")


def layers_of(statistics: GateStatistics) -> tuple[LayerMoments, ...]:
    return statistics.require_layers("layer_inputs")


def seen(case: Case, batch: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Columns [N, G·K, R] of every consumer's input, by hooks and `unfold`, and gradients of samples' own losses."""
    model, found, outputs = case.model(), {}, {}

    def keep(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (inputs,) = args
        columns = (
            inputs.reshape(len(inputs), -1, inputs.shape[-1]).transpose(1, 2)
            if isinstance(module, nn.Linear)
            else F.unfold(inputs, module.kernel_size, padding=module.padding, stride=module.stride)
        )
        name = next(name for name, other in model.named_modules() if other is module)
        found[name], outputs[name] = columns.detach(), output
        output.retain_grad()
        return output.clone()  # what overwrites it in place shall not

    for place in case.coupling.consumers:
        if (place.units >= 0).any():
            model.get_submodule(place.module).register_forward_hook(keep)
    (classification_loss(model, batch) * len(batch[0])).backward()
    return {name: (columns, outputs[name].grad) for name, columns in found.items()}


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


# Sums -----------------------------------------------------------------------------------------------------------------


def test_moments_of_inputs_are_those_of_the_im2col_matrix(case: Case) -> None:
    layers = layers_of(gather(case, "layer_inputs"))
    expected = seen(case, images_and_labels())
    assert [layer.module for layer in layers] == [c.module for c in case.coupling.consumers if (c.units >= 0).any()]
    for layer in layers:
        columns, _ = expected[layer.module]
        module = case.model().get_submodule(layer.module)
        groups = getattr(module, "groups", 1)
        columns_GKR = columns.permute(1, 0, 2).reshape(groups, columns.shape[1] // groups, -1).numpy()
        weight_GOK = module.weight.detach().reshape(groups, -1, columns_GKR.shape[1]).numpy()
        assert layer.samples == 6
        assert layer.positions == columns_GKR.shape[2] / 6
        for group, block in enumerate(layer.blocks):
            np.testing.assert_array_equal(block.weight_OK, weight_GOK[group])
            np.testing.assert_allclose(block.gram_KK, columns_GKR[group] @ columns_GKR[group].T, atol=1e-9)
            np.testing.assert_allclose(block.sum_K, columns_GKR[group].sum(1), atol=1e-9)


def test_moments_of_gradients_are_those_of_each_samples_own_loss(case: Case) -> None:
    statistics = gather(case, *BOTH)
    expected = seen(case, images_and_labels())
    for layer, moment_GOO in zip(layers_of(statistics), statistics.require("layer_gradients"), strict=True):
        _, gradient = expected[layer.module]
        module = case.model().get_submodule(layer.module)
        axis = gradient.ndim - 1 if isinstance(module, nn.Linear) else 1
        groups = getattr(module, "groups", 1)
        flat_GOR = gradient.movedim(axis, 0).reshape(groups, gradient.shape[axis] // groups, -1).numpy()
        assert np.abs(flat_GOR).max() > 1e-4
        np.testing.assert_allclose(moment_GOO, flat_GOR @ flat_GOR.transpose(0, 2, 1) / layer.positions, atol=1e-12)


@pytest.mark.parametrize("others", [("hessian_ones",), ("fisher_gradient",), ("hessian_diagonal", "sharpness")])
def test_other_passes_change_no_moment(others: tuple[str, ...]) -> None:
    alone, shared = gather(RESIDUAL, *BOTH), gather(RESIDUAL, *BOTH, *others)
    for one, other in zip(layers_of(alone), layers_of(shared), strict=True):
        np.testing.assert_allclose(one.blocks[0].gram_KK, other.blocks[0].gram_KK, atol=1e-12)
    for one_GOO, other_GOO in zip(alone.require("layer_gradients"), shared.require("layer_gradients"), strict=True):
        np.testing.assert_allclose(one_GOO, other_GOO, atol=1e-12)


def test_gradients_alone_and_inputs_alone_are_the_same_as_both() -> None:
    both = gather(GROUPED, *BOTH)
    np.testing.assert_array_equal(
        gather(GROUPED, "layer_gradients").require("layer_gradients")[0], both.require("layer_gradients")[0]
    )
    inputs = layers_of(gather(GROUPED, "layer_inputs"))
    np.testing.assert_array_equal(inputs[0].blocks[1].gram_KK, layers_of(both)[0].blocks[1].gram_KK)
    with pytest.raises(BadInput, match="hold no layer_inputs"):
        gather(GROUPED, "layer_gradients").require_layers("layer_inputs")


def test_inputs_alone_go_forward_only() -> None:
    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = classification_loss(model, batch)
        assert not loss.requires_grad
        return loss

    gather(CHAIN, "layer_inputs", loss_fn=loss_fn)


def test_columns_of_frozen_units_belong_to_no_unit() -> None:
    held = ChannelGroup("stem", (tuple(range(2)),), 1, (), "held")
    coupling = Coupling((held,), 7, {}, RESIDUAL.coupling.consumers)
    layers = layers_of(gather(Case("held", RESIDUAL.make, coupling), "layer_inputs"))
    by_name = {layer.module: layer.blocks[0].unit_K for layer in layers}
    np.testing.assert_array_equal(by_name["fc"], [-1, -1, 2, 3])
    np.testing.assert_array_equal(by_name["inner"], np.repeat([-1, -1, 2, 3], 9))


def test_a_layer_that_the_loss_does_not_depend_on_has_no_gradient() -> None:
    def loss_fn(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        model(batch[0])
        return model.conv2(model.conv1(batch[0])).square().mean()

    statistics = gather(GROUPED, *BOTH, "sample_gradient", loss_fn=lambda m, b: m(b[0]).square().mean())
    assert statistics.require("layer_gradients")[1].any()
    with pytest.raises(BadInput, match="does not depend on any gate"):
        gather(GROUPED, *BOTH, loss_fn=loss_fn)


def test_moments_that_are_not_finite_are_refused() -> None:
    model = GROUPED.model()
    model.conv1.weight.data *= 1e200  # type: ignore[union-attr,operator]
    with pytest.raises(BadInput, match="second moments at conv2 are not finite"):
        gather(GROUPED, "layer_inputs", model=model, loss_fn=lambda m, b: m(b[0]).tanh().mean())


# Calls ----------------------------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "1d": (F.conv1d, (2, 3, 9), (4, 3, 3), {"stride": 2, "padding": 1}),
    "strides": (F.conv2d, (2, 3, 9, 8), (4, 3, 3, 2), {"stride": (1, 2), "padding": (2, 0)}),
    "dilation": (F.conv2d, (2, 2, 9, 9), (3, 2, 3, 3), {"dilation": (2, 3), "padding": 2}),
    "same": (F.conv2d, (2, 2, 6, 5), (3, 2, 4, 3), {"padding": "same", "dilation": (2, 3)}),
    "valid": (F.conv2d, (1, 2, 6, 5), (3, 2, 2, 2), {"padding": "valid"}),
    "groups": (F.conv2d, (2, 6, 5, 5), (4, 3, 3, 3), {"groups": 2, "stride": 2}),
    "3d": (F.conv3d, (2, 2, 4, 5, 6), (3, 2, 2, 3, 1), {"padding": (1, 0, 2), "stride": (2, 1, 1)}),
    "tokens": (F.linear, (2, 3, 5, 4), (6, 4), {}),
    "rows": (F.linear, (7, 4), (6, 4), {}),
}


@pytest.mark.parametrize(("function", "inputs", "weight", "options"), CONVOLUTIONS.values(), ids=list(CONVOLUTIONS))
def test_weights_times_columns_are_what_the_layer_computes(
    function: Callable[..., Tensor], inputs: tuple[int, ...], weight: tuple[int, ...], options: dict[str, Any]
) -> None:
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, dtype=torch.float64, generator=draw) for shape in (inputs, weight))
    call = read_call(function, (x, w), options, consumer(0, "layer", [0]))
    ((columns_GKR, scale),) = layer_statistics._chunks(call, 0)
    result = call.weight.reshape(call.groups, -1, call.columns) @ columns_GKR
    expected = function(x, w, **options)
    expected = expected.movedim(call.output_axis, 0).reshape(result.shape)
    torch.testing.assert_close(result, expected)
    assert scale == 1


def test_other_functions_are_refused_by_name() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.weight = nn.Linear(8, 4), nn.Parameter(torch.ones(4, 3))

        def forward(self, images: Tensor) -> Tensor:
            return self.embed(images.mean((1, 2))) @ self.weight

    case = Case("product", Product, Coupling((), 4, {}, (Consumer(1, 0, -1, np.arange(4), "weight", ""),)))
    assert gather(case, "sample_gradient").samples == 6
    with pytest.raises(BadInput, match="the model reads channels by matmul, and this criterion knows convol"):
        gather(case, "layer_inputs")


# Grids and blocks -----------------------------------------------------------------------------------------------------


def test_a_grid_sees_every_position_once_in_as_many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    image, label = images_and_labels(1)
    copies = [(image.repeat(n, 1, 1, 1), label.repeat(n)) for n in (5, 3)]
    whole = layers_of(gather(CHAIN, "layer_inputs", batches=copies))[0]
    monkeypatch.setattr(layer_statistics, "_LEAST_POSITIONS", 4)  # of 16: a grid of step 2, with 4 phases
    monkeypatch.setattr(layer_statistics, "_ROWS_OVER_COLUMNS", 1e9)
    thin = layers_of(gather(CHAIN, "layer_inputs", batches=copies))[0]
    one = layers_of(gather(CHAIN, "layer_inputs", batches=[(image, label)]))[0]
    assert thin.positions == whole.positions == 16
    np.testing.assert_allclose(thin.blocks[0].gram_KK, whole.blocks[0].gram_KK, atol=1e-9)
    np.testing.assert_allclose(thin.blocks[0].sum_K, whole.blocks[0].sum_K, atol=1e-9)
    assert np.abs(one.blocks[0].gram_KK - whole.blocks[0].gram_KK / 8).max() > 0.1


def test_a_grid_does_not_depend_on_the_split_into_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_statistics, "_LEAST_POSITIONS", 4)
    monkeypatch.setattr(layer_statistics, "_ROWS_OVER_COLUMNS", 1e9)
    images, labels = images_and_labels(6)
    split = [(images[:1], labels[:1]), (images[1:4], labels[1:4]), (images[4:], labels[4:])]
    for case in (CHAIN, FRAMES):
        for one, other in zip(
            layers_of(gather(case, "layer_inputs")),
            layers_of(gather(case, "layer_inputs", batches=split)),
            strict=True,
        ):
            np.testing.assert_allclose(one.blocks[0].gram_KK, other.blocks[0].gram_KK, atol=1e-10)


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = layers_of(gather(CHAIN, "layer_inputs"))
    monkeypatch.setattr(layer_statistics, "_CHUNK_VALUES", 1)
    for one, other in zip(whole, layers_of(gather(CHAIN, "layer_inputs")), strict=True):
        np.testing.assert_allclose(one.blocks[0].gram_KK, other.blocks[0].gram_KK, atol=1e-10)


def test_wide_layers_are_cut_into_blocks_of_whole_units(monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = layers_of(gather(CHAIN, "layer_inputs"))[0].blocks
    monkeypatch.setattr(layer_statistics, "BLOCK_COLUMNS", 20)
    first, second = layers_of(gather(CHAIN, "layer_inputs"))[0].blocks
    np.testing.assert_array_equal(first.unit_K, np.repeat([0, 1], 9))
    np.testing.assert_array_equal(second.column_K, np.arange(18, 36))
    np.testing.assert_allclose(second.gram_KK, whole.gram_KK[18:, 18:], atol=1e-10)
    np.testing.assert_array_equal(second.weight_OK, whole.weight_OK[:, 18:])


@settings(max_examples=60, deadline=None)
@given(units=st.lists(st.integers(-1, 6), min_size=1, max_size=40), limit=st.integers(1, 12))
def test_blocks_share_columns_out_and_split_no_unit(units: list[int], limit: int) -> None:
    unit_K = np.array(units)
    blocks = list(layer_statistics._cut(unit_K, limit))
    np.testing.assert_array_equal(np.sort(np.concatenate(blocks)), np.arange(len(unit_K)))
    owners = [set(unit_K[block][unit_K[block] >= 0].tolist()) for block in blocks]
    assert sum(map(len, owners)) == len(set().union(*owners))
    for block, own in zip(blocks, owners, strict=True):
        assert len(block) <= limit or len(own) == 1
