"""What the benchmark scripts share: where and with what a number was measured, and how it is written down.

A report is two files of one stem: JSON with every number, and Markdown made from it. The scripts beside this file
import it. What takes long is measured point by point, and each point goes to a cache at once.
"""

import argparse
import ctypes
import json
import os
import platform
import resource
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn

    from archscan.sources import Subject

MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""Keeps glibc from giving memory back between two ops, whose page faults would otherwise be half of what is timed."""

PACKAGES = ("archscan", "torch", "timm", "torchvision", "torch-pruning", "fvcore", "numpy", "scipy")


def names(text: str) -> list[str]:
    """Read names with commas between them."""
    return [name for name in text.split(",") if name]


def numbers(text: str) -> list[float]:
    """Read numbers with commas between them."""
    return [float(part) for part in names(text)]


def parser_on_cifar(description: str | None, output: str) -> argparse.ArgumentParser:
    """Begin the command line of a benchmark on the CIFAR ResNets.

    Args:
        description: Of the script.
        output: Stem of the files that it writes where no other is given.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("ARCHSCAN_DATA", "../shared/data"))
    parser.add_argument("--data", type=Path, default=data, help="folder of weights and images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(output), help="stem of the files")
    return parser


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add where and how networks are trained, and whether to go on."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--resume", action="store_true", help="take what was measured from the cache")


def open_cifar(folder: Path, network: str) -> "Subject":
    """Open a CIFAR ResNet with its trained weights, such as ``resnet20_cifar``."""
    from archscan.sources import open_subject

    weights = folder / f"{network.removesuffix('_cifar')}_cifar10.safetensors"
    return open_subject(f"reference:{network}", weights=str(weights))


class Measured(Protocol):
    """A dataclass of one measured point."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells points apart."""


MeasuredT = TypeVar("MeasuredT", bound=Measured)


class Cache(Generic[MeasuredT]):
    """Points in a file of JSON lines, each written with its setting; those of another setting are not read.

    Args:
        path: The file.
        setting: What all points share, in JSON values.
        read: JSON values of a point → the point.
        resume: Whether to go on with the file that is there, or to begin another.
    """

    def __init__(
        self, path: Path, setting: Mapping[str, Any], read: Callable[[dict[str, Any]], MeasuredT], *, resume: bool
    ) -> None:
        self.path, self.setting = path, dict(setting)
        self.points: dict[tuple[Any, ...], MeasuredT] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            path.unlink(missing_ok=True)
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            entry = json.loads(line)
            if entry.pop("setting") == self.setting:
                point = read(entry)
                self.points[point.key] = point

    def put(self, point: MeasuredT) -> None:
        """Remember a point."""
        self.points[point.key] = point
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**asdict(point), "setting": self.setting}) + "\n")


def require_cache(options: argparse.Namespace) -> None:
    """Leave with one sentence where a report is wanted of a cache that would be emptied."""
    if options.report and not options.resume:
        raise SystemExit("--report writes of what is in the cache, which is emptied without --resume; pass both")


def require_peer() -> None:
    """Leave with one sentence where Torch-Pruning is not installed."""
    if find_spec("torch_pruning") is None:
        raise SystemExit("Torch-Pruning is not installed; run pip install -e '.[bench]'")


def restart_with_quiet_memory(threads: int) -> None:
    """Start this very command anew with a fixed environment, unless it has that environment already.

    Threads and memory allocator read the environment once, when the process starts.
    """
    wanted = {**MALLOC, "OMP_NUM_THREADS": str(threads)}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def provenance(threads: int) -> dict[str, Any]:
    """Describe command, versions and machine in JSON values."""
    import torch

    from archscan.latency.timing import device_name

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    script, *arguments = sys.argv
    return {
        "command": shlex.join(["python", _relative(script), *map(_relative, arguments)]),
        "versions": versions,
        "machine": {
            "cpu": device_name(torch.device("cpu")),
            "cores": os.cpu_count(),
            "threads": threads,
            "system": platform.system(),
        },
        "environment": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", *MALLOC)},
    }


def _relative(argument: str) -> str:
    """Shorten a path below the working directory, so that a report names no folder of the machine it was made on."""
    path = Path(argument)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd()).as_posix()
    return argument


def counted_macs(model: "nn.Module", example: "Tensor") -> int:
    """Count the MACs of one image with fvcore.

    Raises:
        RuntimeError: The network does not run.
    """
    from fvcore.nn import FlopCountAnalysis

    counter = FlopCountAnalysis(model.eval(), example[:1])
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    return int(counter.total())


def peak_rss_mib() -> float:
    """Return the most memory that this process has had resident, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if platform.system() == "Darwin" else peak / 2**10


def growth_mib(run: Callable[[], object]) -> float | None:
    """Measure by how much the peak resident memory rises above what is resident before a run; Linux only.

    What was freed is given back first, and the kernel is told to forget the old peak. Meant for a process whose
    allocator is not told to keep freed memory.
    """
    status, forget = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)
        forget.write_text("5", encoding="utf-8")
    except (OSError, AttributeError):
        return None
    before = _status_kib(status.read_text(encoding="utf-8"), "VmRSS")
    run()
    return (_status_kib(status.read_text(encoding="utf-8"), "VmHWM") - before) / 2**10


def _status_kib(text: str, name: str) -> int:
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name}:"))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table; the first column is text, the others are numbers."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def origin(made: Mapping[str, Any]) -> str:
    """Write command, versions and machine in Markdown."""
    machine, environment = made["machine"], made["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    variables = " ".join(f"{name}={value}" for name, value in environment.items())
    return (
        f"Made by `{made['command']}` with {versions}, on {machine['cpu']} "
        f"({machine['cores']} cores, {machine['threads']} used; `{variables}`)."
    )


def write(stem: Path, data: Mapping[str, Any], markdown: str) -> None:
    """Write ``<stem>.json`` and ``<stem>.md``."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_name(f"{stem.name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    stem.with_name(f"{stem.name}.md").write_text(markdown.rstrip() + "\n", encoding="utf-8")
    print(f"written: {stem}.json, {stem}.md", file=sys.stderr)
