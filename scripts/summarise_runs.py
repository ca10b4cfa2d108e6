#!/usr/bin/env python3
"""All finished runs below some folders as one table: Markdown on the screen, CSV on request.

python scripts/summarise_runs.py outputs
python scripts/summarise_runs.py outputs --epochs                # also what each detection epoch found
python scripts/summarise_runs.py outputs --csv benchmarks/x.csv
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
STAGES = ("train", "features", "embedding", "clustering", "removal", "total")


def finished(roots: list[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(folder, result) of every readable result.json, sorted; a torn one is named on standard error."""
    for file in sorted(path for root in roots for path in root.rglob("result.json")):
        try:
            yield file.parent, json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            print(f"{file} is torn and left out", file=sys.stderr)


def row_of(result: dict[str, Any]) -> dict[str, Any]:
    """One run as a flat row; metrics as fractions or None, seconds of each stage."""
    undefended, metrics = result["undefended"] or {}, result["metrics"]
    row = {name: result[name] for name in NAMES}
    row |= {f"undefended_{name}": undefended.get(name) for name in ("acc", "asr")}
    row |= {name: metrics.get(name) for name in ("acc", "asr", "target_class_acc", "precision", "recall")}
    row |= {"n_poisoned": result["poison"]["n_poisoned"], "n_flagged": result["poison"]["n_flagged"]}
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
    arguments = parser.parse_args(argv)
    found = list(finished(arguments.roots))
    if not found:
        print(f"no finished run below {', '.join(map(str, arguments.roots))}", file=sys.stderr)
        return 2
    rows = [row_of(result) for _, result in found]
    print(markdown(rows))
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
