"""BatchNorm recalibration against a slow reference, and nothing else changed."""

import pytest
import torch
from torch import Tensor, nn

import archscan  # noqa: F401 - before anything that may import torchvision
from archscan.errors import BadInput
from archscan.recover import recalibrate_batchnorm


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
    ).double()


def batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64) + 2.0 for size in sizes]


def test_first_layer_gets_the_mean_over_all_values() -> None:
    model, data = net().eval(), batches(8, 8, 3)
    found = recalibrate_batchnorm(model, [(images, None) for images in data])
    activations = [model[0](images).detach() for images in data]
    mean = torch.cat(activations).mean((0, 2, 3))
    variance = sum(len(each) * each.var((0, 2, 3)) for each in activations) / 19
    torch.testing.assert_close(found.model[1].running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.model[1].running_var, variance, rtol=1e-12, atol=1e-12)
    assert (found.layers, found.samples) == (2, 19)


def test_later_layers_see_batch_statistics_and_no_dropout() -> None:
    model, data = net().eval(), batches(8)
    found = recalibrate_batchnorm(model, data)
    first = nn.functional.batch_norm(model[0](data[0]), None, None, model[1].weight, model[1].bias, training=True)
    torch.testing.assert_close(found.model[5].running_mean, model[4](first.relu()).mean((0, 2, 3)).detach())


def test_layer_that_is_called_twice_averages_over_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).mean() + self.norm(3.0 * x[:, :, :3]).mean()

    (images,) = batches(4)
    found = recalibrate_batchnorm(Twice().eval(), [images])
    values = torch.cat([images.movedim(1, 0).flatten(1), 3.0 * images[:, :, :3].movedim(1, 0).flatten(1)], 1)
    torch.testing.assert_close(found.model.norm.running_mean, values.mean(1))


@pytest.mark.parametrize("training", [True, False])
def test_nothing_else_changes(training: bool) -> None:
    model = net().train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    found = recalibrate_batchnorm(model, batches(4, 4)).model
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    changed = {name for name, tensor in found.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{layer}.running_{what}" for layer in (1, 5) for what in ("mean", "var")}
    for old, new in zip(model.modules(), found.modules(), strict=True):
        assert old.training is new.training is training
        assert getattr(old, "momentum", None) == getattr(new, "momentum", None)
        assert not new._forward_pre_hooks
    assert all(parameter.grad is None and parameter.requires_grad for parameter in found.parameters())


def test_model_without_batchnorm_is_returned_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    found = recalibrate_batchnorm(model, [])
    assert found.model is model
    assert (found.layers, found.samples) == (0, 0)


def test_progress_and_single_images() -> None:
    seen: list[tuple[int, int]] = []
    found = recalibrate_batchnorm(net(), batches(4, 1, 2), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert found.samples == 6
    recalibrate_batchnorm(net(), iter(batches(4, 4)), lambda done, total: seen.append((done, total)))
    assert seen[3:] == [(1, 0), (2, 0)]


def test_refusals() -> None:
    with pytest.raises(BadInput, match="two or more images"):
        recalibrate_batchnorm(net(), batches(1, 1))
    with pytest.raises(BadInput, match="two or more images"):
        recalibrate_batchnorm(net(), [])
    with pytest.raises(BadInput, match="dict"):
        recalibrate_batchnorm(net(), [{"image": None}])
    (images,) = batches(4)
    images[0, 0, 0, 0] = torch.nan
    with pytest.raises(BadInput, match="not finite"):
        recalibrate_batchnorm(net(), [images])


def test_hooks_and_modes_are_put_back_after_an_error() -> None:
    model = net().train()
    with pytest.raises(RuntimeError):
        recalibrate_batchnorm(model, [torch.zeros(2, 5, 6, 6, dtype=torch.float64)])
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
