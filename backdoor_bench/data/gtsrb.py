"""GTSRB, the German traffic signs (Stallkamp et al., 2012): 43 classes of photographs of 15 to 250 pixels."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backdoor_bench.data.common import check_fields, check_flag, find_folder, find_root, finish
from backdoor_bench.data.decode import Decoder
from backdoor_bench.data.fetch import Archive, fetch
from backdoor_bench.data.tree import list_images, read_images, subfolders
from backdoor_bench.errors import DataError
from backdoor_bench.types import Dataset, Progress

_SITE = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
# The full training set; torchvision's GTSRB fetches a smaller one (26,640 images), the papers use this.
PUBLISHED = (
    Archive(_SITE + "GTSRB_Final_Training_Images.zip", "f33fd80ac59bff73c82d25ab499e03a3"),
    Archive(_SITE + "GTSRB_Final_Test_Images.zip", "c7e4e6327067d32654124b0fe9e82185"),
    Archive(_SITE + "GTSRB_Final_Test_GT.zip", "fe31e9c9270bbcd7b84b7f21a9d9d9e5"),
)
_TRAINING = ("GTSRB/Final_Training/Images", "GTSRB/Training")  # the publisher's layout, torchvision's
_TEST = "GTSRB/Final_Test/Images"
_TRUTH = "GT-final_test.csv"


@dataclass(frozen=True)
class GTSRB:
    """``root/gtsrb/GTSRB/{Final_Training/Images or Training}/<class>/*.ppm``, test images with their CSV of labels.

    root may also be the folder ``gtsrb`` itself. resize ... cache_dir: see decode.Decoder.
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
    download: bool
    resize: str
    max_pixels: int
    on_error: str
    memory_limit_gib: float
    cache_dir: str

    def __post_init__(self) -> None:
        check_fields(self)
        check_flag("dataset.download", self.download)
        self._decoder()

    def load(self, progress: Progress | None = None) -> Dataset:
        """Training and test images at image_size; DataError when the folder, the CSV or a file cannot be used."""
        root = find_root(self.root, self.name)
        folder = find_folder(root, ("gtsrb",), "GTSRB")
        if folder is None and self.download:
            folder = fetch(PUBLISHED, root, "gtsrb", progress)
        base = next((base for base in _TRAINING if folder and (folder / base).is_dir()), None)
        if folder is None or base is None:
            raise DataError(
                f"{root} has no gtsrb/{_TRAINING[0]} and no gtsrb/{_TRAINING[1]}; set dataset.root to the folder that "
                "holds gtsrb, or dataset.download=true"
            )
        classes = subfolders(folder / base)
        if len(classes) != self.num_classes:
            raise DataError(f"{folder / base} has {len(classes)} class folders, {self.name} has {self.num_classes}")
        names, labels, _ = list_images(folder, base, classes)
        test_names, test_labels = _read_truth(folder)
        decoder = self._decoder()
        train, file_names = read_images(self, decoder, folder, names, labels, self.num_classes, "train", progress)
        test, _ = read_images(self, decoder, folder, test_names, test_labels, self.num_classes, "test", progress)
        return finish(self, train, test, classes, file_names=file_names)

    def _decoder(self) -> Decoder:
        return Decoder(
            self.image_size, self.resize, self.max_pixels, self.on_error, self.memory_limit_gib, self.cache_dir
        )


def _read_truth(folder: Path) -> tuple[list[str], list[int]]:
    """(names, labels) of the test images; the CSV lies beside the folder GTSRB or among the images."""
    path = next((p for p in (folder / _TRUTH, folder / _TEST / _TRUTH) if p.exists()), folder / _TRUTH)
    names, labels = [], []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for entry in csv.DictReader(file, delimiter=";", skipinitialspace=True):
                names.append(f"{_TEST}/{entry['Filename']}")
                labels.append(int(entry["ClassId"]))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be read as the list of test labels: {error!r}; fetch the data again") from error
    return names, labels
