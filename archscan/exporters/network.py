"""The network as all formats take it: a copy on the CPU in eval mode, an example, trials, and one traced program."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils._pytree import tree_leaves

from archscan.capture import split_input
from archscan.errors import BadInput, RebuildMismatch
from archscan.exporters.checks import Agreement, Trial, make_trials, quiet, refusing, resize_batch
from archscan.report.model import Exported

TRIED_BATCHES = (1, 3)
"""Batch sizes that a file for any batch size is run with: the one that code treats apart, and one not traced."""

DATA_SUFFIX = ".data"
"""Ends the name of what a protobuf is too small for."""

_TRACED_BATCH = 2  # 1 would be taken for a size that broadcasts

_BYTES_PER_NODE, _BYTES_PER_FILE = 8 * 2**10, 2**18
"""How much a file may be larger than its tensors: names, types, and the source that TorchScript keeps."""


@dataclass(frozen=True)
class ExportSettings:
    """How to export.

    Attributes:
        batch_size: The only one that the files take; None for any.
        opset: ONNX opset; None for the one that PyTorch writes by default.
        overwrite: Whether files that are there may be replaced.
    """

    batch_size: int | None = None
    opset: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, value in (("batch_size", self.batch_size), ("opset", self.opset)):
            if value is not None and (type(value) is not int or value < 1):
                raise BadInput(f"{name} is {value!r}; it must be a whole number from 1 on, or None")


@dataclass(frozen=True, eq=False)
class Network:
    """A network to export.

    Attributes:
        model: On the CPU, in eval mode.
        example: Inputs to trace with.
        settings: How to export.
        trials: What the files are held against.
    """

    model: nn.Module
    example: Any
    settings: ExportSettings
    trials: tuple[Trial, ...]

    @cached_property
    def program(self) -> ExportedProgram:
        """The network as `torch.export` traces it, once for all formats; it holds no example and no path of a source.

        Raises:
            BadInput: It cannot be traced.
        """
        args, kwargs = split_input(self.example)
        is_dynamic = self.settings.batch_size is None
        batch, shapes = Dim("batch"), ShapesCollection()
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.ndim and is_dynamic:
                shapes[leaf] = {0: batch}
        with quiet(), refusing("pt2 and onnx", is_dynamic=is_dynamic):
            dynamic = shapes.dynamic_shapes(self.model, args, kwargs) if is_dynamic else None
            program = torch.export.export(self.model, args, kwargs, dynamic_shapes=dynamic)
        for module in program.graph_module.modules():
            if isinstance(module, torch.fx.GraphModule):
                for node in module.graph.nodes:
                    node.meta.pop("stack_trace", None)
        return program

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Every parameter under each of its paths."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    @property
    def tried(self) -> str:
        """The batch sizes of the trials, in words."""
        return "batch " + " and ".join(dict.fromkeys(str(trial.batch_size) for trial in self.trials))


@dataclass(frozen=True)
class Checked:
    """What running a file has shown.

    Attributes:
        format: Its format.
        parameters: How many of the network's parameters it carries.
        nodes: How many names and types it has to hold beside them, about.
        agreement: With PyTorch.
        by: What it was loaded and run with.
        opset: Of ONNX.
    """

    format: Literal["onnx", "pt2", "script"]
    parameters: int
    nodes: int
    agreement: Agreement
    by: str
    opset: int | None = None


def prepare(model: nn.Module, example_input: Any, settings: ExportSettings) -> Network:
    """Copy a network to export it; the original is left unchanged.

    Raises:
        BadInput: There is no tensor in the example, or the network cannot run it.
    """
    if not any(isinstance(leaf, Tensor) and leaf.ndim for leaf in tree_leaves(example_input)):
        raise BadInput("the example input holds no tensor with a batch axis; pass what the network takes")
    own = copy.deepcopy(model).cpu().eval()
    sizes = TRIED_BATCHES if settings.batch_size is None else (settings.batch_size,) * 2
    example = resize_batch(example_input, settings.batch_size or _TRACED_BATCH, 0)
    return Network(own, example, settings, make_trials(own, example_input, sizes))


def count_parameters(network: Network, carries: Callable[[str], tuple[int, ...] | None], name: str) -> int:
    """Count the network's parameters in a file, each of them once.

    Args:
        network: What was exported.
        carries: Path of a parameter → its shape in the file; None where the file has it not.
        name: Of the file, for the message.

    Raises:
        RebuildMismatch: A parameter has another shape there.
    """
    counted: dict[int, int] = {}
    for path, parameter in network.parameters.items():
        shape = carries(path)
        if shape is None:
            continue
        if shape != tuple(parameter.shape):
            raise RebuildMismatch(
                f"{name} holds {path} with shape {shape} where the network has {tuple(parameter.shape)}"
            )
        counted[id(parameter)] = parameter.numel()
    return sum(counted.values())


def check_size(network: Network, name: str, file_bytes: int, nodes: int) -> None:
    """See that a file is about as large as the network's tensors, so that nothing of the dense one was left in it.

    Raises:
        RebuildMismatch: It is larger.
    """
    tensors = {id(tensor): tensor for tensor in (*network.model.parameters(), *network.model.buffers())}
    tensor_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if file_bytes > 1.02 * tensor_bytes + nodes * _BYTES_PER_NODE + _BYTES_PER_FILE:
        raise RebuildMismatch(
            f"{name} takes {file_bytes:,} bytes where the network's tensors take {tensor_bytes:,}; nothing was written"
        )


def entry_of(network: Network, file: Path, checked: Checked) -> Exported:
    """Describe a file that was run, with what lies beside it.

    Raises:
        RebuildMismatch: See `check_size`.
    """
    parts = (file, file.with_name(f"{file.name}{DATA_SUFFIX}"))
    file_bytes = sum(part.stat().st_size for part in parts if part.exists())
    check_size(network, file.name, file_bytes, checked.nodes)
    return Exported(
        format=checked.format,
        file=file.name,
        file_bytes=file_bytes,
        parameters=checked.parameters,
        batch_size=network.settings.batch_size,
        max_abs_error=checked.agreement.max_abs_error,
        max_relative_error=checked.agreement.max_relative_error,
        opset=checked.opset,
        checked_by=f"{checked.by} at {network.tried}",
    )
