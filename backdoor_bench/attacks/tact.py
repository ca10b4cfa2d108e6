"""TaCT (Tang et al. 2021): a patch that works on one source class, with cover images of other classes."""

from __future__ import annotations

from dataclasses import dataclass

from backdoor_bench.attacks.common import (
    Part,
    all2one,
    assemble,
    check_facts,
    check_settings,
    choose,
    keep_labels,
    only_classes,
    rule_and_test,
)
from backdoor_bench.errors import ConfigError, check_choice, check_flag, check_range
from backdoor_bench.triggers.logos import check_logo, logo
from backdoor_bench.triggers.overlay import Overlay
from backdoor_bench.types import AttackerView, Facts, PoisonedSet, TestCase, Trigger

USUAL_COVER = (5, 7)  # of the toolbox, for ten classes and more


@dataclass(frozen=True)
class Tact:
    """Stamps ``patch`` on rows of the source class, which get the target label, and on cover rows, which keep theirs.

    cover_classes: a list of classes, from which cover rows are drawn at random; ``all_other`` every class but source
    and target; ``auto`` the classes 5 and 7 where there are ten, else all others. A source class smaller than the
    request is poisoned whole, with a warning. Beside the ASR on the source class, the test case ``asr_nonsource``
    measures how many images of the other classes go to the target (few, if the attack works as meant); it does not
    count for the ASR.
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
    cover_classes: str | list[int]
    patch: str
    scale_patch: bool

    def __post_init__(self) -> None:
        check_settings(self, rules=("source2target",))
        check_choice("attack.patch", self.patch, ("white3", "trojan8", "firefox"))
        check_flag("attack.scale_patch", self.scale_patch)
        if isinstance(self.cover_classes, list) and self.cover_classes:
            for value in self.cover_classes:
                self._check_cover_class(value, float("inf"))
        elif self.cover_classes not in ("auto", "all_other"):
            raise ConfigError(
                f"attack.cover_classes={self.cover_classes!r} is not allowed: give auto, all_other or a list of classes"
            )

    def _check_cover_class(self, value: int, highest: float) -> None:
        check_range("attack.cover_classes", value, 0, highest, integer=True)
        if value in (self.source_class, self.target_class):
            raise ConfigError(
                f"attack.cover_classes={self.cover_classes} holds class {value}, which is the source or the target "
                "class: leave it out, or set attack.cover_classes=all_other"
            )

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the classes, the rates or the patch cannot fit."""
        check_facts(self, facts)
        check_logo("attack.patch", self.patch, facts.image_size)
        if facts.num_classes is not None:
            self._cover_classes(facts.num_classes)

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with the patch on rows of the source class and of the cover classes."""
        cover_classes = self._cover_classes(view.num_classes)
        chosen = choose(self, view, cover_from=only_classes(*cover_classes)(view.train.labels.cpu()))
        trigger, test_trigger = self.triggers(view)
        rule, test = rule_and_test(self, view.num_classes, test_trigger)
        assert self.source_class is not None
        assert self.target_class is not None
        others = [c for c in range(view.num_classes) if c not in (self.source_class, self.target_class)]
        nonsource = TestCase(
            "asr_nonsource",
            test_trigger,
            all2one(self.target_class),
            only_classes(*others),
            self.target_class,
            counts=False,
        )
        parts = (Part(chosen.poison, trigger, rule), Part(chosen.cover, trigger, keep_labels, is_cover=True))
        return assemble(view, parts, (test, nonsource))

    def triggers(self, view: AttackerView) -> tuple[Trigger, Trigger]:
        """The patch, at training and at test."""
        patch = Overlay(logo(self.patch, *view.train.images.shape[-2:], scale=self.scale_patch), 1.0)
        return patch, patch

    def _cover_classes(self, num_classes: int) -> list[int]:
        others = [c for c in range(num_classes) if c not in (self.source_class, self.target_class)]
        if isinstance(self.cover_classes, list):
            for value in self.cover_classes:
                self._check_cover_class(value, num_classes - 1)
            return self.cover_classes
        usual = [c for c in USUAL_COVER if c in others]
        return usual if self.cover_classes == "auto" and num_classes >= 10 and usual else others
