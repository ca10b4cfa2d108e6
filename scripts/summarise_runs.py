#!/usr/bin/env python3
"""All finished runs below some folders as one table: Markdown on the screen, CSV on request.

python scripts/summarise_runs.py outputs
python scripts/summarise_runs.py outputs --epochs                # also what each detection epoch found
python scripts/summarise_runs.py outputs --csv benchmarks/x.csv
python scripts/summarise_runs.py outputs --tidy runs.parquet     # every metric, one row a run and metric; or .csv
python scripts/summarise_runs.py outputs --attacks               # undefended runs beside the papers' values
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backdoor_bench import collect, launch
from backdoor_bench.collect import Run
from backdoor_bench.errors import BenchError
from backdoor_bench.reporting.tables import plain_markdown
from backdoor_bench.results import write_table

ROOT = Path(__file__).resolve().parent.parent
CONF, REFERENCE = ROOT / "conf", ROOT / "backdoor_bench" / "reference"
PAPERS = {"trap": "TRAP", "ebd": "EBD", "tr": "T&R", "meca": "MeCa"}
MAIN_TABLES = {"trap": ("1", "2", "6", "text"), "ebd": ("2",), "tr": ("1", "7"), "meca": ("2", "3")}
STAGES = ("train", "features", "embedding", "clustering", "removal", "total")


def changed(attack: str, config: Mapping[str, Any]) -> str:
    """The keys of ``attack`` that a run had set to something else than conf/attack says, ``key=value`` each."""
    import yaml

    files = {file.stem: file for file in (CONF / "attack").glob("*.yaml")}
    default = yaml.safe_load(files[attack].read_text(encoding="utf-8")) if attack in files else {}
    return ", ".join(_changed("", default, _mapping(config["attack"])))


def _mapping(value: Any) -> Mapping[str, Any]:
    """A section that others wrote; empty where it is none."""
    return value if isinstance(value, Mapping) else {}


def _changed(prefix: str, default: Mapping[str, Any], told: Mapping[str, Any]) -> Iterator[str]:
    for key, value in default.items():
        if isinstance(value, Mapping):
            yield from _changed(f"{prefix}{key}.", value, _mapping(told.get(key)))
        # What refers to other keys (``${seed}``) is no setting of its own.
        elif key in told and told[key] != value and not (isinstance(value, str) and "${" in value):
            yield f"{prefix}{key}={told[key]}"


def row_of(run: Run) -> dict[str, Any]:
    """One run as a flat row; metrics as fractions or None, seconds of each stage. What its files lack is None."""
    undefended, metrics = run.part("undefended"), run.part("metrics")
    train = _mapping(run.config("train"))
    padding = collect.number(_mapping(train.get("augment")).get("crop_padding"))
    row: dict[str, Any] = {name: getattr(run, name) for name in ("dataset", "model", "attack", "defense")}
    row |= {"variant": run.result.get("variant"), "seed": run.seed}
    row |= {f"undefended_{name}": collect.number(undefended.get(name)) for name in ("acc", "asr")}
    row |= {
        name: collect.number(metrics.get(name)) for name in ("acc", "asr", "target_class_acc", "precision", "recall")
    }
    row |= {"attack_settings": changed(run.attack, {"attack": run.config("attack")}), "epochs": train.get("epochs")}
    row |= {"crop_and_flip": (padding or 0) > 0}
    row |= {"asr_floor": collect.number(metrics.get("asr_floor"))}
    row |= {name: run.part("poison").get(name) for name in ("n_train", "n_poisoned", "n_cover", "n_flagged")}
    row |= {f"seconds_{name}": run.part("seconds").get(name) for name in STAGES}
    environment = run.part("environment")
    row |= {name: environment.get(name) for name in ("device", "threads", "embedding", "torch", "git")}
    row |= {"arithmetic": environment.get("precision")}
    return {name: collect.utf8(value) if isinstance(value, str) else value for name, value in row.items()}


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, percentages with two decimals."""
    head = (
        "| data | attack | defence | seed | undefended ACC / ASR | ACC | ASR | target | precision | recall | flagged |"
    )
    lines = [head, "|" + " --- |" * 11]
    for row in rows:
        before = f"{percent(row['undefended_acc'])} / {percent(row['undefended_asr'])}"
        shares = " | ".join(percent(row[key]) for key in ("acc", "asr", "target_class_acc", "precision", "recall"))
        flagged = "-" if row["n_flagged"] is None else row["n_flagged"]
        names = " | ".join(plain_markdown(str(row[key])) for key in ("dataset", "attack", "defense", "seed"))
        lines.append(f"| {names} | {before} | {shares} | {plain_markdown(str(flagged))} |")
    return "\n".join(lines)


def printed(dataset: str) -> dict[str, list[str]]:
    """attack -> the papers' undefended ``PAPER ACC / ASR`` on ``dataset``, at the rates of their main tables."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for file in sorted(REFERENCE.glob("*.csv")):
        with file.open(newline="", encoding="utf-8") as opened:
            for row in csv.DictReader(opened):
                is_main = row["table"] in MAIN_TABLES.get(row["paper"], ()) and row["metric"] in ("acc", "asr")
                if is_main and row["dataset"] == dataset and row["defense"] == "no_defense" and row["value"]:
                    cell = cells.setdefault((row["attack"], row["paper"]), {})
                    cell.setdefault(row["metric"], row["value"])
    found: dict[str, list[str]] = {}
    for (attack, paper), cell in cells.items():
        found.setdefault(attack, []).append(f"{PAPERS[paper]} {cell.get('acc', '-')} / {cell.get('asr', '-')}")
    return found


def attack_table(rows: list[dict[str, Any]]) -> str:
    """The undefended runs by attack: what was poisoned, ACC and ASR, the ASR of a model that never saw the trigger."""
    lines = [
        "| attack | settings | poisoned, cover of images | ACC | ASR | ASR of a clean model | papers: ACC / ASR |",
        "|" + " --- |" * 7,
    ]
    for row in sorted(rows, key=lambda row: (row["attack"], row["attack_settings"])):
        if row["defense"] != "no_defense":
            continue
        counts = plain_markdown(f"{row['n_poisoned']}, {row['n_cover']} of {row['n_train']}")
        shares = " | ".join(percent(row[key]) for key in ("acc", "asr", "asr_floor"))
        papers = "; ".join(printed(row["dataset"]).get(row["attack"], ["-"]))
        settings = f"{row['attack_settings'] or 'default'}, {row['epochs']} epochs"
        settings += "" if row["crop_and_flip"] else ", no crop or flip"
        names = f"{plain_markdown(row['attack'])} | {plain_markdown(settings)}"
        lines.append(f"| {names} | {counts} | {shares} | {papers} |")
    return "\n".join(lines)


def epoch_table(folder: Path) -> str:
    """What each detection epoch found alone and what all so far found, from metrics.csv; empty cells for what a torn file
    lacks."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file))
    by_stage = {
        stage: {str(row.get("epoch")): row for row in rows if row.get("stage") == stage}
        for stage in ("detection", "isolation", "train")
    }
    union, trained = by_stage["isolation"], by_stage["train"]
    lines = [
        "| epoch | ACC / ASR then | flagged | precision | recall | union: precision | recall |",
        "|" + " --- |" * 7,
    ]

    def share(row: Mapping[str, Any], key: str) -> str:
        try:
            return percent(float(row.get(key) or ""))
        except ValueError:
            return "-"

    for epoch, row in by_stage["detection"].items():
        then = " / ".join(share(trained[epoch], key) for key in ("acc", "asr")) if epoch in trained else "-"
        cells = [plain_markdown(epoch), then, plain_markdown(row.get("n_flagged") or "-")]
        cells += [share(row, "precision"), share(row, "recall")]
        cells += [share(union.get(epoch, {}), key) for key in ("precision", "recall")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", nargs="+", type=Path)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--tidy", type=Path, metavar="FILE", help="every metric of every run, .csv or .parquet")
    parser.add_argument("--epochs", action="store_true")
    parser.add_argument("--attacks", action="store_true")
    try:
        return summarise(parser.parse_args(argv))
    except BenchError as error:
        return launch.fail(str(error), error.exit_code, False)


def summarise(arguments: argparse.Namespace) -> int:
    """Print the table and write the files that are asked for."""
    runs = collect.read(arguments.roots)
    if not runs:
        print(f"no finished run below {', '.join(map(str, arguments.roots))}", file=sys.stderr)
        return 2
    rows = [row_of(run) for run in runs]
    print(attack_table(rows) if arguments.attacks else markdown(rows))
    if arguments.epochs:
        for run in runs:
            if run.part("diagnostics") and (run.folder / "metrics.csv").is_file():
                names = f"{run.dataset} {run.attack} {run.defense} seed {run.seed}"
                print(f"\n{plain_markdown(names)}\n")
                try:
                    print(epoch_table(run.folder))
                except (OSError, csv.Error) as error:
                    collect.to_stderr(f"{run.folder / 'metrics.csv'} cannot be read: {error}")
    if arguments.csv:
        write_table(arguments.csv, rows)
    if arguments.tidy:
        collect.write(collect.frame(runs), arguments.tidy)
    return 0


if __name__ == "__main__":
    sys.exit(main())
