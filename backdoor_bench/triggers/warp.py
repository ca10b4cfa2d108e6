"""Warps (WaNet): every pixel is fetched from a place a fraction of a pixel away.

A grid, float64 ``[H, W, 2]``, says for each output pixel where it comes from: (x, y), that is (column, row), with -1
and 1 at the centres of the outermost pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoor_bench.triggers.chunks import CHUNK_VALUES
from backdoor_bench.triggers.pixels import to_uint8
from backdoor_bench.triggers.rows import uniform_of_rows

ROUNDING = 1e-6  # far above the error of float64, so that a flat area keeps its value when it is truncated


@dataclass(frozen=True, eq=False)
class Warp:
    """Warps uint8 ``[B, 3, H, W]`` by one grid ``[H, W, 2]``: bilinear, truncated to uint8.

    The shift depends on the pixel only, so the change depends on the image. Source: Nguyen and Tran 2021,
    VinAIResearch/Warping-based_Backdoor_Attack-release.
    """

    grid: Tensor

    def __call__(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        return _in_chunks(images, lambda some: self.grid)


@dataclass(frozen=True, eq=False)
class NoiseWarp:
    """Warps as ``Warp`` does, but by ``noisy(grid)`` with noise that belongs to the row: it follows from seed and row
    number. ``index`` is required. WaNet's noise mode, which teaches a model that other warps mean nothing."""

    grid: Tensor
    seed: int

    def __call__(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        assert index is not None, "the noise of a warp follows from the row numbers"

        def grids(some: Tensor) -> Tensor:
            uniform = uniform_of_rows(self.seed, "noise warp", index[some.to(index.device)], self.grid.numel())
            return noisy(self.grid, uniform.view(len(some), *self.grid.shape).to(self.grid.device))

        return _in_chunks(images, grids)


def field(k: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """float64 ``[H, W, 2]``: a smooth random field, the same number of pixels at every size.

    ``k`` x ``k`` uniform vectors of mean magnitude 1 per axis, enlarged by bicubic interpolation. generator: CPU.
    """
    control = 2 * torch.rand(1, 2, k, k, generator=generator, dtype=torch.float64) - 1
    control /= control.abs().mean()
    return F.interpolate(control, size=(height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)


def warp_grid(field: Tensor, strength: float, rescale: float) -> Tensor:
    """The grid that shifts by ``strength * field / size`` in its own units, times ``rescale``, inside the image."""
    return ((_identity(field) + strength * field / _size(field)) * rescale).clamp(-1, 1)


def noisy(grid: Tensor, uniform: Tensor) -> Tensor:
    """The grid with a random shift of every pixel of up to half a pixel, inside the image.

    uniform: numbers in [0, 1), ``[H, W, 2]`` or ``[B, H, W, 2]``, which is also the shape of the result.
    """
    return (grid + (2 * uniform - 1) / _size(grid)).clamp(-1, 1)


def mean_shift(grid: Tensor) -> float:
    """How far the grid moves a pixel: the mean over pixels and both axes, in pixels."""
    return float(((grid - _identity(grid)) * (_size(grid) - 1) / 2).abs().mean())


def warped(images: Tensor, grids: Tensor) -> Tensor:
    """Float images ``[B, 3, H, W]`` seen through grids ``[H, W, 2]`` or ``[B, H, W, 2]``; same shape, dtype, device."""
    grids = grids.to(images).expand(len(images), *grids.shape[-3:])
    return F.grid_sample(images, grids, mode="bilinear", padding_mode="zeros", align_corners=True)


def _in_chunks(images: Tensor, grids: Callable[[Tensor], Tensor]) -> Tensor:
    """uint8 images warped by ``grids(places)``, some at a time; float64 of all of them would need eight times the room.

    The result is allocated first: pieces that live on between large temporaries would keep the heap from shrinking.
    """
    result = torch.empty_like(images)
    for some in torch.arange(len(images)).split(max(1, CHUNK_VALUES // max(1, images[:1].numel()))):
        result[some] = to_uint8(warped(images[some].double(), grids(some)).add_(ROUNDING))
    return result


def _size(grid: Tensor) -> Tensor:
    """float64 [2]: width and height, in the order of the grid's last axis."""
    return torch.tensor([grid.shape[-2], grid.shape[-3]], dtype=torch.float64, device=grid.device)


def _identity(grid: Tensor) -> Tensor:
    """The grid that moves nothing, of the size of ``grid``."""
    rows, columns = (torch.linspace(-1, 1, length, dtype=torch.float64) for length in grid.shape[-3:-1])
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], dim=-1).to(grid.device)
