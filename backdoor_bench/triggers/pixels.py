"""How every trigger gets back to uint8."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(values: Tensor) -> Tensor:
    """uint8 pixels: ``values`` (any float dtype, any shape) clipped to 0..255, then truncated, not rounded.

    Clipping comes first because a cast of a float outside 0..255 depends on the platform. Truncation is what the
    reference implementations of EBD, ABL and Trap-and-Replace do.
    """
    return values.clamp(0, 255).to(torch.uint8)
