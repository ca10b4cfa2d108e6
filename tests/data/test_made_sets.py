"""photo_digits and toy: balanced, seeded, disjoint, quick to learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.data.photo_digits import PhotoDigits, _crop, _place, split_originals
from backdoor_bench.data.toy import Toy
from backdoor_bench.errors import ConfigError

DIGITS = PhotoDigits(
    name="photo_digits",
    num_classes=10,
    image_size=32,
    train_size=300,
    test_size=100,
    mean=[0.5] * 3,
    std=[0.3] * 3,
    limit=None,
    test_limit=None,
    seed=0,
    rotation=45,
    digit_min=16,
    digit_max=26,
    contrast_min=0.25,
)
TOY = Toy("toy", 4, 16, 512, 256, [0.5] * 3, [0.15] * 3, None, None, 0, 0.1)


def pixels(images: object) -> Tensor:
    assert isinstance(images, Tensor)
    return images


@pytest.mark.parametrize("loader", [DIGITS, TOY], ids=["photo_digits", "toy"])
def test_same_fields_same_set_and_classes_equally_frequent(loader: PhotoDigits | Toy) -> None:
    first, second, other = loader.load(), loader.load(), replace(loader, seed=1).load()
    assert first.test is not None
    assert second.test is not None
    for one, two in ((first.train, second.train), (first.test, second.test)):
        assert torch.equal(pixels(one.images), pixels(two.images))
        assert torch.equal(one.labels, two.labels)
    assert not torch.equal(pixels(first.train.images), pixels(other.train.images))
    per_class = loader.train_size // loader.num_classes
    assert first.train.labels.bincount().tolist() == [per_class] * loader.num_classes
    assert pixels(first.train.images).dtype == torch.uint8
    assert first.train.images.shape == (loader.train_size, 3, loader.image_size, loader.image_size)
    assert len(first.test) == loader.test_size
    assert len(first.class_names) == loader.num_classes


@pytest.mark.parametrize("loader", [DIGITS, TOY], ids=["photo_digits", "toy"])
def test_size_of_one_part_does_not_change_the_other(loader: PhotoDigits | Toy) -> None:
    whole, smaller = loader.load(), replace(loader, test_size=50).load()
    assert torch.equal(pixels(whole.train.images), pixels(smaller.train.images))


@pytest.mark.parametrize("loader", [DIGITS, TOY], ids=["photo_digits", "toy"])
def test_limit_keeps_rows_of_the_full_set_in_order(loader: PhotoDigits | Toy) -> None:
    whole, part = loader.load(), replace(loader, limit=40, test_limit=20).load()
    assert part.test is not None
    assert part.train.labels.bincount().tolist() == [40 // loader.num_classes] * loader.num_classes
    assert len(part.test) == 20
    rows = {bytes(image.numpy()): row for row, image in enumerate(pixels(whole.train.images))}
    found = [rows[bytes(image.numpy())] for image in pixels(part.train.images)]
    assert found == sorted(found)


def test_originals_are_disjoint_and_cover_all() -> None:
    labels = torch.arange(100) % 10
    train, test = split_originals(labels, torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(100))
    assert labels[test].bincount().tolist() == [2] * 10  # a quarter of ten, rounded half to even


def test_photo_regions_are_disjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """With photographs that are 0 left of three quarters and 200 right of it, every crop is of one kind."""
    import sklearn.datasets

    photo = np.zeros((64, 160, 3), dtype=np.uint8)
    photo[:, 120:] = 200

    class Photos:
        images = (photo, photo)

    class Digits:
        images = np.zeros((100, 8, 8))
        target = np.arange(100) % 10

    monkeypatch.setattr(sklearn.datasets, "load_sample_images", Photos)
    monkeypatch.setattr(sklearn.datasets, "load_digits", Digits)
    data = DIGITS.load()
    assert data.test is not None
    assert pixels(data.train.images).unique().tolist() == [0]
    assert pixels(data.test.images).unique().tolist() == [200]


def test_blend_is_the_absolute_difference() -> None:
    plain = replace(DIGITS, rotation=0, digit_min=32, digit_max=32, contrast_min=1)
    region = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    region[:, 2] = 250
    made = plain._make(torch.ones(10, 8, 8), torch.arange(10), region, 10, torch.Generator().manual_seed(0))
    assert pixels(made.images)[:, :, 16, 16].tolist() == [[155, 155, 5]] * 10


def test_a_digit_is_turned_clockwise_scaled_and_shifted() -> None:
    original = torch.zeros(1, 8, 8)
    original[0, :, 6:] = 1  # a bar on the right
    still = _place(original, torch.zeros(1), torch.tensor([0.5]), torch.zeros(1, 2), 32)[0, 0]
    assert still[16, 21] == 1  # columns 8..24 hold the original, its bar columns 20..24
    assert still[16, 10] == 0
    turned = _place(original, torch.tensor([torch.pi / 2]), torch.tensor([0.5]), torch.zeros(1, 2), 32)[0, 0]
    assert turned[21, 16] == 1  # now below
    assert turned[10, 16] == 0
    shifted = _place(original, torch.zeros(1), torch.tensor([0.5]), torch.tensor([[0.5, -0.5]]), 32)[0, 0]
    assert shifted[8, 29] == 1  # 8 pixels to the right and up
    assert shifted[24, 29] == 0


def test_crop_reads_the_given_corner() -> None:
    region = torch.arange(2 * 3 * 10 * 12).remainder(256).to(torch.uint8).view(2, 3, 10, 12)
    out = _crop(region, torch.tensor([[1, 0], [2, 0], [3, 4]]), 5)
    assert torch.equal(out[0], region[1, :, 2:7, 3:8])
    assert torch.equal(out[1], region[0, :, 0:5, 4:9])


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"num_classes": 9}, "num_classes"),
        ({"train_size": 5}, "train_size"),
        ({"digit_min": 27}, "digit_min"),
        ({"digit_max": 33}, "digit_max"),
        ({"rotation": -1}, "rotation"),
        ({"contrast_min": 0}, "contrast_min"),
        ({"limit": 9}, "limit"),
        ({"seed": -1}, "seed"),
        ({"mean": [0.5]}, "mean"),
        ({"std": [0.3, 0, 0.3]}, "std"),
    ],
)
def test_bad_values_name_their_key(values: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=f"dataset.{key}"):
        replace(DIGITS, **values)  # type: ignore[arg-type]


def test_toy_is_learnt_by_a_tiny_network_in_a_few_epochs() -> None:
    data = TOY.load()
    assert data.test is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        images = pixels(data.train.images).float() / 127.5 - 1
        for _ in range(3):
            for batch in torch.randperm(512).split(32):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), data.train.labels[batch]).backward()
                optimizer.step()
    model.eval()
    with torch.no_grad():
        guess = model(pixels(data.test.images).float() / 127.5 - 1).argmax(1)
    assert (guess == data.test.labels).float().mean() > 0.9
