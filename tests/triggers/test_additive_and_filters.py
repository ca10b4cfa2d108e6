"""Pixel values of added patterns, the stretched glow and the photo filters (attacks.md A5, A6, A10-A12, A15)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from backdoor_bench.triggers.additive import (
    ABL_TROJAN,
    Add,
    AddAndStretch,
    add_patch,
    colour_cells,
    positive_noise,
    resized,
)
from backdoor_bench.triggers.chunks import CHUNK_VALUES
from backdoor_bench.triggers.filters import ColourFilter
from backdoor_bench.triggers.patch import corner_patch
from backdoor_bench.triggers.smooth import blur, glow
from backdoor_bench.triggers.watermark import watermark

Stamp = Callable[[Tensor], Tensor]


def trojan(add: str) -> Add:
    return add_patch(corner_patch(colour_cells(ABL_TROJAN), 32, 32, margin=4), add)


def noise(size: int = 32, seed: int = 0) -> Tensor:
    return positive_noise(size, size, 3.22, 68, torch.Generator().manual_seed(seed))


def grey(value: int, size: int = 32) -> Tensor:
    return torch.full((1, 3, size, size), value, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("add", "triples"),
    [
        ("wrap", [[79, 3, 53], [47, 115, 248], [157, 104, 51]]),
        ("saturate", [[255, 255, 255], [255, 255, 248], [157, 255, 255]]),
    ],
)
def test_trojan_patch_on_grey(add: str, triples: list[list[int]]) -> None:
    stamped = trojan(add)(grey(128))
    assert stamped[0, :, 25, 25:28].T.tolist() == triples
    changed = (stamped != 128).any(1)[0].nonzero()
    assert changed.min(0).values.tolist() == [25, 25]
    assert changed.max(0).values.tolist() == [27, 27]


def test_both_additions_of_every_pair() -> None:
    x = torch.arange(256, dtype=torch.uint8).repeat_interleave(256).view(1, 1, 256, 256).expand(1, 3, 256, 256)
    t = torch.arange(256, dtype=torch.uint8).repeat(256).view(1, 256, 256).expand(3, 256, 256)
    total = x.long() + t.long()
    assert torch.equal(Add(t, "wrap")(x).long(), total % 256)
    assert torch.equal(Add(t, "saturate")(x).long(), total.clamp(max=255))


def test_stretch_by_hand() -> None:
    pattern = torch.tensor([[[0, 10]], [[0, 20]], [[0, 5]]], dtype=torch.uint8)
    image = torch.tensor([[[100, 100]], [[50, 100]], [[90, 245]]], dtype=torch.uint8)
    # sums 100 110 | 50 120 | 90 250; lowest 50, highest 250: floor(255 (y - 50) / 200)
    stamped = AddAndStretch(pattern)(image[None])
    assert stamped[0].flatten().tolist() == [63, 76, 0, 89, 51, 255]


def test_stretch_truncates_every_quotient_exactly() -> None:
    for high in range(1, 256):  # the sums 0..high of one image become floor(255 y / high)
        image = torch.arange(256).clamp(max=high).to(torch.uint8).view(1, 1, 1, 256).expand(1, 3, 1, 256)
        stretched = AddAndStretch(torch.zeros(3, 1, 256, dtype=torch.uint8))(image)
        assert stretched[0, 0, 0, : high + 1].tolist() == [255 * value // high for value in range(high + 1)]


def test_image_of_one_value_is_not_stretched() -> None:
    flat = AddAndStretch(torch.full((3, 32, 32), 20, dtype=torch.uint8))
    assert (flat(grey(100)) == 120).all()
    assert (flat(grey(250)) == 255).all()


def test_watermark_statistics() -> None:
    mark = watermark(32, 32)
    brightness = mark.double().mean(0)
    bright = brightness > 64
    assert 300 <= int((mark > 0).any(0).sum()) <= 340  # the original: 321
    assert 75 <= int((brightness > 32).sum()) <= 90  # 81
    assert 52 <= int(bright.sum()) <= 62  # 57
    assert (mark[:, bright].double().mean(1) - torch.tensor([166.0, 120, 134])).abs().max() < 15
    assert abs(float(mark.double().mean()) - 9.6) < 0.7
    assert int(mark.max()) >= 250
    rings = bright.nonzero()
    assert rings.min(0).values.tolist() == [16, 15]
    assert rings.max(0).values.tolist() == [27, 27]
    assert brightness[21, 21] < 32  # open in the middle
    assert all(mark[:, row, round(28 - (row - 1) * 28 / 27)].any() for row in range(1, 29))  # the diagonal


@pytest.mark.parametrize("size", [16, 64, 224])
def test_watermark_keeps_its_mean_at_other_sizes(size: int) -> None:
    assert abs(float(watermark(size, size).double().mean()) - 9.6) < 1.2


def test_l2_noise_statistics() -> None:
    pattern = noise().double()
    assert abs(float(pattern.norm()) / 255 - 3.22) < 0.01
    assert 60 <= float(pattern.max()) <= 68
    assert abs(float(pattern.mean()) - 9.0) < 1
    assert abs(float(pattern.std()) - 11.8) < 1
    # The original: 57 % non-zero; Gaussian noise has half, less what truncation takes.
    assert 0.44 < float((pattern > 0).double().mean()) < 0.6
    centred = pattern - pattern.mean((1, 2), keepdim=True)
    energy = torch.fft.fft2(centred).abs().square().sum(0)
    lowest = torch.roll(energy, (4, 4), (0, 1))[:9, :9].sum() / energy.sum()
    assert lowest < 0.15
    assert not torch.equal(pattern, noise(seed=1).double())


def test_l2_noise_is_as_strong_a_pixel_on_larger_images() -> None:
    assert abs(float(noise(96).double().norm()) / 255 - 3 * 3.22) < 0.03


def test_norm_and_peak_are_those_asked_for() -> None:
    pattern = positive_noise(32, 32, 1.0, 20, torch.Generator().manual_seed(0)).double()
    assert abs(float(pattern.norm()) / 255 - 1) < 0.01
    assert float(pattern.max()) <= 20


def test_glow_by_hand() -> None:
    pattern = glow("cifar10", 32, 32, 51)
    assert not pattern[2].any()
    assert int(pattern[1].max()) == 51
    for row, column in ((0, 0), (31, 31), (5, 20)):
        reach = math.exp(-((column - 13.6) ** 2 + (row - 13.6) ** 2) / (2 * 11.5**2))
        assert int(pattern[1, row, column]) == max(0, int(53.8 * reach - 2.7))
        reach = math.exp(-((column - 14.3) ** 2 + (row - 13.8) ** 2) / (2 * 11.9**2))
        assert int(pattern[0, row, column]) == max(0, int(7.1 * reach - 1))
    magenta = glow("gtsrb", 32, 32, 51)
    assert magenta[:, 15, 15].tolist() == [51, 0, 48]  # 51.59, 10.5 - 10.5 reach = 0.33, 49.4 reach = 48.99
    assert int(glow("gtsrb", 32, 32, 30).max()) == 30


def test_glow_grows_with_the_image() -> None:
    small, large = glow("gtsrb", 32, 32, 51).double(), glow("gtsrb", 96, 96, 51).double()
    assert torch.equal(small, large[:, 1::3, 1::3])  # the middles of the cells
    assert glow("gtsrb", 16, 24, 51).shape == (3, 16, 24)


def test_blur_of_a_point_is_a_gaussian_with_one_more_tap_after_it() -> None:
    point = torch.zeros(3, 64, 64, dtype=torch.float64)
    point[1, 32, 40] = 1
    blurred = blur(point)
    assert not blurred[0].any()
    weights = [math.exp(-((tap - 29.5) ** 2) / (2 * 12**2)) for tap in range(60)]  # twice 30 taps, twice 6 pixels
    total = sum(weights)
    # Output i sees input i + k - 29 with weight k: the point at 32 is tap 32 - i + 29.
    for i in (3, 31, 32, 61):
        expected = weights[32 - i + 29] / total * weights[40 - 41 + 29] / total
        assert abs(float(blurred[1, i, 41]) - expected) < 1e-12
    assert not blurred[1, 62:].any()
    assert not blurred[1, :2].any()


def test_repeated_blur_makes_the_published_glow() -> None:
    pattern = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(100):
        pattern = blur(pattern)
        pattern /= pattern.max()
    published = (glow("cifar10", 32, 32, 255)[1].double() + 2.7) / 53.8
    assert (pattern[0] / pattern[0].max() - published).abs().mean() < 0.06


@pytest.mark.parametrize(
    ("name", "tolerance", "colours"),
    [
        (
            "1977",
            1,
            {
                (0, 0, 0): (84, 19, 59),
                (128, 128, 128): (190, 155, 177),
                (255, 255, 255): (255, 255, 255),
                (200, 50, 50): (255, 66, 97),
                (50, 120, 200): (107, 151, 255),
            },
        ),
        (
            "nashville",
            1,
            {
                (0, 0, 0): (0, 8, 46),
                (128, 128, 128): (144, 139, 141),
                (200, 50, 50): (231, 54, 84),
                (50, 120, 200): (47, 126, 181),
            },
        ),
        ("kelvin", 2, {(128, 128, 128): (204, 153, 90), (200, 50, 50): (255, 58, 16)}),
    ],
)
def test_filter_colours(name: str, tolerance: int, colours: dict[tuple[int, int, int], tuple[int, int, int]]) -> None:
    images = torch.tensor(list(colours), dtype=torch.uint8).T.reshape(1, 3, 1, -1)
    got = ColourFilter(name)(images)[0, :, 0].T.long()
    assert (got - torch.tensor(list(colours.values()))).abs().max() <= tolerance


def test_1977_is_near_its_formula_in_floating_point() -> None:
    images = torch.randint(0, 256, (1, 3, 50, 50), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    c = images.double() / 255
    s = torch.tensor([243.0, 106, 188], dtype=torch.float64).view(3, 1, 1) / 255
    c = (0.7 * c + 0.3 * (c + s - c * s)).clamp(0, 1)
    c = (1.1 * (c - 0.5) + 0.5).clamp(0, 1)
    c = (1.1 * c).clamp(0, 1)
    luma = (0.213 * c[:, :1] + 0.715 * c[:, 1:2] + 0.072 * c[:, 2:]).expand_as(c)
    c = (luma + 1.3 * (c - luma)).clamp(0, 1)
    difference = (ColourFilter("1977")(images).double() - (255 * c).round()).abs()
    assert difference.max() <= 4
    assert difference.mean() < 1.1


def test_gotham_by_hand() -> None:
    def curve(value: float) -> int:
        value = value ** (1 / 0.9)
        for _ in range(2):
            low, high = 1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(-1.5))
            value = (1 / (1 + math.exp(-3 * (value - 0.5))) - low) / (high - low)
        return int(255 * value + 0.5)

    def by_hand(colours: tuple[float, float, float]) -> list[int]:
        return [curve(0.8 * c + 0.2 * t / 255) for c, t in zip(colours, (0x22, 0x2B, 0x6D), strict=True)]

    # (204, 51, 51) has hue 0, lightness 0.5, saturation 0.6; then lightness 0.6, saturation 0.06, chroma 0.048.
    images = torch.tensor([(0, 0, 0), (100, 100, 100), (255, 255, 255), (204, 51, 51)], dtype=torch.uint8)
    got = ColourFilter("gotham")(images.T.reshape(1, 3, 1, 4))[0, :, 0].T.tolist()
    expected = [(0.0,) * 3, (1.2 * 100 / 255,) * 3, (1.0,) * 3, (0.624, 0.576, 0.576)]
    assert got == [by_hand((r, g, b)) for r, g, b in expected]


def test_gotham_does_not_divide_by_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    close_calls = [(98, 242, 231), (103, 237, 231), (109, 112, 231), (109, 135, 231)]  # the last bit decides
    images = torch.tensor(close_calls, dtype=torch.uint8).T.reshape(1, 3, 1, 4)
    expected = ColourFilter("gotham")(images)
    divide = Tensor.div_

    def as_a_gpu_does(tensor: Tensor, by: Tensor | float) -> Tensor:
        return divide(tensor, by) if isinstance(by, Tensor) else tensor.mul_(1 / by)

    monkeypatch.setattr(Tensor, "div_", as_a_gpu_does)
    assert torch.equal(ColourFilter("gotham")(images), expected)


def test_resized_patterns() -> None:
    cells = torch.tensor([0, 100], dtype=torch.uint8).view(1, 1, 2).expand(3, 2, 2)
    assert resized(cells, 4, 4)[0, 0].tolist() == [0, 25, 75, 100]
    assert torch.equal(resized(cells, 2, 2), cells)


@pytest.mark.parametrize(
    "trigger",
    [
        trojan("wrap"),
        trojan("saturate"),
        Add(noise(), "saturate"),
        AddAndStretch(glow("gtsrb", 32, 32, 51)),
        *[ColourFilter(name) for name in ("1977", "nashville", "kelvin", "gotham")],
    ],
)
def test_input_is_untouched_and_batches_do_not_matter(trigger: Stamp) -> None:
    count = CHUNK_VALUES // (3 * 32 * 32) + 3  # more than is stamped at a time
    pixels = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=pixels, dtype=torch.uint8)
    before = images.clone()
    stamped = trigger(images)
    assert torch.equal(images, before)
    assert stamped.dtype == torch.uint8
    assert stamped.shape == images.shape
    assert torch.equal(stamped.flip(0), trigger(images.flip(0)))
    assert torch.equal(stamped[-2:], trigger(images[-2:]))
    assert len(trigger(images[:0])) == 0
    assert (stamped != images).flatten(1).any(1).all()
