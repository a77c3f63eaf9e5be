"""The numbers of one run: `Report`, and its JSON form, which is ``summary.json``.

Numbers only: no model, no tensor, no formatted string but the sentences that explain. Every field of the dataclasses is
the key of the same name in the JSON, so the dataclasses are the schema (see `plain`).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self

from archscan.errors import BadInput
from archscan.findings import Bottleneck, Finding
from archscan.report.details import LayerLink, SaliencyDetail
from archscan.report.plain import plain, read
from archscan.report.training import TrainingRun

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
    """What was asked for: the kept fraction of the dense MACs, parameters, measured time or peak activation memory."""

    kind: Literal["macs", "params", "latency", "memory"]
    ratio: float


@dataclass(frozen=True)
class CostTotals:
    """Costs of a whole network for one input, counted.

    Attributes:
        macs: Multiply-accumulates; one MAC is one FLOP.
        params: Parameters.
        activations: Output elements of convolutions and linear layers.
        peak_bytes: Most bytes of activations that are needed at the same time; None where not counted.
    """

    macs: int
    params: int
    activations: int
    peak_bytes: int | None = None


@dataclass(frozen=True)
class KeepRatio:
    """Kept fractions of the dense costs."""

    macs: float
    params: float


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass before and after, measured in turns on the same machine.

    Attributes:
        before_ms: Median of the dense network.
        before_iqr_ms: Its interquartile range.
        after_ms: Median of the slim network; None in a scan.
        after_iqr_ms: Its interquartile range.
        ratio: Kept share of the time, the median over rounds in which both ran; None in a scan.
        ratio_low: Lower end of its 95% bootstrap interval.
        ratio_high: Upper end.
        rounds: How often each network ran.
        batch: Images per forward pass.
        threads: CPU threads.
        format: Memory format of weights and images.
        device: Where it ran, by name.
    """

    before_ms: float
    before_iqr_ms: float
    after_ms: float | None
    after_iqr_ms: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    rounds: int
    batch: int
    threads: int
    format: Literal["contiguous", "channels_last"]
    device: str


@dataclass(frozen=True)
class Verification:
    """The comparison of the rebuilt network with the masked original.

    Attributes:
        applicable: Whether equality can be asked for at all.
        reason: Why not, where not; empty otherwise.
        max_abs_error: Largest absolute difference between their outputs; None where not compared.
        tolerance: The largest that passes.
        passed: Whether all checks that apply passed.
        largest_output: Largest magnitude of the masked original's outputs, weights and statistics being random; None
            where not compared, or not noted.
    """

    applicable: bool
    reason: str
    max_abs_error: float | None
    tolerance: float | None
    passed: bool
    largest_output: float | None = None


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
        activation_bytes: What its ops write for one input, dense; None where not counted.
        activation_bytes_after: In the slim network.
        time_ms: Its own time in a forward pass of the dense network, measured; None where not measured.
        time_ms_after: In the slim network.
        macs_per_byte: Arithmetic intensity, dense: MACs over bytes of inputs, parameters and outputs, counted.
        bound: What the machine's measured roofline says of it at that intensity; None where not measured.
    """

    path: str
    macs: int
    params: int
    macs_after: int | None = None
    activation_bytes: int | None = None
    activation_bytes_after: int | None = None
    time_ms: float | None = None
    time_ms_after: float | None = None
    macs_per_byte: float | None = None
    bound: Literal["memory", "compute"] | None = None


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
class Lossless:
    """What ``--lossless`` removed, and how far the outputs are from those of the original, with nothing masked.

    Attributes:
        channels: Removed channels.
        groups: Groups that lost any.
        error_on_noise: Largest absolute difference of an output.
        error_on_images: The same on the calibration images; None where there were none.
        images: How many they were.
        tolerance: The difference on noise that rounding explains.
    """

    channels: int
    groups: int
    error_on_noise: float
    error_on_images: float | None
    images: int
    tolerance: float


@dataclass(frozen=True)
class Environment:
    """What it ran on."""

    torch: str
    device: str
    threads: int
    python: str


@dataclass(frozen=True)
class Report:
    """All numbers of one run of ``slim``, ``widen`` or ``scan``; what a scan does not have is None."""

    archscan: str
    command: Literal["slim", "scan", "widen"]
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
    findings: tuple[Finding, ...] = ()
    latency: Latency | None = None
    further_targets: tuple[Target, ...] = ()
    links: tuple[LayerLink, ...] = ()
    saliency: SaliencyDetail | None = None
    lossless: Lossless | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and strings, in the order of the fields."""
        values: dict[str, Any] = plain(asdict(self))
        return values

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Check and read what `to_json` returned.

        Raises:
            BadInput: Where a field is missing, unknown or not of its type.
        """
        report: Self = read(cls, data, SUMMARY_FILE)
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
        values: dict[str, Any] = plain(asdict(self))
        return values


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
