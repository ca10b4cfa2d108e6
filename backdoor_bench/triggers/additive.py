"""Patterns that are added to the pixels: the Trojan patch, l2 noise, and what all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoor_bench.errors import ConfigError
from backdoor_bench.triggers.chunks import in_chunks
from backdoor_bench.triggers.patch import Patch
from backdoor_bench.triggers.pictures import picture

ADDITIONS = ("saturate", "wrap")
GENERATED = "generated"

# The 3x3 colour patch of ABL (its stored values, truncated): rows of (R, G, B).
ABL_TROJAN = (
    ((207, 131, 181), (175, 243, 120), (29, 232, 179)),
    ((79, 8, 126), (137, 0, 32), (248, 113, 146)),
    ((131, 40, 4), (6, 145, 61), (246, 250, 246)),
)


@dataclass(frozen=True, eq=False)
class Add:
    """Adds ``pattern`` (uint8 ``[3, h, w]``, first pixel at (top, left)) to uint8 ``[B, 3, H, W]``.

    add: ``saturate`` stops at 255; ``wrap`` takes the sum modulo 256, which is what a float above 255 becomes when it
    is cast before it is clipped (attacks.md 3.1).
    """

    pattern: Tensor
    add: str
    top: int = 0
    left: int = 0

    def __call__(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        height, width = self.pattern.shape[-2:]
        assert 0 <= self.top <= images.shape[-2] - height
        assert 0 <= self.left <= images.shape[-1] - width
        stamped = images.clone()
        below = stamped[..., self.top : self.top + height, self.left : self.left + width]
        pattern = self.pattern.to(images.device)
        # uint8 arithmetic is modulo 256 as it stands; the room that is left below 255 keeps the sum from wrapping.
        below.add_(pattern if self.add == "wrap" else torch.minimum(pattern, 255 - below))
        return stamped


@dataclass(frozen=True, eq=False)
class AddAndStretch:
    """Adds ``pattern`` (uint8 ``[3, H, W]``) to uint8 ``[B, 3, H, W]``, then stretches every image to 0..255.

    The smallest value over all channels of an image becomes 0, the largest 255, the rest follows linearly and is
    truncated; an image that has one value only is left as the sum, saturated. float32 holds the quotients well enough
    to truncate them as exact ones would be. Source: Trap-and-Replace's form of the frequency trigger.
    """

    pattern: Tensor

    def __call__(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        pattern = self.pattern.to(images.device)

        def stamp(some: Tensor) -> Tensor:
            total = some.to(torch.int16) + pattern
            lowest, highest = total.flatten(1).aminmax(dim=1)
            low, high = lowest.view(-1, 1, 1, 1), highest.view(-1, 1, 1, 1)
            stretched = (total - low).float().mul_(255).div_((high - low).clamp(min=1))
            return torch.where(high > low, stretched, total.clamp(max=255)).to(torch.uint8)

        return in_chunks(stamp, images)


def add_patch(patch: Patch, add: str) -> Add:
    """The opaque ``patch`` as one that is added at the same place."""
    return Add(patch.pattern, add, patch.top, patch.left)


def colour_cells(rows: Sequence[Sequence[tuple[int, int, int]]]) -> Tensor:
    """uint8 ``[3, h, w]`` from rows of (R, G, B)."""
    return torch.tensor(rows, dtype=torch.uint8).permute(2, 0, 1).contiguous()


def resized(pattern: Tensor, height: int, width: int) -> Tensor:
    """uint8 ``[3, height, width]``: a pattern (uint8 ``[3, h, w]``) at another size, bilinear, truncated."""
    if pattern.shape[-2:] == (height, width):
        return pattern
    size = (height, width)
    large = F.interpolate(pattern[None].double(), size, mode="bilinear", antialias=True, align_corners=False)
    return large[0].clamp(0, 255).to(torch.uint8)


def positive_noise(height: int, width: int, norm: float, peak: int, generator: torch.Generator) -> Tensor:
    """uint8 ``[3, height, width]``: Gaussian noise clipped to 0..``peak`` and truncated, different in every pixel.

    norm: the L2 norm on the [0, 1] scale that the noise would have on 32 x 32 pixels; larger images get the same value
    a pixel. The spread of the Gaussian is what gives that norm (21.5 for 3.22 and 68). Source: the l2 pattern of I-BAU
    and Trap-and-Replace, as a look-alike.
    """
    noise = torch.randn(3, height, width, generator=generator, dtype=torch.float64)
    wanted = norm_per_entry(norm)

    def scaled(spread: float) -> Tensor:
        return (noise * spread).clamp_(0, peak).floor_()

    low, high = 0.0, 1e6
    for _ in range(60):  # the norm grows with the spread
        middle = (low + high) / 2
        below = bool(scaled(middle).square().mean().sqrt() < wanted)
        low, high = (middle, high) if below else (low, middle)
    return scaled(high).to(torch.uint8)


def norm_per_entry(norm: float) -> float:
    """The root mean square (grey levels) of a 32 x 32 RGB pattern whose L2 norm on the [0, 1] scale is ``norm``."""
    return norm * 255 / float(3 * 32 * 32) ** 0.5


def check_asset(asset: object) -> None:
    """Raise ConfigError unless ``attack.asset`` is ``generated`` or the path of an existing file."""
    if asset != GENERATED and not is_file(asset):
        raise ConfigError(
            f"attack.asset={asset!r} is no file: give the path of a picture that is added to the images, or {GENERATED}"
        )


def is_file(asset: object) -> bool:
    """Whether a key's value is the path of an existing file."""
    return isinstance(asset, str) and Path(asset).is_file()


def added_picture(asset: str, height: int, width: int) -> Tensor:
    """uint8 ``[3, height, width]``: the file ``asset``, resized; black adds nothing. DataError if it is no picture."""
    return picture(asset, height, width, seed=0)
