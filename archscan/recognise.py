"""Is a given model one that archscan can build by name? A model and an input → its `Recipe`, or None.

A result whose recipe is known loads without the user's code. The decision that is not obvious: a name is only a guess.
A network of that name is built, must print as the same modules with the same settings, and with the model's own tensors
in it must give the very same output; a model that was changed in any way that matters is not recognised.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from archscan.capture import split_input, train_mode
from archscan.errors import BadInput
from archscan.recipes import Recipe, build
from archscan.reference_nets import REFERENCE_NETS
from archscan.surgery import named_tensors
from archscan.verify import output_tensors

_FAILURES = (BadInput, RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""What building a wrong guess, or running it on this input, may raise."""


def recognise(model: nn.Module, example_input: Any) -> Recipe | None:
    """Find the recipe that builds this very architecture, where there is one; the model is left unchanged.

    Args:
        model: Any network.
        example_input: What it takes, on its device.
    """
    family = type(model).__module__.partition(".")[0]
    if family not in _GUESSES:
        return None
    args, kwargs = split_input(example_input)
    with train_mode(model, False), torch.no_grad():
        expected = output_tensors(model(*args, **kwargs))
    if kwargs or len(args) != 1 or not expected or expected[0].ndim != 2:
        return None
    guesses = _GUESSES[family](model, args[0], expected[0].shape[1])
    return next((recipe for recipe in guesses if _builds(recipe, model, args[0], expected)), None)


def _builds(recipe: Recipe, model: nn.Module, images: Tensor, expected: list[Tensor]) -> bool:
    """Say whether the recipe's network, with the model's tensors, is the model."""
    try:
        with torch.device("meta"):
            network = build(recipe)
        if type(network) is not type(model) or repr(network) != repr(model):
            return False
        own, its = dict(named_tensors(model)), dict(named_tensors(network))
        if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in its.items()}:
            return False
        with torch.no_grad():
            found = output_tensors(torch.func.functional_call(network, own, (images,)))
    except _FAILURES:
        return False
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _timm(model: nn.Module, _images: Tensor, classes: int) -> Iterator[Recipe]:
    """A model of timm knows its name; networks of a fixed input size are left to their user."""
    config = getattr(model, "pretrained_cfg", None) or {}
    if isinstance(config.get("architecture"), str) and not config.get("fixed_input_size"):
        yield Recipe("timm", config["architecture"], {"num_classes": classes})


def _torchvision(model: nn.Module, _images: Tensor, classes: int) -> Iterator[Recipe]:
    """All that the model's source file builds; the few that take more arguments know what they were given."""
    names = ("aux_logits", "transform_input", "image_size")
    flags = {name: getattr(model, name) for name in names if hasattr(model, name)}
    if "aux_logits" in flags:
        flags["init_weights"] = False  # slow, and of no use to who loads weights
    for name in torchvision.models.list_models(module=torchvision.models):
        if torchvision.models.get_model_builder(name).__module__ == type(model).__module__:
            yield Recipe("torchvision", name, {"num_classes": classes, **flags})


def _reference(model: nn.Module, images: Tensor, classes: int) -> Iterator[Recipe]:
    if not type(model).__module__.endswith(".reference_nets"):
        return
    for name in REFERENCE_NETS:
        size = {"image_size": list(images.shape[-2:])} if name == "lenet5" else {}
        yield Recipe("reference", name, {"num_classes": classes, **size})


_GUESSES: dict[str, Callable[[nn.Module, Tensor, int], Iterator[Recipe]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "archscan": _reference,
}
"""Package that a model's class comes from → recipes that might build it."""
