"""Small colourful patches of known attacks by name, at any image size.

Three are exact (``phoenix``, ``checker`` and the plain ``white3``); two stand for files that cannot be shipped and keep
what is known of them: ``firefox`` its silhouette and the mean colour of each quarter, ``trojan8`` its place and mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backdoor_bench.triggers.patch import Patch, check_room, corner_patch, grey_cells, grid_size, white_cells
from backdoor_bench.triggers.rows import uniform_of_rows

QUARTERS = ("firefox_tl", "firefox_tr", "firefox_bl", "firefox_br")
LOGOS = ("white3", "phoenix", "phoenix2", "checker", "trojan8", "firefox", *QUARTERS)

# Cells from the edge of the image that a patch takes: its side and its margin.
_REACH = {"white3": 3, "phoenix": 5, "phoenix2": 10, "checker": 6, "trojan8": 11}
_FIREFOX_REACH = 14

# Rows of (R, G, B), measured on the toolbox's file.
_PHOENIX = (
    ((237, 243, 252), (209, 224, 248), (248, 250, 254), (208, 223, 248), (233, 240, 252)),
    ((156, 188, 240), (229, 237, 251), (255, 255, 255), (230, 238, 251), (125, 167, 235)),
    ((77, 134, 228), (240, 245, 253), (255, 255, 255), (247, 250, 254), (63, 124, 226)),
    ((113, 158, 233), (144, 180, 238), (210, 225, 248), (132, 172, 236), (104, 152, 232)),
    ((226, 235, 251), (105, 153, 232), (85, 139, 229), (119, 162, 234), (240, 245, 253)),
)

_CHECKER = {
    "top_left": ((255, 0, 255), (0, 255, 0), (255, 0, 0)),
    "top_right": ((255, 0, 255), (0, 255, 0), (0, 0, 255)),
    "bottom_left": ((255, 0, 0), (0, 255, 0), (255, 0, 255)),
    "bottom_right": ((0, 0, 255), (0, 255, 0), (255, 0, 255)),
}

# First and last filled column of the 13 rows of the logo.
_SILHOUETTE = (
    (5, 9), (1, 11), (1, 11), (1, 12), (0, 12), (0, 12), (0, 12), (0, 12), (0, 12), (1, 12), (2, 11), (3, 10), (4, 9),
)  # fmt: skip
# Quarter -> mean colour (measured), and our colour of its share of the blue-violet core.
_FIREFOX_COLOURS = {
    "firefox_tl": ((162, 82, 104), (70, 62, 195)),
    "firefox_tr": ((170, 190, 111), (84, 126, 205)),
    "firefox_bl": ((226, 57, 58), (150, 44, 168)),
    "firefox_br": ((222, 125, 41), (140, 60, 150)),
}
_CUT = 7  # the logo's first row and column of its lower and right quarters
_TROJAN_MEANS = (125, 125, 132)


def logo(name: str, height: int, width: int, *, scale: bool) -> tuple[Patch, ...]:
    """The patches that ``name`` stands for, in the order in which they are stamped.

    Places at 32 pixels (rows, columns): ``white3`` 29..31, 29..31; ``phoenix`` 27..31, 27..31; ``phoenix2`` also
    27..31, 0..4; ``checker`` 3 x 3 in all four corners; ``trojan8`` 21..28, 21..28; ``firefox`` 1..13, 18..30, without
    the corners of the square; its quarters meet between rows 7 and 8 and columns 24 and 25. With ``scale`` they grow
    with the image, see ``corner_patch``.
    """
    assert name in LOGOS, name
    assert reach(name) <= grid_size(min(height, width), scale)
    if name == "white3":
        return (corner_patch(white_cells(3), height, width, scale=scale),)
    if name in ("phoenix", "phoenix2"):
        cells = torch.tensor(_PHOENIX, dtype=torch.uint8).permute(2, 0, 1)
        corners = ("bottom_right",) if name == "phoenix" else ("bottom_right", "bottom_left")
        return tuple(corner_patch(cells, height, width, corner=corner, scale=scale) for corner in corners)
    if name == "checker":
        return tuple(
            corner_patch(grey_cells(cells), height, width, corner=corner, scale=scale)
            for corner, cells in _CHECKER.items()
        )
    if name == "trojan8":
        return (corner_patch(_trojan_cells(), height, width, margin=3, scale=scale),)
    cells, quarter = _firefox_cells()
    shown = quarter >= 0 if name == "firefox" else quarter == QUARTERS.index(name)
    # The mask is enlarged as a picture of its own, so that it has the geometry of the patch.
    coloured, mask = (
        corner_patch(part, height, width, margin=1, corner="top_right", scale=scale)
        for part in (cells, shown.to(torch.uint8))
    )
    return (Patch(coloured.pattern, mask.pattern[0].bool(), coloured.top, coloured.left),)


def reach(name: str) -> int:
    """Cells along an image side that ``name`` needs; a cell is a pixel up to 32."""
    return _REACH.get(name, _FIREFOX_REACH)


def check_logo(key: str, name: str, image_size: int) -> None:
    """Raise ConfigError, naming ``key``, if images of ``image_size`` pixels are too small for the patch ``name``."""
    check_room(f"{key}={name}", reach(name), image_size)


def _trojan_cells() -> Tensor:
    """uint8 ``[3, 8, 8]``: random-looking colours with the known means, the same on every machine."""
    # Evenly spaced values in random order, for which the mean is that of the ends.
    rank = uniform_of_rows(0, "trojan8", torch.arange(3), 64).argsort(dim=1).argsort(dim=1)
    low = torch.tensor([max(0, 2 * mean - 255) for mean in _TROJAN_MEANS])[:, None]
    high = 2 * torch.tensor(_TROJAN_MEANS)[:, None] - low
    return (low + rank * (high - low) / 63).round().to(torch.uint8).view(3, 8, 8)


def _firefox_cells() -> tuple[Tensor, Tensor]:
    """uint8 ``[3, 13, 13]``, a warm ring round a blue-violet core, and int64 ``[13, 13]``: 0..3 for the place in
    ``QUARTERS`` of each filled cell, -1 outside the silhouette."""
    cells = torch.zeros(3, 13, 13, dtype=torch.uint8)
    row, column = torch.arange(13)[:, None], torch.arange(13)
    first, last = torch.tensor(_SILHOUETTE).T
    filled = (column >= first[:, None]) & (column <= last[:, None])
    quarter = torch.where(filled, 2 * (row >= _CUT).long() + (column >= _CUT).long(), -1)
    # A little above the middle: the lower quarters are too red on the mean to hold much of it.
    core = (row - 4.5) ** 2 + (column - 6.5) ** 2 < 9
    streaks = torch.cos(0.8 * row + 2 * math.pi / 5 * column)
    for number, name in enumerate(QUARTERS):
        mean, core_colour = torch.tensor(_FIREFOX_COLOURS[name], dtype=torch.float64)
        for channel in range(3):
            mine = quarter == number
            ring = mine & ~core
            held = int((mine & core).sum()) * core_colour[channel]
            colour = (mean[channel] * int(mine.sum()) - held) / int(ring.sum())
            wave = 16 * (streaks[ring] - streaks[ring].mean())
            cells[channel][mine & core] = core_colour[channel].to(torch.uint8)
            cells[channel][ring] = _with_sum_kept(colour + wave)
    return cells, quarter


def _with_sum_kept(values: Tensor) -> Tensor:
    """uint8 values within 1 of ``values``, whose sum is theirs, rounded: each carries the rest of those before it."""
    total = values.double().cumsum(0).round()
    return torch.cat([total[:1], total.diff()]).to(torch.uint8)
