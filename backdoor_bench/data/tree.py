"""Listing the images of a folder with one subfolder a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from backdoor_bench.data.decode import SUFFIXES, printable
from backdoor_bench.errors import DataError


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


def _linked(folder: Path) -> DataError:
    return DataError(f"{printable(str(folder))} is a link to a folder; copy the images to where it stands")


def _unreadable(error: OSError) -> None:
    raise DataError(f"{printable(str(error.filename))} cannot be read: {error.strerror}; check dataset.root") from error
