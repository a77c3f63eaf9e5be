"""Let torchvision import where its compiled operators cannot be loaded.

A torchvision wheel built for CUDA does not load its operators beside a CPU build of torch, and importing it then fails
with "operator torchvision::nms does not exist" while it registers shapes for two of them. Declaring those two is enough
for every network that does not call them. It is done at the moment when somebody imports torchvision, so that importing
archscan costs nothing.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_SCHEMAS = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))
_declared: list[Any] = []


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing; declares the operators when torchvision is looked for, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            declare_missing_ops()
        return None


def watch_for_torchvision() -> None:
    """Declare torchvision's missing operators as soon as it is imported, if they are missing then."""
    if "torchvision" not in sys.modules and not any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())


def declare_missing_ops() -> bool:
    """Declare torchvision's operators if, and only if, its compiled ones cannot be loaded; say whether that was so."""
    import torch

    if _declared:
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    compiled = sorted(path for suffix in ("so", "pyd") for path in Path(spec.origin).parent.glob(f"_C*.{suffix}"))
    try:
        for path in compiled:
            torch.ops.load_library(str(path))
    except OSError:
        compiled = []
    if compiled:
        return False
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
    return True
