"""Make the slim or widened network: model, coupling, kept steps → a new model of the same classes, and its `Surgery`.

`apply` cuts a copy by a surgery and lets the modules' attributes follow; `rebuild` also finds the sizes that a forward
hard-codes (see `follow`), and writes them into the surgery.

Two decisions are not obvious. Attributes follow from the shape of a weight that has been cut, by the two tables
`_FOLLOWERS` and `_WEIGHTS`, so a surgery lists indices only and subclasses of torch's layers need no entry. And where a
unit is repeated, every single weight that reads it is split in unequal shares: the copies add up to what the one was
(Chen et al. 2016, Net2WiderNet, which splits evenly and adds noise), and yet no two of them get the same gradients, so
that they part in training under any optimiser. Shares are whole multiples of the weight's last binary digit, which add
up without rounding, and they follow from the tensor's name, so that a surgery always gives the same network.
"""

import copy
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from archscan.capture import FORWARD_ERRORS, record_once
from archscan.divergence import Hints, Predicted, divergence, reads_values, run_under
from archscan.errors import RebuildMismatch
from archscan.follow import CannotFollow, Clue, attributes_of, follow
from archscan.graph import Graph
from archscan.groups import Coupling
from archscan.meta_shapes import Running, bare
from archscan.surgery import Cut, Kept, Surgery, named_tensors, set_sizes, surgery_for, times_kept

__all__ = [
    "CannotFollow",
    "Cut",
    "Hints",
    "Kept",
    "Predicted",
    "Rebuilt",
    "Surgery",
    "apply",
    "predict",
    "rebuild",
    "sliced",
    "surgery_for",
]


@dataclass(frozen=True, eq=False)
class Rebuilt:
    """A slim or widened network and how it came about.

    Attributes:
        model: The new network.
        surgery: What was done to the original; `apply(original, surgery)` gives the model again.
    """

    model: nn.Module
    surgery: Surgery


def sliced(tensor: Tensor, cuts: Sequence[Cut], name: str) -> Tensor:
    """Take the kept indices of a tensor, in its own memory format."""
    result = tensor.detach()
    for cut in cuts:
        index = torch.tensor(cut.kept, device=tensor.device)
        if cut.by_row:
            index = index.view(len(index), *(1,) * (cut.axis - 1), -1, *(1,) * (tensor.ndim - cut.axis - 1))
            result = torch.take_along_dim(result, index, dim=cut.axis)
        else:
            result = result.index_select(cut.axis, index)
        if cut.repeats == "split" and not result.is_meta:
            result = _split(result, cut, zlib.crc32(f"{name} {cut.axis}".encode()))
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.ndim == dims and tensor.is_contiguous(memory_format=layout) and not tensor.is_contiguous():
            return result.contiguous(memory_format=layout)
    return result.contiguous()


def _split(copies: Tensor, cut: Cut, seed: int) -> Tensor:
    """Give every copy of a weight an unequal share of it; the shares of one source add up to it exactly.

    Args:
        copies: The weight, repeated along the axis of the cut.
        cut: Which of them have one source.
        seed: Of the shares: between the copies of one source, proportional to draws from [0.5, 1.5].
    """
    whole, shape, axis = copies.cpu().double(), copies.shape, cut.axis
    source = torch.tensor(cut.kept)
    lead = (len(source), *(1,) * (axis - 1)) if cut.by_row else (1,) * axis
    source = source.view(*lead, -1, *(1,) * (len(shape) - axis - 1)).expand(shape)

    def over_copies(values: Tensor, how: str) -> Tensor:
        found = torch.zeros([*shape[:axis], int(source.max()) + 1, *shape[axis + 1 :]], dtype=torch.float64)
        return found.scatter_reduce_(axis, source, values, how).gather(axis, source)

    draws = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    kind = torch.finfo(copies.dtype)
    scale = torch.exp2(torch.frexp(whole).exponent.double() - 1)
    digit = kind.eps * scale.clamp(min=kind.smallest_normal)
    shares = (whole * draws / over_copies(draws, "sum") / digit).round() * digit
    missing = whole - over_copies(shares, "sum")  # some last digits, which go to the largest share
    return (shares + torch.where(draws == over_copies(draws, "amax"), missing, 0.0)).to(copies)


def _whole_groups_left(count: int, size: int, rows: Cut | None, where: str) -> int:
    """Count the groups of a grouped axis after a cut; all that keep any row must keep equally many."""
    if rows is None:
        return count
    if rows.repeats == "whole" or count == size:
        return count * len(rows.kept) // size
    left = np.bincount(np.asarray(rows.kept) // (size // count), minlength=count)
    left = left[left > 0]
    if (left != left[0]).any():
        raise RebuildMismatch(
            f"the groups of {where} would keep between {left.min()} and {left.max()} channels; they must be equal"
        )
    return len(left)


def _follow_conv(module: Any, weight: Tensor, rows: Cut | None, where: str) -> None:
    old_rows = module.in_channels if module.transposed else module.out_channels
    module.groups = _whole_groups_left(module.groups, old_rows, rows, where)
    first, second = weight.shape[0], weight.shape[1] * module.groups
    module.in_channels, module.out_channels = (first, second) if module.transposed else (second, first)


def _follow_linear(module: Any, weight: Tensor, _rows: Cut | None, _where: str) -> None:
    module.out_features, module.in_features = weight.shape


def _follow_norm(module: Any, weight: Tensor, _rows: Cut | None, _where: str) -> None:
    module.num_features = weight.shape[0]


def _follow_shape(module: Any, weight: Tensor, _rows: Cut | None, _where: str) -> None:
    module.normalized_shape = tuple(weight.shape)


def _follow_group_norm(module: Any, weight: Tensor, rows: Cut | None, where: str) -> None:
    module.num_groups = _whole_groups_left(module.num_groups, module.num_channels, rows, where)
    module.num_channels = weight.shape[0]


def _follow_prelu(module: Any, weight: Tensor, _rows: Cut | None, _where: str) -> None:
    module.num_parameters = weight.numel()


_Follower = Callable[[Any, Tensor, Cut | None, str], None]
_FOLLOWERS: tuple[tuple[tuple[type[nn.Module], ...], _Follower], ...] = (
    ((nn.modules.conv._ConvNd,), _follow_conv),
    ((nn.Linear,), _follow_linear),
    ((nn.modules.batchnorm._NormBase,), _follow_norm),  # every BatchNorm and InstanceNorm
    ((nn.LayerNorm, nn.RMSNorm), _follow_shape),
    ((nn.GroupNorm,), _follow_group_norm),
    ((nn.PReLU,), _follow_prelu),
)
"""Module classes (with their subclasses) → what the shape of their weight says about their attributes."""

_WEIGHTS = (
    "weight",
    "weight_orig",  # nn.utils.spectral_norm
    "parametrizations.weight.original",
    "parametrizations.weight.original1",  # nn.utils.parametrizations.weight_norm
    "weight_v",  # nn.utils.weight_norm
    "running_mean",  # BatchNorm without affine parameters
)
"""Where a module keeps the tensor that has its weight's shape, most certain first."""


def _copied(model: nn.Module, tensors: Mapping[str, Tensor], cuts: Mapping[int, Sequence[Cut]]) -> nn.Module:
    """Copy a model with cut tensors in the places of the old ones, which are not copied first.

    A tensor that is registered twice stays one tensor.
    """
    new: dict[int, Any] = {}
    for name, tensor in tensors.items():
        if id(tensor) in cuts and id(tensor) not in new:
            cut = sliced(tensor, cuts[id(tensor)], name)
            new[id(tensor)] = nn.Parameter(cut, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut
    return copy.deepcopy(model, new)


def apply(model: nn.Module, surgery: Surgery) -> nn.Module:
    """Cut a copy of a model; the original is left unchanged.

    Args:
        model: The network that the surgery was made for, or one of the same architecture.
        surgery: Source of every index, and new attribute values.

    Returns:
        A new model of the same module classes, on the same device, trainable, without gradients.

    Raises:
        RebuildMismatch: The surgery does not fit the model.
    """
    tensors = dict(named_tensors(model))
    cuts: dict[int, tuple[Cut, ...]] = {}
    for name, listed in surgery.cuts.items():
        if name not in tensors:
            raise RebuildMismatch(f"the model has no tensor {name!r} to cut; the plan was made for another model")
        if cuts.setdefault(id(tensors[name]), listed) != listed:
            raise RebuildMismatch(f"{name!r} is shared with another path that is cut differently")
    rows = {name: cuts[id(tensor)][0] for name, tensor in tensors.items() if id(tensor) in cuts}
    result = _copied(model, tensors, cuts)
    after = dict(named_tensors(result))
    for path, module in result.named_modules():
        follow = next((row[1] for row in _FOLLOWERS if isinstance(module, row[0])), None)
        names = [f"{path}.{name}" if path else name for name in _WEIGHTS]
        weight = next((name for name in names if name in after), None)
        if follow is not None and weight in rows:
            first = rows[weight]
            follow(module, after[weight], first if first.axis == 0 else None, path)
    for path, values in surgery.attributes.items():
        for name, value in values.items():
            set_sizes(result.get_submodule(path), name, value)
    return result


def _check_training(original: nn.Module, model: nn.Module, example_input: Any, recorded: Graph) -> None:
    """See that the slim network runs in train mode too, in which auxiliary heads run."""
    on_meta, batch_size = not reads_values(recorded), recorded.batch_size
    try:
        run_under(Running(), model, example_input, on_meta=on_meta, training=True, batch_size=batch_size)
    except FORWARD_ERRORS as error:
        graph = record_once(original, example_input, training=True, batch_size=batch_size)
        stuck = divergence(model, example_input, graph, None, {})
        module = graph.nodes[stuck.index].module if stuck else ""
        raise CannotFollow(module, stuck.detail if stuck else str(error), len(recorded.nodes)) from error


def predict(coupling: Coupling, kept: Kept) -> tuple[Predicted | None, Hints]:
    """Foretell the run of the slim network.

    Args:
        coupling: What coupling said about the original.
        kept: Kept steps of every channel group, per fibre.

    Returns:
        The shape of every value of ``coupling.graph`` (None where the coupling holds no graph), and the
        integer arguments that count channels.
    """
    if coupling.graph is None or coupling.sizes is None:
        return None, {}
    widths_G = [len(kept[group.name][0]) for group in coupling.groups]
    shapes = [
        tuple(size.at(widths_G) for size in coupling.sizes(number)) for number in range(len(coupling.graph.values))
    ]
    times = times_kept(coupling, kept)
    hints: dict[int, list[tuple[int, int]]] = {}
    for count in coupling.counts:
        new = count.value if count.units is None else int(times[count.units].sum()) * (-1 if count.value < 0 else 1)
        hints.setdefault(count.node, []).append((count.value, new))
    return shapes, hints


def rebuild(model: nn.Module, example_input: Any, coupling: Coupling, kept: Kept) -> Rebuilt:
    """Make the slim or widened network as a new model; the original is left unchanged.

    Args:
        model: The original.
        example_input: What it was captured with.
        coupling: What coupling said about it. Where it holds no graph, hard-coded sizes are not looked for.
        kept: Kept steps of every channel group, per fibre.

    Raises:
        BadInput: `kept` does not fit the channel groups.
        CannotFollow: A forward hard-codes a size out of reach.
        RebuildMismatch: A tensor would lose everything, or would become ragged.
    """
    surgery, _ = rehearsed(hollow(model, coupling.graph), example_input, coupling, kept)
    return Rebuilt(apply(model, surgery), surgery)


def hollow(model: nn.Module, graph: Graph | None) -> nn.Module:
    """Copy a model onto the meta device, where cutting and running it costs nothing; nothing of it can be trained.

    A model whose forward reads values is returned as it is: it cannot run there.
    """
    if graph is None or reads_values(graph):
        return model
    empty: dict[int, Any] = {}
    for _, tensor in named_tensors(model):
        empty[id(tensor)] = bare(tensor)
        if isinstance(tensor, nn.Parameter):
            empty[id(tensor)] = nn.Parameter(empty[id(tensor)], requires_grad=False)
    return copy.deepcopy(model, empty)


def rehearsed(
    model: nn.Module, example_input: Any, coupling: Coupling, kept: Kept, likely: Sequence[Clue] = ()
) -> tuple[Surgery, tuple[Clue, ...]]:
    """Find all that `rebuild` has to do, with attributes, on a model that may be `hollow`; raises what it raises.

    Returns also how the attributes were found, which is `likely` with other widths too.
    """
    surgery = surgery_for(coupling, kept)
    predicted, hints = predict(coupling, kept)
    if coupling.graph is None or predicted is None:
        return surgery, ()
    slim = apply(model, surgery)
    clues = follow(slim, example_input, coupling.graph, predicted, hints, likely)
    _check_training(model, slim, example_input, coupling.graph)
    return replace(surgery, attributes=attributes_of(clues)), clues
