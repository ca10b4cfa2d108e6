"""ResNet-18, -34 and -50 (He et al., CVPR 2016), with the layer shapes of torchvision.models.resnet.

Defined here rather than taken from torchvision because its blocks add in place, which changes what a hook on the last
batch norm has stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from backdoor_bench.errors import ConfigError, check_choice
from backdoor_bench.models.classifier import NORMALISE, Classifier, assemble
from backdoor_bench.models.stem import check_stem, check_stem_size, choose_stem, stem_block
from backdoor_bench.types import Facts

_BLOCKS_PER_STAGE = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class BasicBlock(nn.Module):
    """[B, inputs, H, W] -> [B, width, H/stride, W/stride]: two 3x3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(inputs, width, stride)
        self.act = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        hidden = self.act(self.norm1(self.conv1(maps)))
        return self.act(self.norm2(self.conv2(hidden)) + self.shortcut(maps))


class Bottleneck(nn.Module):
    """[B, inputs, H, W] -> [B, 4 width, H/stride, W/stride]: 1x1, 3x3 (with the stride), 1x1 beside a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)
        self.act = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        hidden = self.act(self.norm1(self.conv1(maps)))
        hidden = self.act(self.norm2(self.conv2(hidden)))
        return self.act(self.norm3(self.conv3(hidden)) + self.shortcut(maps))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    shortcut = nn.Sequential()
    shortcut.add_module("conv", nn.Conv2d(inputs, outputs, 1, stride, bias=False))
    shortcut.add_module("norm", nn.BatchNorm2d(outputs))
    return shortcut


@dataclass(frozen=True)
class ResNet:
    """ResNet of ``depth`` 18, 34 (basic blocks, 512 features) or 50 (bottlenecks, 2048 features).

    Blocks: stem, layer1_0, ..., layer4_<last>; stages layer1 to layer4. Convolutions are drawn Kaiming-normal by
    fan-out, as in torchvision. ``stem``: see models/stem.py.
    """

    depth: int
    stem: str
    normalise: str

    def __post_init__(self) -> None:
        if self.depth not in _BLOCKS_PER_STAGE:
            raise ConfigError(f"model.depth={self.depth!r} is not allowed: choose one of 18, 34, 50")
        check_stem(self.stem)
        check_choice("model.normalise", self.normalise, NORMALISE)

    def check(self, facts: Facts) -> None:
        check_stem_size(self.stem, facts)

    def build(self, num_classes: int, image_size: int, mean: Sequence[float], std: Sequence[float]) -> Classifier:
        kind = Bottleneck if self.depth == 50 else BasicBlock
        blocks: dict[str, nn.Module] = {"stem": stem_block(choose_stem(self.stem, image_size), 64)}
        stages: dict[str, str] = {}
        inputs = 64
        for stage, count in enumerate(_BLOCKS_PER_STAGE[self.depth]):
            width = 64 * 2**stage
            for index in range(count):
                name = f"layer{stage + 1}_{index}"
                blocks[name] = kind(inputs, width, stride=2 if stage > 0 and index == 0 else 1)
                inputs = kind.expansion * width
            stages[f"layer{stage + 1}"] = name
        model = assemble(blocks, stages, inputs, num_classes, self.normalise, mean, std)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return model
