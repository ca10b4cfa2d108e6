"""Triggers give the same pixels on a GPU."""

from __future__ import annotations

import pytest
import torch

from backdoor_bench.triggers.additive import Add, AddAndStretch
from backdoor_bench.triggers.blend import Blend, sine, wrapped_stripes
from backdoor_bench.triggers.filters import FILTERS, ColourFilter
from backdoor_bench.triggers.logos import logo
from backdoor_bench.triggers.overlay import InPieces, Overlay
from backdoor_bench.triggers.patch import corner_patch, white_cells
from backdoor_bench.triggers.sinusoid import Sinusoid
from backdoor_bench.triggers.smooth import glow
from backdoor_bench.triggers.watermark import watermark
from backdoor_bench.types import Trigger


@pytest.mark.gpu
@pytest.mark.parametrize(
    "trigger",
    [
        corner_patch(white_cells(3), 32, 32),
        Blend(wrapped_stripes(32, 20, 0.8), 0.2),
        Blend(sine(32, 20, 6), 0.3),
        Sinusoid(40, 6),
        Add(watermark(32, 32), "saturate"),
        AddAndStretch(glow("gtsrb", 32, 32, 51)),
        *(ColourFilter(name) for name in FILTERS),
        Overlay(logo("firefox", 32, 32, scale=True), 0.2),
        InPieces(Blend(watermark(32, 32), 0.15), 16, 8, 0),
    ],
)
def test_same_pixels_on_both_devices(trigger: Trigger) -> None:
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    rows = torch.arange(64)
    stamped = trigger(images.cuda(), rows)
    assert stamped.is_cuda
    assert torch.equal(stamped.cpu(), trigger(images, rows))
