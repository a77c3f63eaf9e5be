"""The numbers of one run: `Report`, and its JSON form, which is ``summary.json``.

Numbers only: no model, no tensor, no formatted string but the sentences that explain. Every field of the dataclasses is
the key of the same name in the JSON, so the dataclasses are the schema. Reading is strict (a missing, unknown or
ill-typed field is refused with its path) because ``archscan show`` opens folders that other people made.
"""

import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from archscan.bottlenecks import Bottleneck
from archscan.errors import BadInput
from archscan.report.training import TrainingRun

LARGEST_COUNT = 2**63
SUMMARY_FILE = "summary.json"

RANDOM_WEIGHTS = "The weights are random"
NOISE = "The calibration images are synthetic noise"
"""How the warnings begin that reports show as banners."""


@dataclass(frozen=True)
class Weights:
    """Where the weights come from.

    Attributes:
        kind: ``pretrained``, ``file``, ``random`` or ``given``.
        source: File or weights name; empty where there is none.
        reason: Why these and not the pretrained ones; empty where there is nothing to explain.
    """

    kind: str
    source: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Data:
    """What the calibration ran on.

    Attributes:
        kind: ``folder``, ``zip``, ``digits``, ``synthetic`` or ``given``.
        images: Images used.
        classes: Classes among them.
        labels: ``dataset``, or ``model`` where drawn from the model's own predictions (the true Fisher).
        skipped: Files that could not be read, by name.
    """

    kind: str
    images: int
    classes: int
    labels: str
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """What was asked for: the kept fraction of the dense MACs or parameters."""

    kind: Literal["macs", "params"]
    ratio: float


@dataclass(frozen=True)
class CostTotals:
    """Costs of a whole network for one input, counted.

    Attributes:
        macs: Multiply-accumulates; one MAC is one FLOP.
        params: Parameters.
        activations: Output elements of convolutions and linear layers.
    """

    macs: int
    params: int
    activations: int


@dataclass(frozen=True)
class KeepRatio:
    """Kept fractions of the dense costs."""

    macs: float
    params: float


@dataclass(frozen=True)
class Verification:
    """The comparison of the rebuilt network with the masked original.

    Attributes:
        applicable: Whether equality can be asked for at all.
        reason: Why not, where not; empty otherwise.
        max_abs_error: Largest absolute difference between their outputs; None where not compared.
        tolerance: The largest that passes.
        passed: Whether all checks that apply passed.
    """

    applicable: bool
    reason: str
    max_abs_error: float | None
    tolerance: float | None
    passed: bool


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracies in [0, 1], measured on the same samples; None where a network was not at hand."""

    before: float | None
    after: float | None
    samples: int


@dataclass(frozen=True)
class GroupRow:
    """One channel group.

    Attributes:
        name: Path of the first layer that produces the channels.
        units: Full width in channels.
        kept: Width after planning; the full width in a scan.
        frozen: Whether nothing may be removed.
        reason: Why, where frozen; empty otherwise.
        members: Paths of the layers that are cut together.
        macs_share: Fraction of the dense MACs in layers that read or write its channels. A layer belongs to the group
            that it reads and to the group that it writes, so shares add up to more than 1.
        params_share: The same for parameters.
        depth: Place in the order of execution, from 0.
    """

    name: str
    units: int
    kept: int
    frozen: bool
    reason: str
    members: tuple[str, ...]
    macs_share: float
    params_share: float
    depth: int


@dataclass(frozen=True)
class ModuleRow:
    """Cost of one module, its children not included.

    Attributes:
        path: Module path; empty for the network itself.
        macs: Dense, for one input.
        params: Dense.
        macs_after: In the slim network; None in a scan.
    """

    path: str
    macs: int
    params: int
    macs_after: int | None = None


@dataclass(frozen=True)
class SaliencyLost:
    """Summed saliency of the removed units, of this plan and of a uniform one at the same budget."""

    plan: float
    uniform: float


@dataclass(frozen=True)
class Exported:
    """One file of the slim network in a format that runs without archscan, run and compared before it was kept.

    Attributes:
        format: ``onnx``, ``pt2`` or ``script``.
        file: Its name.
        file_bytes: Its size, with that of its external data.
        parameters: The network's parameters in it, counted in what was exported; an ONNX file's before constant
            folding, which merges BatchNorms into convolutions.
        batch_size: The only one that it takes; None for any.
        max_abs_error: Largest absolute difference of an output from PyTorch's, over all batches that were run.
        max_relative_error: Largest of these differences over the largest magnitude in the same output.
        opset: ONNX opset; None for the other formats.
        checked_by: What ran it, with versions and batch sizes.
    """

    format: Literal["onnx", "pt2", "script"]
    file: str
    file_bytes: int
    parameters: int
    batch_size: int | None
    max_abs_error: float
    max_relative_error: float
    opset: int | None
    checked_by: str


@dataclass(frozen=True)
class Environment:
    """What it ran on."""

    torch: str
    device: str
    threads: int
    python: str


@dataclass(frozen=True)
class Report:
    """All numbers of one run of ``slim`` or ``scan``; what a scan does not have is None."""

    archscan: str
    command: Literal["slim", "scan"]
    model: str
    input_shape: tuple[int, ...]
    weights: Weights | None
    data: Data | None
    criterion: str | None
    seed: int
    target: Target | None
    before: CostTotals
    after: CostTotals | None
    keep_ratio: KeepRatio | None
    verification: Verification | None
    accuracy: Accuracy | None
    recovery: str | None
    groups: tuple[GroupRow, ...]
    bottlenecks: tuple[Bottleneck, ...]
    modules: tuple[ModuleRow, ...]
    saliency_lost: SaliencyLost | None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    environment: Environment | None = None
    command_line: str = ""
    exports: tuple[Exported, ...] = ()
    history: tuple[TrainingRun, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and strings, in the order of the fields."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Check and read what `to_json` returned.

        Raises:
            BadInput: Where a field is missing, unknown or not of its type.
        """
        report: Self = _read(cls, data, SUMMARY_FILE)
        return report


@dataclass(frozen=True)
class Saved:
    """A report and the folder that holds the result it is about."""

    report: Report
    folder: Path


@dataclass(frozen=True)
class Evaluation:
    """Top-1 accuracies of a saved result and of the dense original on one set of images.

    Attributes:
        model: Name of the network.
        folder: Of the saved result.
        accuracy: ``before`` is the dense original's, None where its weights are not at hand.
        skipped: Files that could not be read, by name.
        notes: What else has to be known, a sentence each.
    """

    model: str
    folder: str
    accuracy: Accuracy
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and strings."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def installed_version() -> str:
    """Return the installed package's version, or ``0+source`` where archscan runs from a checkout."""
    try:
        return version("archscan")
    except PackageNotFoundError:
        return "0+source"


def json_text(result: Report | Evaluation) -> str:
    """Return the text of ``summary.json``, newline at the end."""
    return json.dumps(result.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_report(file: Path) -> Report:
    """Read a ``summary.json``.

    Raises:
        BadInput: Where the file cannot be read or is not a summary.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise BadInput(f"{file} cannot be read ({reason}); name a folder that archscan saved.") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file} is not valid JSON ({error}); the file was damaged or edited.") from error
    return Report.from_json(data)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _read(kind: Any, value: Any, path: str) -> Any:
    """Return the value as the type says, or refuse; one branch for each form of type that the dataclasses use."""
    if is_dataclass(kind):
        return _read_dataclass(kind, value, path)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _read(inner, value, path)
    if origin is tuple and isinstance(value, list):
        return tuple(_read(arguments[0], item, f"{path}[{place}]") for place, item in enumerate(value))
    if origin is Mapping and isinstance(value, Mapping):
        return {str(key): _read(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    if origin is Literal and isinstance(value, str) and value in arguments:
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number and math.isfinite(value) and abs(value) < LARGEST_COUNT:
        return float(value)
    if kind is int and number and isinstance(value, int) and 0 <= value < LARGEST_COUNT:
        return value
    if kind in (str, bool) and isinstance(value, kind):
        return value
    raise BadInput(f"{path} holds {_short(value)}, which is not {_described(kind)}; the file was damaged or edited.")


def _read_dataclass(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise BadInput(f"{path} holds {_short(value)} where an object belongs; the file was damaged or edited.")
    names = [item.name for item in fields(kind)]
    # a field with a default came later than folders that people still have
    needed = [item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING]
    wrong = [f"lacks {name!r}" for name in needed if name not in value]
    wrong += [f"has the unknown field {_short(name)}" for name in value if name not in names]
    if wrong:
        raise BadInput(f"{path} {wrong[0]}; it was edited, or written by another version of archscan.")
    hints = get_type_hints(kind)
    return kind(**{name: _read(hints[name], value[name], f"{path}: {name}") for name in names if name in value})


def _described(kind: Any) -> str:
    names = {int: "a count", float: "a finite number", str: "a text", bool: "true or false"}
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    return names.get(kind, "a list" if get_origin(kind) is tuple else "an object")


def _short(value: Any) -> str:
    if isinstance(value, int) and not -LARGEST_COUNT < value < LARGEST_COUNT:
        return "a huge number"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "…"
