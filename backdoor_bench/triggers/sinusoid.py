"""The additive sinusoid of SIG."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from backdoor_bench.triggers.blend import sine
from backdoor_bench.triggers.pixels import to_uint8


@dataclass(frozen=True)
class Sinusoid:
    """Adds delta sin(2 pi freq j / W) to column j of uint8 ``[B, 3, H, W]``, in float64, clipped, then truncated.

    The same in all rows and channels, ``freq`` periods over the width at every size. Source: Barni et al. 2019 in the
    form of SCLBD/Effective_backdoor_defense.
    """

    delta: float
    freq: float

    def __call__(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        wave = sine(images.shape[-1], self.delta, self.freq).to(images.device)
        return to_uint8(images.double().add_(wave))
