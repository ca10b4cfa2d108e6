"""The loss-based adaptive attack of TRAP (Eq. 2): an attacker who trains the model hides the poison in its features."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.attacks.common import check_facts, check_settings, poison_static
from backdoor_bench.attacks.nested import Component, built, named
from backdoor_bench.errors import check_range
from backdoor_bench.models.classifier import Classifier
from backdoor_bench.training.fit import Batch, LossFn, resident
from backdoor_bench.training.hardware import Hardware
from backdoor_bench.types import AttackerView, Facts, PoisonedSet, StampingAttack, Trigger

NESTED = "trigger"


@dataclass(frozen=True)
class LossAdaptive:
    """Stamps with the attack ``trigger`` and owns the training loss, see ``adaptive_loss``.

    trigger: makes the nested attack (``_partial_: true`` in the YAML; a finished attack is taken as well). Only its
    triggers are used; rows and labels follow the keys here. alpha: weight of the feature distance.
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
    alpha: float
    trigger: partial[Component] | Component

    controls_training = True

    def __post_init__(self) -> None:
        check_settings(self)
        check_range("attack.alpha", self.alpha, 0, float("inf"), high_open=True)
        object.__setattr__(self, NESTED, built(NESTED, self.trigger))

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the classes, the rate or the trigger cannot fit."""
        check_facts(self, facts)
        with named(NESTED):
            # Its rate is not used, so the size of the set cannot make it wrong.
            self._nested().check(replace(facts, train_size=None))

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with the trigger on the chosen rows, and the loss that knows their clean pixels."""
        poisoned = poison_static(self, view, *self.triggers(view))
        rows = poisoned.is_poisoned.nonzero().flatten()
        hardware = view.train_config.hardware
        clean = cast(Tensor, resident(view.train.images[rows], hardware.resident_gib, view.device))
        labels = view.train.labels[rows.to(view.train.labels.device)]
        smoothing = view.train_config.label_smoothing
        loss = adaptive_loss(rows, clean, labels, self.alpha, smoothing, hardware)
        return replace(poisoned, train_loss=loss)

    def triggers(self, view: AttackerView) -> tuple[Trigger, Trigger]:
        """The nested attack's triggers at training and at test."""
        with named(NESTED):
            return self._nested().triggers(view)

    def _nested(self) -> StampingAttack:
        return cast(StampingAttack, self.trigger)


def adaptive_loss(
    rows: Tensor, clean: Tensor, true_labels: Tensor, alpha: float, label_smoothing: float, hardware: Hardware
) -> LossFn:
    """CE(F(x), y) + CE(F(x'), y_t) + ``alpha`` MSE(f(x), f(x')): x clean, x' triggered, f the penultimate features.

    rows: int64 ``[P]``, ascending, the poisoned rows of the set that is trained on; clean, true_labels: uint8
    ``[P, 3, H, W]`` and int64 ``[P]``, what stood there. The first term is the mean over the batch's other images and
    the clean originals of its poisoned ones, the second over the poisoned ones, the third over those pairs and their
    features. An original gets the crops and flips of its triggered twin, and all go through the model at once, so that
    batch norms see both. The model may be any that has ``features`` and ``head`` as ``Classifier`` does.
    """

    cross_entropy = partial(F.cross_entropy, label_smoothing=label_smoothing)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal rows, true_labels
        device = batch.index.device
        rows, true_labels = rows.to(device), true_labels.to(device)
        network = cast(Classifier, model)  # or a wrapper with the same parts
        slots = torch.searchsorted(rows, batch.index).clamp_max(len(rows) - 1)
        poisoned = rows[slots] == batch.index
        places = poisoned.nonzero().flatten()
        if not len(places):
            return cross_entropy(network.head(network.features(batch.images)), batch.labels)
        slots = slots[places]
        originals = batch.augmented(hardware.images(clean[slots.to(clean.device)]), places)
        features = network.features(hardware.format(torch.cat([batch.images, originals])))
        logits = network.head(features)

        count = len(batch.labels)
        is_clean = torch.cat([~poisoned, torch.ones_like(places, dtype=torch.bool)])
        labels = torch.cat([batch.labels, true_labels[slots]])
        first = cross_entropy(logits[is_clean], labels[is_clean])
        second = cross_entropy(logits[places], labels[places])
        return first + second + alpha * F.mse_loss(features[count:], features[places])

    return loss_fn
