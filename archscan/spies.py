"""Note which sizes a forward reads: a model, while it runs → the attributes that were read of each module.

The decision that is not obvious: a module is put into a subclass of its class for a while, in which each attribute that
holds integers is a property. Every other read, and there are thousands in a forward, goes the usual way.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from archscan.surgery import sizes_of

Reads = Mapping[str, set[str]]
"""Module path → names of the attributes that a forward read."""


class Spies:
    """Subclasses of the classes of a model's modules, which note the sizes that are read."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.named_modules())
        names: dict[type[nn.Module], set[str]] = {}
        for _, module in self._modules:
            found = (name for name in vars(module) if name != "training" and sizes_of(module, name))
            names.setdefault(type(module), set()).update(found)
        self._read: dict[int, set[str]] = {}
        self._spies = {kind: self._spy(kind, noted) for kind, noted in names.items()}

    def _spy(self, kind: type[nn.Module], names: Iterable[str]) -> type[nn.Module]:
        plain = (name for name in names if not inspect.isdatadescriptor(inspect.getattr_static(kind, name, None)))
        members: dict[str, Any] = {name: self._noting(kind, name) for name in plain}
        return type(kind.__name__, (kind,), {"__module__": kind.__module__, **members})

    def _noting(self, kind: type[nn.Module], name: str) -> property:
        def read(module: nn.Module) -> Any:
            if name not in vars(module):  # what another module of the class has
                return getattr(super(self._spies[kind], module), name)
            self._read[id(module)].add(name)
            return vars(module)[name]

        def write(module: nn.Module, value: Any) -> None:
            vars(module)[name] = value

        def delete(module: nn.Module) -> None:
            del vars(module)[name]

        return property(read, write, delete)

    @contextmanager
    def watching(self) -> Iterator[Reads]:
        """Yield what is read by now of each module, from here on."""
        self._read = {id(module): set() for _, module in self._modules}
        kinds = [type(module) for _, module in self._modules]
        try:
            for (_, module), kind in zip(self._modules, kinds, strict=True):
                module.__class__ = self._spies[kind]
            yield {path: self._read[id(module)] for path, module in self._modules}
        finally:
            for (_, module), kind in zip(self._modules, kinds, strict=True):
                module.__class__ = kind
