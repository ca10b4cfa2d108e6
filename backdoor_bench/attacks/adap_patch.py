"""Adap-Patch (Qi et al. 2023): four patches at training, one an image, and several together at test; with cover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from backdoor_bench.attacks.common import (
    Part,
    assemble,
    check_facts,
    check_settings,
    choose,
    keep_labels,
    rule_and_test,
)
from backdoor_bench.errors import ConfigError, check_choice, check_flag, check_range
from backdoor_bench.triggers.logos import QUARTERS, check_logo, logo, reach
from backdoor_bench.triggers.overlay import Overlay
from backdoor_bench.triggers.patch import check_room
from backdoor_bench.types import AttackerView, Facts, PoisonedSet

# The patches of the training images, and those that may be stamped at test.
TRAIN_PATCHES = {"official": ("phoenix", "firefox", "checker", "trojan8"), "firefox4": QUARTERS}
TEST_PATCHES = {
    "official": ("phoenix", "phoenix2", "firefox", "checker", "trojan8"),
    "firefox4": (*QUARTERS, "firefox"),
}
USUAL_TEST = {"official": ("phoenix2", "checker"), "firefox4": ("firefox",)}
USUAL_ALPHAS = {"official": (0.5, 0.2, 0.5, 0.3), "firefox4": (1.0, 1.0, 1.0, 1.0)}


@dataclass(frozen=True)
class AdapPatch:
    """Stamps patch j of ``set`` with opacity ``alphas_train[j]`` on the j-th quarter of the sorted poison rows, and of
    the sorted cover rows, which keep their label. At test ``test_set`` (names, in this order) is stamped opaquely.

    set: ``official`` phoenix, Firefox logo, checker in four corners, trojan square (vtu81/backdoor-toolbox);
    ``firefox4`` the quarters of the logo (MeCa). alphas_train, test_set: None takes those of the set. ``trigger_id`` is
    j. The pictures are those of ``triggers.logos``.
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
    set: str
    alphas_train: list[float] | None
    test_set: list[str] | None
    scale_patch: bool

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("attack.set", self.set, tuple(TRAIN_PATCHES))
        check_flag("attack.scale_patch", self.scale_patch)
        if self.alphas_train is not None and (not isinstance(self.alphas_train, list) or len(self.alphas_train) != 4):
            raise ConfigError(f"attack.alphas_train={self.alphas_train!r} is not allowed: give four opacities, or null")
        for alpha in self._alphas():
            check_range("attack.alphas_train", alpha, 0, 1, low_open=True)
        allowed = TEST_PATCHES[self.set]
        if self.test_set is not None and (
            not isinstance(self.test_set, list)
            or not self.test_set
            or any(name not in allowed for name in self.test_set)
        ):
            raise ConfigError(
                f"attack.test_set={self.test_set!r} is not allowed with attack.set={self.set}: give a list of "
                f"{', '.join(allowed)}, e.g. [{', '.join(USUAL_TEST[self.set])}], or null"
            )

    def _alphas(self) -> Sequence[float]:
        return self.alphas_train if self.alphas_train is not None else USUAL_ALPHAS[self.set]

    def _test_names(self) -> Sequence[str]:
        return self.test_set if self.test_set is not None else USUAL_TEST[self.set]

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the classes, the rates or the patches cannot fit."""
        check_facts(self, facts)
        check_room(f"attack.set={self.set}", max(map(reach, TRAIN_PATCHES[self.set])), facts.image_size)
        for name in self._test_names():
            check_logo("attack.test_set", name, facts.image_size)

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with a quarter of the poison and cover rows under each patch."""
        height, width = view.train.images.shape[-2:]
        chosen = choose(self, view)
        together = tuple(
            patch for name in self._test_names() for patch in logo(name, height, width, scale=self.scale_patch)
        )
        rule, test = rule_and_test(self, view.num_classes, Overlay(together, 1.0))
        parts = []
        for number, (name, alpha) in enumerate(zip(TRAIN_PATCHES[self.set], self._alphas(), strict=True)):
            trigger = Overlay(logo(name, height, width, scale=self.scale_patch), alpha)
            parts.append(Part(_quarter(chosen.poison, number), trigger, rule, number))
            parts.append(Part(_quarter(chosen.cover, number), trigger, keep_labels, number, is_cover=True))
        return assemble(view, parts, (test,))


def _quarter(rows: Tensor, number: int) -> Tensor:
    """The consecutive quarter ``number`` of the rows; sizes differ by one at most."""
    return rows[len(rows) * number // 4 : len(rows) * (number + 1) // 4]
