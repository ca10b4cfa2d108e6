"""Sweeps: which jobs a command line means, where each one's status and log are, what came of them.

A job is a list of overrides, run like a single run. A sweep's folder, ``<output_root>/sweeps/<name>``, holds
``jobs.json`` (what the command line meant), ``logs/<id>.log`` and ``status/<id>.json``, one a job; the summary is made
from the status files alone, so it does not matter who ran the jobs (hydra_plugins/backdoor_bench_launcher).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backdoor_bench import experiments
from backdoor_bench.errors import BenchError, ConfigError, DiskError, check_flag, check_range

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from backdoor_bench.plan import Plan

# Where results go and who watches: nothing that makes a job another one.
_ELSEWHERE = ("output_root", "cache_root", "tracking", "resume", "sweep", "hydra")
_NAME = re.compile(r"[A-Za-z0-9_+=,@-][A-Za-z0-9_.+=,@-]{0,99}")
_SLUG_LENGTH = 60

RUNNING, DONE, BEFORE, MISSING, STOPPED = "running", "done", "done before", "missing", "stopped"
FAILED, KILLED, TIMED_OUT = "failed", "killed", "timed out"
BAD = (FAILED, KILLED, TIMED_OUT)


# ---------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class SweepJob:
    """words: the overrides of its command line, ``sweep.name`` aside; missing: groups it names that have no file."""

    words: tuple[str, ...]
    missing: tuple[str, ...] = ()

    @property
    def own(self) -> tuple[str, ...]:
        """The words that say what is computed, sorted."""
        return tuple(sorted(word for word in self.words if not _elsewhere(word)))

    @property
    def id(self) -> str:
        """The name of its files: what can be read of it in 60 characters, and ten digits of its hash."""
        from backdoor_bench.storage import digest

        groups = dict(word.partition("=")[::2] for word in self.words)
        names = [groups[name] for name in experiments.COORDINATES if name in groups]
        slug = re.sub(r"[^A-Za-z0-9_.-]", "_", "-".join(names))[:_SLUG_LENGTH].strip(".")
        return f"{slug or 'job'}-{digest(list(self.own))[:10]}"

    @property
    def victim(self) -> tuple[str, ...]:
        """Equal for jobs that train the same undefended model: all that is not the defence's."""
        return tuple(word for word in self.own if not re.match(r"[+~]*defense([=./]|$)", word))


@dataclass(frozen=True)
class Sweep:
    """folder: below output_root, see the module."""

    name: str
    folder: Path
    jobs: tuple[SweepJob, ...]

    def labels(self) -> dict[str, str]:
        """By its id, what tells a job from the others: its words without those that all share."""
        count = Counter(word for job in self.jobs for word in job.own)
        common = {word for word, n in count.items() if n == len(self.jobs) > 1}
        return {
            job.id: " ".join(word for word in job.words if word in job.own and word not in common) or "the defaults"
            for job in self.jobs
        }

    def status_file(self, job: SweepJob) -> Path:
        return self.folder / "status" / f"{job.id}.json"

    def log_file(self, job: SweepJob) -> Path:
        return self.folder / "logs" / f"{job.id}.log"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The folder for this process alone: its list and its statuses are those of one running sweep. Raises
        ConfigError while another one has it."""
        from filelock import FileLock, Timeout

        from backdoor_bench.storage import remove_stale_temporaries, write_text

        holder = self.folder / ".holder"
        lock = FileLock(self.folder / ".lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            who = "another process"
            with contextlib.suppress(OSError):
                who = holder.read_text().strip()
            raise ConfigError(
                f"sweep.name={self.name} is not free: {who} runs a sweep in {self.folder}; wait for it, or set "
                "sweep.name=OTHER to run this one beside it"
            ) from None
        except OSError as error:
            raise DiskError(f"cannot write to {self.folder}: {error}; set another output_root") from error
        try:
            for folder in (self.folder, self.folder / "status"):
                remove_stale_temporaries(folder)
            write_text(holder, f"process {os.getpid()} on {socket.gethostname()}")
            yield
        finally:
            lock.release()

    def begin(self, words: Sequence[str]) -> None:
        """Write the list of jobs, forget what an earlier sweep of them left, note the missing ones."""
        from backdoor_bench.storage import write_json

        jobs = [{"id": job.id, "words": job.words, "missing": job.missing} for job in self.jobs]
        write_json(self.folder / "jobs.json", {"schema": 1, "name": self.name, "command": list(words), "jobs": jobs})
        for job in self.jobs:
            self.status_file(job).unlink(missing_ok=True)
            if job.missing:
                Status(MISSING, job.words, reason=f"no file in conf/ for {', '.join(job.missing)}").write(self, job)


def read(file: Path) -> Sweep:
    """The sweep whose ``jobs.json`` this is."""
    value = json.loads(file.read_text(encoding="utf-8"))
    jobs = tuple(SweepJob(tuple(job["words"]), tuple(job["missing"])) for job in value["jobs"])
    return Sweep(value["name"], file.parent, jobs)


@dataclass(frozen=True)
class Options:
    """jobs: side by side. gpus: of those that are visible, None: all. time_limit: minutes a job, 0 for none. retry: how
    often a failed or killed job is started again in the same sweep."""

    jobs: int
    gpus: tuple[int, ...] | None
    time_limit: float
    retry: int
    dry_run: bool

    @classmethod
    def of(cls, config: DictConfig) -> Options:
        """Section ``sweep`` of a composed configuration. Raises ConfigError with key, value and allowed range."""
        from omegaconf import OmegaConf

        section = config.sweep
        check_range("sweep.jobs", section.jobs, 1, 1024, integer=True)
        check_range("sweep.retry", section.retry, 0, 100, integer=True)
        check_range("sweep.time_limit", section.time_limit, 0, float("inf"))
        check_flag("sweep.dry_run", section.dry_run)
        gpus = list(section.gpus) if OmegaConf.is_list(section.gpus) else section.gpus
        if gpus != "auto" and not (isinstance(gpus, list) and all(type(gpu) is int and gpu >= 0 for gpu in gpus)):
            raise ConfigError(f"sweep.gpus={gpus!r} is not allowed: it must be auto or a list of numbers, as in [0,1]")
        if str(config.hydra.launcher._target_).endswith(".BasicLauncher"):
            for key in ("time_limit", "retry"):
                if section[key]:
                    raise ConfigError(
                        f"sweep.{key}={section[key]} is not allowed with hydra/launcher=basic, which can neither end a job "
                        "nor start it again: leave it out, or leave out hydra/launcher"
                    )
        numbers = tuple(gpus) if isinstance(gpus, list) else None
        return cls(section.jobs, numbers, float(section.time_limit), section.retry, section.dry_run)


def expand(conf: Path, words: Sequence[str], many: bool = False) -> tuple[Sweep, Options]:
    """The sweep that a command line means, each job once, and how it is to be run.

    words: the overrides, ``experiment=ID`` among them or values to be multiplied out. Raises ConfigError for what is
    wrong with all jobs (unknown names, an empty sweep, more than launch.MAX_JOBS without ``many``) and for whatever
    composing the first one brings up; what is wrong with single jobs is found when their turn comes.
    """
    from backdoor_bench import launch

    axes = launch.alternatives(words, conf)
    ids = [word.partition("=")[2] for axis in axes for word in axis if _key(word) == "experiment"]
    own = [axis for axis in axes if not _is_of_sweep(axis[0])]
    outer = [axis[0] for axis in axes if _is_of_sweep(axis[0])]
    # Jobs that differ in nothing else would be one job, with one status and one log.
    several = [axis for axis in axes if _elsewhere(axis[0]) and len(axis) > 1]
    if several:
        raise ConfigError(f"{_key(several[0][0])} belongs to the whole sweep and takes one value")
    launch.check_count([axis for axis in own if not ids or not _narrows(axis)], many)
    jobs = _of_experiments(conf, ids, own) if ids else [SweepJob(words) for words in _product(own)]
    launch.check_count([jobs], many)
    first = next((job for job in jobs if not job.missing), None)
    plain = [axis[0] for axis in own if not _narrows(axis)]
    config = launch.check_command(conf, [*(plain if first is None else first.words), *outer])
    if not ids:
        _check_names(conf, own, outer)
    options = Options.of(config)
    name = _name(config.sweep.name, ids, words)
    if options.jobs > 1 and not any(_key(axis[0]) == "hardware.threads" for axis in own):
        jobs = [replace(job, words=(*job.words, "hardware.threads=1")) for job in jobs]
    root = Path(str(config.output_root)).expanduser()
    return Sweep(name, root / "sweeps" / name, tuple(jobs)), options


def outer_words(words: Sequence[str]) -> list[str]:
    """What of a command line belongs to the sweep, not to its jobs: settings of Hydra and of the sweep itself."""
    return [word for word in words if _is_of_sweep(word)]


def _is_of_sweep(word: str) -> bool:
    first = _key(word).replace("/", ".").split(".")[0]
    return first in ("hydra", "sweep") and _key(word) != "hydra.searchpath"  # without which a job cannot be composed


def _narrows(axis: Sequence[str]) -> bool:
    """Whether a word chooses among an experiment's jobs instead of changing them."""
    return _key(axis[0]) in (*experiments.COORDINATES, "experiment")


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _elsewhere(word: str) -> bool:
    return _key(word).replace("/", ".").split(".")[0] in _ELSEWHERE


def _product(axes: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Every combination, each once; of words with one key the last counts."""
    return list(dict.fromkeys(_merged((), words) for words in itertools.product(*axes)))


def _merged(words: Sequence[str], later: Sequence[str]) -> tuple[str, ...]:
    """Words of which the later replace the earlier with the same key."""
    found: dict[str, str] = {}
    for word in (*words, *later):
        key = word.partition("=")[0]
        found.pop(key, None)
        found[key] = word
    return tuple(found.values())


def _of_experiments(conf: Path, ids: Sequence[str], axes: Sequence[Sequence[str]]) -> list[SweepJob]:
    """The jobs of experiments, narrowed by the groups on the command line, its other words multiplied in."""
    chosen = {
        _key(axis[0]): [word.partition("=")[2] for word in axis]
        for axis in axes
        if axis[0].partition("=")[0] in experiments.COORDINATES
    }
    rest = [axis for axis in axes if not _narrows(axis)]
    found: dict[tuple[str, ...], SweepJob] = {}
    for name in ids:
        experiment = experiments.load(conf, name)
        for words in _product(rest):
            budget = next((word.partition("=")[2] for word in words if _key(word) == "budget"), None)
            fixed = experiments.budget_groups(conf, budget)
            for job in experiments.jobs(conf, experiment, chosen, fixed=fixed):
                # Hydra has no word for "none of this group".
                merged = tuple(
                    word for word in _merged(job.overrides, words) if word not in ("paper=null", "budget=null")
                )
                missing = tuple(word for word in job.missing if word in merged)
                found.setdefault(tuple(sorted(merged)), SweepJob(merged, missing))
    return list(found.values())


def _check_names(conf: Path, axes: Sequence[Sequence[str]], outer: Sequence[str]) -> None:
    """Compose once for every swept name of a group that is no file of ours: an unknown one stops the whole sweep."""
    from backdoor_bench import launch

    first = [axis[0] for axis in axes]
    for place, axis in enumerate(axes):
        group = _key(axis[0]).replace(".", "/")
        if not (conf / group).is_dir():
            continue
        for word in axis[1:]:
            if not (conf / group / f"{word.partition('=')[2]}.yaml").is_file():
                launch.check_command(conf, [*first[:place], word, *first[place + 1 :], *outer])


def _name(given: Any, ids: Sequence[str], words: Sequence[str]) -> str:
    """The sweep's name: given, or the experiment's id, or a hash of what is computed."""
    import hashlib

    if given is not None:
        if not _NAME.fullmatch(str(given)):
            raise ConfigError(
                f"sweep.name={given!r} is not allowed: it must be 1 to 100 letters, digits or _.+=,@- that do not "
                "begin with a dot"
            )
        return str(given)
    if len(set(ids)) == 1:
        return ids[0]
    text = " ".join(sorted(word for word in words if not _is_of_sweep(word)))
    return f"sweep-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


# ---------------------------------------------------------------------- one job looked at, not run


@dataclass(frozen=True)
class Found:
    """plan: None where ``error`` says why; result: of a finished run of this very configuration; composed: whether the
    error, if any, came later than composing (it may then be one of this machine's, not of the job)."""

    plan: Plan | None
    result: Path | None
    error: Exception | None = None
    composed: bool = True


def look(conf: Path, words: Sequence[str], sweep: str, config: DictConfig | None = None) -> Found:
    """A job composed (unless ``config`` is what composing gave), checked and prepared, with what is there of its result."""
    from backdoor_bench import composing, launch
    from backdoor_bench.results import RunFolder

    composed = False
    try:
        if config is None:
            config = composing.compose(conf, composed_words(words, sweep))
        launch.refuse_foreign_targets(config)
        composed = True
        plan = launch.prepared(config, list(config.hydra.overrides.task), sweep, dict(config.hydra.runtime.choices))
        if not plan.redo and RunFolder(plan.run_dir, plan.config).finished() is not None:
            return Found(plan, plan.run_dir / "result.json")
        return Found(plan, None)
    except Exception as error:
        return Found(None, None, error, composed)


def composed_words(words: Sequence[str], sweep: str) -> list[str]:
    """What is composed for a job of the sweep of that name."""
    from backdoor_bench.launch import quoted

    return [*words, f"sweep.name={quoted(sweep)}"]


def reason(error: Exception, conf: Path, words: Sequence[str]) -> str:
    """One line for an error of a job; the kind is named where it is none of ours."""
    from backdoor_bench import composing, launch

    if isinstance(error, BenchError):
        return str(error)
    with composing.apart():
        told = launch.explain(error, conf, list(words))
    return told if told is not None else f"{type(error).__name__}: {' '.join(str(error).split())}"


# ---------------------------------------------------------------------- status


@dataclass(frozen=True)
class Status:
    """What came of a job. exit_code: of its process, negative for a signal; seconds: of its last attempt; attempts: how
    often it was started in this sweep; result: path of its result.json; log: of its own log; reason: one line."""

    state: str
    words: tuple[str, ...]
    exit_code: int | None = None
    reason: str = ""
    result: str | None = None
    seconds: float | None = None
    attempts: int = 0
    log: str | None = None

    def write(self, sweep: Sweep, job: SweepJob) -> None:
        from backdoor_bench.storage import write_json

        record = {"schema": 1, "id": job.id, **asdict(self), "host": socket.gethostname(), "pid": os.getpid()}
        write_json(sweep.status_file(job), {**record, "time": time.time()})


class Journal(dict[str, Status]):
    """By its id, a job's latest status, for the process that runs the sweep: what cannot be written is not lost."""

    told = False

    def note(self, sweep: Sweep, job: SweepJob, status: Status, say: Callable[[str], None]) -> None:
        """Keep it and write it; a full disk ends no other job, and is said once."""
        self[job.id] = status
        try:
            status.write(sweep, job)
        except DiskError as error:
            if not self.told:
                self.told = True
                say(f"warning: {error}")


def status(sweep: Sweep, job: SweepJob) -> Status | None:
    """The job's status as last written; None where there is none (it was not started), or a torn one."""
    try:
        value = json.loads(sweep.status_file(job).read_text(encoding="utf-8"))
        return Status(**{name: value[name] for name in Status.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_final(state: Status | None) -> bool:
    return state is not None and state.state not in (RUNNING, STOPPED)


# ---------------------------------------------------------------------- summary


@dataclass(frozen=True)
class Summary:
    """The state of every job, in order."""

    sweep: Sweep
    states: tuple[Status | None, ...]

    @classmethod
    def of(cls, sweep: Sweep, known: Mapping[str, Status] | None = None) -> Summary:
        """known: statuses by id that are newer than what is written."""
        known = known or {}
        return cls(sweep, tuple(known.get(job.id) or status(sweep, job) for job in sweep.jobs))

    def count(self, *names: str) -> int:
        return sum(state is not None and state.state in names for state in self.states)

    @property
    def unfinished(self) -> int:
        """Jobs that were not started, or stopped on the way."""
        return sum(not is_final(state) for state in self.states)

    def text(self, seconds: float) -> str:
        """Counts, and the methods that are not there yet."""
        from backdoor_bench.progress import duration

        parts = [
            f"{number} {name}"
            for number, name in (
                (self.count(DONE), "done now"),
                (self.count(BEFORE), DONE + " before"),
                *((self.count(name), name) for name in BAD),
                (self.unfinished, "not finished"),
                (self.count(MISSING), MISSING),
            )
            if number
        ]
        lines = [f"sweep {self.sweep.name}: {len(self.states)} jobs in {duration(seconds)}: {', '.join(parts)}"]
        methods = Counter(word for job in self.sweep.jobs for word in job.missing)
        if methods:
            named = ", ".join(f"{word} ({number} job{'s' * (number > 1)})" for word, number in methods.most_common())
            lines.append(f"  missing, no file in conf/: {named}")
        return "\n".join(lines)

    def failures(self, stopped: bool = False) -> str:
        """What failed and why, for SweepFailed; empty if nothing did. stopped: jobs that were not finished are no failures:
        the sweep was asked to stop."""
        labels = self.sweep.labels()
        lines, bad = [], 0
        for job, state in zip(self.sweep.jobs, self.states, strict=True):
            if state is not None and state.state in BAD:
                bad += 1
                what = state.reason if state.state == FAILED else f"{state.state}: {state.reason}"
            elif is_final(state) or stopped:
                continue
            else:
                what = "not finished: " + ("it was not started" if state is None else "its end is not known")
            log = f" (log: {state.log})" if state is not None and state.log else ""
            lines.append(f"  {labels[job.id]}\n    {what}{log}")
        if not lines:
            return ""
        total, unfinished = len(self.states) - self.count(MISSING), self.unfinished
        parts = [f"{bad} of {total} jobs failed"] if bad else []
        if unfinished:
            parts.append(
                f"{unfinished} were not finished" if bad else f"{unfinished} of {total} jobs were not finished"
            )
        if bad + unfinished < total:
            parts.append("the others finished")
        return ", ".join(parts) + ":\n" + "\n".join(lines)
