"""Names of networks and how to build them: a name → `Recipe` → an `nn.Module` with random weights.

A `Recipe` is JSON: it builds an architecture again, without weights and without network access. Since a recipe may come
from a folder that somebody else wrote, `build` takes nothing on trust: only known names, only known arguments within
bounds, and no code from files. `build_from_file` is for callers whose user named the file.
"""

import difflib
import fnmatch
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import timm
import torch
import torchvision
from torch import nn

from archscan.errors import BadInput
from archscan.reference_nets import REFERENCE_NETS

SourceName = Literal["timm", "torchvision", "reference", "file"]

MAX_CLASSES = 1_000_000
MAX_SIDE_PIXELS = 8192
_BOUNDS: Mapping[str, int] = {"num_classes": MAX_CLASSES, "img_size": MAX_SIDE_PIXELS, "image_size": MAX_SIDE_PIXELS}
_FLAGS = frozenset({"aux_logits", "transform_input", "init_weights"})
_KWARGS: Mapping[SourceName, frozenset[str]] = {
    "timm": frozenset({"num_classes", "img_size"}),
    "torchvision": frozenset({"num_classes", "image_size"}) | _FLAGS,
    "reference": frozenset({"num_classes", "image_size"}),
    "file": frozenset({"num_classes"}),
}


@dataclass(frozen=True)
class Recipe:
    """How to build an architecture again, without its weights.

    Attributes:
        source: Who provides it.
        name: Its name there; ``path.py:factory`` for a file.
        kwargs: Arguments of its factory; JSON values only.
    """

    source: SourceName
    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Write as JSON values."""
        return {"source": self.source, "name": self.name, "kwargs": dict(self.kwargs)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Recipe":
        """Read what `to_json` wrote.

        Raises:
            BadInput: It is not a recipe, or has unknown arguments or some out of bounds.
        """
        fields = data if isinstance(data, Mapping) else {}
        source, name, kwargs = (fields.get(key) for key in ("source", "name", "kwargs"))
        if (
            source is None
            or source not in get_args(SourceName)
            or not isinstance(name, str)
            or not isinstance(kwargs, Mapping)
        ):
            raise BadInput(
                f"a recipe names a source ({', '.join(get_args(SourceName))}), a name and kwargs; this one does not"
            )
        recipe = cls(source, name, dict(kwargs))
        _check_kwargs(recipe)
        return recipe


@dataclass(frozen=True)
class NetworkName:
    """One network that can be opened.

    Attributes:
        source: Who provides it.
        name: Its name there.
        pretrained: Whether there are pretrained weights for it.
    """

    source: SourceName
    name: str
    pretrained: bool


def list_networks(pattern: str | None = None) -> list[NetworkName]:
    """List what can be opened by name, sorted within timm, torchvision and reference.

    Args:
        pattern: A shell pattern (``resnet*``), or a part of a name; upper and lower case are the same. With a colon it
            is one of source and name (``reference:*``). None lists all.
    """
    trained = {name.partition(".")[0] for name in timm.list_models(pretrained=True)}
    found = [NetworkName("timm", name, name in trained) for name in sorted(timm.list_models())]
    found += [NetworkName("torchvision", name, torchvision_weights(name) is not None) for name in _torchvision_names()]
    found += [NetworkName("reference", name, False) for name in sorted(REFERENCE_NETS)]
    if pattern is None:
        return found
    wanted = pattern.lower()
    if not any(character in wanted for character in "*?["):
        wanted = f"*{wanted}*"
    whole = ":" in wanted
    names = [f"{network.source}:{network.name}" if whole else network.name for network in found]
    return [each for each, name in zip(found, names, strict=True) if fnmatch.fnmatchcase(name.lower(), wanted)]


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def torchvision_weights(name: str) -> Any:
    """Return torchvision's default weights of a network, an enum member, or None where there are none."""
    return getattr(torchvision.models.get_model_weights(name), "DEFAULT", None)


_IS_KNOWN: Mapping[SourceName, Callable[[str], bool]] = {
    "timm": timm.is_model,
    "torchvision": lambda name: name in _torchvision_names(),
    "reference": lambda name: name in REFERENCE_NETS,
}


def resolve(name: str) -> tuple[SourceName, str]:
    """Say which source a name belongs to, and what it is called there; timm wins without a prefix.

    Raises:
        BadInput: No source has it; the message lists the closest names.
    """
    prefix, _, rest = name.partition(":")
    sources: list[SourceName] = [source for source in _IS_KNOWN if rest and source == prefix] or list(_IS_KNOWN)
    bare = rest if len(sources) == 1 else name
    for source in sources:
        if _IS_KNOWN[source](bare):
            return source, bare
    names = [network.name for network in list_networks() if network.source in sources]
    closest = difflib.get_close_matches(bare.lower(), dict.fromkeys(names), n=4, cutoff=0.5)
    where = f"{prefix} has no network {bare!r}" if len(sources) == 1 else f"there is no network {name!r}"
    hint = f"did you mean {', '.join(closest)}? " if closest else ""
    raise BadInput(f"{where}; {hint}`archscan list` shows all {len(names)}")


def build(recipe: Recipe, *, seed: int = 0) -> nn.Module:
    """Build the architecture of a recipe with random weights, in eval mode, and without network access.

    Args:
        recipe: It may be of unknown origin.
        seed: Of the initialisation; the global random state is left as it was.

    Raises:
        BadInput: The recipe names what is not known, arguments that are unknown or out of bounds, or code in a file.
    """
    _check_kwargs(recipe)
    if recipe.source == "file":
        raise BadInput(
            f"the architecture is code in {recipe.name}, which a recipe may not run; build the model and pass it"
        )
    if not _IS_KNOWN[recipe.source](recipe.name):
        raise BadInput(f"{recipe.source} has no network {recipe.name!r}, which the recipe asks for")
    with seeded(seed):
        try:
            return _create(recipe).eval()
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise BadInput(f"{recipe.source} cannot build {recipe.name} with {dict(recipe.kwargs)}: {error}") from error


def _create(recipe: Recipe) -> nn.Module:
    if recipe.source == "timm":
        return timm.create_model(recipe.name, pretrained=False, **recipe.kwargs)
    if recipe.source == "torchvision":
        return torchvision.models.get_model(recipe.name, weights=None, **recipe.kwargs)
    return REFERENCE_NETS[recipe.name].factory(**recipe.kwargs)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw what is random inside from `seed`, and leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _check_kwargs(recipe: Recipe) -> None:
    unknown = sorted(str(key) for key in set(recipe.kwargs) - _KWARGS[recipe.source])
    if unknown:
        raise BadInput(
            f"the recipe of {recipe.name} has arguments that {recipe.source} does not take here: {', '.join(unknown)}"
        )
    for key, value in recipe.kwargs.items():
        if key in _FLAGS:
            if not isinstance(value, bool):
                raise BadInput(f"the recipe of {recipe.name} has {key} = {value!r}; it must be true or false")
            continue
        numbers = value if isinstance(value, (list, tuple)) and len(value) == 2 and key != "num_classes" else (value,)
        if not all(type(number) is int and 1 <= number <= _BOUNDS[key] for number in numbers):
            raise BadInput(
                f"the recipe of {recipe.name} has {key} = {value!r}; it must be a whole number of 1 to {_BOUNDS[key]}"
            )


def split_file_name(name: str) -> tuple[Path, str] | None:
    """Read ``path/to/file.py:factory`` as the file and the factory; None where the name is of another form."""
    match = re.fullmatch(r"(.+\.py):([A-Za-z_]\w*)", name)
    return (Path(match[1]), match[2]) if match else None


def build_from_file(recipe: Recipe, *, seed: int = 0) -> nn.Module:
    """Run the file that a recipe names, and call its factory: only where the user named that file.

    The factory is called with the recipe's arguments, and the model is put into eval mode.

    Raises:
        BadInput: The file or its factory is missing, takes other arguments, returns no module, or its code raises.
    """
    _check_kwargs(recipe)
    parts = split_file_name(recipe.name)
    if parts is None:
        raise BadInput(f"{recipe.name} does not name a factory; write path/to/file.py:factory")
    file, factory_name = parts
    with _importable_siblings(file), seeded(seed):
        factory = getattr(_run_file(file), factory_name, None)
        if not callable(factory):
            raise BadInput(
                f"{file} has no function {factory_name}; write path/to/file.py:factory with the name of one it has"
            )
        try:
            inspect.signature(factory).bind(**recipe.kwargs)
        except TypeError as error:
            given = ", ".join(recipe.kwargs) or "no arguments"
            raise BadInput(f"{factory_name} in {file} cannot be called with {given}: {error}") from error
        try:
            model = factory(**recipe.kwargs)
        except RAISED_BY_CODE as error:
            raise BadInput(f"{factory_name} in {file} fails: {what_was_raised(error, file)}; mend it first") from error
    if not isinstance(model, nn.Module):
        raise BadInput(
            f"{factory_name} in {file} returned {repr(model)[:60]} ({type(model).__name__}); "
            "it must return a torch.nn.Module"
        )
    return model.eval()


@contextmanager
def _importable_siblings(file: Path) -> Iterator[None]:
    """Let the file import its neighbours, as a script can."""
    folder = str(file.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _run_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise BadInput(f"there is no file {file}; write path/to/file.py:factory")
    spec = importlib.util.spec_from_file_location(f"archscan_subject_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise BadInput(f"{file} cannot be imported as Python; write path/to/file.py:factory")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except RAISED_BY_CODE as error:
        raise BadInput(f"{file} cannot be imported: {what_was_raised(error, file)}; mend it first") from error
    return module


RAISED_BY_CODE = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError),
    *(RuntimeError, SyntaxError, TypeError, ValueError, MemoryError, StopIteration),
)
"""What a mistake in a user's own code may raise: everything that Python and PyTorch raise of themselves."""


def what_was_raised(error: BaseException, file: Path) -> str:
    """Say in a line what was raised, and which line of the user's file it came from, where it came from there."""
    lines = str(error).strip().splitlines()
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file.resolve()]
    place = f" (line {inside[-1]})" if inside else ""
    return f"{type(error).__name__}: {lines[0]}{place}" if lines else f"{type(error).__name__}{place}"
