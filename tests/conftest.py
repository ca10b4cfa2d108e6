"""Shared by all tests: small sets, a view built from plain parts, the command line in this process."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import run as run_module
from backdoor_bench.cache import Stages
from backdoor_bench.data.augment import Augmentation
from backdoor_bench.models.small_cnn import SmallCNN
from backdoor_bench.progress import QuietProgress
from backdoor_bench.training.config import TrainConfig
from backdoor_bench.training.hardware import Hardware
from backdoor_bench.types import ImageSet

CONF = Path(run_module.__file__).resolve().parent / "conf"
# A whole run in seconds: 4 classes of 16-pixel images, the smallest network.
TOY = ("dataset=toy", "model=tiny", "hardware=cpu", "hardware.threads=1", "tracking=disabled")
# A map without t-SNE, after the first two epochs.
TOY_TRAP = (
    "defense.isolation.reducer=pca", "defense.isolation.detect_epochs=2", "defense.isolation.first_detection_step=0",
)  # fmt: skip


def pytest_configure() -> None:
    torch.set_num_threads(1)


class Rows:
    """cache.RowSink and types.Probe that keep the rows."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.listener: Any = None

    def __call__(self, model: Any = None, flagged: Any = None, *, stage: str, epoch: int, detail: Any = None) -> None:
        self.record({"stage": stage, "epoch": epoch})

    def record(self, row: Any) -> None:
        self.rows.append(row)
        if self.listener is not None:
            self.listener(row)

    def listen(self, listener: Any) -> None:
        self.listener = listener


@pytest.fixture
def progress() -> QuietProgress:
    return QuietProgress()


@pytest.fixture
def hardware() -> Hardware:
    return Hardware("cpu", "fp32", True, False, 1, False, 4.0)


@pytest.fixture
def recipe(hardware: Hardware) -> TrainConfig:
    """Three epochs of SGD in batches of 32, no augmentation."""
    return TrainConfig(
        epochs=3, batch_size=32, drop_last=False, optimizer="sgd", lr=0.05, momentum=0.9,
        betas=(0.9, 0.999), weight_decay=5e-4, nesterov=False, schedule="cosine",
        schedule_unit="step", milestones=(), gamma=0.1, warmup_epochs=0.0,
        label_smoothing=0.0, augment=Augmentation(0, False, 0.0, 0), snapshots=2, checkpoint_seconds=0.0,
        hardware=hardware,
    )  # fmt: skip


@pytest.fixture
def blobs() -> ImageSet:
    """128 images of 4 classes, 16 px: each class a brightness of its own channel mix, plus noise."""
    stream = torch.Generator().manual_seed(0)
    labels = torch.arange(128) % 4
    colours = torch.tensor([[200, 40, 40], [40, 200, 40], [40, 40, 200], [180, 180, 40]])
    noise = torch.randint(-30, 31, (128, 3, 16, 16), generator=stream)
    images = (colours[labels][:, :, None, None] + noise).clamp(0, 255).to(torch.uint8)
    return ImageSet(images, labels, 4)


@pytest.fixture
def new_model() -> Callable[[int], Any]:
    def build(num_classes: int) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return SmallCNN(widths=[8, 16], normalise="none").build(num_classes, 16, (0.0,) * 3, (1.0,) * 3)

    return build


@pytest.fixture
def rows() -> Rows:
    return Rows()


@pytest.fixture
def stages(tmp_path: Path, progress: QuietProgress, rows: Rows) -> Stages:
    return Stages(tmp_path / "cache", "scope", progress, {}, rows)


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def path(self) -> Path:
        """What the last line names."""
        last = self.out.strip().splitlines()[-1]
        assert last.startswith("result: "), self.out + self.err
        return Path(last.removeprefix("result: "))

    @property
    def result(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.path.read_text())
        return loaded


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Outcome]:
    """``bench("attack=sig", ...)`` runs the command line in this process with outputs under tmp_path."""

    def call(*args: str, toy: bool = True) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        trap = not any(word.startswith(("defense=", "defense/isolation=", "defense.isolation=")) for word in args)
        trap |= "defense=trap" in args
        argv = [*(TOY if toy else ()), *(TOY_TRAP if toy and trap else ()), f"output_root={tmp_path}/outputs", *args]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_module.main(argv)
        return Outcome(code, out.getvalue(), err.getvalue())

    return call


def other_in_everything(recipe, **but):
    """A recipe that shares no value with ``recipe`` but the hardware; ``but``: values to have instead."""
    values = dict(
        epochs=9, batch_size=7, drop_last=True, optimizer="adam", lr=0.7, momentum=0.3, betas=(0.5, 0.6),
        weight_decay=0.02, nesterov=True, schedule="multistep", schedule_unit="epoch_from_1", milestones=(1, 2),
        gamma=0.3, warmup_epochs=2.0, warmup_from=0.4, lr_min=0.6, label_smoothing=0.1,
        augment=Augmentation(4, True, 0.0, 2), snapshots=1,
    )  # fmt: skip
    return replace(recipe, **(values | but))
