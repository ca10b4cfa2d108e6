"""The embedded default: handwritten digits blended into photographs, made from what scikit-learn carries along.

MNIST-M's construction (Ganin et al., 2016, "Domain-adversarial training of neural networks", section 5.2): the absolute
difference of a digit and a random photo crop, a channel at a time. The digits are scikit-learn's 1,797 originals of
8 x 8 pixels, the crops come from its two photographs. Training and test images share neither originals nor photo
regions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backdoor_bench.data.common import check_fields, finish
from backdoor_bench.errors import ConfigError, check_range
from backdoor_bench.types import Dataset, ImageSet, Progress

_CLASSES = 10
_TEST_SHARE = 0.25  # of the originals of each class, and of the width of each photograph
_CHUNK = 1024  # samples made at once: bounds memory


@dataclass(frozen=True)
class PhotoDigits:
    """Any number of ``image_size``-pixel images of ten classes, equally frequent, the same for the same fields.

    rotation: uniform in +-this many degrees. digit_min, digit_max: side in pixels of the square the 8 x 8 original is
    enlarged to, uniform; it is placed anywhere it fits. contrast_min: strength of the digit, uniform from here to 1.
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
    rotation: float
    digit_min: float
    digit_max: float
    contrast_min: float

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_classes != _CLASSES:
            raise ConfigError(f"dataset.num_classes={self.num_classes} is not allowed: there are {_CLASSES} digits")
        check_range("dataset.image_size", self.image_size, 8, 96, integer=True)
        check_range("dataset.train_size", self.train_size, _CLASSES, 1_000_000, integer=True)
        check_range("dataset.test_size", self.test_size, _CLASSES, 1_000_000, integer=True)
        check_range("dataset.rotation", self.rotation, 0, 180)
        check_range("dataset.digit_max", self.digit_max, 4, self.image_size)
        check_range("dataset.digit_min", self.digit_min, 4, self.digit_max)
        check_range("dataset.contrast_min", self.contrast_min, 0.1, 1)

    def load(self, progress: Progress | None = None) -> Dataset:
        """The data set; nothing is read but what scikit-learn has installed."""
        from sklearn.datasets import load_digits, load_sample_images

        digits = load_digits()
        originals = torch.from_numpy(digits.images).float() / 16
        labels = torch.from_numpy(digits.target).long()
        photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
        border = int(photos.shape[3] * (1 - _TEST_SHARE))
        rows = split_originals(labels, self._generator(0))
        regions = (photos[..., :border], photos[..., border:])
        sizes = (self.train_size, self.test_size)
        train, test = (
            self._make(originals[rows[part]], labels[rows[part]], regions[part], sizes[part], self._generator(1 + part))
            for part in (0, 1)
        )
        return finish(self, train, test, [str(digit) for digit in range(_CLASSES)])

    def _generator(self, stream: int) -> torch.Generator:
        """Streams of their own, so that the size of one part does not change the other."""
        return torch.Generator().manual_seed(4 * self.seed + stream)

    def _make(
        self, originals: Tensor, labels: Tensor, region: Tensor, count: int, generator: torch.Generator
    ) -> ImageSet:
        wanted = (torch.arange(count) % _CLASSES)[torch.randperm(count, generator=generator)]
        chosen = torch.empty(count, dtype=torch.int64)
        for label in range(_CLASSES):
            mine, pool = wanted == label, (labels == label).nonzero().flatten()
            chosen[mine] = pool[torch.randint(len(pool), (int(mine.sum()),), generator=generator)]
        size, draws = self.image_size, torch.rand(count, 5, generator=generator)
        angle = (2 * draws[:, 0] - 1) * math.radians(self.rotation)
        side = self.digit_min + draws[:, 1] * (self.digit_max - self.digit_min)
        shift = (2 * draws[:, 2:4] - 1) * (1 - side / size)[:, None]  # in half image sizes, so that the square fits
        ink = 255 * (self.contrast_min + draws[:, 4] * (1 - self.contrast_min))
        height, width = region.shape[2:]
        ends = (len(region), height - size + 1, width - size + 1)
        corner = torch.stack([torch.randint(end, (count,), generator=generator) for end in ends])
        images = torch.empty(count, 3, size, size, dtype=torch.uint8)
        for part in torch.arange(count).split(_CHUNK):
            digit = _place(originals[chosen[part]], angle[part], side[part] / size, shift[part], size)
            blend = (_crop(region, corner[:, part], size) - ink[part, None, None, None] * digit).abs()
            images[part] = blend.round().to(torch.uint8)
        return ImageSet(images, wanted, _CLASSES)


def split_originals(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(training originals, test originals), int64 row numbers, disjoint; a quarter of each class is for the test."""
    train, test = [], []
    for digit in range(_CLASSES):
        rows = (labels == digit).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        held = round(len(rows) * _TEST_SHARE)
        test.append(rows[:held])
        train.append(rows[held:])
    return torch.cat(train), torch.cat(test)


def _place(originals: Tensor, angle: Tensor, scale: Tensor, shift: Tensor, size: int) -> Tensor:
    """float ``[B, 1, size, size]`` in [0, 1]: each 8 x 8 original turned clockwise by ``angle`` radians, ``scale`` of
    the image wide, its centre moved by ``shift`` [B, 2] (x, y in half image sizes)."""
    cos, sin = angle.cos() / scale, angle.sin() / scale
    x, y = shift[:, 0], shift[:, 1]
    # where in the original (-1..1) does an output pixel lie: undo the shift, then the turn, then the scale
    theta = torch.stack([cos, sin, -(cos * x + sin * y), -sin, cos, sin * x - cos * y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(originals), 1, size, size], align_corners=False)
    placed = F.grid_sample(originals[:, None], grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return placed.clamp(0, 1)


def _crop(region: Tensor, corner: Tensor, size: int) -> Tensor:
    """uint8 ``[B, 3, size, size]``: one crop of ``region`` [P, 3, H, W] a column (photo, top, left) of ``corner``."""
    photo, top, left = corner
    row = top[:, None] + torch.arange(size)
    column = left[:, None] + torch.arange(size)
    channel = torch.arange(3)[:, None, None]
    return region[photo[:, None, None, None], channel, row[:, None, :, None], column[:, None, None, :]]
