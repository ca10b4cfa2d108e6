"""Feature extraction: right values, right order, and the model left as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from backdoor_bench.detection.features import extract_features
from backdoor_bench.inference import forward_all
from backdoor_bench.training.hardware import Hardware
from backdoor_bench.types import ImageSet


class MeanColour(nn.Module):
    """Features = channel means through dropout, which only eval mode switches off."""

    feature_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def features(self, images: Tensor) -> Tensor:
        return self.scale * self.dropout(self.frozen(images.mean((2, 3))))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def features(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))


@pytest.fixture
def image_set() -> ImageSet:
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1) * torch.tensor([1, 5, 25]).view(1, 3, 1, 1)
    return ImageSet(images.expand(10, 3, 2, 2).to(torch.uint8).contiguous(), torch.zeros(10, dtype=torch.int64), 2)


@pytest.mark.parametrize("batch_size", [1, 4, 1024])
def test_features_of_known_images(image_set: ImageSet, hardware: Hardware, batch_size: int) -> None:
    model = MeanColour()
    features = forward_all(model, image_set.images, hardware, model.features, batch_size)
    assert torch.equal(features, extract_features(model, image_set, hardware))  # type: ignore[arg-type]
    expected = 2 * torch.arange(10.0)[:, None] * torch.tensor([1.0, 5.0, 25.0]) / 255
    assert features.dtype == torch.float32
    assert not features.requires_grad
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-6)


def test_modes_are_restored_module_by_module(image_set: ImageSet, hardware: Hardware) -> None:
    model = MeanColour().train()
    model.frozen.eval()
    extract_features(model, image_set, hardware)  # type: ignore[arg-type]
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)
    assert model.frozen.running_mean.tolist() == [0.0, 0.0, 0.0]  # type: ignore[union-attr]


def test_modes_are_restored_after_an_error(image_set: ImageSet, hardware: Hardware) -> None:
    model = MeanColour().train()
    broken = ImageSet(image_set.images[:, :2], image_set.labels, 2)
    with pytest.raises(RuntimeError):
        extract_features(model, broken, hardware)  # type: ignore[arg-type]
    assert model.dropout.training


def test_reduced_precision_comes_back_as_float32(image_set: ImageSet, hardware: Hardware) -> None:
    torch.manual_seed(0)
    model = Linear()
    plain = extract_features(model, image_set, hardware)  # type: ignore[arg-type]
    rough = extract_features(model, image_set, replace(hardware, precision="bf16"))  # type: ignore[arg-type]
    assert rough.dtype == torch.float32
    assert not torch.equal(plain, rough)
    torch.testing.assert_close(plain, rough, rtol=0.05, atol=0.02)


def test_no_images_no_features(image_set: ImageSet, hardware: Hardware) -> None:
    empty = ImageSet(image_set.images[:0], image_set.labels[:0], 2)
    assert extract_features(MeanColour(), empty, hardware).shape == (0, 3)  # type: ignore[arg-type]
