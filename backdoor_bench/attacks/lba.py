"""LBA-n, the latent backdoor (Yao et al. 2019) as Trap-and-Replace uses it against itself (C.1): a patch that makes
images look like the target class at an inner layer, so that the backdoor outlives a replaced head.

Serves the ids ``lba_14``, ``lba_12`` and ``lba_10``, which differ in the layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.attacks.common import check_facts, check_rows, check_settings, poison_static
from backdoor_bench.attacks.surrogate import surrogate
from backdoor_bench.data.augment import Augmentation
from backdoor_bench.errors import ConfigError, check_choice, check_flag, check_range
from backdoor_bench.models.classifier import Classifier
from backdoor_bench.training.config import TrainConfig
from backdoor_bench.training.fit import Batch, LossFn, Order, fit
from backdoor_bench.training.seeds import generator
from backdoor_bench.triggers.patch import GRID, Patch
from backdoor_bench.triggers.pixels import to_uint8
from backdoor_bench.types import AttackerView, Facts, PoisonedSet, Trigger

POOLED = 14  # the layer that is no block
LEARNT_FROM = (
    "seed", "target_class", "layer", "side_ratio", "margin", "scale_patch", "target_images",
    "trig_lr", "trig_batches", "trig_batch", "trig_steps",
)  # fmt: skip


@dataclass(frozen=True)
class LatentBackdoor:
    """Stamps an opaque square near the bottom right corner whose pixels are optimised at ``layer`` of a surrogate.

    layer: on WRN16-1, counted as its paper does, 14 is the input of the head (pooled features), 12 that of the last
    block, 10 that of the last stage; any other network is cut at the same three places (12 and 10 are one place where a
    stage has one block). mode: ``data`` only poisons; ``loss`` also owns the victim's training loss, see
    ``latent_loss``. side_ratio: of the shorter side, rounded down; margin: pixels at 32.

    The patch comes closer, by MSE, to the mean features of ``target_images`` images of the target class, as in
    trojanzoo (the original takes random ones anew, which has the same gradient in expectation, and 100 units only).
    The surrogate never saw the trigger; the original optimises on the teacher it will infect.
    """

    target_class: int | None
    source_class: int | None
    seed: int
    label_rule: str
    poison_rate: float
    poison_base: str
    poison_pool: str
    poison_order: str
    poison_count: int | None
    cover_rate: float
    layer: int
    mode: str
    side_ratio: float
    margin: int
    scale_patch: bool
    target_images: int
    trig_lr: float
    trig_batches: int
    trig_batch: int
    trig_steps: int
    mse_weight: float
    mean_momentum: float

    made_for_target = True  # another target class is another trigger

    def __post_init__(self) -> None:
        # No all2all: the patch is made for one class.
        check_settings(self, rules=("all2one", "source2target", "clean"))
        if self.layer not in (10, 12, POOLED):
            raise ConfigError(f"attack.layer={self.layer!r} is not allowed: choose one of 14, 12, 10")
        check_choice("attack.mode", self.mode, ("data", "loss"))
        check_range("attack.side_ratio", self.side_ratio, 0, 1, low_open=True)
        check_range("attack.margin", self.margin, 0, float("inf"), integer=True)
        check_flag("attack.scale_patch", self.scale_patch)
        for key in ("target_images", "trig_batches", "trig_batch", "trig_steps"):
            check_range(f"attack.{key}", getattr(self, key), 1, float("inf"), integer=True)
        check_range("attack.trig_lr", self.trig_lr, 0, float("inf"), low_open=True, high_open=True)
        check_range("attack.mse_weight", self.mse_weight, 0, float("inf"), high_open=True)
        check_range("attack.mean_momentum", self.mean_momentum, 0, 1, high_open=True)

    @property
    def controls_training(self) -> bool:
        """Whether the attack owns the victim's loss."""
        return self.mode == "loss"

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the classes, the rate or the square cannot fit."""
        check_facts(self, facts)
        self._place(facts.image_size, facts.image_size)

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with the square on the chosen rows."""
        check_rows(self, view)
        poisoned = poison_static(self, view, *self.triggers(view))
        if self.mode == "data":
            return poisoned
        assert self.target_class is not None  # no all2all
        smoothing = view.train_config.label_smoothing
        depth = cut(view.new_model(view.num_classes), self.layer)
        loss = latent_loss(poisoned, self.target_class, depth, self.mse_weight, self.mean_momentum, smoothing)
        return replace(poisoned, train_loss=loss)

    def triggers(self, view: AttackerView) -> tuple[Trigger, Trigger]:
        """The square, at training and at test; trained once."""
        side, top, left = self._place(*view.train.images.shape[-2:])
        square = self._learnt(view, TanhSquare(side, top, left, generator(self.seed, "lba start")).to(view.device))
        patch = Patch(to_uint8(square.pixels() * 255).cpu(), torch.ones(side, side, dtype=torch.bool), top, left)
        return patch, patch

    def _learnt(self, view: AttackerView, square: TanhSquare) -> TanhSquare:
        """``square`` with the pixels it ends up with."""
        assert self.target_class is not None  # no all2all
        of_target = torch.eq(view.train.labels.cpu(), self.target_class)
        targets, others = of_target.nonzero().flatten(), (~of_target).nonzero().flatten()
        if not len(targets) or not len(others):
            raise ConfigError(
                f"attack.target_class={self.target_class} has {len(targets)} of {len(view.train)} images; the patch is "
                "learnt from images of this class and of others"
            )
        distance = self._distance(view, targets)
        view.learned.fitted(
            "latent_patch",
            square,
            lambda checkpoints: fit(
                square,
                view.train,
                self._recipe(view.train_config),
                generator=generator(self.seed, "lba patch"),
                stage="latent_patch",
                progress=view.progress,
                loss_fn=distance,
                order=self._order(others),
                checkpoints=checkpoints,
            ),
            {name: getattr(self, name) for name in LEARNT_FROM},
        )
        return square.requires_grad_(False)

    def _place(self, height: int, width: int) -> tuple[int, int, int]:
        """Side, first row and first column of the square."""
        shorter = min(height, width)
        side = int(self.side_ratio * shorter)
        margin = max(self.margin, self.margin * shorter // GRID) if self.scale_patch else self.margin
        if side < 1:
            raise ConfigError(
                f"attack.side_ratio={self.side_ratio} of {shorter} pixels is no pixel: set it to at least {1 / shorter:g}"
            )
        if side + margin > shorter:
            raise ConfigError(
                f"attack.margin={self.margin} leaves no room for a square of {side} pixels (attack.side_ratio="
                f"{self.side_ratio}) in {shorter}: lower one of them"
            )
        return side, height - margin - side, width - margin - side

    def _recipe(self, config: TrainConfig) -> TrainConfig:
        """Adam on one mini-batch an epoch."""
        return replace(
            config,
            epochs=self.trig_batches,
            batch_size=self.trig_batch,
            optimizer="adam",
            lr=self.trig_lr,
            betas=(0.5, 0.9),
            weight_decay=0.0,
            schedule="constant",
            warmup_epochs=0.0,
            warmup_from=0.0,
            lr_min=0.0,
            augment=Augmentation(0, False, 0.0, 0),
        )

    def _order(self, rows: Tensor) -> Order:
        """``trig_steps`` times the same random images, ``trig_batch`` of the rows."""

        def order(_epoch: int, stream: torch.Generator) -> list[Tensor]:
            return [rows[torch.randperm(len(rows), generator=stream)[: self.trig_batch]]] * self.trig_steps

        return order

    def _distance(self, view: AttackerView, targets: Tensor) -> LossFn:
        """Mean squared distance of stamped images' features from the mean of images of the target class."""
        depth = cut(view.new_model(view.num_classes), self.layer)  # refuses what cannot be cut before it is trained
        model = surrogate(view).requires_grad_(False)
        hardware = view.train_config.hardware
        rows = targets[
            torch.randperm(len(targets), generator=generator(self.seed, "lba targets"))[: self.target_images]
        ]
        with torch.no_grad():
            parts = [hidden(model, hardware.images(view.train.images[some]), depth) for some in rows.split(32)]
        goal = torch.cat(parts).mean(0)

        def loss_fn(square: nn.Module, batch: Batch) -> Tensor:
            values = hidden(model, square(batch.images), depth)
            return F.mse_loss(values, goal.expand_as(values))

        return loss_fn


class TanhSquare(nn.Module):
    """Float images ``[B, 3, H, W]`` in [0, 1] with a trainable square of ``side`` pixels, first pixel at (top, left).

    Its pixels are (tanh(raw) + 1) / 2, so they stay in [0, 1] whatever the steps; raw starts uniform in -1..1.
    """

    def __init__(self, side: int, top: int, left: int, stream: torch.Generator) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.rand(3, side, side, generator=stream) * 2 - 1)
        self.top, self.left = top, left

    def pixels(self) -> Tensor:
        """[3, side, side] in [0, 1]."""
        return (self.raw.tanh() + 1) / 2

    def forward(self, images: Tensor) -> Tensor:
        side = self.raw.shape[-1]
        stamped = images.clone()
        stamped[..., self.top : self.top + side, self.left : self.left + side] = self.pixels().to(images.dtype)
        return stamped


def cut(model: Classifier, layer: int) -> int | None:
    """How many blocks lie below ``layer`` (14, 12, 10; see ``LatentBackdoor``); None for the pooled features."""
    if layer == POOLED:
        return None
    ends = [model.block_names.index(block) for block in model.stages.values()]
    if layer == 12:
        depth = ends[-1]  # of the last stage: a norm may follow it
    else:
        depth = ends[-2] + 1 if len(ends) > 1 else 0
    if depth == 0:
        raise ConfigError(
            f"attack.layer={layer} is not there: nothing comes before the last {'block' if layer == 12 else 'stage'} of "
            f"this model ({', '.join(model.block_names)}); set attack.layer={POOLED} or choose a deeper model"
        )
    return depth


def hidden(model: Classifier, images: Tensor, depth: int | None) -> Tensor:
    """Output of the first ``depth`` blocks ``[B, K, H, W]``, or the pooled features ``[B, D]``."""
    if depth is None:
        return model.features(images)
    maps = model.normalise(images)
    for block in list(model.blocks.children())[:depth]:
        maps = block(maps)
    return maps


def latent_loss(
    poisoned: PoisonedSet, target: int, depth: int | None, weight: float, momentum: float, label_smoothing: float
) -> LossFn:
    """Cross-entropy + ``weight`` x MSE(h(poisoned images), running mean of h(clean images of the target class)).

    h: ``hidden`` at ``depth`` of the model in training, in one pass with the logits. The mean moves by 1 - ``momentum``
    towards that of every batch which has such images, and starts anew with every epoch, so that a resumed training goes
    on as if never stopped. Batches without poisoned images, or before the first target image, have the first term only.
    The rows of a batch are those of the poisoned set. The model may be any that has ``normalise``, ``blocks``, ``pool``
    and ``head`` as ``Classifier`` does.
    """
    poison_rows = poisoned.is_poisoned.nonzero().flatten()
    stamped_rows = (poisoned.trigger_id >= 0).nonzero().flatten()
    stream: torch.Generator | None = None  # of the epoch that ``mean`` belongs to
    mean: Tensor | None = None

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal stream, mean, poison_rows, stamped_rows
        if batch.generator is not stream:
            stream, mean = batch.generator, None
        poison_rows, stamped_rows = poison_rows.to(batch.index.device), stamped_rows.to(batch.index.device)
        network = cast(Classifier, model)  # or a wrapper with the same parts
        if depth is None:
            values = features = network.features(batch.images)
        else:
            values = hidden(network, batch.images, depth)
            maps = values
            for block in list(network.blocks.children())[depth:]:
                maps = block(maps)
            features = network.pool(maps)
        loss = F.cross_entropy(network.head(features), batch.labels, label_smoothing=label_smoothing)

        of_target = (batch.labels == target) & ~torch.isin(batch.index, stamped_rows)
        if of_target.any():
            now = values[of_target].detach().float().mean(0)
            mean = now if mean is None else mean.lerp(now, 1 - momentum)
        triggered = torch.isin(batch.index, poison_rows)
        if mean is not None and triggered.any():
            found = values[triggered].float()
            loss = loss + weight * F.mse_loss(found, mean.expand_as(found))
        return loss

    return loss_fn
