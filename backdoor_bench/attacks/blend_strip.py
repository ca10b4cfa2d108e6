"""Blend-Strip (Blend-Signal): vertical stripes blended into the whole image."""

from __future__ import annotations

from dataclasses import dataclass

from backdoor_bench.attacks.common import check_facts, check_settings, poison_static
from backdoor_bench.errors import check_choice, check_range
from backdoor_bench.triggers.blend import Blend, sine, wrapped_stripes
from backdoor_bench.triggers.patch import LARGE_ABOVE
from backdoor_bench.types import AttackerView, Facts, PoisonedSet, Trigger


@dataclass(frozen=True)
class BlendStrip:
    """Blends stripes of strength ``alpha`` into the image.

    strip_mode: ``wrapped`` takes the uint8 stripes of ``delta`` and ``omega`` (radians a column at 32), ``sine`` the
    unwrapped sine of ``delta`` and ``freq`` (periods over the width), ``auto`` wrapped up to 64 pixels and sine above.
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
    strip_mode: str
    delta: float
    omega: float
    freq: float

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("attack.strip_mode", self.strip_mode, ("auto", "wrapped", "sine"))
        check_range("attack.alpha", self.alpha, 0, 1, low_open=True)
        check_range("attack.delta", self.delta, 0, 255, low_open=True)
        check_range("attack.omega", self.omega, 0, float("inf"), low_open=True, high_open=True)
        check_range("attack.freq", self.freq, 0, float("inf"), low_open=True, high_open=True)

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the classes or the rate cannot fit."""
        check_facts(self, facts)

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with stripes on the chosen rows."""
        return poison_static(self, view, *self.triggers(view))

    def triggers(self, view: AttackerView) -> tuple[Trigger, Trigger]:
        """The stripes, at training and at test."""
        blend = self._trigger(view.train.images.shape[-1])
        return blend, blend

    def _trigger(self, width: int) -> Blend:
        wrapped = self.strip_mode == "wrapped" or (self.strip_mode == "auto" and width <= LARGE_ABOVE)
        stripes = wrapped_stripes(width, self.delta, self.omega) if wrapped else sine(width, self.delta, self.freq)
        return Blend(stripes, self.alpha)
