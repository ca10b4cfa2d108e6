"""D-ST's mixed cross-entropy: a new last layer learns the clean samples and, weakly, unlearns the flagged ones.

Loss of a batch: mean CE of its clean samples - lambda_p * mean CE of its flagged samples (EBD Eq. 3); a batch without
one of the two drops that term. The extractor is frozen. EBD uses lr 5 on a contrastive extractor's features; on those
of a classifier a smaller one is needed (specs/baseline_removal_and_detection.md 4.2), hence ``lr`` is ours.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.errors import check_range
from backdoor_bench.models.classifier import Classifier, replace_head
from backdoor_bench.removal.common import KEY, check_recipe, flagged_rows, run_removal, some_clean_rows
from backdoor_bench.training.fit import Batch, shuffled
from backdoor_bench.training.recipes import recipe
from backdoor_bench.training.seeds import generator
from backdoor_bench.types import DefenderView, Facts, Isolation


def mixed_cross_entropy(logits: Tensor, labels: Tensor, is_flagged: Tensor, lambda_p: float) -> Tensor:
    """mean CE over the clean samples - lambda_p * mean CE over the flagged ones; scalar.

    logits: float [B, C]; labels: int64 [B]; is_flagged: bool [B].
    """
    losses = F.cross_entropy(logits, labels, reduction="none")
    weight = is_flagged.to(losses.dtype)
    clean = (losses * (1 - weight)).sum() / (1 - weight).sum().clamp(min=1)
    flagged = (losses * weight).sum() / weight.sum().clamp(min=1)
    return clean - lambda_p * flagged


@dataclass(frozen=True)
class MixedCE:
    epochs: int
    lr: float
    momentum: float
    weight_decay: float
    batch_size: int
    schedule: str
    augment: bool
    lambda_p: float

    def __post_init__(self) -> None:
        check_recipe(self)
        check_range(KEY + "lambda_p", self.lambda_p, 0, float("inf"), high_open=True)

    def check(self, facts: Facts) -> None:
        """Nothing to refuse: works on any data."""

    def remove(self, view: DefenderView, model: Classifier, isolation: Isolation) -> nn.Module:
        """A copy of the model with a new last layer; the model itself if nothing is flagged.

        Raises DataError if there is no clean sample: the new layer could only unlearn.
        """
        if not isolation.flagged.any():
            view.progress.warn("nothing is flagged: mixed cross-entropy is skipped and the victim is returned as it is")
            return model
        rows = torch.cat([some_clean_rows(isolation), flagged_rows(isolation)]).unique()
        values = asdict(self)
        lambda_p = values.pop("lambda_p")
        is_flagged = isolation.flagged.to(view.device)
        stream = generator(view.generator.initial_seed(), "mixed_ce")

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            return mixed_cross_entropy(model(batch.images), batch.labels, is_flagged[batch.index], lambda_p)

        return run_removal(
            view,
            replace_head(model, view.num_classes, stream),
            view.train,
            recipe(view.train_config, **values),
            isolation=isolation,
            settings={"mixed_ce": asdict(self)},
            generator=stream,
            part=lambda trained: trained.head,
            loss_fn=loss_fn,
            order=shuffled(rows, self.batch_size),
        )
