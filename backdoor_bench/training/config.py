"""A training recipe: optimiser, schedule, length, batch, augmentation. Values live in conf/train/."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from backdoor_bench.data.augment import Augmentation
from backdoor_bench.errors import ConfigError, check_choice, check_flag, check_range
from backdoor_bench.training.hardware import Hardware


@dataclass(frozen=True)
class TrainConfig:
    """optimizer: sgd|adam (L2 in the gradient; ``betas`` are Adam's). schedule: cosine (to ``lr_min``) | multistep (x
    gamma at milestones) | constant, evaluated every step or once an epoch (``schedule_unit``: step | epoch, from 0 |
    epoch_from_1, which reaches ``lr_min`` in the last epoch). A warm-up of ``warmup_epochs`` rises in steps, from
    ``warmup_from`` in the first one to what the schedule says at its end.

    snapshots: weights after each of the first so many epochs are kept with the trained victim, for defences that look
    at early epochs. checkpoint_seconds: least time between two checkpoints.
    """

    epochs: int
    batch_size: int
    drop_last: bool
    optimizer: str
    lr: float
    momentum: float
    betas: Sequence[float]
    weight_decay: float
    nesterov: bool
    schedule: str
    schedule_unit: str
    milestones: Sequence[int]
    gamma: float
    warmup_epochs: float
    label_smoothing: float
    augment: Augmentation
    snapshots: int
    checkpoint_seconds: float
    hardware: Hardware
    lr_min: float = 0.0
    warmup_from: float = 0.0

    def __post_init__(self) -> None:
        check_range("train.epochs", self.epochs, 1, 100_000, integer=True)
        check_range("train.batch_size", self.batch_size, 1, 1_000_000, integer=True)
        check_choice("train.optimizer", self.optimizer, ("sgd", "adam"))
        check_range("train.lr", self.lr, 0, 1000, low_open=True)
        check_range("train.momentum", self.momentum, 0, 1, high_open=True)
        if not isinstance(self.betas, (list, tuple)) or len(self.betas) != 2:
            raise ConfigError(f"train.betas={self.betas!r} is not allowed: give Adam's two, e.g. [0.9, 0.999]")
        for beta in self.betas:
            check_range("train.betas", beta, 0, 1, high_open=True)
        check_range("train.weight_decay", self.weight_decay, 0, 1)
        check_choice("train.schedule", self.schedule, ("cosine", "multistep", "constant"))
        check_choice("train.schedule_unit", self.schedule_unit, ("step", "epoch", "epoch_from_1"))
        if not isinstance(self.milestones, (list, tuple)):
            raise ConfigError(
                f"train.milestones={self.milestones!r} is not allowed: give a list of epochs, e.g. [50, 75]"
            )
        for name in ("drop_last", "nesterov"):
            check_flag(f"train.{name}", getattr(self, name))
        if self.nesterov and not self.momentum:
            raise ConfigError("train.nesterov=true is not allowed with train.momentum=0: set a momentum above 0")
        for milestone in self.milestones:
            check_range("train.milestones", milestone, 1, 100_000, integer=True)
        check_range("train.gamma", self.gamma, 0, 1)
        check_range("train.warmup_epochs", self.warmup_epochs, 0, self.epochs)
        check_range("train.lr_min", self.lr_min, 0, self.lr)
        check_range("train.warmup_from", self.warmup_from, 0, 1000)
        check_range("train.label_smoothing", self.label_smoothing, 0, 1, high_open=True)
        check_range("train.snapshots", self.snapshots, 0, 100_000, integer=True)
        check_range("train.checkpoint_seconds", self.checkpoint_seconds, 0, float("inf"))

    def lr_at(self, epoch: int, step: int, steps: int) -> float:
        """The learning rate of step ``step`` (0-based, of ``steps``) in epoch ``epoch`` (0-based)."""
        now = epoch + step / steps
        if now < self.warmup_epochs:
            return (
                self.warmup_from + (self._scheduled(self.warmup_epochs) - self.warmup_from) * now / self.warmup_epochs
            )
        return self._scheduled({"step": now, "epoch": epoch, "epoch_from_1": epoch + 1}[self.schedule_unit])

    def _scheduled(self, now: float) -> float:
        """The learning rate after ``now`` epochs, warm-up aside."""
        if self.schedule == "cosine":
            return self.lr_min + (self.lr - self.lr_min) * 0.5 * (1 + math.cos(math.pi * now / self.epochs))
        if self.schedule == "multistep":
            return float(self.lr * self.gamma ** sum(now >= milestone for milestone in self.milestones))
        return self.lr

    def steps_per_epoch(self, count: int) -> int:
        """Steps of one epoch over ``count`` samples."""
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def key(self) -> dict[str, Any]:
        """What the trained weights depend on, for cache keys (how often they are saved is left out)."""
        value = asdict(self)
        for name in ("snapshots", "checkpoint_seconds"):
            value.pop(name)
        value["hardware"].pop("resident_gib")
        return value
