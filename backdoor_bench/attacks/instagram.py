"""Instagram (the filter attack of ABS, Liu et al. 2019): a photo filter over the whole image."""

from __future__ import annotations

from dataclasses import dataclass

from backdoor_bench.attacks.common import check_facts, check_settings, poison_static
from backdoor_bench.errors import check_choice
from backdoor_bench.triggers.filters import FILTERS, ColourFilter
from backdoor_bench.types import AttackerView, Facts, PoisonedSet, Trigger


@dataclass(frozen=True)
class Instagram:
    """Maps every colour by ``filter``, see ``triggers.filters``; the same at every size, no vignette.

    filter: ``1977`` may come as a number, because that is what the command line makes of it.
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
    filter: str | int

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("attack.filter", str(self.filter), tuple(FILTERS))

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the classes or the rate cannot fit."""
        check_facts(self, facts)

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with the filter on the chosen rows."""
        return poison_static(self, view, *self.triggers(view))

    def triggers(self, view: AttackerView) -> tuple[Trigger, Trigger]:
        """The filter, at training and at test."""
        trigger = ColourFilter(str(self.filter))
        return trigger, trigger
