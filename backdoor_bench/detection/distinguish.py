"""What EBD's sample distinguishment and its rivals share: the short training before, and the split by rank after.

Optimiser and schedule go on from training into fine-tuning, as in SCLBD/Effective_backdoor_defense:
finetune_attack_noTrans.py. Deviations that are not selectable: class centres are those of the batch, as in that code (the
paper: of the whole set); samples are split by rank (in that code by two thresholds, which lets any number of ties in).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.errors import ConfigError, check_range
from backdoor_bench.models.classifier import Classifier
from backdoor_bench.storage import Checkpoints
from backdoor_bench.training.fit import Batch, fit
from backdoor_bench.training.precision import full_float32
from backdoor_bench.training.recipes import recipe
from backdoor_bench.training.seeds import generator
from backdoor_bench.types import DefenderView

KEY = "defense.isolation."
STAGE = "distinguish"


def intra_class_loss(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(1 / K^2) * sum over pairs i != j of the K classes present of cos(centre_i, centre_j); scalar float32.

    features: float [B, D]; labels: int64 [B]; a centre is the mean feature of the samples with that label. A centre of
    zeros has cosine 0 (EBD Eq. 8 on a batch).
    """
    with full_float32(features.device):
        members = F.one_hot(labels, num_classes).float()
        counts = members.sum(0)
        centres = members.T @ features.float() / counts.clamp(min=1)[:, None]
        cosines = F.normalize(centres) @ F.normalize(centres).T
        return (cosines.sum() - cosines.diagonal().sum()) / (counts > 0).sum().square()


class _Pair(nn.Module):
    """The model in training, and what it was before fine-tuning: both are then in one checkpoint."""

    def __init__(self, model: Classifier, before: Classifier) -> None:
        super().__init__()
        self.model = model
        self.before = before


@dataclass(frozen=True)
class EarlyTraining:
    """The few epochs of SGD without augmentation after which samples are told apart; as cross-entropy training, ``fit``
    and the run's train_loss have it. cosine_epochs: length of the cosine schedule, of which only the start is run."""

    epochs: int
    lr: float
    momentum: float
    weight_decay: float
    batch_size: int
    cosine_epochs: int

    def __post_init__(self) -> None:
        key = KEY + "training."
        check_range(key + "epochs", self.epochs, 1, 100_000, integer=True)
        check_range(key + "lr", self.lr, 0, 1000, low_open=True)
        check_range(key + "momentum", self.momentum, 0, 1, high_open=True)
        check_range(key + "weight_decay", self.weight_decay, 0, 1)
        check_range(key + "batch_size", self.batch_size, 1, 1_000_000, integer=True)
        check_range(key + "cosine_epochs", self.cosine_epochs, self.epochs, 100_000, integer=True)

    def models(
        self, view: DefenderView, finetune_epochs: int = 0, norm_passes: int = 1
    ) -> tuple[Classifier, Classifier]:
        """(after ``epochs`` of training, after ``finetune_epochs`` more of the intra-class loss alone), in eval mode.

        Both are one cached stage. The last linear layer is not part of the intra-class loss and stays as it was.
        norm_passes: how often a step of the fine-tuning moves the batch norms' statistics.
        """
        config = recipe(
            view.train_config,
            epochs=self.cosine_epochs,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            batch_size=self.batch_size,
            schedule="cosine",
            schedule_unit="epoch",
            augment=False,
        )
        pair = _Pair(view.new_model(view.num_classes), view.new_model(view.num_classes))
        config.hardware.place(pair)

        def loss_fn(_model: nn.Module, batch: Batch) -> Tensor:
            if batch.epoch < self.epochs:
                return view.train_loss(pair.model, batch)
            with torch.no_grad():
                for _ in range(norm_passes - 1):
                    pair.model.features(batch.images)
            return intra_class_loss(pair.model.features(batch.images), batch.labels, view.num_classes)

        def on_epoch_end(epoch: int, _model: nn.Module, loss: float) -> None:
            if epoch == self.epochs:
                pair.before.load_state_dict(pair.model.state_dict())
            view.probe(pair.model, stage=STAGE, epoch=epoch, detail={"loss": loss})

        def train(checkpoints: Checkpoints) -> None:
            fit(
                pair,
                view.train,
                config,
                generator=generator(view.generator.initial_seed(), STAGE),
                stage=STAGE,
                progress=view.progress,
                loss_fn=loss_fn,
                trainable=pair.model,
                on_epoch_end=on_epoch_end,
                checkpoints=checkpoints,
                stop_after=self.epochs + finetune_epochs,
            )

        finetuning = {"finetune_epochs": finetune_epochs, "norm_passes": norm_passes}
        settings = {"recipe": config.key(), "epochs": self.epochs, **finetuning}
        view.stages.fitted(STAGE, pair, train, settings)
        pair.eval()
        return pair.before, pair.model


def check_shares(alpha_c: float | None, alpha_p: float) -> None:
    """Raise ConfigError unless both are shares and together at most 1; alpha_c may be None."""
    check_range(KEY + "alpha_p", alpha_p, 0, 1)
    if alpha_c is None:
        return
    check_range(KEY + "alpha_c", alpha_c, 0, 1)
    if alpha_c + alpha_p > 1 + 1e-9:
        raise ConfigError(
            f"{KEY}alpha_c={alpha_c} and {KEY}alpha_p={alpha_p} are not allowed together: a sample cannot be trusted and "
            "flagged, so their sum must be at most 1"
        )


def split_by_rank(
    score: Tensor, alpha_c: float | None, alpha_p: float, stream: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """(flagged, trusted) bool[N]: the floor(alpha_p * N) highest and the floor(alpha_c * N) lowest scores, exactly.

    Among equal scores chance decides. trusted is None, that is all that is not flagged, with alpha_c None.
    """
    count = len(score)
    shuffle = torch.randperm(count, generator=stream)
    order = shuffle[score[shuffle].argsort(stable=True)]

    def picked(rows: Tensor) -> Tensor:
        mask = torch.zeros(count, dtype=torch.bool)
        mask[rows] = True
        return mask

    flagged = picked(order[count - count_of(alpha_p, count) :])
    return flagged, None if alpha_c is None else picked(order[: count_of(alpha_c, count)])


def count_of(share: float, count: int) -> int:
    """floor(share * count); 0.29 * 100 is 28.999...96 in floating point, and 29 samples are meant."""
    return int(share * count + 1e-6)
