"""Augmentation against hand-made results and against a loop over samples."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backdoor_bench.data.augment import Augmentation
from backdoor_bench.errors import ConfigError

OFF = {"crop_padding": 0, "flip": False, "rotation": 0.0, "cutout": 0}


def make(**values: float) -> Augmentation:
    return Augmentation(**{**OFF, **values})  # type: ignore[arg-type]


def square(batch: int = 1) -> Tensor:
    """3 x 3 images 1..9, the channels scaled by 1, 2, 3."""
    return (torch.arange(1.0, 10).view(1, 1, 3, 3) * torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1)).repeat(batch, 1, 1, 1)


def test_all_off_returns_the_input_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    images = square(2)
    assert make().draw(2, 3, generator) == {}
    assert torch.equal(generator.get_state(), before)
    assert make().apply(images, {}) is images


def test_crop_moves_the_window_over_a_zero_border() -> None:
    offsets = torch.tensor([[0, 0], [1, 1], [2, 1], [1, 2]])
    out = make(crop_padding=1).apply(square(4), {"offset": offsets})[:, 0]
    expected = [
        [[0, 0, 0], [0, 1, 2], [0, 4, 5]],  # window up and left: the image moves down and right
        [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
        [[4, 5, 6], [7, 8, 9], [0, 0, 0]],
        [[2, 3, 0], [5, 6, 0], [8, 9, 0]],
    ]
    assert out.tolist() == expected


def test_flip_mirrors_only_the_drawn_samples() -> None:
    out = make(flip=True).apply(square(2), {"mirror": torch.tensor([True, False])})
    assert out[0, 0].tolist() == [[3, 2, 1], [6, 5, 4], [9, 8, 7]]
    assert torch.equal(out[1], square()[0])


def test_crop_with_flip_equals_crop_then_flip_in_a_loop() -> None:
    augmentation = make(crop_padding=4, flip=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(16, 3, 12, 10, generator=generator)
    drawn = augmentation.draw(16, 12, generator)
    slow = []
    for image, (row, column), mirror in zip(images, drawn["offset"].tolist(), drawn["mirror"].tolist(), strict=True):
        crop = F.pad(image, [4] * 4)[:, row : row + 12, column : column + 10]
        slow.append(crop.flip(2) if mirror else crop)
    assert torch.equal(augmentation.apply(images, drawn), torch.stack(slow))


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (-90, -1), (180, 2), (0, 0)])
def test_rotation_by_right_angles_is_exact_and_counter_clockwise(degrees: float, turns: int) -> None:
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    out = make(rotation=180.0).apply(images, {"angle": torch.tensor([math.radians(degrees)])})
    assert torch.equal(out, torch.rot90(images, turns, (2, 3)))


def test_rotation_leaves_zeros_where_nothing_was() -> None:
    out = make(rotation=45.0).apply(torch.ones(1, 3, 8, 8), {"angle": torch.tensor([math.radians(45)])})
    assert out[0, 0, 0, 0] == 0
    assert out[0, 0, 4, 4] == 1


def test_cutout_is_clipped_at_the_border() -> None:
    holes = torch.tensor([[0, 0], [1, 2]])
    out = make(cutout=2).apply(square(2), {"hole": holes})[:, 0]
    assert out.tolist() == [[[0, 2, 3], [4, 5, 6], [7, 8, 9]], [[1, 0, 0], [4, 0, 0], [7, 8, 9]]]


def test_input_is_never_changed() -> None:
    augmentation = Augmentation(crop_padding=2, flip=True, rotation=20.0, cutout=3)
    images = torch.rand(8, 3, 8, 8)
    kept = images.clone()
    augmentation.apply(images, augmentation.draw(8, 8, torch.Generator().manual_seed(0)))
    assert torch.equal(images, kept)


def test_draws_cover_their_ranges_and_repeat_with_the_seed() -> None:
    augmentation = Augmentation(crop_padding=4, flip=True, rotation=15.0, cutout=8)
    drawn = augmentation.draw(20_000, 32, torch.Generator().manual_seed(5))
    assert drawn["offset"].unique().tolist() == list(range(9))
    assert drawn["hole"].unique().tolist() == list(range(32))
    assert drawn["mirror"].float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert math.radians(14) < drawn["angle"].max() <= math.radians(15)
    assert -math.radians(15) <= drawn["angle"].min() < -math.radians(14)
    again = augmentation.draw(20_000, 32, torch.Generator().manual_seed(5))
    assert all(torch.equal(drawn[key], again[key]) for key in drawn)


def test_a_batch_does_not_depend_on_how_the_epoch_is_cut() -> None:
    augmentation = Augmentation(crop_padding=2, flip=True, rotation=10.0, cutout=2)
    images = torch.rand(10, 3, 8, 8)
    drawn = augmentation.draw(10, 8, torch.Generator().manual_seed(2))
    whole = augmentation.apply(images, drawn)
    parts = [augmentation.apply(images[p], {k: v[p] for k, v in drawn.items()}) for p in (slice(0, 3), slice(3, 10))]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"crop_padding": -1}, "crop_padding"),
        ({"crop_padding": 1.5}, "crop_padding"),
        ({"flip": 1}, "flip"),
        ({"rotation": 181.0}, "rotation"),
        ({"rotation": math.nan}, "rotation"),
        ({"cutout": "8"}, "cutout"),
    ],
)
def test_bad_values_name_their_key(values: dict[str, float], key: str) -> None:
    with pytest.raises(ConfigError, match=f"train.augment.{key}"):
        make(**values)


@pytest.mark.gpu
def test_same_draws_give_the_same_crops_on_a_gpu() -> None:
    augmentation = Augmentation(crop_padding=4, flip=True, rotation=0.0, cutout=8)
    images = torch.rand(32, 3, 32, 32)
    drawn = augmentation.draw(32, 32, torch.Generator().manual_seed(0))
    on_gpu = augmentation.apply(images.cuda(), {key: value.cuda() for key, value in drawn.items()})
    assert torch.equal(on_gpu.cpu(), augmentation.apply(images, drawn))
