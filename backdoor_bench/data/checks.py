"""What must hold of a data set before anything is trained on it, and stratified choices of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from backdoor_bench.errors import ConfigError, DataError
from backdoor_bench.types import ImageSet


def validate(image_set: ImageSet, name: str, *, every_class: bool = True) -> None:
    """Raise DataError unless the set can be trained on; ``name`` says in the message where the data come from.

    Checked: images uint8 ``[N, 3, H, W]`` with N > 0 (float input is named apart, with NaN told), labels int64 [N] in
    0..num_classes-1, and with ``every_class`` at least one image a class. A label out of range kills the whole CUDA
    context and -100 is ignored by cross-entropy in silence, so both are caught here.
    """
    images, labels = image_set.images, image_set.labels
    dtype = getattr(images, "dtype", torch.uint8)
    if isinstance(images, Tensor) and images.is_floating_point():
        bad = int((~images.isfinite()).flatten(1).any(1).sum()) if images.numel() else 0
        told = f", {bad} of them with NaN or infinite pixels" if bad else ""
        raise DataError(f"{name}: images are {dtype}{told}; store pixels as uint8, 0..255")
    if dtype != torch.uint8:
        raise DataError(f"{name}: images are {dtype}; store pixels as uint8, 0..255")
    if len(images.shape) != 4 or images.shape[1] != 3:
        raise DataError(f"{name}: images have shape {tuple(images.shape)}, expected [N, 3, H, W]")
    if len(images) == 0:
        raise DataError(f"{name}: there are no images; check dataset.root and dataset.limit")
    if labels.dtype != torch.int64:
        raise DataError(f"{name}: labels are {labels.dtype}, expected int64 class numbers")
    if labels.shape != (len(images),):
        raise DataError(f"{name}: {len(images)} images but labels of shape {tuple(labels.shape)}")
    wrong = ((labels < 0) | (labels >= image_set.num_classes)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{name}: {len(wrong)} labels lie outside 0..{image_set.num_classes - 1}, the first is {int(labels[row])} "
            f"in row {row}; correct them or dataset.num_classes"
        )
    if every_class:
        empty = (labels.bincount(minlength=image_set.num_classes) == 0).nonzero().flatten().tolist()
        if empty:
            shown = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
            raise DataError(
                f"{name}: {len(empty)} of {image_set.num_classes} classes have no images (class {shown}); "
                "add images, or correct dataset.num_classes or dataset.limit"
            )


def stratified_subset(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Sorted int64 [count] row numbers in which every class keeps its share of ``labels`` (int64 [N]).

    Sizes a class by the largest remainder (ties to the lower class), so that they add up exactly; where ``count``
    reaches the number of classes present, each gets at least one. Which rows of a class is drawn from ``generator``
    (on the CPU), class by class. Raises ValueError unless 0 <= count <= N.
    """
    labels = labels.cpu()
    total = len(labels)
    if not 0 <= count <= total:
        raise ValueError(f"cannot choose {count} of {total} rows")
    classes, sizes = labels.unique(return_counts=True)
    share = _largest_remainder(sizes.tolist(), count)
    chosen = [torch.empty(0, dtype=torch.int64)]
    for label, size, take in zip(classes.tolist(), sizes.tolist(), share, strict=True):
        rows = (labels == label).nonzero().flatten()
        chosen.append(rows[torch.randperm(size, generator=generator)[:take]])
    return torch.cat(chosen).sort().values


def _largest_remainder(sizes: list[int], count: int) -> list[int]:
    """Integers proportional to ``sizes`` that add up to ``count``, none above its size, none 0 if that can be."""
    total = sum(sizes)
    share = [count * size // total for size in sizes] if total else []
    remainder = [count * size % total for size in sizes]
    if count >= len(sizes):
        # a class lifted to one has had more than its share and stands last for another
        remainder = [-1 if part == 0 else left for part, left in zip(share, remainder, strict=True)]
        share = [max(part, 1) for part in share]
    missing = count - sum(share)
    by_remainder = sorted(range(len(sizes)), key=lambda k: (-remainder[k], k))
    for k in by_remainder[: max(missing, 0)]:
        share[k] += 1
    for _ in range(-missing):  # the lifted classes took too much: the largest ones pay
        share[max(range(len(sizes)), key=lambda k: (share[k], -k))] -= 1
    return share


def holdout_count(size: float, total: int | None) -> int:
    """Images of a holdout that ``holdout.size`` asks for: a number, or a share of all ``total`` training images below 1,
    rounded down. total None: not known yet; a share then counts as one image."""
    if size >= 1 or size == 0:
        return int(size)
    return 1 if total is None else int(size * total + 1e-9)


def split_holdout(image_set: ImageSet, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(training rows, holdout rows), sorted int64 and disjoint, the holdout stratified as in stratified_subset.

    Raises ConfigError when ``size`` leaves nothing to train on, DataError when a class would lose its last image.
    """
    total = len(image_set)
    if not 0 < size < total:
        raise ConfigError(f"holdout.size={size} is not allowed: it must be > 0 and < {total}, the training set's size")
    labels = image_set.labels.cpu()
    holdout = stratified_subset(labels, size, generator)
    keep = torch.ones(total, dtype=torch.bool)
    keep[holdout] = False
    train = keep.nonzero().flatten()
    present = labels.unique()
    lost = present[~torch.isin(present, labels[train])].tolist()
    if lost:
        raise DataError(
            f"holdout.size={size} takes the last training images of class {', '.join(map(str, lost[:10]))}; "
            "choose a smaller holdout or add images"
        )
    return train, holdout
