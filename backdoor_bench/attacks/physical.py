"""PhysicalBA (Li et al. 2021): a patch, and training images that move and change their light as before a camera."""

from __future__ import annotations

from dataclasses import dataclass, replace

from backdoor_bench.attacks.common import check_facts, check_settings, poison_static
from backdoor_bench.data.physical import PhysicalTransform
from backdoor_bench.errors import ConfigError, check_choice, check_flag, check_range
from backdoor_bench.triggers.logos import check_logo, logo
from backdoor_bench.triggers.overlay import Overlay
from backdoor_bench.types import AttackerView, Facts, PoisonedSet, Trigger


@dataclass(frozen=True)
class Physical:
    """Stamps ``patch``; then every training image, poisoned or not, passes ``PhysicalTransform`` anew in each step.

    degrees, translate, scale, jitter, hflip: see there. The transform comes after the recipe's own augmentation and
    belongs to the training set, so that no defence loses it. Test images are stamped only.
    Source: THUYimingLi/BackdoorBox.
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
    patch: str
    scale_patch: bool
    degrees: float
    translate: float
    scale: list[float]
    jitter: list[float]
    hflip: float

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("attack.patch", self.patch, ("firefox", "white3"))
        check_flag("attack.scale_patch", self.scale_patch)
        check_range("attack.degrees", self.degrees, 0, 180)
        check_range("attack.translate", self.translate, 0, 1)
        check_range("attack.hflip", self.hflip, 0, 1)
        for key, pair, meaning in (
            ("attack.scale", self.scale, "smallest and largest"),
            ("attack.jitter", self.jitter, "brightness and contrast"),
        ):
            if not isinstance(pair, list) or len(pair) != 2:
                raise ConfigError(f"{key}={pair!r} is not allowed: give two numbers, {meaning}")
            for value in pair:
                check_range(key, value, 0, float("inf"), low_open=key == "attack.scale", high_open=True)
        if self.scale[0] > self.scale[1]:
            raise ConfigError(f"attack.scale={self.scale} is not allowed: the smaller one comes first")

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the classes, the rates or the patch cannot fit."""
        check_facts(self, facts)
        check_logo("attack.patch", self.patch, facts.image_size)

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with the patch on the chosen rows, and the transform of all rows."""
        poisoned = poison_static(self, view, *self.triggers(view))
        (low, high), (brightness, contrast) = self.scale, self.jitter
        transform = PhysicalTransform(self.degrees, self.translate, (low, high), (brightness, contrast), self.hflip)
        return replace(poisoned, train=replace(poisoned.train, augment=transform))

    def triggers(self, view: AttackerView) -> tuple[Trigger, Trigger]:
        """The patch, at training and at test."""
        patch = Overlay(logo(self.patch, *view.train.images.shape[-2:], scale=self.scale_patch), 1.0)
        return patch, patch
