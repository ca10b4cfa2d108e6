"""One static site from finished runs: leaderboard, charts, the papers' tables, a page for each run.

It works from a folder, without a server and without the network: the table library (DataTables, from the package itables)
and the plotting library (plotly.js, from plotly) are written into it once. Names come from folders and files of others:
everything is escaped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from backdoor_bench import collect, experiments, launch
from backdoor_bench.collect import Run
from backdoor_bench.errors import ConfigError, DiskError
from backdoor_bench.reporting import compare, tables
from backdoor_bench.reporting.compare import Comparison, Row, Tolerance, stat

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).resolve().parent
MARKER = "report.json"  # in a folder that this module made and may replace
KEPT = "tracking"  # W&B's files in such a folder, which are not ours to drop
# All that this module writes into it: a folder with anything else is not replaced.
WRITTEN = re.compile(
    r"index\.html|runs\.csv|report\.json|assets/(site\.css|site\.js|plotly\.js|datatables\.css|datatables\.js)"
    r"|tables/[\w-]+\.(html|md|tex|csv)|runs/[\w.-]+\.html|figures/[\w.-]+/[^/]+\.png",
    re.ASCII,
)
FIGURES = ("copy", "link", "none")
SHARES = (
    ("acc", "ACC"), ("acc_nontarget", "ACC without the target class"), ("target_class_acc", "ACC of the target class"),
    ("asr", "ASR"), ("asr_floor", "ASR of a model without the trigger"), ("dummy_clean", "clean inputs to the dummy class"),
    ("dummy_triggered", "triggered inputs to the dummy class"),
)  # fmt: skip
OTHER_THAN_TEXT = r"(?i)true|false|null|nan|inf|[\d_.]+(e[+-]?\d+)?"  # a text that an override would not take as one
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

    ``out`` appears when all of it is written, and replaces an earlier report there. Notes on what was read go to standard
    error and onto the first page. Raises ConfigError if ``out`` holds anything else or a root, if there is no run or if a
    package is missing; DiskError if it cannot be written.
    """
    try:
        _clean_up(out)
    except OSError as error:
        raise DiskError(f"cannot clear up beside {out}: {error}; give another --out") from error
    _check_replaceable(out, roots)
    libraries = _libraries()
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        collect.to_stderr(line)

    runs = collect.read(roots, tell)
    if not runs:
        notes = f" ({'; '.join(told[:3])}{'; ...' if len(told) > 3 else ''})" if told else ""
        raise ConfigError(f"no finished run below {', '.join(map(str, roots))}: there is nothing to show{notes}")
    cells = collect.newest(runs, tell)
    pages = {run.folder: Page(run, name) for run, name in zip(runs, _page_names(runs), strict=True)}
    comparisons = measured_tables(conf, cells, options)
    temporary = _beside(out, "tmp")
    try:
        temporary.mkdir(parents=True)
        for name, text in libraries.items():
            _write(temporary / "assets" / name, text)
        _write_pages(conf, temporary, out, cells, pages, comparisons, tell, told, options)
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
    their data sets and models that the experiment does not have itself (at that budget)."""
    # Names of a run need not exist here: its folder may come from elsewhere.
    known = {group: _stems(conf / group) for group in ("dataset", "model", "budget")}
    found = []
    for name in sorted(experiments.names(conf), key=_natural):
        experiment = experiments.load(conf, name)
        papers = [cell for cell in cells if cell[4] == experiment.paper and cell[5] in {None, *known["budget"]}]
        for budget in sorted({cell[5] for cell in papers}, key=lambda budget: (budget is not None, budget or "")):
            jobs = experiments.jobs(conf, experiment, fixed=experiments.budget_groups(conf, budget))
            own = {group: {job.groups.get(group) for job in jobs} for group in ("dataset", "model")}
            # What stands for the table's own is None; what a job leaves to the configuration is its own as well.
            pairs = {
                tuple(
                    None if None in own[group] or value in own[group] else value
                    for group, value in (("dataset", cell[0]), ("model", cell[1]))
                )
                for cell in papers
                if cell[5] == budget
            }
            for pair in sorted(pairs, key=lambda pair: [value or "" for value in pair]):
                chosen = {group: [value] for group, value in zip(own, pair, strict=True) if value}
                if any(value not in known[group] for group, (value,) in chosen.items()):
                    continue
                made = compare.compare(
                    conf, experiment, cells, budget=budget, chosen=chosen, settings=options.settings,
                    tolerance=options.tolerance,
                )  # fmt: skip
                if made.count(compare.MEASURED):
                    found.append((_slug("-".join(filter(None, (name, budget, *pair)))), made))
    return found


def _stems(folder: Path) -> set[str]:
    return {file.stem for file in folder.glob("*.yaml")}


def command(run: Run, conf: Path) -> str | None:
    """The command that repeats a run on the same kind of machine; None where its settings were not recorded."""
    if run.settings is None:
        return None
    groups = {name: getattr(run, name) for name in ("paper", *experiments.COORDINATES, "budget")}
    words = [_override(name, value) for name, value in groups.items() if value is not None]
    words += [*run.settings, f"seed={run.seed}"]
    evaluation, dataset = run.config("evaluation"), run.config("dataset")
    if isinstance(evaluation, Mapping) and evaluation.get("floor", "never") != "never":
        words.append(_override("evaluation.floor", evaluation["floor"]))
    if isinstance(dataset, Mapping) and dataset.get("root"):
        words.append(_override("dataset.root", dataset["root"]))
    usual = collect.yaml_file(conf / "hardware" / "auto.yaml") or {}
    hardware = run.config("hardware")
    for key, value in (hardware if isinstance(hardware, Mapping) else {}).items():
        if not key.startswith("_") and usual.get(key) != value:
            words.append(_override(f"hardware.{key}", value))
    return shlex.join(["python", "run.py", *words])


def _override(key: str, value: Any) -> str:
    """``KEY=VALUE`` as Hydra reads it back: quoted where the text has characters or a meaning of its own there."""
    if isinstance(value, str):
        word = re.fullmatch(r"[\w/][\w/.:+-]*", value, re.ASCII) and not re.fullmatch(OTHER_THAN_TEXT, value)
        return f"{key}={value if word else launch.quoted(value)}"
    return f"{key}={'null' if value is None else str(value).lower() if isinstance(value, bool) else value}"


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
                "device": sorted({str(run.part("environment").get("device") or "") for run in runs}),
                "data": (first.data or "")[:8],
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


def links(cell: Sequence[Row], pages: Mapping[Path, str]) -> list[tuple[str, str]]:
    """(seed, name of the page) of the runs behind a cell's numbers, each once; with the attack where they are several."""
    runs = {run.folder: run for row in cell for run in row.runs if run.folder in pages}
    several = len({run.attack for run in runs.values()}) > 1
    return [(f"{run.attack} {run.seed}" if several else str(run.seed), pages[folder]) for folder, run in runs.items()]


def files_missing(comparison: Comparison) -> list[str]:
    """What ``reasons`` shortens to "no file yet", as a line for below the table: a title is not for fingers or the ear."""
    notes = [row.note.partition("no file: ")[2] for row in comparison.rows]
    words = dict.fromkeys(word for note in notes if note for word in note.split(", "))
    return [f"no file yet for {', '.join(words)}."] if words else []


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
    tell: collect.Warn,
    told: Sequence[str],
    options: Options,
) -> None:
    site = _environment()
    runs = [page.run for page in pages.values()]
    rows = leaderboard(cells, pages)
    choices = {name: sorted({value for row in rows for value in _values(row[name])}, key=_natural) for name in FILTERS}
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
    page = site.get_template("table.html")
    names = {folder_: page_.name for folder_, page_ in pages.items()}
    for name, made in comparisons:
        legend = [*tables.legend(made), *files_missing(made)]
        text = page.render(root="../", name=name, made=made, grids=grids(made), legend=legend, pages=names)
        _write(folder / "tables" / f"{name}.html", text)
        _write(folder / "tables" / f"{name}.md", tables.markdown(made))
        _write(folder / "tables" / f"{name}.tex", tables.latex(made))
        _write(folder / "tables" / f"{name}.csv", tables.csv_text(made))
    page = site.get_template("run.html")
    for one in pages.values():
        seeds = [(run.seed, pages[run.folder].name) for run in cells[one.run.cell].values()]
        text = page.render(
            root="../", run=one.run, name=one.name, seeds=seeds, command=command(one.run, conf), shares=SHARES,
            isolation=ISOLATION, figures=_figures(one, folder, out, options.figures, tell), config=one.run.config_text,
        )  # fmt: skip
        _write(folder / "runs" / f"{one.name}.html", text)
    # The last one, because it has all notes.
    index = {"rows": rows, "choices": choices, "charts": chart_rows(rows), "tables": listed, "told": told, "runs": runs}
    _write(folder / "index.html", site.get_template("index.html").render(root="", **index))


def _values(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value


def _figures(page: Page, folder: Path, out: Path, how: str, tell: collect.Warn) -> list[tuple[str, str]]:
    """(caption, address relative to the run's page) of a run's pictures; links that leave its folder are not followed, and
    ``tell`` is told of pictures that cannot be read."""
    place = page.run.folder / "figures"
    if how == "none" or not place.is_dir() or collect.inside(place, page.run.folder) is None:
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
                try:
                    picture = file.read_bytes()
                except OSError as error:
                    tell(f"{file} is left out: {error.strerror}")
                    continue
                target.write_bytes(picture)
            address = f"../figures/{page.name}/{file.name}"
        found.append((file.stem.replace("_", " "), quote(os.fsencode(address))))
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
        "links": links,
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


def _check_replaceable(out: Path, roots: Sequence[Path] = ()) -> None:
    """Raises ConfigError unless ``out`` is new, empty or a report of this module with nothing else in it."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file: choose a new or an empty folder")
    for root in roots:
        if root.resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"--out {out} holds {root}, whose runs are to be shown: choose another folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    try:
        record = json.loads((out / MARKER).read_text(encoding="utf-8"))
        ours = record["schema"] == 1 and isinstance(record["tables"], list)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ours = False
    foreign = next(_not_ours(out), None) if ours else None
    if not ours or foreign is not None:
        what = "something else than a report" if foreign is None else f"{foreign}, which is no part of a report,"
        raise ConfigError(f"--out {out} holds {what} and would be replaced: choose a new or an empty folder")


def _not_ours(out: Path) -> Iterator[str]:
    """What lies in a report and was not written by this module; W&B's files are known."""
    for top, folders, files in os.walk(out):
        inner = Path(top).relative_to(out)
        if inner == Path():
            folders[:] = [name for name in folders if name != KEPT]
        for name in files:
            if not WRITTEN.fullmatch((inner / name).as_posix()):
                yield str(inner / name)
        for name in folders:
            path = inner / name
            ours = (path.parts[0] == "figures" and len(path.parts) <= 2) or path.as_posix() in (
                "assets",
                "tables",
                "runs",
            )
            if not ours or (out / path).is_symlink():
                yield str(path)


def _beside(out: Path, what: str) -> Path:
    """This process's folder for the report while it is made (tmp) or replaced (old)."""
    return out.with_name(f".{out.name}.{os.getpid()}.{what}")


def _replace(made: Path, out: Path) -> None:
    """Give the finished folder its name; what W&B left in the old one goes along. ``_clean_up`` ends what a kill in here
    leaves half done."""
    old = _beside(out, "old")
    if out.exists():
        out.rename(old)
    try:
        made.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    _drop(old, out)


def _drop(old: Path, out: Path) -> None:
    """Remove a replaced report when W&B's files have moved on."""
    if (old / KEPT).is_dir() and not (out / KEPT).exists():
        (old / KEPT).rename(out / KEPT)
    shutil.rmtree(old, ignore_errors=True)


def _clean_up(out: Path) -> None:
    """Finish what killed builds of ``out`` left: its old report comes back if there is no new one, the rest goes."""
    if not out.parent.is_dir():
        return
    form = re.compile(rf"\.{re.escape(out.name)}\.(\d+)\.(tmp|old)")
    left = [(path, match) for path in out.parent.iterdir() if (match := form.fullmatch(path.name))]
    for path, match in left:
        if _alive(int(match[1])):
            continue
        if match[2] == "tmp":
            shutil.rmtree(path, ignore_errors=True)
        elif not out.exists():
            path.rename(out)
        else:
            _drop(path, out)


def _alive(pid: int) -> bool:
    """Whether another process of this number runs."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
