#!/usr/bin/env python3
"""The table of docs/experiments.md, from conf/experiment/*.yaml and the printed tables.

python scripts/list_experiments.py            write it into the page
python scripts/list_experiments.py --check    end with 1 if the page holds another one
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a clone works without being installed

from backdoor_bench import experiments  # noqa: E402

CONF = ROOT / "conf"
PAGE = ROOT / "docs" / "experiments.md"
COMMAND = "python scripts/list_experiments.py"
BEGIN, END = f"<!-- {COMMAND}: begin -->", f"<!-- {COMMAND}: end -->"


def table() -> str:
    """Markdown: of each experiment its jobs, the printed cells they stand for, and the jobs that cannot run yet."""
    lines = [
        "| experiment | what | jobs | printed cells | jobs without a method or data set |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in sorted(experiments.names(CONF), key=_order):
        experiment = experiments.load(CONF, name)
        jobs = experiments.jobs(CONF, experiment)
        cells = {cell for job in jobs for cell in job.printed}
        missing = sorted({word.partition("=")[2] for job in jobs for word in job.missing})
        lacking = f"{sum(bool(job.missing) for job in jobs)}: {', '.join(missing)}" if missing else "0"
        lines.append(f"| `{name}` | {experiment.title.partition(': ')[2]} | {len(jobs)} | {len(cells)} | {lacking} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """``text`` with the table between its two marks made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def _order(name: str) -> tuple[int, str, int]:
    """Papers in the order of the README, tables before figures, by number."""
    paper, _, rest = name.partition("_")
    kind = rest.rstrip("0123456789")
    number = rest.removeprefix(kind)
    return ("trap", "tr", "ebd", "meca").index(paper), {"table": "0", "fig": "1"}.get(kind, kind), int(number or 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    arguments = parser.parse_args()
    now = PAGE.read_text(encoding="utf-8")
    made = page(now)
    if arguments.check:
        if made != now:
            print(f"{PAGE.relative_to(ROOT)} is not up to date: run {COMMAND}", file=sys.stderr)
        return int(made != now)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
