"""A table or figure of a paper beside what was measured: each printed number, ours over seeds, the difference.

``experiments`` says which run stands for which printed cell, ``collect`` reads the runs; nothing here is typed in.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backdoor_bench import collect, experiments
from backdoor_bench.collect import Run
from backdoor_bench.errors import ConfigError
from backdoor_bench.experiments import SUMMARIES, Experiment, Job, Printed

# Points of percent. T&R Table 4 prints the deviation over three seeds: at most 0.33 for ACC and 1.16 for ASR. Two single
# runs then differ by less than 2 * sqrt(2) times that, 0.93 and 3.3, in 95 of 100 cases (two means of three seeds by less
# than 0.53 and 1.86); ASR is rounded up because the papers' other attacks sit nearer to failing. Shares of flagged or
# poisoned samples are judged like ASR. Times (other machines) and errors of a reconstruction are not judged unless a
# tolerance is given.
TOLERANCE: Mapping[str, float] = {
    "acc": 1.0,
    **dict.fromkeys(("asr", "precision", "recall", "clean_precision", "poison_precision"), 5.0),
}
INTERVAL = "interval"  # as a tolerance: outside is what our 95 % interval does not hold
CONFIDENCE = 0.95
OF_A_RUN = ("acc", "asr", "precision", "recall", "clean_precision", "poison_precision", "mse", "time_min")
OF_A_GRID = ("acc", "asr", "precision", "recall")  # of jobs that stand for no printed number
ROUNDING = 0.06  # printed averages differ by up to this from the mean of their rows
SLACK = 1e-9  # what the last bits of equal numbers may differ by
FULL = "full"  # the budget that changes nothing

NO_RUN = "not the number of one run"
NULL = "the runs have no such number"
MEASURED, NOT_RUN, MISSING, INCOMPLETE, NO_NUMBER = "measured", "not run", "missing", "incomplete", "no number"


Cells = Mapping[tuple[Any, ...], Mapping[int, Run]]  # collect.newest


# ---------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Stat:
    """A mean over n values with its sample standard deviation and the ends of its 95 % interval (None for n = 1)."""

    mean: float
    std: float | None
    low: float | None
    high: float | None
    n: int


def stat(values: Sequence[float]) -> Stat | None:
    """Student's interval of the mean, n - 1 degrees of freedom, not cut at 0 or 100; None without values."""
    n = len(values)
    if not n:
        return None
    mean = sum(values) / n
    if n == 1:
        return Stat(mean, None, None, None, 1)
    from scipy.special import stdtrit

    std = (sum((value - mean) ** 2 for value in values) / (n - 1)) ** 0.5
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * std / n**0.5
    return Stat(mean, std, mean - half, mean + half, n)


@dataclass(frozen=True)
class Tolerance:
    """How far ours may be from the printed value; interval: the printed value must lie in our interval instead."""

    points: Mapping[str, float] = field(default_factory=lambda: dict(TOLERANCE))
    interval: bool = False

    @classmethod
    def of(cls, words: Sequence[str]) -> Tolerance:
        """From ``POINTS`` (all shares), ``METRIC=POINTS`` (which comes before it) and ``interval``, in any order. Raises
        ConfigError for anything else."""
        every, single, interval = {}, {}, False
        for word in words:
            if word == INTERVAL:
                interval = True
                continue
            metric, _, number = word.rpartition("=")
            known = (*OF_A_RUN, "acc_std", "asr_std")
            if (metric and metric not in known) or not re.fullmatch(r"\d+(\.\d*)?|\.\d+", number):
                raise ConfigError(
                    f"--tolerance {word} is not allowed: give points >= 0, METRIC=POINTS (metrics: {', '.join(known)}) "
                    f"or {INTERVAL}"
                )
            if metric:
                single[metric] = float(number)
            else:
                every = dict.fromkeys(TOLERANCE, float(number))
        return cls({**TOLERANCE, **every, **single}, interval)

    def judge(self, metric: str, paper: float, ours: Stat) -> bool | None:
        """Whether ours is near enough; None where that cannot be said (no tolerance, or one seed and no interval)."""
        if self.interval:
            return None if ours.low is None or ours.high is None else ours.low - SLACK <= paper <= ours.high + SLACK
        limit = self.points.get(metric)
        return None if limit is None else abs(ours.mean - paper) <= limit + SLACK

    def text(self) -> str:
        if self.interval:
            return "the printed value lies outside our 95 % interval"
        told = ", ".join(f"{metric} {points:g}" for metric, points in self.points.items())
        return f"more than the tolerance away ({told} points)"


# ---------------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class Row:
    """One printed number (table, dataset ... rate and unit as printed; table "" for a job that stands for none).

    on: (dataset, model) ours was measured with. paper: the printed value, None where the paper leaves it out. within: see
    ``Tolerance.judge``, None in a reduced table. status: MEASURED; NOT_RUN; MISSING (not run, a group has no file: in
    note); INCOMPLETE (an average of which cells lack); NO_NUMBER (not one that a run has, or null in all of them). runs:
    those that ours is made of.
    """

    table: str
    dataset: str
    model: str
    attack: str
    defense: str
    rate: str
    metric: str
    unit: str
    paper: float | None
    on: tuple[str, str]
    settings: tuple[str, ...] = ()
    ours: Stat | None = None
    within: bool | None = None
    status: str = MEASURED
    note: str = ""
    runs: tuple[Run, ...] = ()

    @property
    def difference(self) -> float | None:
        """Ours - paper, in the row's unit."""
        return None if self.ours is None or self.paper is None else self.ours.mean - self.paper


@dataclass(frozen=True)
class Comparison:
    """rows in the order of the printed tables, then those of grids. title says what differs from the paper's setting.
    reduced: a smaller budget, other data, another network or other settings: the paper's numbers are not to be reached, so
    none is judged."""

    name: str
    title: str
    budget: str | None
    settings: tuple[str, ...]
    tolerance: Tolerance
    rows: tuple[Row, ...]
    reduced: bool = False

    def count(self, *statuses: str) -> int:
        return sum(row.status in statuses for row in self.rows)

    @property
    def outside(self) -> int:
        return sum(row.within is False for row in self.rows)


def find(conf: Path, name: str) -> Experiment:
    """The experiment ``name``, or the one that runs the printed table ``name``.

    Raises ConfigError with the nearest name if it is neither.
    """
    known = experiments.names(conf)
    if name in known:
        return experiments.load(conf, name)
    for other in known:
        experiment = experiments.load(conf, other)
        if name in experiment.tables and experiment.notes is None:
            return experiment
    valid = sorted({*known, *experiments.tables()})
    near = difflib.get_close_matches(name, valid, n=1)
    if name in valid:
        raise ConfigError(f"no experiment runs the whole of the printed table {name}; there are {', '.join(known)}")
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ConfigError(f"{name!r} is no table and no experiment{hint}; there are {', '.join(valid)}")


@dataclass(frozen=True)
class Asked:
    """Whose runs are wanted. roots: folders with runs; budget, chosen, settings: as ``compare`` takes them."""

    roots: tuple[Path, ...]
    budget: str | None
    chosen: Mapping[str, Sequence[str]]
    settings: tuple[str, ...]

    @classmethod
    def of(cls, conf: Path, items: Sequence[str]) -> Asked:
        """Folders and the words that a sweep was started with, in any order; ``outputs`` (or the words' ``output_root``)
        where no folder is named. Words that change no result (seed, hardware, paths) are passed over.

        Raises ConfigError for a setting with several values, which no single table has, and for a word that Hydra refuses.
        """
        from backdoor_bench.results import decides

        words = [item for item in items if "=" in item and not _exists(item)]
        roots = [Path(item).expanduser() for item in items if item not in words]
        chosen: dict[str, Sequence[str]] = {}
        budget, settings = None, []
        for values in _alternatives(conf, words):
            key, _, value = values[0].partition("=")
            if key in experiments.COORDINATES:
                chosen[key] = [word.partition("=")[2] for word in values]
            elif key == "output_root":
                roots.append(Path(value.strip("'\"")).expanduser())
            elif len(values) > 1 and (key == "budget" or decides(values[0])):
                raise ConfigError(f"{key} has several values ({', '.join(values)}): make one table for each")
            elif key == "budget":
                budget = None if value == "null" else value
            elif decides(values[0]):
                settings.append(values[0])
        return cls(tuple(roots) or (Path("outputs"),), budget, chosen, tuple(settings))


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # longer than a name may be
        return False


def _alternatives(conf: Path, words: Sequence[str]) -> list[list[str]]:
    from hydra.errors import HydraException

    from backdoor_bench import launch

    try:
        return launch.alternatives(words, conf)
    except HydraException as error:
        raise ConfigError(launch.explain(error, conf, list(words)) or str(error)) from None


def compare(
    conf: Path,
    experiment: Experiment,
    runs: Cells,
    *,
    budget: str | None = None,
    chosen: Mapping[str, Sequence[str]] | None = None,
    settings: Sequence[str] = (),
    tolerance: Tolerance | None = None,
) -> Comparison:
    """The experiment's printed numbers and grids beside ``runs`` (``collect.newest``).

    budget, chosen (values of dataset, model, attack, defense) and settings: those the sweep was started with. Raises
    ConfigError for a name that neither a job nor a file has.
    """
    tolerance, chosen = tolerance or Tolerance(), chosen or {}
    budgets = sorted(file.stem for file in (conf / "budget").glob("*.yaml"))
    if budget is not None and budget not in budgets:
        raise ConfigError(f"budget={budget} is unknown; valid: {', '.join(budgets)}")
    extra = tuple(map(experiments.subgroup, settings))
    jobs = experiments.jobs(conf, experiment, chosen, fixed=experiments.budget_groups(conf, budget))
    others: Mapping[str, Sequence[str]] = {}
    if {"attack", "defense"} & {*chosen}:
        jobs, others = _without_other_methods(jobs, experiments.jobs(conf, experiment))
    found = _done(jobs, runs, budget, extra)
    moved = any(
        (job.groups.get("dataset"), job.groups.get("model")) != cell[1:3] for job in jobs for cell in job.printed
    )
    reduced = budget not in (None, FULL) or bool(extra) or moved
    judge = None if reduced else tolerance
    rows = [*_printed_rows(experiment, found, chosen, judge), *_grid_rows(experiment, found)]
    title = _title(conf, experiment, rows, budget, chosen, others, extra)
    return Comparison(experiment.name, title, budget, extra, tolerance, tuple(rows), reduced)


def _without_other_methods(jobs: Sequence[Job], own: Sequence[Job]) -> tuple[list[Job], Mapping[str, Sequence[str]]]:
    """The jobs, of which those whose attack or defence took the place of the printed one stand for no printed number (it
    is another method's); and these attacks and defences. Other data or another model still show the table's shape."""
    groups = ("attack", "defense")
    methods = {(cell, *(job.groups.get(group) for group in groups)) for job in own for cell in job.printed}
    kept: list[Job] = []
    others: dict[str, dict[str, None]] = {}
    known = {group: {job.groups.get(group) for job in own} for group in groups}
    for job in jobs:
        names = {group: job.groups.get(group, "") for group in groups}
        for group, name in names.items():
            if name not in known[group]:
                others.setdefault(group, {})[name] = None
        kept.append(replace(job, printed=tuple(cell for cell in job.printed if (cell, *names.values()) in methods)))
    return kept, {group: list(names) for group, names in others.items()}


@dataclass(frozen=True)
class Done:
    """A job and the runs it has by seed. dataset: its name, with a fingerprint where runs of several data sets have it."""

    job: Job
    runs: Mapping[int, Run]
    dataset: str

    def values(self, metric: str) -> dict[int, float]:
        """By seed, without those that have none."""
        found = {seed: run.value(metric) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}


def merged(words: Iterable[str], later: Iterable[str]) -> tuple[str, ...]:
    """Sorted words of which the later replace the earlier with the same key, as a sweep merges its command line."""
    return tuple(sorted({word.partition("=")[0]: word for word in (*words, *later)}.values()))


def _done(jobs: Sequence[Job], runs: Cells, budget: str | None, extra: Sequence[str]) -> list[Done]:
    """The jobs with their runs; each once for every data set of its dataset's name that any of them has runs of (the
    user's own images, ``Run.data``)."""
    by_data: dict[tuple[Any, ...], dict[str | None, Mapping[int, Run]]] = {}
    for cell, seeds in runs.items():
        by_data.setdefault(cell[:-1], {})[cell[-1]] = seeds
    found = [(job, _runs_of(job, by_data, budget, extra)) for job in jobs]
    data: dict[str | None, dict[str | None, None]] = {}
    for job, matches in found:
        data.setdefault(job.groups.get("dataset"), {}).update(dict.fromkeys(matches))
    made = []
    for job, matches in found:
        name = job.groups.get("dataset", "")
        several = sorted(data[job.groups.get("dataset")], key=str) or [None]
        for one in several:
            label = f"{name} ({one[:8] if one else 'no fingerprint'})" if len(several) > 1 else name
            made.append(Done(job, matches.get(one, {}), label))
    return made


def _runs_of(
    job: Job,
    by_data: Mapping[tuple[Any, ...], Mapping[str | None, Mapping[int, Run]]],
    budget: str | None,
    extra: Sequence[str],
) -> Mapping[str | None, Mapping[int, Run]]:
    groups = job.groups
    names = tuple(groups.get(name) for name in experiments.COORDINATES)
    rest = (groups.get("paper"), groups.get("budget", budget), merged(job.settings, extra))
    if None not in names:
        return by_data.get((*names, *rest), {})
    # A job that leaves a group to the configuration's default: what it was stands in the result.
    fits = (
        found
        for cell, found in by_data.items()
        if cell[len(names) :] == rest and all(a in (None, b) for a, b in zip(names, cell, strict=False))
    )
    return next(fits, {})


def _printed_rows(
    experiment: Experiment, found: Sequence[Done], chosen: Mapping[str, Sequence[str]], tolerance: Tolerance | None
) -> Iterator[Row]:
    behind: dict[tuple[str, ...], list[Done]] = {}
    for done in found:
        for cell in done.job.printed:
            behind.setdefault(cell, []).append(done)
    for table in experiment.tables:
        rows = _chosen_rows(experiment, table)
        for row in rows:
            parts = {row.cell: behind.get(row.cell, [])}
            if row.attack == "average" and not parts[row.cell]:
                parts = {other.cell: behind.get(other.cell, []) for other in _averaged(row, rows)}
            kinds = dict.fromkeys(_kind(row, done) for cell in parts.values() for done in cell)
            if not kinds and all(getattr(row, group) in names for group, names in chosen.items()):
                yield replace(_blank(row, (row.dataset, row.model)), status=NO_NUMBER, note=NO_RUN)
            for kind in kinds:
                here = {cell: [done for done in jobs if _kind(row, done) == kind] for cell, jobs in parts.items()}
                yield _compared(row, rows, kind[:2], here, tolerance)


def _chosen_rows(experiment: Experiment, table: str) -> list[Printed]:
    return [row for row in experiments.printed(table) if experiment.notes is None or experiment.notes in row.notes]


def _kind(row: Printed, done: Done) -> tuple[str, ...]:
    """What the jobs of one compared number share: a value that replaces the table's own makes a row for each."""
    names = [name for name in experiments.COORDINATES[1:] if name != "attack" or row.attack != "average"]
    return (done.dataset, *(done.job.groups.get(name, "") for name in names))


def _averaged(average: Printed, rows: Sequence[Printed]) -> list[Printed]:
    """The rows whose mean an average is: its own but for the attack."""
    same = (average.table, average.dataset, average.model, average.defense, average.rate, average.metric)
    return [
        row
        for row in rows
        if row.attack not in (*SUMMARIES, "none")
        and (row.table, row.dataset, row.model, row.defense, row.rate, row.metric) == same
    ]


def _compared(
    row: Printed,
    rows: Sequence[Printed],
    place: tuple[str, ...],
    parts: Mapping[tuple[str, ...], Sequence[Done]],
    tolerance: Tolerance | None,
) -> Row:
    """A printed number beside the jobs behind it: one, or those of an average (parts: of each cell its jobs)."""
    told = _blank(row, place)
    if row.attack == "average" and row.cell not in parts:
        paper, note = _average_of_rows(row, _averaged(row, rows))
        told = replace(told, paper=paper, note=note)
    jobs = [done for cell in parts.values() for done in cell]
    missing = sorted({word for done in jobs for word in done.job.missing})
    no_file = f"no file: {', '.join(missing)}" if missing else ""
    if row.attack == "average":
        of = sum(max(1, len(cell)) for cell in parts.values())
        there = sum(bool(done.runs) for done in jobs)
        if there < of:
            note = "; ".join(filter(None, [f"{there} of {of} attacks", no_file]))
            return replace(told, status=INCOMPLETE, note=note)
    elif not jobs[0].runs:
        return replace(told, status=MISSING if missing else NOT_RUN, note=no_file)
    ours, why, runs = _ours(row.metric, jobs)
    if ours is None:
        return replace(told, status=NO_NUMBER, note=why)
    within = None if tolerance is None or told.paper is None else tolerance.judge(row.metric, told.paper, ours)
    return replace(told, ours=ours, within=within, runs=runs)


def _ours(metric: str, jobs: Sequence[Done]) -> tuple[Stat | None, str, tuple[Run, ...]]:
    """Ours over seeds, for an average the mean over the jobs of each seed that all have; or why there is none; and the
    runs it is made of."""
    base = metric.removesuffix("_std")
    if base not in OF_A_RUN:
        return None, NO_RUN, ()
    values = [done.values(base) for done in jobs]
    seeds = sorted(set.intersection(*map(set, values)))
    if not seeds:
        return None, NULL if not all(values) else "no seed that all attacks have", ()
    runs = tuple(done.runs[seed] for done in jobs for seed in seeds)
    over_seeds = stat([sum(cell[seed] for cell in values) / len(values) for seed in seeds])
    if base == metric or over_seeds is None:
        return over_seeds, "", runs
    if over_seeds.std is None:
        return None, "a deviation needs two seeds", ()
    return Stat(over_seeds.std, None, None, None, over_seeds.n), "", runs


def _average_of_rows(average: Printed, rows: Sequence[Printed]) -> tuple[float | None, str]:
    """What an average is compared as: printed, or the mean of its printed rows where the two do not agree."""
    values = [row.value for row in rows if row.value is not None]
    if average.value is None or not values or len(values) < len(rows):
        return average.value, ""
    mean = sum(values) / len(values)
    if abs(mean - average.value) <= ROUNDING:
        return average.value, ""
    return mean, f"printed {average.value:g}; compared with the mean of the printed rows"


def _blank(row: Printed, place: tuple[str, ...]) -> Row:
    names = (row.table, row.dataset, row.model, row.attack, row.defense, row.rate, row.metric, row.unit)
    return Row(*names, paper=row.value, on=(place[0], place[1]))


def _grid_rows(experiment: Experiment, found: Sequence[Done]) -> Iterator[Row]:
    """The jobs that are no printed cell of their own: what they measured."""
    printed = {row.metric for table in experiment.tables for row in _chosen_rows(experiment, table)}
    metrics = dict.fromkeys([*OF_A_GRID, *(name for name in OF_A_RUN if name in printed)])
    for done in found:
        if any(cell[3] not in SUMMARIES for cell in done.job.printed):
            continue
        model, attack, defense = (done.job.groups.get(name, "") for name in experiments.COORDINATES[1:])
        place = (done.dataset, model)
        blank = Row("", *place, attack, defense, "", "", "", None, place, done.job.settings)
        if not done.runs:
            missing = bool(done.job.missing)
            note = f"no file: {', '.join(done.job.missing)}" if missing else ""
            yield replace(blank, status=MISSING if missing else NOT_RUN, note=note)
            continue
        measured = {metric: _ours(metric, [done]) for metric in metrics}
        if all(ours is None for ours, _, _ in measured.values()):
            yield replace(blank, status=NO_NUMBER, note=NULL)
        for metric, (ours, _, runs) in measured.items():
            if ours is not None:
                yield replace(blank, metric=metric, unit=collect.unit(metric), ours=ours, runs=runs)


def _title(
    conf: Path,
    experiment: Experiment,
    rows: Sequence[Row],
    budget: str | None,
    chosen: Mapping[str, Sequence[str]],
    others: Mapping[str, Sequence[str]],
    extra: Sequence[str],
) -> str:
    told = []
    if budget == FULL:
        told.append("budget full, the paper's own effort")
    elif budget is not None:
        text = (conf / "budget" / f"{budget}.yaml").read_text(encoding="utf-8")
        about = next((line for line in text.splitlines() if line.startswith("# ") and "@package" not in line), "")
        told.append(f"at the reduced budget {budget} ({about.lstrip('# ').rstrip('.')})")
    for index, group in enumerate(("dataset", "model")):
        swaps: dict[str, dict[str, None]] = {}
        for row in rows:
            theirs = (row.dataset, row.model)[index]
            if row.on[index] != theirs:
                swaps.setdefault(row.on[index], {})[theirs] = None
        told += [f"{group} {ours} instead of {', '.join(theirs)}" for ours, theirs in swaps.items()]
    for group in ("attack", "defense"):
        others_here = [name for name in chosen.get(group, ()) if name in others.get(group, ())]
        own = [name for name in chosen.get(group, ()) if name not in others_here]
        told += [f"only {group} {', '.join(own)}"] if own else []
        told += [f"{group} {', '.join(others_here)} in place of the printed ones"] if others_here else []
    if extra:
        told.append(f"with {' '.join(extra)}")
    return f"{experiment.title}; {'; '.join(told)}" if told else experiment.title
