"""Image stores: a plain tensor, or a memory-mapped file that acts like one, with replaced rows laid over it."""

from __future__ import annotations

import operator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backdoor_bench.errors import DataError
from backdoor_bench.types import Images, ImageSet


class MappedImages:
    """A uint8 ``[N, 3, H, W]`` image store in a ``.npy`` file, read as it is indexed.

    Index it with an int64 or bool tensor, a slice or an integer; a uint8 tensor on the CPU comes back, always a copy.
    It never changes: ``replace_rows`` and ``select`` return new stores over the same file. Which rows are replaced is
    private, because a defence that is handed the images must not learn from them which ones are poisoned.
    Raises DataError when the file is not such an array.
    """

    dtype = torch.uint8
    device = torch.device("cpu")

    def __init__(self, path: Path) -> None:
        try:
            base = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as a memory-mapped array: {error}; delete it to rebuild") from error
        if base.dtype != np.uint8 or base.ndim != 4 or base.shape[1] != 3:
            raise DataError(
                f"{path} holds {base.dtype} {base.shape}, expected uint8 [N, 3, H, W]; delete it to rebuild"
            )
        self._base = base
        self._rows = torch.arange(len(base))  # row of the file behind each of our rows
        self._slot = torch.full((len(base),), -1)  # row of the overlay, -1 = the file's own
        self._overlay = torch.empty((0, *base.shape[1:]), dtype=torch.uint8)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self._rows), *self._base.shape[1:]))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, slice):
            index = torch.arange(len(self))[index]
        elif not isinstance(index, Tensor):
            return self[torch.tensor([operator.index(index)])][0]
        index = index.cpu()
        rows, slots = self._rows[index], self._slot[index]
        images = torch.from_numpy(self._base[rows.numpy()])  # a fancy index copies, so the file stays untouched
        replaced = slots >= 0
        if replaced.any():
            images[replaced] = self._overlay[slots[replaced]]
        return images

    def _derive(self, rows: Tensor, slot: Tensor, overlay: Tensor) -> MappedImages:
        view = object.__new__(MappedImages)
        view._base, view._rows, view._slot, view._overlay = self._base, rows, slot, overlay
        return view

    def _with_rows(self, index: Tensor, rows: Tensor) -> MappedImages:
        slot = self._slot.clone()
        slot[index] = torch.arange(len(index)) + len(self._overlay)
        return self._derive(self._rows, slot, torch.cat([self._overlay, rows]))

    def _subset(self, index: Tensor) -> MappedImages:
        return self._derive(self._rows[index], self._slot[index], self._overlay)


def replace_rows(images: Images, index: Tensor, rows: Tensor) -> Images:
    """Images whose rows ``index`` are ``rows``; the argument stays as it is.

    index: int64 [K] without repetition. rows: uint8 ``[K, 3, H, W]``. A tensor gives a new tensor, a MappedImages a
    new overlay over the same file (rows in memory, the rest on disk).
    """
    assert rows.dtype == torch.uint8, f"rows are {rows.dtype}, images are stored as uint8"
    assert rows.shape == (len(index), *images.shape[1:]), f"rows {tuple(rows.shape)} do not fit {tuple(images.shape)}"
    if isinstance(images, MappedImages):
        return images._with_rows(index.cpu(), rows.cpu())
    assert isinstance(images, Tensor)
    result = images.clone()
    result[index.to(images.device)] = rows.to(images.device)
    return result


def to_device(image_set: ImageSet, device: torch.device) -> ImageSet:
    """The image set on ``device``. Memory-mapped images stay where they are (their batches travel); labels move."""
    images = image_set.images
    if isinstance(images, Tensor):
        images = images.to(device)
    return replace(image_set, images=images, labels=image_set.labels.to(device))


def select(image_set: ImageSet, index: Tensor) -> ImageSet:
    """The subset ``index`` (int64 [K] or bool [N]) of an image set, in that order; a mapped set is not read."""
    images, labels = image_set.images, image_set.labels[index.to(image_set.labels.device)]
    if isinstance(images, MappedImages):
        return replace(image_set, images=images._subset(index.cpu()), labels=labels)
    assert isinstance(images, Tensor)
    return replace(image_set, images=images[index.to(images.device)], labels=labels)
