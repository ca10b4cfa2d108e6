"""Files that survive a crash: atomic writes, checksums, no pickle.

A *bundle* is ``NAME.safetensors`` (tensors) beside ``NAME.json`` (plain values and the SHA-256 of both). The JSON is
written last, so a bundle without it, or whose checksum differs, counts as not there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backdoor_bench.errors import DataError, DiskError

SCHEMA = 1


class Damaged(DataError):
    """A stored file is missing, torn, or its checksum differs."""


@dataclass(frozen=True)
class Bundle:
    """tensors by name (on the CPU) and plain JSON values."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def canonical(value: Any) -> str:
    """The one JSON text of a plain value: sorted keys, no spaces; floats by repr, tuples as lists."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Tensor):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no canonical JSON form")


def digest(value: Any) -> str:
    """Hex SHA-256 of a plain value's canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part (temporary file, fsync, rename).

    Raises DiskError naming path and size when the disk is full, read-only or otherwise refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True) if temporary.parent.is_dir() else None
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) else str(error)
        raise DiskError(
            f"could not write {len(data)} bytes to {path}: {reason}; free space or set output_root, then run the "
            "same command again to resume"
        ) from error


def write_text(path: Path, text: str) -> None:
    """As write_bytes, UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """As write_bytes, indented JSON that ends with a newline; NaN and infinity, which JSON lacks, become null."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False, default=_plain) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def remove_stale_temporaries(folder: Path) -> None:
    """Delete temporary files that a killed process left in ``folder`` (those of living processes stay)."""
    for file in folder.glob(".*.tmp"):
        owner = file.name.split(".")[-2]
        if not (owner.isdigit() and Path(f"/proc/{owner}").exists()):
            file.unlink(missing_ok=True)


def save_bundle(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Store tensors and plain values as the bundle ``path`` (a path without suffix)."""
    from safetensors.torch import save

    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    record = {"schema": SCHEMA, "sha256": hashlib.sha256(data).hexdigest(), "meta": dict(meta)}
    record["check"] = digest(record)
    # The old JSON must not stand beside new tensors.
    path.with_suffix(".json").unlink(missing_ok=True)
    write_bytes(path.with_suffix(".safetensors"), data)
    write_json(path.with_suffix(".json"), record)


def load_bundle(path: Path) -> Bundle:
    """The bundle stored at ``path``; Damaged (with the reason) if it is absent, torn or altered."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    json_file, data_file = path.with_suffix(".json"), path.with_suffix(".safetensors")
    try:
        record = json.loads(json_file.read_text())
        data = data_file.read_bytes()
    except FileNotFoundError as error:
        raise Damaged(f"{error.filename} is missing") from error
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise Damaged(f"{json_file} is not valid JSON") from error
    if not isinstance(record, dict) or not {"schema", "sha256", "meta", "check"} <= record.keys():
        raise Damaged(f"{json_file} lacks required fields")
    if record["schema"] > SCHEMA:
        raise DataError(
            f"{json_file} was written by a newer version (schema {record['schema']}, this version reads {SCHEMA}); "
            "update the package or use another output_root"
        )
    check = record.pop("check")
    if digest(record) != check:
        raise Damaged(f"{json_file} was altered: its checksum differs")
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise Damaged(f"{data_file} was altered: its SHA-256 differs from the recorded one")
    try:
        return Bundle(load(data), record["meta"])
    except SafetensorError as error:
        raise Damaged(f"{data_file} cannot be read: {error}") from error


def save_state(path: Path, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """A model's ``state_dict`` as a bundle (tensors that share memory are stored once each)."""
    save_bundle(path, {name: tensor.clone() for name, tensor in state.items()}, meta)


class Checkpoints:
    """The last two good checkpoints of one training, newest first.

    folder: where they are kept. key: the hash of what they belong to; a checkpoint with another key is refused.
    """

    def __init__(self, folder: Path, key: str, min_seconds: float = 0.0) -> None:
        self.folder = folder
        self.key = key
        self._min_seconds = min_seconds
        self._start = time.perf_counter()
        self._last = self._start
        self._spent_before = 0.0

    def seconds(self) -> float:
        """Seconds this training has taken, those before the checkpoint it resumed from included."""
        return self._spent_before + time.perf_counter() - self._start

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Time spent inside (evaluation) is no training time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent_before -= time.perf_counter() - start

    def due(self) -> bool:
        """Whether enough time has passed since the last one (large models cost more to save than to train an epoch)."""
        return time.perf_counter() - self._last >= self._min_seconds

    def save(self, epoch: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        record = {**meta, "epoch": epoch, "key": self.key, "seconds": self.seconds()}
        save_bundle(self.folder / f"epoch-{epoch:05d}", tensors, record)
        self._last = time.perf_counter()
        for name in self._names()[2:]:
            for suffix in (".json", ".safetensors"):
                (self.folder / name).with_suffix(suffix).unlink(missing_ok=True)

    def load(self, warn: Any) -> Bundle | None:
        """The newest good one, or None when there never was one. Raises DataError when all are bad."""
        if self.folder.is_dir():
            remove_stale_temporaries(self.folder)
        names = self._names()
        damaged = 0
        for name in names:
            try:
                bundle = load_bundle(self.folder / name)
            except Damaged as error:
                warn(f"checkpoint {self.folder / name} is not usable ({error}); trying the one before it")
                damaged += 1
                continue
            if bundle.meta.get("key") != self.key:
                warn(f"checkpoint {self.folder / name} belongs to another configuration and is not used")
                continue
            self._spent_before = float(bundle.meta.get("seconds", 0.0))
            return bundle
        if damaged > 1:
            # A single bad one is what a kill during the very first save leaves; two or more mean a sick disk.
            raise DataError(
                f"every checkpoint in {self.folder} is damaged; set resume.restart=true to train this stage anew"
            )
        return None

    def clear(self) -> None:
        import shutil

        shutil.rmtree(self.folder, ignore_errors=True)

    def _names(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        stems = {file.stem for file in self.folder.glob("epoch-*") if file.suffix in (".json", ".safetensors")}
        return sorted(stems, reverse=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors (``optim/<parameter>/<name>``) and plain values."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optim/{index}/{name}"] = value
            else:
                plain[f"{index}/{name}"] = value
    return tensors, plain


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Put back what pack_optimizer took."""
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optim/"):
            _, index, name = key.split("/")
            state.setdefault(int(index), {})[name] = tensor
    for key, value in plain.items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
