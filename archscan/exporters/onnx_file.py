"""``model.onnx``: ONNX from the traced program, checked by onnx and run in ONNX Runtime.

The decision that is not obvious: parameters are counted, by name and shape, before constant folding. Folding merges
BatchNorms into convolutions, which is wanted (a third of the time of a MobileNet in ONNX Runtime), but after it a
count says nothing. Its result is held to be no larger, and to compute the same.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_unflatten

from archscan.capture import split_input
from archscan.errors import BadInput, RebuildMismatch
from archscan.exporters.checks import compare, quiet, refusing
from archscan.exporters.network import Checked, Network, count_parameters, entry_of
from archscan.report.model import Exported

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

FILE = "model.onnx"

LEAST_OPSET = 18
"""Older ones are made by a converter that leaves the file as it is where it fails."""

LARGEST_FILE_BYTES = 2**31 - 2**24
"""A protobuf ends at 2 GiB; larger tensors go beside it, into ``model.onnx.data``."""

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_onnx() -> None:
    """See that the packages are there.

    Raises:
        BadInput: One is missing.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise BadInput(
            f"exporting ONNX needs {' and '.join(missing)}, not installed here; run: pip install 'archscan[onnx]'"
        )


def write_onnx(network: Network, folder: Path) -> Exported:
    """Write ``model.onnx``, and ``model.onnx.data`` where that would be larger than a protobuf may be.

    Raises:
        BadInput: The network cannot be exported, or not with this opset.
        RebuildMismatch: The file does not compute what the network computes.
    """
    require_onnx()
    import onnx
    import onnxruntime

    path = folder / FILE
    made, parameters = _convert(network)
    opset = made.model.opset_imports[""]
    is_dynamic = network.settings.batch_size is None
    tensor_bytes = sum(value.const_value.nbytes for value in _graph(made).initializers.values())
    with quiet(), refusing("onnx", is_dynamic=is_dynamic):
        made.save(path, external_data=tensor_bytes > LARGEST_FILE_BYTES)
        with _raising_runtime_error():
            onnx.checker.check_model(path, full_check=True)
            session = _open_session(path)
            agreement = compare(FILE, lambda inputs: _run(session, inputs), network.trials)
    by = f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}"
    return entry_of(network, path, Checked("onnx", parameters, len(made.model.graph), agreement, by, opset))


def _convert(network: Network) -> tuple["ONNXProgram", int]:
    """Convert the program; return it and the number of parameters that it took over."""
    from onnx import defs

    settings, most = network.settings, defs.onnx_opset_version()
    if settings.opset is not None and not LEAST_OPSET <= settings.opset <= most:
        raise BadInput(f"opset {settings.opset} cannot be written; give one from {LEAST_OPSET} to {most}, or none")
    program = network.program
    for spec in program.graph_signature.output_specs:
        if isinstance(spec.arg, ConstantArgument) and spec.arg.value is not None:
            raise BadInput(
                f"the network's output holds {spec.arg.value!r}, and an ONNX file gives tensors only; leave onnx out"
            )
    with quiet(), refusing("onnx", is_dynamic=settings.batch_size is None):
        made = torch.onnx.export(
            program, dynamo=True, verbose=False, optimize=False, opset_version=settings.opset, external_data=False
        )
        assert made is not None, "dynamo=True returns a program"
        initialisers = _shapes(made)
        made.optimize()
    found = made.model.opset_imports[""]
    if settings.opset not in (None, found):
        raise BadInput(f"the network cannot be written with ONNX opset {settings.opset}; leave it out for {found}")
    _name_outputs(made, network)
    if settings.batch_size is None:
        _name_batch(_graph(made))
    return made, _count(network, initialisers, made)


def _graph(made: "ONNXProgram") -> Any:
    """Return the graph; its initialisers are typed as if they might have no tensor."""
    return made.model.graph


def _shapes(made: "ONNXProgram") -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.const_value.shape) for name, value in _graph(made).initializers.items()}


def _count(network: Network, initialisers: dict[str, tuple[int, ...]], made: "ONNXProgram") -> int:
    """Count the parameters taken over, and see that all are there that the program reads, and no tensor beside them."""
    parameters = count_parameters(network, lambda name: initialisers.get(name), FILE)
    read = {node.name for node in network.program.graph.nodes if node.op == "placeholder" and node.users}
    for spec in network.program.graph_signature.input_specs:
        if spec.kind is InputKind.PARAMETER and spec.arg.name in read and spec.target not in initialisers:
            raise RebuildMismatch(f"{FILE} lacks {spec.target}, which the network reads; nothing was written")
    before = sum(map(prod, initialisers.values()))
    after = sum(map(prod, _shapes(made).values()))
    slack = 64 * len(made.model.graph)  # sizes and indices that folding computed
    if after > before + slack:
        raise RebuildMismatch(f"{FILE} grew from {before:,} to {after:,} numbers in constant folding")
    return parameters


def _name_outputs(made: "ONNXProgram", network: Network) -> None:
    """Name the outputs after their place in the network's output: ``output``, or ``output_aux`` for a key."""
    specs = [spec for spec in network.program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    tree = tree_unflatten(specs, network.program.call_spec.out_spec)
    names = [
        "output" + "".join(_word(keystr((key,))) for key in path)
        for path, spec in tree_flatten_with_path(tree)[0]
        if not isinstance(spec.arg, ConstantArgument)
    ]
    values = made.model.graph.outputs
    taken = {value.name for value in made.model.graph.inputs} | set(made.model.graph.initializers)
    if len(names) == len(values) and len(set(names)) == len(names) and not taken & set(names):
        for value, name in zip(values, names, strict=True):
            value.name = name


def _name_batch(graph: Any) -> None:
    """Write ``batch`` wherever a shape has the symbol that tracing gave to the batch."""
    axes = (value.shape[0] for value in graph.inputs if value.shape is not None and len(value.shape))
    symbol = next((str(axis) for axis in axes if not isinstance(axis, int)), None)
    if symbol is None:
        return
    word = re.compile(rf"\b{re.escape(symbol)}\b")
    for value in (*graph.inputs, *(value for node in graph.all_nodes() for value in node.outputs)):
        for place, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and size.value is not None:
                value.shape[place] = word.sub("batch", str(size.value))


def _word(key: str) -> str:
    return "_" + "".join(letter for letter in key if letter.isalnum() or letter == "_")


@contextmanager
def _raising_runtime_error() -> Iterator[None]:
    """Turn the errors of onnx and ONNX Runtime, which share no class but `Exception`, into one that is known.

    Raises:
        RuntimeError: In place of them.
    """
    from onnx import checker, shape_inference
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = (checker.ValidationError, shape_inference.InferenceError)
    run = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.NotImplemented, state.RuntimeException)
    try:
        yield
    except (*found, *run) as error:
        said_by = "ONNX Runtime" if isinstance(error, run) else "onnx's checker"
        raise RuntimeError(f"{said_by} says: {error}") from None


def _open_session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run(session: Any, inputs: Any) -> list[Tensor]:
    """Run ONNX Runtime; inputs that the network does not read are none of the file's."""
    leaves = [leaf for leaf in tree_leaves(split_input(inputs)) if isinstance(leaf, Tensor)]
    given = {entry.name: leaf.numpy() for entry, leaf in zip(session.get_inputs(), leaves, strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, given)]
