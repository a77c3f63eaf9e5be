"""Folders and files that are written: a target → a refusal, or one that appears at once and whole, or not at all.

Everything is written beside its place and renamed into it, so that an interruption leaves nothing half-written. The
decision that is not obvious: a folder is replaced only where everything in it is known to be archscan's own, by name.
"""

import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from archscan.errors import BadInput


def check_place(target: Path, nearest: Iterable[Path]) -> None:
    """See, before any work, that a folder can be made or written to.

    Args:
        target: The folder.
        nearest: Where to write, such as its parents from the inside out; the first that exists counts.

    Raises:
        BadInput: It is a file, or cannot be written to.
    """
    if target.exists() and not target.is_dir():
        raise BadInput(f"{target} is a file; choose another output folder")
    place = next(path for path in nearest if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise BadInput(f"{place} is not a folder that can be written to; choose another output folder")


def check_replaceable(
    folder: str | os.PathLike[str], ours: Collection[str], foreign: str, *, overwrite: bool = False
) -> Path:
    """See, before any work, that a folder can be written by `replacing`.

    Args:
        folder: Where to.
        ours: Names of the files that may be lost.
        foreign: Says in the refusal what another file is, such as ``which archscan did not write``.
        overwrite: Whether the folder may exist.

    Returns:
        The folder, resolved.

    Raises:
        BadInput: It is a file, exists without `overwrite`, holds anything else, or cannot be written.
    """
    target = Path(folder).expanduser().resolve()
    if target == target.parent:
        raise BadInput(f"{target} is the root of the disk; choose another output folder")
    check_place(target, target.parents)
    if target.is_dir():
        if not overwrite:
            raise BadInput(f"{target} exists; pass --overwrite (overwrite=True), or choose another output folder")
        others = sorted(path.name for path in target.iterdir() if path.name not in ours or path.is_dir())
        if others:
            raise BadInput(f"{target} holds {others[0]}, {foreign}; choose another output folder")
    return target


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """Give an empty folder next to a target; what is still in it at the end goes.

    Raises:
        BadInput: The disk refuses, here or inside the ``with`` block.
    """
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
    except OSError as error:
        raise BadInput(
            f"{target} cannot be written: {error.strerror or error}; choose another output folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a folder to write into, which takes the target's place at the end; after an error the target is as before.

    Raises:
        BadInput: The disk refuses.
    """
    with beside(target) as partial:
        yield partial
        replaced = partial.with_suffix(".replaced")
        try:
            if target.exists():
                target.rename(replaced)
            partial.rename(target)
        finally:
            if replaced.exists() and not target.exists():
                replaced.rename(target)
            shutil.rmtree(replaced, ignore_errors=True)


def write_whole(file: Path, text: str) -> None:
    """Write a text file, in place of the one that is there.

    Raises:
        BadInput: The disk refuses.
    """
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise BadInput(f"{file} cannot be written: {error.strerror or error}; choose another output folder") from error
    finally:
        partial.unlink(missing_ok=True)
