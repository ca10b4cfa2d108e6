"""Weights & Biases as a mirror of the run folder. The only module that imports wandb.

All calls of wandb happen in one daemon thread that takes them from a queue: a run never waits for W&B before its end,
and there at most ``finish_timeout`` seconds. Whatever W&B does wrong ends in one warning and a run without it.
"""

from __future__ import annotations

import csv
import os
import re
import secrets
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from backdoor_bench.errors import ConfigError, DiskError, check_choice, check_range
from backdoor_bench.storage import write_text

_NAME_LENGTH = 128  # W&B refuses longer run names
_TAG_LENGTH = 64  # and longer tags
_TEARDOWN_SECONDS = 0.5
_ID = re.compile(r"[a-z0-9]{8,64}")


@dataclass(frozen=True)
class TrackingConfig:
    """Where the mirror goes: ``offline`` (files to be synced later), ``online`` or ``disabled``.

    project, entity, group: W&B's own terms, entity and group may be None. init_timeout, finish_timeout: seconds.
    """

    mode: str
    project: str
    entity: str | None
    group: str | None
    init_timeout: float
    finish_timeout: float

    def __post_init__(self) -> None:
        check_choice("tracking.mode", self.mode, ("offline", "online", "disabled"))
        check_range("tracking.init_timeout", self.init_timeout, 0, 3600, low_open=True)
        check_range("tracking.finish_timeout", self.finish_timeout, 0, 86_400, low_open=True)
        if not isinstance(self.project, str) or not re.fullmatch(r"[\w .-]{1,128}", self.project):
            raise ConfigError(
                f"tracking.project={self.project!r} is not allowed: it must be 1 to 128 letters, digits, "
                "spaces, dots, dashes or underscores"
            )


class Tracker:
    """One W&B run, or nothing when tracking is disabled or has failed. No method raises for what W&B does."""

    def __init__(self, open_run: Callable[[], Any] | None, finish_timeout: float, warn: Callable[[str], None]) -> None:
        self._open_run = open_run
        self._finish_timeout = finish_timeout
        self._warn = warn
        self._given_up = False
        self._jobs: SimpleQueue[Callable[[Any], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        if open_run is not None:
            self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
            self._thread.start()

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Mirror the numbers of a metrics row, named ``<stage>/<column>`` where the row has a ``stage``; ``step`` is
        their x value and may go back (a resumed run logs an epoch again)."""
        prefix = f"{row['stage']}/" if "stage" in row else ""
        numbers = {f"{prefix}{key}": value for key, value in row.items() if isinstance(value, (int, float))}
        if numbers:
            self._put(lambda run: run.log({**numbers, "step": step}))

    def image(self, name: str, path: Path) -> None:
        """Mirror a picture file."""

        def job(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(str(path))})

        self._put(job)

    def table(self, name: str, path_to_csv: Path, max_rows: int) -> None:
        """Mirror the first ``max_rows`` rows of a CSV file with a header."""

        def job(run: Any) -> None:
            import wandb

            with path_to_csv.open(newline="", encoding="utf-8") as file:
                rows = csv.reader(file)
                header: list[Any] = next(rows)
                data: list[Any] = [row for row, _ in zip(rows, range(max_rows), strict=False)]
            run.log({name: wandb.Table(columns=header, data=data)})

        self._put(job)

    def artifact(self, name: str, kind: str, paths: Sequence[Path]) -> None:
        """Mirror files and folders as a new version of the artefact ``name``; ``kind`` is W&B's type of it. They are not
        copied: offline they have to stay as they are until they are sent."""

        def job(run: Any) -> None:
            import wandb

            made = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "-", name)[:_NAME_LENGTH], type=kind)
            for path in paths:
                if path.is_dir():
                    made.add_dir(str(path), name=path.name, policy="immutable")
                else:
                    made.add_file(str(path), policy="immutable")
            run.log_artifact(made)

        self._put(job)

    def finish(self, summary: Mapping[str, Any], *, failed: bool = False) -> None:
        """Mirror the final values and close the run; returns after ``finish_timeout`` seconds at the latest. A second
        call does nothing."""
        if self._thread is None:
            return
        values = dict(summary)

        def job(run: Any) -> None:
            run.summary.update(values)
            run.finish(exit_code=int(failed))

        self._put(job)
        self._jobs.put(None)
        thread, self._thread = self._thread, None
        thread.join(self._finish_timeout)
        if thread.is_alive():
            self._given_up = True
            self._warn(
                f"W&B was not done after tracking.finish_timeout={self._finish_timeout:g} s and is left alone; "
                "this run's results are complete, its copy at W&B may not be (wandb sync can send it later)"
            )
            _leave_service()

    def _put(self, job: Callable[[Any], None]) -> None:
        if self._thread is not None:
            self._jobs.put(job)

    def _work(self) -> None:
        assert self._open_run is not None
        run = self._open_run()
        while (job := self._jobs.get()) is not None:
            if run is None:
                continue
            try:
                job(run)
            except Exception as error:
                if not self._given_up:
                    self._warn(f"W&B failed ({_reason(error)}); the run goes on without it")
                run = None


def load(conf: Path, mode: str, group: str | None) -> TrackingConfig:
    """The settings of conf/tracking/``mode``.yaml, for what is tracked outside of a run."""
    import yaml

    values = yaml.safe_load((conf / "tracking" / f"{mode}.yaml").read_text(encoding="utf-8"))
    return TrackingConfig(**{key: value for key, value in values.items() if not key.startswith("_")} | {"group": group})


def start(
    config: TrackingConfig,
    run_dir: Path,
    run_config: dict[str, Any],
    run_name: str,
    tags: Sequence[str],
    warn: Callable[[str], None],
) -> Tracker:
    """A tracker that stores under ``<run_dir>/tracking``; returns at once, W&B starts beside the run.

    run_config: the resolved configuration as plain values. The W&B id is kept in ``tracking/id.txt``, so that a resumed
    run continues the same W&B run. warn: told once when W&B cannot do what ``config.mode`` asks: online falls back to
    offline, a missing wandb or an unwritable folder to disabled.
    """
    if config.mode == "disabled":
        return Tracker(None, config.finish_timeout, warn)
    folder = run_dir / "tracking"
    try:
        run_id = _run_id(folder / "id.txt")
    except (OSError, DiskError) as error:
        warn(f"tracking is off for this run: {error}")
        return Tracker(None, config.finish_timeout, warn)
    arguments = {
        "dir": str(folder),
        "id": run_id,
        "project": config.project,
        "entity": config.entity,
        "group": config.group,
        "name": run_name[:_NAME_LENGTH],
        "tags": list(dict.fromkeys(tag[:_TAG_LENGTH] for tag in tags if tag)),
        "config": run_config,
    }
    return Tracker(lambda: _open(config, arguments, warn), config.finish_timeout, warn)


def _open(config: TrackingConfig, arguments: Mapping[str, Any], warn: Callable[[str], None]) -> Any:
    """The W&B run, or None after a warning. Seconds: 0.7 for the import and 0.5 for the start, offline."""
    # Its telemetry goes out in offline mode too, and where nobody answers the process waits for it at its end.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except Exception as error:  # a broken installation raises more than ImportError
        warn(
            f"tracking={config.mode} needs the package wandb, which cannot be imported ({_reason(error)}); tracking is "
            "off for this run: pip install wandb, or set tracking=disabled"
        )
        return None
    modes: list[Literal["online", "offline"]] = ["online", "offline"] if config.mode == "online" else ["offline"]
    for mode in modes:
        try:
            # A helper process inherited from a parent process may end with it, and cannot be left: use one of our own.
            os.environ.pop("WANDB_SERVICE", None)
            # Login reads the settings of the session, not those of init: silent there keeps it from asking for a key.
            wandb.setup(settings=_settings(wandb, config, mode))
            run = wandb.init(
                **arguments,
                mode=mode,
                resume="allow" if mode == "online" else None,  # offline, the same id is all that sync needs
                reinit="create_new",
                settings=_settings(wandb, config, mode),
            )
            run.define_metric("step", hidden=True)
            run.define_metric("*", step_metric="step")
            return run
        except Exception as error:
            if mode == "online":
                warn(
                    f"W&B cannot be used online ({_reason(error)}); this run is tracked offline: check `wandb login` "
                    "and the network, or send the files later with wandb sync"
                )
                _leave_service()  # it may go on trying to reach W&B, and holds the run's id
            else:
                warn(f"W&B could not start ({_reason(error)}); tracking is off for this run")
    return None


def _settings(wandb: Any, config: TrackingConfig, mode: str) -> Any:
    """No word on the console and nothing gathered but what we log: the run folder has the environment."""
    wanted = {
        "mode": mode,
        "silent": True,
        "quiet": True,
        "show_errors": False,
        "show_warnings": False,
        "show_info": False,
        "console": "off",
        "save_code": False,
        "disable_code": True,
        "disable_git": True,
        "disable_job_creation": True,
        "symlink": False,
        "init_timeout": config.init_timeout,
        "login_timeout": config.init_timeout,
        "finish_timeout": config.finish_timeout,
        "x_disable_stats": True,
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
    }
    known = wandb.Settings.model_fields  # differs between releases
    return wandb.Settings(**{name: value for name, value in wanted.items() if name in known})


def _run_id(path: Path) -> str:
    """The id of an earlier start of this run, or a new one, stored."""
    if path.is_file():
        stored = path.read_text(encoding="utf-8", errors="replace").strip()
        if _ID.fullmatch(stored):
            return stored
    run_id = secrets.token_hex(6)
    write_text(path, run_id + "\n")
    return run_id


def _leave_service() -> None:
    """Let wandb's helper process be: the next run starts another one, and our exit does not wait for it.

    wandb.teardown unhooks the process first and then waits for it, possibly for ever, therefore in a thread.
    """
    teardown = getattr(sys.modules.get("wandb"), "teardown", None)  # no import: one that hangs would hold us as well
    if teardown is None:
        return
    thread = threading.Thread(target=teardown, name="tracking-teardown", daemon=True)
    thread.start()
    thread.join(_TEARDOWN_SECONDS)


def _reason(error: Exception) -> str:
    """One line: W&B's messages have several."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
