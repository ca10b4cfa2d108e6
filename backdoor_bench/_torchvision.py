"""Import this before torchvision: afterwards `import torchvision` works beside a CPU-only PyTorch too.

torchvision registers fake kernels for two of its compiled operators at import time. Its wheels of the package index are
built for CUDA, so beside a CPU-only PyTorch the compiled library cannot load, the operators do not exist and the import
stops with "operator torchvision::nms does not exist". Declaring their two schemas is enough for models, transforms and
datasets; calling the operators themselves still fails, and image decoding is left to Pillow.
"""

from __future__ import annotations

import importlib.util
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _compiled_ops_load() -> bool:
    """True if torchvision's operators exist, or come into being by loading its compiled library."""
    if hasattr(torch.ops.torchvision, "nms"):
        return True
    found = importlib.util.find_spec("torchvision")  # finds the folder without importing the package
    if found is None or found.origin is None:
        return True  # nothing to help: `import torchvision` itself says what is missing
    for suffix in EXTENSION_SUFFIXES:
        library = Path(found.origin).parent / f"_C{suffix}"
        if library.is_file():
            try:
                torch.ops.load_library(str(library))
            except OSError:
                return False
            return True
    return False


def _declare() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    return library


# Kept for the life of the process: the schemas vanish with the object.
_LIBRARY: torch.library.Library | None = None if _compiled_ops_load() else _declare()
