"""Isolate poisoned samples, then repair the plainly trained model with that split: TRAP, D-BR, and any other pair.

The two stages are separate pieces, so that TRAP's study of isolation x removal (VI-B, VI-C) and EBD's swap of metrics
are sweeps over ``defense.isolation`` and ``defense.removal``. The model that is repaired is the undefended one, shared
through the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from backdoor_bench.training.interrupt import raise_if_requested
from backdoor_bench.types import DefenderView, DefenseResult, Facts, IsolationMethod, RemovalMethod


@dataclass(frozen=True)
class IsolateAndRemove:
    """isolation picks the poisoned samples, removal repairs the fully trained model with that split (None: it stays)."""

    isolation: IsolationMethod
    removal: RemovalMethod | None

    # The model that is repaired is plainly trained: an attack that owns the loss owns it here too (TRAP VI-G).
    honours_train_loss = True

    def check(self, facts: Facts) -> None:
        self.isolation.check(facts)
        if self.removal is not None:
            self.removal.check(facts)

    def defend(self, view: DefenderView) -> DefenseResult:
        isolation = self.isolation.isolate(view)
        raise_if_requested()
        model = view.victim()
        if self.removal is not None:
            model = self.removal.remove(view, model, isolation)
        return DefenseResult(
            model=model,
            flagged=isolation.flagged,
            trusted=isolation.trusted,
            score=isolation.score,
            extra=dict(isolation.extra),
        )
