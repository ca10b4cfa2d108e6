"""What all loaders share: the checks of their fields, and the last step from arrays to a Dataset."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from backdoor_bench.data.checks import stratified_subset, validate
from backdoor_bench.data.images import select
from backdoor_bench.errors import ConfigError, DataError, check_range
from backdoor_bench.types import Dataset, ImageSet, Progress

ROOT_VARIABLE = "BACKDOOR_BENCH_DATA"


class Loader(Protocol):
    """The fields every loader has; ``load()`` returns the Dataset.

    num_classes, image_size, train_size, test_size: what the data will turn out to be, so that a configuration can be
    judged before they are read (None where only the data tell). mean, std: per channel in [0, 1], the model's first
    layer. limit, test_limit: at most this many rows, stratified, drawn by ``seed`` (None = all).
    """

    @property
    def name(self) -> str: ...
    @property
    def num_classes(self) -> int | None: ...
    @property
    def image_size(self) -> int: ...
    @property
    def train_size(self) -> int | None: ...
    @property
    def test_size(self) -> int | None: ...
    @property
    def mean(self) -> Sequence[float]: ...
    @property
    def std(self) -> Sequence[float]: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def test_limit(self) -> int | None: ...
    @property
    def seed(self) -> int: ...
    def load(self, progress: Progress | None = None) -> Dataset: ...


def check_fields(loader: Loader) -> None:
    """Raise ConfigError naming the key unless the shared fields of a loader are sound."""
    if not isinstance(loader.name, str) or not loader.name:
        raise ConfigError(f"dataset.name={loader.name!r} is not allowed: it must be a name")
    if loader.num_classes is not None:
        check_range("dataset.num_classes", loader.num_classes, 2, math.inf, integer=True)
    check_range("dataset.image_size", loader.image_size, 8, 4096, integer=True)
    check_range("dataset.seed", loader.seed, 0, 2**32 - 1, integer=True)
    for key, size in (("train_size", loader.train_size), ("test_size", loader.test_size)):
        if size is not None:
            check_range(f"dataset.{key}", size, 1, math.inf, integer=True)
    if loader.limit is not None:
        check_range("dataset.limit", loader.limit, loader.num_classes or 1, math.inf, integer=True)
    if loader.test_limit is not None:
        check_range("dataset.test_limit", loader.test_limit, 1, math.inf, integer=True)
    for key, values in (("mean", loader.mean), ("std", loader.std)):
        if not isinstance(values, (list, tuple)) or len(values) != 3:
            raise ConfigError(f"dataset.{key}={values!r} is not allowed: it must be three numbers, one a channel")
        for value in values:
            check_range(f"dataset.{key}", value, 0, 1, low_open=key == "std")


def check_flag(key: str, value: object) -> None:
    """Raise ConfigError unless ``value`` is a boolean."""
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value!r} is not allowed: it must be true or false")


def check_count(loader: Loader, found: int, part: str, where: Path) -> None:
    """Raise DataError unless ``found`` rows are what the configuration says: a part of a set must not pass for it."""
    expected = loader.train_size if part == "train" else loader.test_size
    if expected is not None and found != expected:
        raise DataError(
            f"{where} has {found} {part} images, {loader.name} has {expected}; complete the data, or set "
            f"dataset.{part}_size={found} if this is what you want (null: any number)"
        )


def limited_rows(loader: Loader, labels: Tensor, num_classes: int, part: str) -> Tensor | None:
    """The rows that ``loader.limit`` (or test_limit, for the ``part`` test) leaves, or None when it leaves all.

    Loaders of image files ask before they decode. Raises ConfigError when a class would have no training image.
    """
    limit = loader.limit if part == "train" else loader.test_limit
    if limit is None or limit >= len(labels):
        return None
    if part == "train" and limit < num_classes:
        raise ConfigError(f"dataset.limit={limit} is not allowed: it must be >= {num_classes}, one image a class")
    generator = torch.Generator().manual_seed(2 * loader.seed + (part == "test"))
    return stratified_subset(labels, limit, generator)


def finish(
    loader: Loader,
    train: ImageSet,
    test: ImageSet | None,
    class_names: Sequence[str],
    *,
    file_names: Sequence[str] | None = None,
    known_poison: Tensor | None = None,
    known_cover: Tensor | None = None,
    true_labels: Tensor | None = None,
) -> Dataset:
    """The checked Dataset, cut down to ``loader.limit`` and ``loader.test_limit`` rows.

    Per-row arguments have one entry a training row. Raises DataError as ``validate`` does.
    """
    validate(train, f"{loader.name} (train)")
    index = limited_rows(loader, train.labels, train.num_classes, "train")
    if index is not None:
        train = select(train, index)
        file_names = None if file_names is None else [file_names[row] for row in index.tolist()]
        known_poison = None if known_poison is None else known_poison[index]
        known_cover = None if known_cover is None else known_cover[index]
        true_labels = None if true_labels is None else true_labels[index]
    if test is not None:
        validate(test, f"{loader.name} (test)", every_class=False)
        test_index = limited_rows(loader, test.labels, test.num_classes, "test")
        test = test if test_index is None else select(test, test_index)
    return Dataset(
        train=train,
        test=test,
        class_names=tuple(class_names),
        file_names=None if file_names is None else tuple(file_names),
        known_poison=known_poison,
        known_cover=known_cover,
        true_labels=true_labels,
    )


def find_root(root: str | None, name: str) -> Path:
    """The folder in which to look for data: ``dataset.root``, else the environment variable; DataError without one."""
    chosen = root or os.environ.get(ROOT_VARIABLE)
    if not chosen:
        raise DataError(
            f"dataset.root is not set: {name} is read from disk; set dataset.root=DIR or the environment variable "
            f"{ROOT_VARIABLE} (dataset.download=true fetches what is freely available)"
        )
    return Path(chosen).expanduser()


def find_folder(root: Path, candidates: Sequence[str], proof: str) -> Path | None:
    """The first of ``root/<candidate>`` and then ``root`` itself that contains ``proof``, or None."""
    for folder in (*(root / candidate for candidate in candidates), root):
        if (folder / proof).exists():
            return folder
    return None


def warn(progress: Progress | None, message: str) -> None:
    """Tell the user without stopping, through the progress display where there is one."""
    if progress is None:
        warnings.warn(message, stacklevel=3)
    else:
        progress.warn(message)
