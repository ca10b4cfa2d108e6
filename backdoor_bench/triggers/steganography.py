"""A network that hides a bit string in a picture, another that reads it, and the trigger made of the first.

StegaStamp's architecture (Tancik et al. 2020) as ISSBA uses it. Shape letters: B batch, S side at which the networks
work, N bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.triggers.generators import resized, through_network

CELLS = 16  # a side of the picture that the bits become
HALVINGS = 4
MULTIPLE = 2**HALVINGS  # S must be divisible by it


class Encoder(nn.Module):
    """Images float [B, 3, S, S] in [0, 1] and bits float [B, N] of 0 and 1 -> residual [B, 3, S, S], to be added.

    The bits become a picture of 16 x 16 cells, enlarged to S, beside the image; a U-Net makes the residual.
    """

    def __init__(self, bits: int, side: int) -> None:
        super().__init__()
        assert side % MULTIPLE == 0
        self.side = side
        self.plane = nn.Linear(bits, 3 * CELLS**2)
        widths = (32, 32, 64, 128, 256)
        self.down = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=1 if level == 0 else 2, padding=1)
            for level, (before, after) in enumerate(zip((6, *widths), widths, strict=False))
        )
        rising = (128, 64, 32, 32)
        self.up = nn.ModuleList(
            nn.Conv2d(before, after, 2) for before, after in zip((256, *rising), rising, strict=False)
        )
        # Each reads the doubled maps and the skip; the last one the six input channels too.
        self.join = nn.ModuleList(
            nn.Conv2d(after + skip + (6 if level == HALVINGS - 1 else 0), after, 3, padding=1)
            for level, (after, skip) in enumerate(zip(rising, widths[-2::-1], strict=True))
        )
        self.residual = nn.Conv2d(rising[-1], 3, 1)

    def forward(self, images: Tensor, bits: Tensor) -> Tensor:
        plane = self.plane(bits - 0.5).relu().view(-1, 3, CELLS, CELLS)
        plane = F.interpolate(plane, (self.side, self.side), mode="nearest")
        inputs = torch.cat([plane, images - 0.5], dim=1)
        maps, skips = inputs, []
        for down in self.down:
            maps = down(maps).relu()
            skips.append(maps)
        skips[0] = torch.cat([skips[0], inputs], dim=1)
        for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
            doubled = F.interpolate(maps, scale_factor=2.0, mode="nearest")
            maps = up(F.pad(doubled, (0, 1, 0, 1))).relu()  # a 2x2 kernel keeps the size with a row and a column more
            maps = join(torch.cat([skip, maps], dim=1)).relu()
        out: Tensor = self.residual(maps)
        return out


class Decoder(nn.Sequential):
    """Images float [B, 3, S, S] in [0, 1] -> logits [B, N] of the bits."""

    def __init__(self, bits: int, side: int) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for width, stride in ((32, 2), (32, 1), (64, 2), (64, 1), (64, 2), (128, 2), (128, 2)):
            layers += [nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.ReLU()]
            channels = width
        smallest = -(-side // 2**5)
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels * smallest**2, 512), nn.ReLU(), nn.Linear(512, bits))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images - 0.5)


class Steganography(nn.Module):
    """Encoder and decoder with the state of their training: ``steps`` since the decoder could read.

    steps travels in the weights so that a training that is resumed goes on with the same weight of the residual. The
    weights start as StegaStamp's do (He normal, no bias): smaller ones hide so little that reading is not learnt for
    hundreds of steps.
    """

    steps: Tensor

    def __init__(self, bits: int, side: int) -> None:
        super().__init__()
        self.bits = bits
        self.encoder = Encoder(bits, side)
        self.decoder = Decoder(bits, side)
        self.register_buffer("steps", torch.zeros(()))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(cast(Tensor, module.bias))

    def residual(self, images: Tensor, bits: Tensor) -> Tensor:
        """[B, 3, H, W]: what hides ``bits`` float [B, N] in images float [B, 3, H, W] in [0, 1] when it is added; made
        at the working side and enlarged."""
        side = self.encoder.side
        return resized(self.encoder(resized(images, side, side), bits), *images.shape[-2:])

    def hide(self, images: Tensor, bits: Tensor) -> Tensor:
        """The images with the residual, float [B, 3, H, W] in [0, 1]."""
        return (images + self.residual(images, bits)).clamp(0, 1)

    def read(self, images: Tensor) -> Tensor:
        """Logits [B, N] of the bits in images float [B, 3, H, W] in [0, 1]."""
        logits: Tensor = self.decoder(resized(images, self.encoder.side, self.encoder.side))
        return logits


def bits_of(secret: str, count: int) -> Tensor:
    """float ``[count]`` of 0 and 1: the UTF-8 bytes of ``secret``, highest bit first, repeated to fill ``count``."""
    digits = "".join(f"{byte:08b}" for byte in secret.encode())
    return torch.tensor([float(digits[place % len(digits)]) for place in range(count)])


@dataclass(frozen=True, eq=False)
class HiddenBits:
    """Hides ``bits`` (float [N]) in every image; ``nets`` in eval mode on ``device``."""

    nets: Steganography
    bits: Tensor
    device: torch.device

    def __call__(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        bits = self.bits.to(self.device)
        return through_network(lambda batch: self.nets.hide(batch, bits.expand(len(batch), -1)), self.device, images)
