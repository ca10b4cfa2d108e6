"""TRAP: isolate poisoned samples early in training, then hide the backdoor behind an extra class.

The two stages are separate pieces, so that the paper's study of isolation x removal (VI-B, VI-C) is a sweep over
``defense.isolation`` and ``defense.removal``. Stage 1 is the undefended training itself, shared through the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from backdoor_bench.training.interrupt import raise_if_requested
from backdoor_bench.types import DefenderView, DefenseResult, Facts, IsolationMethod, RemovalMethod


@dataclass(frozen=True)
class TRAP:
    """isolation picks the poisoned samples, removal repairs the fully trained model with that split."""

    isolation: IsolationMethod
    removal: RemovalMethod

    # Stage 1 is plain training: an attack that owns the training loss owns it here too (TRAP VI-G).
    honours_train_loss = True

    def check(self, facts: Facts) -> None:
        self.isolation.check(facts)
        self.removal.check(facts)

    def defend(self, view: DefenderView) -> DefenseResult:
        isolation = self.isolation.isolate(view)
        raise_if_requested()
        model = self.removal.remove(view, view.victim(), isolation)
        return DefenseResult(
            model=model,
            flagged=isolation.flagged,
            trusted=isolation.trusted,
            score=isolation.score,
            extra=dict(isolation.extra),
        )
