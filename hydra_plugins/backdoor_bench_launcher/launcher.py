"""A launcher that gives each job a process of its own; the work is done in backdoor_bench.processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

if TYPE_CHECKING:
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig


def config_folder(config: DictConfig) -> Path:
    """The folder of the configuration that Hydra was started with."""
    return Path(next(source.path for source in config.hydra.runtime.config_sources if source.provider == "main"))


class ProcessLauncher(Launcher):
    """``sweep.jobs`` processes side by side, each a ``run.py`` with a job's overrides.

    grace: seconds a job has to write its checkpoint when it is asked to stop.
    """

    def __init__(self, grace: float) -> None:
        from backdoor_bench.errors import check_range

        check_range("hydra.launcher.grace", grace, 0, 86_400)
        self.grace = float(grace)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self.trace = bool(getattr(task_function, "trace", False))
        self.states = getattr(task_function, "states", None)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; what came of each is in its status file, and in ``return_value`` by name."""
        from backdoor_bench import processes
        from backdoor_bench import sweep as sweeps
        from backdoor_bench.reporting.sweep_screen import SweepScreen

        conf = config_folder(self.config)
        options = sweeps.Options.of(self.config)
        jobs = [sweeps.SweepJob(tuple(w for w in words if not w.startswith("sweep."))) for words in job_overrides]
        root, name = Path(str(self.config.output_root)).expanduser(), str(self.config.sweep.name)
        sweep = sweeps.Sweep(name, root / "sweeps" / name, tuple(jobs))
        states = sweeps.Journal() if self.states is None else self.states
        with SweepScreen(sweep, options.jobs) as screen:
            pool = processes.Pool(
                sweep,
                conf.parent / "run.py",
                options,
                look=lambda job: sweeps.look(conf, job.words, sweep.name),
                explain=lambda error, job: sweeps.reason(error, conf, job.words),
                screen=screen,
                gpus=processes.visible_gpus(options),
                grace=self.grace,
                trace=self.trace,
                states=states,
            )
            pool.run(jobs)
        return [_returned(states.get(job.id), job.words) for job in jobs]


def _returned(status: Any, words: Sequence[str]) -> JobReturn:
    value = None if status is None else status.state
    return JobReturn(overrides=list(words), status=JobStatus.COMPLETED, _return_value=value)
