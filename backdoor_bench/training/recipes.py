"""The recipe of a method's own training on top of the victim's, of which augmentation and hardware are left."""

from __future__ import annotations

from dataclasses import replace

from backdoor_bench.data.augment import Augmentation
from backdoor_bench.training.config import TrainConfig

NO_AUGMENTATION = Augmentation(crop_padding=0, flip=False, rotation=0.0, cutout=0)


def recipe(
    base: TrainConfig,
    *,
    epochs: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    batch_size: int,
    schedule: str,
    schedule_unit: str = "step",
    nesterov: bool = False,
    augment: bool = True,
) -> TrainConfig:
    """The victim's recipe with SGD and these values; ``augment=False`` turns augmentation off.

    No warm-up, no label smoothing, cosines end at 0, and the last batch of an epoch is kept.
    """
    return replace(
        base,
        epochs=epochs,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        batch_size=batch_size,
        drop_last=False,
        optimizer="sgd",
        nesterov=nesterov,
        schedule=schedule,
        schedule_unit=schedule_unit,
        milestones=(),
        warmup_epochs=0.0,
        warmup_from=0.0,
        lr_min=0.0,
        label_smoothing=0.0,
        augment=base.augment if augment else NO_AUGMENTATION,
    )
