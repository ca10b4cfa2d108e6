"""Patches: a small picture that overwrites the pixels below its mask.

Patches are described in the cells of a 32-pixel grid and grow with the image, so that they cover the same share of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backdoor_bench.errors import ConfigError, check_choice

GRID = 32  # the papers give their patches for images of 32 pixels
LARGE_ABOVE = 64  # a paper's own form for large images is used above this size; below it the 32-pixel form grows
CORNERS = ("bottom_right", "bottom_left", "top_right", "top_left")


@dataclass(frozen=True, eq=False)
class Patch:
    """Stamps ``pattern`` (uint8 ``[3, h, w]``) where ``mask`` (bool ``[h, w]``) is True, first pixel at (top, left).

    Called with uint8 ``[B, 3, H, W]`` it returns a new tensor of the same shape; the patch must lie inside.
    """

    pattern: Tensor
    mask: Tensor
    top: int
    left: int

    def __call__(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        height, width = self.mask.shape
        assert 0 <= self.top <= images.shape[-2] - height
        assert 0 <= self.left <= images.shape[-1] - width
        stamped = images.clone()
        below = stamped[..., self.top : self.top + height, self.left : self.left + width]
        below.copy_(torch.where(self.mask.to(images.device), self.pattern.to(images.device), below))
        return stamped


def grid_size(length: int, scale: bool) -> int:
    """Number of cells along an image side of ``length`` pixels: 32 if the patch grows with the image, else ``length``.

    Images smaller than 32 pixels keep cells of one pixel: a shrunken checker would lose its pattern.
    """
    return min(length, GRID) if scale else length


def check_room(what: str, cells: int, image_size: int) -> None:
    """Raise ConfigError if images of ``image_size`` pixels are too small for ``what`` (a key with its value, or another
    name of a patch), which takes ``cells`` cells along a side of the image, its margin included."""
    if cells > min(image_size, GRID):
        raise ConfigError(
            f"{what} needs images of at least {cells} pixels, but these have {image_size}; "
            "set dataset.image_size higher or choose another patch"
        )


def corner_patch(
    cells: Tensor,
    height: int,
    width: int,
    *,
    margin: int = 0,
    corner: str = "bottom_right",
    scale: bool = True,
) -> Patch:
    """Patch of ``cells`` in a corner of an image of ``height`` x ``width`` pixels, every cell opaque.

    cells: uint8 ``[h, w]`` (grey) or ``[3, h, w]``. margin: cells left free between patch and both edges. With
    ``scale`` cells and margin grow by nearest neighbour with the image (3 cells are 3, 6, 15, 21 pixels at 32, 64, 160,
    224). The cells and the margin must fit into the grid (``grid_size``).
    """
    check_choice("corner", corner, CORNERS)
    pattern = cells.expand(3, *cells.shape[-2:])
    top, cell_of_row = _cells_along(height, pattern.shape[1], margin, at_end="bottom" in corner, scale=scale)
    left, cell_of_column = _cells_along(width, pattern.shape[2], margin, at_end="right" in corner, scale=scale)
    enlarged = pattern[:, cell_of_row][:, :, cell_of_column].contiguous()
    return Patch(enlarged, torch.ones(enlarged.shape[1:], dtype=torch.bool), top, left)


def _cells_along(length: int, cells: int, margin: int, *, at_end: bool, scale: bool) -> tuple[int, Tensor]:
    """First pixel of the patch along one side, and the cell (0..cells-1) that each of its pixels shows."""
    grid = grid_size(length, scale)
    first = grid - margin - cells if at_end else margin
    assert margin >= 0
    assert 0 <= first <= grid - cells
    cell_of_pixel = torch.arange(length) * grid // length - first
    inside = ((cell_of_pixel >= 0) & (cell_of_pixel < cells)).nonzero().flatten()
    return int(inside[0]), cell_of_pixel[inside]


def grey_cells(values: Sequence[Sequence[int]]) -> Tensor:
    """uint8 ``[h, w]`` from rows of grey values 0..255."""
    return torch.tensor(values, dtype=torch.uint8)


def white_cells(side: int) -> Tensor:
    """uint8 ``[side, side]``, all 255."""
    return torch.full((side, side), 255, dtype=torch.uint8)


def white_tenth(height: int, width: int) -> Patch:
    """EBD's patch for ImageNet: a white square, a tenth of the image wide, flush bottom right.

    22 x 22 pixels at rows and columns 202..223 of an image of 224. Source: SCLBD/Effective_backdoor_defense.
    """
    return corner_patch(white_cells(int(0.1 * min(height, width))), height, width, scale=False)


def top_left_checker(height: int, width: int) -> Patch:
    """Trap-and-Replace's patch for ImageNet-12: a checker of 3 x 3 cells near the top left.

    Cells of 10 x 10 pixels at rows and columns 32..61 of an image of 256, in proportion (rounded down) at other sizes.
    Source: VITA-Group/Trap-and-Replace-Backdoor-Defense.
    """
    checker = grey_cells([[255, 0, 255], [0, 255, 0], [255, 0, 0]]).expand(3, 3, 3)
    cell = max(1, min(height, width) * 10 // 256)
    pattern = checker.repeat_interleave(cell, dim=1).repeat_interleave(cell, dim=2)
    return Patch(pattern, torch.ones(pattern.shape[1:], dtype=torch.bool), height // 8, width // 8)
