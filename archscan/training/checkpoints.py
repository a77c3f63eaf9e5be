"""What a killed run goes on from: tensors and JSON ↔ one safetensors file, which is replaced at once or not at all.

The JSON lies in the header of the tensor file, so that no interruption can leave the two of different epochs. There is
no pickle in it. No state of a random generator is in it either: all that is random follows from the seed, the epoch and
the number of the image.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from archscan.errors import BadInput
from archscan.saving import distinct_tensors

FORMAT = 1
_KEY = "archscan"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A run after some epoch.

    Attributes:
        tensors: By name.
        state: JSON values.
    """

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


def write_checkpoint(file: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint in place of the one that is there.

    Raises:
        BadInput: The disk refuses, or the state is no JSON.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in checkpoint.tensors.items()}
    try:
        text = json.dumps({"format": FORMAT, **checkpoint.state}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadInput(f"the state of the training is no JSON ({error}); choose another optimizer") from error
    try:
        save_file(tensors, partial, metadata={_KEY: text})
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{file} cannot be written ({reason}); choose another output folder") from error
    finally:
        partial.unlink(missing_ok=True)


def read_checkpoint(file: Path) -> Checkpoint:
    """Read what `write_checkpoint` wrote.

    Raises:
        BadInput: It is missing, damaged, or of another version.
    """
    if not file.is_file():
        raise BadInput(f"there is no unfinished run in {file.parent}; leave out --resume")
    try:
        with safe_open(file, framework="pt") as opened:
            state = json.loads((opened.metadata() or {}).get(_KEY, "null"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{file} cannot be read ({error}); start the run again with --overwrite") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise BadInput(f"{file} was not written by this version of archscan; start the run again with --overwrite")
    return Checkpoint(tensors, state)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Divide the state of an optimizer into tensors by name, such as ``state.0.exp_avg``, and JSON values."""
    whole = optimizer.state_dict()
    parts = {"state": whole["state"], "groups": dict(enumerate(whole["param_groups"]))}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, dict[str, Any]]] = {"state": {}, "groups": {}}
    for part, rows in parts.items():
        for index, entries in rows.items():
            row = numbers[part].setdefault(str(index), {})
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"{part}.{index}.{key}"] = value
                else:
                    row[key] = value
    return tensors, numbers


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state: Any) -> None:
    """Put back what `pack_optimizer` took out.

    Raises:
        BadInput: It is of another optimizer, or of another network.
    """
    try:
        parts = {part: {index: dict(row) for index, row in state[part].items()} for part in ("state", "groups")}
        for name, value in tensors.items():
            part, index, key = name.split(".", 2)
            parts[part][index][key] = value.clone()
        groups = [_with_tuples(parts["groups"][str(place)]) for place in range(len(parts["groups"]))]
        rows = {int(index): row for index, row in parts["state"].items()}
        optimizer.load_state_dict({"state": rows, "param_groups": groups})
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise BadInput(f"the checkpoint is of another training ({error}); start again with --overwrite") from error


def _with_tuples(group: Mapping[str, Any]) -> dict[str, Any]:
    """Undo that JSON writes a tuple, such as Adam's betas, as a list."""
    return {key: tuple(value) if isinstance(value, list) and key != "params" else value for key, value in group.items()}


def copy_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy values into all parameters and buffers of a network.

    Raises:
        BadInput: Names or shapes are not those of the network.
    """
    mine = distinct_tensors(model)
    if mine.keys() != tensors.keys() or any(mine[name].shape != tensors[name].shape for name in mine):
        raise BadInput("the unfinished run is of another network; start again with --overwrite")
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])
