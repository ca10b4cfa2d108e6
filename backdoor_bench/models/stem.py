"""Which first layers a network for large photographs gets when the images are small."""

from __future__ import annotations

from torch import nn

from backdoor_bench.errors import check_choice
from backdoor_bench.models.classifier import check_min_size
from backdoor_bench.types import Facts

# auto: cifar below 128 px, else imagenet (from there on the small-image stem only costs time: 12x at 224 px).
STEMS = ("auto", "cifar", "cifar_maxpool", "imagenet")
_AUTO_FROM = 128
_MIN_SIZE = {"cifar": 16, "cifar_maxpool": 32, "imagenet": 64}


def choose_stem(stem: str, image_size: int) -> str:
    """``stem`` with ``auto`` resolved for images of ``image_size`` pixels."""
    if stem != "auto":
        return stem
    return "cifar" if image_size < _AUTO_FROM else "imagenet"


def check_stem(stem: str, choices: tuple[str, ...] = STEMS) -> None:
    """Raise ConfigError unless ``stem`` is one of ``choices``."""
    check_choice("model.stem", stem, choices)


def check_stem_size(stem: str, facts: Facts) -> None:
    """Raise ConfigError if the images are too small for the stem (below that, the last maps have no pixel left)."""
    chosen = choose_stem(stem, facts.image_size)
    advice = "use another model" if chosen == "cifar" else "set model.stem=cifar or use another model"
    check_min_size(facts, _MIN_SIZE[chosen], f"model.stem={stem}", advice)


def stem_block(stem: str, width: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU and, except with ``cifar``, a 3x3 stride-2 max-pool: 3 -> ``width`` channels.

    The convolution is 7x7 stride 2 (``imagenet``) or 3x3 stride 1. ``stem`` must not be ``auto`` any more.
    """
    block = nn.Sequential()
    if stem == "imagenet":
        block.add_module("conv", nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False))
    else:
        block.add_module("conv", nn.Conv2d(3, width, 3, padding=1, bias=False))
    block.add_module("norm", nn.BatchNorm2d(width))
    block.add_module("act", nn.ReLU())
    if stem != "cifar":
        block.add_module("pool", nn.MaxPool2d(3, stride=2, padding=1))
    return block
