"""Photo filters: one fixed map of colours for all images, as in the Instagram attack.

``1977`` and ``nashville`` follow the picture library step by step in integers, because it rounds after every step; the
other two are the formulas in floating point, rounded once. Values are within 1 and 2 grey levels of the library
(attacks.md A15; for ``gotham`` there is no reference).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from backdoor_bench.triggers.chunks import in_chunks

Matrix = tuple[tuple[float, float, float], ...]
DENOMINATOR = 10_000  # the entries of the matrices have four decimals
LUMA = (0.213, 0.715, 0.072)
SEPIA = ((0.393, 0.769, 0.189), (0.349, 0.686, 0.168), (0.272, 0.534, 0.131))


@dataclass(frozen=True)
class ColourFilter:
    """Maps the colour of every pixel of uint8 ``[B, 3, H, W]`` (RGB) by the filter ``name``, one of ``FILTERS``."""

    name: str

    def __call__(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        return in_chunks(FILTERS[self.name], images)


def _filter_1977(images: Tensor) -> Tensor:
    """Screen with pink at 30 %, contrast 1.1, brightness 1.1, saturation 1.3."""

    def tone(value: int, tint: int) -> int:
        screened = 255 - (255 - value) * (255 - tint) // 255
        mixed = 76 * screened // 255 + 179 * value // 255  # 76 of 255 is 30 %
        return _brightness(_contrast(mixed, 1.1), 1.1)

    return _mix_channels(_look_up(images, _table(tone, (243, 106, 188))), _saturation(1.3))


def _nashville(images: Tensor) -> Tensor:
    """Darken by peach at 56 %, lighten by blue at 40 %, sepia 0.2, contrast 1.2, brightness 1.05, saturation 1.2."""

    def tint(value: int, dark: int, light: int) -> int:
        value = 143 * min(value, dark) // 255 + 112 * value // 255
        return 102 * max(value, light) // 255 + 153 * value // 255

    def tone(value: int) -> int:
        return _brightness(_contrast(value, 1.2), 1.05)

    aged = _mix_channels(_look_up(images, _table(tint, (247, 176, 153), (0, 70, 150))), _sepia(0.2))
    return _mix_channels(_look_up(aged, _table(tone)), _saturation(1.2))


def _kelvin(images: Tensor) -> Tensor:
    """Colour dodge with a dark grey, then overlay with orange."""

    def tone(value: int, dodge: int, overlay: int) -> int:
        colour, shade = min(1.0, value / (255 - dodge)), overlay / 255
        colour = 2 * colour * shade if colour < 0.5 else 1 - 2 * (1 - colour) * (1 - shade)
        return int(255 * colour + 0.5)

    return _look_up(images, _table(tone, (56, 44, 52), (183, 125, 33)))


def _gotham(images: Tensor) -> Tensor:
    """Lightness x 1.2 and saturation x 0.1, 20 % of a dark blue, gamma 0.9, sigmoidal contrast 3 twice."""
    # Not divided: a GPU divides by a number as it multiplies by its reciprocal, a CPU does not.
    red, green, blue = images.float().mul_(1 / 255).unbind(1)
    lightness = (torch.maximum(torch.maximum(red, green), blue) + torch.minimum(torch.minimum(red, green), blue)) / 2
    lighter = (1.2 * lightness).clamp_(max=1)
    # At fixed hue a colour's distance from its lightness is its saturation times 1 - |2 L - 1|.
    reach = (1 - (2 * lightness - 1).abs()).clamp_(min=1e-6)
    scale = (1 - (2 * lighter - 1).abs()).mul_(0.1).div_(reach)
    curve = _gotham_curve().to(images.device)
    toned = torch.empty_like(images)
    for channel, (values, tint) in enumerate(zip((red, green, blue), (0x22, 0x2B, 0x6D), strict=True)):
        mixed = (lighter + (values - lightness) * scale).mul_(0.8).add_(0.2 * tint / 255).clamp_(0, 1)
        toned[:, channel] = _pick(curve, mixed.mul_(len(curve) - 1).add_(0.5))
    return toned


@cache
def _gotham_curve() -> Tensor:
    """uint8 ``[65536]``: gamma and contrast of the values 0..1, tabulated because the functions are slow."""
    curve = torch.linspace(0, 1, 2**16, dtype=torch.float64).pow(1 / 0.9)
    for _ in range(2):
        curve = _sigmoidal(curve, 3.0)
    return (curve * 255 + 0.5).to(torch.uint8)


FILTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "1977": _filter_1977,
    "nashville": _nashville,
    "kelvin": _kelvin,
    "gotham": _gotham,
}


def _brightness(value: int, gain: float) -> int:
    """``value`` times ``gain``, rounded, clipped.

    Many values lie half way between two integers; they go where double precision takes them in the library.
    """
    return min(255, max(0, round(value * gain)))


def _contrast(value: int, gain: float) -> int:
    """As ``_brightness``, but away from the middle, 127.5; the order of the terms decides the ties here too."""
    return min(255, max(0, round(value * gain - 127.5 * gain + 127.5)))


def _saturation(amount: float) -> Matrix:
    red, green, blue = LUMA
    rest = 1 - amount
    return (
        (red * rest + amount, green * rest, blue * rest),
        (red * rest, green * rest + amount, blue * rest),
        (red * rest, green * rest, blue * rest + amount),
    )


def _sepia(amount: float) -> Matrix:
    """``amount`` of the sepia matrix and the rest of the image itself."""
    (rr, rg, rb), (gr, gg, gb), (br, bg, bb) = SEPIA
    rest = 1 - amount
    return (
        (rr * amount + rest, rg * amount, rb * amount),
        (gr * amount, gg * amount + rest, gb * amount),
        (br * amount, bg * amount, bb * amount + rest),
    )


def _sigmoidal(colours: Tensor, steepness: float) -> Tensor:
    """An S curve round 0.5 that keeps 0 and 1; the usual definition of ImageMagick."""
    ends = torch.sigmoid(torch.tensor([-steepness / 2, steepness / 2], dtype=torch.float64)).tolist()
    return (torch.sigmoid(steepness * (colours - 0.5)) - ends[0]) / (ends[1] - ends[0])


def _table(tone: Callable[..., int], *colours: tuple[int, int, int]) -> Tensor:
    """uint8 ``[3, 256]``: what each value of each channel becomes; ``tone`` gets the value and that channel's tints."""
    rows = [[tone(value, *(colour[channel] for colour in colours)) for value in range(256)] for channel in range(3)]
    return torch.tensor(rows, dtype=torch.uint8)


def _look_up(images: Tensor, table: Tensor) -> Tensor:
    table = table.to(images.device)
    return torch.stack([_pick(table[channel], images[:, channel]) for channel in range(3)], dim=1)


def _pick(values: Tensor, places: Tensor) -> Tensor:
    """``values[places]``, in the form that is fast on a CPU."""
    return values.index_select(0, places.flatten().int()).view_as(places)


def _mix_channels(images: Tensor, matrix: Matrix) -> Tensor:
    """uint8 ``[B, 3, H, W]``: every pixel times ``matrix``, rounded to the nearest integer, clipped.

    Whole numbers all along, which float32 holds exactly: not a matrix product, because a GPU may shorten its factors.
    """
    channels = [images[:, channel].float() for channel in range(3)]
    mixed = torch.empty_like(images)
    for row, weights in enumerate(matrix):
        total = torch.full_like(channels[0], DENOMINATOR / 2)
        for channel, weight in zip(channels, weights, strict=True):
            total.add_(channel, alpha=round(weight * DENOMINATOR))
        mixed[:, row] = total.div_(DENOMINATOR).clamp_(0, 255)  # truncated by the cast
    return mixed
