"""VGG-19 with batch norm (Simonyan and Zisserman, ICLR 2015): the convolutions of torchvision's vgg19_bn.

Defined here because torchvision builds its three large linear layers, 120 million weights, before they can be dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from backdoor_bench.errors import check_choice
from backdoor_bench.models.classifier import NORMALISE, Classifier, assemble, check_min_size
from backdoor_bench.types import Facts

_STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # (channels, convolutions); configuration E of the paper


@dataclass(frozen=True)
class VGG19:
    """VGG-19-BN with one linear layer on 512 pooled features (EBD, Table 7) in place of the three of the ImageNet head.

    Blocks: conv1_1, conv1_2, pool1, conv2_1, ..., conv5_4, pool5 (a conv block is convolution with bias, norm, ReLU).
    Stages layer1 to layer5 end before the pooling, because at 32 px the last pooling leaves one pixel. Convolutions are
    drawn Kaiming-normal by fan-out with zero bias, as in torchvision.
    """

    normalise: str

    def __post_init__(self) -> None:
        check_choice("model.normalise", self.normalise, NORMALISE)

    def check(self, facts: Facts) -> None:
        check_min_size(facts, 32, "this model", "use another model or larger images")

    def build(self, num_classes: int, image_size: int, mean: Sequence[float], std: Sequence[float]) -> Classifier:
        blocks: dict[str, nn.Module] = {}
        stages: dict[str, str] = {}
        inputs = 3
        for stage, (width, count) in enumerate(_STAGES, start=1):
            for index in range(1, count + 1):
                blocks[f"conv{stage}_{index}"] = _conv_block(inputs, width)
                inputs = width
            stages[f"layer{stage}"] = f"conv{stage}_{count}"
            blocks[f"pool{stage}"] = nn.MaxPool2d(2)
        return assemble(blocks, stages, inputs, num_classes, self.normalise, mean, std)


def _conv_block(inputs: int, width: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, width, 3, padding=1)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    block = nn.Sequential()
    block.add_module("conv", conv)
    block.add_module("norm", nn.BatchNorm2d(width))
    block.add_module("act", nn.ReLU())
    return block
