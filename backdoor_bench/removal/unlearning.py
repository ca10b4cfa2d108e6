"""ABL's unlearning: gradient ascent of the cross-entropy on the flagged samples.

Source: bboylyg/ABL:quick_unlearning_demo.py (SGD 0.9, weight decay 1e-4, Nesterov, lr 5e-4, 5 epochs, batch 64, no
augmentation). -CE has no bound, so accuracy collapses with many flagged samples or with clean-label attacks, whose
flagged images do belong to their class (specs/baseline_removal_and_detection.md 4.2).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.errors import ConfigError, check_flag
from backdoor_bench.models.classifier import Classifier
from backdoor_bench.removal.common import KEY, check_recipe, flagged_rows, fresh_copy, run_removal
from backdoor_bench.training.fit import Batch, shuffled
from backdoor_bench.training.recipes import recipe
from backdoor_bench.training.seeds import generator
from backdoor_bench.types import DefenderView, Facts, Isolation


def ascent(model: nn.Module, batch: Batch) -> Tensor:
    """Minus the mean cross-entropy."""
    return -F.cross_entropy(model(batch.images), batch.labels)


@dataclass(frozen=True)
class Unlearning:
    epochs: int
    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    batch_size: int
    schedule: str
    augment: bool

    def __post_init__(self) -> None:
        check_recipe(self)
        check_flag(KEY + "nesterov", self.nesterov)
        if self.nesterov and not self.momentum:
            raise ConfigError(f"{KEY}nesterov=true is not allowed with {KEY}momentum=0: set a momentum above 0")

    def check(self, facts: Facts) -> None:
        """Nothing to refuse: works on any data."""

    def remove(self, view: DefenderView, model: Classifier, isolation: Isolation) -> nn.Module:
        """A copy of the model that has unlearned the flagged samples; the model itself if nothing is flagged."""
        rows = flagged_rows(isolation)
        if not len(rows):
            view.progress.warn("nothing is flagged: unlearning is skipped and the victim is returned as it is")
            return model
        return run_removal(
            view,
            fresh_copy(model),
            view.train,
            recipe(view.train_config, **asdict(self)),
            isolation=isolation,
            settings={"unlearning": asdict(self)},
            generator=generator(view.generator.initial_seed(), "unlearning"),
            loss_fn=ascent,
            order=shuffled(rows, self.batch_size),
        )
