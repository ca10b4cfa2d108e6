"""MeCa's score Q: how much a prediction changes when a random patch is taken over by a small step along the gradient.

Poisoned samples hardly react, clean ones do (MeCa 4.2.1, Eq. 3; readings: specs/seed_defenses.md 4.3). Computed in full
precision, without TF32: bf16 and TF32 have too few digits for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.inference import BATCH_CPU
from backdoor_bench.training.hardware import Hardware
from backdoor_bench.training.interrupt import raise_if_requested
from backdoor_bench.training.precision import full_float32
from backdoor_bench.triggers.rows import uniform_of_rows
from backdoor_bench.types import ImageSet

BATCH = 256  # the gradient keeps every map of a batch, in float32: inference takes more at a time


@dataclass(frozen=True)
class KLScore:
    """eps: bound of a pixel's step, in [0, 1]. patch: side of the square as a share of the image's (r). perturb: replace
    (the patch becomes the step, as printed) | add. gradient: input (of the CE at x) | patch (of the CE at x-hat with
    respect to its patch, where the step is zero). kl_direction: forward, KL(p(x) || p(x-hat)) | reverse."""

    eps: float
    patch: float
    perturb: str
    gradient: str
    kl_direction: str

    def of_batch(self, model: nn.Module, images: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Q float32 [B], large = sensitive = probably clean.

        images: float [B, 3, H, W] in [0, 1]; labels: int64 [B]; mask: bool [B, 1, H, W], the patch. The model must be in
        eval mode: then a sample's score depends on nothing but the sample. The step is clip(g / ||g||, -eps, eps), g the
        gradient of the sample's own CE and ||g|| its norm over all pixels and channels (MeCa Eq. 3).
        """
        zero = torch.zeros_like(images)
        at = self.perturbed(images, mask, zero) if self.gradient == "patch" else images
        at = at.detach().requires_grad_()
        logits = model(at)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), at)
        if self.gradient == "patch":
            gradient = gradient * mask
        norm = torch.linalg.vector_norm(gradient, dim=(1, 2, 3), keepdim=True) + 1e-12
        step = (gradient / norm).clamp(-self.eps, self.eps)
        with torch.no_grad():
            logits = model(images) if self.gradient == "patch" else logits.detach()
            before = logits.double().log_softmax(1)
            after = model(self.perturbed(images, mask, step)).double().log_softmax(1)
            one, other = (before, after) if self.kl_direction == "forward" else (after, before)
            return F.kl_div(other, one, reduction="none", log_target=True).sum(1).float()

    def perturbed(self, images: Tensor, mask: Tensor, step: Tensor) -> Tensor:
        """x-hat float [B, 3, H, W] in [0, 1]: ``images`` with ``step`` in place of, or added to, the masked pixels."""
        rest = images * ~mask if self.perturb == "replace" else images
        return (rest + mask * step).clamp(0, 1)

    def of_set(self, model: nn.Module, data: ImageSet, hardware: Hardware, seed: int, purpose: str) -> Tensor:
        """Q float32 [N] on the CPU of all images; seed, purpose: what the places of the patches follow from."""
        device = torch.device(hardware.device)
        size = BATCH_CPU if hardware.device == "cpu" else BATCH
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        parts = []
        try:
            for start in range(0, len(data), size):
                raise_if_requested()
                images = hardware.images(data.images[start : start + size])
                index = torch.arange(start, start + len(images))
                mask = square_masks(index, images.shape[2], images.shape[3], self.patch, seed, purpose).to(device)
                labels = data.labels[start : start + size].to(device)
                with full_float32(device):
                    parts.append(self.of_batch(model, images, labels, mask))
        finally:
            for module, mode in modes:
                module.training = mode
        return torch.cat(parts).cpu()


def square_masks(index: Tensor, height: int, width: int, share: float, seed: int, purpose: str) -> Tensor:
    """bool [B, 1, H, W] on the CPU: one square a row, wholly inside, its place uniform.

    index: int64 [B], row numbers; a row's place follows from (seed, purpose, row) alone. share: side / height, rounded
    to a pixel at least.
    """
    side = max(1, round(share * height))
    place = uniform_of_rows(seed, purpose, index, 2)
    top, left = (place * torch.tensor([height - side + 1, width - side + 1])).long().unbind(1)
    rows = torch.arange(height) - top[:, None]
    columns = torch.arange(width) - left[:, None]
    inside = [(offset >= 0) & (offset < side) for offset in (rows, columns)]
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


def largest(scores: Tensor, count: int, stream: torch.Generator) -> Tensor:
    """bool [N], True for the ``count`` largest of ``scores`` float [N]; equal scores are drawn at random."""
    mixed = torch.randperm(len(scores), generator=stream)
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[mixed[scores[mixed].argsort(descending=True, stable=True)[:count]]] = True
    return chosen
