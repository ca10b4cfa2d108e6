"""Triggers that networks make from the image: one network draws a pattern, another says where it shows.

Shape letters: B batch, H and W pixels of the image, S side at which the networks work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.triggers.pixels import to_uint8
from backdoor_bench.triggers.rows import uniform_of_rows
from backdoor_bench.types import Images

NORM_MOMENTUM = 0.05  # of the generators' batch norms, as in the authors' code
TINY = 1e-12  # keeps the gradient of a root finite where two images, masks or patterns are equal
PIXELS_CPU, PIXELS_GPU = 2**16, 2**21  # a network sees so many pixels at a time: 64 images of 32 px, or 2,048


def _conv(channels_in: int, channels_out: int, active: bool = True) -> list[nn.Module]:
    layers: list[nn.Module] = [
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),  # the norm has a bias
        nn.BatchNorm2d(channels_out, momentum=NORM_MOMENTUM),
    ]
    return [*layers, nn.ReLU()] if active else layers


class Generator(nn.Sequential):
    """Normalised images [B, 3, S, S] -> [B, ``channels``, S, S] in [0, 1]; S must be divisible by 2 ** ``stages``.

    ``stages`` times two convolutions and a halving, from ``width`` channels to twice as many a stage; a convolution;
    ``stages`` times a bilinear doubling and two convolutions. Source: Nguyen and Tran 2020, the authors' code.
    """

    def __init__(self, channels: int, width: int, stages: int) -> None:
        layers: list[nn.Module] = []
        widths = [width * 2**stage for stage in range(stages)]
        for before, after in zip([3, *widths], widths, strict=False):
            layers += [*_conv(before, after), *_conv(after, after), nn.MaxPool2d(2)]
        layers += _conv(widths[-1], widths[-1])
        for stage in reversed(range(stages)):
            layers += [
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
                *_conv(widths[stage], widths[stage]),
                *(_conv(widths[stage], widths[stage - 1]) if stage else _conv(widths[0], channels, active=False)),
            ]
        super().__init__(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).float().tanh() / 2 + 0.5


def working_side(wanted: int, image_size: int, multiple: int) -> int:
    """The largest multiple of ``multiple`` that neither ``wanted`` nor the image exceeds."""
    return min(wanted, image_size) // multiple * multiple


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Float ``[B, K, H, W]`` at another size, bilinear with smoothing where it shrinks."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True, align_corners=False)


class PatternAndMask(nn.Module):
    """Float images [B, 3, H, W] in [0, 1] -> those images with the trigger that the two generators make for each.

    The generators see the normalised image at ``side`` x ``side`` pixels; what they make is brought back to the size of
    the image, the pattern bilinearly, the nearly binary mask in cells.
    """

    def __init__(self, normalise: nn.Module, side: int, width: int, stages: int) -> None:
        super().__init__()
        self.normalise = normalise
        self.side = side
        self.pattern = Generator(3, width, stages)
        self.mask = Generator(1, width, stages)

    def patterns(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1]."""
        return resized(self.pattern(self._seen(images)), *images.shape[-2:])

    def masks(self, images: Tensor) -> Tensor:
        """[B, 1, H, W], nearly 0 or 1: a soft threshold at 0.5."""
        mask = (20 * self.mask(self._seen(images)) - 10).tanh() / 2 + 0.5
        return F.interpolate(mask, images.shape[-2:], mode="nearest")

    def _seen(self, images: Tensor) -> Tensor:
        seen: Tensor = self.normalise(resized(images, self.side, self.side))
        return seen

    def forward(self, images: Tensor, lenders: Tensor | None = None) -> Tensor:
        """lenders: whose triggers they get, default their own."""
        lenders = images if lenders is None else lenders
        return mixed(images, self.patterns(lenders), self.masks(lenders))


def mixed(images: Tensor, patterns: Tensor, masks: Tensor) -> Tensor:
    """``images`` with ``patterns`` shown as far as ``masks`` say; in pixels, which is the same as in normalised
    colours because normalising is affine."""
    return images + (patterns - images) * masks


def diversity(images: Tensor, others: Tensor, made: Tensor, made_of_others: Tensor) -> Tensor:
    """Mean over pairs of rms(image - other) / rms(what was made of them): low where unlike images get unlike triggers.

    All float [B, ...]; a scalar comes out. Source: Nguyen and Tran 2020.
    """
    return (_rms(images - others) / (_rms(made - made_of_others) + 1e-7)).mean()


def _rms(difference: Tensor) -> Tensor:
    return (difference.flatten(1).square().mean(1) + TINY).sqrt()


def through_network(network: Callable[..., Tensor], device: torch.device, *batches: Tensor) -> Tensor:
    """uint8 ``[B, 3, H, W]``: what ``network`` makes of ``batches`` (uint8, that shape), where the first one is.

    network: float batches in [0, 1] on ``device`` -> float in [0, 1]; truncated to uint8. It always gets the same
    number of images, filled up with black ones, because the last bits of a convolution depend on that number and a
    pixel must not depend on who else is stamped.
    """
    images = batches[0]
    result = torch.empty_like(images)
    room = PIXELS_CPU if device.type == "cpu" else PIXELS_GPU
    chunk = max(1, room // (images.shape[-2] * images.shape[-1]))
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for start in range(0, len(images), chunk):
            parts = [batch[start : start + chunk].to(device).float() / 255 for batch in batches]
            count = len(parts[0])
            filled = [F.pad(part, (0, 0, 0, 0, 0, 0, 0, chunk - count)) for part in parts]
            result[start : start + count] = to_uint8(network(*filled)[:count] * 255).to(images.device)
    return result


@dataclass(frozen=True, eq=False)
class OwnTrigger:
    """Stamps every image with the trigger that ``nets`` (in eval mode, on ``device``) make for it."""

    nets: PatternAndMask
    device: torch.device

    def __call__(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        return through_network(self.nets, self.device, images)


@dataclass(frozen=True, eq=False)
class BorrowedTrigger:
    """Stamps row i with the trigger of another row of ``lenders``, at random by ``seed``; ``index`` is needed.

    lenders: the set that the rows come from, so that a row never lends to itself.
    """

    nets: PatternAndMask
    device: torch.device
    lenders: Images
    seed: int

    def __call__(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        assert index is not None, "whose trigger is borrowed depends on the row"
        count = len(self.lenders)
        assert count > 1
        steps = (uniform_of_rows(self.seed, "iab lender", index, 1)[:, 0] * (count - 1)).long() + 1
        lenders = self.lenders[((index + steps) % count).cpu()].to(images.device)
        return through_network(self.nets, self.device, images, lenders)
