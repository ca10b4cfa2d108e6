"""D-ST: an extractor from semi-supervised contrastive learning, then a linear classifier by mixed cross-entropy.

EBD (Chen, Wu and Wang, NeurIPS 2022), Algorithm 3. Two views of every training sample attract each other; samples that
the isolation trusts also attract those of their label. The last layer then learns the trusted samples and weakly
unlearns the flagged ones (``removal.mixed_ce``). Samples that are neither trusted nor flagged serve the extractor only.
The baselines of its table are the same two stages without isolation: contrastive learning without labels (Baseline1) or
with all given ones (Baseline2), then plain cross-entropy on all samples.

Deviations from SCLBD/Effective_backdoor_defense:ST. The network is the one chosen by ``model`` and the classes attract
by a symmetric mask (``asymmetric_mask``). The warm-up is a share of the epochs (``extractor_warmup``), and small batches
have it too. The last epoch counts, not the one with the best test accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.data.contrastive import ViewAugmentation
from backdoor_bench.detection.distinguish import count_of
from backdoor_bench.errors import ConfigError, check_choice, check_flag, check_range
from backdoor_bench.models.classifier import Classifier, replace_head
from backdoor_bench.removal.common import clean_rows, flagged_rows, some_clean_rows
from backdoor_bench.removal.mixed_ce import mixed_cross_entropy
from backdoor_bench.storage import Checkpoints, digest
from backdoor_bench.training.config import TrainConfig
from backdoor_bench.training.contrastive import contrastive_loss, positive_mask
from backdoor_bench.training.fit import Batch, fit, shuffled
from backdoor_bench.training.interrupt import raise_if_requested
from backdoor_bench.training.recipes import recipe
from backdoor_bench.training.seeds import derive, generator
from backdoor_bench.types import DefenderView, DefenseResult, Facts, Isolation, IsolationMethod

EXTRACTORS = ("ssctl", "simclr", "supcon")
CLASSIFIERS = ("mixed_ce", "ce")


class Projected(nn.Module):
    """Float images [B, 3, H, W] in [0, 1] -> projections [B, P] of length 1: features, linear, ReLU, linear."""

    def __init__(self, encoder: Classifier, size: int) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.feature_dim
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, size))

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.projection(self.encoder.features(images)), dim=1)


@dataclass(frozen=True)
class DST:
    """isolation: None only where nothing needs a split (extractor simclr or supcon, classifier ce).

    extractor: ssctl | simclr (no labels attract) | supcon (all given labels do), CTL and S-CTL of EBD Table 3.
    classifier: mixed_ce on trusted and flagged samples | ce on all. views: of both stages, two a sample in the first.
    projection_size: outputs of the projection, which is dropped after the first stage. extractor_warmup: share of its
    epochs, rounded to whole ones, from the learning rate ``extractor_warmup_from``; extractor_lr_end: the share of
    ``extractor_lr`` to which the cosine falls. classifier_milestones: epochs after which its learning rate is multiplied by
    ``classifier_gamma``. momentum: of both stages.
    """

    isolation: IsolationMethod | None
    extractor: str
    classifier: str
    views: ViewAugmentation
    temperature: float
    base_temperature: float
    asymmetric_mask: bool
    projection_size: int
    momentum: float
    extractor_epochs: int
    extractor_lr: float
    extractor_lr_end: float
    extractor_warmup: float
    extractor_warmup_from: float
    extractor_weight_decay: float
    extractor_batch_size: int
    lambda_p: float
    classifier_epochs: int
    classifier_lr: float
    classifier_milestones: Sequence[int]
    classifier_gamma: float
    classifier_weight_decay: float
    classifier_batch_size: int

    def __post_init__(self) -> None:
        check_choice("defense.extractor", self.extractor, EXTRACTORS)
        check_choice("defense.classifier", self.classifier, CLASSIFIERS)
        for name in ("temperature", "base_temperature"):
            check_range(f"defense.{name}", getattr(self, name), 0, float("inf"), low_open=True, high_open=True)
        check_flag("defense.asymmetric_mask", self.asymmetric_mask)
        check_range("defense.projection_size", self.projection_size, 1, 1_000_000, integer=True)
        check_range("defense.momentum", self.momentum, 0, 1, high_open=True)
        for name in ("extractor_lr_end", "extractor_warmup"):
            check_range(f"defense.{name}", getattr(self, name), 0, 1)
        check_range("defense.extractor_warmup_from", self.extractor_warmup_from, 0, 1000)
        check_range("defense.lambda_p", self.lambda_p, 0, float("inf"), high_open=True)
        check_range("defense.classifier_gamma", self.classifier_gamma, 0, 1)
        if not isinstance(self.classifier_milestones, (list, tuple)):
            raise ConfigError(
                f"defense.classifier_milestones={self.classifier_milestones!r} is not allowed: give a list of epochs"
            )
        for milestone in self.classifier_milestones:
            check_range("defense.classifier_milestones", milestone, 1, 100_000, integer=True)
        for stage in ("extractor", "classifier"):
            check_range(f"defense.{stage}_epochs", getattr(self, f"{stage}_epochs"), 1, 100_000, integer=True)
            check_range(f"defense.{stage}_lr", getattr(self, f"{stage}_lr"), 0, 1000, low_open=True)
            check_range(f"defense.{stage}_weight_decay", getattr(self, f"{stage}_weight_decay"), 0, 1)
            check_range(f"defense.{stage}_batch_size", getattr(self, f"{stage}_batch_size"), 1, 1_000_000, integer=True)
        if self.isolation is None and self._needs_split:
            raise ConfigError(
                f"defense.isolation=null is not allowed with defense.extractor={self.extractor} and "
                f"defense.classifier={self.classifier}: choose an isolation, or extractor=simclr or supcon and classifier=ce"
            )

    @property
    def _needs_split(self) -> bool:
        return self.extractor == "ssctl" or self.classifier == "mixed_ce"

    def check(self, facts: Facts) -> None:
        if self.isolation is None:
            return
        self.isolation.check(facts)
        share = getattr(self.isolation, "alpha_c", None)  # None: all that are not flagged are trusted
        count = facts.train_size
        if self._needs_split and share is not None and (share == 0 or (count and not count_of(share, count))):
            of_these = f" of {count:,}" if count else ""
            raise ConfigError(
                f"defense.isolation.alpha_c={share} is not allowed: it trusts no sample{of_these}, and there would be "
                "nothing from which the classes could be learnt; raise it"
            )

    def defend(self, view: DefenderView) -> DefenseResult:
        isolation = self.isolation.isolate(view) if self.isolation is not None else _nothing_isolated(len(view.train))
        raise_if_requested()
        if self._needs_split:
            self._look_at(isolation, view)
        encoder = self._train_extractor(view, isolation)
        raise_if_requested()
        model = self._train_classifier(view, encoder, isolation)
        if self.isolation is None:
            return DefenseResult(model)
        return DefenseResult(model, isolation.flagged, isolation.trusted, isolation.score, dict(isolation.extra))

    def _look_at(self, isolation: Isolation, view: DefenderView) -> None:
        """Refuses a split without trusted samples, and warns of one that lacks something."""
        present = view.train.labels[some_clean_rows(isolation)].bincount(minlength=view.num_classes)
        missing = (present == 0).nonzero().flatten().tolist()
        if missing:
            view.progress.warn(f"no sample of the classes {missing} is trusted: they are hardly learnt")
        if not isolation.flagged.any():
            view.progress.warn("nothing is flagged: the classifier learns the trusted samples and unlearns nothing")

    # ------------------------------------------------------------------ stage 1

    def _train_extractor(self, view: DefenderView, isolation: Isolation) -> Classifier:
        """The network whose features were trained by contrastive learning; its head is as it was initialised."""
        seed = view.generator.initial_seed()
        with torch.random.fork_rng():
            torch.manual_seed(derive(seed, "dst projection"))
            network = Projected(view.new_model(view.num_classes), self.projection_size)
        config = self._extractor_recipe(view.train_config)
        may_attract = self._may_attract(isolation).to(view.device)
        camera = view.train.augment

        def loss_fn(network: nn.Module, batch: Batch) -> Tensor:
            views = self.views(torch.cat([batch.pixels, batch.pixels]), batch.generator)
            if camera is not None:
                views = camera(views, batch.generator)
            mask = positive_mask(batch.labels, may_attract[batch.index], self.asymmetric_mask)
            projections = network(config.hardware.format(views))
            return contrastive_loss(projections, mask, self.temperature, self.base_temperature)

        def train(checkpoints: Checkpoints) -> None:
            fit(
                network,
                replace(view.train, augment=None),  # applied to the views instead
                config,
                generator=generator(seed, "dst extractor"),
                stage="extractor",
                progress=view.progress,
                loss_fn=loss_fn,
                on_epoch_end=lambda epoch, _, loss: view.probe(stage="extractor", epoch=epoch, detail={"loss": loss}),
                checkpoints=checkpoints,
            )

        network.to(view.device)
        view.stages.fitted("extractor", network, train, self._extractor_settings(view.train_config, isolation))
        return network.encoder

    def _may_attract(self, isolation: Isolation) -> Tensor:
        """bool [N]: whose label counts in contrastive learning."""
        attracts = torch.full_like(isolation.flagged, self.extractor == "supcon")
        if self.extractor == "ssctl":
            attracts[clean_rows(isolation)] = True
        return attracts

    def _extractor_recipe(self, base: TrainConfig) -> TrainConfig:
        warmup = round(self.extractor_warmup * self.extractor_epochs)
        return replace(
            self._recipe(base, "extractor", "cosine"),
            schedule_unit="epoch_from_1",
            lr_min=self.extractor_lr_end * self.extractor_lr,
            warmup_epochs=warmup,
            warmup_from=self.extractor_warmup_from,
        )

    def _recipe(self, base: TrainConfig, stage: str, schedule: str) -> TrainConfig:
        """The stage's values on top of the victim's recipe, without its augmentation: the views come instead."""
        values = {name: getattr(self, f"{stage}_{name}") for name in ("epochs", "lr", "weight_decay", "batch_size")}
        return recipe(base, **values, momentum=self.momentum, schedule=schedule, schedule_unit="epoch", augment=False)

    def _extractor_settings(self, base: TrainConfig, isolation: Isolation) -> dict[str, Any]:
        """What the extractor depends on; the split only where its labels are used."""
        return {
            "recipe": self._extractor_recipe(base).key(),
            "views": asdict(self.views),
            "loss": [self.temperature, self.base_temperature, self.asymmetric_mask, self.projection_size],
            "may_attract": digest(self._may_attract(isolation).tolist()),
        }

    # ------------------------------------------------------------------ stage 2

    def _train_classifier(self, view: DefenderView, encoder: Classifier, isolation: Isolation) -> Classifier:
        """The encoder, frozen, with a new last layer: the model without the projection."""
        stream = generator(view.generator.initial_seed(), "dst classifier")
        model = replace_head(encoder, view.num_classes, stream)
        config = replace(
            self._recipe(view.train_config, "classifier", "multistep"),
            milestones=tuple(self.classifier_milestones),
            gamma=self.classifier_gamma,
        )
        lambda_p, rows = 0.0, torch.arange(len(view.train))
        is_flagged = torch.zeros_like(isolation.flagged)
        if self.classifier == "mixed_ce":
            lambda_p, is_flagged = self.lambda_p, isolation.flagged
            rows = torch.cat([clean_rows(isolation), flagged_rows(isolation)]).unique()
        unlearnt, camera = is_flagged.to(view.device), view.train.augment

        def one_view(images: Tensor, draws: torch.Generator) -> Tensor:
            images = self.views(images, draws)
            return camera(images, draws) if camera is not None else images

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            return mixed_cross_entropy(model(batch.images), batch.labels, unlearnt[batch.index], lambda_p)

        def on_epoch_end(epoch: int, trained: nn.Module, loss: float) -> None:
            view.probe(trained, stage="classifier", epoch=epoch, detail={"loss": loss})

        def train(checkpoints: Checkpoints) -> None:
            fit(
                model,
                replace(view.train, augment=one_view),
                config,
                generator=stream,
                stage="classifier",
                progress=view.progress,
                loss_fn=loss_fn,
                order=shuffled(rows, config.batch_size),
                trainable=model.head,
                on_epoch_end=on_epoch_end,
                checkpoints=checkpoints,
            )

        settings = {
            "extractor": self._extractor_settings(view.train_config, isolation),
            "recipe": config.key(),
            "lambda_p": lambda_p,
            "split": digest([rows.tolist(), is_flagged.tolist()]),
        }
        view.stages.fitted("classifier", model, train, settings)
        return model.eval()


def _nothing_isolated(count: int) -> Isolation:
    return Isolation(torch.zeros(count, dtype=torch.bool))
