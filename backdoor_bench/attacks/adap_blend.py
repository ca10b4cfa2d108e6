"""Adap-Blend (Qi et al. 2023): a blend of which training images show random pieces, beside cover images."""

from __future__ import annotations

import math
from dataclasses import dataclass

from backdoor_bench.attacks.common import check_facts, check_settings, poison_static
from backdoor_bench.errors import ConfigError, check_range
from backdoor_bench.triggers.blend import Blend
from backdoor_bench.triggers.overlay import InPieces
from backdoor_bench.triggers.pictures import check_asset, picture
from backdoor_bench.types import AttackerView, Facts, PoisonedSet, Trigger


@dataclass(frozen=True)
class AdapBlend:
    """Blends the picture ``asset`` with strength ``alpha_train`` into all but a share ``mask_rate`` of the ``pieces``
    pieces of a training image, drawn once for each row; at test into the whole image, with strength ``alpha_test``.

    Cover rows get the trigger with a draw of their own and keep their label. Deviation: truncated to uint8 as all our
    triggers are (the source keeps floats). Source: vtu81/backdoor-toolbox.
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
    alpha_train: float
    alpha_test: float
    pieces: int
    mask_rate: float
    asset: str

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("attack.alpha_train", self.alpha_train, 0, 1, low_open=True)
        check_range("attack.alpha_test", self.alpha_test, 0, 1, low_open=True)
        check_range("attack.mask_rate", self.mask_rate, 0, 1, high_open=True)
        check_range("attack.pieces", self.pieces, 1, float("inf"), integer=True)
        side = math.isqrt(self.pieces)
        if side**2 != self.pieces:
            raise ConfigError(
                f"attack.pieces={self.pieces} is not allowed: it must be a square number, e.g. {side**2} or "
                f"{(side + 1) ** 2}"
            )
        if self._off() == self.pieces:
            raise ConfigError(f"attack.mask_rate={self.mask_rate} hides all {self.pieces} pieces: lower it")
        check_asset(self.asset)

    def _off(self) -> int:
        return round(self.mask_rate * self.pieces)

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the classes, the rates or the pieces cannot fit."""
        check_facts(self, facts)
        check_range("attack.pieces", self.pieces, 1, facts.image_size**2, integer=True)

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with the picture in pieces on the poison and cover rows."""
        return poison_static(self, view, *self.triggers(view))

    def triggers(self, view: AttackerView) -> tuple[Trigger, Trigger]:
        """The blend in pieces at training, and whole at test."""
        height, width = view.train.images.shape[-2:]
        shown = picture(self.asset, height, width, self.seed)
        train = InPieces(Blend(shown, self.alpha_train), self.pieces, self._off(), self.seed)
        return train, Blend(shown, self.alpha_test)
