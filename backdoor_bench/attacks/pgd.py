"""Projected gradient descent (Madry et al. 2018): images changed a little so that a classifier no longer knows them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.errors import check_choice, check_flag, check_range
from backdoor_bench.triggers.rows import uniform_of_rows

TINY = 1e-12  # a gradient of zero stays zero instead of becoming NaN


@dataclass(frozen=True)
class Pgd:
    """The constants, in grey values 0..255: ``steps`` steps of length ``step`` within ``eps`` of the image.

    norm: ``linf`` (largest change of a value; steps along the sign) or ``l2`` (Euclidean length of the change of the
    whole image; steps along the gradient). random_start: begin anywhere in the cube (linf), or at distance eps (l2).
    """

    norm: str
    eps: float
    step: float
    steps: int
    random_start: bool

    def check(self, prefix: str) -> None:
        """Raise ConfigError if a constant cannot work; ``prefix`` stands before its name in the key."""
        check_choice(f"{prefix}norm", self.norm, ("linf", "l2"))
        # 255 a value is every image there is; in l2 that is 255 times the square root of the number of values.
        check_range(f"{prefix}eps", self.eps, 0, 255 if self.norm == "linf" else float("inf"), low_open=True)
        check_range(f"{prefix}step", self.step, 0, float("inf"), low_open=True, high_open=True)
        check_range(f"{prefix}steps", self.steps, 1, 10_000, integer=True)
        check_flag(f"{prefix}random_start", self.random_start)


def perturb(model: nn.Module, images: Tensor, labels: Tensor, pgd: Pgd, uniform: Tensor | None) -> Tensor:
    """The images moved away from ``labels``, float ``[B, 3, H, W]`` in [0, 1] and within ``pgd.eps`` of the input.

    model: maps such images to logits; it is called in the mode in which it is. images: float ``[B, 3, H, W]`` in
    [0, 1]. labels: int64 ``[B]``. uniform: numbers in [0, 1) of the images' shape for the random start, else None. No
    image depends on the others of its batch as long as the model is in eval mode.
    """
    assert (uniform is not None) == pgd.random_start
    images = images.detach()
    eps, step = pgd.eps / 255, pgd.step / 255
    moved = images
    if uniform is not None:
        offset = 2 * uniform.to(images) - 1
        moved = (images + (offset * eps if pgd.norm == "linf" else _unit(offset) * eps)).clamp(0, 1)
    for _ in range(pgd.steps):
        moved = moved.detach().requires_grad_(True)
        with torch.enable_grad():
            # The sum, so that a gradient does not shrink with the batch.
            loss = F.cross_entropy(model(moved), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, moved)
        direction = gradient.sign() if pgd.norm == "linf" else _unit(gradient)
        moved = _project(images, moved.detach() + step * direction, eps, pgd.norm)
    return moved


def perturb_rows(model: nn.Module, images: Tensor, labels: Tensor, index: Tensor, pgd: Pgd, seed: int) -> Tensor:
    """``perturb`` on stored images: uint8 ``[B, 3, H, W]`` in, a new such tensor out, still within ``pgd.eps``.

    index: int64 ``[B]``, row numbers: they alone, with ``seed``, decide the random start. model, images, labels and
    index are on one device.
    """
    uniform = None
    if pgd.random_start:
        uniform = uniform_of_rows(seed, "pgd start", index, images[0].numel()).view(images.shape)
    moved = perturb(model, images.float() / 255, labels, pgd, uniform)
    return _stored(images, moved.double() * 255 - images, pgd)


def _stored(images: Tensor, change: Tensor, pgd: Pgd) -> Tensor:
    """uint8 images plus the change (in grey values), rounded where that keeps to ``eps``, towards zero elsewhere."""
    rounded = change.round()
    if pgd.norm == "linf":
        too_far = rounded.abs() > pgd.eps
    else:
        too_far = (_length(rounded) > pgd.eps).expand_as(rounded)
    return (images + torch.where(too_far, change.trunc(), rounded)).clamp(0, 255).to(torch.uint8)


def _project(images: Tensor, moved: Tensor, eps: float, norm: str) -> Tensor:
    """The nearest points to ``moved`` within ``eps`` of the images, then within [0, 1] (which only brings it nearer)."""
    change = moved - images
    if norm == "linf":
        change = change.clamp(-eps, eps)
    else:
        change = change * (eps / _length(change).clamp_min(TINY)).clamp_max(1)
    return (images + change).clamp(0, 1)


def _length(change: Tensor) -> Tensor:
    """[B, 1, 1, 1], the Euclidean length of each image of ``change``."""
    return change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _unit(change: Tensor) -> Tensor:
    return change / _length(change).clamp_min(TINY)
