"""Random crop, flip, rotation and cutout as batched tensor code; every sample has its own draw."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoor_bench.errors import ConfigError, check_range


@dataclass(frozen=True)
class Augmentation:
    """Augments batches; the four parts are applied in the order of the fields, each off at 0 (or false).

    crop_padding: zero pixels added on each side before a crop of the original size. flip: mirror left-right with
    probability 1/2. rotation: uniform in +-this many degrees about the centre, nearest pixel, zeros outside, as
    torchvision's RandomRotation by default. cutout: side in pixels of a square set to zero, its centre uniform over
    the image and the part beyond the border lost (DeVries and Taylor, 2017).

    An epoch's parameters come from one ``draw`` on the CPU, so that they do not depend on device or batch size.
    """

    crop_padding: int
    flip: bool
    rotation: float
    cutout: int

    def __post_init__(self) -> None:
        check_range("train.augment.crop_padding", self.crop_padding, 0, math.inf, integer=True)
        check_range("train.augment.rotation", self.rotation, 0, 180)
        check_range("train.augment.cutout", self.cutout, 0, math.inf, integer=True)
        if not isinstance(self.flip, bool):
            raise ConfigError(f"train.augment.flip={self.flip!r} is not allowed: it must be true or false")

    def draw(self, count: int, image_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Parameters of ``count`` samples, one row each; nothing is drawn for a part that is off.

        ``offset`` int64 [N, 2] (row, column of the crop in the padded image), ``mirror`` bool [N], ``angle`` float32
        [N] in radians, counter-clockwise, ``hole`` int64 [N, 2] (row, column of the cutout's centre).
        """
        parameters: dict[str, Tensor] = {}
        if self.crop_padding:
            parameters["offset"] = torch.randint(2 * self.crop_padding + 1, (count, 2), generator=generator)
        if self.flip:
            parameters["mirror"] = torch.randint(2, (count,), generator=generator).bool()
        if self.rotation:
            parameters["angle"] = (2 * torch.rand(count, generator=generator) - 1) * math.radians(self.rotation)
        if self.cutout:
            parameters["hole"] = torch.randint(image_size, (count, 2), generator=generator)
        return parameters

    def apply(self, images: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The augmented batch, a new tensor (the input itself when everything is off).

        images: float ``[B, 3, H, W]`` in [0, 1], same out; parameters: rows of ``draw`` on the same device.
        """
        if self.crop_padding or self.flip:
            images = self._crop_and_flip(images, parameters)
        if self.rotation:
            images = _rotate(images, parameters["angle"])
        if self.cutout:
            images = _cut_out(images, parameters["hole"], self.cutout)
        return images

    def _crop_and_flip(self, images: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Both in one gather: flipping the crop means to read its columns from right to left."""
        batch, channels, height, width = images.shape
        rows = torch.arange(height, device=images.device).expand(batch, height)
        columns = torch.arange(width, device=images.device).expand(batch, width)
        if self.flip:
            columns = torch.where(parameters["mirror"][:, None], columns.flip(1), columns)
        if self.crop_padding:
            images = F.pad(images, [self.crop_padding] * 4)
            rows = rows + parameters["offset"][:, :1]
            columns = columns + parameters["offset"][:, 1:]
        flat = rows[:, :, None] * images.shape[3] + columns[:, None, :]  # [B, H, W], the same for each channel
        flat = flat.view(batch, 1, height * width).expand(batch, channels, height * width)
        return images.flatten(2).gather(2, flat).view(batch, channels, height, width)


def _rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Images turned counter-clockwise by ``angle`` [B] radians about their centre."""
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    height, width = images.shape[2:]
    # grid_sample asks where each output pixel comes from: the inverse turn, in axes scaled to -1..1
    theta = torch.stack([cos, -sin * height / width, zero, sin * width / height, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta.to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _cut_out(images: Tensor, centre: Tensor, side: int) -> Tensor:
    """Images with a zero square of ``side`` pixels; rows centre - side // 2 up to that + side are covered."""
    height, width = images.shape[2:]
    row = torch.arange(height, device=images.device) - (centre[:, :1] - side // 2)
    column = torch.arange(width, device=images.device) - (centre[:, 1:] - side // 2)
    inside = ((row >= 0) & (row < side))[:, :, None] & ((column >= 0) & (column < side))[:, None, :]
    return images.masked_fill(inside[:, None], 0.0)
