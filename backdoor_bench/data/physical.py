"""Flip, colour jitter and affine transform as a camera would cause them, drawn anew for every image and step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = (0.2989, 0.587, 0.114)  # torchvision's weights of R, G, B


@dataclass(frozen=True)
class PhysicalTransform:
    """Transforms float ``[B, 3, H, W]`` in [0, 1] to the same; every image has its own draw from the CPU generator.

    In this order: mirrored left-right with probability ``hflip``; brightness and contrast (in random order) times a
    factor within 1 +- ``jitter`` (two values); turned by up to ``degrees``, scaled within ``scale`` (two values) and
    shifted by up to ``translate`` of the side in whole pixels, by nearest pixel, black outside. The semantics are those
    of torchvision's RandomHorizontalFlip, ColorJitter and RandomAffine on tensors, as THUYimingLi/BackdoorBox uses
    them.
    """

    degrees: float
    translate: float
    scale: tuple[float, float]
    jitter: tuple[float, float]
    hflip: float

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        height, width = images.shape[-2:]
        draws = torch.rand(8, len(images), generator=generator).to(images.device)
        images = torch.where(_per_image(draws[0] < self.hflip), images.flip(-1), images)
        brightness, contrast = (
            _per_image((1 + (2 * draw - 1) * amount).clamp(min=0))
            for draw, amount in zip(draws[1:3], self.jitter, strict=True)
        )
        brighter_first = _per_image(draws[3] < 0.5)
        images = torch.where(
            brighter_first,
            _with_contrast(_with_brightness(images, brightness), contrast),
            _with_brightness(_with_contrast(images, contrast), brightness),
        )
        angle = math.radians(self.degrees) * (2 * draws[4] - 1)
        scale = self.scale[0] + (self.scale[1] - self.scale[0]) * draws[5]
        right = (self.translate * width * (2 * draws[6] - 1)).round()
        down = (self.translate * height * (2 * draws[7] - 1)).round()
        return affine(images, angle, scale, right, down)


def affine(images: Tensor, angle: Tensor, scale: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Images turned clockwise about their centre by ``angle`` radians, scaled, then shifted by pixels; parameters [B].

    Nearest pixel, zeros outside.
    """
    height, width = images.shape[-2:]
    # grid_sample asks where each output pixel comes from: the inverse map, in axes scaled to -1..1.
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack(
        [
            torch.stack([cos, sin * height / width, -2 / width * (cos * right + sin * down)], dim=1),
            torch.stack([-sin * width / height, cos, -2 / height * (cos * down - sin * right)], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta.to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _with_brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp(0, 1)


def _with_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Distances from the image's mean grey times ``factor``."""
    weights = torch.tensor(GREY, dtype=images.dtype, device=images.device).view(3, 1, 1)
    mean = (images * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    return (mean + factor * (images - mean)).clamp(0, 1)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
