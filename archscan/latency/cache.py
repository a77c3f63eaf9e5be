"""Measured numbers that are kept on disk: what they depend on → a table of them, by name.

One JSON file per machine and version below the user's cache folder (``ARCHSCAN_CACHE``, else ``XDG_CACHE_HOME``, else
``~/.cache``). The decision that is not obvious: a cache that cannot be read or written is none, and nothing fails:
the numbers are measured again.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

Table = dict[str, float]


@contextmanager
def kept_table(kind: str, depends_on: Mapping[str, str | int]) -> Iterator[Table]:
    """Yield the table of one kind of numbers as it was left; what is added to it is kept.

    Args:
        kind: Of the numbers, part of the file's name.
        depends_on: Machine, threads, versions: other values are another file.
    """
    described = json.dumps({"kind": kind, **depends_on}, sort_keys=True)
    file = folder() / f"{kind}-{hashlib.sha256(described.encode()).hexdigest()[:16]}.json"
    table = _read(file)
    known = len(table)
    try:
        yield table
    finally:
        if len(table) > known:
            _write(file, {**_read(file), **table})


def folder() -> Path:
    """Say where measured numbers are kept."""
    if own := os.environ.get("ARCHSCAN_CACHE"):
        return Path(own)
    with suppress(RuntimeError):  # a user without a home folder
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "archscan"
    return Path(os.devnull)


def _read(file: Path) -> Table:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(data, dict):
        return {}
    return {name: float(value) for name, value in data.items() if _is_time(value)}


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _write(file: Path, table: Table) -> None:
    """Replace the file in one step, so that two processes at once do no harm."""
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(table, sort_keys=True), encoding="utf-8")
        partial.replace(file)
