"""Float32 that is float32, whatever precision the run trains in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def full_float32(device: torch.device | str) -> Iterator[None]:
    """Neither mixed precision nor TF32 inside; torch's switches are as they were afterwards.

    TF32 has 10 bits of mantissa, bfloat16 has 7: too few to rank samples by. Nothing changes on a CPU in fp32.
    """
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
