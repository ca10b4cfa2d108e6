"""SIG (Barni et al. 2019): a sinusoid on images of the target class, whose labels stay."""

from __future__ import annotations

from dataclasses import dataclass

from backdoor_bench.attacks.common import check_facts, check_settings, poison_static
from backdoor_bench.errors import check_choice, check_range
from backdoor_bench.triggers.blend import Blend, wrapped_stripes
from backdoor_bench.triggers.sinusoid import Sinusoid
from backdoor_bench.types import AttackerView, Facts, PoisonedSet, Trigger

# The stripe picture that Trap-and-Replace blends in instead (attacks.md A13), at any size.
STRIPE_ALPHA, STRIPE_DELTA, STRIPE_OMEGA = 0.2, 20, 0.8


@dataclass(frozen=True)
class Sig:
    """Adds a sine of amplitude ``delta_train`` (``delta_test`` at test time) and ``freq`` periods over the width.

    mode: ``add`` does that; ``stripe_blend`` blends in stripes instead, alike at training and test.
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
    delta_train: float
    delta_test: float
    freq: float
    mode: str

    def __post_init__(self) -> None:
        # No all2all: the images of the target class, which keep their label, are what SIG is about.
        check_settings(self, rules=("clean", "all2one", "source2target"))
        check_choice("attack.mode", self.mode, ("add", "stripe_blend"))
        check_range("attack.delta_train", self.delta_train, 0, 255, low_open=True)
        check_range("attack.delta_test", self.delta_test, 0, 255, low_open=True)
        check_range("attack.freq", self.freq, 0, float("inf"), low_open=True, high_open=True)

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the classes or the rate cannot fit."""
        check_facts(self, facts)

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with the sinusoid on the chosen rows."""
        return poison_static(self, view, *self.triggers(view))

    def triggers(self, view: AttackerView) -> tuple[Trigger, Trigger]:
        """The sinusoid at training and at test, where it is stronger."""
        if self.mode == "add":
            return Sinusoid(self.delta_train, self.freq), Sinusoid(self.delta_test, self.freq)
        blend = Blend(wrapped_stripes(view.train.images.shape[-1], STRIPE_DELTA, STRIPE_OMEGA), STRIPE_ALPHA)
        return blend, blend
