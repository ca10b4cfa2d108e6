"""A model over a whole image set without gradient: the one way to do it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from backdoor_bench.training.hardware import Hardware
from backdoor_bench.training.precision import full_float32
from backdoor_bench.types import Images

# On a CPU small batches stay in the cache (half the time of 1,024 for small_cnn), a GPU wants large ones.
BATCH_CPU, BATCH_GPU = 128, 1024


@torch.no_grad()
def forward_all(
    model: nn.Module,
    images: Images,
    hardware: Hardware,
    compute: Callable[[Tensor], Tensor] | None = None,
    batch_size: int | None = None,
    *,
    exact: bool = False,
) -> Tensor:
    """``compute(batch)`` of every image, concatenated on the CPU in the order given.

    images: uint8 [N, 3, H, W]; no augmentation. compute: maps a float batch in [0, 1] on the device to a tensor with
    one row an image; default the model itself. exact: compute in full float32 whatever the run's precision, for scores
    that rank samples. The model is in eval mode meanwhile; the mode it was found in, module by
    module (a frozen part may differ), is restored.
    """
    modes = [(module, module.training) for module in model.modules()]
    compute = compute or model
    batch_size = batch_size or (BATCH_CPU if hardware.device == "cpu" else BATCH_GPU)
    model.eval()
    parts = []
    try:
        # An empty set goes through as one empty batch, which gives the result its width.
        for start in range(0, max(1, len(images)), batch_size):
            with full_float32(hardware.device) if exact else hardware.autocast():
                # Kept on the device: waiting for a copy after each batch would leave a GPU idle.
                parts.append(compute(hardware.images(images[start : start + batch_size])))
    finally:
        for module, mode in modes:
            module.training = mode
    return torch.cat(parts).cpu()


def predict(model: nn.Module, images: Images, hardware: Hardware) -> Tensor:
    """The predicted class of every image, int64 [N] on the CPU (TRAP's dummy class is class C)."""
    return forward_all(model, images, hardware, lambda batch: model(batch).argmax(1))
