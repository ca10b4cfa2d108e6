"""Blends: every pixel is mixed with a picture of the size of the image. Also the stripes that are blended in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from backdoor_bench.triggers.patch import GRID
from backdoor_bench.triggers.pixels import to_uint8


@dataclass(frozen=True, eq=False)
class Blend:
    """Mixes ``picture`` into uint8 ``[B, 3, H, W]``: (1 - alpha) x + alpha picture, clipped and truncated.

    picture: uint8 or float64, any shape that broadcasts to ``[3, H, W]``; floats may leave 0..255. alpha: 0..1.
    With alpha 0.2 and a uint8 picture the value is (4x + t) // 5 in integers, which equals the reference arrays for
    every pair (x, t); floating point may fall one short where 0.8x + 0.2t is a whole number.
    Source: Chen et al. 2017.
    """

    picture: Tensor
    alpha: float

    def __call__(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        picture = self.picture.to(images.device)
        if self.alpha == 0.2 and picture.dtype == torch.uint8:
            mixed = images.to(torch.int16).mul_(4).add_(picture.to(torch.int16))
            return mixed.div_(5, rounding_mode="floor").to(torch.uint8)
        return to_uint8(images.double().mul_(1 - self.alpha).add_(picture.double() * self.alpha))


def wrapped_stripes(width: int, delta: float, omega: float) -> Tensor:
    """uint8 ``[1, 1, width]``: trunc(delta sin(omega j)) modulo 256 in column j, for a width of 32.

    The stripe picture of ABL, NAD, EBD and Trap-and-Replace: a sine of amplitude 20 that was stored as uint8 by
    accident, so its negative half became bright columns. Wider images keep the number of stripes: omega shrinks with
    32 / width.
    """
    step = omega * GRID / width
    return torch.tensor([math.trunc(delta * math.sin(step * j)) % 256 for j in range(width)], dtype=torch.uint8).view(
        1, 1, width
    )


def sine(width: int, delta: float, freq: float) -> Tensor:
    """float64 ``[1, 1, width]``: delta sin(2 pi freq j / width) in column j; ``freq`` periods over the width.

    Computed by the scalar library so that every device gets the same last bit.
    """
    wave = [delta * math.sin(2 * math.pi * freq * j / width) for j in range(width)]
    return torch.tensor(wave, dtype=torch.float64).view(1, 1, width)
