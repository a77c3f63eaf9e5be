"""Open a network by name: a name and a few options → `Subject` (model, example input, recipe, preprocessing, weights).

The decision that is not obvious: ``auto`` weights never stand between a user and a result. Where pretrained weights
cannot be had, the network is initialised at random within seconds, and `WeightsInfo.reason` says why, for a banner.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from archscan.errors import BadInput
from archscan.hubs import NoPretrainedWeights, pretrained_model
from archscan.recipes import (
    MAX_CLASSES,
    MAX_SIDE_PIXELS,
    RAISED_BY_CODE,
    NetworkName,
    Recipe,
    build,
    build_from_file,
    list_networks,
    resolve,
    seeded,
    split_file_name,
    torchvision_weights,
    what_was_raised,
)
from archscan.reference_nets import IMAGENET_MEAN, IMAGENET_STD, REFERENCE_NETS
from archscan.weights import WeightsInfo, check_finite, load_into, load_state_file

__all__ = ["NetworkName", "Preprocessing", "Recipe", "Subject", "WeightsInfo", "build", "list_networks", "open_subject"]

_TORCHVISION_FLAGS: Mapping[str, Mapping[str, bool]] = {
    # torchvision drops GoogLeNet's untrained auxiliary heads with its pretrained weights, and keeps them without.
    "googlenet": {"aux_logits": False, "transform_input": True, "init_weights": True},
    "inception_v3": {"aux_logits": True, "transform_input": True, "init_weights": True},
}


@dataclass(frozen=True)
class Preprocessing:
    """What an image goes through before the model sees it.

    Attributes:
        input_size: Height and width in pixels.
        mean: Per-channel mean, of values in [0, 1]; its length is the number of channels.
        std: Per-channel standard deviation, likewise.
        interpolation: How images are resized: ``bilinear``, ``bicubic``, ``nearest``, ``lanczos`` …
        crop_pct: Side of the centre crop over the side that the image is resized to.
        crop_mode: ``center``, ``squash`` or ``border``, as timm names them.
    """

    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    @property
    def channels(self) -> int:
        """Number of input channels."""
        return len(self.mean)

    def to_json(self) -> dict[str, Any]:
        """Write as JSON values."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Subject:
    """A network to work on.

    Attributes:
        model: The network, in eval mode.
        example_input: Gaussian noise of shape [1, C, H, W].
        recipe: How to build its architecture again.
        name: A name for folders and titles.
        weights: Where its weights come from.
        preprocessing: What its images go through.
        num_classes: Number of its outputs.
    """

    model: nn.Module
    example_input: Tensor
    recipe: Recipe
    name: str
    weights: WeightsInfo
    preprocessing: Preprocessing
    num_classes: int

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of its images in pixels."""
        return self.preprocessing.input_size

    @property
    def mean(self) -> tuple[float, ...]:
        """Per-channel mean that its images are normalised with."""
        return self.preprocessing.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Per-channel standard deviation, likewise."""
        return self.preprocessing.std


@dataclass(frozen=True)
class _Wanted:
    """The options of `open_subject`, checked."""

    weights: str
    input_size: tuple[int, int] | None
    num_classes: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    seed: int


def open_subject(
    name: str,
    *,
    weights: str = "auto",
    input_size: int | Sequence[int] | None = None,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    open_saved: Callable[[Path], Subject] | None = None,
) -> Subject:
    """Open a network.

    Args:
        name: A timm, torchvision or reference name, where needed with the prefix ``timm:``, ``torchvision:`` or
            ``reference:``; ``path/to/file.py:factory``; or the folder of a saved result.
        weights: ``auto`` (pretrained where they can be had, else random), ``pretrained``, ``random``, or a file.
        input_size: Side in pixels, or height and width; None for the network's own.
        num_classes: Number of outputs; None for the network's own.
        mean: Per-channel mean of values in [0, 1]; None for the network's own.
        std: Per-channel standard deviation, likewise.
        seed: Of random weights and of the example input.
        open_saved: Opens the folder of a saved result; what can be saved is not this file's knowledge.

    Raises:
        BadInput: The name is unknown, the weights do not fit, or an option is out of bounds or would have no effect.
    """
    wanted = _Wanted(
        str(weights),
        _checked_size(input_size),
        _checked_classes(num_classes),
        _checked_statistic("mean", mean),
        _checked_statistic("std", std),
        seed,
    )
    if split_file_name(name):
        return _open_file(name, wanted)
    if name.endswith(".py"):
        raise BadInput(f"{name} does not name a factory; write {name}:factory")
    folder = Path(name)
    if (folder / "plan.json").is_file() and open_saved is not None:
        return _open_saved(folder, wanted, open_saved)
    if folder.is_dir() and len(folder.parts) > 1:
        raise BadInput(f"{name} is a folder without a plan.json; pass a network's name or the folder of a saved result")
    source, bare = resolve(name)
    return _open_known(Recipe(source, bare), wanted)


def _checked_size(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= MAX_SIDE_PIXELS for side in sides):
        raise BadInput(
            f"input size {size} is not one or two whole numbers of 1 to {MAX_SIDE_PIXELS} pixels; pass N or H,W"
        )
    return sides[0], sides[1]


def _checked_classes(num_classes: int | None) -> int | None:
    if num_classes is not None and not (type(num_classes) is int and 1 <= num_classes <= MAX_CLASSES):
        raise BadInput(
            f"number of classes {num_classes} is not a whole number of 1 to {MAX_CLASSES}; pass --num-classes N"
        )
    return num_classes


def _checked_statistic(what: str, values: Sequence[float] | None) -> tuple[float, ...] | None:
    if values is None:
        return None
    numbers = tuple(float(value) for value in values)
    if not numbers or not all(math.isfinite(number) and (number > 0 or what == "mean") for number in numbers):
        raise BadInput(
            f"{what} {numbers} must be finite{'' if what == 'mean' else ' and above 0'}; pass --{what} a,b,c"
        )
    return numbers


def _with_options(own: Preprocessing, wanted: _Wanted) -> Preprocessing:
    """Replace what the user gave; one mean or std stands for all channels."""
    changes: dict[str, Any] = {"input_size": wanted.input_size or own.input_size}
    for what, values in (("mean", wanted.mean), ("std", wanted.std)):
        if values is None:
            continue
        if len(values) not in (1, own.channels):
            raise BadInput(
                f"{what} has {len(values)} values, the model {own.channels} input channels; pass one for each"
            )
        changes[what] = values * own.channels if len(values) == 1 else values
    return replace(own, **changes)


def _open_known(recipe: Recipe, wanted: _Wanted) -> Subject:
    """Open a network of timm, torchvision or the reference table."""
    own, classes, size_argument = _DEFAULTS[recipe.source](recipe.name)
    preprocessing = _with_options(own, wanted)
    size = preprocessing.input_size
    kwargs: dict[str, Any] = {"num_classes": wanted.num_classes or classes}
    if recipe.source == "torchvision":
        kwargs |= _TORCHVISION_FLAGS.get(recipe.name, {})
    if size_argument:
        kwargs[size_argument] = size[0] if recipe.source == "torchvision" else list(size)
    recipe = replace(recipe, kwargs=kwargs)
    model, info = _with_weights(recipe, wanted, classes)
    return _subject(model, recipe, info, preprocessing, kwargs["num_classes"], wanted.seed)


def _subject(
    model: nn.Module, recipe: Recipe, info: WeightsInfo, preprocessing: Preprocessing, num_classes: int, seed: int
) -> Subject:
    with seeded(seed):
        example = torch.randn(1, preprocessing.channels, *preprocessing.input_size)
    name = Path(recipe.name).name.replace(".py:", "-") if recipe.source == "file" else recipe.name
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
    return Subject(model.eval(), example, recipe, safe, info, preprocessing, num_classes)


def _timm_defaults(name: str) -> tuple[Preprocessing, int, str]:
    """Return preprocessing, number of classes, and the name of the factory's size argument, empty where it has none."""
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise BadInput(f"timm has no network {name!r} ({str(error).rstrip('.')}); `archscan list` shows all") from error
    data = resolve_data_config(args={}, pretrained_cfg=config.to_dict() if config else {})
    own = Preprocessing(
        data["input_size"][1:], data["mean"], data["std"], data["interpolation"], data["crop_pct"], data["crop_mode"]
    )
    return own, config.num_classes if config else 1000, "img_size" if config and config.fixed_input_size else ""


def _torchvision_defaults(name: str) -> tuple[Preprocessing, int, str]:
    size_argument = "image_size" if name.startswith("vit_") else ""
    weights = torchvision_weights(name)
    if weights is None:
        return Preprocessing((224, 224), IMAGENET_MEAN, IMAGENET_STD, "bilinear", 0.875), 1000, size_argument
    transforms = weights.transforms()
    crop, resized = transforms.crop_size[0], transforms.resize_size[0]
    # Half a pixel more, so that who divides and rounds down gets the resized side back.
    crop_pct = crop / (resized + 0.5) if resized > crop else 1.0
    own = Preprocessing(
        (crop, crop), tuple(transforms.mean), tuple(transforms.std), transforms.interpolation.value, crop_pct, "center"
    )
    return own, len(weights.meta["categories"]), size_argument


def _reference_defaults(name: str) -> tuple[Preprocessing, int, str]:
    net = REFERENCE_NETS[name]
    return Preprocessing(net.input_shape[1:], net.mean, net.std), 10, "image_size" if name == "lenet5" else ""


_DEFAULTS: Mapping[str, Callable[[str], tuple[Preprocessing, int, str]]] = {
    "timm": _timm_defaults,
    "torchvision": _torchvision_defaults,
    "reference": _reference_defaults,
}


def _with_weights(recipe: Recipe, wanted: _Wanted, own_classes: int) -> tuple[nn.Module, WeightsInfo]:
    if wanted.weights == "random":
        return build(recipe, seed=wanted.seed), WeightsInfo("random", reason="random weights were asked for")
    if wanted.weights not in ("auto", "pretrained"):
        state = load_state_file(wanted.weights)
        model = build(recipe, seed=wanted.seed)
        load_into(model, state, wanted.weights)
        return model, WeightsInfo("file", wanted.weights)
    try:
        model, origin = pretrained_model(recipe, seed=wanted.seed)
    except NoPretrainedWeights as why:
        if wanted.weights == "pretrained":
            raise BadInput(
                f"there are no pretrained weights for {recipe.name}: {why}; pass --weights FILE or random"
            ) from why
        return build(recipe, seed=wanted.seed), WeightsInfo("random", reason=str(why))
    outputs = recipe.kwargs["num_classes"]
    reason = (
        ""
        if outputs == own_classes
        else f"the classifier is random: it has {outputs} outputs, the weights {own_classes}"
    )
    return model, WeightsInfo("pretrained", origin, reason)


def _open_file(name: str, wanted: _Wanted) -> Subject:
    """Open what a user's factory returns; its outputs are counted by running it once."""
    if wanted.weights in ("pretrained", "random"):
        raise BadInput(f"the factory in {name} decides about its weights; leave --weights out, or pass a weights file")
    recipe = Recipe("file", name, {} if wanted.num_classes is None else {"num_classes": wanted.num_classes})
    model = build_from_file(recipe, seed=wanted.seed)
    if wanted.weights == "auto":
        check_finite(model.state_dict(), name)
        info = WeightsInfo("given", name, "as the factory returned them")
    else:
        load_into(model, load_state_file(wanted.weights), wanted.weights)
        info = WeightsInfo("file", wanted.weights)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    channels = convolutions[0].in_channels if convolutions else 3
    rgb = channels == 3
    own = Preprocessing(
        (224, 224),
        IMAGENET_MEAN if rgb else (0.5,) * channels,
        IMAGENET_STD if rgb else (0.5,) * channels,
        "bilinear",
        0.875,
    )
    subject = _subject(model, recipe, info, _with_options(own, wanted), 0, wanted.seed)
    return replace(subject, num_classes=_count_outputs(subject, sized=wanted.input_size is not None))


def _count_outputs(subject: Subject, *, sized: bool) -> int:
    shape = tuple(subject.example_input.shape)
    try:
        with torch.no_grad():
            output = subject.model(subject.example_input)
    except RAISED_BY_CODE as error:
        parts = split_file_name(subject.recipe.name)
        raised = what_was_raised(error, parts[0] if parts else Path(subject.recipe.name))
        if "required positional argument" in str(error):
            remedy = "the command line gives it one batch of images; use archscan.slim from Python for more inputs"
        else:
            remedy = "see that it runs on such images" if sized else "pass --input-size if it wants another one"
        raise BadInput(f"the model cannot take an input of shape {shape}: {raised}; {remedy}") from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        what = (
            f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        )
        raise BadInput(
            f"the model of {subject.name} returns {what}, not one row of class scores per image; use archscan.slim "
            "from Python, with a loss_fn of its own"
        )
    return output.shape[1]


def _open_saved(folder: Path, wanted: _Wanted, open_saved: Callable[[Path], Subject]) -> Subject:
    if wanted.weights != "auto" or wanted.num_classes is not None:
        raise BadInput(
            f"{folder} is a saved result, which has its own weights and classes; leave out --weights and --num-classes"
        )
    subject = open_saved(folder)
    preprocessing = _with_options(subject.preprocessing, wanted)
    with seeded(wanted.seed):
        example = torch.randn(1, preprocessing.channels, *preprocessing.input_size)
    return replace(subject, preprocessing=preprocessing, example_input=example)
