"""Drop the flagged samples and train a new model on the rest with the victim's recipe.

What spectral signatures and activation clustering did in their papers; TRAP discusses it in its appendix M.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from backdoor_bench.errors import DataError
from backdoor_bench.models.classifier import Classifier
from backdoor_bench.removal.common import clean_rows, run_removal
from backdoor_bench.training.fit import shuffled
from backdoor_bench.training.seeds import generator
from backdoor_bench.types import DefenderView, Facts, Isolation


@dataclass(frozen=True)
class Retrain:
    def check(self, facts: Facts) -> None:
        """Nothing to refuse: works on any data."""

    def remove(self, view: DefenderView, model: Classifier, isolation: Isolation) -> nn.Module:
        """A model trained anew; the given model itself if nothing is flagged."""
        if not isolation.flagged.any():
            view.progress.warn("nothing is flagged: retraining is skipped and the victim is returned as it is")
            return model
        rows = clean_rows(isolation)
        if not len(rows):
            raise DataError("every training sample is flagged: nothing is left to retrain on")
        config = view.train_config
        return run_removal(
            view,
            view.new_model(view.num_classes),
            view.train,
            config,
            isolation=isolation,
            settings={"retrain": True},
            generator=generator(view.generator.initial_seed(), "retrain"),
            order=shuffled(rows, config.batch_size, config.drop_last),
        )
