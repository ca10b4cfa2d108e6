"""Published sets that come as image files: Imagenette, Tiny ImageNet and subsets of ImageNet."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backdoor_bench.data.common import check_fields, check_flag, find_folder, find_root, finish
from backdoor_bench.data.decode import Decoder
from backdoor_bench.data.fetch import Archive, fetch
from backdoor_bench.data.tree import list_images, read_images, subfolders
from backdoor_bench.errors import ConfigError, DataError, check_choice
from backdoor_bench.types import Dataset, Progress

# What may be fetched, by dataset name: folder it unpacks to, address and MD5 as torchvision.datasets has them.
PUBLISHED = {
    "imagenette": (
        "imagenette2-320",
        Archive("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz", "3df6f0d01a2c9592104656642f5e78a3"),
    ),
}
_ANNOTATIONS = "val_annotations.txt"


@dataclass(frozen=True)
class ImageTree:
    """``root/<folder>/train/<class>/**`` with ``val`` or ``test`` beside it; classes are the sorted folder names.

    folders: names looked for below root, which may also be the set's folder itself. class_subset: ``all``, or ``first``
    to take the first num_classes of a larger tree (T&R's ImageNet-12). Tiny ImageNet's flat ``val/images`` with its
    annotation file is understood. resize ... cache_dir: see decode.Decoder.
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
    folders: Sequence[str]
    class_subset: str
    download: bool
    resize: str
    max_pixels: int
    on_error: str
    memory_limit_gib: float
    cache_dir: str

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice("dataset.class_subset", self.class_subset, ("all", "first"))
        check_flag("dataset.download", self.download)
        if self.download and self.name not in PUBLISHED:
            raise ConfigError(
                f"dataset.download=True is not allowed: {self.name} cannot be fetched; unpack it and set dataset.root"
            )
        self._decoder()

    def load(self, progress: Progress | None = None) -> Dataset:
        """Training images and the validation images as test set; DataError when the tree or a file cannot be used."""
        folder = self._folder(progress)
        classes = subfolders(folder / "train")
        if self.class_subset == "first":
            classes = classes[: self.num_classes]
        if len(classes) != self.num_classes:
            raise DataError(f"{folder / 'train'} has {len(classes)} class folders, {self.name} has {self.num_classes}")
        names, labels, _ = list_images(folder, "train", classes)
        part = next((part for part in ("val", "test") if (folder / part).is_dir()), None)
        if part is None:
            raise DataError(f"{folder} has neither val nor test; complete the data")
        if (folder / part / _ANNOTATIONS).exists():
            test_names, test_labels = _annotated(folder, part, classes)
        else:
            test_names, test_labels, _ = list_images(folder, part, classes)
        decoder = self._decoder()
        train, file_names = read_images(self, decoder, folder, names, labels, self.num_classes, "train", progress)
        test, _ = read_images(self, decoder, folder, test_names, test_labels, self.num_classes, "test", progress)
        return finish(self, train, test, classes, file_names=file_names)

    def _folder(self, progress: Progress | None) -> Path:
        root = find_root(self.root, self.name)
        folder = find_folder(root, self.folders, "train")
        if folder is None and self.download:
            target, archive = PUBLISHED[self.name]
            folder = fetch([archive], root, target, progress)
        if folder is None:
            raise DataError(
                f"{root} has no folder train, nor has {' or '.join(self.folders)} in it; set dataset.root to the "
                f"folder that holds {self.name}"
            )
        return folder

    def _decoder(self) -> Decoder:
        return Decoder(
            self.image_size, self.resize, self.max_pixels, self.on_error, self.memory_limit_gib, self.cache_dir
        )


def _annotated(folder: Path, part: str, classes: Sequence[str]) -> tuple[list[str], list[int]]:
    """(names, labels) of Tiny ImageNet's validation images: a tab-separated list of file and class."""
    path = folder / part / _ANNOTATIONS
    number = {name: label for label, name in enumerate(classes)}
    rows: list[tuple[str, int]] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for line, entry in enumerate(csv.reader(file, delimiter="\t"), start=1):
                if len(entry) < 2 or entry[1] not in number:
                    raise DataError(f"{path}, line {line}: expected a file and one of the {len(classes)} classes")
                rows.append((f"{part}/images/{entry[0]}", number[entry[1]]))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}; fetch the data again") from error
    rows.sort()
    return [name for name, _ in rows], [label for _, label in rows]
