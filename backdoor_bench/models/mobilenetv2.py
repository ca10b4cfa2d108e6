"""MobileNetV2 (Sandler et al., CVPR 2018), torchvision's definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from backdoor_bench.errors import check_choice
from backdoor_bench.models.classifier import NORMALISE, Classifier, assemble
from backdoor_bench.models.stem import check_stem, check_stem_size, choose_stem
from backdoor_bench.types import Facts

_STEMS = ("auto", "cifar", "imagenet")
_BLOCKS_PER_STAGE = (1, 2, 3, 4, 3, 3, 1)  # Table 2 of the paper


@dataclass(frozen=True)
class MobileNetV2:
    """MobileNetV2 of width 1 (1280 features), without the dropout in front of torchvision's head.

    ``stem: cifar`` takes stride 1 in the first convolution and in stage 2, so that 32 px end at 4 px, with the same
    parameters (as the usual CIFAR ports do, e.g. kuangliu/pytorch-cifar:models/mobilenetv2.py). Blocks: stem, layer1_0,
    layer2_0, ..., layer7_0, last (the 1x1 convolution to 1280); stages layer1 to layer7.
    """

    stem: str
    normalise: str

    def __post_init__(self) -> None:
        check_stem(self.stem, _STEMS)
        check_choice("model.normalise", self.normalise, NORMALISE)

    def check(self, facts: Facts) -> None:
        check_stem_size(self.stem, facts)

    def build(self, num_classes: int, image_size: int, mean: Sequence[float], std: Sequence[float]) -> Classifier:
        import backdoor_bench._torchvision  # noqa: F401, I001  (must come before torchvision)
        from torchvision.models import mobilenet_v2

        rest = list(mobilenet_v2(weights=None, num_classes=1).features.children())
        blocks: dict[str, nn.Module] = {"stem": rest.pop(0)}
        stages: dict[str, str] = {}
        for stage, count in enumerate(_BLOCKS_PER_STAGE, start=1):
            for index in range(count):
                name = f"layer{stage}_{index}"
                blocks[name] = rest.pop(0)
            stages[f"layer{stage}"] = name
        (blocks["last"],) = rest
        model = assemble(blocks, stages, 1280, num_classes, self.normalise, mean, std)
        for module in model.modules():
            if isinstance(module, nn.ReLU6):
                module.inplace = False  # in place, it would overwrite what a hook on the batch norm has stored
        if choose_stem(self.stem, image_size) == "cifar":
            for block in ("stem", "layer2_0"):
                for module in blocks[block].modules():
                    if isinstance(module, nn.Conv2d):
                        module.stride = (1, 1)
        return model
