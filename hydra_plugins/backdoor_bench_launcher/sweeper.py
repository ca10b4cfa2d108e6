"""A sweeper that hands a list of jobs, made by backdoor_bench.sweep, to whichever launcher is chosen."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.plugins.sweeper import Sweeper

from backdoor_bench.progress import tell
from hydra_plugins.backdoor_bench_launcher.launcher import ProcessLauncher, config_folder

if TYPE_CHECKING:
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from backdoor_bench.sweep import Sweep, SweepJob

BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
OWN = f"{ProcessLauncher.__module__}.{ProcessLauncher.__name__}"
# Without a sign of life for so long a worker counts as lost, and one that never came as not started.
QUIET = 90.0


class JobSweeper(Sweeper):
    """file: the ``jobs.json`` of the sweep."""

    def __init__(self, file: str | None) -> None:
        self.file = file

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra.core.plugins import Plugins
        from omegaconf import OmegaConf

        from backdoor_bench import sweep as sweeps
        from backdoor_bench.errors import ConfigError
        from backdoor_bench.processes import Supervisor

        if self.file is None:
            raise ConfigError("hydra.sweeper.file has no value: sweeps are started by run.py alone")
        self.config = config
        self.hydra_context = hydra_context
        self.conf = config_folder(config)
        self.options = sweeps.Options.of(config)
        self.kind = str(config.hydra.launcher._target_)
        self.cluster = OmegaConf.select(config, "hydra.launcher.ray.init.address") is not None
        states = getattr(task_function, "states", None)
        self.states = states if isinstance(states, sweeps.Journal) else sweeps.Journal()
        self.jobs_file = Path(self.file)
        if self.kind not in (OWN, BASIC):
            trace = bool(getattr(task_function, "trace", False))
            folder, script = self.jobs_file.parent.absolute(), self.conf.parent / "run.py"
            task_function = Supervisor(folder, script, self.options, trace)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launch the jobs; what came of them is in their status files."""
        from backdoor_bench import sweep as sweeps

        sweep = sweeps.read(self.jobs_file)
        jobs = [job for job in sweep.jobs if not job.missing]
        if self.kind == OWN:  # looks at each job when its turn comes
            self._launch(sweep, jobs)
            return None
        todo = [job for job in jobs if self._is_to_do(sweep, job)]
        if self.kind == BASIC:
            self._launch(sweep, todo)
        elif todo:
            self._hand_over(sweep, todo)
        return None

    def _is_to_do(self, sweep: Sweep, job: SweepJob) -> bool:
        """Whether the launcher is to have it: neither done nor impossible to compose."""
        from backdoor_bench import sweep as sweeps

        found = sweeps.look(self.conf, job.words, sweep.name)
        if found.error is not None and not found.composed:
            why = sweeps.reason(found.error, self.conf, job.words)
            status = sweeps.Status(sweeps.FAILED, job.words, exit_code=2, reason=why)
            self.states.note(sweep, job, status, warn)
            warn(f"error: {' '.join(job.words)}: {why}")
            return False
        if found.result is not None:
            status = sweeps.Status(sweeps.BEFORE, job.words, exit_code=0, result=str(found.result))
            self.states.note(sweep, job, status, warn)
            tell(f"already done, nothing to do (resume.redo=true makes it again): {found.result.parent}")
            tell(f"result: {found.result}")
            return False
        return True

    def _launch(self, sweep: Sweep, jobs: Sequence[SweepJob]) -> None:
        from backdoor_bench import sweep as sweeps

        assert self.launcher is not None
        if jobs:
            lines = [sweeps.composed_words(job.words, sweep.name) for job in jobs]
            self.launcher.launch(lines, initial_job_idx=0)

    def _hand_over(self, sweep: Sweep, jobs: Sequence[SweepJob]) -> None:
        """To a launcher that may give up when a worker is lost: wait for the others, then start anew what never came to
        its end, one by one so that a job that kills its worker takes no other along again. Where jobs may wait in a queue
        that outlives the launcher, nothing is started anew: it could run twice."""
        from backdoor_bench import sweep as sweeps
        from backdoor_bench.errors import ConfigError
        from backdoor_bench.processes import wait_for_workers

        # Workers may stand in another folder and must find this package.
        root = str(self.conf.parent.absolute())
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        name = self.kind.rpartition(".")[2]
        tell(f"{len(jobs)} jobs for {name}, their logs in {sweep.folder / 'logs'}")
        batches: list[Sequence[SweepJob]] = [jobs]
        tried: Counter[str] = Counter()
        while batches:
            batch = batches.pop(0)
            why = "its worker ended without a word"
            for job in batch:  # from here on its worker's word counts, not what was noted of an earlier one
                self.states.pop(job.id, None)
            try:
                self._launch(sweep, [_absolute(job, sweep) for job in batch])
            except Exception as error:
                why = f"{why} ({type(error).__name__})"
                text = " ".join(str(error).split())[:300]
                warn(f"warning: {name} gave up: {type(error).__name__}: {text}")
                if all(sweeps.status(sweep, job) is None for job in jobs) and not self._may_queue():
                    raise ConfigError(f"{name} could not start any job: {type(error).__name__}: {text}") from error
            states = wait_for_workers(sweep, batch, QUIET, tell)
            left = [job for job in batch if not sweeps.is_final(states[job.id])]
            for job in left:
                if states[job.id] is not None:
                    log = str(sweep.log_file(job))
                    status = sweeps.Status(sweeps.KILLED, job.words, reason=why, attempts=1, log=log)
                    self.states.note(sweep, job, status, warn)
            if self._may_queue():
                if any(states[job.id] is None for job in left):
                    warn(
                        f"warning: jobs that {name} has not started may still be waiting in its queue: look there before "
                        "the same command is run again"
                    )
            elif len(left) > 1:
                batches += [[job] for job in left]
            elif left and tried[left[0].id] < self.options.retry:
                tried[left[0].id] += 1
                batches.append(left)

    def _may_queue(self) -> bool:
        """Whether the launcher's jobs outlive it: only a pool of this machine is gone when it gives up."""
        if self.kind.endswith(".RayLauncher"):
            return self.cluster
        return not self.kind.endswith((".JoblibLauncher", ".LocalLauncher"))


def warn(message: str) -> None:
    """A line on standard error."""
    tell(message, sys.stderr)


def _absolute(job: SweepJob, sweep: Sweep) -> SweepJob:
    """The job with folders that mean the same wherever its worker stands."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from backdoor_bench.launch import quoted
    from backdoor_bench.sweep import SweepJob

    words = [f"output_root={quoted(str(sweep.folder.parent.parent.absolute()))}"]
    for word in job.words:
        key = word.partition("=")[0].lstrip("+~")
        if key == "cache_root":
            value = OverridesParser.create().parse_override(word).value()
            if isinstance(value, str) and "${" not in value:
                word = f"cache_root={quoted(str(Path(value).expanduser().absolute()))}"
        if key != "output_root":
            words.append(word)
    return SweepJob(tuple(words))
