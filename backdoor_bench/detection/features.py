"""Penultimate features of a whole image set: what TRAP, spectral signatures, activation clustering and others look at."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from backdoor_bench.models.classifier import Classifier
from backdoor_bench.types import ImageSet


@torch.no_grad()
def extract_features(
    model: Classifier,
    image_set: ImageSet,
    device: torch.device,
    batch_size: int = 1024,
    amp: torch.dtype | None = None,
) -> Tensor:
    """The features float32 [N, d] on the CPU, row i of image i.

    Eval mode and no augmentation, so that a sample's features depend on nothing but the sample (specs/seed_defenses.md
    1.3); the mode the model was found in, module by module, is restored. amp: the type to compute in under autocast
    (``torch.bfloat16``), None = what is in force around the call.
    """
    modes = [(module, module.training) for module in model.modules()]
    precision = contextlib.nullcontext() if amp is None else torch.autocast(device.type, dtype=amp)
    model.eval()
    parts = []
    try:
        with precision:
            for start in range(0, len(image_set), batch_size):
                images = image_set.images[start : start + batch_size].to(device, non_blocking=True)
                # Kept on the device: waiting for a copy after each batch would leave a GPU idle.
                parts.append(model.features(images.float() / 255).float())
    finally:
        for module, mode in modes:
            module.training = mode
    return torch.cat(parts).cpu() if parts else torch.empty(0, model.feature_dim)
