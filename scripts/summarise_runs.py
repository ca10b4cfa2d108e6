#!/usr/bin/env python3
"""All finished runs below some folders as one table: Markdown on the screen, CSV on request.

python scripts/summarise_runs.py outputs
python scripts/summarise_runs.py outputs --epochs                # also what each detection epoch found
python scripts/summarise_runs.py outputs --csv benchmarks/x.csv
python scripts/summarise_runs.py outputs --attacks               # undefended runs beside the papers' values
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backdoor_bench.results import write_table

NAMES = ("dataset", "model", "attack", "defense", "variant", "seed")
ROOT = Path(__file__).resolve().parent.parent
CONF, REFERENCE = ROOT / "conf", ROOT / "backdoor_bench" / "reference"
PAPERS = {"trap": "TRAP", "ebd": "EBD", "tr": "T&R", "meca": "MeCa"}
MAIN_TABLES = {"trap": ("1", "2", "6", "text"), "ebd": ("2",), "tr": ("1", "7"), "meca": ("2", "3")}
STAGES = ("train", "features", "embedding", "clustering", "removal", "total")


def finished(roots: list[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(folder, result) of every readable result.json, sorted; a torn one is named on standard error."""
    for file in sorted(path for root in roots for path in root.rglob("result.json")):
        try:
            yield file.parent, json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            print(f"{file} is torn and left out", file=sys.stderr)


def changed(attack: str, config: dict[str, Any]) -> str:
    """The keys of ``attack`` that a run had set to something else than conf/attack says, ``key=value`` each."""
    import yaml

    default = yaml.safe_load((CONF / "attack" / f"{attack}.yaml").read_text(encoding="utf-8"))
    return ", ".join(_changed("", default, config["attack"]))


def _changed(prefix: str, default: dict[str, Any], told: dict[str, Any]) -> Iterator[str]:
    for key, value in default.items():
        if isinstance(value, dict):
            yield from _changed(f"{prefix}{key}.", value, told.get(key, {}))
        # What refers to other keys (``${seed}``) is no setting of its own.
        elif key in told and told[key] != value and not (isinstance(value, str) and "${" in value):
            yield f"{prefix}{key}={told[key]}"


def row_of(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """One run as a flat row; metrics as fractions or None, seconds of each stage."""
    import yaml

    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    undefended, metrics = result["undefended"] or {}, result["metrics"]
    row = {name: result[name] for name in NAMES}
    row |= {f"undefended_{name}": undefended.get(name) for name in ("acc", "asr")}
    row |= {name: metrics.get(name) for name in ("acc", "asr", "target_class_acc", "precision", "recall")}
    row |= {"attack_settings": changed(row["attack"], config), "epochs": config["train"]["epochs"]}
    row |= {"crop_and_flip": config["train"].get("augment", {}).get("crop_padding", 0) > 0}
    row |= {"asr_floor": metrics.get("asr_floor")}
    row |= {name: result["poison"][name] for name in ("n_train", "n_poisoned", "n_cover", "n_flagged")}
    row |= {f"seconds_{name}": result["seconds"].get(name) for name in STAGES}
    environment = result["environment"]
    row |= {name: environment[name] for name in ("device", "threads", "embedding", "torch", "git")}
    return row | {"arithmetic": environment["precision"]}


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
        names = " | ".join(str(row[key]) for key in ("dataset", "attack", "defense", "seed"))
        lines.append(f"| {names} | {before} | {shares} | {flagged} |")
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
        counts = f"{row['n_poisoned']}, {row['n_cover']} of {row['n_train']}"
        shares = " | ".join(percent(row[key]) for key in ("acc", "asr", "asr_floor"))
        papers = "; ".join(printed(row["dataset"]).get(row["attack"], ["-"]))
        settings = f"{row['attack_settings'] or 'default'}, {row['epochs']} epochs"
        settings += "" if row["crop_and_flip"] else ", no crop or flip"
        lines.append(f"| {row['attack']} | {settings} | {counts} | {shares} | {papers} |")
    return "\n".join(lines)


def epoch_table(folder: Path) -> str:
    """What each detection epoch found alone and what all so far found, from metrics.csv."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    alone = {row["epoch"]: row for row in rows if row["stage"] == "detection"}
    union = {row["epoch"]: row for row in rows if row["stage"] == "isolation"}
    trained = {row["epoch"]: row for row in rows if row["stage"] == "train"}
    lines = [
        "| epoch | ACC / ASR then | flagged | precision | recall | union: precision | recall |",
        "|" + " --- |" * 7,
    ]

    def share(row: dict[str, str], key: str) -> str:
        return percent(float(row[key]) if row[key] else None)

    for epoch, row in alone.items():
        then = " / ".join(share(trained[epoch], key) for key in ("acc", "asr")) if epoch in trained else "-"
        cells = [epoch, then, row["n_flagged"], share(row, "precision"), share(row, "recall")]
        cells += [share(union[epoch], "precision"), share(union[epoch], "recall")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", nargs="+", type=Path)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--epochs", action="store_true")
    parser.add_argument("--attacks", action="store_true")
    arguments = parser.parse_args(argv)
    found = list(finished(arguments.roots))
    if not found:
        print(f"no finished run below {', '.join(map(str, arguments.roots))}", file=sys.stderr)
        return 2
    rows = [row_of(folder, result) for folder, result in found]
    print(attack_table(rows) if arguments.attacks else markdown(rows))
    if arguments.epochs:
        for folder, result in found:
            if result["diagnostics"]:
                print(f"\n{result['dataset']} {result['attack']} {result['defense']} seed {result['seed']}\n")
                print(epoch_table(folder))
    if arguments.csv:
        write_table(arguments.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
