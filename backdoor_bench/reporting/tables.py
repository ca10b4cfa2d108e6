"""A comparison with a paper as text: Markdown, LaTeX, and the rows of a CSV file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backdoor_bench import collect
from backdoor_bench.reporting import compare
from backdoor_bench.reporting.compare import Comparison, Row

LABELS = {"acc": "ACC", "asr": "ASR", "acc_std": "ACC std", "asr_std": "ASR std", "mse": "MSE", "time_min": "minutes"}
TEXT = ("attack", "defence", "setting", "metric", "mark")  # columns set to the left
NUMBERS = ("95 % interval", "difference")
COUNTED = (
    (compare.MEASURED, "measured"),
    (compare.NOT_RUN, "not run"),
    (compare.MISSING, "without a file for the method"),
    (compare.INCOMPLETE, "averages over cells that are not all there"),
    (compare.NO_NUMBER, "not the number of one run, or null in it"),
)
LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    '"': r"\textquotedbl{}",
    "'": r"\textquotesingle{}",
    "`": r"\textasciigrave{}",
    **{char: f"{{{char}}}" for char in "[]*"},  # behind the end of a row they would be its options
    "±": r"$\pm$",
    "−": "$-$",
    "×": r"$\times$",
    "–": "--",
    "—": "---",
}
# The letters beyond ASCII that the font encoding of every LaTeX has: others would stop it.
T1 = (
    "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÐÑÒÓÔÕÖØÙÚÛÜÝÞßàáâãäåæçèéêëìíîïðñòóôõöøùúûüýþÿ"
    "ĂăĄąĆćČčĎďĐđĘęĚěĞğİıĹĺĽľŁłŃńŇňŊŋŐőŒœŔŕŘřŚśŞşŠšŢţŤťŮůŰűŸŹźŻżŽž"
)
RECORD = (
    *("paper", "table", "dataset", "model", "attack", "defense", "poison_rate", "metric", "value", "unit", "notes"),
    *("mean", "std", "low", "high", "n", "difference", "within", "status"),
    *("dataset_ours", "model_ours", "budget", "settings", "seeds"),
)  # the columns of ``records``


@dataclass(frozen=True)
class Section:
    """One data set and model: a heading and rows of plain text, one cell a column."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def sections(comparison: Comparison, measured_only: bool = False) -> list[Section]:
    """The rows by data set and model, in order; columns that would be empty in all of them are left out."""
    kept = [row for row in comparison.rows if row.ours is not None or not measured_only]
    rates = {row.rate for row in comparison.rows if row.rate and float(row.rate) > 0}
    columns: dict[str, Callable[[Row], str]] = {
        "attack": lambda row: row.attack,
        "defence": lambda row: row.defense,
        "rate": lambda row: row.rate,
        "setting": lambda row: " ".join(row.settings),
        "metric": lambda row: LABELS.get(row.metric, row.metric.replace("_", " ")),
        "paper": lambda row: number(row.paper, row.unit, as_printed=True),
        "ours": ours,
        "95 % interval": interval,
        "n": lambda row: "" if row.ours is None else str(row.ours.n),
        "difference": lambda row: number(row.difference, row.unit, sign=True),
        "mark": lambda row: "!" if row.within is False else "",
    }
    if len(rates) < 2:
        del columns["rate"]
    for name in ("setting", "paper", "95 % interval", "difference", "mark"):
        if not any(columns[name](row) for row in kept):
            del columns[name]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in kept:
        groups.setdefault((row.table, row.dataset, row.model, *row.on), []).append(row)
    return [
        Section(
            heading(rows[0], comparison),
            tuple(columns),
            tuple(tuple(_plain(show(row)) for show in columns.values()) for row in rows),
        )
        for rows in groups.values()
    ]


def heading(row: Row, comparison: Comparison) -> str:
    """What the rows of one section share: data set and model, as printed and as measured."""
    text = ", ".join(filter(None, (row.dataset, row.model)))
    if row.on != (row.dataset, row.model):
        text += f" (ours: {', '.join(row.on)})"
    if not row.table:
        return f"Not printed: {text}" if text else "Not printed"
    several = len({other.table for other in comparison.rows if other.table}) > 1
    return f"{row.table}: {text}" if several else text


def number(value: float | None, unit: str, *, as_printed: bool = False, sign: bool = False) -> str:
    """Two decimals for shares and minutes, four significant digits for anything else; empty for None."""
    if value is None:
        return ""
    if as_printed:
        return f"{value:.6g}"
    plus = "+" if sign else ""
    return format(value, f"{plus}.2f" if unit in ("%", "min") else f"{plus}.4g")


def ours(row: Row) -> str:
    """The mean with its deviation, or why there is none."""
    if row.ours is None:
        reason = {compare.NOT_RUN: "not run", compare.NO_NUMBER: row.note or "no number", compare.MISSING: row.note}
        return reason.get(row.status, f"incomplete: {row.note}")
    mean = number(row.ours.mean, row.unit)
    return mean if row.ours.std is None else f"{mean} ± {number(row.ours.std, row.unit)}"


def interval(row: Row) -> str:
    if row.ours is None or row.ours.low is None:
        return ""
    return f"[{number(row.ours.low, row.unit)}, {number(row.ours.high, row.unit)}]"


def legend(comparison: Comparison) -> list[str]:
    """What the table holds, as sentences: counts, how it is read, notes on single rows."""
    counts = [f"{n} {what}" for status, what in COUNTED if (n := comparison.count(status))]
    marked = "" if comparison.reduced else f"; {comparison.outside} marked"
    lines = [f"{len(comparison.rows)} rows: {', '.join(counts)}{marked}."]
    if comparison.count(compare.MEASURED):
        lines.append(
            "ours: mean ± sample standard deviation over n seeds; the interval is Student's for the mean, n - 1 degrees of "
            "freedom."
        )
    if any(row.difference is not None for row in comparison.rows):
        lines.append(
            "difference: ours - paper; nothing is marked, because the settings are not the paper's (see the title)."
            if comparison.reduced
            else f"difference: ours - paper; ! marks where {comparison.tolerance.text()}."
        )
    for row in comparison.rows:
        if row.note and row.ours is not None:
            lines.append(
                f"{row.dataset}, {row.attack}, {row.defense}, {LABELS.get(row.metric, row.metric)}: {row.note}."
            )
    return [_plain(line) for line in lines]


def markdown(comparison: Comparison, measured_only: bool = False) -> str:
    """The whole comparison as a Markdown page."""
    lines = [f"# {_markdown(_plain(comparison.title))}"]
    for section in sections(comparison, measured_only):
        lines += ["", f"## {_markdown(section.heading)}", ""]
        lines.append(f"| {' | '.join(section.columns)} |")
        lines.append("|" + "|".join(" --- " if name in TEXT else " ---: " for name in section.columns) + "|")
        for row in section.rows:
            cells = zip(section.columns, row, strict=True)
            lines.append(f"| {' | '.join(text if name in NUMBERS else _markdown(text) for name, text in cells)} |")
    lines += ["", *(f"- {_markdown(line)}" for line in legend(comparison))]
    return "\n".join(lines) + "\n"


def latex(comparison: Comparison, measured_only: bool = False) -> str:
    """The comparison as ``longtable``s, to be read by a document that loads what the first line says."""
    lines = [r"% needs \usepackage[T1]{fontenc} \usepackage{textcomp,booktabs,longtable}"]
    lines.append(rf"\paragraph{{{_latex(_plain(comparison.title))}}}")
    for section in sections(comparison, measured_only):
        form = "".join("l" if name in TEXT else "r" for name in section.columns)
        lines += [
            "",
            rf"\begin{{longtable}}{{{form}}}",
            rf"\multicolumn{{{len(form)}}}{{l}}{{\textbf{{{_latex(section.heading)}}}}} \\",
            r"\toprule",
            rf"{' & '.join(map(_latex, section.columns))} \\",
            r"\midrule",
            r"\endhead",
            r"\bottomrule",
            r"\endfoot",
        ]
        for row in section.rows:
            cells = zip(section.columns, row, strict=True)
            lines.append(
                " & ".join(_minus(_latex(text)) if name in NUMBERS else _latex(text) for name, text in cells) + r" \\"
            )
        lines.append(r"\end{longtable}")
    lines += ["", *(rf"\noindent {_latex(line)}\par" for line in legend(comparison))]
    return "\n".join(lines) + "\n"


def records(comparison: Comparison) -> list[dict[str, Any]]:
    """One row a printed number: the columns of the printed tables, then ours (mean ... difference, in their unit; within:
    1, 0 or empty as ``Tolerance.judge`` says) and what it was measured with."""
    found = []
    for row in comparison.rows:
        paper, _, table = row.table.partition("_")
        numbers = {name: getattr(row.ours, name, None) for name in ("mean", "std", "low", "high")}
        found.append(
            {
                "paper": paper,
                "table": table.removeprefix("table"),
                **{name: getattr(row, name) for name in ("dataset", "model", "attack", "defense")},
                "poison_rate": row.rate,
                "metric": row.metric,
                "value": _rounded(row.paper),
                "unit": row.unit,
                "notes": row.note,
                **{name: _rounded(value) for name, value in numbers.items()},
                "n": 0 if row.ours is None else row.ours.n,
                "difference": _rounded(row.difference),
                "within": None if row.within is None else int(row.within),
                "status": row.status,
                "dataset_ours": row.on[0],
                "model_ours": row.on[1],
                "budget": comparison.budget,
                "settings": " ".join(compare.merged(row.settings, comparison.settings)),
                "seeds": " ".join(map(str, sorted({run.seed for run in row.runs}))),
            }
        )
    return found


def _rounded(value: float | None) -> float | None:
    """Without the last bits, which say nothing."""
    return None if value is None else round(value, 6)


def csv_text(comparison: Comparison) -> str:
    """``records`` as the text of a CSV file."""
    import csv
    import io

    from backdoor_bench.reporting.summary import csv_safe

    text = io.StringIO(newline="")
    rows = records(comparison)
    writer = csv.DictWriter(text, RECORD, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value is None else csv_safe(value) for name, value in row.items()} for row in rows)
    return collect.utf8(text.getvalue())


def _plain(text: str) -> str:
    """One line: control characters and runs of blanks become a blank."""
    return collect.utf8(re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text).strip())


def plain_markdown(text: str) -> str:
    """Any text as one line of plain text inside a Markdown table."""
    return _markdown(_plain(text))


def _markdown(text: str) -> str:
    text = re.sub(r"([\\`*\[\]|<>&$~])", r"\\\1", text)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def _latex(text: str) -> str:
    return "".join(LATEX.get(char) or (char if char.isascii() or char in T1 else "?") for char in text)


def _minus(text: str) -> str:
    return re.sub(r"-(?=\d)", "$-$", text)
