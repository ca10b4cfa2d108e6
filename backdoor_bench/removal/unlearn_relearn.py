"""D-BR's repair: in each round one pass of ascent on the flagged samples, then one of descent on the clean ones.

One new optimiser serves both passes, the model is in train mode, and augmentation is drawn anew in each (EBD Algorithm 4,
Eqs. 4, 5; SCLBD/Effective_backdoor_defense:unlearn_relearn.py). Where one of the two sets is empty (EBD Fig. 13 begins
with no sample in it) the rounds are the other pass alone.

Two deviations from that code are not selectable. It keeps the round with the best test ACC - ASR; here the last round
counts. It also augments CIFAR-100 by the crop alone in these rounds, where ``augment`` means the victim's own
augmentation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.errors import check_choice
from backdoor_bench.models.classifier import Classifier
from backdoor_bench.removal.common import KEY, check_recipe, clean_rows, flagged_rows, fresh_copy, run_removal
from backdoor_bench.training.fit import Batch, shuffled
from backdoor_bench.training.recipes import recipe
from backdoor_bench.training.seeds import generator
from backdoor_bench.types import DefenderView, Facts, Isolation


@dataclass(frozen=True)
class UnlearnRelearn:
    """epochs: rounds (e_ft). rounds: both|unlearn|relearn, the passes of a round (EBD Fig. 5)."""

    epochs: int
    lr: float
    momentum: float
    weight_decay: float
    batch_size: int
    schedule: str
    augment: bool
    rounds: str

    def __post_init__(self) -> None:
        check_recipe(self)
        check_choice(KEY + "rounds", self.rounds, ("both", "unlearn", "relearn"))

    def check(self, facts: Facts) -> None:
        """Nothing to refuse: works on any data."""

    def remove(self, view: DefenderView, model: Classifier, isolation: Isolation) -> nn.Module:
        """A repaired copy of the model; the model itself if no pass of the rounds has a sample."""
        passes = [
            ("unlearning", "nothing is flagged", flagged_rows(isolation)),
            ("relearning", "no sample is trusted", clean_rows(isolation)),
        ]
        wanted = {"both": passes, "unlearn": passes[:1], "relearn": passes[1:]}[self.rounds]
        usable = [(name, rows) for name, _, rows in wanted if len(rows)]
        if len(usable) < len(wanted):
            reasons = " and ".join(reason for _, reason, rows in wanted if not len(rows))
            left = f"the rounds are {usable[0][0]} alone" if usable else "the victim is returned as it is"
            view.progress.warn(f"{reasons}: {left}")
        if not usable:
            return model
        shuffles = [shuffled(rows, self.batch_size) for _, rows in usable]
        ascends = isolation.flagged.to(view.device)
        values = {name: value for name, value in asdict(self).items() if name != "rounds"}

        def order(epoch: int, stream: torch.Generator) -> list[Tensor]:
            return [batch for one_pass in shuffles for batch in one_pass(epoch, stream)]

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            # A batch holds samples of one pass only, so its first one tells the direction.
            sign = 1.0 - 2.0 * ascends[batch.index[0]].float()
            return sign * F.cross_entropy(model(batch.images), batch.labels)

        return run_removal(
            view,
            fresh_copy(model),
            view.train,
            recipe(view.train_config, **values),
            isolation=isolation,
            settings={"unlearn_relearn": asdict(self)},
            generator=generator(view.generator.initial_seed(), "unlearn_relearn"),
            loss_fn=loss_fn,
            order=order,
        )
