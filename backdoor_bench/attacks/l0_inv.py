"""l0-invisible (Li et al. 2020, as in I-BAU and Trap-and-Replace): nine saturated pixels in the last row."""

from __future__ import annotations

from dataclasses import dataclass

from backdoor_bench.attacks.common import check_facts, check_settings, poison_static
from backdoor_bench.errors import check_flag
from backdoor_bench.triggers.additive import colour_cells
from backdoor_bench.triggers.patch import check_room, corner_patch
from backdoor_bench.types import AttackerView, Facts, PoisonedSet, Trigger

BLACK, RED, BLUE, WHITE = (0, 0, 0), (255, 0, 0), (0, 0, 255), (255, 255, 255)
MAGENTA, YELLOW, CYAN = (255, 0, 255), (255, 255, 0), (0, 255, 255)
COLOURS = (BLACK, MAGENTA, BLUE, YELLOW, WHITE, CYAN, CYAN, RED, WHITE)  # columns 23..31 of row 31


@dataclass(frozen=True)
class L0Inv:
    """Overwrites nine cells of the last row, flush right. A cell is one pixel at 32; ``scale_patch`` as in BadNets."""

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
    scale_patch: bool

    def __post_init__(self) -> None:
        check_settings(self)
        check_flag("attack.scale_patch", self.scale_patch)

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the classes, the rate or the nine cells cannot fit."""
        check_facts(self, facts)
        check_room("the row of l0_inv", len(COLOURS), facts.image_size)

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with the nine cells on the chosen rows."""
        return poison_static(self, view, *self.triggers(view))

    def triggers(self, view: AttackerView) -> tuple[Trigger, Trigger]:
        """The nine cells, at training and at test."""
        patch = corner_patch(colour_cells((COLOURS,)), *view.train.images.shape[-2:], scale=self.scale_patch)
        return patch, patch
