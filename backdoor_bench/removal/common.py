"""What the removal modules share: the keys of their own recipe, a start from a copy of the victim, the cached training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from backdoor_bench.errors import DataError, check_choice, check_flag, check_range
from backdoor_bench.models.classifier import Classifier
from backdoor_bench.storage import Checkpoints, digest
from backdoor_bench.training.config import TrainConfig
from backdoor_bench.training.fit import fit
from backdoor_bench.types import DefenderView, ImageSet, Isolation

KEY = "defense.removal."


class Recipe(Protocol):
    """The keys every removal that trains has."""

    @property
    def epochs(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def schedule(self) -> str: ...
    @property
    def augment(self) -> bool: ...


def check_recipe(values: Recipe) -> None:
    """Raise ConfigError naming defense.removal.<key> for a value out of range."""
    check_range(KEY + "epochs", values.epochs, 1, 100_000, integer=True)
    check_range(KEY + "lr", values.lr, 0, 1000, low_open=True)
    check_range(KEY + "momentum", values.momentum, 0, 1, high_open=True)
    check_range(KEY + "weight_decay", values.weight_decay, 0, 1)
    check_range(KEY + "batch_size", values.batch_size, 1, 1_000_000, integer=True)
    check_choice(KEY + "schedule", values.schedule, ("cosine", "constant"))
    check_flag(KEY + "augment", values.augment)


def run_removal(
    view: DefenderView,
    model: Classifier,
    data: ImageSet,
    config: TrainConfig,
    *,
    isolation: Isolation,
    settings: Mapping[str, Any],
    generator: torch.Generator,
    part: Callable[[Classifier], nn.Module] | None = None,
    **fit_options: Any,
) -> Classifier:
    """Trains ``model`` (already a copy) as the cached stage ``removal``; probes after each epoch.

    settings: the module's own values; they, the recipe and the split name the cache entry. part: which submodule of the
    model is trained, default all of it.
    """

    def on_epoch_end(epoch: int, trained: nn.Module, loss: float) -> None:
        view.probe(trained, stage="removal", epoch=epoch, detail={"loss": loss})

    def train(checkpoints: Checkpoints) -> None:
        fit(
            model,
            data,
            config,
            generator=generator,
            stage="removal",
            progress=view.progress,
            trainable=part(model) if part else None,
            on_epoch_end=on_epoch_end,
            checkpoints=checkpoints,
            **fit_options,
        )

    split = [isolation.flagged.tolist(), None if isolation.trusted is None else isolation.trusted.tolist()]
    key = {"module": dict(settings), "recipe": config.key(), "split": digest(split)}
    model.to(view.device)
    view.stages.fitted("removal", model, train, key)
    return model.eval()


def fresh_copy(model: Classifier) -> Classifier:
    """A deep copy, so that the given model stays as it is."""
    return copy.deepcopy(model)


def clean_rows(isolation: Isolation) -> Tensor:
    """int64 rows taken as clean: ``trusted`` where the isolation picked some, else all that is not flagged."""
    trusted = isolation.trusted if isolation.trusted is not None else ~isolation.flagged
    return trusted.nonzero().flatten()


def some_clean_rows(isolation: Isolation) -> Tensor:
    """clean_rows, or DataError where there is none: nothing could then be learnt."""
    rows = clean_rows(isolation)
    if not len(rows):
        reason = (
            "every training sample is flagged"
            if isolation.trusted is None
            else "the isolation trusts no sample (raise its share of trusted ones, defense.isolation.alpha_c)"
        )
        raise DataError(f"{reason}: there is nothing from which the classes could be learnt")
    return rows


def flagged_rows(isolation: Isolation) -> Tensor:
    """int64 rows judged poisoned."""
    return isolation.flagged.nonzero().flatten()
