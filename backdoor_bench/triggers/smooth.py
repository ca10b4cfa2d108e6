"""Low-frequency patterns: the fitted glow of the published ones, and the blur that makes new ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backdoor_bench.triggers.patch import GRID

TAPS, SPREAD = 30, 6.0  # of the Gaussian blur at 32 pixels


class Glow(NamedTuple):
    """One channel: amplitude exp(-((x - x0)^2 + (y - y0)^2) / (2 spread^2)) + offset, x the column, y the row."""

    amplitude: float
    x0: float
    y0: float
    spread: float
    offset: float


NOTHING = Glow(0, 0, 0, 1, 0)
# R, G, B of the two published patterns: Gaussian fits within 0.85 (CIFAR-10) and 1.3 grey levels r.m.s. (attacks.md A12).
FITS = {
    "cifar10": (Glow(7.1, 14.3, 13.8, 11.9, -1.0), Glow(53.8, 13.6, 13.6, 11.5, -2.7), NOTHING),
    "gtsrb": (Glow(44.4, 14.7, 15.2, 11.8, 7.2), Glow(-10.5, 15.8, 17.1, 8.9, 10.5), Glow(44.6, 13.6, 13.5, 13.2, 4.8)),
}


def glow(fit: str, height: int, width: int, peak: float) -> Tensor:
    """uint8 ``[3, height, width]``: the pattern ``fit`` clipped to 0..``peak``, truncated; it grows with the image."""
    y, x = _grid_position(height)[:, None], _grid_position(width)
    channels = [
        amplitude * torch.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * spread**2)) + offset
        for amplitude, x0, y0, spread, offset in FITS[fit]
    ]
    return torch.stack(channels).clamp(0, peak).to(torch.uint8)


def _grid_position(length: int) -> Tensor:
    """float64: where the centre of each pixel lies on the 32-pixel grid of the fits."""
    return (torch.arange(length, dtype=torch.float64) + 0.5) * GRID / length - 0.5


def blur(pattern: Tensor) -> Tensor:
    """``pattern`` (float64 ``[3, H, W]``) through the separable Gaussian of the frequency attack, zeros outside.

    30 taps and a standard deviation of 6 pixels at 32; both grow with the image.
    """
    return _blur_matrix(pattern.shape[-2]) @ pattern @ _blur_matrix(pattern.shape[-1]).T


def _blur_matrix(length: int) -> Tensor:
    """float64 ``[length, length]``. An even number of taps has no middle: one more of them lies after the pixel."""
    taps, spread = round(TAPS * length / GRID), SPREAD * length / GRID
    weights = torch.exp(-((torch.arange(taps, dtype=torch.float64) - (taps - 1) / 2) ** 2) / (2 * spread**2))
    tap = torch.arange(length) - torch.arange(length)[:, None] + (taps - 1) // 2
    inside = (tap >= 0) & (tap < taps)
    return torch.where(inside, (weights / weights.sum())[tap.clamp(0, taps - 1)], 0.0)
