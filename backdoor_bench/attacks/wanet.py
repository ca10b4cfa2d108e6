"""WaNet (Nguyen and Tran 2021): the image is warped by a smooth field, a fraction of a pixel everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.attacks.common import (
    check_facts,
    check_settings,
    poison_pool,
    poison_static,
    rule_and_test,
    unpoisoned,
)
from backdoor_bench.errors import ConfigError, check_choice, check_flag, check_range
from backdoor_bench.training.fit import Batch, LossFn
from backdoor_bench.training.seeds import generator
from backdoor_bench.triggers.warp import NoiseWarp, Warp, field, mean_shift, noisy, warp_grid, warped
from backdoor_bench.types import AttackerView, Facts, LabelRule, PoisonedSet, Trigger

# The shift in pixels is the same at every size, so a large image hardly changes (attacks.md A17).
LARGE_FROM, STRENGTH, STRENGTH_LARGE = 160, 0.5, 1.0


@dataclass(frozen=True)
class WaNet:
    """Warps by one field of ``k`` x ``k`` vectors and strength ``s``; noise rows get a noisy warp and their true label.

    s: ``auto`` is 0.5, from 160 pixels on 1. grid_rescale: factor on the whole grid. noise_ratio: noise rows for each
    poisoned one; they are the cover rows, so ``cover_rate`` stays 0. noise_shared: one noise for all noise rows instead
    of one for each.

    mode: ``static`` stores a poisoned set as every other attack does. ``online`` leaves the training set clean and owns
    the training loss: each batch has its first rows warped and relabelled, the next ones noise-warped, before the
    recipe's augmentation and without rounding to uint8. The rates are then shares of the batch, rounded down; as
    nothing is stored, ``is_poisoned`` is False everywhere. Source: VinAIResearch/Warping-based_Backdoor_Attack-release.
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
    k: int
    s: float | str
    grid_rescale: float
    noise_ratio: float
    noise_shared: bool
    mode: str

    @property
    def controls_training(self) -> bool:
        return self.mode == "online"

    @property
    def fixed_set(self) -> bool:
        """Whether the poisoned rows are the same throughout the training."""
        return self.mode == "static"

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("attack.k", self.k, 2, float("inf"), integer=True)
        if self.s != "auto":
            check_range("attack.s", self.s, 0, float("inf"), low_open=True, high_open=True)
        check_range("attack.grid_rescale", self.grid_rescale, 0, float("inf"), low_open=True, high_open=True)
        check_range("attack.noise_ratio", self.noise_ratio, 0, float("inf"), high_open=True)
        check_flag("attack.noise_shared", self.noise_shared)
        check_choice("attack.mode", self.mode, ("static", "online"))
        if self.cover_rate:
            raise ConfigError(
                f"attack.cover_rate={self.cover_rate} is not used by wanet, whose cover rows are its noise rows: set "
                "it to 0 and attack.noise_ratio to noise rows for each poisoned row"
            )
        if self.mode == "online":
            self._check_online()

    def _check_online(self) -> None:
        if self.poison_count is not None:
            raise ConfigError(
                f"attack.poison_count={self.poison_count} is not allowed with attack.mode=online, which poisons a "
                "share of each batch: set it to null and use attack.poison_rate"
            )
        if self.poison_order != "random":
            raise ConfigError(
                f"attack.poison_order={self.poison_order} is not allowed with attack.mode=online, whose batches are "
                "shuffled: set it to random"
            )
        if self.poison_rate * (1 + self.noise_ratio) > 1:
            raise ConfigError(
                f"attack.noise_ratio={self.noise_ratio} with attack.poison_rate={self.poison_rate} asks for more rows "
                "than a batch has: poison_rate * (1 + noise_ratio) must be at most 1"
            )

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the classes, the rate or the field cannot fit."""
        check_facts(self, facts)
        check_range("attack.k", self.k, 2, facts.image_size, integer=True)

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with poison and noise rows; in mode ``online`` the clean set with a loss that warps."""
        trigger, _ = self.triggers(view)
        if self.mode == "online":
            return self._online(view, trigger)
        return poison_static(
            self,
            view,
            trigger,
            cover_trigger=self._noise_trigger(trigger.grid),
            cover_count=lambda poisoned: _rounded_down(self.noise_ratio, poisoned),
        )

    def triggers(self, view: AttackerView) -> tuple[Warp, Warp]:
        """The warp, at training and at test."""
        height, width = view.train.images.shape[-2:]
        strength = (STRENGTH_LARGE if min(height, width) >= LARGE_FROM else STRENGTH) if self.s == "auto" else self.s
        shape = field(self.k, height, width, generator(self.seed, "wanet field"))
        warp = Warp(warp_grid(shape, float(strength), self.grid_rescale))
        view.progress.say(f"wanet: s={strength}, mean shift {mean_shift(warp.grid):.3f} pixels along each axis")
        return warp, warp

    def _noise_trigger(self, grid: Tensor) -> Trigger:
        shared = self._shared_noise(grid)
        return NoiseWarp(grid, self.seed) if shared is None else Warp(noisy(grid, shared))

    def _shared_noise(self, grid: Tensor) -> Tensor | None:
        stream = generator(self.seed, "wanet noise")
        return torch.rand(grid.shape, generator=stream, dtype=grid.dtype) if self.noise_shared else None

    def _online(self, view: AttackerView, warp: Warp) -> PoisonedSet:
        self._check_batches(view)
        rule, test = rule_and_test(self, view.num_classes, warp)
        loss = self._loss(warp.grid, rule, view.train_config.label_smoothing)
        return unpoisoned(view, (test,), train_loss=loss)

    def _check_batches(self, view: AttackerView) -> None:
        share = float(poison_pool(self, view.train.labels).double().mean()) if self.poison_base == "eligible" else 1.0
        base = min(view.train_config.batch_size, len(view.train)) * share
        if _rounded_down(self.poison_rate, floor(base)) == 0:
            advice = f"set it to at least {ceil(1000 / base) / 1000:g} or " if base >= 1 else ""
            raise ConfigError(
                f"attack.poison_rate={self.poison_rate} poisons no image of a batch of {view.train_config.batch_size}: "
                f"{advice}raise train.batch_size, or use attack.mode=static"
            )

    def _loss(self, grid: Tensor, rule: LabelRule, label_smoothing: float) -> LossFn:
        """Cross-entropy of a batch some of whose images are warped on the fly."""
        shared = self._shared_noise(grid)

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            poison, noise = self.rows_of_batch(batch.labels)
            images, labels = batch.images, batch.labels
            if len(poison):
                drawn = shared
                if drawn is None:
                    drawn = torch.rand(len(noise), *grid.shape, generator=batch.generator, dtype=grid.dtype)
                grids = torch.cat(
                    [grid.expand(len(poison), *grid.shape), noisy(grid, drawn).expand(len(noise), -1, -1, -1)]
                )
                places = torch.cat([poison, noise])
                images, labels = images.clone(), labels.clone()
                images[places] = batch.augmented(warped(batch.pixels[places], grids), places).to(images.dtype)
                labels[poison] = rule(labels[poison], batch.index[poison])
            return F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)

        return loss_fn

    def rows_of_batch(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """int64 places of the poison and the noise rows in a shuffled batch of true labels (mode ``online``)."""
        pool = poison_pool(self, labels)
        base = int(pool.sum()) if self.poison_base == "eligible" else len(labels)
        poison = pool.nonzero().flatten()[: _rounded_down(self.poison_rate, base)]
        rest = torch.ones_like(pool)
        rest[poison] = False
        if self.label_rule == "clean":
            rest &= labels != self.target_class  # a triggered image with the attacker's label is poison
        return poison, rest.nonzero().flatten()[: _rounded_down(self.noise_ratio, len(poison))]


def _rounded_down(factor: float, count: int) -> int:
    """floor(factor * count) of the factor as it is written."""
    return floor(Fraction(str(factor)) * count)
