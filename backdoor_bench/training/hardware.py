"""On what a run computes, and how exactly: device, precision, memory format, threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from backdoor_bench.errors import ConfigError, check_choice, check_flag, check_range


@dataclass(frozen=True)
class Hardware:
    """device: auto|cpu|cuda[:k]. precision: fp32|tf32|bf16, or auto (bf16 on a GPU, fp32 on a CPU).

    threads: CPU threads of torch and of the embedding; fixed because their number changes the last bits of a result.
    resident_gib: data up to this size live on the device as one tensor. deterministic: refuse operations whose result
    depends on scheduling.
    """

    device: str
    precision: str
    channels_last: bool
    compile: bool
    threads: int
    deterministic: bool
    resident_gib: float

    def __post_init__(self) -> None:
        if not (self.device in ("auto", "cpu", "cuda") or self.device.startswith("cuda:")):
            raise ConfigError(f"hardware.device={self.device!r} is not allowed: choose auto, cpu, cuda or cuda:NUMBER")
        check_choice("hardware.precision", self.precision, ("auto", "fp32", "tf32", "bf16"))
        for name in ("channels_last", "compile", "deterministic"):
            check_flag(f"hardware.{name}", getattr(self, name))
        check_range("hardware.threads", self.threads, 1, 1024, integer=True)
        check_range("hardware.resident_gib", self.resident_gib, 0, float("inf"))

    def resolve(self) -> Hardware:
        """The same with ``auto`` replaced by what this machine has. ConfigError if cuda is asked and absent."""
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(
                f"hardware.device={self.device} but no CUDA device is there; set hardware.device=auto or hardware=cpu"
            )
        on_gpu = device.startswith("cuda")
        precision = self.precision if self.precision != "auto" else ("bf16" if on_gpu else "fp32")
        return replace(self, device=device, precision=precision)

    def apply(self) -> None:
        """Set the process-wide switches of torch (threads, TF32, determinism)."""
        torch.set_num_threads(self.threads)
        torch.backends.cuda.matmul.allow_tf32 = self.precision in ("tf32", "bf16")
        torch.backends.cudnn.allow_tf32 = self.precision in ("tf32", "bf16")
        torch.backends.cudnn.benchmark = not self.deterministic
        if self.deterministic != torch.are_deterministic_algorithms_enabled():  # the call alone takes a second
            torch.use_deterministic_algorithms(self.deterministic, warn_only=True)

    def place(self, model: nn.Module) -> nn.Module:
        """The model moved to the device, in the memory format of the run."""
        model.to(self.device)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model  # type: ignore[call-overload]

    def images(self, batch: Tensor) -> Tensor:
        """A stored uint8 batch as the model computes on it: float in [0, 1], on the device, in the memory format."""
        return self.format(batch.to(self.device, non_blocking=True).float().div_(255))

    def format(self, batch: Tensor) -> Tensor:
        """The batch in the memory format of the run."""
        return batch.contiguous(memory_format=torch.channels_last) if self.channels_last else batch

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Mixed precision where ``precision`` is bf16, nothing otherwise."""
        if self.precision == "bf16":
            with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16):
                yield
        else:
            yield

    def describe(self) -> dict[str, Any]:
        """Device name, threads, precision for result.json."""
        name = torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else "cpu"
        return {"device": name, "threads": self.threads, "precision": self.precision}
