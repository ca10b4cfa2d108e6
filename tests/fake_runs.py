"""Run folders as run.py leaves them, without a run: result.json, config.yaml and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from backdoor_bench.results import SCHEMA

# A 1 x 1 pixel picture.
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63606060000000040001f61738550000"
    "000049454e44ae426082"
)
STAGES = {"train": 60.0, "embedding": 30.0, "removal": 30.0}  # the first is the attacker's


def fake_run(
    root: Path,
    attack: str = "badnets",
    defense: str = "trap",
    seed: int = 0,
    *,
    dataset: str = "cifar10",
    model: str = "resnet18",
    paper: str | None = "trap",
    budget: str | None = None,
    settings: tuple[str, ...] = (),
    schema: int = SCHEMA,
    undefended: dict[str, Any] | None = None,
    config: bool = True,
    folder: Path | None = None,
    more: dict[str, Any] | None = None,
    **metrics: float | None,
) -> Path:
    """The folder of a finished run whose metrics are the given fractions, others null; more: other parts of its result,
    None for those that older results lack."""
    place = folder or root / dataset / model / attack / defense / (",".join(settings) or "default") / f"seed{seed}"
    (place / "figures").mkdir(parents=True)
    (place / "figures" / "curves.png").write_bytes(PNG)
    names = {"dataset": dataset, "model": model, "attack": attack, "defense": defense}
    result = {
        "schema": schema, "run_dir": str(place), **names, "paper": paper, "budget": budget, "experiment": None,
        "seed": seed, "variant": "default", "settings": sorted(settings),
        "metrics": {**dict.fromkeys(("acc", "asr", "precision", "recall", "clean_precision")), **metrics},
        "oracle": None, "undefended": undefended,
        "poison": {"n_train": 50_000, "n_poisoned": 4500, "n_cover": 0, "n_flagged": 4500},
        "seconds": {"total": 90.5, **STAGES}, "diagnostics": None, "warnings": [], "status": "done",
        "environment": {
            "python": "3.11", "torch": "2", "device": "cpu", "threads": 1, "precision": "fp32", "embedding": None,
            "git": "abc123",
        },
        "config_hash": f"{abs(hash(str(place))):016x}"[:16], "cell_hash": "c0ffee", "data": None,
        "finished": "2026-01-01T00:00:00.000000+00:00", "defense_seconds": {"embedding": 30.0, "removal": 30.0},
        **(more or {}),
    }  # fmt: skip
    (place / "result.json").write_text(json.dumps(result))
    if config:
        about = {
            "seed": seed, "evaluation": {"floor": "never"}, "dataset": {"name": dataset, "root": None},
            "attack": {"_target_": "backdoor_bench.attacks.x.X", "poison_rate": 0.1},
            "defense": {"isolation": {"_target_": f"backdoor_bench.detection.{defense.partition('<')[0]}.X"}},
            "train": {"epochs": 100}, "names": names,
            "hardware": {"_target_": "backdoor_bench.training.hardware.Hardware", "device": "cpu", "threads": 1},
        }  # fmt: skip
        (place / "config.yaml").write_text(yaml.safe_dump(about, sort_keys=False))
    return place
