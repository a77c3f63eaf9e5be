"""Let torchvision import where its compiled operators cannot be loaded.

A torchvision wheel built for CUDA does not load its operators beside a CPU build of torch, and importing it then fails with
"operator torchvision::nms does not exist" while it registers shapes for two of them. Declaring those two is enough for every
network that does not call them.
"""

import importlib.util
import sys
from pathlib import Path

import torch

_SCHEMAS = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))
_declared: list[torch.library.Library] = []


def declare_missing_ops() -> bool:
    """Declare torchvision's operators if, and only if, its compiled ones cannot be loaded; say whether that was so."""
    if _declared:
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or "torchvision" in sys.modules:
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
