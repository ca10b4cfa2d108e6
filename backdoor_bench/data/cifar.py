"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): 32 x 32 images of 10 or 100 classes."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backdoor_bench.data.common import check_count, check_fields, check_flag, find_root, finish
from backdoor_bench.data.fetch import Archive, check_md5, fetch
from backdoor_bench.data.restricted_pickle import read_pickle
from backdoor_bench.errors import ConfigError, DataError, check_choice
from backdoor_bench.types import Dataset, ImageSet, Progress


@dataclass(frozen=True)
class _Layout:
    """Where a variant lies and the MD5 its publisher gives for each file."""

    folder: str
    archive: Archive
    num_classes: int
    label_key: str
    train: tuple[tuple[str, str], ...]
    test: tuple[tuple[str, str], ...]
    meta: tuple[str, str]
    names_key: str


_SITE = "https://www.cs.toronto.edu/~kriz/"
PUBLISHED = {
    "cifar10": _Layout(
        folder="cifar-10-batches-py",
        archive=Archive(_SITE + "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
        num_classes=10,
        label_key="labels",
        train=(
            ("data_batch_1", "c99cafc152244af753f735de768cd75f"),
            ("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
            ("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
            ("data_batch_4", "634d18415352ddfa80567beed471001a"),
            ("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
        ),
        test=(("test_batch", "40351d587109b95175f43aff81a1287e"),),
        meta=("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),
        names_key="label_names",
    ),
    "cifar100": _Layout(
        folder="cifar-100-python",
        archive=Archive(_SITE + "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
        num_classes=100,
        label_key="fine_labels",
        train=(("train", "16019d7e3df5f24257cddd939b257f8d"),),
        test=(("test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),),
        meta=("meta", "7973b15100ade9c7d40fb424638fde48"),
        names_key="fine_label_names",
    ),
}
_UNVERIFIED = "fetch it again, or set dataset.verify=false if you trust it"


@dataclass(frozen=True)
class CIFAR:
    """The batches as torchvision lays them out, or ``<name>.npz`` (x_train, y_train, x_test, y_test; uint8 NCHW).

    root: the folder that holds ``cifar-10-batches-py``, or that folder itself. verify: refuse files other than the
    published ones; without it they are read just as carefully, arrays and plain containers alone, but not compared
    (an npz was never published, so it needs verify=false). download: fetch what is not there.
    """

    name: str
    num_classes: int
    image_size: int
    train_size: int | None
    test_size: int | None
    mean: Sequence[float]
    std: Sequence[float]
    limit: int | None
    test_limit: int | None
    seed: int
    root: str | None
    verify: bool
    download: bool

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice("dataset.name", self.name, tuple(PUBLISHED))
        check_flag("dataset.verify", self.verify)
        check_flag("dataset.download", self.download)
        if self.num_classes != PUBLISHED[self.name].num_classes or self.image_size != 32:
            raise ConfigError(
                f"dataset.num_classes={self.num_classes}, dataset.image_size={self.image_size} are not allowed: "
                f"{self.name} has {PUBLISHED[self.name].num_classes} classes and 32-pixel images"
            )

    def load(self, progress: Progress | None = None) -> Dataset:
        """The data in the published order; DataError (with both hashes where one differs) when they cannot be used."""
        layout = PUBLISHED[self.name]
        root = find_root(self.root, self.name)
        proof = layout.train[0][0]
        folder = next((f for f in (root / layout.folder, root) if (f / proof).is_file()), None)
        npz = root / f"{self.name}.npz"
        if folder is None and npz.is_file():
            return self._load_npz(npz)
        if folder is None and self.download:
            folder = fetch([layout.archive], root, layout.folder, progress)
        if folder is None:
            raise DataError(
                f"{root} has neither {layout.folder}/{proof} nor {npz.name}; set dataset.root to the folder that holds "
                f"{layout.folder}, or dataset.download=true"
            )
        train = self._read(folder, layout, layout.train)
        check_count(self, len(train), "train", folder)
        test = self._read(folder, layout, layout.test)
        check_count(self, len(test), "test", folder)
        return finish(self, train, test, self._class_names(folder, layout))

    def _read(self, folder: Path, layout: _Layout, files: Sequence[tuple[str, str]]) -> ImageSet:
        pixels, labels = [], []
        for name, md5 in files:
            path = folder / name
            if self.verify:
                check_md5(path, md5, _UNVERIFIED)
            batch = read_pickle(path)
            data = batch.get("data")
            if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
                raise DataError(f"{path} has no uint8 array data of [N, 3072]; fetch the data again")
            pixels.append(torch.from_numpy(data.reshape(-1, 3, 32, 32).copy()))
            labels.append(_labels(batch.get(layout.label_key), path, layout.label_key))
            if len(labels[-1]) != len(data):  # told here: one batch's surplus could hide another's lack
                raise DataError(f"{path} has {len(data)} images but {len(labels[-1])} labels; fetch the data again")
        return ImageSet(torch.cat(pixels), torch.cat(labels), self.num_classes)

    def _class_names(self, folder: Path, layout: _Layout) -> list[str]:
        path = folder / layout.meta[0]
        if not path.exists() and not self.verify:
            return [str(label) for label in range(self.num_classes)]
        if self.verify:
            check_md5(path, layout.meta[1], _UNVERIFIED)
        names = read_pickle(path).get(layout.names_key)
        if not isinstance(names, list) or len(names) != self.num_classes:
            raise DataError(f"{path} does not list {self.num_classes} class names; fetch the data again")
        return [name.decode("latin1") if isinstance(name, bytes) else str(name) for name in names]

    def _load_npz(self, path: Path) -> Dataset:
        if self.verify:
            raise DataError(f"{path} has no published checksum; set dataset.verify=false if you trust it")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test")}
        except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path} cannot be read: {error}; it must hold plain arrays x_train, y_train, x_test, y_test"
            ) from error
        sets = []
        for part in ("train", "test"):
            images = arrays[f"x_{part}"]
            if images.ndim != 4 or images.shape[1:] != (3, 32, 32):
                raise DataError(f"{path}: x_{part} has shape {images.shape}, expected (N, 3, 32, 32)")
            labels = _labels(arrays[f"y_{part}"], path, f"y_{part}")
            sets.append(ImageSet(_tensor(images, path, f"x_{part}"), labels, self.num_classes))
            check_count(self, len(sets[-1]), part, path)
        return finish(self, sets[0], sets[1], [str(label) for label in range(self.num_classes)])


def _labels(values: Any, path: Path, key: str) -> torch.Tensor:
    """Labels as a tensor: integers of any width as int64; floats stay, for ``validate`` to refuse them by name."""
    try:
        array = np.asarray(values)
    except ValueError:  # lists of unequal length
        array = np.empty((), dtype=object)
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        raise DataError(f"{path} has no list of class numbers {key}; fetch the data again")
    return _tensor(array.astype(np.int64) if array.dtype.kind in "iu" else array, path, key)


def _tensor(array: np.ndarray, path: Path, key: str) -> torch.Tensor:
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {key} is of kind {array.dtype}, expected numbers") from error
