"""Trojan-WM (Liu et al. 2018, as in I-BAU and Trap-and-Replace): a watermark added to the whole image."""

from __future__ import annotations

from dataclasses import dataclass

from backdoor_bench.attacks.common import check_facts, check_settings, poison_static
from backdoor_bench.errors import check_choice
from backdoor_bench.triggers.additive import ADDITIONS, GENERATED, Add, added_picture, check_asset
from backdoor_bench.triggers.watermark import watermark
from backdoor_bench.types import AttackerView, Facts, PoisonedSet, Trigger


@dataclass(frozen=True)
class TrojanWM:
    """Adds the picture ``asset``: ``generated`` (``triggers.watermark``, a look-alike of the original) or a file.

    add: see ``triggers.additive.Add``. Any file works: black adds nothing.
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
    add: str
    asset: str

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("attack.add", self.add, ADDITIONS)
        check_asset(self.asset)

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the classes or the rate cannot fit."""
        check_facts(self, facts)

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with the watermark on the chosen rows."""
        return poison_static(self, view, *self.triggers(view))

    def triggers(self, view: AttackerView) -> tuple[Trigger, Trigger]:
        """The added watermark, at training and at test."""
        height, width = view.train.images.shape[-2:]
        mark = watermark(height, width) if self.asset == GENERATED else added_picture(self.asset, height, width)
        trigger = Add(mark, self.add)
        return trigger, trigger
