"""Finished runs read back from any number of folders, one by one or as one tidy table.

``scripts/summarise_runs.py``, ``make_tables.py`` and ``report.py`` start here. A torn file is named and left out, one of
a newer schema refused, one of an older schema read as far as it goes; what a run folder lacks (``config.yaml``) is None in
what is made of it.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backdoor_bench.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pandas

# The columns of the printed tables that a run has, then where its numbers come from.
COLUMNS = (
    *("paper", "dataset", "model", "attack", "defense", "poison_rate", "metric", "value", "unit"),
    *("budget", "settings", "seed", "seconds", "device", "commit", "run_dir", "status"),
)
NOT_ENTERED = ("cache", "figures", "tracking")  # folders without runs that hold many files
Warn = Callable[[str], None]


def to_stderr(message: str) -> None:
    """One line on standard error."""
    print(f"warning: {message}", file=sys.stderr)


@dataclass(frozen=True)
class Run:
    """A finished run. settings: the overrides that decide what is computed, sorted; None in a result from before they were
    recorded. result: all that its result.json holds."""

    folder: Path
    dataset: str
    model: str
    attack: str
    defense: str
    paper: str | None
    budget: str | None
    settings: tuple[str, ...] | None
    seed: int
    result: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path, result: Mapping[str, Any]) -> Run:
        """Raises KeyError, TypeError or ValueError for what is no result of a run."""
        dataset, model, attack, defense = (str(result[name]) for name in ("dataset", "model", "attack", "defense"))
        paper, budget = (None if result.get(name) is None else str(result[name]) for name in ("paper", "budget"))
        told = result.get("settings")
        settings = tuple(sorted(map(str, told))) if isinstance(told, list) else None
        if not isinstance(result["metrics"], Mapping):
            raise TypeError("metrics")
        return cls(folder, dataset, model, attack, defense, paper, budget, settings, int(result["seed"]), result)

    @property
    def cell(self) -> tuple[Any, ...]:
        """Equal for runs that differ in nothing but the seed, the machine and the place of their files."""
        groups = (self.dataset, self.model, self.attack, self.defense, self.paper, self.budget)
        return (*groups, self.settings if self.settings is not None else f"? {self.result.get('variant')}")

    def part(self, name: str) -> Mapping[str, Any]:
        """A result's section (``environment``, ``poison``, ...), empty where it is missing or null."""
        found = self.result.get(name)
        return found if isinstance(found, Mapping) else {}

    def config(self, section: str) -> Any:
        """A section of config.yaml, or one of its plain values; None where the file or the section is missing."""
        return _parsed(self._sections.get(section, ""), section)

    @functools.cached_property
    def config_text(self) -> str | None:
        """config.yaml as it is; None without one."""
        try:
            return (self.folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    @functools.cached_property
    def _sections(self) -> Mapping[str, str]:
        """config.yaml, a block-style file, section by section: parsing them all would take most of the time."""
        parts = re.split(r"(?m)^(?=[A-Za-z_])", self.config_text or "")
        return {part.split(":", 1)[0]: part for part in parts if ":" in part}

    def stages(self) -> dict[str, float]:
        """Seconds of each stage, as long as it took when it was made (``total``, this run's own, is left out)."""
        return {
            name: float(value) for name, value in self.part("seconds").items() if name != "total" and _number(value)
        }

    def value(self, metric: str) -> float | None:
        """A metric of the printed tables in the unit they print: percent, minutes, or a plain number.

        None where the run has none: precision when nothing is flagged, and what no run measures (``acc_gap``).
        """
        if metric == "time_min":
            stages = self.stages()
            return sum(stages.values()) / 60 if stages else None
        if metric == "mse":
            return _number(self.part("diagnostics").get("reconstruction_mse"))
        if metric.startswith("undefended_"):
            found = _number(self.part("undefended").get(metric.removeprefix("undefended_")))
        else:
            found = _number(self.part("metrics").get(metric))
        return None if found is None else 100 * found

    def measured(self) -> list[str]:
        """The metrics of ``value`` that are not None."""
        shares = [name for name, value in self.part("metrics").items() if _number(value) is not None]
        others = [
            name for name in ("undefended_acc", "undefended_asr", "mse", "time_min") if self.value(name) is not None
        ]
        return [*shares, *others]

    @property
    def poison_rate(self) -> float | None:
        """``attack.poison_rate``; 0 without an attack, None where it is not one number (several triggers)."""
        attack = self.config("attack")
        found = _number(attack.get("poison_rate")) if isinstance(attack, Mapping) else None
        return 0.0 if self.attack == "none" else found

    @property
    def isolation(self) -> str | None:
        """The method that flagged samples: the chosen ``defense/isolation``, or the module of the defence's own."""
        for word in self.settings or ():
            if word.startswith("defense/isolation="):
                return word.partition("=")[2]
        defense = self.config("defense")
        inner = defense.get("isolation") if isinstance(defense, Mapping) else None
        target = str(inner.get("_target_", "")) if isinstance(inner, Mapping) else ""
        return target.split(".")[-2] if target.count(".") else None


def unit(metric: str) -> str:
    """As the printed tables name it: ``%``, ``min`` or nothing."""
    return {"time_min": "min", "mse": ""}.get(metric, "%")


def read(roots: Sequence[Path], warn: Warn = to_stderr) -> list[Run]:
    """All finished runs below ``roots``, each folder once, sorted by folder.

    warn: told of each torn file, and once of older results. Raises ConfigError for a root that is no folder,
    DataError for a result of a newer schema.
    """
    from backdoor_bench.results import SCHEMA

    runs, old, before = [], 0, 0
    for file in _result_files(roots):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            warn(f"{file} is torn and left out; the run's command makes it again")
            continue
        schema = result.get("schema", 0) if isinstance(result, dict) else 0
        if not isinstance(schema, int) or schema > SCHEMA:
            raise DataError(
                f"{file} has schema {schema!r}, this version reads {SCHEMA}; update the package or leave the folder out"
            )
        try:
            runs.append(Run.of(file.parent, result))
        except (KeyError, TypeError, ValueError, AttributeError):
            warn(f"{file} is no result of a run and left out")
            continue
        old += schema < SCHEMA
        before += schema == SCHEMA and runs[-1].settings is None
    if old:
        warn(f"{old} results are of a schema before {SCHEMA}: what they do not hold stays empty")
    if before:
        warn(f"{before} results are from before their settings were recorded: they stand for no cell of a table")
    return runs


def newest(runs: Sequence[Run], warn: Warn = to_stderr) -> dict[tuple[Any, ...], dict[int, Run]]:
    """cell -> seed -> run, in the order of ``runs``. Of several runs of a cell and seed the one that finished last counts,
    because a seed twice is no second sample; ``warn`` is told where their ACC or ASR differ."""
    found: dict[tuple[Any, ...], dict[int, Run]] = {}
    for run in sorted(runs, key=lambda run: _finished_at(run.folder)):
        seeds = found.setdefault(run.cell, {})
        before = seeds.get(run.seed)
        if before is not None and any(before.value(name) != run.value(name) for name in ("acc", "asr")):
            warn(f"{run.folder} and {before.folder} are the same run with other results; the newer one counts")
        seeds[run.seed] = run
    order = list(dict.fromkeys(run.cell for run in runs))
    return {cell: dict(sorted(found[cell].items())) for cell in order}


def frame(runs: Sequence[Run]) -> pandas.DataFrame:
    """One row a run and metric, columns COLUMNS: those of the printed tables, ``value`` in their unit, and the run's own.

    settings are joined by blanks; seconds is the run's total; commit is git's description of the code.
    """
    import pandas

    rows = []
    for run in runs:
        environment = run.part("environment")
        same = {name: getattr(run, name) for name in ("paper", "dataset", "model", "attack", "defense", "poison_rate")}
        own = {
            "budget": run.budget,
            "settings": None if run.settings is None else " ".join(run.settings),
            "seed": run.seed,
            "seconds": _number(run.part("seconds").get("total")),
            "device": environment.get("device"),
            "commit": environment.get("git"),
            "run_dir": str(run.folder),
            "status": run.result.get("status"),
        }
        rows += [
            {**same, "metric": metric, "value": run.value(metric), "unit": unit(metric), **own}
            for metric in run.measured()
        ]
    return pandas.DataFrame(rows, columns=list(COLUMNS))


def write(table: pandas.DataFrame, path: Path) -> None:
    """Store ``frame``'s table as .csv or .parquet, by the name's ending. Raises ConfigError for any other ending, and for
    Parquet without pyarrow."""
    from backdoor_bench.results import write_table
    from backdoor_bench.storage import write_bytes

    if path.suffix == ".csv":
        plain = table.astype(object).where(table.notna(), None)
        write_table(path, [dict(zip(COLUMNS, row, strict=True)) for row in plain.itertuples(index=False)], COLUMNS)
    elif path.suffix == ".parquet":
        import io

        buffer = io.BytesIO()
        try:
            table.to_parquet(buffer, index=False, engine="pyarrow")
        except ImportError:
            raise ConfigError(
                f"{path}: Parquet needs the package pyarrow (pip install pyarrow); or give a name that ends in .csv"
            ) from None
        write_bytes(path, buffer.getvalue())
    else:
        raise ConfigError(f"{path}: the table is stored as .csv or .parquet, by the ending of its name")


def _result_files(roots: Sequence[Path]) -> Iterator[Path]:
    seen: set[Path] = set()
    for root in roots:
        if not root.is_dir():
            raise ConfigError(f"{root} is no folder; give folders with runs below them (outputs)")
        found = []
        for top, folders, files in os.walk(root):
            if "result.json" in files:
                found.append(Path(top) / "result.json")
                folders.clear()
            folders[:] = [name for name in folders if name not in NOT_ENTERED]
        for file in sorted(found):
            place = file.resolve()
            if place not in seen:
                seen.add(place)
                yield file


def _finished_at(folder: Path) -> tuple[float, str]:
    try:
        return ((folder / "result.json").stat().st_mtime, str(folder))
    except OSError:
        return (0.0, str(folder))


def _number(value: Any) -> float | None:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if plain else None


def yaml_file(path: Path) -> Mapping[str, Any] | None:
    """A YAML file's mapping; None where it cannot be read."""
    try:
        found = _loaded(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found if isinstance(found, Mapping) else None


def _parsed(text: str, section: str) -> Any:
    found = _loaded(text)
    return found.get(section) if isinstance(found, Mapping) else None


@functools.lru_cache(maxsize=4096)  # runs of a sweep share most of their sections
def _loaded(text: str) -> Any:
    import yaml

    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return None
