"""Run a model once and record every ATen op: model, example input → `Graph`.

The model runs on the meta device, under a `TorchDispatchMode` (as PyTorch's own `FlopCounterMode` does): nothing is
computed, no parameter, buffer or running statistic is touched, and the time does not depend on the resolution. A
forward that reads values (``.item()``) cannot run on meta; it is run once more on real tensors, on a copy.

Data format: every tensor that the run saw is a `Value` with a number; a `Node` is one ATen op whose tensor arguments
are replaced by `Ref(number)`. In-place ops return the number of the tensor that they wrote to, so aliasing survives.

The decision that is not obvious: a second mode, at the level of Python functions, numbers the *contractions*
(``conv2d``, ``linear``, ``matmul`` …). ATen ops are below autograd and cannot be gated; calls of Python functions can,
so a contraction's number says later, in an ordinary run on real tensors, which input a gate multiplies.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from archscan.errors import BadInput
from archscan.graph import Graph, Kind, Node, Ref, Value, leaves_of, replace_tensors
from archscan.meta_shapes import bare
from archscan.meta_shapes import run as run_op

_CONVOLUTIONS = frozenset(f"conv{kind}{dims}d" for kind in ("", "_transpose") for dims in (1, 2, 3))
_PRODUCTS = frozenset({"linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "addmm"})
_OTHERS = frozenset({"baddbmm", "einsum", "tensordot", "convolution", "_convolution"})
_ATTENTION = frozenset({"scaled_dot_product_attention", "multi_head_attention_forward"})

CONTRACTIONS = _CONVOLUTIONS | _PRODUCTS | _OTHERS | _ATTENTION
"""Names of the Python-level functions that sum products over channels, in the order of whose calls gates are placed."""


FORWARD_ERRORS = (RuntimeError, NotImplementedError, AssertionError, ValueError, TypeError, IndexError)
"""What the forward of a model that cannot take an input may raise; `capture` turns it into a refusal."""


class ContractionMode(TorchFunctionMode):
    """Number the contractions of one forward pass, in the order of their calls.

    `on_contraction` may replace the call: it receives the number, the function and its arguments, and returns the
    result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.function = ""
        self.contraction: int | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "").partition(".")[0]  # torch.ops.aten.conv2d.default is a conv2d
        if name == "__get__":  # an attribute read such as `.requires_grad`
            return func(*args, **(kwargs or {}))
        outer, self.function = (self.function, self.contraction), name
        try:
            if name in CONTRACTIONS:
                self.contraction = self.count
                self.count += 1
                return self.on_contraction(self.contraction, func, args, kwargs or {})
            return func(*args, **(kwargs or {}))
        finally:
            self.function, self.contraction = outer

    def on_contraction(
        self, number: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run contraction `number`; subclasses put gates here."""
        return func(*args, **kwargs)


class _Recorder(TorchDispatchMode):
    """Append a `Node` for every ATen op; tensors are numbered by identity, and kept alive so that it stays unique."""

    def __init__(self, contractions: ContractionMode, named: Mapping[int, tuple[Kind, str]], paths: list[str]) -> None:
        super().__init__()
        self.contractions = contractions
        self.named = named
        self.paths = paths
        self.numbers: dict[int, int] = {}
        self.alive: list[Tensor] = []
        self.values: list[Value] = []
        self.nodes: list[Node] = []

    def number(self, tensor: Tensor, kind: Kind, per_sample: bool) -> int:
        key = id(tensor)
        if key not in self.numbers:
            kind, name = self.named.get(key, (kind, ""))
            self.numbers[key] = len(self.values)
            self.alive.append(tensor)
            self.values.append(Value(tuple(tensor.shape), kind, name, per_sample or kind == "input"))
        return self.numbers[key]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":  # a label for who reads a profile
            return func(*args, **kwargs)
        refs: list[int] = []

        def refer(leaf: Tensor) -> Ref:
            refs.append(self.number(leaf, "constant", per_sample=False))
            return Ref(refs[-1])

        recorded_args = tuple(replace_tensors(arg, refer) for arg in args)
        recorded_kwargs = {key: replace_tensors(value, refer) for key, value in kwargs.items()}
        result = run_op(func, args, kwargs)
        per_sample = any(self.values[ref].per_sample for ref in refs)
        outputs = tuple(
            self.number(leaf, "activation", per_sample) if isinstance(leaf, Tensor) else None
            for leaf in leaves_of(result)
        )
        if per_sample and func._schema.is_mutable:
            self._mark_per_sample(outputs)
        self.nodes.append(
            Node(
                func,
                recorded_args,
                recorded_kwargs,
                outputs,
                self.paths[-1],
                self.contractions.function,
                self.contractions.contraction,
            )
        )
        return result

    def _mark_per_sample(self, outputs: Sequence[int | None]) -> None:
        """A buffer that a sample was written into depends on the sample from then on."""
        for number in outputs:
            if number is not None and not self.values[number].per_sample:
                old = self.values[number]
                self.values[number] = Value(old.shape, old.kind, old.name, True)


@contextmanager
def module_paths(model: nn.Module, left: Callable[[str], None] = lambda _path: None) -> Iterator[list[str]]:
    """Yield a stack whose top is the path of the module that runs; `left` is told each as it stops being the top."""
    names = {id(module): name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    stack = [""]

    def enter(module: nn.Module, _args: Any) -> None:
        left(stack[-1])
        stack.append(names.get(id(module), stack[-1]))

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        left(stack.pop())

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def train_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put every module of `model` into train or eval mode, and put each back as it was."""
    before = {module: module.training for module in model.modules()}
    try:
        model.train(training)  # in the same mode too: some modules drop what they cached
        yield
    finally:
        for module, mode in before.items():
            if module.training is not mode:
                module.training = mode


def split_input(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Read an example input as positional and keyword arguments: a tensor, a tuple of them, or a dict of keywords."""
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    if isinstance(example_input, tuple):
        return example_input, {}
    return (example_input,), {}


def _record(
    model: nn.Module,
    run: Callable[[], Any],
    named: Mapping[int, tuple[Kind, str]],
    batch_size: int,
    training: bool,
    alive: Sequence[Tensor],
) -> Graph:
    contractions = ContractionMode()
    with train_mode(model, training), module_paths(model) as paths, torch.no_grad(), contractions:
        recorder = _Recorder(contractions, named, paths)
        recorder.alive.extend(alive)
        with recorder:
            output = run()
    returned = _tensors(output)
    if not returned:
        raise BadInput(
            f"the model returns no tensor but a {type(output).__name__}, so that nothing can be proven of it; return "
            "tensors, in a tuple or dict where there are several"
        )
    numbers = tuple(recorder.number(leaf, "constant", per_sample=False) for leaf in returned)
    types = {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}
    return Graph(tuple(recorder.values), tuple(recorder.nodes), numbers, batch_size, training, types)


def _tensors(tree: Any) -> list[Tensor]:
    """All tensors in a model's output, which may be a dataclass such as a Hugging Face `ModelOutput`."""
    leaves = tree_flatten(tree)[0]
    found: list[Tensor] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)):
            found.extend(value for value in vars(leaf).values() if isinstance(value, Tensor))
    return found


def with_batch(example_input: Any, batch_size: int, device: str) -> Any:
    """Make inputs like the example's with another batch size; on ``meta`` they have no content."""

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.ndim == 0:
            return leaf.to(device)
        shape = (batch_size, *leaf.shape[1:])
        if device == "meta":
            return torch.empty(shape, dtype=leaf.dtype, device="meta")
        repeats = -(-batch_size // leaf.shape[0])
        return torch.cat([leaf.detach().to(device)] * repeats)[:batch_size]

    return tree_map(resize, example_input)


def _named_tensors(model: nn.Module) -> tuple[tuple[Kind, Iterator[tuple[str, Tensor]]], ...]:
    return ("parameter", iter(model.named_parameters())), ("buffer", iter(model.named_buffers()))


def _record_on_meta(model: nn.Module, example_input: Any, batch_size: int, training: bool) -> Graph:
    named: dict[int, tuple[Kind, str]] = {}
    tensors: dict[str, Tensor] = {}
    for kind, items in _named_tensors(model):
        for name, tensor in items:
            tensors[name] = bare(tensor)
            named[id(tensors[name])] = (kind, name)
    args, kwargs = split_input(with_batch(example_input, batch_size, "meta"))
    for leaf in _tensors((args, kwargs)):
        named[id(leaf)] = ("input", "")

    def run() -> Any:
        with torch.device("meta"):
            return torch.func.functional_call(model, tensors, args, kwargs)

    return _record(model, run, named, batch_size, training, [*tensors.values(), *_tensors((args, kwargs))])


_READS_WEIGHTS = frozenset({"convolution", "mm", "addmm", "bmm", "baddbmm", "mv", "addmv"})


def _with_constants_per_sample(graph: Graph, larger: Callable[[], Graph]) -> Graph:
    """Mark constants that are made anew for every sample, such as a position code of the batch's size.

    They do not depend on the input's content, so that only a run on a larger batch tells them from computed weights; it
    is made where a contraction reads no sample at all.
    """
    suspects = (node for node in graph.nodes if str(node.op).split(".")[1] in _READS_WEIGHTS)
    if all(any(graph.values[number].per_sample for number in node.tensors) for node in suspects):
        return graph
    other = larger()
    if [node.op for node in other.nodes] != [node.op for node in graph.nodes]:
        return graph
    values = tuple(
        replace(
            mine, per_sample=mine.per_sample or (mine.kind in ("activation", "constant") and mine.shape != theirs.shape)
        )
        for mine, theirs in zip(graph.values, other.values, strict=True)
    )
    return replace(graph, values=values)


def _record_on_cpu(model: nn.Module, example_input: Any, batch_size: int, training: bool) -> Graph:
    model = copy.deepcopy(model).cpu()
    named: dict[int, tuple[Kind, str]] = {}
    for kind, items in _named_tensors(model):
        named |= {id(tensor): (kind, name) for name, tensor in items}
    args, kwargs = split_input(with_batch(example_input, batch_size, "cpu"))
    inputs = _tensors((args, kwargs))
    for leaf in inputs:
        named[id(leaf)] = ("input", "")
    return _record(model, lambda: model(*args, **kwargs), named, batch_size, training, inputs)


_PARALLEL = frozenset({"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"})


def require_plain(model: nn.Module) -> None:
    """See that a network consists of ordinary modules with weights that can be cut.

    Raises:
        BadInput: It is compiled, scripted, quantized, wrapped for several devices, or not initialised.
    """
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise BadInput(f"the model is compiled ({type(model).__name__}); pass the module that it was made from")
    for path, module in model.named_modules():
        kind, where = type(module).__name__, path or "the model"
        if kind in _PARALLEL:
            raise BadInput(f"{where} is wrapped in {kind}, which spreads it over devices; pass the module inside it")
        if isinstance(module, torch.jit.ScriptModule):
            raise BadInput(f"{where} is TorchScript ({kind}), whose weights cannot be cut; use the module it came from")
        if isinstance(module, torch.fx.GraphModule) and any(
            isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes
        ):
            raise BadInput(
                f"{where} is a graph of ATen ops, as torch.export gives; pass the module it was exported from"
            )
        if ".quantized" in type(module).__module__ and type(module).__module__.startswith("torch."):
            raise BadInput(f"{where} is quantized ({kind}), and integers cannot be cut; slim the model before that")
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if is_lazy(tensor):
                raise BadInput(
                    f"{where} ({kind}) is not initialised; run the model once on an input before slimming it"
                )
            if tensor.is_inference():
                raise BadInput(
                    f"{name} of {where} was made under torch.inference_mode and can never be trained; build the model "
                    "outside of it"
                )


def capture(model: nn.Module, example_input: Any, *, training: bool = False, batch_size: int = 2) -> Graph:
    """Record one forward pass of `model`, which is left unchanged.

    Args:
        model: The network, on any device.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments; only sizes and types
            are read, unless the forward looks at values.
        training: Record train mode, in which auxiliary heads run.
        batch_size: Leading size of the recorded input. 2 by default: an axis of 1 would broadcast.

    Raises:
        BadInput: The model cannot take the input, returns no tensor, or is not plain (see `require_plain`).
    """
    require_plain(model)
    graph = record_once(model, example_input, training=training, batch_size=batch_size)
    return _with_constants_per_sample(
        graph, lambda: record_once(model, example_input, training=training, batch_size=batch_size + 1)
    )


def record_once(model: nn.Module, example_input: Any, *, training: bool, batch_size: int) -> Graph:
    """Record exactly one forward pass; see `capture`, which may need a second one."""
    inputs = _tensors(split_input(example_input))
    if not inputs:
        raise BadInput(
            "the example input holds no tensor; pass a tensor, a tuple of tensors or a dict of keyword arguments"
        )
    if any(leaf.layout != torch.strided for leaf in inputs):
        raise BadInput("the example input holds a sparse tensor; pass dense ones, as .to_dense() makes them")
    try:
        return _record_on_meta(model, example_input, batch_size, training)
    except FORWARD_ERRORS as on_meta:
        try:
            return _record_on_cpu(model, example_input, batch_size, training)
        except FORWARD_ERRORS as error:
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in inputs)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            mode = "train" if training else "eval"
            raise BadInput(
                f"the model cannot take an input of shape {shapes} in {mode} mode: {reason}; choose another input size"
            ) from on_meta
