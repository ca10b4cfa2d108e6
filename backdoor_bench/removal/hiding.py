"""TRAP's backdoor hiding: flagged samples become an extra class, and only a new last layer is trained.

The extractor is frozen (its batch norms too), so a triggered input keeps its features but is now sent to the dummy
class C instead of the target (TRAP sec. IV-B). Prediction is the argmax over C+1 logits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from backdoor_bench.errors import check_flag
from backdoor_bench.models.classifier import Classifier, replace_head
from backdoor_bench.removal.common import KEY, check_recipe, run_removal
from backdoor_bench.training.recipes import recipe
from backdoor_bench.training.seeds import generator
from backdoor_bench.types import DefenderView, Facts, Isolation


@dataclass(frozen=True)
class Hiding:
    """epochs: E_r. drop_dummy: predict among the C real classes only (a diagnostic: the backdoor may come back).
    augment: train the new layer on augmented images, as the victim was."""

    epochs: int
    lr: float
    momentum: float
    weight_decay: float
    batch_size: int
    schedule: str
    augment: bool
    drop_dummy: bool

    def __post_init__(self) -> None:
        check_recipe(self)
        check_flag(KEY + "drop_dummy", self.drop_dummy)

    def check(self, facts: Facts) -> None:
        """Nothing to refuse: works on any data."""

    def remove(self, view: DefenderView, model: Classifier, isolation: Isolation) -> nn.Module:
        """The model with C+1 outputs; the given model itself if nothing is flagged (the dummy class has no sample)."""
        if not isolation.flagged.any():
            view.progress.warn(
                "nothing is flagged: hiding is skipped and the victim is returned as it is; this does not prove the data "
                "clean: look at the pictures of the isolation, and try other values of defense.isolation"
            )
            return model
        values = asdict(self)
        drop_dummy = values.pop("drop_dummy")
        labels = view.train.labels.clone()
        labels[isolation.flagged.to(labels.device)] = view.num_classes
        data = replace(view.train, labels=labels, num_classes=view.num_classes + 1)
        stream = generator(view.generator.initial_seed(), "hiding")
        hidden = replace_head(model, view.num_classes + 1, stream)
        hidden = run_removal(
            view,
            hidden,
            data,
            recipe(view.train_config, **values),
            isolation=isolation,
            settings={"hiding": values},
            generator=stream,
            part=lambda trained: trained.head,
        )
        return without_dummy(hidden, view.num_classes) if drop_dummy else hidden


def without_dummy(model: Classifier, num_classes: int) -> Classifier:
    """The model with the first ``num_classes`` outputs: what it would predict if the dummy class did not exist."""
    weight, bias = model.head.weight.detach(), model.head.bias.detach()
    cut = replace_head(model, num_classes, torch.Generator())
    with torch.no_grad():
        cut.head.weight.copy_(weight[:num_classes])
        cut.head.bias.copy_(bias[:num_classes])
    return cut.to(weight.device).eval()
