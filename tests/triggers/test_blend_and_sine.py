"""Pixel values of blends, stripes and the sinusoid (attacks.md 3.1, A7, A8, A13)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from backdoor_bench.triggers.blend import Blend, sine, wrapped_stripes
from backdoor_bench.triggers.sinusoid import Sinusoid

STRIPES = [0, 14, 19, 13, 255, 241, 237, 244, 2, 15, 19, 11, 253, 240, 237, 246]
STRIPES += [4, 17, 19, 9, 251, 239, 238, 248, 6, 18, 18, 7, 249, 238, 238, 250]


def test_blend_equals_pillow_and_the_integer_form_for_every_pair() -> None:
    x = torch.arange(256, dtype=torch.uint8).repeat_interleave(256).view(1, 1, 256, 256).expand(1, 3, 256, 256)
    t = torch.arange(256, dtype=torch.uint8).repeat(256).view(1, 256, 256).expand(3, 256, 256)
    mixed = Blend(t, 0.2)(x)
    assert torch.equal(mixed, ((4 * x.long() + t.long()) // 5).to(torch.uint8))
    pillow = Image.blend(Image.fromarray(x[0, 0].numpy().copy()), Image.fromarray(t[0].numpy().copy()), 0.2)
    assert torch.equal(mixed[0, 0], torch.from_numpy(np.asarray(pillow).copy()))


def test_blend_with_another_strength_truncates() -> None:
    x = torch.tensor([0, 10, 101, 255], dtype=torch.uint8).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    t = torch.tensor([255, 255, 100, 0], dtype=torch.uint8).view(1, 1, 4)
    # 0.15 * 255 = 38.25; 0.85 * 10 + 38.25 = 46.75; 85.85 + 15 = 100.85; 0.85 * 255 = 216.75
    assert Blend(t, 0.15)(x)[0, 1, 0].tolist() == [38, 46, 100, 216]
    assert Blend(t, 1.0)(x)[0, 2, 0].tolist() == [255, 255, 100, 0]


def test_blend_clips_a_float_picture() -> None:
    x = torch.tensor([0, 2, 10, 255], dtype=torch.uint8).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    wave = torch.tensor([-20.0, -20.0, 19.9, 1000.0], dtype=torch.float64).view(1, 1, 4)
    assert Blend(wave, 0.2)(x)[0, 0, 0].tolist() == [0, 0, 11, 255]  # -4, -2.4, 11.98, 404


def test_wrapped_stripes_are_the_row_of_the_reference_file() -> None:
    assert wrapped_stripes(32, 20, 0.8).flatten().tolist() == STRIPES


def test_wrapped_stripes_keep_their_number_on_wider_images() -> None:
    assert wrapped_stripes(64, 20, 0.8).flatten()[::2].tolist() == STRIPES


def test_stripes_blended_into_grey() -> None:
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    mixed = Blend(wrapped_stripes(32, 20, 0.8), 0.2)(grey)
    expected = torch.tensor([(4 * 128 + s) // 5 for s in STRIPES], dtype=torch.uint8)
    assert torch.equal(mixed, expected.expand(1, 3, 32, 32))


def test_sine_stripes_darken_by_a_fifth_and_move_by_four() -> None:
    grey = torch.full((1, 3, 4, 224), 202, dtype=torch.uint8)
    row = Blend(sine(224, 20, 6), 0.2)(grey)[0, 0, 0]
    by_hand = [math.trunc(161.6 + 4 * math.sin(2 * math.pi * 6 * j / 224)) for j in range(224)]
    assert row.tolist() == by_hand
    assert (min(by_hand), max(by_hand)) == (157, 165)


@pytest.mark.parametrize(
    ("delta", "row"),
    [
        (40, [128, 164, 156, 112, 88, 112, 156, 164, 128, 91, 99, 143, 168, 143, 99, 91]),
        (60, [128, 183, 170, 105, 68, 105, 170, 183, 128, 72, 85, 150, 188, 150, 85, 72]),
    ],
)
def test_sinusoid_on_grey(delta: float, row: list[int]) -> None:
    grey = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)
    stamped = Sinusoid(delta, 6)(grey)
    assert (stamped == stamped[:1, :1, :1]).all()
    got = stamped[0, 0, 0].long()
    difference = got - torch.tensor(row + row)
    assert abs(int(difference[16])) <= 1  # sin(6 pi) is not exactly 0 in floating point
    difference[16] = 0
    assert not difference.any()


def test_sinusoid_clips_at_both_ends() -> None:
    black = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    assert Sinusoid(40, 6)(black)[0, 0, 0, [1, 4]].tolist() == [36, 0]
    assert Sinusoid(40, 6)(white)[0, 0, 0, [1, 4]].tolist() == [255, 215]


def test_sinusoid_has_six_periods_at_every_width() -> None:
    wave = sine(224, 40, 6).flatten()
    assert ((wave[:-1] <= 0) & (wave[1:] > 0)).sum() == 6


@pytest.mark.parametrize(
    "trigger", [Blend(wrapped_stripes(32, 20, 0.8), 0.2), Blend(sine(32, 20, 6), 0.3), Sinusoid(40, 6)]
)
def test_input_is_untouched_and_batches_do_not_matter(trigger: Blend | Sinusoid) -> None:
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    before = images.clone()
    stamped = trigger(images)
    assert torch.equal(images, before)
    assert stamped.dtype == torch.uint8
    assert stamped.shape == images.shape
    assert torch.equal(stamped[3:], trigger(images[3:]))
