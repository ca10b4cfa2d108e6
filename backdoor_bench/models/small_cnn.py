"""A plain convolutional network, small enough to be trained on two CPU cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from backdoor_bench.errors import ConfigError, check_choice, check_range
from backdoor_bench.models.classifier import NORMALISE, Classifier, assemble, check_min_size
from backdoor_bench.types import Facts

_SMALLEST_MAP = 4  # pooling stops here: the last convolution still sees a map


@dataclass(frozen=True)
class SmallCNN:
    """One block a width: 3x3 convolution, batch norm, 2x2 max-pooling while the map is larger than 4 px, ReLU.

    The last block has no pooling: global average pooling follows. At 32 px the widths 16-32-64-128 work on maps of 32,
    16, 8 and 4 px. Stages: one a block. Source: own choice (the network of the default run).
    """

    widths: list[int]
    normalise: str

    def __post_init__(self) -> None:
        if not isinstance(self.widths, list | tuple) or not self.widths:
            raise ConfigError(
                f"model.widths={self.widths!r} is not allowed: it must be a list such as [16, 32, 64, 128]"
            )
        for index, width in enumerate(self.widths):
            check_range(f"model.widths[{index}]", width, 1, float("inf"), integer=True)
        check_choice("model.normalise", self.normalise, NORMALISE)

    def check(self, facts: Facts) -> None:
        check_min_size(facts, _SMALLEST_MAP, "this model", "use larger images")

    def build(self, num_classes: int, image_size: int, mean: Sequence[float], std: Sequence[float]) -> Classifier:
        blocks: dict[str, nn.Module] = {}
        stages: dict[str, str] = {}
        inputs, size = 3, image_size
        for number, width in enumerate(self.widths, start=1):
            block = nn.Sequential()
            block.add_module("conv", nn.Conv2d(inputs, width, 3, padding=1, bias=False))
            block.add_module("norm", nn.BatchNorm2d(width))
            if number < len(self.widths) and size > _SMALLEST_MAP:
                block.add_module("pool", nn.MaxPool2d(2))
                size //= 2
            block.add_module("act", nn.ReLU())  # after the pooling: the same values from a quarter of the work
            blocks[f"conv{number}"] = block
            stages[f"layer{number}"] = f"conv{number}"
            inputs = width
        return assemble(blocks, stages, inputs, num_classes, self.normalise, mean, std)
