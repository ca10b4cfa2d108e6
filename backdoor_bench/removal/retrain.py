"""Drop the flagged samples and train a new model on the rest with the victim's recipe.

What spectral signatures and activation clustering did in their papers. Samples that an isolation neither flags nor
trusts stay in, since only the flagged ones were dropped there; ``rows=trusted`` leaves them out.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from backdoor_bench.errors import DataError, check_choice
from backdoor_bench.models.classifier import Classifier
from backdoor_bench.removal.common import KEY, clean_rows, run_removal
from backdoor_bench.training.fit import shuffled
from backdoor_bench.training.seeds import generator
from backdoor_bench.types import DefenderView, Facts, Isolation


@dataclass(frozen=True)
class Retrain:
    """rows: unflagged | trusted (all that are not flagged where the isolation picks none), the samples that are kept."""

    rows: str

    def __post_init__(self) -> None:
        check_choice(KEY + "rows", self.rows, ("unflagged", "trusted"))

    def check(self, facts: Facts) -> None:
        """Nothing to refuse: works on any data."""

    def remove(self, view: DefenderView, model: Classifier, isolation: Isolation) -> nn.Module:
        """A model trained anew, by the loss of plain training; the given model itself if no sample is dropped."""
        unflagged = (~isolation.flagged).nonzero().flatten()
        rows = unflagged if self.rows == "unflagged" else clean_rows(isolation)
        if len(rows) == len(view.train):
            view.progress.warn("nothing is flagged: retraining is skipped and the victim is returned as it is")
            return model
        if not len(rows):
            reason = (
                f"the isolation trusts no sample, set {KEY}rows=unflagged"
                if len(unflagged)
                else "every training sample is flagged"
            )
            raise DataError(f"{reason}: nothing is left to retrain on")
        config = view.train_config
        return run_removal(
            view,
            view.new_model(view.num_classes),
            view.train,
            config,
            isolation=isolation,
            settings={"retrain": self.rows},
            generator=generator(view.generator.initial_seed(), "retrain"),
            # Rows of the whole set, not a set of their own: an attacker's loss knows its samples by their numbers.
            order=shuffled(rows, config.batch_size, config.drop_last),
            loss_fn=view.train_loss,
        )
