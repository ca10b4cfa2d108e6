"""A user's own images: any tree with one subfolder a class."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from backdoor_bench.data.common import check_fields, finish, warn
from backdoor_bench.data.decode import Decoder, printable, stamp
from backdoor_bench.data.tree import list_images, read_images, subfolders
from backdoor_bench.errors import ConfigError, DataError
from backdoor_bench.storage import digest
from backdoor_bench.types import Dataset, Progress

_SPLITS = ("train", "test", "val")


@dataclass(frozen=True)
class FolderDataset:
    """``root/<class>/*``, or ``root/train/<class>/*`` with ``root/test`` or ``root/val`` of the same form.

    Without such a split all images are training data and there is no test set. Classes are the sorted folder names.
    num_classes, train_size, test_size: None, or what must be found. truth: None, or a CSV file (absolute or relative to
    root) with columns ``file, poisoned`` and optionally ``true_label`` (class name or number), ``cover``; files it does
    not list are clean. resize, max_pixels, on_error, memory_limit_gib, cache_dir: see decode.Decoder.
    """

    name: str
    num_classes: int | None
    image_size: int
    train_size: int | None
    test_size: int | None
    mean: Sequence[float]
    std: Sequence[float]
    limit: int | None
    test_limit: int | None
    seed: int
    root: str | None
    truth: str | None
    resize: str
    max_pixels: int
    on_error: str
    memory_limit_gib: float
    cache_dir: str

    def __post_init__(self) -> None:
        check_fields(self)
        self._decoder()

    def load(self, progress: Progress | None = None) -> Dataset:
        """The images with ``file_names`` relative to root and, from ``truth``, what is known of them.

        Raises ConfigError without a root, DataError when the tree, a file (unless on_error is ``skip``) or the truth
        cannot be used.
        """
        if not self.root:
            raise ConfigError("dataset.root is not set: set dataset.root=DIR, a folder with one subfolder a class")
        root = Path(self.root).expanduser()
        base, test_base = _layout(root)
        classes = subfolders(root / base)
        if len(classes) < 2:
            raise DataError(f"{root / base} has {len(classes)} class folders, at least 2 are needed: one a class")
        if self.num_classes not in (None, len(classes)):
            raise DataError(f"{root / base} has {len(classes)} class folders, dataset.num_classes={self.num_classes}")
        names, labels, ignored = list_images(root, base, classes)
        if ignored:
            warn(progress, f"{ignored} files below {root / base} have no image suffix and are left out")
        empty = sorted(set(range(len(classes))) - set(labels))
        if empty:
            raise DataError(f"{root / base / classes[empty[0]]} holds no images; add some or remove the folder")
        decoder = self._decoder()
        train, kept_names = read_images(self, decoder, root, names, labels, len(classes), "train", progress)
        test = None
        if test_base is not None:
            unknown = sorted(set(subfolders(root / test_base)) - set(classes))
            if unknown:
                raise DataError(f"{root / test_base / unknown[0]} is a class that the training folder does not have")
            test_names, test_labels, _ = list_images(root, test_base, classes)
            test, _ = read_images(self, decoder, root, test_names, test_labels, len(classes), "test", progress)
        known: dict[str, Tensor] = {}
        if self.truth is not None:
            known = read_truth(root / Path(self.truth).expanduser(), kept_names, train.labels, classes, names)
        dataset = finish(self, train, test, classes, file_names=kept_names, **known)
        return replace(dataset, untrusted=True)

    def fingerprint(self) -> str:
        """A hash of names, sizes and times of all images and of the truth: another one means other data.

        Raises ConfigError without a root, DataError when the tree cannot be read.
        """
        if not self.root:
            raise ConfigError("dataset.root is not set: set dataset.root=DIR, a folder with one subfolder a class")
        root = Path(self.root).expanduser()
        names = []
        for base in (base for base in _layout(root) if base is not None):
            names += list_images(root, base, subfolders(root / base))[0]
        stamps = [stamp(root, name) for name in names]
        return digest([*stamps, stamp(root, str(Path(self.truth).expanduser())) if self.truth else None])

    def _decoder(self) -> Decoder:
        return Decoder(
            self.image_size, self.resize, self.max_pixels, self.on_error, self.memory_limit_gib, self.cache_dir
        )


def _layout(root: Path) -> tuple[str, str | None]:
    """(folder of the training classes, folder of the test classes or None), relative to root."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; check dataset.root")
    found = subfolders(root)
    split = [part for part in _SPLITS if part in found and subfolders(root / part)]
    if "train" in split and set(found) <= set(_SPLITS):
        return "train", next((part for part in ("test", "val") if part in split), None)
    return ".", None


def read_truth(
    path: Path, names: Sequence[str], labels: Tensor, classes: Sequence[str], all_names: Sequence[str]
) -> dict[str, Tensor]:
    """``known_poison``, ``known_cover`` (bool [N]) and ``true_labels`` (int64 [N]) of the rows ``names``.

    labels: given labels, which are the true ones where the file says nothing else. all_names: files that may be listed
    without being rows (those skipped). Raises DataError naming file and line.
    """
    rows = {name: row for row, name in enumerate(names)}
    listed: set[str] = set()
    known = set(all_names)
    poison = torch.zeros(len(names), dtype=torch.bool)
    cover, true_labels = poison.clone(), labels.clone()
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"file", "poisoned"} <= set(reader.fieldnames or ()):
                raise DataError(f"{path} must have the columns file and poisoned (and may have true_label, cover)")
            for entry in reader:
                where = f"{path}, line {reader.line_num}"
                name = (entry["file"] or "").removeprefix("./")
                if name not in known or name in listed:
                    told = "is listed twice" if name in listed else "is not a training image below dataset.root"
                    raise DataError(f"{where}: {printable(name)!r} {told}")
                listed.add(name)
                row = rows.get(name)
                if row is None:
                    continue
                poison[row] = _flag(entry["poisoned"], where, "poisoned")
                cover[row] = _flag(entry.get("cover"), where, "cover")
                if entry.get("true_label"):
                    true_labels[row] = _class_number(entry["true_label"], classes, where)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}; check dataset.truth") from error
    if (poison & cover).any():
        name = names[int((poison & cover).nonzero()[0])]
        raise DataError(f"{path}: {name!r} is both poisoned and cover; a cover image keeps its true label")
    return {"known_poison": poison, "known_cover": cover, "true_labels": true_labels}


def _flag(text: str | None, where: str, column: str) -> bool:
    value = (text or "0").strip().lower()
    if value not in ("0", "1", "true", "false", "yes", "no"):
        raise DataError(f"{where}: {column}={text!r} must be 0 or 1")
    return value in ("1", "true", "yes")


def _class_number(text: str, classes: Sequence[str], where: str) -> int:
    """A class by its folder name, else by its number."""
    if text in classes:
        return list(classes).index(text)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    raise DataError(f"{where}: true_label={text!r} is neither a class folder nor a number below {len(classes)}")
