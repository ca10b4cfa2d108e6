"""Blend-Kitty (Chen et al. 2017): a picture, or fixed noise, blended into the whole image."""

from __future__ import annotations

from dataclasses import dataclass

from backdoor_bench.attacks.common import check_facts, check_settings, poison_static
from backdoor_bench.errors import check_flag, check_range
from backdoor_bench.triggers.blend import Blend
from backdoor_bench.triggers.pictures import check_asset, picture
from backdoor_bench.types import AttackerView, Facts, PoisonedSet, Trigger


@dataclass(frozen=True)
class BlendKitty:
    """Blends the picture ``asset`` (a name of ``triggers.pictures`` or a file) with strength ``alpha``.

    antialias: how the picture is made small, see ``triggers.pictures.picture``; noise is made at the image's own size.
    """

    target_class: int | None
    source_class: int | None
    seed: int
    label_rule: str
    poison_rate: float
    poison_base: str
    poison_pool: str
    poison_order: str
    poison_count: int | None
    cover_rate: float
    alpha: float
    asset: str
    antialias: bool

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("attack.alpha", self.alpha, 0, 1, low_open=True)
        check_asset(self.asset)
        check_flag("attack.antialias", self.antialias)

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the classes or the rate cannot fit."""
        check_facts(self, facts)

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with the picture on the chosen rows."""
        return poison_static(self, view, *self.triggers(view))

    def triggers(self, view: AttackerView) -> tuple[Trigger, Trigger]:
        """The blend, at training and at test."""
        height, width = view.train.images.shape[-2:]
        blend = Blend(picture(self.asset, height, width, self.seed, self.antialias), self.alpha)
        return blend, blend
