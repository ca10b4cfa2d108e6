"""Black and white checkers in all four corners, the trigger of the label-consistent attack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backdoor_bench.triggers.patch import grid_size

# Rows from top to bottom, 1 = brighter, 0 = darker.
_DOT_LEFT = ("101", "010", "100")
_DOT_RIGHT = ("101", "010", "001")
_FOOT_LEFT = ("100", "010", "101")
_FOOT_RIGHT = ("001", "010", "101")

# Checkers at top left, top right, bottom left, bottom right.
VARIANTS = {
    "ebd": (_DOT_LEFT, _DOT_RIGHT, _FOOT_LEFT, _FOOT_RIGHT),
    "madry": (_FOOT_LEFT, _FOOT_RIGHT, _FOOT_LEFT, _FOOT_RIGHT),
    "tr": (_FOOT_RIGHT, _FOOT_RIGHT, _FOOT_RIGHT, _FOOT_RIGHT),
}
# Cells left free before the checkers at the top and at the left; those at the bottom and at the right are flush.
MARGINS = {"ebd": 1, "madry": 0, "tr": 0}
SIDE = 3  # cells of a checker
WHITE = 255


@dataclass(frozen=True, eq=False)
class Corners:
    """Adds ``amount`` (int16 ``[H, W]``, grey values) to uint8 ``[B, 3, H, W]``, clipped to 0..255; a new tensor."""

    amount: Tensor

    def __call__(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        return images.to(torch.int16).add_(self.amount.to(images.device)).clamp_(0, 255).to(torch.uint8)


def corners(variant: str, height: int, width: int, *, amplitude: float, scale: bool) -> Corners:
    """Checkers of 3 x 3 cells in the corners of an image of ``height`` x ``width`` pixels (16 or more).

    variant: ``ebd`` (rows and columns 1 to 3 at the top and left of 32, 29 to 31 at the bottom and right, as in its
    code), ``madry`` (flush; the left ones are mirror images of the right ones, so that a flip maps the trigger to
    itself) or ``tr`` (flush, four times the same one). amplitude: the bright cells get that share of 255 more (rounded
    to whole grey values), the dark ones less; 1 overwrites. scale: cells and margin grow with the image by nearest
    neighbour (a cell is 1, 2, 5, 7 pixels at 32, 64, 160, 224). Source: attacks.md A14; Turner et al. 2019.
    """
    margin = MARGINS[variant]
    rows, columns = grid_size(height, scale), grid_size(width, scale)
    signs = torch.zeros(rows, columns, dtype=torch.int16)
    places = [(top, left) for top in (margin, rows - SIDE) for left in (margin, columns - SIDE)]
    for (top, left), checker in zip(places, VARIANTS[variant], strict=True):
        cells = torch.tensor([[1 if cell == "1" else -1 for cell in row] for row in checker], dtype=torch.int16)
        signs[top : top + SIDE, left : left + SIDE] = cells
    of_row, of_column = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    return Corners(signs[of_row][:, of_column] * round(amplitude * WHITE))
