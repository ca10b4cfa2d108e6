"""Semi-transparent stamps, and blends that show through at random places."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from backdoor_bench.triggers.patch import Patch
from backdoor_bench.triggers.pixels import to_uint8
from backdoor_bench.triggers.rows import uniform_of_rows
from backdoor_bench.types import Trigger


@dataclass(frozen=True, eq=False)
class Overlay:
    """Stamps ``patches`` (later ones over earlier ones), then mixes with what was below: x + alpha (t - x) where there
    is a patch, clipped and truncated. alpha: 0..1, 1 is opaque. uint8 ``[B, 3, H, W]`` in and out.

    Source: Qi et al. 2023 (vtu81/backdoor-toolbox).
    """

    patches: tuple[Patch, ...]
    alpha: float

    def __call__(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        stamped = images
        for patch in self.patches:
            stamped = patch(stamped)
        if self.alpha == 1:
            return stamped
        below = images.double()
        return to_uint8(below + self.alpha * (stamped.double() - below))


@dataclass(frozen=True, eq=False)
class InPieces:
    """Applies ``trigger`` to some of the pieces of each image only, and leaves the others as they are.

    The image is cut into ``pieces`` (a square number) of equal size; ``off`` of them, another choice for each row,
    stay. The choice follows from seed and row number, so ``index`` is required. Source: Qi et al. 2023.
    Where the size is no multiple of the pieces along a side, some pieces are a pixel larger.
    """

    trigger: Trigger
    pieces: int
    off: int
    seed: int

    def __call__(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        assert index is not None, "the choice of pieces follows from the row numbers"
        side = math.isqrt(self.pieces)
        # The pieces with the smallest of the numbers: a draw without replacement.
        order = uniform_of_rows(self.seed, "pieces", index, self.pieces).argsort(dim=1)
        shown = torch.ones(len(index), self.pieces, dtype=torch.bool, device=index.device)
        shown = shown.scatter(1, order[:, : self.off], False).view(-1, side, side)
        row, column = (torch.arange(length, device=index.device) * side // length for length in images.shape[-2:])
        mask = shown[:, row][:, :, column].unsqueeze(1).to(images.device)
        return torch.where(mask, self.trigger(images, index), images)
