"""l2-invisible (Li et al. 2020, as in I-BAU and Trap-and-Replace): faint colour noise added to the whole image.

The original noise is optimised under an L2 budget; ours is Gaussian with the same norm, peak and spectrum.
"""

from __future__ import annotations

from dataclasses import dataclass

from backdoor_bench.attacks.common import check_facts, check_settings, poison_static
from backdoor_bench.errors import ConfigError, check_range
from backdoor_bench.training.seeds import generator
from backdoor_bench.triggers.additive import (
    GENERATED,
    Add,
    added_picture,
    check_asset,
    norm_per_entry,
    positive_noise,
)
from backdoor_bench.types import AttackerView, Facts, PoisonedSet, Trigger

REACHABLE = 0.6  # of the peak, as root mean square: half of the noise is below 0, so 0.7 is the limit


@dataclass(frozen=True)
class L2Inv:
    """Adds noise of L2 norm ``norm`` ([0, 1] scale, 32 pixels) with values up to ``max``, saturating; or a file.

    The noise is drawn from ``seed`` at the size of the images, so that no resizing smooths it; larger images get the
    same strength a pixel. asset: ``generated``, or the path of a picture that is added as it is.
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
    norm: float
    max: int
    asset: str

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("attack.max", self.max, 1, 255, integer=True)
        check_range("attack.norm", self.norm, 0, float("inf"), low_open=True)
        most = REACHABLE * self.max / norm_per_entry(1)
        if self.norm > most:
            raise ConfigError(
                f"attack.norm={self.norm} cannot be reached with values up to attack.max={self.max}: "
                f"set it to at most {most:.2f} or raise attack.max"
            )
        check_asset(self.asset)

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the classes or the rate cannot fit."""
        check_facts(self, facts)

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with the noise on the chosen rows."""
        return poison_static(self, view, *self.triggers(view))

    def triggers(self, view: AttackerView) -> tuple[Trigger, Trigger]:
        """The added noise, at training and at test."""
        height, width = view.train.images.shape[-2:]
        if self.asset == GENERATED:
            pattern = positive_noise(height, width, self.norm, self.max, generator(self.seed, "l2_inv noise"))
        else:
            pattern = added_picture(self.asset, height, width)
        trigger = Add(pattern, "saturate")
        return trigger, trigger
