"""DenseNet-161 (Huang et al., CVPR 2017), torchvision's dense blocks and transitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from backdoor_bench.errors import check_choice
from backdoor_bench.models.classifier import NORMALISE, Classifier, assemble
from backdoor_bench.models.stem import check_stem, check_stem_size, choose_stem, stem_block
from backdoor_bench.types import Facts

_GROWTH, _LAYERS, _STEM_WIDTH, _FEATURES = 48, (6, 12, 36, 24), 96, 2208


@dataclass(frozen=True)
class DenseNet161:
    """DenseNet-161 with 2208 pooled features. (EBD's Table 7 prints 8832: the same maps, flattened at 2x2.)

    Blocks: stem, dense1, transition1, dense2, ..., dense4, norm; stages layer1 to layer4 are the dense blocks.
    ``stem``: see models/stem.py; ``cifar_maxpool`` gives EBD's 2x2 maps at 32 px.
    """

    stem: str
    normalise: str

    def __post_init__(self) -> None:
        check_stem(self.stem)
        check_choice("model.normalise", self.normalise, NORMALISE)

    def check(self, facts: Facts) -> None:
        check_stem_size(self.stem, facts)

    def build(self, num_classes: int, image_size: int, mean: Sequence[float], std: Sequence[float]) -> Classifier:
        import backdoor_bench._torchvision  # noqa: F401, I001  (must come before torchvision)
        from torchvision.models import DenseNet

        parts = DenseNet(_GROWTH, _LAYERS, _STEM_WIDTH, num_classes=1).features
        stem = stem_block(choose_stem(self.stem, image_size), _STEM_WIDTH)
        for module in stem.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # as torchvision draws the others
        blocks: dict[str, nn.Module] = {"stem": stem}
        for number in range(1, 5):
            blocks[f"dense{number}"] = parts.get_submodule(f"denseblock{number}")
            if number < 4:
                blocks[f"transition{number}"] = parts.get_submodule(f"transition{number}")
        blocks["norm"] = nn.Sequential(parts.get_submodule("norm5"), nn.ReLU())
        stages = {f"layer{number}": f"dense{number}" for number in range(1, 5)}
        model = assemble(blocks, stages, _FEATURES, num_classes, self.normalise, mean, std)
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # in place, it would overwrite what a hook on the batch norm has stored
        return model
