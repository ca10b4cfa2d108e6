"""forward_all where scores are ranked: full float32 whatever the run's precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from backdoor_bench.detection.features import extract_features
from backdoor_bench.inference import forward_all
from backdoor_bench.training.hardware import Hardware
from backdoor_bench.types import ImageSet


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(48, 3)

    def features(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))

    forward = features


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (40, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_exact_is_float32_in_every_precision(images: Tensor, hardware: Hardware, precision: str) -> None:
    model, rough = Linear(), replace(hardware, precision=precision)
    plain = forward_all(model, images, hardware)
    assert torch.equal(forward_all(model, images, rough, exact=True), plain)
    whole = ImageSet(images, torch.zeros(40, dtype=torch.int64), 3)
    assert torch.equal(extract_features(model, whole, rough, exact=True), plain)  # type: ignore[arg-type]
    if precision == "bf16":
        assert forward_all(model, images, rough).dtype == torch.bfloat16
        assert not torch.equal(extract_features(model, whole, rough), plain)  # type: ignore[arg-type]


def test_exact_allows_no_tf32_and_leaves_the_switches_as_they_were(images: Tensor, hardware: Hardware) -> None:
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before, seen = [switch.allow_tf32 for switch in switches], []
    model = Linear()

    def compute(batch: Tensor) -> Tensor:
        seen.append([switch.allow_tf32 for switch in switches])
        return model(batch)

    try:
        for switch in switches:
            switch.allow_tf32 = True
        forward_all(model, images, hardware, compute, 20, exact=True)
        forward_all(model, images, hardware, compute)
        assert [switch.allow_tf32 for switch in switches] == [True, True]
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
    assert seen == [[False, False], [False, False], [True, True]]
