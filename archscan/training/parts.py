"""What a training is made of beside its loop: network, batch → optimizer, meters, a network in many processes.

The decision that is not obvious: whether a network has outputs that nothing reads (auxiliary heads), which processes
must know before they share gradients, is seen by running a copy of it once.
"""

import copy

import torch
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from archscan.errors import BadInput
from archscan.processes import Place
from archscan.training.settings import Hyperparameters

_MOMENTUM = 0.9


class Meters:
    """Running means of an epoch, kept on the device so that nothing waits for them."""

    def __init__(self) -> None:
        self.loss, self.correct, self.lr = AverageMeter(), AverageMeter(), 0.0

    def totals(self, place: Place) -> tuple[float, float]:
        """Return mean loss and accuracy over all processes."""
        sums = torch.stack([torch.as_tensor(meter.sum) for meter in (self.loss, self.correct)]).float()
        count = place.sum(torch.tensor([float(self.loss.count)], device=sums.device))
        loss, correct = (place.sum(sums) / count).tolist()
        return loss, correct


def make_optimizer(model: nn.Module, hyper: Hyperparameters) -> torch.optim.Optimizer:
    """Make the optimizer; biases and normalisations have no weight decay.

    Raises:
        BadInput: timm does not know it, or it needs more arguments.
    """
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model, opt=hyper.optimizer, lr=hyper.lr, weight_decay=hyper.weight_decay, momentum=_MOMENTUM
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise BadInput(f"timm cannot make the optimizer {hyper.optimizer!r} ({error}); choose another") from error
    return optimizer


def amp_dtype(device: torch.device) -> torch.dtype:
    """Return the half precision that a device is safest with."""
    return torch.float16 if device.type == "cuda" and not torch.cuda.is_bf16_supported() else torch.bfloat16


def check_labels(labels: Tensor, logits: Tensor, taught: Tensor | None) -> None:
    """See that labels and teacher are of the network's classes.

    Raises:
        BadInput: They are not.
    """
    if logits.ndim != 2:
        raise BadInput(f"the network gives a tensor of shape {tuple(logits.shape)}, not one row of scores per image")
    if int(labels.max()) >= logits.shape[1] or int(labels.min()) < 0:
        raise BadInput(
            f"label {int(labels.max())} is not among the network's {logits.shape[1]} classes; train on its classes"
        )
    if taught is not None and taught.shape != logits.shape:
        raise BadInput(f"the teacher has {taught.shape[-1]} classes and the network {logits.shape[1]}; choose another")


def moved(model: nn.Module, device: torch.device, layout: torch.memory_format) -> nn.Module:
    """Move a network to a device and lay its weights out; PyTorch's type hints do not know that both go at once."""
    moved: nn.Module = model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    return moved


def parallel(model: nn.Module, images: Tensor, place: Place) -> nn.Module:
    """Let a network share its gradients with the other processes; alone it stays as it is.

    Args:
        model: In train mode.
        images: A batch, to see what the network returns; its statistics and the random generators stay as they are.
        place: Which process this is.
    """
    if place.count == 1:
        return model
    with torch.no_grad(), torch.random.fork_rng([place.device] if place.device.type == "cuda" else []):
        is_plain = isinstance(copy.deepcopy(model)(images[:2]), Tensor)
    return DistributedDataParallel(model, find_unused_parameters=not is_plain)
