"""Listing and reading the images of a folder with one subfolder a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from backdoor_bench.data.common import Loader, check_count, limited_rows
from backdoor_bench.data.decode import SUFFIXES, Decoder, printable
from backdoor_bench.errors import DataError
from backdoor_bench.types import ImageSet, Progress


def subfolders(folder: Path) -> list[str]:
    """Sorted names of the visible subfolders; DataError when ``folder`` cannot be read."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{printable(str(folder))} cannot be read: {error.strerror}; check dataset.root") from error


def list_images(root: Path, base: str, classes: Sequence[str]) -> tuple[list[str], list[int], int]:
    """(names, labels, ignored) of the images in ``root/base/<class>``, nested folders included, sorted by class, path.

    names: posix paths relative to ``root``; labels: positions in ``classes``; ignored: number of visible files whose
    suffix is not an image's. Raises DataError at a folder that is a link: it may lead anywhere, or round in circles.
    """
    names: list[str] = []
    labels: list[int] = []
    ignored = 0
    for label, name in enumerate(classes):
        start = root / base / name
        if start.is_symlink():
            raise _linked(start)
        if not start.is_dir():  # a test set may lack a class; the caller counts
            continue
        found: list[str] = []
        for folder, children, files in os.walk(start, onerror=_unreadable):
            for child in children:
                if (Path(folder) / child).is_symlink():
                    raise _linked(Path(folder) / child)
            children[:] = [child for child in children if not child.startswith(".")]
            visible = [file for file in files if not file.startswith(".")]
            images = [file for file in visible if Path(file).suffix.lower() in SUFFIXES]
            ignored += len(visible) - len(images)
            found += [(Path(folder) / file).relative_to(root).as_posix() for file in images]
        names += sorted(found)
        labels += [label] * len(found)
    return names, labels, ignored


def read_images(
    loader: Loader,
    decoder: Decoder,
    root: Path,
    names: Sequence[str],
    labels: Sequence[int],
    num_classes: int,
    part: str,
    progress: Progress | None,
) -> tuple[ImageSet, list[str]]:
    """(image set, names of its rows): the files that the limit of ``part`` leaves, decoded, bad ones as on_error says.

    Raises DataError when there are not as many files as ``loader`` says, or one cannot be used.
    """
    check_count(loader, len(names), part, root)
    label = torch.tensor(labels, dtype=torch.int64)
    chosen = limited_rows(loader, label, num_classes, part)
    if chosen is not None:
        names, label = [names[row] for row in chosen.tolist()], label[chosen]
    images, kept = decoder.decode(root, names, progress)
    return ImageSet(images, label[torch.tensor(kept, dtype=torch.int64)], num_classes), [names[row] for row in kept]


def _linked(folder: Path) -> DataError:
    return DataError(f"{printable(str(folder))} is a link to a folder; copy the images to where it stands")


def _unreadable(error: OSError) -> None:
    raise DataError(f"{printable(str(error.filename))} cannot be read: {error.strerror}; check dataset.root") from error
