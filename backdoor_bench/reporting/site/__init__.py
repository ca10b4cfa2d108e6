"""One static site from finished runs: leaderboard, charts, the papers' tables, a page for each run.

It works from a folder, without a server and without the network: the table library (DataTables, from the package itables)
and the plotting library (plotly.js, from plotly) are written into it once. Names come from folders and files of others:
everything is escaped.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from backdoor_bench import collect, experiments
from backdoor_bench.collect import Run
from backdoor_bench.errors import BenchError, ConfigError, DiskError
from backdoor_bench.reporting import compare, tables
from backdoor_bench.reporting.compare import Comparison, Row, Tolerance, stat

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).resolve().parent
MARKER = "report.json"  # in a folder that this module made and may replace
KEPT = "tracking"  # W&B's files in such a folder, which are not ours to drop
FIGURES = ("copy", "link", "none")
SHARES = (
    ("acc", "ACC"), ("acc_nontarget", "ACC without the target class"), ("target_class_acc", "ACC of the target class"),
    ("asr", "ASR"), ("asr_floor", "ASR of a model without the trigger"), ("dummy_clean", "clean inputs to the dummy class"),
    ("dummy_triggered", "triggered inputs to the dummy class"),
)  # fmt: skip
ISOLATION = ("precision", "recall", "f1", "fpr", "auroc", "clean_precision", "precision_with_cover", "cover_flagged")
FILTERS = ("dataset", "model", "attack", "defense", "paper", "budget", "device")


@dataclass(frozen=True)
class Page:
    """A run and the name of its page (``runs/NAME.html``) and folder of figures (``figures/NAME``)."""

    run: Run
    name: str


@dataclass(frozen=True)
class Options:
    """figures: copied (as hard links where the disk can), linked to where they lie, or left out. settings: what the sweep
    of every table was started with besides."""

    figures: str = "copy"
    settings: tuple[str, ...] = ()
    tolerance: Tolerance = field(default_factory=Tolerance)


def build(conf: Path, roots: Sequence[Path], out: Path, options: Options) -> int:
    """Make the site of all runs below ``roots`` in the folder ``out``; returns how many runs it shows.

    ``out`` appears when all of it is written, and replaces an earlier report there. Raises ConfigError if it holds
    anything else, if there is no run or if a package is missing; DiskError if it cannot be written.
    """
    _check_replaceable(out)
    libraries = _libraries()
    told: list[str] = []
    runs = collect.read(roots, told.append)
    if not runs:
        raise ConfigError(f"no finished run below {', '.join(map(str, roots))}: there is nothing to show")
    cells = collect.newest(runs, told.append)
    pages = {run.folder: Page(run, name) for run, name in zip(runs, _page_names(runs), strict=True)}
    comparisons = measured_tables(conf, cells, options)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, text in libraries.items():
            _write(temporary / "assets" / name, text)
        _write_pages(conf, temporary, out, cells, pages, comparisons, told, options)
        record = {"schema": 1, "runs": len(runs), "tables": [name for name, _ in comparisons]}
        _write(temporary / MARKER, json.dumps(record) + "\n")
        _replace(temporary, out)
    except OSError as error:
        raise DiskError(f"cannot write the report to {out}: {error}; free space or give another --out") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return len(runs)


def measured_tables(conf: Path, cells: compare.Cells, options: Options) -> list[tuple[str, Comparison]]:
    """(page name, comparison) of each table and figure with a run, once for each budget of the runs, and for each of
    their data sets and models that no paper has."""
    rows = [row for table in experiments.tables() for row in experiments.printed(table)]
    printed = {"dataset": {row.dataset for row in rows}, "model": {row.model for row in rows}}
    found = []
    for name in sorted(experiments.names(conf), key=_natural):
        experiment = experiments.load(conf, name)
        papers = [cell for cell in cells if cell[4] == experiment.paper]
        for budget in sorted({cell[5] for cell in papers}, key=lambda budget: (budget is not None, budget or "")):
            chosen_by_budget = set(experiments.budget_groups(conf, budget).values())
            here = [cell for cell in papers if cell[5] == budget]
            others = {
                group: [None, *sorted({cell[place] for cell in here} - printed[group] - chosen_by_budget)]
                for place, group in enumerate(("dataset", "model"))
            }
            for names in itertools.product(*others.values()):
                chosen = {group: [value] for group, value in zip(others, names, strict=True) if value}
                # Names of a run need not exist here: its folder may come from elsewhere.
                with contextlib.suppress(BenchError):
                    made = compare.compare(
                        conf, experiment, cells, budget=budget, chosen=chosen, settings=options.settings,
                        tolerance=options.tolerance,
                    )  # fmt: skip
                    if made.count(compare.MEASURED):
                        found.append((_slug("-".join(filter(None, (name, budget, *names)))), made))
    return found


def command(run: Run, conf: Path) -> str | None:
    """The command that repeats a run on the same kind of machine; None where its settings were not recorded."""
    if run.settings is None:
        return None
    groups = {name: getattr(run, name) for name in ("paper", *experiments.COORDINATES, "budget")}
    words = [f"{name}={value}" for name, value in groups.items() if value is not None]
    words += [*run.settings, f"seed={run.seed}"]
    evaluation, dataset = run.config("evaluation"), run.config("dataset")
    if isinstance(evaluation, Mapping) and evaluation.get("floor", "never") != "never":
        words.append(f"evaluation.floor={evaluation['floor']}")
    if isinstance(dataset, Mapping) and dataset.get("root"):
        words.append(f"dataset.root={dataset['root']}")
    usual = collect.yaml_file(conf / "hardware" / "auto.yaml") or {}
    hardware = run.config("hardware")
    for key, value in (hardware if isinstance(hardware, Mapping) else {}).items():
        if not key.startswith("_") and usual.get(key) != value:
            words.append(f"hardware.{key}={str(value).lower() if isinstance(value, bool) else value}")
    return shlex.join(["python", "run.py", *words])


# ---------------------------------------------------------------------- what the pages show


def leaderboard(cells: compare.Cells, pages: Mapping[Path, Page]) -> list[dict[str, Any]]:
    """One row a cell (all seeds of the same run): names, statistics of the main metrics, seconds of each stage."""
    rows = []
    for seeds in cells.values():
        runs = list(seeds.values())
        first = runs[0]
        numbers = {
            name: stat([value for run in runs if (value := run.value(name)) is not None])
            for name in ("acc", "asr", "precision", "recall", "undefended_asr", "time_min")
        }
        both = [(acc, asr) for run in runs if None not in ((acc := run.value("acc")), (asr := run.value("asr")))]
        numbers["gap"] = stat([acc - asr for acc, asr in both])  # type: ignore[operator]
        stages = [run.stages() for run in runs]
        rows.append(
            {
                **{name: getattr(first, name) or "" for name in FILTERS if name != "device"},
                "device": str(first.part("environment").get("device") or ""),
                "settings": f"not recorded: {first.result.get('variant')}"
                if first.settings is None
                else " ".join(first.settings),
                "isolation": first.isolation or first.defense,
                "numbers": numbers,
                "stages": {
                    name: sum(stage.get(name, 0.0) for stage in stages) / len(stages)
                    for name in dict.fromkeys(name for stage in stages for name in stage)
                },
                "runs": [(run.seed, pages[run.folder].name) for run in runs],
            }
        )
    return sorted(rows, key=lambda row: [_natural(row[name]) for name in ("dataset", "model", "attack", "defense")])


def chart_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the charts need of the leaderboard, in its order."""
    return [
        {
            **{name: row[name] for name in (*FILTERS, "settings", "isolation", "stages")},
            **{name: value and round(value.mean, 4) for name, value in row["numbers"].items()},
            "n": len(row["runs"]),
        }
        for row in rows
    ]


@dataclass(frozen=True)
class Grid:
    """A section of a table as the paper lays it out: attacks (with the rate) down, defences across."""

    heading: str
    columns: list[str]
    rows: list[tuple[str, list[list[Row]]]]


def grids(comparison: Comparison) -> list[Grid]:
    """The rows of a comparison by data set and model; the defences of jobs that are not printed carry their settings."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in comparison.rows:
        groups.setdefault((row.table, row.dataset, row.model, *row.on), []).append(row)
    found = []
    for rows in groups.values():
        rates = len({row.rate for row in rows if row.rate not in ("", "0")}) > 1
        cells: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            down = f"{row.attack}, {row.rate}" if rates and row.rate else row.attack
            cells.setdefault((down, " ".join([row.defense, *row.settings])), []).append(row)
        columns = list(dict.fromkeys(across for _, across in cells))
        down_names = dict.fromkeys(down for down, _ in cells)
        found.append(
            Grid(
                tables.heading(rows[0], comparison),
                columns,
                [(n, [cells.get((n, column), []) for column in columns]) for n in down_names],
            )
        )
    return found


def shade(row: Row, tolerance: Tolerance) -> str:
    """The class of a compared number: near, off, or far (more than three tolerances); empty where nothing is judged."""
    if row.within is None or row.difference is None:
        return ""
    limit = tolerance.points.get(row.metric, 0.0)
    return "near" if row.within else "far" if abs(row.difference) > 3 * limit and not tolerance.interval else "off"


def reasons(cell: Sequence[Row]) -> list[tuple[str, str]]:
    """(a word or two, the whole reason) for the numbers of a cell that were not measured, each once."""
    short = {compare.NOT_RUN: "not run", compare.MISSING: "no file yet"}
    told = [(short.get(row.status, row.note.partition(";")[0]), row.note) for row in cell if row.ours is None]
    return list(dict.fromkeys(told))


# ---------------------------------------------------------------------- writing


def _write_pages(
    conf: Path,
    folder: Path,
    out: Path,
    cells: compare.Cells,
    pages: Mapping[Path, Page],
    comparisons: Sequence[tuple[str, Comparison]],
    told: Sequence[str],
    options: Options,
) -> None:
    site = _environment()
    runs = [page.run for page in pages.values()]
    rows = leaderboard(cells, pages)
    choices = {name: sorted({row[name] for row in rows if row[name]}, key=_natural) for name in FILTERS}
    listed = [
        {
            "name": name,
            "title": made.title,
            "made": made,
            "shades": Counter(shade(r, made.tolerance) for r in made.rows),
        }
        for name, made in comparisons
    ]
    collect.write(collect.frame(runs), folder / "runs.csv")
    index = {"rows": rows, "choices": choices, "charts": chart_rows(rows), "tables": listed, "told": told, "runs": runs}
    _write(folder / "index.html", site.get_template("index.html").render(root="", **index))
    page = site.get_template("table.html")
    for name, made in comparisons:
        names = {folder_: page_.name for folder_, page_ in pages.items()}
        text = page.render(root="../", name=name, made=made, grids=grids(made), legend=tables.legend(made), pages=names)
        _write(folder / "tables" / f"{name}.html", text)
        _write(folder / "tables" / f"{name}.md", tables.markdown(made))
        _write(folder / "tables" / f"{name}.tex", tables.latex(made))
        _write(folder / "tables" / f"{name}.csv", tables.csv_text(made))
    page = site.get_template("run.html")
    for one in pages.values():
        seeds = [(run.seed, pages[run.folder].name) for run in cells[one.run.cell].values()]
        text = page.render(
            root="../", run=one.run, name=one.name, seeds=seeds, command=command(one.run, conf), shares=SHARES,
            isolation=ISOLATION, figures=_figures(one, folder, out, options.figures), config=one.run.config_text,
        )  # fmt: skip
        _write(folder / "runs" / f"{one.name}.html", text)


def _figures(page: Page, folder: Path, out: Path, how: str) -> list[tuple[str, str]]:
    """(caption, address relative to the run's page) of a run's pictures; links that leave its folder are not followed."""
    place = page.run.folder / "figures"
    if how == "none" or not place.is_dir():
        return []
    found = []
    for file in sorted(place.glob("*.png"), key=lambda file: (not file.name.startswith("poisoned"), file.name)):
        if file.is_symlink() or not file.is_file():
            continue
        if how == "link":
            address = os.path.relpath(file.resolve(), out.resolve() / "runs")
        else:
            target = folder / "figures" / page.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, target)
            except OSError:
                shutil.copyfile(file, target)
            address = f"../figures/{page.name}/{file.name}"
        found.append((file.stem.replace("_", " "), quote(address)))
    return found


def _page_names(runs: Sequence[Run]) -> list[str]:
    """A short name for each run that no other has, the same when the report is made again."""
    count: Counter[str] = Counter()
    names = []
    for run in runs:
        words = (run.dataset, run.attack, run.defense, str(run.result.get("config_hash") or "")[:8], f"seed{run.seed}")
        name = _slug("-".join(filter(None, words)))
        count[name] += 1
        names.append(name if count[name] == 1 else f"{name}.{count[name]}")
    return names


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:120]


def _natural(text: str) -> list[tuple[bool, int, str]]:
    """A key that sorts table2 before table10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", text or "")]


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from backdoor_bench.progress import duration, printable

    site = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    site.filters |= {"duration": duration, "printable": lambda value: printable(str(value)), "number": tables.number}
    site.globals |= {
        "shade": shade,
        "reasons": reasons,
        "filters": FILTERS,
        "labels": tables.LABELS,
        "compare": compare,
    }
    return site


def _libraries() -> dict[str, str]:
    """The files that all pages share, by name."""
    own = {name: (HERE / "assets" / name).read_text(encoding="utf-8") for name in ("site.css", "site.js")}
    bundle = _package_file("itables", "html/dt_bundle.js")
    return {
        **own,
        "plotly.js": _package_file("plotly", "package_data/plotly.min.js"),
        "datatables.css": _package_file("itables", "html/dt_bundle.css"),
        "datatables.js": f"window.dataTablesModule = {_as_address(bundle)};\n",
    }


def _as_address(module: str) -> str:
    """A JavaScript module as a quoted data: address: a page opened from a folder may import no module file."""
    import base64

    return json.dumps("data:text/javascript;base64," + base64.b64encode(module.encode()).decode())


def _package_file(package: str, name: str) -> str:
    """A file of an installed package, which is not imported for it."""
    found = importlib.util.find_spec(package)
    places = list(found.submodule_search_locations or ()) if found is not None else []
    for place in places:
        file = Path(place) / name
        if file.is_file():
            return file.read_text(encoding="utf-8")
    raise ConfigError(
        f"the report needs the package {package}{f' with its file {name}' if places else ''}: "
        "pip install 'backdoor-bench[report]'"
    )


def _write(path: Path, text: str) -> None:
    """Plainly: the folder is renamed when all of it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="replace")


def _check_replaceable(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise ConfigError(f"--out {out} holds something else than a report: choose a new or an empty folder")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: choose a new or an empty folder")


def _replace(made: Path, out: Path) -> None:
    """Give the finished folder its name; what W&B left in the old one goes along."""
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(old)
        if (old / KEPT).is_dir():
            (old / KEPT).rename(made / KEPT)
    made.rename(out)
    shutil.rmtree(old, ignore_errors=True)
