"""The stage cache: long steps are made once, kept by content, and found again by any run that needs them.

An entry's name is the hash of everything it depends on. Entries are written atomically with checksums (storage.py); a
damaged one is reported and made again. A lock an entry lets two runs side by side share one piece of work.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from backdoor_bench.errors import DiskError
from backdoor_bench.storage import (
    Bundle,
    Checkpoints,
    Damaged,
    digest,
    load_bundle,
    remove_stale_temporaries,
    save_bundle,
    save_state,
    write_json,
)
from backdoor_bench.types import Progress

# Raise when the meaning of stored entries changes (formula, layout), so that old ones are not mistaken for new.
CACHE_VERSION = 3
WAITING = "waiting"  # seconds spent on other runs' work
PICTURES = "figures"  # the stage of what is made for a picture alone


class RowSink(Protocol):
    """Where curves go (evaluate.Recorder); a stage keeps the rows recorded during it beside its result."""

    def record(self, row: Mapping[str, Any]) -> None: ...
    def listen(self, listener: Callable[[Mapping[str, Any]], None] | None) -> None: ...


class Stages:
    """The cached steps of one scope (a poisoned set, or a victim of it).

    ``scope`` is any plain value that says what every step here depends on; it is hashed and not kept, and the folder
    is private, so that a method cannot read from its store what it was not given.
    """

    def __init__(
        self,
        root: Path,
        scope: Any,
        progress: Progress,
        seconds: dict[str, float],
        rows: RowSink,
        *,
        checkpoint_seconds: float = 0.0,
        restart: bool = False,
    ) -> None:
        self._root = root
        self._scope = digest([CACHE_VERSION, scope])
        self._progress = progress
        self._seconds = seconds
        self._rows = rows
        self._checkpoint_seconds = checkpoint_seconds
        self._restart = restart

    # ------------------------------------------------------------------ what methods call

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to the run's ``seconds[name]``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def keep(
        self,
        name: str,
        build: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]],
        settings: Any = None,
    ) -> Bundle:
        """What ``build`` returns (tensors, plain values), made once for this scope, name and ``settings``.

        name: also the key under which its seconds are booked; a cached step books what it took when it was made. A
        value ``seconds_by_stage`` (dict) among the plain values books its seconds under several names instead; a true
        ``transient`` keeps nothing (a result of second choice, which the next run should try to better).
        """
        entry = self._entry(name, settings)
        with self._locked(entry, name):
            bundle = self._load(entry / "bundle")
            if bundle is None:
                start = time.perf_counter()
                tensors, meta = build()
                value = dict(meta)
                took = value.pop("seconds_by_stage", None) or {name: time.perf_counter() - start}
                if value.pop("transient", False):
                    bundle = Bundle(dict(tensors), {"value": value, "seconds": took})
                    self._book(bundle)
                    return Bundle(bundle.tensors, value)
                save_bundle(entry / "bundle", tensors, {"value": value, "seconds": took})
                bundle = load_bundle(entry / "bundle")
        self._book(bundle)
        return Bundle(bundle.tensors, bundle.meta["value"])

    def tensors(self, name: str, build: Callable[[], Mapping[str, Tensor]], settings: Any = None) -> dict[str, Tensor]:
        """As keep, for steps that make tensors only."""
        return self.keep(name, lambda: (build(), {}), settings).tensors

    def fitted(
        self,
        name: str,
        model: nn.Module,
        train: Callable[[Checkpoints], Any],
        settings: Any,
    ) -> None:
        """Leaves ``model`` as ``train`` leaves it: trained in place (resuming from its checkpoints), or loaded.

        train: called with the checkpoints to hand to ``fit``; it must train exactly this ``model`` object.
        """
        entry = self._entry(name, settings)
        with self._locked(entry, name), self._keeping_rows(entry):
            bundle = self._load(entry / "bundle")
            if bundle is None:
                checkpoints = self._checkpoints(entry)
                train(checkpoints)
                took = {name: checkpoints.seconds()}
                save_state(entry / "bundle", model.state_dict(), {"value": {}, "seconds": took})
                checkpoints.clear()
                bundle = load_bundle(entry / "bundle")
            else:
                model.load_state_dict(bundle.tensors)
        self._book(bundle)

    # ------------------------------------------------------------------ what the victim also needs

    def _entry(self, name: str, settings: Any) -> Path:
        return self._root / f"{name}-{digest([self._scope, name, settings])[:32]}"

    def _checkpoints(self, entry: Path) -> Checkpoints:
        checkpoints = Checkpoints(entry / "checkpoint", entry.name, self._checkpoint_seconds)
        if self._restart:
            checkpoints.clear()
        return checkpoints

    @contextlib.contextmanager
    def _locked(self, entry: Path, name: str) -> Iterator[None]:
        from filelock import FileLock, Timeout

        lock = FileLock(entry / "lock")
        try:
            entry.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:  # an OSError too, so it comes first
            self._progress.say(f"another run is making '{name}' ({entry}); waiting for it")
            self._wait_for(lock)
        except OSError as error:
            raise DiskError(f"cannot write to {entry}: {error}; set another output_root or cache_root") from error
        try:
            remove_stale_temporaries(entry)
            yield
        finally:
            lock.release()

    def _wait_for(self, lock: Any) -> None:
        """Takes the lock when its holder has ended, hears a request to stop, books the seconds as ``waiting``."""
        from filelock import Timeout

        from backdoor_bench.training.interrupt import raise_if_requested

        with self.timed(WAITING):
            while True:
                raise_if_requested()
                with contextlib.suppress(Timeout):
                    lock.acquire(timeout=0.5)
                    return

    def _load(self, path: Path) -> Bundle | None:
        if not path.with_suffix(".json").exists():
            return None
        try:
            return load_bundle(path)
        except Damaged as error:
            self._progress.warn(f"a cached step is damaged and is made again: {error}")
            return None

    def _book(self, bundle: Bundle) -> None:
        for name, seconds in bundle.meta["seconds"].items():
            self._seconds[name] = self._seconds.get(name, 0.0) + float(seconds)

    @contextlib.contextmanager
    def _keeping_rows(self, entry: Path) -> Iterator[None]:
        """Rows recorded inside are kept in the entry and come back when the entry is found (or resumed) later."""
        file = entry / "rows.json"
        kept: dict[tuple[str, int], Mapping[str, Any]] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            for row in json.loads(file.read_text()):
                kept[(row["stage"], row["epoch"])] = row
        for row in kept.values():
            self._rows.record(row)

        def listener(row: Mapping[str, Any]) -> None:
            kept[(row["stage"], row["epoch"])] = row
            write_json(file, list(kept.values()))

        self._rows.listen(listener)
        try:
            yield
        finally:
            self._rows.listen(None)
