"""The model trained on the poisoned set without defence: trained once, with its early epochs, then loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from backdoor_bench.cache import Stages
from backdoor_bench.models.classifier import Classifier
from backdoor_bench.storage import load_bundle, save_state
from backdoor_bench.training.config import TrainConfig
from backdoor_bench.training.fit import LossFn, fit
from backdoor_bench.types import ImageSet, Probe, Progress


class CachedVictim:
    """types.Victim over the stage cache.

    The final weights and those after the first ``config.snapshots`` epochs are kept. A later epoch that nobody kept is
    had by training again up to it: the same seed gives the same weights.
    """

    def __init__(
        self,
        train: ImageSet,
        new_model: Callable[[], Classifier],
        config: TrainConfig,
        new_generator: Callable[[], torch.Generator],
        stages: Stages,
        probe: Probe,
        progress: Progress,
        loss_fn: LossFn | None = None,
    ) -> None:
        self._train = train
        self._new_model = new_model
        self._config = config
        self._new_generator = new_generator
        self._stages = stages
        self._probe = probe
        self._progress = progress
        self._loss_fn = loss_fn

    def __call__(self, snapshots: Sequence[int] | None = None) -> Any:
        """``victim()`` -> model; ``victim(snapshots=[...])`` -> list of models after these epochs (counted from 1)."""
        wanted = [self._config.epochs] if snapshots is None else list(snapshots)
        if any(not 1 <= epoch <= self._config.epochs for epoch in wanted):
            raise ValueError(f"snapshots {wanted} lie outside epochs 1..{self._config.epochs}")
        stages, config = self._stages, self._config
        entry = stages._entry("victim", None)
        with stages._locked(entry, "train"), stages._keeping_rows(entry):
            bundles = {epoch: stages._load(entry / _name(epoch)) for epoch in {*wanted, config.epochs}}
            missing = [epoch for epoch, bundle in bundles.items() if bundle is None]
            if missing:
                keep = {*range(1, config.snapshots + 1), *wanted, config.epochs}
                checkpoints = stages._checkpoints(entry)
                model = self._new_model()

                def on_epoch_end(epoch: int, model: Any, loss: float) -> None:
                    self._probe(model, stage="train", epoch=epoch, detail={"loss": loss})
                    if epoch in keep and not (entry / _name(epoch)).with_suffix(".json").exists():
                        meta = {"seconds": checkpoints.seconds()}
                        save_state(entry / _name(epoch), model.state_dict(), meta)

                for epoch in missing:  # a damaged one must not pass for a good one
                    (entry / _name(epoch)).with_suffix(".json").unlink(missing_ok=True)
                fit(
                    model,
                    self._train,
                    config,
                    generator=self._new_generator(),
                    stage="train",
                    progress=self._progress,
                    loss_fn=self._loss_fn,
                    on_epoch_end=on_epoch_end,
                    # Resuming after a wanted epoch would jump over it.
                    checkpoints=self._usable(checkpoints, missing),
                    stop_after=max(missing),
                )
                checkpoints.clear()
                bundles |= {epoch: load_bundle(entry / _name(epoch)) for epoch in missing}
            final = bundles[config.epochs]
            assert final is not None
            stages._seconds["train"] = float(final.meta["seconds"])  # set, not added: asked often, trained once
        models = []
        for epoch in wanted:
            bundle = bundles[epoch]
            assert bundle is not None
            model = self._new_model()
            model.load_state_dict(bundle.tensors)
            models.append(config.hardware.place(model).eval())
        return models[0] if snapshots is None else models

    def is_cached(self) -> bool:
        """Whether the fully trained model is there already."""
        return self._stages._load(self._stages._entry("victim", None) / _name(self._config.epochs)) is not None

    def _usable(self, checkpoints: Any, missing: Sequence[int]) -> Any:
        """The checkpoints, emptied if the newest lies beyond the first epoch that is to be had."""
        newest = max((int(name.split("-")[1]) for name in checkpoints._names()), default=0)
        if newest >= min(missing):
            checkpoints.clear()
        return checkpoints


def _name(epoch: int) -> str:
    return f"weights-{epoch:05d}"
