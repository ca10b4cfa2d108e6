"""The six image transformations of EBD, and compositions of them, on uint8 batches.

Each gives what torchvision's transform of that name gives with the same parameters, on the uint8 image (EBD sec. 3.1;
SCLBD/Effective_backdoor_defense:utils/dataloader_bd.py): nearest pixels, black outside. The parameters of a row are
hashes of seed and row number, so that they do not depend on batches, on the device or on what else was drawn. There,
``erase`` as the last step leaves its noise unbounded; here it is clipped to pixels always (not selectable).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoor_bench.data.augment import Augmentation
from backdoor_bench.triggers.rows import uniform_of_rows
from backdoor_bench.types import Images

# How many -> float64 [B, so many] in [0, 1), a row for each image.
Draw = Callable[[int], Tensor]

DEGREES = 180.0
SHIFT = 0.2  # of width and height
CROP_PADDING = 4
BLUR_KERNEL, BLUR_SIGMA = 15, (0.1, 2.0)
ERASE_AREA, ERASE_RATIO = (0.2, 0.3), 0.5  # height / width from ERASE_RATIO to 1


def rotate(images: Tensor, draw: Draw) -> Tensor:
    """Turned counter-clockwise about the centre by an angle uniform in +-180 degrees."""
    angle = (2 * draw(1)[:, 0] - 1) * math.radians(DEGREES)
    turned = Augmentation(0, False, DEGREES, 0).apply(images.float(), {"angle": angle.float()})
    return turned.to(torch.uint8)


def affine(images: Tensor, draw: Draw) -> Tensor:
    """Moved by up to 20 % of width and height, rounded to whole pixels; no rotation, no scaling."""
    size = torch.tensor(images.shape[2:], device=images.device)
    shift = ((2 * draw(2) - 1) * SHIFT * size).round().to(torch.int64)  # (down, right)
    margin = math.ceil(SHIFT * max(images.shape[2:]))
    return Augmentation(margin, False, 0.0, 0).apply(images, {"offset": margin - shift})


def flip(images: Tensor, draw: Draw) -> Tensor:
    """Mirrored left-right, always."""
    return images.flip(3)


def crop(images: Tensor, draw: Draw) -> Tensor:
    """A window of the original size, uniform in the image with 4 black pixels on each side."""
    offset = (draw(2) * (2 * CROP_PADDING + 1)).to(torch.int64)
    return Augmentation(CROP_PADDING, False, 0.0, 0).apply(images, {"offset": offset})


def blur(images: Tensor, draw: Draw) -> Tensor:
    """Convolved with a Gaussian of 15 x 15 pixels, its sigma uniform in (0.1, 2); mirrored at the border."""
    low, high = BLUR_SIGMA
    sigma = low + (high - low) * draw(1).float()  # [B, 1]
    half = BLUR_KERNEL // 2
    taps = torch.arange(-half, half + 1, device=images.device)
    weights = (-0.5 * (taps / sigma).square()).exp()
    weights = (weights / weights.sum(1, keepdim=True)).T[:, :, None, None, None]  # [15, B, 1, 1, 1]
    values = images.float()
    for axis, padding in ((2, (0, 0, half, half)), (3, (half, half, 0, 0))):
        padded, size = F.pad(values, padding, mode="reflect"), images.shape[axis]
        values = torch.zeros_like(values)
        for tap, weight in enumerate(weights):
            values += weight * padded.narrow(axis, tap, size)
    return values.round_().clamp_(0, 255).to(torch.uint8)


def erase(images: Tensor, draw: Draw) -> Tensor:
    """With a rectangle of 20-30 % of the area, height / width log-uniform in 0.5-1, full of standard normal noise.

    The noise is in units of 255, one value a pixel and channel, clipped to 0..255. The image must be about square.
    """
    channels, height, width = images.shape[1:]
    numbers = draw(4 + channels * height * width)
    low, high = ERASE_AREA
    area = (low + (high - low) * numbers[:, 0]) * height * width
    ratio = ERASE_RATIO ** (1 - numbers[:, 1])
    inside = torch.ones((), dtype=torch.bool, device=images.device)
    for axis, (extent, place, size) in enumerate([(area * ratio, 2, height), (area / ratio, 3, width)]):
        length = extent.sqrt().round()
        start = (numbers[:, place] * (size - length + 1)).floor()
        pixel = torch.arange(size, device=images.device)
        covered = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
        inside = inside & (covered[:, None, :, None] if axis == 0 else covered[:, None, None, :])
    noise = torch.special.ndtri(numbers[:, 4:]).mul_(255).round_().clamp_(0, 255)
    return torch.where(inside, noise.view_as(images).to(torch.uint8), images)


TRANSFORMS: dict[str, Callable[[Tensor, Draw], Tensor]] = {
    "rotate": rotate,
    "affine": affine,
    "flip": flip,
    "crop": crop,
    "blur": blur,
    "erase": erase,
}


@dataclass(frozen=True)
class Composition:
    """The transformations ``names`` one after the other, drawn from ``seed``: (images, row numbers) -> new images.

    images: uint8 ``[B, 3, H, W]``, same out; index: int64 [B] on the same device.
    """

    names: Sequence[str]
    seed: int

    def __call__(self, images: Tensor, index: Tensor) -> Tensor:
        for place, name in enumerate(self.names):
            images = TRANSFORMS[name](images, functools.partial(uniform_of_rows, self.seed, f"{place} {name}", index))
        return images


class Transformed:
    """types.Images whose rows are transformed as they are read; index it with a slice or an int64 tensor."""

    def __init__(self, images: Images, transform: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._images = images
        self._transform = transform
        self._rows = torch.arange(len(images))

    @property
    def shape(self) -> torch.Size:
        return self._images.shape

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: Any) -> Tensor:
        images = self._images[index]
        rows = self._rows[index.cpu() if isinstance(index, Tensor) else index]
        return self._transform(images, rows.to(images.device))
