"""Where patches lie and what they look like (attacks.md A0 geometry table, A2-A4)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backdoor_bench.triggers.patch import corner_patch, grey_cells, top_left_checker, white_cells, white_tenth

CHECKER = [[0, 0, 255], [0, 255, 0], [255, 0, 255]]


def grey(height: int, width: int | None = None, value: int = 100) -> Tensor:
    return torch.full((2, 3, height, width or height), value, dtype=torch.uint8)


def changed_box(before: Tensor, after: Tensor) -> tuple[int, int, int, int]:
    """First and last changed row and column."""
    changed = (before != after).any(0).any(0).nonzero()
    (top, left), (bottom, right) = changed.min(0).values.tolist(), changed.max(0).values.tolist()
    return top, bottom, left, right


def test_checker_overwrites_the_last_three_rows_and_columns() -> None:
    images = grey(32)
    stamped = corner_patch(grey_cells(CHECKER), 32, 32)(images)
    expected = grey(32)
    expected[:, :, 29:, 29:] = torch.tensor(CHECKER, dtype=torch.uint8)
    assert torch.equal(stamped, expected)
    assert stamped.dtype == torch.uint8
    assert torch.equal(images, grey(32))


@pytest.mark.parametrize(
    ("side", "margin", "size", "first", "last"),
    [
        (3, 0, 32, 29, 31),
        (3, 0, 64, 58, 63),
        (3, 0, 160, 145, 159),
        (3, 0, 224, 203, 223),
        (3, 1, 32, 28, 30),
        (3, 1, 64, 56, 61),
        (3, 1, 160, 140, 154),
        (3, 1, 224, 196, 216),
        (4, 1, 32, 27, 30),
        (4, 1, 64, 54, 61),
        (4, 1, 160, 135, 154),
        (4, 1, 224, 189, 216),
        (3, 4, 32, 25, 27),
        (3, 4, 64, 50, 55),
        (3, 4, 160, 125, 139),
        (3, 4, 224, 175, 195),
        (3, 0, 16, 13, 15),  # below 32 a cell stays one pixel
        (3, 1, 8, 4, 6),
    ],
)
def test_geometry_table(side: int, margin: int, size: int, first: int, last: int) -> None:
    images = grey(size)
    stamped = corner_patch(white_cells(side), size, size, margin=margin)(images)
    assert changed_box(images, stamped) == (first, last, first, last)
    assert (stamped[:, :, first : last + 1, first : last + 1] == 255).all()


@pytest.mark.parametrize(
    ("size", "rows", "columns"), [(32, (1, 13), (18, 30)), (64, (2, 27), (36, 61)), (224, (7, 97), (126, 216))]
)
def test_top_right_corner(size: int, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    images = grey(size)
    stamped = corner_patch(white_cells(13), size, size, margin=1, corner="top_right")(images)
    assert changed_box(images, stamped) == (*rows, *columns)


def test_enlarged_checker_has_blocks_of_seven_pixels() -> None:
    stamped = corner_patch(grey_cells(CHECKER), 224, 224)(grey(224))
    blocks = stamped[0, 0, 203:, 203:].reshape(3, 7, 3, 7).permute(0, 2, 1, 3).flatten(2)
    assert (blocks == torch.tensor(CHECKER)[..., None]).all()


def test_without_scaling_the_patch_keeps_its_pixels() -> None:
    images = grey(224)
    assert changed_box(images, corner_patch(white_cells(3), 224, 224, scale=False)(images)) == (221, 223, 221, 223)


def test_sizes_that_32_does_not_divide_stay_flush() -> None:
    images = grey(48, 80)
    top, bottom, left, right = changed_box(images, corner_patch(white_cells(3), 48, 80)(images))
    assert (bottom, right) == (47, 79)
    assert (top, left) == (44, 73)  # first pixel whose cell, floor(i * 32 / 48) or floor(i * 32 / 80), is 29


def test_colour_cells() -> None:
    cells = torch.arange(27, dtype=torch.uint8).view(3, 3, 3)
    stamped = corner_patch(cells, 32, 32, margin=4)(grey(32))
    assert torch.equal(stamped[0, :, 25:28, 25:28], cells)


def test_white_tenth_is_22_pixels_at_224() -> None:
    images = grey(224)
    stamped = white_tenth(224, 224)(images)
    assert changed_box(images, stamped) == (202, 223, 202, 223)
    assert (stamped[:, :, 202:, 202:] == 255).all()


def test_top_left_checker_at_256() -> None:
    images = grey(256)
    stamped = top_left_checker(256, 256)(images)
    assert changed_box(images, stamped) == (32, 61, 32, 61)
    centres = stamped[0, 0, 37:62:10, 37:62:10]
    assert centres.tolist() == [[255, 0, 255], [0, 255, 0], [255, 0, 0]]
    assert stamped[0, 0, 32, 41] == 255
    assert stamped[0, 0, 32, 42] == 0


def test_any_row_subset_gives_the_same_pixels() -> None:
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    patch = corner_patch(grey_cells(CHECKER), 32, 32)
    assert torch.equal(patch(images)[2:5], patch(images[2:5]))
