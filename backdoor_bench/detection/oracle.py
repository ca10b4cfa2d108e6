"""The true split: what a removal can do when nothing is wrong with the isolation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from backdoor_bench.errors import ConfigError, check_range
from backdoor_bench.training.seeds import generator
from backdoor_bench.types import DefenderView, Facts, Isolation


@dataclass(frozen=True)
class OracleIsolation:
    """poison_share, clean_share: shares of the poisoned rows that are flagged and of the others that are trusted.

    The one isolation that is told the truth (``told``, called by the run before anything else); by its name nobody can
    take its numbers for a defence's.
    """

    poison_share: float
    clean_share: float

    honours_train_loss = True  # it trains nothing

    def __post_init__(self) -> None:
        check_range("defense.isolation.poison_share", self.poison_share, 0, 1)
        check_range("defense.isolation.clean_share", self.clean_share, 0, 1, low_open=True)

    def check(self, facts: Facts) -> None:
        """Nothing to refuse before the truth is known."""

    def told(self, is_poisoned: Tensor | None, is_cover: Tensor | None) -> Informed:
        """The isolation that knows; raises ConfigError where nobody knows the truth."""
        if is_poisoned is None:
            raise ConfigError(
                "defense.isolation=oracle needs the truth about the training set, which is not known here"
            )
        cover = is_cover if is_cover is not None else torch.zeros_like(is_poisoned)
        return Informed(self.poison_share, self.clean_share, is_poisoned, ~(is_poisoned | cover))


@dataclass(frozen=True, eq=False)
class Informed:
    poison_share: float
    clean_share: float
    poisoned: Tensor
    clean: Tensor

    def check(self, facts: Facts) -> None:
        """Nothing to refuse."""

    def isolate(self, view: DefenderView) -> Isolation:
        """The true split, thinned at random to the shares; cover samples are neither flagged nor trusted."""
        stream = generator(view.generator.initial_seed(), "oracle")
        flagged = _thinned(self.poisoned, self.poison_share, stream)
        return Isolation(flagged, _thinned(self.clean, self.clean_share, stream), self.poisoned.float())


def _thinned(mask: Tensor, share: float, stream: torch.Generator) -> Tensor:
    rows = mask.nonzero().flatten()
    kept = rows[torch.randperm(len(rows), generator=stream)[: int(share * len(rows))]]
    thin = torch.zeros_like(mask)
    thin[kept] = True
    return thin


def informed(defense: Any, is_poisoned: Tensor | None, is_cover: Tensor | None) -> Any:
    """The defence with an oracle isolation told the truth; any other as it is."""
    isolation = getattr(defense, "isolation", None)
    if not isinstance(isolation, OracleIsolation):
        return defense
    return replace(defense, isolation=isolation.told(is_poisoned, is_cover))
