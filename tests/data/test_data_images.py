"""Image stores: indexing, overlay, subsets, and that a mapped store does not tell which rows were replaced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from backdoor_bench.data.images import MappedImages, replace_rows, select, to_device
from backdoor_bench.errors import DataError
from backdoor_bench.types import ImageSet

BASE = torch.arange(6 * 3 * 4 * 4, dtype=torch.int64).remainder(251).to(torch.uint8).view(6, 3, 4, 4)


@pytest.fixture
def mapped(tmp_path: Path) -> MappedImages:
    np.save(tmp_path / "base.npy", BASE.numpy())
    return MappedImages(tmp_path / "base.npy")


def test_mapped_images_index_like_the_tensor_they_hold(mapped: MappedImages) -> None:
    index = torch.tensor([5, 0, 0, -1])
    mask = torch.tensor([True, False, False, True, False, True])
    assert mapped.shape == BASE.shape
    assert len(mapped) == 6
    assert torch.equal(mapped[index], BASE[index])
    assert torch.equal(mapped[mask], BASE[mask])
    assert torch.equal(mapped[1:5:2], BASE[1:5:2])
    assert torch.equal(mapped[3], BASE[3])
    assert mapped[torch.empty(0, dtype=torch.int64)].shape == (0, 3, 4, 4)
    with pytest.raises(IndexError):
        mapped[torch.tensor([6])]


def test_what_is_read_can_be_changed_without_changing_the_file(mapped: MappedImages) -> None:
    mapped[:].zero_()
    assert torch.equal(mapped[:], BASE)


@pytest.mark.parametrize("kind", ["tensor", "mapped"])
def test_replace_rows_gives_a_new_store_and_later_rows_win(kind: str, mapped: MappedImages) -> None:
    images: Tensor | MappedImages = BASE.clone() if kind == "tensor" else mapped
    ones, twos = torch.ones(2, 3, 4, 4, dtype=torch.uint8), torch.full((2, 3, 4, 4), 2, dtype=torch.uint8)
    first = replace_rows(images, torch.tensor([4, 1]), ones)
    second = replace_rows(first, torch.tensor([1, 2]), twos)
    expected = BASE.clone()
    expected[4], expected[1], expected[2] = 1, 2, 2
    assert torch.equal(second[:], expected)
    assert torch.equal(images[:], BASE)
    assert torch.equal(first[torch.tensor([1, 2])], torch.stack([ones[0], BASE[2]]))


def test_select_follows_the_overlay_and_keeps_order(mapped: MappedImages) -> None:
    labels = torch.arange(6)
    new = torch.full((1, 3, 4, 4), 9, dtype=torch.uint8)
    for images in (BASE, mapped):
        whole = ImageSet(replace_rows(images, torch.tensor([2]), new), labels, 6)
        part = select(select(whole, torch.tensor([5, 2, 0])), torch.tensor([1, 0]))
        assert part.labels.tolist() == [2, 5]
        assert torch.equal(part.images[:], torch.cat([new, BASE[5:]]))
        masked = select(whole, labels > 3)
        assert torch.equal(masked.images[:], BASE[4:])


def test_to_device_moves_tensors_and_leaves_mapped_images(mapped: MappedImages) -> None:
    labels = torch.arange(6)
    moved = to_device(ImageSet(BASE, labels, 6), torch.device("meta"))
    assert isinstance(moved.images, Tensor)
    assert moved.images.device.type == "meta"
    stayed = to_device(ImageSet(mapped, labels, 6), torch.device("meta"))
    assert stayed.images is mapped
    assert stayed.labels.device.type == "meta"


def test_no_public_attribute_tells_which_rows_are_replaced(mapped: MappedImages) -> None:
    def public(images: MappedImages) -> dict[str, object]:
        return {name: getattr(images, name) for name in dir(images) if not name.startswith("_")}

    replaced = replace_rows(mapped, torch.tensor([3]), torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    assert isinstance(replaced, MappedImages)
    assert public(replaced) == public(mapped)


@pytest.mark.parametrize("array", [np.zeros((2, 3, 4, 4), np.float32), np.zeros((2, 4, 4), np.uint8)])
def test_a_file_of_another_kind_is_refused(array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(DataError, match="uint8"):
        MappedImages(tmp_path / "x.npy")


def test_a_pickled_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"x\.npy"):
        MappedImages(tmp_path / "x.npy")
