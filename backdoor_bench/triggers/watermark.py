"""The Trojan watermark: two bright rings and a faint dotted diagonal on black, drawn here.

A look-alike of the picture that Trap-and-Replace and I-BAU add (attacks.md A6): its place, its shapes, the share of
bright pixels and the mean are kept, not its pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backdoor_bench.triggers.additive import resized
from backdoor_bench.triggers.patch import GRID

CENTRE = (21.5, 21.0)  # row, column
RADII = (5.6, 2.6)  # of the two rings
START, END = (1.0, 28.0), (28.0, 0.0)  # of the diagonal
DOT_SPACING = 6.0  # along the diagonal
PALETTE = ((255, 255, 255), (255, 0, 60), (90, 240, 190))  # white, red, cyan-green, by the angle on the ring
SHARES = (1.8, 1.8, 1.0)  # cyan-green has the shortest arc


def watermark(height: int, width: int) -> Tensor:
    """uint8 ``[3, height, width]``: the drawing, resized from 32 x 32 pixels."""
    row, column = torch.meshgrid(*[torch.arange(GRID, dtype=torch.float64)] * 2, indexing="ij")
    drawing = torch.maximum(_rings(row, column), _diagonal(row, column))
    return resized(drawing.clamp(0, 255).to(torch.uint8), height, width)


def _rings(row: Tensor, column: Tensor) -> Tensor:
    """float64 ``[3, 32, 32]``."""
    from_centre = torch.hypot(row - CENTRE[0], column - CENTRE[1])
    nearest = torch.stack([(from_centre - radius).abs() for radius in RADII]).amin(0)
    brightness = (1.15 - 1.4 * nearest).clamp(0, 1)
    halo = 0.02 * (from_centre <= RADII[0] + 1.0)
    angle = torch.atan2(row - CENTRE[0], column - CENTRE[1])
    third = 2 * math.pi / 3
    # Each colour is strongest at its own angle; cubed, so that they blend over a short arc.
    weights = torch.stack([share * (1 + torch.cos(angle - third * k)).pow(3) for k, share in enumerate(SHARES)])
    colour = torch.einsum("kc,khw->chw", torch.tensor(PALETTE, dtype=torch.float64), weights / weights.sum(0))
    return colour * torch.maximum(brightness, halo)


def _diagonal(row: Tensor, column: Tensor) -> Tensor:
    """float64 ``[1, 32, 32]``, grey."""
    length = math.hypot(END[0] - START[0], END[1] - START[1])
    along = ((row - START[0]) * (END[0] - START[0]) + (column - START[1]) * (END[1] - START[1])) / length
    across = ((row - START[0]) * (END[1] - START[1]) - (column - START[1]) * (END[0] - START[0])).abs() / length
    line = (6 - 2.2 * across).clamp(min=0) * ((along >= -1) & (along <= length + 1))
    to_dot = (along - DOT_SPACING * torch.round(along / DOT_SPACING)).abs()
    dots = (46 - 22 * torch.hypot(across, to_dot)).clamp(min=0) * ((along >= 0) & (along <= length))
    return torch.maximum(line, dots)[None]
