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
from datetime import datetime
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
    from backdoor_bench.progress import printable

    print(f"warning: {printable(message)}", file=sys.stderr)


def utf8(text: str) -> str:
    """``text`` with what UTF-8 has no bytes for (a path's stray bytes, lone surrogates of JSON) as backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


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
        dataset, model, attack, defense = (
            utf8(str(result[name])) for name in ("dataset", "model", "attack", "defense")
        )
        paper, budget = (None if result.get(name) is None else utf8(str(result[name])) for name in ("paper", "budget"))
        told = result.get("settings")
        settings = tuple(sorted(utf8(str(word)) for word in told)) if isinstance(told, list) else None
        if not isinstance(result["metrics"], Mapping):
            raise TypeError("metrics")
        return cls(folder, dataset, model, attack, defense, paper, budget, settings, int(result["seed"]), result)

    @property
    def cell(self) -> tuple[Any, ...]:
        """Equal for runs that differ in nothing but the seed, the machine and the place of their files."""
        groups = (self.dataset, self.model, self.attack, self.defense, self.paper, self.budget)
        return (*groups, self.settings if self.settings is not None else f"? {self.result.get('variant')}", self.data)

    @property
    def data(self) -> str | None:
        """The fingerprint of the user's own images; None for data that their name tells."""
        return self._word("data")

    @property
    def configuration(self) -> str | None:
        """Equal for runs of a cell whose resolved configurations say the same; None in a result from before it was kept."""
        return self._word("cell_hash")

    def _word(self, name: str) -> str | None:
        found = self.result.get(name)
        return utf8(found) if isinstance(found, str) and found else None

    @property
    def finished(self) -> tuple[bool, float, str]:
        """A key that puts the run that finished last last. A result without the time is from before it was kept and comes
        before those that have it, by the time of its file, which a copy may have changed."""
        try:
            return (True, datetime.fromisoformat(str(self.result.get("finished"))).timestamp(), str(self.folder))
        except (ValueError, OverflowError):
            pass
        try:
            return (False, (self.folder / "result.json").stat().st_mtime, str(self.folder))
        except OSError:
            return (False, 0.0, str(self.folder))

    @property
    def warnings(self) -> list[str]:
        """What the run warned of."""
        found = self.result.get("warnings")
        return [str(line) for line in found] if isinstance(found, list) else []

    @property
    def acc_per_class(self) -> list[float | None]:
        """Accuracy of each class as a share; None for a class without images, empty where it was not measured."""
        found = self.part("metrics").get("acc_per_class")
        return [number(value) for value in found] if isinstance(found, list) else []

    def part(self, name: str) -> Mapping[str, Any]:
        """A result's section (``environment``, ``poison``, ...), empty where it is missing or null."""
        found = self.result.get(name)
        return found if isinstance(found, Mapping) else {}

    def config(self, section: str) -> Any:
        """A section of config.yaml, or one of its plain values; None where the file or the section is missing."""
        return _parsed(self._sections.get(section, ""), section)

    @functools.cached_property
    def config_text(self) -> str | None:
        """config.yaml as it is; None without one, and for a link that leaves the run's folder."""
        try:
            file = inside(self.folder / "config.yaml", self.folder)
            return None if file is None else file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    @functools.cached_property
    def _sections(self) -> Mapping[str, str]:
        """config.yaml, a block-style file, section by section: parsing them all would take most of the time."""
        parts = re.split(r"(?m)^(?=[A-Za-z_])", self.config_text or "")
        return {part.split(":", 1)[0]: part for part in parts if ":" in part}

    def stages(self) -> dict[str, float]:
        """Seconds of each stage of the defence, as long as it took when it was made. All stages, the attacker's too, of a
        run without a defence and of a result from before they were told apart."""
        return _seconds(self.part("defense_seconds")) or self.all_stages()

    def all_stages(self) -> dict[str, float]:
        """Seconds of each stage, as long as it took when it was made (``total``, this run's own, is left out)."""
        return _seconds({name: value for name, value in self.part("seconds").items() if name != "total"})

    def value(self, metric: str) -> float | None:
        """A metric of the printed tables in the unit they print: percent, minutes, or a plain number.

        None where the run has none: precision when nothing is flagged, and what no run measures (``acc_gap``).
        """
        if metric == "time_min":
            stages = self.stages()
            return sum(stages.values()) / 60 if stages else None
        if metric == "mse":
            return number(self.part("diagnostics").get("reconstruction_mse"))
        if metric.startswith("undefended_"):
            found = number(self.part("undefended").get(metric.removeprefix("undefended_")))
        else:
            found = number(self.part("metrics").get(metric))
        return None if found is None else 100 * found

    def measured(self) -> list[str]:
        """The metrics of ``value`` that are not None."""
        shares = [name for name, value in self.part("metrics").items() if number(value) is not None]
        others = [
            name for name in ("undefended_acc", "undefended_asr", "mse", "time_min") if self.value(name) is not None
        ]
        return [*shares, *others]

    @property
    def poison_rate(self) -> float | None:
        """``attack.poison_rate``; 0 without an attack, None where it is not one number (several triggers)."""
        attack = self.config("attack")
        found = number(attack.get("poison_rate")) if isinstance(attack, Mapping) else None
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
            result = _json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
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
    """cell -> seed -> run, in the order of ``runs``.

    Of several runs of a cell and seed the one that finished last counts, because a seed twice is no second sample; ``warn``
    is told where their ACC or ASR differ. Seeds whose configuration is another than that of the cell's newest run (a
    changed file in ``conf``) are no sample of the same thing: they are left out, and ``warn`` is told.
    """
    found: dict[tuple[Any, ...], dict[int, Run]] = {}
    last: dict[tuple[Any, ...], Run] = {}
    for run in sorted(runs, key=lambda run: run.finished):
        seeds = found.setdefault(run.cell, {})
        before = seeds.get(run.seed)
        if before is not None and any(before.value(name) != run.value(name) for name in ("acc", "asr")):
            warn(f"{run.folder} and {before.folder} are the same run with other results; the newer one counts")
        seeds[run.seed] = last[run.cell] = run
    order = list(dict.fromkeys(run.cell for run in runs))
    return {cell: _of_one_configuration(dict(sorted(found[cell].items())), last[cell], warn) for cell in order}


def _of_one_configuration(seeds: dict[int, Run], last: Run, warn: Warn) -> dict[int, Run]:
    """The seeds that were made as ``last`` was, and those of which that is not known."""
    others = {
        seed: str(run.folder)
        for seed, run in seeds.items()
        if None not in (run.configuration, last.configuration) and run.configuration != last.configuration
    }
    if others:
        warn(
            f"{', '.join(others.values())}: made with another configuration than the newer {last.folder}, and left out of "
            "its mean; run these seeds again"
        )
    return {seed: run for seed, run in seeds.items() if seed not in others}


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
            "seconds": number(run.part("seconds").get("total")),
            "device": _plain(environment.get("device")),
            "commit": _plain(environment.get("git")),
            "run_dir": utf8(str(run.folder)),
            "status": _plain(run.result.get("status")),
        }
        rows += [
            {**same, "metric": utf8(metric), "value": run.value(metric), "unit": unit(metric), **own}
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


def inside(path: Path, folder: Path) -> Path | None:
    """``path``, an entry of ``folder``; None if it is a link that leads out of it (in what others have sent)."""
    if not path.is_symlink():
        return path
    real, own = (Path(os.path.realpath(place)) for place in (path, folder))
    return path if real.is_relative_to(own) else None


def _json(text: str) -> Any:
    """JSON of which every number is finite or null: NaN, infinity and what no float holds are no measured values."""
    return json.loads(text, parse_constant=lambda _: None, parse_float=_finite, parse_int=_finite_int)


def _finite(text: str) -> float | None:
    found = float(text)
    return found if math.isfinite(found) else None


def _finite_int(text: str) -> int | None:
    return int(text) if len(text) < 300 else None


def _plain(value: Any) -> str | None:
    return None if value is None else utf8(str(value))


def number(value: Any) -> float | None:
    """A finite number as a float; None for anything else."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if plain else None


def _seconds(stages: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in stages.items() if number(value)}


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
    except (yaml.YAMLError, ValueError, RecursionError):  # a date that is none, brackets a thousand deep
        return None
