"""Decoders that draw an image from the maps of a stem: Trap and Replace's second task (specs/seed_defenses.md 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_FEWEST_CHANNELS = 8
# ResNet-34 split after layer3 at 224 px: the one decoder of the paper's code that does not halve at every step.
_PRINTED = {(256, 4): [128, 128, 64]}


class Decoder(nn.Module):
    """Maps [B, K, h, w] -> images [B, 3, S, S] in (0, 1), S = ``image_size``."""

    def __init__(self, layers: nn.Sequential, image_size: int) -> None:
        super().__init__()
        self.layers = layers
        self.image_size = image_size

    def forward(self, maps: Tensor) -> Tensor:
        # Sides that are no multiple of the map's come out larger.
        return self.layers(maps)[..., : self.image_size, : self.image_size]


def build_decoder(channels: int, map_size: int, image_size: int, seed: int) -> Decoder:
    """An untrained decoder of ``channels`` maps of ``map_size`` pixels, in library initialisation drawn from ``seed``.

    As many transposed convolutions (k4 s2 p1) as are needed to reach ``image_size``; what is too large is cut off at
    the right and the bottom. Up to two of them: as in the paper's WRN-16-1, one plain ReLU before the last layer (with
    fewer than two, a k3 s1 p1 layer is last). From three on: as in its ResNet-34, channels halve at each (not below 8),
    instance norm and ReLU after every second and before the last. So the splits of the paper's code get its decoders
    (models/wideresnet_ae.py, models/resnet_ae.py; the true channel counts in the instance norms), all others this rule.
    """
    steps = 0
    while map_size * 2**steps < image_size:
        steps += 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = _shallow(channels, steps) if steps <= 2 else _deep(channels, steps)
    return Decoder(nn.Sequential(*layers, nn.Sigmoid()), image_size)


def _doubling(inputs: int, outputs: int) -> nn.Module:
    return nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)


def _same_size(inputs: int, outputs: int) -> nn.Module:
    return nn.ConvTranspose2d(inputs, outputs, 3, stride=1, padding=1)


def _shallow(channels: int, steps: int) -> list[nn.Module]:
    if steps == 2:
        width = max(channels // 2, _FEWEST_CHANNELS)
        return [_doubling(channels, width), nn.ReLU(), _doubling(width, 3)]
    first = _doubling if steps else _same_size
    return [first(channels, channels), nn.ReLU(), _same_size(channels, 3)]


def _deep(channels: int, steps: int) -> list[nn.Module]:
    halved = [max(channels // 2**step, _FEWEST_CHANNELS) for step in range(1, steps)]
    widths = _PRINTED.get((channels, steps), halved)
    layers: list[nn.Module] = []
    inputs = channels
    for number, width in enumerate(widths, start=1):
        layers.append(_doubling(inputs, width))
        if number % 2 == 0 or number == len(widths):
            layers += [nn.InstanceNorm2d(width), nn.ReLU()]
        inputs = width
    return [*layers, _doubling(inputs, 3)]
