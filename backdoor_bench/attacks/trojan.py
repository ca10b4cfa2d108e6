"""Trojan (Liu et al. 2018): a patch of saturated colours that is added to the pixels.

Serves the ids ``trojan`` and ``trojan_sq``, which differ in what happens above 255 and in the choice of rows. The
original idea optimises the patch on a pretrained network; the papers, and so this file, reuse one stored patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from backdoor_bench.attacks.common import check_facts, check_settings, poison_static
from backdoor_bench.errors import check_choice, check_flag
from backdoor_bench.training.seeds import generator
from backdoor_bench.triggers.additive import ABL_TROJAN, ADDITIONS, Add, add_patch, colour_cells
from backdoor_bench.triggers.patch import check_room, corner_patch
from backdoor_bench.types import AttackerView, Facts, PoisonedSet, Trigger

SIDES = {"abl3": 3, "random8": 8}
MARGINS = {"abl3": 4, "random8": 3}  # cells between patch and the bottom right edges: rows 25..27, or 21..28


@dataclass(frozen=True)
class Trojan:
    """Adds a patch near the bottom right corner.

    variant: ``abl3``, the 3 x 3 colours of ABL, or ``random8``, 8 x 8 random colours drawn from ``seed``. add: see
    ``triggers.additive.Add``. A cell is one pixel at 32; with ``scale_patch`` it grows with the image.
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
    variant: str
    add: str
    scale_patch: bool

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("attack.variant", self.variant, tuple(MARGINS))
        check_choice("attack.add", self.add, ADDITIONS)
        check_flag("attack.scale_patch", self.scale_patch)

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the classes, the rate or the patch cannot fit."""
        check_facts(self, facts)
        check_room(f"attack.variant={self.variant}", SIDES[self.variant] + MARGINS[self.variant], facts.image_size)

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with the patch on the chosen rows."""
        return poison_static(self, view, *self.triggers(view))

    def triggers(self, view: AttackerView) -> tuple[Trigger, Trigger]:
        """The added patch, at training and at test."""
        patch = self._trigger(*view.train.images.shape[-2:])
        return patch, patch

    def _trigger(self, height: int, width: int) -> Add:
        if self.variant == "abl3":
            cells = colour_cells(ABL_TROJAN)
        else:
            shape = (3, SIDES[self.variant], SIDES[self.variant])
            cells = torch.randint(0, 256, shape, generator=generator(self.seed, "trojan patch"), dtype=torch.uint8)
        margin = MARGINS[self.variant]
        return add_patch(corner_patch(cells, height, width, margin=margin, scale=self.scale_patch), self.add)
