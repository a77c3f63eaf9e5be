"""What a user can ask for: the frozen dataclasses between the command line and the pipeline.

The defaults here are the only ones; the help texts print them. Values arrive checked for range (a ratio is in (0, 1], a
count is positive); whether a name exists or an option has an effect is for the stage that knows.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

DEFAULT_CRITERION = "obd"
"""What scores channels where nothing else is asked for, from the command line and from Python."""

LEAST_SQUARES_CRITERION = "obd-obc"
"""The same where the repair by least squares follows, as long as the network has layers of kinds that it knows."""


def default_criterion(recover: str | None) -> str:
    """Choose the criterion for a repair, where none is asked for."""
    return LEAST_SQUARES_CRITERION if recover in ("ls", "blocks") else DEFAULT_CRITERION


Recovery = Literal["none", "bn", "bias", "ls", "blocks"]
"""How a slim network may be repaired."""

DEFAULT_ROUNDS = 1
"""In how many rounds a network is slimmed, scored anew before each."""

SYNTHETIC = "synthetic"
"""What stands for noise where a source of images is named."""

REAL_SAMPLES, SYNTHETIC_SAMPLES = 512, 32
"""Calibration images where no number is asked for; more noise says no more.

The repair is worth that many: the CIFAR-10 ResNet-20 (88.0 %) keeps 83.1 % at half its MACs with 256 images, 84.3 %
with 512, and 84.1 % with 1,024.
"""

AUDIT_SAMPLES = 256
"""The same for an audit, which repairs nothing."""

DEFAULT_FIND_AT = 0.5
"""Kept fraction of the MACs at which capacity bottlenecks are looked for, to widen them."""

ProgressCallback = Callable[[int, int], None]
"""Called with the number of steps done and the number of all steps."""

ProgressFactory = Callable[[str], AbstractContextManager[ProgressCallback]]
"""Opens one progress bar under a description, for the duration of a ``with`` block."""


def silent(_description: str) -> AbstractContextManager[ProgressCallback]:
    """Show no progress; the `ProgressFactory` of those who want none."""
    return nullcontext(lambda _done, _total: None)


@dataclass(frozen=True)
class ModelOptions:
    """Which network, with which weights.

    Attributes:
        name: A timm, torchvision or reference name, ``file.py:factory``, or a saved folder.
        weights: ``auto``, ``pretrained``, ``random``, or a file.
        input_size: Height and width in pixels; None for the network's own.
        num_classes: Width of the classifier; None for the network's own.
    """

    name: str
    weights: str = "auto"
    input_size: tuple[int, int] | None = None
    num_classes: int | None = None


@dataclass(frozen=True)
class DataOptions:
    """Which images, and how they are fed.

    Attributes:
        source: Calibration images: a folder, a zip, ``digits`` or ``synthetic``.
        samples: How many of them to use; None for `REAL_SAMPLES`, or `SYNTHETIC_SAMPLES` of noise.
        eval_source: Images for the accuracy before and after; None for no accuracy.
        batch_size: Images per forward pass.
        mean: Per channel, on the scale [0, 1]; None for the network's own.
        std: Per channel, on the scale [0, 1]; None for the network's own.
    """

    source: str = SYNTHETIC
    samples: int | None = None
    eval_source: str | None = None
    batch_size: int = 32
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


TargetKind = Literal["macs", "params", "latency", "memory"]


@dataclass(frozen=True)
class BudgetOptions:
    """How small, and within which rules.

    Attributes:
        kind: What the ratio is of; one MAC is one FLOP.
        ratio: Kept fraction of the dense cost, 0 < ratio <= 1.
        round_to: Widths are multiples of this; None chooses by the width of each group.
        min_width: No group gets narrower than this many channels; None chooses by the width of each group.
        protect: Shell patterns of layers that keep their width.
        also: Further targets, all of which are to be met: what each is of, and its ratio.
    """

    kind: TargetKind
    ratio: float
    round_to: int | None = None
    min_width: int | None = None
    protect: tuple[str, ...] = ()
    also: tuple[tuple[TargetKind, float], ...] = ()


@dataclass(frozen=True)
class RunOptions:
    """Where and how to compute.

    Attributes:
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: CPU threads; None leaves torch's own number.
        seed: Of everything random.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class OutputOptions:
    """Where the result goes and what is printed.

    Attributes:
        folder: Of the result; None for the default name below ``reports/``.
        overwrite: Whether an existing folder may be replaced.
        json: Print the summary as JSON on standard output, and nothing else there.
        quiet: Print the verdict only.
    """

    folder: Path | None = None
    overwrite: bool = False
    json: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class SlimOptions:
    """Everything that ``archscan MODEL`` asks for.

    Attributes:
        criterion: A name from the criteria table; None for `default_criterion`.
        recover: Repair after slimming: ``bn`` recalibrates BatchNorm statistics, ``bias`` corrects mean outputs, ``ls``
            re-solves weights by least squares, ``blocks`` then tunes block by block; None is ``blocks`` where the data
            are real (``bn``, or ``none`` without BatchNorm, where there are too few images).
        rounds: In how many steps to slim, each repaired, and scored anew before the next.
        set_effects: Whether a set of units costs the sum of their saliencies, or what a quadratic form says.
        exports: Formats to write besides: ``onnx``, ``pt2``, ``script``.
        command_line: As typed, for the report.
        latency_batch: Images per forward pass in a measurement of the time before and after; None for no measurement.
        channels_last: Whether weights and images lie in memory with their channels last while time is measured.
        finetune_epochs: Passes over the images of the data's source after every round; None for no training.
        finetune_samples: How many of these images to learn from; None for all.
    """

    model: ModelOptions
    budget: BudgetOptions
    data: DataOptions = field(default_factory=DataOptions)
    run: RunOptions = field(default_factory=RunOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    criterion: str | None = None
    recover: Recovery | None = None
    rounds: int = DEFAULT_ROUNDS
    set_effects: Literal["additive", "quadratic"] = "additive"
    exports: tuple[str, ...] = ()
    command_line: str = ""
    latency_batch: int | None = None
    channels_last: bool = False
    finetune_epochs: int | None = None
    finetune_samples: int | None = None


@dataclass(frozen=True)
class WidenOptions:
    """Everything that ``archscan widen MODEL`` asks for.

    Attributes:
        budget: Where bottlenecks show (``ratio``), and within which rules the other groups may pay.
        criterion: A name from the criteria table; None for the default.
        factor: New width over old.
        keep_flops: Whether the other groups pay, so that the MACs stay as they are.
        only: Shell patterns of names of the groups to widen, in place of the bottlenecks.
        recover: ``bn`` recalibrates BatchNorm where groups paid; None is ``bn`` where the data are real and the network
            has BatchNorm.
        exports: Formats to write besides: ``onnx``, ``pt2``, ``script``.
        command_line: As typed, for the report.
    """

    model: ModelOptions
    budget: BudgetOptions = field(default_factory=lambda: BudgetOptions("macs", DEFAULT_FIND_AT))
    data: DataOptions = field(default_factory=DataOptions)
    run: RunOptions = field(default_factory=RunOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    criterion: str | None = None
    factor: float = 2.0
    keep_flops: bool = False
    only: tuple[str, ...] = ()
    recover: Literal["none", "bn"] | None = None
    exports: tuple[str, ...] = ()
    command_line: str = ""


@dataclass(frozen=True)
class ScanOptions:
    """Everything that ``archscan scan MODEL`` asks for; coupling and costs depend on no weights and no data."""

    model: ModelOptions
    protect: tuple[str, ...] = ()
    output: OutputOptions = field(default_factory=OutputOptions)
    command_line: str = ""


@dataclass(frozen=True)
class AuditOptions:
    """Everything that ``archscan audit MODEL`` asks for.

    Attributes:
        data: Images to score on (``source``, ``samples``), and to measure on (``eval_source``; None for more of
            ``source``, none of which is scored on).
        criteria: Names; None for all of the table.
        units: Single units to remove.
        sets: Sets of units to remove.
        held_out: Images to measure loss changes on.
        command_line: As typed, for the report.
    """

    model: ModelOptions
    data: DataOptions
    run: RunOptions = field(default_factory=RunOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    criteria: tuple[str, ...] | None = None
    units: int = 100
    sets: int = 40
    held_out: int = AUDIT_SAMPLES
    command_line: str = ""


@dataclass(frozen=True)
class EvaluateOptions:
    """Everything that ``archscan evaluate DIR --data …`` asks for.

    Attributes:
        folder: A saved result.
        source: Images with labels: a folder, a zip or ``digits``.
        samples: How many of them to use; None for all.
        batch_size: Images per forward pass.
        command_line: As typed.
    """

    folder: Path
    source: str
    samples: int | None = None
    batch_size: int = 32
    run: RunOptions = field(default_factory=RunOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    command_line: str = ""


@dataclass(frozen=True)
class SweepOptions:
    """Everything that ``archscan sweep MODEL`` asks for.

    Attributes:
        slim: What all slimmings have in common, and the first budget; its output folder holds those of the results.
        ratios: Kept fractions, one for each result.
    """

    slim: SlimOptions
    ratios: tuple[float, ...]


@dataclass(frozen=True)
class CompareOptions:
    """Everything that ``archscan compare DIR DIR …`` asks for.

    Attributes:
        folders: Saved results of one network.
        page: Where to write the page; None for no page.
        overwrite: Whether an existing page may be replaced.
        output: What is printed.
    """

    folders: tuple[Path, ...]
    page: Path | None = None
    overwrite: bool = False
    output: OutputOptions = field(default_factory=OutputOptions)
