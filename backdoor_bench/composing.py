"""Many command lines composed: each file of the configuration is read once, long lists are shared out to the cores."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

FEW = 12  # command lines that are composed before a second process has started


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Room to compose in a process in which Hydra is running."""
    from hydra.core.global_hydra import GlobalHydra

    place = GlobalHydra.instance()
    running = place.hydra
    place.clear()
    try:
        yield
    finally:
        place.hydra = running


def compose(conf: Path, words: Sequence[str]) -> DictConfig:
    """One command line, composed as Hydra does it. Hydra's errors pass through."""
    with apart(), _Composer(conf) as composer:
        return composer(words)


def compose_all(conf: Path, lines: Sequence[Sequence[str]]) -> Iterator[DictConfig | None]:
    """Each command line's configuration, in order; None for one that cannot be composed (``compose`` says why).

    The work on a long list starts at once, in other processes.
    """
    if len(lines) <= FEW:
        return _here(conf, lines)
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    if os.name == "posix":
        multiprocessing.set_forkserver_preload(["hydra", "hydra.compose"])  # once, not in every process
    workers = min(os.cpu_count() or 1, len(lines) // FEW + 1)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (conf,))
    return _elsewhere(conf, lines, pool, pool.map(_in_worker, lines, chunksize=4))


def _here(conf: Path, lines: Sequence[Sequence[str]]) -> Iterator[DictConfig | None]:
    for words in lines:
        try:
            config = compose(conf, words)
        except Exception:
            yield None
        else:
            yield config


def _elsewhere(
    conf: Path, lines: Sequence[Sequence[str]], pool: Executor, made: Iterator[DictConfig | None]
) -> Iterator[DictConfig | None]:
    done = 0
    try:
        for config in made:
            yield config
            done += 1
    except BrokenProcessPool:  # its processes were killed, or cannot be started here
        yield from _here(conf, lines[done:])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _Composer:
    """words -> configuration, in a ``with`` statement. Not while Hydra runs in this process (``apart``)."""

    def __init__(self, conf: Path) -> None:
        self._conf = conf

    def __enter__(self) -> _Composer:
        from hydra import initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra

        self._hydra = initialize_config_dir(str(self._conf), version_base="1.3")
        self._hydra.__enter__()
        loader: Any = GlobalHydra.instance().config_loader()
        loader.repository = _remembering(loader.repository)
        return self

    def __exit__(self, *details: Any) -> None:
        self._hydra.__exit__(*details)

    def __call__(self, words: Sequence[str]) -> DictConfig:
        from hydra import compose

        return compose("config", list(words), return_hydra_config=True)


def _remembering(repository: Any) -> Any:
    """Hydra's store of configuration files, which reads them again for each composing: half of the time is YAML."""
    import copy

    from hydra._internal.config_repository import CachingConfigRepository

    class Remembering(CachingConfigRepository):
        def load_config(self, config_path: str) -> Any:
            return copy.deepcopy(super().load_config(config_path))  # composing merges into what it is given

        def __deepcopy__(self, memo: Any) -> Remembering:  # made for every composing, to be thrown away
            return self

    return Remembering(repository)


_worker: _Composer


def _start_worker(conf: Path) -> None:
    global _worker
    _worker = _Composer(conf).__enter__()


def _in_worker(words: Sequence[str]) -> DictConfig | None:
    try:
        return _worker(words)
    except Exception:
        return None
