"""No attack: the clean run that every table starts with."""

from __future__ import annotations

from dataclasses import dataclass

from backdoor_bench.attacks.common import MAX_SEED, unpoisoned
from backdoor_bench.errors import check_range
from backdoor_bench.types import AttackerView, Facts, PoisonedSet


@dataclass(frozen=True)
class NoAttack:
    """Leaves the training set as it is; without a triggered test set the ASR is null."""

    seed: int

    poisons = False

    def __post_init__(self) -> None:
        check_range("attack.seed", self.seed, 0, MAX_SEED, integer=True)

    def check(self, facts: Facts) -> None:
        """Nothing can be wrong."""

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The clean set, with empty truth."""
        return unpoisoned(view)
