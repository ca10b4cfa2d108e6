"""What an experiment (conf/experiment/ID.yaml) stands for: the printed cells of a paper's tables and grids of its own.

A printed cell is one (dataset, model, attack, defence, poisoning rate) of a table in ``backdoor_bench/reference``; its
job is the same groups plus what the printed variant of the defence means here. The file of an experiment names::

    defaults: [override /paper: trap]    the overlay all its jobs have
    sweep:
      tables: [trap_table1]              printed tables whose cells it runs
      notes: (Fig 4)                     only the rows of them whose notes have this; else null
      rate: attack.poison_rate           the key that takes the printed rate, where a table varies it; else null. Or
                                         {0.1: "", 0.05: attack.poison_rate=0.0527}: printed rate -> overrides
      average_of: [badnets, sig]         the attacks behind a printed average that has no rows of its own
      variants: {trap:eps=2.5: defense.isolation.eps=2.5}    printed defence -> overrides, separated by spaces; "" where
                                                             the variant is what the overlays say anyway
      cells: ['attack=sig defense=trap,dbr']                 more jobs: small grids of overrides
      set: [defense.isolation.all_pairs=true]                overrides of every job

A job says only what differs from the overlays of its paper, so that cells of two tables which mean the same run share it.

Only this module knows that format; ``launch`` runs the jobs, ``scripts/make_tables.py`` finds their results again.
"""

from __future__ import annotations

import csv
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backdoor_bench.errors import ConfigError, DataError

REFERENCE = Path(__file__).resolve().parent / "reference"
COORDINATES = ("dataset", "model", "attack", "defense")
# Printed rows that summarise others.
SUMMARIES = ("average", "any", "all", "clean_label")
FIELDS = ("tables", "notes", "rate", "average_of", "variants", "cells", "set")


@dataclass(frozen=True)
class Printed:
    """One printed number. dataset ... rate as in the CSV (defense with its variant after a colon); value as printed
    (percent stays percent), None where the paper leaves it out."""

    table: str
    dataset: str
    model: str
    attack: str
    defense: str
    rate: str
    metric: str
    value: float | None
    unit: str
    notes: str

    @property
    def cell(self) -> tuple[str, ...]:
        """What makes a cell: the same for all its metrics."""
        return (self.table, self.dataset, self.model, self.attack, self.defense, self.rate)


@dataclass(frozen=True)
class Job:
    """Groups and settings of one run. settings: other overrides, sorted, as ``plan.settings`` gives them; printed: the
    cells of tables it stands for (``Printed.cell``), none for a job of a grid; missing: the groups without a file."""

    groups: Mapping[str, str]
    settings: tuple[str, ...] = ()
    printed: tuple[tuple[str, ...], ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        """The words of its command line."""
        return [*(f"{group}={name}" for group, name in self.groups.items()), *self.settings]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for jobs that are the same run."""
        return (*sorted(self.groups.items()), self.settings)


@dataclass(frozen=True)
class Experiment:
    """An experiment's file, read; see the module."""

    name: str
    title: str
    paper: str | None
    tables: tuple[str, ...] = ()
    notes: str | None = None
    rate: str | Mapping[str, str] | None = None
    average_of: tuple[str, ...] = ()
    variants: Mapping[str, str] = field(default_factory=dict)
    cells: tuple[str, ...] = ()
    set: tuple[str, ...] = ()


def names(conf: Path) -> list[str]:
    """The experiments there are."""
    return sorted(file.stem for file in (conf / "experiment").glob("*.yaml"))


def load(conf: Path, name: str) -> Experiment:
    """The experiment ``name`` of the folder ``conf``; ConfigError if there is none or its file is not as above."""
    import yaml

    file = conf / "experiment" / f"{name}.yaml"
    if name not in names(conf):
        raise _unknown("experiment", name, names(conf))
    text = file.read_text(encoding="utf-8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"conf/experiment/{file.name} is no YAML: {' '.join(str(error).split())}") from None
    paper, sweep = _checked_file(f"conf/experiment/{file.name}", value)
    title = next(
        (line[1:].strip() for line in text.splitlines() if line.startswith("# ") and "@package" not in line), name
    )
    listed = {key: tuple(map(str, sweep.get(key) or ())) for key in ("tables", "average_of", "cells", "set")}
    variants = {str(key): str(words or "") for key, words in (sweep.get("variants") or {}).items()}
    rate = sweep.get("rate")
    if isinstance(rate, dict):
        rate = {_rate(key): str(words or "") for key, words in rate.items()}
    return Experiment(name, title, paper, notes=sweep.get("notes"), rate=rate, variants=variants, **listed)


def _checked_file(file: str, value: Any) -> tuple[str | None, Mapping[str, Any]]:
    """The paper and the section ``sweep`` of an experiment's file. Its jobs are command lines, which know nothing else."""
    if not isinstance(value, dict):
        raise ConfigError(f"{file} must hold the keys defaults and sweep (backdoor_bench/experiments.py)")
    other = sorted({str(key) for key in value} - {"defaults", "sweep"})
    if other:
        raise ConfigError(
            f"{file}: {other[0]} is no key of an experiment; settings of its jobs stand in sweep.set ([{other[0]}.KEY=...])"
        )
    paper = None
    for entry in value.get("defaults") or []:
        if not isinstance(entry, dict) or [*entry] != ["override /paper"]:
            raise ConfigError(
                f"{file}: defaults may hold 'override /paper: NAME' alone; choose other groups in sweep.set"
            )
        paper = entry["override /paper"]
    sweep = value.get("sweep") or {}
    if not isinstance(sweep, dict):
        raise ConfigError(f"{file}: sweep must hold some of the keys {', '.join(FIELDS)}")
    kinds: dict[str, tuple[Any, str]] = dict.fromkeys(("tables", "average_of", "cells", "set"), (list, "a list"))
    kinds |= {"variants": (dict, "a mapping"), "rate": ((str, dict), "a key or a mapping"), "notes": (str, "a text")}
    for key, found in sweep.items():
        if key not in FIELDS:
            raise ConfigError(f"{file}: sweep.{key} is no key of an experiment; there are {', '.join(FIELDS)}")
        kind, name = kinds[key]
        if found is not None and not isinstance(found, kind):
            raise ConfigError(f"{file}: sweep.{key}={found!r} is not allowed: it must be {name}")
    return paper, sweep


def _unknown(group: str, name: str, valid: Sequence[str]) -> ConfigError:
    import difflib

    near = difflib.get_close_matches(name, valid, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return ConfigError(f"{group}={name} is unknown{hint}; valid: {', '.join(valid) or 'none'}")


def printed(table: str) -> list[Printed]:
    """All numbers of a printed table (``trap_table1``), in its order. Raises ConfigError if there is no such table."""
    file = REFERENCE / f"{table}.csv"
    if not file.is_file():
        raise ConfigError(f"there is no printed table {table!r}; there are {', '.join(tables())}")
    with file.open(encoding="utf-8", newline="") as stream:
        return [
            Printed(
                table,
                row["dataset"],
                row["model"],
                row["attack"],
                row["defense"],
                row["poison_rate"],
                row["metric"],
                float(row["value"]) if row["value"] else None,
                row["unit"],
                row["notes"],
            )
            for row in csv.DictReader(stream)
        ]


def tables() -> list[str]:
    """The printed tables there are."""
    return sorted(file.stem for file in REFERENCE.glob("*.csv"))


def jobs(
    conf: Path,
    experiment: Experiment,
    chosen: Mapping[str, Sequence[str]] | None = None,
    *,
    fixed: Mapping[str, str] | None = None,
) -> list[Job]:
    """The jobs of an experiment, each once, in the order of its tables and cells.

    chosen: values of groups given on the command line. They narrow the jobs; a value that no job has takes the place of
    the jobs' own (``dataset=photo_digits`` runs a table on other data). Beside values that jobs have it takes the place of
    those without a file alone (``dataset=cifar10,imagenet200``: CIFAR-10, and imagenet200 for imagenet_subset). fixed:
    groups that a budget chooses for all jobs (its model), unless ``chosen`` has them. Raises ConfigError for a value that
    neither a job nor a file has, and if nothing is left.
    """
    every = found = [*_printed_jobs(experiment), *_grid_jobs(experiment)]
    for group, values in (chosen or {}).items():
        own = {job.groups.get(group) for job in every}
        others = [name for name in dict.fromkeys(values) if name not in own]
        for name in others:
            _check_exists(conf, group, name)
        kept = [job for job in found if job.groups.get(group) in values]
        # Beside values that some jobs have a new one takes the place of what has no file, if there is any such.
        absent = [job for job in found if job not in kept and not _exists(conf, group, job.groups.get(group))]
        found = [*kept, *(_moved(job, group, name) for name in others for job in (kept and absent) or found)]
    for group, name in (fixed or {}).items():
        if group not in (chosen or {}):
            found = [_moved(job, group, name) for job in found]
    unique: dict[tuple[Any, ...], Job] = {}
    for job in found:
        earlier = unique.get(job.key, job)
        unique[job.key] = replace(job, printed=tuple(dict.fromkeys(earlier.printed + job.printed)))
    if not unique:
        raise ConfigError(f"experiment={experiment.name} has no job left: the sweep is empty")
    return [_checked(conf, job) for job in unique.values()]


def _exists(conf: Path, group: str, name: str | None) -> bool:
    """Whether the group has such a file; a name may be anything, longer than a file's may be too."""
    return name in _names(conf / group)


@functools.lru_cache(maxsize=256)
def _stems(folder: Path, changed: int) -> frozenset[str]:
    return frozenset(file.stem for file in folder.glob("*.yaml"))


def _names(folder: Path) -> frozenset[str]:
    return _stems(folder, folder.stat().st_mtime_ns) if folder.is_dir() else frozenset()


def _check_exists(conf: Path, group: str, name: str) -> None:
    if not _exists(conf, group, name):
        raise _unknown(group, name, sorted(file.stem for file in (conf / group).glob("*.yaml")))


def _moved(job: Job, group: str, name: str) -> Job:
    return replace(job, groups={**job.groups, group: name})


def _printed_jobs(experiment: Experiment) -> Iterator[Job]:
    for table in experiment.tables:
        rows = [row for row in printed(table) if experiment.notes is None or experiment.notes in row.notes]
        own = {row.cell for row in rows if row.attack not in SUMMARIES}
        behind = {(cell[1], cell[2], cell[4], cell[5]) for cell in own}
        for cell in dict.fromkeys(row.cell for row in rows):
            if cell in own:
                yield _printed_job(experiment, cell, cell[3])
            elif cell[3] == "average" and (cell[1], cell[2], cell[4], cell[5]) not in behind:
                for attack in experiment.average_of:
                    yield _printed_job(experiment, cell, attack)


def _printed_job(experiment: Experiment, cell: tuple[str, ...], attack: str) -> Job:
    _, dataset, model, _, defense, rate = cell
    file = f"conf/experiment/{experiment.name}.yaml"
    if ":" in defense and defense not in experiment.variants:
        raise DataError(f"{file} does not say what {defense!r} means (sweep.variants)")
    words = experiment.variants.get(defense, "").split()
    if experiment.rate and rate and float(rate) > 0:
        if isinstance(experiment.rate, str):
            words.append(f"{experiment.rate}={_rate(rate)}")
        elif _rate(rate) not in experiment.rate:
            raise DataError(f"{file} does not say what the poisoning rate {rate} means (sweep.rate)")
        else:
            words += experiment.rate[_rate(rate)].split()
    groups = {"dataset": dataset, "model": model, "attack": attack, "defense": defense.partition(":")[0]}
    return _job(experiment, groups, words, (cell,))


def _grid_jobs(experiment: Experiment) -> Iterator[Job]:
    for text in experiment.cells:
        axes = [[f"{key}={value}" for value in values.split(",")] for key, _, values in map(_split, text.split())]
        for words in itertools.product(*axes):
            yield _job(experiment, {}, list(words), ())


def _job(experiment: Experiment, groups: dict[str, str], words: list[str], cells: tuple[tuple[str, ...], ...]) -> Job:
    """A job of the experiment with its paper; ``words`` may choose groups too."""
    settings = []
    for word in [*words, *experiment.set]:
        key, _, value = _split(word)
        if key in (*COORDINATES, "paper", "budget"):
            groups[key] = value
        else:
            settings.append(subgroup(word))
    paper = {"paper": experiment.paper} if experiment.paper else {}
    return Job({**paper, **groups}, tuple(sorted(settings)), cells)


def subgroup(word: str) -> str:
    """``defense.isolation=fct`` as Hydra wants it, ``defense/isolation=fct``; any other word as it is."""
    key, sign, value = word.partition("=")
    if sign and key.lstrip("+~") in ("defense.isolation", "defense.removal") and "{" not in value:
        return f"{key.replace('.', '/')}={value}"
    return word


def _rate(text: str | float) -> str:
    """A printed rate as it is compared and written: 0.10 and 0.1 are one."""
    return f"{float(text):g}"


def _split(word: str) -> tuple[str, str, str]:
    key, sign, value = word.partition("=")
    if not sign:
        raise ConfigError(f"{word!r} in an experiment is no KEY=VALUE")
    return key, sign, value


def _checked(conf: Path, job: Job) -> Job:
    """The job with the groups that have no file: methods that are not there yet."""
    missing = [f"{group}={name}" for group, name in job.groups.items() if not _exists(conf, group, name)]
    for word in job.settings:
        key, _, name = word.partition("=")
        if key in ("defense/isolation", "defense/removal") and not _exists(conf, key, name):
            missing.append(word)
    return replace(job, missing=tuple(missing))


def budget_groups(conf: Path, budget: str | None) -> dict[str, str]:
    """The groups that a budget's file chooses (``override /model: small_cnn``)."""
    import yaml

    file = conf / "budget" / f"{budget}.yaml"
    if not _exists(conf, "budget", budget):
        return {}
    entries = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("defaults", [])
    return {
        key.removeprefix("override /"): str(name)
        for entry in entries
        if isinstance(entry, dict)
        for key, name in entry.items()
        if key.startswith("override /") and key.removeprefix("override /") in COORDINATES
    }
