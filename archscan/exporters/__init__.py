"""Hand a network over in formats that run without archscan: model or saved folder → files, checked → `Exported`.

Each format is one row of `FORMATS`: a function that writes one file, loads it again, runs it beside PyTorch, and says
how far off it was. The decision that is not obvious: it is all or nothing. Files appear when every format that was
asked for has passed, so that a folder never holds an export that nobody has run.
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from archscan.errors import BadInput
from archscan.exporters import onnx_file, program, script
from archscan.exporters.folder import Pair, check_free, example_of, open_pair, record, staged, write_architecture
from archscan.exporters.network import ExportSettings, Network, prepare
from archscan.options import ProgressFactory, silent
from archscan.report.model import Exported, Report

__all__ = [
    "FORMATS",
    "ExportSettings",
    "Exported",
    "Pair",
    "check_formats",
    "export",
    "export_formats",
    "export_pair",
    "export_saved",
]

Writer = Callable[[Network, Path], Exported]

FORMATS: Mapping[str, tuple[str, Writer]] = {
    "onnx": (onnx_file.FILE, onnx_file.write_onnx),
    "pt2": (program.FILE, program.write_program),
    "script": (script.FILE, script.write_script),
}
"""Format → the file that it is written to, and what writes it."""


def check_formats(formats: Sequence[str]) -> tuple[str, ...]:
    """Return each format once; to be called before any work.

    Raises:
        BadInput: There is none, one is unknown, or its packages are missing.
    """
    if isinstance(formats, str):
        raise BadInput(f"formats is the text {formats!r}; pass a tuple: ({formats!r},)")
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        what = f"there is no export format {unknown[0]!r}" if unknown else "no export format was given"
        raise BadInput(f"{what}; choose from {', '.join(FORMATS)}")
    if "onnx" in formats:
        onnx_file.require_onnx()
    return tuple(dict.fromkeys(formats))


def export_formats(
    model: nn.Module,
    example_input: Any,
    folder: Path,
    formats: Sequence[str],
    settings: ExportSettings | None = None,
    progress: ProgressFactory = silent,
) -> tuple[Exported, ...]:
    """Write a network in some formats; the model is left unchanged, and after a refusal nothing is written.

    Args:
        model: Any network; it is exported in eval mode, from the CPU.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments, the batch first.
        folder: Where to; it is made where it is missing.
        formats: Of ``onnx``, ``pt2`` and ``script``.
        settings: Batch size, opset, and whether files may be replaced.
        progress: Opens progress bars.

    Raises:
        BadInput: A format is unknown, its packages are missing, the network cannot be exported, or a file is there.
        RebuildMismatch: A file does not compute what the network computes.
    """
    names, settings = _checked(folder, formats, settings)
    with staged(folder) as partial:
        return _write(model, example_input, partial, names, settings, progress)


def _checked(
    folder: Path, formats: Sequence[str], settings: ExportSettings | None
) -> tuple[tuple[str, ...], ExportSettings]:
    """See, before any work, that formats can be written to a folder; return them, once each, and all settings."""
    names, settings = check_formats(formats), settings or ExportSettings()
    if settings.opset is not None and "onnx" not in names:
        raise BadInput("an opset was given and nothing is exported as onnx; leave it out")
    check_free(folder, [FORMATS[name][0] for name in names], overwrite=settings.overwrite)
    return names, settings


def _write(
    model: nn.Module,
    example_input: Any,
    folder: Path,
    formats: Sequence[str],
    settings: ExportSettings,
    progress: ProgressFactory,
) -> tuple[Exported, ...]:
    network, exported = prepare(model, example_input, settings), []
    with progress("Exporting") as step:
        for place, name in enumerate(formats):
            step(place, len(formats))
            exported.append(FORMATS[name][1](network, folder))
        step(len(formats), len(formats))
    return tuple(exported)


def export_pair(
    folder: Path,
    pair: Pair,
    example_input: Any,
    formats: Sequence[str],
    settings: ExportSettings | None = None,
    progress: ProgressFactory = silent,
) -> Report:
    """Export into the folder of a saved result: the files, ``architecture.txt``, and their entries in the summary.

    Args:
        folder: What was saved.
        pair: The networks before and after, and the report that was saved.
        example_input: As for `export_formats`.
        formats: As for `export_formats`.
        settings: As for `export_formats`.
        progress: Opens progress bars.

    Returns:
        The report with the exports in it.

    Raises:
        ArchscanError: As for `export_formats`.
    """
    return record(folder, pair.report, _export_beside(folder, pair, example_input, formats, settings, progress))


def _export_beside(
    folder: Path,
    pair: Pair,
    example_input: Any,
    formats: Sequence[str],
    settings: ExportSettings | None,
    progress: ProgressFactory,
) -> tuple[Exported, ...]:
    names, settings = _checked(folder, formats, settings)
    with staged(folder) as partial:
        exported = _write(pair.after, example_input, partial, names, settings, progress)
        write_architecture(pair, partial)
    return exported


def export_saved(
    folder: Path,
    formats: Sequence[str],
    output: Path | None = None,
    settings: ExportSettings | None = None,
    progress: ProgressFactory = silent,
) -> tuple[Exported, ...]:
    """Export a saved result into its own folder, whose summary then lists the files, or into another.

    Args:
        folder: What archscan saved.
        formats: As for `export_formats`.
        output: Where to; None for the folder itself.
        settings: As for `export_formats`.
        progress: Opens progress bars.

    Raises:
        ArchscanError: As for `export_formats`; or the folder is damaged, or needs its original to be opened.
    """
    names, settings = _checked(output or folder, formats, settings)
    with progress(f"Opening {folder}") as step:
        step(0, 0)
        pair = open_pair(folder, None)
    example = example_of(pair.report)
    if output is not None and output.resolve() != folder.resolve():
        return _export_beside(output, pair, example, names, settings, progress)
    report = export_pair(folder, pair, example, names, settings, progress)
    return tuple(entry for entry in report.exports if entry.format in names)


def export(
    model_or_folder: nn.Module | str | PathLike[str],
    formats: Sequence[str] = ("onnx",),
    *,
    example_input: Any = None,
    output: str | PathLike[str] | None = None,
    settings: ExportSettings | None = None,
    progress: ProgressFactory = silent,
) -> tuple[Exported, ...]:
    """Export a network, or a saved result, in formats that run without archscan.

    Each file is loaded and run again, and compared with PyTorch at two batch sizes.

    >>> import tempfile, torch, archscan
    >>> from archscan.reference_nets import lenet5
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (made,) = archscan.export(
    ...         lenet5(), ("pt2",), example_input=torch.randn(1, 1, 28, 28), output=folder
    ...     )
    >>> made.file, made.batch_size, made.max_abs_error < 1e-5
    ('model.pt2', None, True)

    Args:
        model_or_folder: A network, which is left unchanged, or a folder that archscan saved.
        formats: Of ``onnx``, ``pt2`` (a program of `torch.export`) and ``script`` (TorchScript).
        example_input: What the network takes: a tensor, a tuple of positional arguments, or a dict of keyword
            arguments, the batch first. A folder knows it.
        output: Folder of the files; None for the folder that is exported. A network needs one.
        settings: Batch size, opset, and whether files may be replaced.
        progress: Opens progress bars.

    Returns:
        One entry per format, in the order asked for.

    Raises:
        BadInput: Something asked for cannot be had; nothing is written then.
        RebuildMismatch: A file does not compute what the network computes; nothing is written then.
    """
    if isinstance(model_or_folder, nn.Module):
        if example_input is None or output is None:
            raise BadInput("a network needs example_input= and output=, the folder of its files, to be exported")
        return export_formats(model_or_folder, example_input, Path(output), formats, settings, progress)
    if example_input is not None:
        raise BadInput("a saved folder knows its input; leave example_input out, or pass archscan.load(folder)")
    where = None if output is None else Path(output)
    return export_saved(Path(model_or_folder), formats, where, settings, progress)
