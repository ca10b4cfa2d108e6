"""Jobs of a sweep as processes of their own, so that no crash, hang or kill of one takes the others along.

``Pool`` runs any number of them side by side on this machine; ``Supervisor`` runs one, in the worker that another
launcher of Hydra (joblib, submitit, Ray) gives it. Both write the status files that the sweep's summary is made from.
A child notices the end of its parent by a pipe, whose other end nobody else holds: ``watch_parent``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, Protocol

from backdoor_bench import sweep as sweeps
from backdoor_bench.errors import Interrupted
from backdoor_bench.sweep import Found, Journal, Options, Status, Sweep, SweepJob

if TYPE_CHECKING:
    from omegaconf import DictConfig

PIPE = "BACKDOOR_BENCH_SWEEP"  # environment of a child: "<file descriptor>:<seconds of grace>"
GRACE = 60.0  # seconds a job has to write its checkpoint when it is asked to stop
BEAT = 5.0  # seconds between two signs of life of a running job's status file
_POLL = 0.1
_IN_USE = " is in use by "  # of the message (results.RunFolder) with which a run refuses a folder that another one has
_KNOWN_CODES = range(9)  # those of errors.py; whatever else a process ends with, it did not choose
_TAIL = 20_000  # bytes of a log that are searched for the reason of a failure


# ---------------------------------------------------------------------- in the child


def watch_parent() -> None:
    """End this process, gracefully if it can, when the sweep that started it is gone. Nothing in any other process."""
    value = os.environ.pop(PIPE, None)  # not for children of ours
    if value is None:
        return
    descriptor, grace = value.split(":")
    os.set_inheritable(int(descriptor), False)
    threading.Thread(target=_watch, args=(int(descriptor), float(grace)), name="parent", daemon=True).start()


def _watch(descriptor: int, grace: float) -> None:
    with contextlib.suppress(OSError):
        while os.read(descriptor, 1):  # nobody writes: it returns when the last writer, the sweep, has ended
            pass
    os.kill(os.getpid(), signal.SIGTERM)  # training.interrupt writes a checkpoint
    time.sleep(grace)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(7)


# ---------------------------------------------------------------------- in the parent


class Screen(Protocol):
    """Who is told what happens. started and ended come once an attempt."""

    def started(self, job: SweepJob, attempt: int) -> None: ...
    def ended(self, job: SweepJob, status: Status, again: bool) -> None: ...
    def say(self, message: str) -> None: ...


class Quiet:
    """A Screen that shows nothing."""

    def started(self, job: SweepJob, attempt: int) -> None: ...
    def ended(self, job: SweepJob, status: Status, again: bool) -> None: ...
    def say(self, message: str) -> None: ...


@dataclass
class _Waiting:
    """A job whose turn has not come. not_before: when to look whether another process still holds the run folder, whose
    lock ``held`` is; told: whether that was said."""

    job: SweepJob
    attempt: int = 1
    not_before: float = 0.0
    held: Path | None = None
    told: bool = False


@dataclass
class _Child:
    """A running job. end: when it is killed if it has not stopped by then; beat: when its status file was touched."""

    turn: _Waiting
    process: subprocess.Popen[bytes]
    log: Path
    result: Path | None
    gpu: str | None
    started: float = field(default_factory=time.monotonic)
    end: float | None = None
    timed_out: bool = False
    beat: float = field(default_factory=time.monotonic)


class Pool:
    """``run(jobs)`` runs jobs of a sweep, ``options.jobs`` at a time, until all have ended or it is asked to stop.

    script: what a child runs, with the job's words. look: what is known of a job before it is started, None if nothing
    is to be looked at. gpus: what CUDA_VISIBLE_DEVICES may name, None to leave it alone. grace: seconds between the
    request to stop and SIGKILL. signals: whether SIGINT and SIGTERM stop it; else they are left as they are. states:
    filled with the status of each job.
    """

    def __init__(
        self,
        sweep: Sweep,
        script: Path,
        options: Options,
        *,
        look: Callable[[SweepJob], Found] | None,
        explain: Callable[[Exception, SweepJob], str] = lambda error, job: str(error),
        screen: Screen | None = None,
        gpus: Sequence[str] | None = None,
        grace: float = GRACE,
        trace: bool = False,
        signals: bool = True,
        states: Journal | None = None,
    ) -> None:
        self.sweep = sweep
        self.options = options
        self._script = script
        self._look = look
        self._explain = explain
        self._screen = screen or Quiet()
        self._gpus = gpus
        self._grace = grace
        self._trace = trace
        self._handles_signals = signals and threading.current_thread() is threading.main_thread()
        self._waiting: list[_Waiting] = []
        self._running: list[_Child] = []
        self._requests: list[int] = []  # signals
        self._ending = False  # by an exception
        self._states = Journal() if states is None else states

    def run(self, jobs: Sequence[SweepJob]) -> None:
        """Raises Interrupted when a signal asked to stop; jobs that ran then have stopped, their status says so."""
        self._waiting = [_Waiting(job) for job in jobs]
        self._pipe = os.pipe()
        try:
            with self._signals():
                try:
                    while self._running or (self._waiting and not self._requests):
                        self._reap()
                        if not self._requests and len(self._running) < self.options.jobs and self._start_next():
                            continue
                        time.sleep(_POLL)
                finally:
                    self._end_all()
        finally:
            for descriptor in self._pipe:
                os.close(descriptor)
        if self._requests:
            name = signal.Signals(self._requests[0]).name
            raise Interrupted(f"stopped by {name}; run the same command again to go on")

    # ------------------------------------------------------------------ starting

    def _start_next(self) -> bool:
        """Take up one waiting job; False if there is none whose time has come."""
        now = time.monotonic()
        ready = [turn for turn in self._waiting if turn.not_before <= now]
        if not ready:
            return False
        # Jobs of one victim share its training and more (an isolation): side by side they would wait for each other.
        busy = {child.turn.job.victim for child in self._running}
        turn = next((turn for turn in ready if turn.job.victim not in busy), ready[0])
        self._waiting.remove(turn)
        self._take(turn)
        return True

    def _take(self, turn: _Waiting) -> None:
        job = turn.job
        if turn.held is not None and is_held(turn.held):
            self._put_off(turn, turn.held.parent)
            return
        found = self._look(job) if self._look is not None else Found(None, None)
        if found.error is not None:
            code = getattr(found.error, "exit_code", 2 if found.composed is False else 1)
            why = self._explain(found.error, job)
            self._finish(job, Status(sweeps.FAILED, job.words, exit_code=code, reason=why, attempts=turn.attempt - 1))
            return
        if found.result is not None:
            self._finish(job, Status(sweeps.BEFORE, job.words, exit_code=0, result=str(found.result)))
            return
        if found.plan is not None and is_held(found.plan.run_dir / ".lock"):
            self._put_off(turn, found.plan.run_dir)
            return
        self._spawn(turn, found.plan.run_dir / "result.json" if found.plan is not None else None)

    def _put_off(self, turn: _Waiting, run_dir: Path) -> None:
        """To the end of the line, for as long as another process has the run folder: a sweep of which this job is a part,
        too, or a job that a killed sweep left behind, which ends within its grace."""
        if not turn.told:
            turn.told = True
            self._screen.say(f"another process still has {run_dir}; waiting for it")
        turn.held = run_dir / ".lock"
        turn.not_before = time.monotonic() + 1
        self._waiting.append(turn)
        with contextlib.suppress(OSError):
            os.utime(self.sweep.status_file(turn.job))

    def _spawn(self, turn: _Waiting, result: Path | None) -> None:
        if self._requests:
            return  # asked to stop while it was looked at
        job = turn.job
        log = self.sweep.log_file(job)
        gpu = self._free_gpu()
        words = [*sweeps.composed_words(job.words, self.sweep.name), *(["--traceback"] if self._trace else [])]
        environment = {**os.environ, PIPE: f"{self._pipe[0]}:{self._grace}"}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        if self.options.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", "1")
        status = Status(sweeps.RUNNING, job.words, attempts=turn.attempt, log=str(log))
        try:
            self._states.note(self.sweep, job, status, self._screen.say)
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                _head(file, words, turn.attempt)
                process = subprocess.Popen(
                    [sys.executable, str(self._script), *words],
                    stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                    env=environment, pass_fds=(self._pipe[0],), start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            why = f"could not be started: {error}"
            self._settle(turn, replace(status, state=sweeps.FAILED, exit_code=6, reason=why))
            return
        self._running.append(_Child(turn, process, log, result, gpu))
        self._screen.started(job, turn.attempt)

    def _free_gpu(self) -> str | None:
        """The GPU with the fewest jobs; "" hides all, None leaves the choice to the job."""
        if not self._gpus:
            return None if self._gpus is None else ""
        used = [child.gpu for child in self._running]
        return min(self._gpus, key=used.count)

    # ------------------------------------------------------------------ ending

    def _reap(self) -> None:
        now = time.monotonic()
        for child in list(self._running):
            code = child.process.poll()
            if code is not None:
                self._running.remove(child)
                self._ended(child, code)
            elif child.end is not None and now > child.end:
                _kill_group(child.process)
            elif child.end is None and self._requests:  # the signal came while it was being started
                self._ask(child)
            elif child.end is None and self.options.time_limit and now - child.started > self.options.time_limit * 60:
                child.timed_out = True
                self._ask(child)
            elif now - child.beat > BEAT:
                child.beat = now
                with contextlib.suppress(OSError):
                    os.utime(self.sweep.status_file(child.turn.job))

    def _ended(self, child: _Child, code: int) -> None:
        turn, job = child.turn, child.turn.job
        status = Status(
            sweeps.DONE, job.words, exit_code=code, seconds=time.monotonic() - child.started, attempts=turn.attempt,
            log=str(child.log), result=str(child.result or _last(child.log, "result: ") or "") or None,
        )  # fmt: skip
        done = code == 0 and status.result is not None and Path(status.result).is_file()
        in_use = "" if done or code != 2 else _last(child.log, "error: ") or ""
        if _IN_USE in in_use:  # somebody was quicker
            status = replace(status, state=sweeps.RUNNING, reason=in_use, result=None, exit_code=None, seconds=None)
            self._finish(job, status, again=True)
            self._put_off(turn, Path(in_use.partition(_IN_USE)[0]))
            return
        if not done and (self._requests or self._ending) and not child.timed_out:
            status = replace(status, state=sweeps.STOPPED, result=None)
        elif not done:
            state, why = _judge(code, child.log)
            if child.timed_out:
                limit = f"took longer than sweep.time_limit={self.options.time_limit:g} minutes"
                state, why = sweeps.TIMED_OUT, f"{limit}; raise it, or go on from the checkpoint by the same command"
            status = replace(status, state=state, reason=why, result=None)
        if code not in _KNOWN_CODES or child.timed_out:
            _kill_group(child.process)  # whatever it had started itself
        self._settle(turn, status)

    def _settle(self, turn: _Waiting, status: Status) -> None:
        """The end of an attempt, or of the job."""
        # Another try cannot make a wrong configuration right.
        again = status.state in sweeps.BAD and turn.attempt <= self.options.retry and status.exit_code != 2
        again = again and not self._requests and not self._ending
        self._finish(turn.job, status, again)
        if again:
            self._waiting.append(_Waiting(turn.job, turn.attempt + 1))

    def _finish(self, job: SweepJob, status: Status, again: bool = False) -> None:
        self._states.note(self.sweep, job, status, self._screen.say)
        self._screen.ended(job, status, again)

    # ------------------------------------------------------------------ stopping

    def _ask(self, child: _Child) -> None:
        child.end = time.monotonic() + self._grace
        child.process.terminate()

    def _end_all(self) -> None:
        """Ask what still runs to stop: only after an exception, as Ctrl-C is in a worker of another launcher."""
        self._ending = True
        try:
            for child in self._running:
                if child.end is None:
                    self._ask(child)
            while self._running:
                self._reap()
                time.sleep(_POLL)
        finally:  # another exception
            for child in self._running:
                _kill_group(child.process)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask all jobs to stop; a second SIGINT kills them."""
        if not self._handles_signals:
            yield
            return

        def handler(number: int, _frame: FrameType | None) -> None:
            if self._requests and number == signal.SIGINT:
                for child in self._running:
                    _kill_group(child.process)
            elif not self._requests:
                for child in self._running:
                    if child.end is None:
                        self._ask(child)
            self._requests.append(number)

        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)


def _head(file: IO[bytes], words: Sequence[str], attempt: int) -> None:
    stamp = datetime.now().astimezone().isoformat(timespec="seconds")
    file.write(f"--- {stamp} attempt {attempt}: run.py {' '.join(words)}\n".encode())
    file.flush()


def is_held(lock: Path) -> bool:
    """Whether another process holds a run folder's lock."""
    from filelock import FileLock, Timeout

    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a child, which leads its own group, and for all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _judge(code: int, log: Path) -> tuple[str, str]:
    """(state, reason) of a process that ended with ``code`` and without a result."""
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            hint = " (the system does so when memory runs out)" if -code == signal.SIGKILL else ""
            return sweeps.KILLED, f"its process was ended by {name}{hint}"
        return sweeps.KILLED, f"its process was ended by signal {-code}"
    if code == 7:
        return sweeps.KILLED, "its process was asked to stop by someone else"
    if code not in _KNOWN_CODES:
        return sweeps.KILLED, f"its process ended with exit code {code} and without a word"
    if code == 0:
        return sweeps.FAILED, "its process ended without a result"
    return sweeps.FAILED, _last(log, "error: ") or _last(log, "") or f"exit code {code}"


def _last(log: Path, start: str) -> str | None:
    """The rest of the log's last line that begins with ``start``, of its latest attempt; None if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        if line.startswith("--- "):
            return None
        if line.startswith(start) and line.strip():
            return line.removeprefix(start).strip()
    return None


def visible_gpus(options: Options) -> list[str] | None:
    """What jobs may see, one name a GPU; None where there is nothing to share out. Raises ConfigError for a number that
    is not there."""
    from backdoor_bench.errors import ConfigError

    if options.gpus is None and options.jobs == 1:
        return None
    import torch

    count = torch.cuda.device_count()  # heeds the variable, and where in it the first wrong name stands
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(count)]
    if given is not None:
        names = [name.strip() for name in given.split(",")][:count]
    if options.gpus is None:
        return names if len(names) > 1 else None
    absent = [number for number in options.gpus if number >= len(names)]
    if absent:
        raise ConfigError(
            f"sweep.gpus={list(options.gpus)} is not allowed: there is no GPU {absent[0]}, {len(names)} can be seen"
        )
    return [names[number] for number in options.gpus]


# ---------------------------------------------------------------------- in a worker of another launcher


@dataclass(frozen=True)
class Supervisor:
    """What joblib, submitit or Ray call for one job; picklable. folder: the sweep's, absolute."""

    folder: Path
    script: Path
    options: Options
    trace: bool

    def __call__(self, config: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig

        words = tuple(word for word in HydraConfig.get().overrides.task if not word.startswith("sweep."))
        sweep = Sweep(str(config.sweep.name), self.folder, ())
        # Its launcher has plans of its own for signals; when it ends this process, the job notices.
        pool = Pool(sweep, self.script, replace(self.options, jobs=1), look=None, trace=self.trace, signals=False)
        pool.run([SweepJob(words)])


def wait_for_workers(
    sweep: Sweep, jobs: Sequence[SweepJob], quiet: float, say: Callable[[str], None]
) -> Mapping[str, Any]:
    """What became of each job by its id, once all have ended or given no sign of life for ``quiet`` seconds.

    For launchers that give up at the first lost worker while others still work.
    """
    beats: dict[str, float] = {}
    last = time.monotonic()
    told = False
    while True:
        states = {job.id: sweeps.status(sweep, job) for job in jobs}
        open_jobs = [job for job in jobs if not sweeps.is_final(states[job.id])]
        for job in open_jobs:
            with contextlib.suppress(OSError):
                beat = sweep.status_file(job).stat().st_mtime
                if beats.get(job.id) != beat:
                    beats[job.id] = beat
                    last = time.monotonic()
        if not open_jobs or time.monotonic() - last > quiet:
            return states
        if not told:
            told = True
            say(f"waiting for {len(open_jobs)} jobs that may still run")
        time.sleep(0.5)
