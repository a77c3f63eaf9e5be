"""Frozen dataclasses ↔ plain JSON values, the types of the fields being the schema.

Reading is strict (a missing, unknown or ill-typed field is refused with its path) because ``archscan show`` opens
folders that other people made. The decision that is not obvious: a field with a default may be missing, since it came
later than folders that people still have.
"""

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from archscan.errors import BadInput

LARGEST_COUNT = 2**63


def plain(value: Any) -> Any:
    """Turn mappings and sequences, as `dataclasses.asdict` gives them, into dicts and lists."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def read(kind: Any, value: Any, path: str) -> Any:
    """Read a value as its type says; one branch for each form of type that the dataclasses use.

    Args:
        kind: The type: a dataclass, or the annotation of one of its fields.
        value: What `plain` gave, or whatever a file holds.
        path: Where it stands, for the message.

    Raises:
        BadInput: Where it is not of that type.
    """
    if is_dataclass(kind):
        return _read_dataclass(kind, value, path)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else read(inner, value, path)
    if origin is tuple and isinstance(value, list):
        return tuple(read(arguments[0], item, f"{path}[{place}]") for place, item in enumerate(value))
    if origin is Mapping and isinstance(value, Mapping):
        return {str(key): read(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
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
    return kind(**{name: read(hints[name], value[name], f"{path}: {name}") for name in names if name in value})


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
