"""IAB (Nguyen and Tran 2020): two networks draw for every image a trigger of its own.

As in the authors' code, but for what follows. The poisoned set is fixed by default: the generators are trained first,
on the clean set beside a classifier that is thrown away, and the stamped images are written once as uint8. With
``mode=online`` the victim meets new poisons in every batch, but the generators, trained in the same way, stay as they
are, where the original trains them with the victim. The gradients of the pattern generator are cleared every step (the
original clears the classifier's only), the augmentation is the recipe's, and pairs of images go through a generator in
one batch. Images larger than ``gen_size`` are shrunk for the generators and their triggers enlarged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from math import floor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.attacks.common import (
    check_facts,
    check_rows,
    check_settings,
    poison_pool,
    poison_static,
    rule_and_test,
    unpoisoned,
)
from backdoor_bench.errors import ConfigError, check_choice, check_range
from backdoor_bench.inference import forward_all
from backdoor_bench.training.config import TrainConfig
from backdoor_bench.training.fit import Batch, LossFn, Order, fit
from backdoor_bench.training.seeds import derive, generator
from backdoor_bench.triggers.generators import (
    BorrowedTrigger,
    OwnTrigger,
    PatternAndMask,
    diversity,
    mixed,
    working_side,
)
from backdoor_bench.types import AttackerView, Facts, LabelRule, PoisonedSet, Trigger

BETAS = (0.5, 0.9)  # Adam's, IAB code
CHECKED = 512  # at most so many training images on which the finished generators are tried

# When the learning rates fall, as shares of a training: mask generator, classifier, pattern generator (IAB code: epochs
# 10 and 20 of 25; 100 to 400, and 200 to 500, of 575).
MASK_STEPS = (10 / 25, 20 / 25)
SURROGATE_STEPS = (100 / 575, 200 / 575, 300 / 575, 400 / 575)
PATTERN_STEPS = (200 / 575, 300 / 575, 400 / 575, 500 / 575)


@dataclass(frozen=True)
class Iab:
    """Stamps with generated triggers; ``gen_*`` say how the generators are built and trained, see conf/attack/iab.yaml.

    mode: ``static`` writes a poisoned set, whose cover rows (``cover_rate``) get the trigger of another image; with
    ``online`` the set stays clean, and in every batch of the victim's training ``poison_rate`` of the images get their
    trigger and label, then ``cross_rate`` of them the trigger of another image of the batch and their own label.
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
    mode: str
    cross_rate: float
    mask_density: float
    lambda_norm: float
    lambda_div: float
    mask_epochs: int
    gen_epochs: int
    gen_lr: float
    surrogate_lr: float
    gen_batch: int
    gen_width: int
    gen_stages: int
    gen_size: int
    gen_limit: int | None

    made_for_target = True  # another target class is another trigger

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("attack.mode", self.mode, ("static", "online"))
        check_range("attack.cross_rate", self.cross_rate, 0, 1 / 3, low_open=True)
        check_range("attack.mask_density", self.mask_density, 0, 1)
        for name in ("lambda_norm", "lambda_div"):
            check_range(f"attack.{name}", getattr(self, name), 0, float("inf"), high_open=True)
        for name in ("mask_epochs", "gen_epochs"):
            check_range(f"attack.{name}", getattr(self, name), 1, 100_000, integer=True)
        for name in ("gen_lr", "surrogate_lr"):
            check_range(f"attack.{name}", getattr(self, name), 0, 1000, low_open=True)
        check_range("attack.gen_batch", self.gen_batch, 4, 1_000_000, integer=True)
        check_range("attack.gen_width", self.gen_width, 1, 1024, integer=True)
        check_range("attack.gen_stages", self.gen_stages, 1, 6, integer=True)
        check_range("attack.gen_size", self.gen_size, 16, 4096, integer=True)
        if self.gen_limit is not None:
            check_range("attack.gen_limit", self.gen_limit, 4, float("inf"), integer=True)
        if self.gen_size % 2**self.gen_stages:
            raise ConfigError(
                f"attack.gen_size={self.gen_size} is not allowed with attack.gen_stages={self.gen_stages}: it must be "
                f"divisible by {2**self.gen_stages}"
            )
        if self.mode == "online":
            self._check_online()

    def _check_online(self) -> None:
        if self.poison_rate + self.cross_rate > 1:
            raise ConfigError(
                f"attack.cross_rate={self.cross_rate} is not allowed with attack.mode=online and attack.poison_rate="
                f"{self.poison_rate}: together they are at most 1"
            )
        for key, unused in (("poison_count", None), ("cover_rate", 0)):
            if getattr(self, key) != unused:
                raise ConfigError(
                    f"attack.{key}={getattr(self, key)} is for attack.mode=static: online, attack.poison_rate and "
                    "attack.cross_rate of every batch are stamped"
                )

    @property
    def controls_training(self) -> bool:
        """Whether the attack owns the loss of the victim's training."""
        return self.mode == "online"

    @property
    def fixed_set(self) -> bool:
        """Whether the poisoned rows are the same throughout the training."""
        return self.mode == "static"

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the classes, the rate or the generators cannot fit."""
        check_facts(self, facts)
        if working_side(self.gen_size, facts.image_size, 2**self.gen_stages) == 0:
            raise ConfigError(
                f"attack.gen_stages={self.gen_stages} needs images of at least {2**self.gen_stages} px, but "
                f"dataset.image_size={facts.image_size}; lower it"
            )

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with every chosen row's own trigger on it; in mode ``online`` clean, with a loss."""
        if self.mode == "static":
            check_rows(self, view)
        nets = self._generators(view)
        own = OwnTrigger(nets, view.device)
        if self.mode == "static":
            borrowed = BorrowedTrigger(nets, view.device, view.train.images, self.seed)
            return poison_static(self, view, own, cover_trigger=borrowed)
        train_rule, test = rule_and_test(self, view.num_classes, own)
        loss = self._online_loss(nets, train_rule, view.train_config.label_smoothing)
        return unpoisoned(view, (test,), train_loss=loss)

    def triggers(self, view: AttackerView) -> tuple[Trigger, Trigger]:
        """Every image's own trigger, at training and at test."""
        own = OwnTrigger(self._generators(view), view.device)
        return own, own

    def _online_loss(self, nets: PatternAndMask, rule: LabelRule, label_smoothing: float) -> LossFn:
        """Cross-entropy of a batch whose first images of the pool are poisoned after the augmentation, as in the
        authors' code; the next ones get the triggers of those that follow them."""

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            size = len(batch.labels)
            poisoned = poison_pool(self, batch.labels).nonzero().flatten()[: _count(self.poison_rate, size)]
            others = torch.ones(size, dtype=torch.bool, device=batch.labels.device)
            others[poisoned] = False
            crossed = others.nonzero().flatten()[: _count(self.cross_rate, size)]
            rows, lenders = torch.cat([poisoned, crossed]), torch.cat([poisoned, (crossed + 1) % size])
            images, labels = batch.images.clone(), batch.labels.clone()
            if len(rows):  # a last batch may be too small
                with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
                    images[rows] = nets(batch.images[rows], batch.images[lenders])
            labels[poisoned] = rule(labels[poisoned], batch.index[poisoned])
            return F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)

        return loss_fn

    # --- the generators ---

    def _generators(self, view: AttackerView) -> PatternAndMask:
        """Trained (or found in the cache), in eval mode on the device, with frozen weights."""
        side = working_side(self.gen_size, view.train.images.shape[-1], 2**self.gen_stages)
        classifier = view.new_model(view.num_classes)
        with torch.random.fork_rng():
            torch.manual_seed(derive(self.seed, "iab networks"))
            nets = PatternAndMask(classifier.normalise, side, self.gen_width, self.gen_stages)
        both = nn.ModuleDict({"nets": nets, "classifier": classifier})
        view.train_config.hardware.place(both)
        built = {
            name: value
            for name, value in asdict(self).items()
            if name == "seed" or (name.startswith(("gen_", "mask_", "lambda_")) and name != "gen_epochs")
        }
        rule = rule_and_test(self, view.num_classes, nets)[1].label_rule
        aim = {name: getattr(self, name) for name in ("label_rule", "target_class", "source_class")}
        joint = {**built, **aim, **{name: getattr(self, name) for name in ("gen_epochs", "surrogate_lr", "cross_rate")}}
        view.learned.fitted("iab_masks", nets, self._train_masks(view, nets), built)
        view.learned.fitted("iab_patterns", both, self._train_patterns(view, nets, classifier, both, rule), joint)
        both.requires_grad_(False).eval()
        found = view.learned.keep("iab_check", lambda: ({}, _tried(view, nets, classifier, rule)), joint).meta
        view.progress.say(
            f"iab generators: the classifier they were trained with follows a trigger in {found['own']:.1%} of images "
            f"and ignores a borrowed one in {found['borrowed']:.1%}; {found['pixels']:.1%} of the pixels show it"
        )
        return nets

    def _train_masks(self, view: AttackerView, nets: PatternAndMask) -> Callable[[Any], None]:
        """Stage 1: masks that are small and differ between images."""
        rows, size = self._rows_and_batch(view)

        def loss_fn(_model: nn.Module, batch: Batch) -> Tensor:
            seen, masks = nets.normalise(batch.images), nets.masks(batch.images)
            small = (masks[:size] - self.mask_density).relu().mean()
            return self.lambda_norm * small + self.lambda_div * diversity(
                seen[:size], seen[size:], masks[:size], masks[size:]
            )

        recipe = self._recipe(view, self.mask_epochs, size, MASK_STEPS, _adam(self.gen_lr))
        return lambda checkpoints: fit(
            nets, view.train, recipe, generator=generator(self.seed, "iab masks"), stage="iab_masks",
            progress=view.progress, loss_fn=loss_fn, order=_paired(rows, size, size), trainable=nets.mask,
            checkpoints=checkpoints,
        )  # fmt: skip

    def _train_patterns(
        self, view: AttackerView, nets: PatternAndMask, classifier: nn.Module, both: nn.Module, rule: LabelRule
    ) -> Callable[[Any], None]:
        """Stage 2: patterns that differ between images and that the classifier can learn, each for its image alone."""
        rows, size = self._rows_and_batch(view)
        share = max(1, _count(self.cross_rate, size))

        def loss_fn(_model: nn.Module, batch: Batch) -> Tensor:
            own, lenders = batch.images[:share], batch.images[size:]
            sources = torch.cat([own, lenders])
            patterns = nets.patterns(sources)
            triggered = mixed(batch.images[: 2 * share], patterns, nets.masks(sources))
            wanted = rule(batch.labels[:share], batch.index[:share])
            logits = classifier(torch.cat([triggered, batch.images[2 * share : size]]))
            unlike = diversity(*(nets.normalise(each) for each in (own, lenders, patterns[:share], patterns[share:])))
            return F.cross_entropy(logits, torch.cat([wanted, batch.labels[share:size]])) + self.lambda_div * unlike

        sgd = {"optimizer": "sgd", "lr": self.surrogate_lr, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": False}
        return lambda checkpoints: fit(
            both, view.train, self._recipe(view, self.gen_epochs, size, SURROGATE_STEPS, sgd),
            generator=generator(self.seed, "iab patterns"), stage="iab_patterns", progress=view.progress,
            loss_fn=loss_fn, order=_paired(rows, size, share), trainable=classifier,
            also=[(nets.pattern, self._recipe(view, self.gen_epochs, size, PATTERN_STEPS, _adam(self.gen_lr)))],
            checkpoints=checkpoints,
        )  # fmt: skip

    def _rows_and_batch(self, view: AttackerView) -> tuple[Tensor, int]:
        """The rows that the generators are trained on, and how many of them make a batch."""
        count = len(view.train)
        rows = torch.randperm(count, generator=generator(self.seed, "iab rows"))[: self.gen_limit or count]
        return rows, min(self.gen_batch, len(rows))

    def _recipe(
        self, view: AttackerView, epochs: int, size: int, falls: tuple[float, ...], values: dict[str, Any]
    ) -> TrainConfig:
        """The view's recipe with other optimiser, length and schedule; its augmentation and hardware stay."""
        milestones = [max(1, round(share * epochs)) for share in falls]
        return replace(
            view.train_config, epochs=epochs, batch_size=size, schedule="multistep", schedule_unit="epoch",
            milestones=milestones, gamma=0.1, warmup_epochs=0.0, warmup_from=0.0, lr_min=0.0,
            label_smoothing=0.0, **values,
        )  # fmt: skip


def _count(rate: float, size: int) -> int:
    return floor(Fraction(str(rate)) * size)


def _adam(lr: float) -> dict[str, Any]:
    return {"optimizer": "adam", "lr": lr, "betas": BETAS, "weight_decay": 0.0, "nesterov": False}


def _paired(rows: Tensor, size: int, lent: int) -> Order:
    """Batches of ``size`` rows in random order, each with ``lent`` rows of a second, independent order at its end.

    What does not fill a batch is left out.
    """

    def order(_epoch: int, stream: torch.Generator) -> list[Tensor]:
        first, second = (
            rows[torch.randperm(len(rows), generator=stream)][: len(rows) // size * size].view(-1, size)
            for _ in range(2)
        )
        return list(torch.cat([first, second[:, :lent]], dim=1))

    return order


def _tried(view: AttackerView, nets: PatternAndMask, classifier: nn.Module, rule: LabelRule) -> dict[str, float]:
    """Shares of training images, of those whose label is to change: own trigger followed, borrowed one ignored, pixels
    that show the trigger."""
    labels, rows = view.train.labels.cpu(), torch.arange(len(view.train))
    moved = (rule(labels, rows) != labels).nonzero().flatten()
    rows = moved if len(moved) else rows
    count = min(CHECKED, len(rows))
    index = rows[torch.arange(count) * len(rows) // count]  # evenly: rows may be sorted by class
    labels = labels[index]
    wanted = rule(labels, index)

    def compute(images: Tensor) -> Tensor:
        own, borrowed = (classifier(nets(images, images.roll(step, 0))).argmax(1).float() for step in (0, 1))
        return torch.stack([own, borrowed, nets.masks(images).mean((1, 2, 3))], dim=1)

    joint = nn.ModuleList([nets, classifier])
    own, borrowed, pixels = forward_all(joint, view.train.images[index], view.train_config.hardware, compute).T
    return {
        "own": float((own == wanted).float().mean()),
        "borrowed": float((borrowed == labels).float().mean()),
        "pixels": float(pixels.mean()),
    }
