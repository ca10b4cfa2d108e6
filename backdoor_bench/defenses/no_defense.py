"""No defence: the model plainly trained on the poisoned set, the reference for all others."""

from __future__ import annotations

from dataclasses import dataclass

from backdoor_bench.types import DefenderView, DefenseResult, Facts


@dataclass(frozen=True)
class NoDefense:
    honours_train_loss = True

    def check(self, facts: Facts) -> None:
        """Nothing to refuse."""

    def defend(self, view: DefenderView) -> DefenseResult:
        return DefenseResult(model=view.victim())
