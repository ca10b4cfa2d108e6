"""The random views of contrastive learning as batched tensor code: crop, flip, colour jitter, grayscale.

The semantics are those of torchvision's RandomResizedCrop, RandomHorizontalFlip, ColorJitter and RandomGrayscale, which
SimCLR (Chen et al., 2020), HobbitLong/SupContrast and SCLBD/Effective_backdoor_defense use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoor_bench.data.physical import GREY
from backdoor_bench.errors import check_range

RATIO = (3 / 4, 4 / 3)  # width over height of a crop: torchvision's default
TRIES = 10  # crops tried before the whole image is taken, as torchvision does


@dataclass(frozen=True)
class ViewDraw:
    """What was drawn for B images. box: int64 [4, B], top, left, height and width of the crop in pixels. mirrored,
    jittered, grey: bool [B]. factors: float32 [4, B], of brightness, contrast and saturation, and the shift of the hue
    in turns. order: in which the four are applied, 0 = brightness, 1 = contrast, 2 = saturation, 3 = hue."""

    box: Tensor
    mirrored: Tensor
    jittered: Tensor
    factors: Tensor
    grey: Tensor
    order: tuple[int, ...]


@dataclass(frozen=True)
class ViewAugmentation:
    """Float ``[B, 3, H, W]`` in [0, 1], CPU generator -> a new batch of the same shape; every image has its own draw.

    In this order: a crop of ``min_area`` to all of the area and 3/4 to 4/3 in shape, enlarged to H x W (bilinear);
    mirrored left-right with probability ``flip``; with probability ``jitter`` brightness, contrast and saturation times
    a factor within 1 +- their value and the hue turned by up to ``hue`` (in turns); grayscale with probability
    ``grey``. Works on any device.

    Deviations from torchvision, not selectable: the order of the four jitters is drawn once a batch instead of once an
    image, and nothing is rounded to 8 bits in between.
    """

    min_area: float
    flip: float
    jitter: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grey: float

    def __post_init__(self) -> None:
        check_range("defense.views.min_area", self.min_area, 0, 1, low_open=True)
        for name in ("flip", "jitter", "grey"):
            check_range(f"defense.views.{name}", getattr(self, name), 0, 1)
        for name in ("brightness", "contrast", "saturation"):
            check_range(f"defense.views.{name}", getattr(self, name), 0, math.inf, high_open=True)
        check_range("defense.views.hue", self.hue, 0, 0.5)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count, _, height, width = images.shape
        return render(images, self.draw(count, height, width, generator))

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> ViewDraw:
        """What ``count`` images of this size get, drawn on the CPU."""
        box = _draw_boxes(count, height, width, self.min_area, generator)
        chance = torch.rand(3, count, generator=generator)
        strength = torch.tensor([self.brightness, self.contrast, self.saturation, self.hue])[:, None]
        factors = (2 * torch.rand(4, count, generator=generator) - 1) * strength
        factors[:3] = (1 + factors[:3]).clamp(min=0)
        order = tuple(torch.randperm(4, generator=generator).tolist())
        return ViewDraw(box, chance[0] < self.flip, chance[1] < self.jitter, factors, chance[2] < self.grey, order)


def render(images: Tensor, draw: ViewDraw) -> Tensor:
    """The views that ``draw`` describes; images: float ``[B, 3, H, W]`` in [0, 1], same out."""
    device = images.device
    images = _crop(images, draw.box.to(device), draw.mirrored.to(device))
    jittered = images
    factors = draw.factors.to(device).view(4, -1, 1, 1, 1)
    for number in draw.order:
        jittered = _JITTERS[number](jittered, factors[number])
    images = torch.where(draw.jittered.to(device).view(-1, 1, 1, 1), jittered, images)
    return torch.where(draw.grey.to(device).view(-1, 1, 1, 1), _greyed(images), images)


def _draw_boxes(count: int, height: int, width: int, min_area: float, generator: torch.Generator) -> Tensor:
    """int64 [4, count]: for each image the first of ten random boxes that lies inside, else the largest central one."""
    uniform = torch.rand(4, TRIES, count, generator=generator)
    area = height * width * (min_area + (1 - min_area) * uniform[0])
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    root = (0.5 * (low + (high - low) * uniform[1])).exp()  # square root of the ratio
    high_and_wide = torch.stack([(area.sqrt() / root).round(), (area.sqrt() * root).round()]).long()
    sides = torch.tensor([height, width]).view(2, 1, 1)
    fits = ((high_and_wide >= 1) & (high_and_wide <= sides)).all(0)
    free = sides - high_and_wide
    corner = (uniform[2:] * (free + 1)).long().minimum(free)
    boxes = torch.cat([corner, high_and_wide])  # [4, TRIES, count]
    first = fits.int().argmax(0)
    chosen = boxes.gather(1, first.expand(4, 1, -1)).squeeze(1)
    tall, broad = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    whole = torch.tensor([(height - tall) // 2, (width - broad) // 2, tall, broad])[:, None]
    return torch.where(fits.any(0), chosen, whole)


def _crop(images: Tensor, box: Tensor, mirrored: Tensor) -> Tensor:
    """Each image's box, enlarged to the image's size and mirrored where asked; edges of the box are continued."""
    height, width = images.shape[-2:]
    top, left, tall, broad = box.to(images.dtype)
    rows, columns = _sources(height, top, tall), _sources(width, left, broad)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    # grid_sample counts from -1 to 1, columns first
    rows, columns = 2 * rows / (height - 1) - 1, 2 * columns / (width - 1) - 1
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=3)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True).clamp(0, 1)


def _sources(size: int, start: Tensor, length: Tensor) -> Tensor:
    """[B, size]: where in the image each pixel of an enlarged stretch comes from; pixel centres lie at whole numbers."""
    centres = torch.arange(size, device=start.device, dtype=start.dtype) + 0.5
    inside = (centres * (length / size)[:, None] - 0.5).clamp(min=0)
    return start[:, None] + inside.minimum(length[:, None] - 1)


def _greyed(images: Tensor) -> Tensor:
    """[B, 1, H, W]"""
    weights = torch.tensor(GREY, dtype=images.dtype, device=images.device).view(3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_greyed(images).mean((2, 3), keepdim=True), images, factor).clamp(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(_greyed(images), images, factor).clamp(0, 1)


def _hue(images: Tensor, turns: Tensor) -> Tensor:
    """Colours turned on the wheel; value and saturation stay (through HSV, without its gathers)."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    spread = value - images.amin(1)
    divisor = spread.masked_fill(spread == 0, 1)
    sixths = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sixths = sixths + 6 * turns.squeeze(1)
    channels = []
    for offset in (5, 3, 1):
        distance = (sixths + offset) % 6
        channels.append(value - spread * distance.minimum(4 - distance).clamp(0, 1))
    return torch.stack(channels, dim=1).clamp(0, 1)


_JITTERS = (_brightness, _contrast, _saturation, _hue)
