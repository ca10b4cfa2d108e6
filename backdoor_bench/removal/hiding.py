"""TRAP's backdoor hiding: flagged samples become an extra class, and only a new last layer is trained.

The extractor is frozen (its batch norms too), so a triggered input keeps its features but is now sent to the dummy
class C instead of the target (TRAP sec. IV-B). Prediction is the argmax over C+1 logits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn

from backdoor_bench.models.classifier import Classifier, replace_head
from backdoor_bench.removal.common import check_recipe, recipe, run_removal
from backdoor_bench.training.seeds import generator
from backdoor_bench.types import DefenderView, Facts, ImageSet, Isolation


class FirstClasses(nn.Module):
    """The first ``count`` logits of a model: what TRAP would predict if the dummy class did not exist."""

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.model = model
        self.count = count

    def forward(self, images):  # type: ignore[no-untyped-def]
        return self.model(images)[:, : self.count]


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
        check_recipe(self.epochs, self.lr, self.momentum, self.weight_decay, self.batch_size, self.schedule)

    def check(self, facts: Facts) -> None:
        """Nothing to refuse: works on any data."""

    def remove(self, view: DefenderView, model: Classifier, isolation: Isolation) -> nn.Module:
        """The model with C+1 outputs; the given model itself if nothing is flagged (the dummy class has no sample)."""
        if not isolation.flagged.any():
            view.progress.warn("nothing is flagged: hiding is skipped and the victim is returned as it is")
            return model
        values = asdict(self)
        drop_dummy = values.pop("drop_dummy")
        labels = view.train.labels.clone()
        labels[isolation.flagged.to(labels.device)] = view.num_classes
        data = ImageSet(view.train.images, labels, view.num_classes + 1)
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
        return FirstClasses(hidden, view.num_classes) if drop_dummy else hidden
