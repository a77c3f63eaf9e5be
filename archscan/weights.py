"""A file of weights → tensors that are known to fit a model and to be finite.

Files are safetensors, or a state dict in PyTorch's own format, read with ``weights_only=True``, so that no file can run
code. What does not fit is named: a file of another model, of another number of classes, a damaged one, NaN.
"""

import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from archscan.errors import BadInput

WeightsKind = Literal["pretrained", "random", "file", "saved", "given"]

_WRAPPERS = ("module.", "_orig_mod.")
_PREFIXES = (*_WRAPPERS, "model.", "net.", "network.", "backbone.")
_DAMAGED = (
    OSError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    pickle.UnpicklingError,
)
"""What torch.load raises on bytes that are not what it expects."""


@dataclass(frozen=True)
class WeightsInfo:
    """Where a model's weights come from.

    Attributes:
        kind: ``given`` where they came with the model, from a file's factory or from Python.
        origin: The file or the tag that they were read from; empty for random ones.
        reason: Why they are what they are, as a clause for a banner; empty where that is plain.
    """

    kind: WeightsKind
    origin: str = ""
    reason: str = ""

    def to_json(self) -> dict[str, str]:
        """Write as JSON values."""
        return asdict(self)


def load_state_file(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict: ``.safetensors``, or ``.pt``, ``.pth``, ``.bin``, ``.ckpt`` without running what they hold.

    A state dict inside a checkpoint is found, and the prefix that a parallel or compiled wrapper puts before every key
    is taken off. Where there are several, such as a moving average beside the weights, ``FILE:NAME`` says which.

    Raises:
        BadInput: There is no such file, it is damaged, holds code, or holds other things than tensors.
    """
    file, wanted = _file_and_name(Path(path))
    if not file.is_file():
        raise BadInput(
            f"there is no weights file {file}; pass a .safetensors, .pt or .pth file, or auto, pretrained or random"
        )
    if file.suffix == ".safetensors":
        content: Any = _read_safetensors(file)
    elif file.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        content = _read_torch(file)
    else:
        raise BadInput(
            f"{file} has an unknown ending; weights are read from .safetensors, .pt, .pth, .bin or .ckpt files"
        )
    return _as_state_dict(content, file, wanted)


def _file_and_name(path: Path) -> tuple[Path, str]:
    """Read ``FILE:NAME`` as a file and the name of a state dict in it; the name is empty where there is none."""
    file, colon, name = str(path).rpartition(":")
    return (Path(file), name) if colon and not path.exists() and Path(file).is_file() else (path, "")


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise BadInput(
            f"{file} cannot be read as safetensors ({error}): it is truncated or of another kind; fetch it again"
        ) from error


def _read_torch(file: Path) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # its advice is to load with less care
            return torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror}; check its permissions") from error
    except _DAMAGED as error:
        message = str(error)
        named = re.search(r"GLOBAL ([\w.]+)", message)
        if named or "Unsupported" in message or "TorchScript" in message:
            what = f"would run {named.group(1)} when loaded" if named else "holds objects or a program"
            raise BadInput(
                f"{file} {what} and is refused: archscan reads tensors only; save model.state_dict()"
            ) from error
        raise BadInput(
            f"{file} cannot be read as a state dict: it is truncated or of another kind; fetch it again"
        ) from error


def _as_state_dict(content: Any, file: Path, wanted: str) -> dict[str, Tensor]:
    held = {str(key): each for key, each in content.items() if _is_state_dict(each)} if _has_names(content) else {}
    if wanted and wanted not in held:
        raise BadInput(f"{file} holds no state dict {wanted!r}; it holds {', '.join(held) or 'no named one'}")
    if len(held) > 1 and not wanted:
        raise BadInput(
            f"{file} holds several state dicts ({_few(list(held))}); say which, such as {file}:{next(iter(held))}"
        )
    content = held[wanted or next(iter(held))] if held else content
    if not isinstance(content, Mapping) or not content:
        raise BadInput(f"{file} holds no state dict (names and their tensors); save model.state_dict()")
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor) or not isinstance(key, str)]
    if others:
        raise BadInput(f"{file} holds other things than tensors ({_few(others)}); save model.state_dict() alone")
    state = dict(content)
    while prefix := next((each for each in _WRAPPERS if all(key.startswith(each) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _has_names(content: Any) -> bool:
    """Say whether something is a checkpoint: a mapping, but not itself of tensors."""
    return isinstance(content, Mapping) and not _is_state_dict(content)


def _is_state_dict(content: Any) -> bool:
    if not isinstance(content, Mapping) or not content:
        return False
    return all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())


def _aligned(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Take a prefix off all keys, or put it back, where that makes them the model's own; else leave them."""
    keys = {key for key in own if not key.endswith("num_batches_tracked")}
    if keys <= state.keys():
        return state
    for prefix in _PREFIXES:
        off = {key.removeprefix(prefix): value for key, value in state.items()}
        on = {f"{prefix}{key}": value for key, value in state.items()}
        for changed in (off, on):
            if len(changed) == len(state) and keys <= changed.keys() <= own.keys():
                return changed
    return state


def load_into(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Copy `state` into `model`, every key and shape of which must fit; step counters of BatchNorm may be missing.

    Args:
        model: The network, changed in place.
        state: Names and tensors.
        origin: Where they come from, for the message.

    Raises:
        BadInput: Keys or shapes do not fit, or a value is not finite.
    """
    own = model.state_dict()
    state = _aligned(state, own)
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    unlike = [key for key in own if key in state and not _fits(state[key], own[key])]
    if unlike and not missing and not unexpected:
        _refuse_other_classes(state, own, unlike, origin)
    if missing or unexpected or unlike:
        clauses = [
            f"{len(keys)} {verb} ({_few(keys)})"
            for verb, keys in (("missing", missing), ("unknown", unexpected))
            if keys
        ]
        if unlike:
            sizes = [f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}" for key in unlike]
            clauses.append(f"{len(unlike)} of another shape ({_few(sizes)})")
        raise BadInput(
            f"{origin} is of another model: of {len(own)} tensors, {', '.join(clauses)}; pass this model's weights"
        )
    check_finite(state, origin)
    own.update(state)  # in place: the version that `own` carries keeps modules from reading new weights as old ones
    model.load_state_dict(own, strict=True)


def _fits(new: Tensor, old: Tensor) -> bool:
    return new.shape == old.shape and new.is_floating_point() == old.is_floating_point()


def _refuse_other_classes(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], unlike: list[str], origin: str
) -> None:
    """Where only leading sizes differ, the last layer's too, all in one way, the number of classes does: say so."""
    if [key for key in own if own[key].ndim > 1][-1] not in unlike:
        return
    heads = {(state[key].shape[:1], own[key].shape[:1]) for key in unlike}
    if len(heads) != 1 or any(state[key].shape[1:] != own[key].shape[1:] for key in unlike):
        return
    ((new, old),) = heads
    if new and old:
        raise BadInput(
            f"{origin} has {new[0]} classes where the model has {old[0]} ({_few(unlike)}); pass --num-classes {new[0]}"
        )


def check_finite(tensors: Mapping[str, Tensor], origin: str) -> None:
    """Refuse NaN and infinity in parameters and statistics.

    Args:
        tensors: Names and tensors, such as a state dict.
        origin: Where they come from, for the message.

    Raises:
        BadInput: Names the tensors with such values.
    """
    bad = [key for key, value in tensors.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
    if bad:
        raise BadInput(
            f"{origin} holds NaN or infinity in {len(bad)} tensors ({_few(bad)}); pass weights of a sound training run"
        )


def _few(names: list[str], count: int = 3) -> str:
    """Join the first few names, and say how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
