"""Around Hydra: help, safe composition, clear errors, exit codes. Only run.py uses it.

The composed configuration is checked before Hydra runs anything, because Hydra's own callbacks are instantiated before
the job: a ``_target_`` outside this package (and Hydra's launchers and sweepers) is refused.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backdoor_bench.errors import BenchError, ConfigError, Interrupted, SweepFailed
from backdoor_bench.progress import let_go, tell
from backdoor_bench.sweep import Journal
from backdoor_bench.targets import is_ours

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from backdoor_bench.plan import Plan

GROUPS = ("dataset", "model", "attack", "defense", "hardware", "tracking", "paper", "experiment", "budget")
SECTIONS = (
    *("dataset", "model", "train", "train.augment", "attack", "defense", "hardware", "tracking"),
    *("holdout", "evaluation", "resume", "sweep"),
)
# Written with a dot on the command line, chosen as a group by Hydra.
SUBGROUPS = ("defense.isolation", "defense.removal")
# Hydra's own: only classes named as launchers and sweepers are, in the modules that hold them.
HYDRA_TARGETS = re.compile(r"(hydra\._internal\.core_plugins\.\w+|hydra_plugins(\.\w+)+)\.\w+(Launcher|Sweeper)")
# ${name:...} calls a resolver; oc.create and oc.decode would make nodes, with their _target_, after the check.
RESOLVER = re.compile(r"\$\{([^}:]*):")
RESOLVERS = ("oc.env", "hydra", "now")
# Everything else that Hydra takes could bring another configuration, or a pickle, past the check of targets.
SWEEP_OPTIONS = ("-m", "--multirun")
SHOW_OPTIONS = ("--cfg", "-c", "--info", "-i")  # print something and stop
OPTIONS = (*SWEEP_OPTIONS, *SHOW_OPTIONS, "--resolve", "--package", "-p", "job", "all", "hydra")
# Hydra's own launchers, by the extra of pyproject.toml that installs them.
LAUNCHER_EXTRAS = {"joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm", "ray": "ray"}
MAX_JOBS = 10_000
MANY = "--many"  # allows more
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
Task = Callable[["Plan"], Path]


def main(task: Task, conf: Path, argv: list[str]) -> int:
    """Run the command line; returns the exit code (specs/faults.md rule 1).

    task: called once a job with what plan.prepare made ready; returns the path of its result.
    """
    from backdoor_bench.processes import watch_parent

    watch_parent()
    try:
        return _main(task, conf, argv)
    finally:
        let_go()


def _main(task: Task, conf: Path, argv: list[str]) -> int:
    if any(word in ("--help", "-h") for word in argv):
        tell(help_text(conf))
        return 0
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and exiting
    show_trace, many = "--traceback" in argv, MANY in argv
    argv = [_subgroup(word) for word in argv if word not in ("--traceback", MANY)]
    # Options first: argparse does not take them between the overrides.
    argv = sorted(argv, key=_is_override)
    try:
        return _run(task, conf, argv, show_trace, many)
    except BenchError as error:
        return fail(str(error), error.exit_code, show_trace)
    except KeyboardInterrupt:
        return fail("stopped at once; run the same command again to resume from the last checkpoint", 7, False)
    except Exception as error:
        message = explain(error, conf, [word for word in argv if _is_override(word)])
        if message is None:
            raise
        return fail(message, 2, show_trace)


def fail(message: str, code: int, show_trace: bool) -> int:
    """Print one message to standard error; returns the code."""
    if show_trace:
        import traceback

        tell(traceback.format_exc().rstrip(), sys.stderr)
    tell(f"error: {message}", sys.stderr)
    return code


def _run(task: Task, conf: Path, argv: list[str], show_trace: bool, many: bool) -> int:
    for word in argv:
        if not _is_override(word) and word not in OPTIONS:
            raise ConfigError(f"{word} is neither KEY=VALUE nor an option{_nearest(word, list(GROUPS))}; see --help")
    words = [word for word in argv if _is_override(word)]
    sweeps = any(option in argv for option in SWEEP_OPTIONS)
    sweeps |= any(word.lstrip("+").startswith("experiment=") for word in words)
    if sweeps and not any(option in argv for option in SHOW_OPTIONS):
        return _sweep(task, conf, words, show_trace, many)
    config = check_command(conf, words, many)
    if config.sweep.dry_run and not any(option in argv for option in SHOW_OPTIONS):
        return _sweep(task, conf, words, show_trace, many)
    # Raised when Hydra has returned: it prints "Error executing job" over whatever passes through it.
    failures: list[Exception] = []

    def job(config: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig

        state = HydraConfig.get()
        try:
            refuse_foreign_targets(config)
            group = None if config.sweep.name is None else str(config.sweep.name)
            result = guarded(task, config, list(state.overrides.task), group, dict(state.runtime.choices))
        except Exception as error:
            failures.append(error)
            return
        tell(f"result: {result}")

    _start_hydra(conf, argv, job)
    if failures:
        raise failures[0]
    return 0


def _start_hydra(conf: Path, argv: Sequence[str], job: Callable[[DictConfig], None]) -> None:
    import hydra

    before = sys.argv
    sys.argv = ["run.py", *argv]
    try:
        hydra.main(config_path=str(conf), config_name="config", version_base="1.3")(job)()
    finally:
        sys.argv = before


def _sweep(task: Task, conf: Path, words: list[str], show_trace: bool, many: bool) -> int:
    """The jobs that ``words`` mean, handed to the launcher that they choose; returns 0 or raises SweepFailed."""
    from backdoor_bench import sweep as sweeps

    start = time.perf_counter()
    sweep, options = sweeps.expand(conf, words, many)
    if options.dry_run:
        from backdoor_bench.dry_run import print_plan

        print_plan(conf, sweep, options)
        return 0
    runner = InProcess(task, sweep.folder, show_trace)
    root = sweep.folder.parent.parent
    own = {"hydra.sweeper.file": sweep.folder / "jobs.json", "output_root": root, "sweep.name": sweep.name}
    outer = [*sweeps.outer_words(words), *(f"{key}={quoted(str(value))}" for key, value in own.items())]
    stopped: Interrupted | None = None
    with sweep.held():
        sweep.begin(words)
        try:
            _start_hydra(conf, ["--multirun", *outer], runner)
        except Interrupted as error:
            stopped = error
        except KeyboardInterrupt:
            stopped = Interrupted("stopped at once; run the same command again to go on")
        summary = sweeps.Summary.of(sweep, runner.states)
    tell(summary.text(time.perf_counter() - start))
    stopped = stopped or runner.stopped
    failures = summary.failures(stopped=stopped is not None)
    if stopped is not None:
        if failures:
            fail(failures, stopped.exit_code, False)
        raise stopped
    if failures:
        raise SweepFailed(failures)
    return 0


@dataclass
class InProcess:
    """What ``hydra/launcher=basic`` calls for each job of a sweep, all in this process.

    folder: the sweep's; stopped: why no further job is to be started; states: what this process knows of the jobs,
    whichever launcher of ours runs them.
    """

    task: Task
    folder: Path
    trace: bool
    stopped: Interrupted | None = None
    states: Journal = field(default_factory=Journal)

    def __call__(self, config: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig

        from backdoor_bench import sweep as sweeps

        if self.stopped is not None:
            return  # the remaining jobs are left for the next time
        state = HydraConfig.get()
        words = tuple(word for word in state.overrides.task if not word.startswith("sweep."))
        sweep, job = sweeps.Sweep(str(config.sweep.name), self.folder, ()), sweeps.SweepJob(words)
        start = time.perf_counter()
        status = sweeps.Status(sweeps.RUNNING, words, attempts=1)
        self.states.note(sweep, job, status, _to_stderr)
        try:
            refuse_foreign_targets(config)
            choices = dict(state.runtime.choices)
            result = guarded(self.task, config, list(state.overrides.task), sweep.name, choices)
        except Exception as error:
            if isinstance(error, Interrupted):
                self.stopped = error
            else:
                fail(f"{' '.join(words)}: {error}", 8, self.trace)
            status = sweeps.Status(
                sweeps.STOPPED if self.stopped is not None else sweeps.FAILED, words, attempts=1,
                exit_code=getattr(error, "exit_code", 1), reason=f"{type(error).__name__}: {_one_line(error)}",
            )  # fmt: skip
        else:
            tell(f"result: {result}")
            status = sweeps.Status(sweeps.DONE, words, exit_code=0, result=str(result), attempts=1)
        self.states.note(sweep, job, replace(status, seconds=time.perf_counter() - start), _to_stderr)


def _to_stderr(message: str) -> None:
    tell(message, sys.stderr)


def guarded(task: Task, config: DictConfig, overrides: list[str], sweep: str | None, choices: dict[str, Any]) -> Path:
    """``task`` of the prepared plan, with the errors of torch and of Hydra's instantiation turned into ours.

    sweep: the name that the jobs of one sweep share, None for a single run.
    """
    from backdoor_bench.errors import OutOfMemory
    from backdoor_bench.training import interrupt

    try:
        plan = prepared(config, overrides, sweep, choices)
        interrupt.install()
        with _translated():
            return task(plan)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError, so is the CPU's
        if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        raise OutOfMemory(
            f"out of memory: {_one_line(error) or 'no memory left'}; lower train.batch_size (now "
            f"{config.train.batch_size}), dataset.limit or hardware.resident_gib, then run the same command again"
        ) from error


def prepared(config: DictConfig, overrides: list[str], sweep: str | None, choices: dict[str, Any]) -> Plan:
    """As plan.prepare, with the errors of Hydra's instantiation turned into ours."""
    from backdoor_bench.plan import prepare

    with _translated():
        return prepare(config, overrides, sweep, choices)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    from hydra.errors import InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, BenchError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise ConfigError(_one_line(error)) from error
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from error


# ---------------------------------------------------------------------- checks before Hydra starts


def check_command(conf: Path, overrides: list[str], many: bool = False) -> DictConfig:
    """The composed configuration (first value of each sweep), foreign targets refused; Hydra's errors pass through.

    many: allow a sweep of more than MAX_JOBS jobs.
    """
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    axes = alternatives(overrides, conf)
    check_count(axes, many)
    with initialize_config_dir(str(conf), version_base="1.3"):
        config = compose("config", [axis[0] for axis in axes], return_hydra_config=True)
    refuse_foreign_targets(config)
    for key in SECTIONS:
        if not OmegaConf.is_dict(OmegaConf.select(config, key)):
            value = OmegaConf.select(config, key)
            raise ConfigError(
                f"{key}={value!r} is not allowed: it is a section of keys, set one of them ({key}.KEY=...)"
            )
    missing = {key for key in OmegaConf.missing_keys(config) if not key.startswith("hydra.")}
    if missing:
        raise ConfigError(f"{sorted(missing)[0]} has no value: give it on the command line ({sorted(missing)[0]}=...)")
    return config


def alternatives(overrides: Sequence[str], conf: Path) -> list[list[str]]:
    """For each override the words it stands for: one, or one for each value it sweeps over."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    found = []
    for text, override in zip(overrides, OverridesParser.create().parse_overrides(list(overrides)), strict=True):
        if override.is_sweep_override():
            values = _swept(override, conf)
            if not values:
                raise ConfigError(f"{text} sweeps over no value: the sweep is empty")
            key = text.split("=", 1)[0]
            found.append([f"{key}={value}" for value in values])
        else:
            found.append([text])
    return found


def check_count(axes: Sequence[Sequence[Any]], many: bool) -> None:
    """Refuse a product of more than MAX_JOBS jobs unless ``many``."""
    jobs = math.prod(len(axis) for axis in axes)
    if jobs > MAX_JOBS and not many:
        raise ConfigError(f"the sweep has {jobs} jobs, more than {MAX_JOBS}: split it, or add {MANY} to run them all")


def _swept(override: Any, conf: Path) -> list[str]:
    """The values a sweep override runs through."""
    from hydra.core.override_parser.types import Glob

    if isinstance(override.value(), Glob):
        return [
            str(name) for name in override.value().filter([name for name, _ in options(conf, override.key_or_group)])
        ]
    return list(override.sweep_string_iterator())


def refuse_foreign_targets(config: DictConfig) -> None:
    """Raise ConfigError for any ``_target_`` that is neither ours nor one of Hydra's launchers and sweepers."""
    from omegaconf import OmegaConf

    for key, value in _leaves(OmegaConf.to_container(config, resolve=False), ""):
        if key.rpartition(".")[2] == "_target_":
            if not isinstance(value, str) or not (is_ours(value) or HYDRA_TARGETS.fullmatch(value)):
                raise ConfigError(
                    f"{key}={value!r} is not allowed: a _target_ must be a class of backdoor_bench (nothing was imported)"
                )
        elif isinstance(value, str):
            foreign = [name for name in RESOLVER.findall(value) if name not in RESOLVERS]
            if foreign:
                raise ConfigError(
                    f"{key}={value!r} is not allowed: the resolver {foreign[0]!r} could make any object; allowed are "
                    f"{', '.join(RESOLVERS)} and plain ${{key}}"
                )


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no section and no list; a ``_target_`` always, whatever it holds."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from [(f"{prefix}{key}", value)] if key == "_target_" else _leaves(value, f"{prefix}{key}.")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{prefix}{index}.")
    else:
        yield prefix.rstrip("."), node


def _is_override(word: str) -> bool:
    return not word.startswith("-") and ("=" in word or word.startswith("~"))


def quoted(text: str) -> str:
    """Text as the value of an override, whatever characters it has."""
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", text) + "'"


def _subgroup(word: str) -> str:
    """``defense.isolation=fct`` as Hydra wants it: ``defense/isolation=fct``."""
    key, sign, value = word.partition("=")
    if sign and key.lstrip("+~") in SUBGROUPS and "{" not in value:
        return f"{key.replace('.', '/')}={value}"
    return word


# ---------------------------------------------------------------------- messages


def explain(error: Exception, conf: Path, overrides: list[str]) -> str | None:
    """One message for an error of Hydra or OmegaConf; None if it is none of theirs."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, ValueError) and "Config group override" in str(error):
        numbers = ", ".join(word for word in overrides if re.fullmatch(r"[\w/]+=[\d.]+", word))
        return f"{numbers}: a group is chosen by a name, not by a number; --help lists the choices"
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, name = str(error.missing_cfg_file).rsplit("/", 1)
        valid = [option for option in error.options if option]
        extra = LAUNCHER_EXTRAS.get(name) if group == "hydra/launcher" else None
        install = f"; it comes with pip install 'backdoor-bench[{extra}]'" if extra else ""
        return f"{group}={name} is unknown{_nearest(name, valid)}; valid: {', '.join(sorted(valid))}{install}"
    missing = re.search(r"[Mm]issing mandatory value: (\S+)", str(error))
    if missing:
        return f"{missing.group(1)} has no value: give it on the command line ({missing.group(1)}=...)"
    if "Recursive interpolation" in str(error):
        loop = ", ".join(word for word in overrides if "${" in word)
        return f"{loop or 'a value'} refers to itself: Recursive interpolation; give a plain value"
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read as KEY=VALUE: {_one_line(error)}"
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        text = _one_line(error)
        found = re.search(r"Could not (?:override|append to config|delete from config)\.? '?([\w./@]+)'?", text)
        if found:
            key = found.group(1)
            known = known_keys(conf)
            if key in known:
                return f"{key} does not exist with the groups chosen here (another attack, defense, ... has it)"
            return f"{key} is no key of the configuration{_nearest(key, known)}; python run.py --help lists the groups"
        return text
    return None


def known_keys(conf: Path) -> list[str]:
    """Groups and dotted keys of the default configuration."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        config = OmegaConf.to_container(compose("config"), resolve=False)

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for key, value in node.items():
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    assert isinstance(config, dict)
    return [*GROUPS, *(group.replace(".", "/") for group in SUBGROUPS), *walk(config, "")]


def _nearest(name: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def options(conf: Path, group: str) -> list[tuple[str, str]]:
    """(name, first comment line) of every choice of a group."""
    found = []
    for file in sorted((conf / group).glob("*.yaml")):
        lines = (line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("# @package"))
        first = next(lines, "")
        found.append((file.stem, first.removeprefix("#").strip() if first.startswith("#") else ""))
    return found


def help_text(conf: Path) -> str:
    """The whole help: what it does, the groups with their choices, examples, exit codes."""
    lines = [
        "Plant a backdoor in a training set, train on it with a defence, measure what remains.",
        "",
        "usage: python run.py [GROUP=CHOICE ...] [KEY=VALUE ...]",
        "       python run.py -m GROUP=CHOICE,CHOICE,... seed=0,1,2     every combination; what is done is skipped",
        "       python run.py experiment=ID [GROUP=CHOICE ...]          the cells of a printed table, narrowed",
        "",
        "examples:",
        "  python run.py                                               badnets against trap, embedded data, 2 min",
        "  python run.py attack=sig defense=no_defense seed=1          the same without defence",
        "  python run.py dataset=cifar10 dataset.root=DIR dataset.limit=10000",
        "  python run.py dataset=folder dataset.root=DIR attack=none   clean an untrusted folder of images",
        "  python run.py defense.removal=retrain                       another way to repair the model",
        "  python run.py -m attack=none,badnets defense=no_defense,trap seed=0,1",
        "  python run.py experiment=trap_table1 budget=small sweep.dry_run=true     what it would do, and how long",
        "  python run.py attack=badnets --cfg job                      print the configuration and stop",
        "",
    ]
    for group in (*GROUPS, "defense/isolation", "defense/removal"):
        choices = options(conf, group)
        if not choices:
            continue
        lines.append(f"{group.replace('/', '.')}:")
        width = max(len(name) for name, _ in choices)
        lines += [f"  {name:<{width}}  {about}".rstrip() for name, about in choices]
        lines.append("")
    lines += [
        "further keys: seed, output_root, holdout.size, holdout.source, train.* (recipe), resume.redo",
        "  and every key of the chosen files: dataset.limit, attack.poison_rate, defense.isolation.eps, ...",
        "sweeps (docs/sweeps.md): sweep.dry_run=true lists the jobs, sweep.jobs=N runs N side by side, sweep.retry=N,",
        "  sweep.time_limit=MINUTES, sweep.gpus=[0,1], sweep.name=NAME; hydra/launcher=processes (a process a job),",
        "  basic (all in one), and joblib, submitit_local, submitit_slurm, ray where installed. The same command goes on.",
        "exit codes: 0 done, 1 bug, 2 configuration, 3 data, 4 diverged, 5 out of memory, 6 disk, 7 interrupted,",
        "  8 some jobs of a sweep failed. --traceback shows where an error came from.",
    ]
    return "\n".join(lines)
