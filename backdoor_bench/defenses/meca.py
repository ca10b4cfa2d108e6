"""MeCa (Mellivora Capensis): train anew on what a backdoor-enhanced model gets wrong; optionally relabel the rest.

The enhancement is an isolation (``kl``), so that others can take its place here and it can precede other removals. Then
a fresh model is trained on the clean samples (MeCa Algorithm 2). With ``relabel`` the model predicts labels for the
flagged samples and is fine-tuned on all (4.2.4, Eq. 12; in the paper's Table 4 only). Readings: specs/seed_defenses.md
4.4, 4.5: the paper does not say that the final model starts untrained.

The stage of the training is named ``retrain``: ``train`` is the undefended model's, which may be in the same run, and
seconds and curves are kept by name. An attack that owns the loss of
plain training is refused: enhancement and training are defined on the cross-entropy of chosen rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backdoor_bench.detection.kl import class_report
from backdoor_bench.errors import DataError, check_choice, check_flag, check_range
from backdoor_bench.inference import predict
from backdoor_bench.models.classifier import Classifier
from backdoor_bench.removal.common import clean_rows, flagged_rows, fresh_copy
from backdoor_bench.storage import Checkpoints, digest
from backdoor_bench.training.config import TrainConfig
from backdoor_bench.training.fit import fit, shuffled
from backdoor_bench.training.interrupt import raise_if_requested
from backdoor_bench.training.recipes import recipe
from backdoor_bench.training.seeds import generator
from backdoor_bench.types import DefenderView, DefenseResult, Facts, ImageSet, IsolationMethod

SGD_LR = 0.1  # where the victim's rate is another optimiser's; specs/seed_defenses.md 4.6


@dataclass(frozen=True)
class MeCa:
    """epochs (E_s) to augment: the recipe of the training on the clean samples; lr None: the victim's where it is trained
    by SGD, else ``SGD_LR``. relabel: fine-tune on the relabelled samples as well, for ``relearn_epochs`` at ``relearn_lr``
    (cosine), the rest as in training. on_empty: what an empty clean set gives: victim (the undefended model, with a
    warning) | stop."""

    isolation: IsolationMethod
    epochs: int
    lr: float | None
    momentum: float
    weight_decay: float
    batch_size: int
    schedule: str
    augment: bool
    relabel: bool
    relearn_epochs: int
    relearn_lr: float
    on_empty: str

    def __post_init__(self) -> None:
        key = "defense."
        for name in ("epochs", "relearn_epochs"):
            check_range(key + name, getattr(self, name), 1, 100_000, integer=True)
        if self.lr is not None:
            check_range(key + "lr", self.lr, 0, 1000, low_open=True)
        check_range(key + "relearn_lr", self.relearn_lr, 0, 1000, low_open=True)
        check_range(key + "momentum", self.momentum, 0, 1, high_open=True)
        check_range(key + "weight_decay", self.weight_decay, 0, 1)
        check_range(key + "batch_size", self.batch_size, 1, 1_000_000, integer=True)
        check_choice(key + "schedule", self.schedule, ("cosine", "constant"))
        for name in ("augment", "relabel"):
            check_flag(key + name, getattr(self, name))
        check_choice(key + "on_empty", self.on_empty, ("victim", "stop"))

    def check(self, facts: Facts) -> None:
        self.isolation.check(facts)

    def defend(self, view: DefenderView) -> DefenseResult:
        """The model trained on the clean samples; with nothing flagged, a model trained on all. With an empty clean set,
        which is warned of, the undefended model, and ``extra["outcome"]`` says so, or DataError."""
        isolation = self.isolation.isolate(view)
        raise_if_requested()
        rows = clean_rows(isolation)
        clean = torch.zeros(len(view.train), dtype=torch.bool)
        clean[rows] = True
        extra = {**isolation.extra, **class_report(view, clean), "outcome": "trained on the clean set"}
        model: nn.Module
        if not len(rows):
            if self.on_empty == "stop":
                raise DataError("the clean set is empty: nothing is left to train on (defense.on_empty=stop)")
            view.progress.warn("no sample is left to train on: the undefended model is returned as it is")
            extra["outcome"] = "clean set empty: the undefended model"
            model = view.victim()
        else:
            if not isolation.flagged.any():
                view.progress.warn("nothing is flagged: the model is trained on the whole set")
            split = digest([isolation.flagged.tolist(), clean.tolist()])
            model = self._trained(view, rows, split)
            if self.relabel:
                raise_if_requested()
                model, extra["relabelled"] = self._relearned(view, model, rows, flagged_rows(isolation), split)
        return DefenseResult(
            model=model, flagged=isolation.flagged, trusted=isolation.trusted, score=isolation.score, extra=extra
        )

    def _trained(self, view: DefenderView, rows: Tensor, split: str) -> Classifier:
        """A fresh model trained on these rows with their labels as given."""
        config = self._training(view)
        settings = {"recipe": config.key(), "split": split}
        return _fitted(view, "retrain", view.new_model(view.num_classes), view.train, rows, config, settings)

    def _relearned(
        self, view: DefenderView, model: Classifier, rows: Tensor, flagged: Tensor, split: str
    ) -> tuple[Classifier, int]:
        """The model fine-tuned on the clean rows and, with its own predictions as labels, the flagged ones; and how many
        labels that changed."""
        predictions = predict(model, view.train.images, view.train_config.hardware)[flagged]
        given = view.train.labels
        labels = given.clone()
        labels[flagged.to(labels.device)] = predictions.to(labels.device)
        config = self._recipe(view, self.relearn_epochs, self.relearn_lr, "cosine")
        settings = {"recipe": config.key(), "before": self._training(view).key(), "split": split}
        data = ImageSet(view.train.images, labels, view.num_classes, view.train.augment)
        both = torch.cat([rows, flagged]).unique()
        relearned = _fitted(view, "relearn", fresh_copy(model), data, both, config, settings)
        return relearned, int((labels != given).sum())

    def _training(self, view: DefenderView) -> TrainConfig:
        """The recipe of the training on the clean samples."""
        victims = view.train_config.lr if view.train_config.optimizer == "sgd" else SGD_LR
        return self._recipe(view, self.epochs, victims if self.lr is None else self.lr, self.schedule)

    def _recipe(self, view: DefenderView, epochs: int, lr: float, schedule: str) -> TrainConfig:
        return recipe(
            view.train_config,
            epochs=epochs,
            lr=lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            batch_size=self.batch_size,
            schedule=schedule,
            augment=self.augment,
        )


def _fitted(
    view: DefenderView,
    stage: str,
    model: Classifier,
    data: ImageSet,
    rows: Tensor,
    config: TrainConfig,
    settings: Mapping[str, Any],
) -> Classifier:
    """``model`` trained on these rows of ``data`` as the cached stage ``stage``, probed after each epoch."""

    def on_epoch_end(epoch: int, trained: nn.Module, loss: float) -> None:
        view.probe(trained, stage=stage, epoch=epoch, detail={"loss": loss})

    def train(checkpoints: Checkpoints) -> None:
        fit(
            model,
            data,
            config,
            generator=generator(view.generator.initial_seed(), f"meca {stage}"),
            stage=stage,
            progress=view.progress,
            order=shuffled(rows, config.batch_size),
            on_epoch_end=on_epoch_end,
            checkpoints=checkpoints,
        )

    config.hardware.place(model)
    view.stages.fitted(stage, model, train, settings)
    return model.eval()
