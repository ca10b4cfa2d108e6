"""An attack from its YAML with changed keys, and a view without run.py behind it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from backdoor_bench.cache import Stages
from backdoor_bench.models.small_cnn import SmallCNN
from backdoor_bench.progress import QuietProgress
from backdoor_bench.training.config import TrainConfig
from backdoor_bench.types import Attack, AttackerView, ImageSet
from scripts.attack_gallery import build, changed

CONF = Path(__file__).parents[2] / "conf" / "attack"


@pytest.fixture
def make_attack() -> Callable[..., Attack]:
    def make(id_: str, **changes: Any) -> Attack:
        node = yaml.safe_load((CONF / f"{id_}.yaml").read_text())
        if "defaults" in node:  # composed of others, which only Hydra puts together; changes may be dotted keys
            nested: Attack = build(changed(id_, changes))
            return nested
        module, name = node["_target_"].rsplit(".", 1)
        keys = {key: value for key, value in node.items() if not key.startswith("_")} | {"seed": 0} | changes
        built: Attack = getattr(importlib.import_module(module), name)(**keys)
        return built

    return make


@dataclass(frozen=True)
class View(AttackerView):
    """An AttackerView that lets a test see what the attack warned of."""

    warnings: list[str]


@pytest.fixture
def make_view(tmp_path: Path, recipe: TrainConfig, rows: Any) -> Callable[..., View]:
    """A view over ``labels`` (default: 200 of each of 10 classes, mixed) and random images of ``size`` pixels."""

    def make(
        labels: Tensor | None = None, *, images: Any = None, size: int = 32, seed: int = 0, classes: int = 10
    ) -> View:
        if labels is None:
            labels = torch.arange(2000) % classes
        if images is None:
            pixels = torch.Generator().manual_seed(1)
            images = torch.randint(0, 256, (len(labels), 3, size, size), generator=pixels, dtype=torch.uint8)

        def new_model(num_classes: int) -> Any:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return SmallCNN(widths=[8, 16], normalise="none").build(num_classes, size, (0.0,) * 3, (1.0,) * 3)

        warnings: list[str] = []
        progress = QuietProgress()
        progress.warn = warnings.append  # type: ignore[method-assign]
        folder = tmp_path / f"cache{len(list(tmp_path.iterdir()))}"  # nothing is shared between two views
        folder.mkdir()
        return View(
            train=ImageSet(images, labels, classes),
            num_classes=classes,
            new_model=new_model,
            train_config=recipe,
            generator=torch.Generator().manual_seed(seed),
            stages=Stages(folder, "attack", progress, {}, rows),
            learned=Stages(folder, "learned", progress, {}, rows),
            device=torch.device("cpu"),
            progress=progress,
            warnings=warnings,
        )

    return make
