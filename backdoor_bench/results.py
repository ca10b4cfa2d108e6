"""The run folder: where a run's files are, whether it is done, and how they are written.

``result.json`` is written last; its presence with an equal configuration means the run is done (design: schema 1).
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from backdoor_bench.errors import ConfigError, DataError
from backdoor_bench.storage import (
    canonical,
    digest,
    load_bundle,
    remove_stale_temporaries,
    save_state,
    write_json,
    write_text,
)
from backdoor_bench.targets import is_ours

SCHEMA = 1
# What may differ between two runs that compute the same.
NOT_HASHED = (
    *("output_root", "cache_root", "tracking", "resume", "sweep", "hydra", "dataset.cache_dir", "dataset.download"),
    *(
        "dataset.verify",
        "dataset.memory_limit_gib",
        "train.snapshots",
        "train.checkpoint_seconds",
        "hardware.resident_gib",
    ),
)
GROUPS_IN_PATH = ("dataset", "model", "attack", "defense", "hardware", "tracking")
KEYS_NOT_IN_VARIANT = ("seed", "output_root", "cache_root", "hydra", "tracking", "resume", "sweep")
VARIANT_LENGTH = 60


def config_hash(config: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a resolved configuration without what cannot change its result."""
    return digest(hashed_part(config))


def cell_hash(config: Mapping[str, Any]) -> str:
    """Hex SHA-256 of what the runs of one cell have in common: not the seeds, the hardware, the place of the data, nor how
    it is evaluated."""
    part = {k: v for k, v in hashed_part(config).items() if k not in ("seed", "hardware", "evaluation")}
    dataset = {key: value for key, value in part["dataset"].items() if key != "root"}
    return digest({**part, "dataset": dataset, "attack": _without_seeds(part["attack"])})


def _without_seeds(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_seeds(inner) for key, inner in value.items() if key != "seed"}
    return [_without_seeds(inner) for inner in value] if isinstance(value, list) else value


def hashed_part(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The configuration without NOT_HASHED."""
    return {
        key: hashed_part(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in config.items()
        if f"{prefix}{key}" not in NOT_HASHED
    }


def decides(override: str) -> bool:
    """Whether a word of the command line decides what is computed, and is no group that a result names by itself (dataset,
    model, attack, defence, paper, budget): those are a result's ``settings``."""
    key = override.split("=", 1)[0].lstrip("+~")
    elsewhere = (*GROUPS_IN_PATH, "paper", "experiment", "budget", "dataset.root")
    first = key.replace("/", ".").split(".")[0]
    return not (key in elsewhere or key in NOT_HASHED or first in (*KEYS_NOT_IN_VARIANT, "hardware", "evaluation"))


def variant_name(overrides: Sequence[str], hash_: str) -> str:
    """The folder name of what was changed: ``key=value`` joined by commas, ``default`` if nothing.

    Cut to 60 characters + 8 hex digits of the hash when longer or when it holds characters unfit for a file name.
    """
    text = ",".join(sorted(overrides)) or "default"
    safe = re.sub(r"[^A-Za-z0-9_.,=+@-]", "_", text)
    if safe != text or len(text) > VARIANT_LENGTH or safe.strip(".") == "":
        return f"{safe[:VARIANT_LENGTH]}-{hash_[:8]}"
    return text


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the values in which two configurations differ (those of NOT_HASHED left out)."""
    names = []
    for key in sorted({*one, *other}):
        if f"{prefix}{key}" in NOT_HASHED:
            continue
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += differing_keys(a, b, f"{prefix}{key}.")
        elif canonical(a) != canonical(b):
            names.append(f"{prefix}{key}")
    return names


class RunFolder:
    """One run's folder, locked while in use: ``with RunFolder(path, config) as folder``.

    Entering raises ConfigError if another process holds it, or if it holds a run of another configuration.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        self.config = config
        self.hash = config_hash(config)

    def __enter__(self) -> RunFolder:
        from filelock import FileLock, Timeout

        from backdoor_bench.errors import DiskError

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / ".lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            holder = self._read(self.path / ".holder") or "another process"
            raise ConfigError(f"{self.path} is in use by {holder}; wait for it or set another output_root") from None
        except OSError as error:
            raise DiskError(f"cannot write to {self.path}: {error}; set another output_root") from error
        try:
            remove_stale_temporaries(self.path)
            write_text(self.path / ".holder", f"process {os.getpid()} on {socket.gethostname()}")
            self._refuse_other_config()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        (self.path / ".holder").unlink(missing_ok=True)
        self._lock.release()

    @staticmethod
    def _read(path: Path) -> str:
        try:
            return path.read_text().strip()
        except OSError:
            return ""

    def _refuse_other_config(self) -> None:
        import yaml

        file = self.path / "config.yaml"
        if not file.exists():
            return
        try:
            stored = yaml.safe_load(file.read_text())
        except (OSError, yaml.YAMLError):
            stored = None
        if not isinstance(stored, dict):
            raise DataError(f"{file} cannot be read; remove the folder or set another output_root")
        keys = differing_keys(stored, self.config)
        if keys:
            raise ConfigError(
                f"{self.path} holds a run of another configuration (differs in {', '.join(keys)}); set another "
                "output_root or remove the folder"
            )

    def finished(self) -> dict[str, Any] | None:
        """The result of a finished run of this configuration, or None. A torn file counts as none."""
        try:
            result = json.loads((self.path / "result.json").read_text())
        except (OSError, ValueError):
            return None
        if isinstance(result, dict) and isinstance(result.get("schema"), int) and result["schema"] > SCHEMA:
            raise DataError(
                f"{self.path / 'result.json'} has schema {result['schema']}, this version reads {SCHEMA}; update the "
                "package or set another output_root"
            )
        return result if isinstance(result, dict) and result.get("config_hash") == self.hash else None

    def begin(self) -> None:
        """Write the resolved configuration and forget an unfinished or repeated run's result."""
        import yaml

        (self.path / "result.json").unlink(missing_ok=True)
        write_text(self.path / "config.yaml", yaml.safe_dump(dict(self.config), sort_keys=False, allow_unicode=True))

    def write_result(self, result: Mapping[str, Any]) -> Path:
        path = self.path / "result.json"
        write_json(path, {"schema": SCHEMA, **result, "config_hash": self.hash})
        return path


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """A CSV of ``rows``, written atomically; None is an empty cell, text that a spreadsheet would run is disarmed."""
    from backdoor_bench.reporting.summary import csv_safe

    names = list(columns) if columns is not None else list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([csv_safe("" if row.get(name) is None else row[name]) for name in names])
    write_text(path, text.getvalue())


def flagged_rows(
    labels: Tensor,
    class_names: Sequence[str],
    file_names: Sequence[str] | None,
    flagged: Tensor,
    score: Tensor | None,
    is_poisoned: Tensor | None,
) -> list[dict[str, Any]]:
    """One row a training sample, most suspicious first: index, file, label, class, score, flagged, poisoned."""
    suspicion = score if score is not None else flagged.float()
    by_score = torch.argsort(suspicion, descending=True, stable=True)
    order = by_score[torch.argsort(flagged[by_score].int(), descending=True, stable=True)].tolist()
    flags, values, numbers = flagged.tolist(), suspicion.tolist(), labels.tolist()
    truth = is_poisoned.tolist() if is_poisoned is not None else None
    return [
        {
            "index": row,
            "file": file_names[row] if file_names is not None else None,
            "label": numbers[row],
            "class": class_names[numbers[row]],
            "score": round(values[row], 6),
            "flagged": int(flags[row]),
            "poisoned": int(truth[row]) if truth is not None else None,
        }
        for row in order
    ]


def save_model(folder: Path, model: nn.Module, meta: Mapping[str, Any]) -> None:
    """``model.safetensors`` and ``model.json`` (checksum, what the outputs mean)."""
    save_state(folder / "model", model.state_dict(), meta)


def load_model(run_dir: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a finished run, in eval mode on the CPU, and what its outputs mean.

    run_dir: the folder that holds result.json. The model maps float [B, 3, H, W] in [0, 1] to logits; meta has
    ``class_names``, ``image_size`` and ``num_outputs`` (one more than classes when the last is TRAP's dummy class: a
    prediction of it means that the input looks triggered). Raises DataError if a file is missing or altered.
    """
    import importlib

    import yaml

    folder = Path(run_dir)
    bundle = load_bundle(folder / "model")
    try:
        spec = dict(yaml.safe_load((folder / "config.yaml").read_text())["model"])
        target, _ = str(spec.pop("_target_")), spec.pop("_convert_", None)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / 'config.yaml'} is missing or damaged: {error}") from error
    if not is_ours(target, "backdoor_bench.models"):
        raise DataError(f"{folder / 'config.yaml'} names a foreign model class {target}")
    module, name = target.rsplit(".", 1)
    meta = bundle.meta
    build = getattr(importlib.import_module(module), name)(**spec).build
    tensors = bundle.tensors
    model = build(len(tensors["head.bias"]), meta["image_size"], tuple(meta["mean"]), tuple(meta["std"]))
    model.load_state_dict(tensors)
    return model.eval(), meta


def environment(hardware: Mapping[str, Any], embedding: str | None) -> dict[str, Any]:
    """Versions, device and commit a result came from."""
    root = Path(__file__).resolve().parent.parent
    commit = None
    if (root / ".git").exists():
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        commit = done.stdout.strip() or None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **hardware,
        "embedding": embedding,
        "git": commit,
    }
