"""What gate statistics and losses refuse, each with a message that says what to do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from archscan.errors import BadInput
from archscan.groups import Coupling
from archscan.losses import logits_of
from tests.gate_nets import CHAIN, CLASSES, FRAMES, Case, consumer, gather, images_and_labels


class Overwritten(nn.Module):
    """Overwrites an activation after a convolution has read it, so that nothing could train it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        y = self.conv(x)
        return self.fc((y + x.relu_()).mean((2, 3)))


def test_an_overwritten_activation_is_refused_rather_than_misread() -> None:
    case = Case("overwritten", Overwritten, Coupling((), 4, {}, (consumer(1, "conv", range(4)),)))
    for need in ("gradient", "hessian_ones"):
        with pytest.raises(BadInput, match="inplace operation"):
            gather(case, need)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            (torch.full((2, 3, 8, 8), float("nan"), dtype=torch.float64), torch.tensor([0, 1])),
            "loss of calibration batch 1",
        ),
        (
            (images_and_labels()[0], torch.full((6,), CLASSES)),
            f"label {CLASSES} is not among the model's {CLASSES} classes",
        ),
        (images_and_labels()[0], "not an .images, labels. pair"),
        ([images_and_labels()[0], [0] * 6], "not an .images, labels. pair"),
        ((images_and_labels()[0][:, :2], torch.zeros(6, dtype=torch.long)), "batch 1 cannot be differentiated"),
        ({}, "no tensor with samples"),
    ],
    ids=["nan", "label", "no pair", "no labels", "shape", "empty"],
)
def test_bad_batches_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        gather(CHAIN, "gradient", batches=[batch])


def test_a_gradient_that_is_not_finite_names_the_layer() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) * 0).abs().sqrt().sum()

    with pytest.raises(BadInput, match=r"gradient of calibration batch 1 is not finite at the input of conv2"):
        gather(CHAIN, "gradient", loss_fn=loss_fn)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda model, batch: model(batch[0]).mean(0), r"a tensor of shape \(3,\); it must return a scalar"),
        (lambda model, batch: 1.0, "the model ran 0 contractions"),
        (lambda model, batch: model(batch[0]).sum().item(), "a float; it must return a scalar"),
        (lambda model, batch: model(batch[0]).detach().mean(), "does not depend on any gate"),
        (lambda model, batch: model.conv1(batch[0]).mean(), "the model ran 0 contractions"),
    ],
)
def test_bad_losses_are_refused(loss_fn: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        gather(CHAIN, "gradient", loss_fn=loss_fn)


def test_a_model_that_is_not_the_captured_one_is_refused() -> None:
    with pytest.raises(BadInput, match="capture saw 4 channels on axis -3"):
        gather(CHAIN, "gradient", model=nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1)).double())
    odd = (torch.zeros(7), images_and_labels()[0])
    with pytest.raises(BadInput, match="leading size 12, which is no multiple of the batch's 7 samples"):
        gather(FRAMES, "gradient", batches=[odd], loss_fn=lambda model, batch: model(batch[1]).mean())


def test_a_dense_prediction_has_no_drawn_labels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, CLASSES, 1)).double()
    case = Case("dense prediction", lambda: model, Coupling((), 4, {}, (consumer(1, "1", range(4)),)))
    images, _ = images_and_labels(2)
    labels = torch.zeros(2, 8, 8, dtype=torch.long)
    assert gather(case, "sample_gradient", batches=[(images, labels)]).samples == 2
    with pytest.raises(BadInput, match="no labels can be drawn"):
        gather(case, "fisher_gradient", batches=[(images, labels)])


def test_no_batches_no_gates_and_unknown_needs_are_refused() -> None:
    with pytest.raises(BadInput, match="no calibration batch"):
        gather(CHAIN, "gradient", batches=[])
    with pytest.raises(BadInput, match="nothing to score"):
        gather(Case("none", CHAIN.make, Coupling((), 0, {}, ())), "gradient")
    with pytest.raises(BadInput, match="no gate statistic is called 'hessian'"):
        gather(CHAIN, "hessian")
    with pytest.raises(BadInput, match="diagonal_probes is 0"):
        gather(CHAIN, "hessian_diagonal", diagonal_probes=0)


def test_an_output_without_a_class_axis_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1), nn.Flatten(0)).double()
    case = Case("scalar", lambda: model, Coupling((), 4, {}, (consumer(1, "1", range(4), -1),)))
    with pytest.raises(BadInput, match=r"output has shape \(2,\), without an axis of classes"):
        gather(case, "gradient", batches=[(torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.long))])


def test_logits_are_found_in_what_models_return() -> None:
    logits = torch.zeros(2, CLASSES)

    class Output:
        def __init__(self) -> None:
            self.logits = logits

    for output in (logits, (logits, 1), [logits], {"logits": logits}, Output()):
        assert logits_of(output) is logits
    with pytest.raises(BadInput, match="returned a str without logits"):
        logits_of("logits")
