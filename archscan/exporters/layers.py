"""``architecture.txt``: a slimming layer by layer, before → after: two networks and their report → rows → text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from archscan.report.model import Report

ARCHITECTURE = "architecture.txt"

_HEADERS = ("layer", "type", "in", "out", "parameters", "MACs")
_WIDTHS_IN = ("in_channels", "in_features")
_WIDTHS_OUT = ("out_channels", "out_features", "num_features", "num_channels", "normalized_shape")


@dataclass(frozen=True)
class Layer:
    """One module, its children not included; each pair is (before, after).

    Attributes:
        path: Module path; empty for the network itself.
        type_name: Class of the module.
        width_in: Channels or features read; None where the module does not say.
        width_out: Channels or features given; None where the module does not say.
        params: Parameters.
        macs: For one input.
    """

    path: str
    type_name: str
    width_in: tuple[int | None, int | None]
    width_out: tuple[int | None, int | None]
    params: tuple[int, int]
    macs: tuple[int, int]


def list_layers(before: nn.Module, after: nn.Module, report: Report) -> tuple[Layer, ...]:
    """List the modules that cost something, in the order of the network's definition.

    Args:
        before: The network that was slimmed.
        after: The slim one.
        report: Of that slimming, for the MACs.
    """
    macs = {row.path: (row.macs, row.macs_after or 0) for row in report.modules}
    old = dict(before.named_modules())
    layers = []
    for path, module in after.named_modules():
        params = tuple(
            sum(parameter.numel() for parameter in one.parameters(recurse=False)) for one in (old[path], module)
        )
        if any(params) or any(macs.get(path, ())):
            layers.append(
                Layer(
                    path=path,
                    type_name=type(module).__name__,
                    width_in=(_width(old[path], _WIDTHS_IN), _width(module, _WIDTHS_IN)),
                    width_out=(_width(old[path], _WIDTHS_OUT), _width(module, _WIDTHS_OUT)),
                    params=(params[0], params[1]),
                    macs=macs.get(path, (0, 0)),
                )
            )
    return tuple(layers)


def _width(module: nn.Module, names: Sequence[str]) -> int | None:
    """Read the first of the attributes that the module has; of a normalised shape, its last size."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, tuple) and value:
            value = value[-1]
        if type(value) is int:
            return value
    return None


def render_layers(layers: Sequence[Layer], report: Report) -> str:
    """Return the text of ``architecture.txt``: a heading and one line per layer, with the report's totals below."""
    after = report.after or report.before
    rows = [
        (
            layer.path or "(network)",
            layer.type_name,
            _change(*layer.width_in),
            _change(*layer.width_out),
            _change(*layer.params),
            _change(*layer.macs),
        )
        for layer in layers
    ]
    params, macs = (report.before.params, after.params), (report.before.macs, after.macs)
    total = ("total", "", "", "", _change(*params), _change(*macs))
    shares = ("kept", "", "", "", f"{params[1] / params[0]:.1%}", f"{macs[1] / max(macs[0], 1):.1%}")
    size = " x ".join(map(str, report.input_shape))
    heading = f"{report.model}, before -> after slimming, for one input of {size}. One MAC is one FLOP."
    return "\n".join([heading, "", *_align([_HEADERS, *rows, total, shares])]) + "\n"


def _change(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return "-"
    return f"{after:,}" if before == after else f"{before:,} -> {after:,}"


def _align(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Pad columns: names to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADERS))]
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
