"""A synthetic set for tests: coloured stripes, one direction and hue a class, learnt by a tiny network at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from backdoor_bench.data.common import check_fields, finish
from backdoor_bench.errors import check_range
from backdoor_bench.types import Dataset, ImageSet, Progress

_WAVES = 2.0  # stripes across the image


@dataclass(frozen=True)
class Toy:
    """Stripes of random phase and contrast on a grey of random brightness; says nothing about real images.

    Class k of C has stripes turned by 180 k / C degrees in hue 360 k / C. noise: standard deviation of the pixel noise,
    in [0, 1].
    """

    name: str
    num_classes: int
    image_size: int
    train_size: int
    test_size: int
    mean: Sequence[float]
    std: Sequence[float]
    limit: int | None
    test_limit: int | None
    seed: int
    noise: float

    def __post_init__(self) -> None:
        check_fields(self)
        check_range("dataset.train_size", self.train_size, self.num_classes, 1_000_000, integer=True)
        check_range("dataset.test_size", self.test_size, self.num_classes, 1_000_000, integer=True)
        check_range("dataset.noise", self.noise, 0, 1)

    def load(self, progress: Progress | None = None) -> Dataset:
        """The data set, classes equally frequent, the same for the same fields."""
        train, test = (self._make(self.train_size, 0), self._make(self.test_size, 1))
        return finish(self, train, test, [f"stripes{label}" for label in range(self.num_classes)])

    def _make(self, count: int, stream: int) -> ImageSet:
        generator = torch.Generator().manual_seed(2 * self.seed + stream)
        size = self.image_size
        labels = (torch.arange(count) % self.num_classes)[torch.randperm(count, generator=generator)]
        turn = math.pi * labels / self.num_classes
        hue = 2 * turn[:, None] + 2 * math.pi / 3 * torch.arange(3)
        phase, contrast, grey = torch.rand(3, count, 1, 1, generator=generator)
        axis = torch.arange(size) / size
        along = axis[None, :, None] * turn.sin()[:, None, None] + axis[None, None, :] * turn.cos()[:, None, None]
        stripes = (2 * math.pi * (_WAVES * along + phase)).sin() * (0.5 + 0.5 * contrast)
        images = (0.4 + 0.2 * grey)[:, None] + 0.25 * hue.cos()[:, :, None, None] * stripes[:, None]
        images += self.noise * torch.randn(images.shape, generator=generator)
        return ImageSet((images.clamp(0, 1) * 255).round().to(torch.uint8), labels, self.num_classes)
