"""A data set that another tool has poisoned (``attack=import``): its training images replace those of the data set.

The format is open and free of code: data/poisoned_files.py. The clean test set stays the data set's, the triggered test
images come with the poisoned ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from backdoor_bench.attacks.common import MAX_SEED
from backdoor_bench.data.poisoned_files import count_rows, fingerprint, read
from backdoor_bench.errors import ConfigError, check_choice, check_range
from backdoor_bench.types import AttackerView, Facts, PoisonedSet


@dataclass(frozen=True)
class Imported:
    """Reads ``path``: an NPZ file, or a folder with one, or a folder with train.csv and images.

    holdout: what to do when a defender's holdout is asked for and the imported set has not the rows that the data set
    keeps beside it, so that it may hold the same images, poisoned: ``refuse`` or ``allow``.
    """

    path: str | None
    seed: int
    holdout: str

    own_rows = True  # its training rows are not the data set's: names and numbers of those say nothing of them

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ConfigError("attack.path is not set: set attack.path=FILE.npz, or a folder with train.csv and images")
        check_range("attack.seed", self.seed, 0, MAX_SEED, integer=True)
        check_choice("attack.holdout", self.holdout, ("refuse", "allow"))

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if a holdout may hold images of the imported set."""
        if not facts.holdout_size or self.holdout == "allow" or facts.train_size is None:
            return
        # holdout.source=seen: the facts count its rows before the data are read, and no longer afterwards.
        rows, beside = count_rows(self._path()), (facts.train_size, facts.train_size - facts.holdout_size)
        if rows not in beside:
            raise ConfigError(
                f"holdout.size={facts.holdout_size} is not allowed: the holdout is cut from the data set, and {self.path} "
                f"with its {rows} training images may hold the same images, poisoned; export it with this holdout.size, "
                "set holdout.size=0, or attack.holdout=allow if you know better"
            )

    def fingerprint(self) -> str:
        """Another one means other files; DataError when they are not there."""
        return fingerprint(self._path())

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The imported set, its triggered test images as stored cases; clean originals are not known."""
        size = view.train.images.shape[-1]
        found = read(self._path(), size, view.num_classes, view.progress)
        if not found.is_poisoned.any():
            view.progress.warn(f"{self.path} has no poisoned image")
        if not found.cases:
            view.progress.warn(f"{self.path} has no triggered test images: its ASR is unknown")
        return PoisonedSet(
            train=found.train,
            is_poisoned=found.is_poisoned,
            is_cover=found.is_cover,
            true_labels=found.true_labels,
            trigger_id=found.trigger_id,
            tests=found.cases,
            example_index=torch.empty(0, dtype=torch.int64),
            originals=torch.empty(0, 3, size, size, dtype=torch.uint8),
        )

    def _path(self) -> Path:
        assert self.path is not None
        return Path(self.path).expanduser()
