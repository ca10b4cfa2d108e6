"""WRN-16-k (Zagoruyko and Komodakis, BMVC 2016), in the variant of Trap and Replace (NeurIPS 2022).

That variant has biases in its convolutions and LeakyReLU 0.1. Its released code feeds the raw input into the first
convolution of groups 2 and 3; ours feeds the activated one, as the WRN paper does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from backdoor_bench.errors import check_choice, check_range
from backdoor_bench.models.classifier import NORMALISE, Classifier, assemble, check_min_size
from backdoor_bench.types import Facts

_SLOPE = 0.1


class PreActivationBlock(nn.Module):
    """[B, inputs, H, W] -> [B, width, H/stride, W/stride]: (norm, LeakyReLU, 3x3 convolution) twice, plus a shortcut.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input; elsewhere it is the raw input.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, width, 1, stride) if inputs != width or stride != 1 else None
        self.act = nn.LeakyReLU(_SLOPE)

    def forward(self, maps: Tensor) -> Tensor:
        active = self.act(self.norm1(maps))
        hidden = self.conv2(self.act(self.norm2(self.conv1(active))))
        return hidden + (maps if self.shortcut is None else self.shortcut(active))


@dataclass(frozen=True)
class WideResNet16:
    """WRN-16-``width``: 3x3 convolution to 16 channels, three groups of two blocks with 16, 32, 64 times ``width``
    channels, then norm and LeakyReLU; 64 times ``width`` features.

    Blocks: stem, layer1_0, layer1_1, ..., layer3_1, norm; stages layer1 to layer3 end before the last norm. Trap and
    Replace's splits of 9/5, 11/3 and 13/1 layers are layer2_1, layer3_0 and layer3_1. Initialisation as in its code:
    convolutions Kaiming-normal by fan-out with gain sqrt(2), head Xavier-normal with zero bias.
    """

    width: int
    normalise: str

    def __post_init__(self) -> None:
        check_range("model.width", self.width, 1, float("inf"), integer=True)
        check_choice("model.normalise", self.normalise, NORMALISE)

    def check(self, facts: Facts) -> None:
        check_min_size(facts, 8, "this model", "use larger images or model=small_cnn")

    def build(self, num_classes: int, image_size: int, mean: Sequence[float], std: Sequence[float]) -> Classifier:
        blocks: dict[str, nn.Module] = {"stem": nn.Conv2d(3, 16, 3, padding=1)}
        stages: dict[str, str] = {}
        inputs = 16
        for group in range(3):
            width = 16 * 2**group * self.width
            for index in range(2):
                name = f"layer{group + 1}_{index}"
                blocks[name] = PreActivationBlock(inputs, width, stride=2 if group > 0 and index == 0 else 1)
                inputs = width
            stages[f"layer{group + 1}"] = name
        blocks["norm"] = nn.Sequential(nn.BatchNorm2d(inputs), nn.LeakyReLU(_SLOPE))
        model = assemble(blocks, stages, inputs, num_classes, self.normalise, mean, std)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.xavier_normal_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        return model
