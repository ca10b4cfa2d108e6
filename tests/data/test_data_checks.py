"""Validation of sets (faults B37-B42) and stratified choices of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backdoor_bench.data.checks import split_holdout, stratified_subset, validate
from backdoor_bench.errors import ConfigError, DataError
from backdoor_bench.types import ImageSet


def image_set(labels: Any, images: Any = None, num_classes: int = 3) -> ImageSet:
    labels = torch.as_tensor(labels)
    return ImageSet(
        torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8) if images is None else images, labels, num_classes
    )


def nan_images() -> torch.Tensor:
    images = torch.zeros(3, 3, 8, 8)
    images[1, 0, 0, 0] = torch.nan
    return images


def test_a_sound_set_passes() -> None:
    validate(image_set([0, 1, 2, 0]), "x")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        pytest.param(image_set([0, 1, 2, 3]), "0..2, the first is 3 in row 3", id="B37 out of range"),
        pytest.param(image_set([0, -100, 2]), "the first is -100 in row 1", id="B38 ignored by cross-entropy"),
        pytest.param(image_set([0.0, 1.0, 2.0]), "labels are torch.float32", id="B39 float label"),
        pytest.param(image_set(torch.zeros(0, dtype=torch.int64)), "no images", id="B40 empty"),
        pytest.param(image_set([0, 0, 2]), r"1 of 3 classes have no images \(class 1\)", id="B41 class without images"),
        pytest.param(image_set([0, 1, 2], nan_images()), "1 of them with NaN", id="B42 NaN"),
        pytest.param(image_set([0, 1, 2], torch.zeros(3, 3, 8, 8)), "images are torch.float32", id="float"),
        pytest.param(image_set([0, 1, 2], torch.zeros(3, 1, 8, 8).byte()), r"\(3, 1, 8, 8\)", id="one channel"),
        pytest.param(image_set([0, 1, 2], torch.zeros(2, 3, 8, 8).byte()), "2 images but labels", id="lengths"),
    ],
)
def test_bad_sets_are_refused_with_the_reason(bad: ImageSet, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        validate(bad, "digits (train)")
    assert "digits (train)" in str(caught.value)


def test_a_test_set_may_lack_a_class() -> None:
    validate(image_set([0, 0, 2]), "x", every_class=False)


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ([50, 30, 20], 10, [5, 3, 2]),
        ([50, 30, 20], 7, [4, 2, 1]),  # shares 3.5, 2.1, 1.4
        ([10, 10, 10], 4, [2, 1, 1]),  # a tie goes to the lower class
        ([96, 2, 2], 10, [8, 1, 1]),  # shares 9.6, 0.2, 0.2: everyone gets one, the largest pays
        ([97, 1, 1, 1], 4, [1, 1, 1, 1]),
        ([90, 5, 5], 2, [2, 0, 0]),  # fewer than classes: only the shares count
        ([3, 4, 5], 12, [3, 4, 5]),
        ([3, 4, 5], 0, [0, 0, 0]),
    ],
)
def test_stratified_counts(sizes: list[int], count: int, expected: list[int]) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(9))]
    index = stratified_subset(labels, count, torch.Generator().manual_seed(0))
    assert labels[index].bincount(minlength=len(sizes)).tolist() == expected
    assert index.dtype == torch.int64
    assert torch.equal(index, index.unique())


def test_stratified_counts_are_exact_for_random_sizes() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        labels = torch.randint(7, (60,), generator=generator) ** 2 // 6
        present = len(labels.unique())
        count = int(torch.randint(61, (1,), generator=generator))
        counts = labels[stratified_subset(labels, count, generator)].bincount(minlength=7)
        assert counts.sum() == count
        assert (counts > 0).sum() == present or count < present
        share = labels.bincount(minlength=7) * count / 60
        assert (counts - share).max() <= 1


def test_stratified_choice_repeats_with_the_seed_and_changes_with_it() -> None:
    labels = torch.arange(1000) % 4
    first, same, other = (stratified_subset(labels, 100, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="11 of 10"):
        stratified_subset(torch.arange(10), 11, torch.Generator())


def test_holdout_is_stratified_and_disjoint() -> None:
    labels = torch.cat([torch.zeros(60), torch.ones(30), torch.full((10,), 2)]).long()
    train, holdout = split_holdout(image_set(labels), 20, torch.Generator().manual_seed(0))
    assert labels[holdout].bincount().tolist() == [12, 6, 2]
    assert torch.equal(torch.cat([train, holdout]).sort().values, torch.arange(100))
    assert torch.equal(train, train.sort().values)


@pytest.mark.parametrize("size", [0, -1, 9, 10])
def test_a_holdout_that_leaves_nothing_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=r"holdout\.size"):
        split_holdout(image_set([0, 1, 2] * 3), size, torch.Generator())


def test_a_holdout_may_not_take_the_last_image_of_a_class() -> None:
    with pytest.raises(DataError, match="class 2"):
        split_holdout(image_set([0] * 10 + [1] * 10 + [2]), 6, torch.Generator().manual_seed(0))
