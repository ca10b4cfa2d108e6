"""BadNets (Gu et al. 2017): a small opaque square in the bottom right corner.

Serves the ids ``badnets``, ``badnets_grid``, ``badnets_white`` and ``badnets_all2all``, which differ in the square, the
choice of rows and the label rule: all of it configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

from backdoor_bench.attacks.common import check_facts, check_settings, poison_static
from backdoor_bench.errors import ConfigError, check_choice, check_range
from backdoor_bench.triggers.patch import (
    LARGE_ABOVE,
    Patch,
    corner_patch,
    grey_cells,
    grid_size,
    top_left_checker,
    white_cells,
    white_tenth,
)
from backdoor_bench.types import AttackerView, Facts, PoisonedSet, Trigger


@dataclass(frozen=True)
class BadNets:
    """Stamps a square of ``side`` x ``side`` cells, ``margin`` cells from the bottom right corner.

    pattern: ``grid3`` shows ``cells`` (grey values), ``white`` is 255. A cell is one pixel at 32; with ``scale_patch``
    it grows with the image. hires: the form above 64 pixels, see ``triggers.patch``; the shared keys: ``Settings``.
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
    pattern: str
    cells: list[list[int]]
    side: int
    margin: int
    scale_patch: bool
    hires: str

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("attack.pattern", self.pattern, ("grid3", "white"))
        check_choice("attack.hires", self.hires, ("scale", "white22", "tr_topleft30"))
        check_range("attack.side", self.side, 1, float("inf"), integer=True)
        check_range("attack.margin", self.margin, 0, float("inf"), integer=True)
        if not isinstance(self.scale_patch, bool):
            raise ConfigError(f"attack.scale_patch={self.scale_patch!r} is not allowed: it must be true or false")
        if self.pattern == "grid3":
            self._check_cells()

    def _check_cells(self) -> None:
        is_square = isinstance(self.cells, list) and len(self.cells) == self.side
        if not is_square or any(not isinstance(row, list) or len(row) != self.side for row in self.cells):
            raise ConfigError(
                f"attack.cells={self.cells!r} is not allowed with attack.side={self.side}: "
                f"it must be {self.side} rows of {self.side} grey values 0..255"
            )
        for row in self.cells:
            for value in row:
                check_range("attack.cells", value, 0, 255, integer=True)

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the classes, the rate or the square cannot fit."""
        check_facts(self, facts)
        self._trigger(facts.image_size, facts.image_size)

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with the square on the chosen rows."""
        return poison_static(self, view, *self.triggers(view))

    def triggers(self, view: AttackerView) -> tuple[Trigger, Trigger]:
        """The square, at training and at test."""
        patch = self._trigger(*view.train.images.shape[-2:])
        return patch, patch

    def _trigger(self, height: int, width: int) -> Patch:
        shorter = min(height, width)
        if shorter > LARGE_ABOVE and self.hires != "scale":
            return white_tenth(height, width) if self.hires == "white22" else top_left_checker(height, width)
        # In cells, which are what the two keys are counted in.
        room = grid_size(shorter, self.scale_patch)
        check_range("attack.side", self.side, 1, room, integer=True)
        check_range("attack.margin", self.margin, 0, room - self.side, integer=True)
        cells = white_cells(self.side) if self.pattern == "white" else grey_cells(self.cells)
        return corner_patch(cells, height, width, margin=self.margin, scale=self.scale_patch)
