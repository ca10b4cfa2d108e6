"""An attack from its YAML with changed keys, and a view without run.py behind it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from backdoor_bench.types import Attack, ImageSet

CONF = Path(__file__).parents[2] / "conf" / "attack"


@pytest.fixture
def make_attack() -> Callable[..., Attack]:
    def make(id_: str, **changes: Any) -> Attack:
        node = yaml.safe_load((CONF / f"{id_}.yaml").read_text())
        module, name = node["_target_"].rsplit(".", 1)
        keys = {key: value for key, value in node.items() if not key.startswith("_")} | {"seed": 0} | changes
        built: Attack = getattr(importlib.import_module(module), name)(**keys)
        return built

    return make


@pytest.fixture
def make_view() -> Callable[..., Any]:
    """A view over ``labels`` (default: 200 of each of 10 classes, mixed) and random images of ``size`` pixels."""

    def make(
        labels: Tensor | None = None, *, images: Any = None, size: int = 32, seed: int = 0, classes: int = 10
    ) -> Any:
        if labels is None:
            labels = torch.arange(2000) % classes
        if images is None:
            pixels = torch.Generator().manual_seed(1)
            images = torch.randint(0, 256, (len(labels), 3, size, size), generator=pixels, dtype=torch.uint8)
        warnings: list[str] = []
        return SimpleNamespace(
            train=ImageSet(images, labels, classes),
            num_classes=classes,
            generator=torch.Generator().manual_seed(seed),
            stages=SimpleNamespace(tensors=lambda name, build: build()),
            progress=SimpleNamespace(warn=warnings.append),
            warnings=warnings,
        )

    return make
