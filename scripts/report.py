#!/usr/bin/env python3
"""One static site of all finished runs: leaderboard, charts, the papers' tables, a page for each run.

    python scripts/report.py outputs --out report                then open report/index.html, no server is needed
    python scripts/report.py DIR1 DIR2 --out report --figures link
    python scripts/report.py outputs --out report train.epochs=30

DIR of --out must be new, empty, or an earlier report with nothing else in it, which is replaced. Needs the packages of the
extra 'report'. Exit codes: 0 done, 2 unknown name or option, 3 a result that cannot be read, 6 the site cannot be written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a clone works without being installed

from backdoor_bench import collect, launch  # noqa: E402
from backdoor_bench.errors import BenchError, ConfigError  # noqa: E402
from backdoor_bench.reporting import site  # noqa: E402
from backdoor_bench.reporting.compare import Asked, Tolerance  # noqa: E402

CONF = ROOT / "conf"
MAX_TRACKED_ROWS = 10_000


def track(out: Path, mode: str, group: str | None, runs: int) -> None:
    """Mirror the site as one artefact, and its table of all numbers, at W&B."""
    from backdoor_bench import tracking

    config = tracking.load(CONF, mode, group)
    tracker = tracking.start(config, out, {"runs": runs}, f"report {out.name}", ("report",), collect.to_stderr)
    parts = [path for path in sorted(out.iterdir()) if path.name != site.KEPT]
    tracker.artifact(f"report-{out.name}", "report", parts)
    tracker.table("runs", out / "runs.csv", MAX_TRACKED_ROWS)
    rows = len((out / "runs.csv").read_text(encoding="utf-8").splitlines()) - 1
    if rows > MAX_TRACKED_ROWS:
        collect.to_stderr(f"W&B's table has the first {MAX_TRACKED_ROWS:,} of {rows:,} rows; runs.csv has them all")
    tracker.finish({"runs": runs})


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "items", nargs="+", metavar="ROOT|KEY=VALUE",
        help="folders with runs below them, and other settings that the tables' sweeps were started with",
    )  # fmt: skip
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="the site's folder")
    made.add_argument(
        "--figures", choices=site.FIGURES, default="copy",
        help="pictures of the runs: copied (as hard links where possible), linked to where they lie, or left out; copy",
    )  # fmt: skip
    made.add_argument(
        "--tolerance", action="append", default=[], metavar="POINTS",
        help="POINTS, METRIC=POINTS or 'interval', as for make_tables.py",
    )  # fmt: skip
    made.add_argument(
        "--wandb", nargs="?", const="offline", choices=("offline", "online"), help="mirror the site; offline"
    )
    made.add_argument("--group", metavar="NAME", help="its group at W&B, the name of a sweep; none")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code; the last line printed is the page to open."""
    args = parser().parse_intermixed_args(argv)
    try:
        out = args.out.expanduser().resolve()
        asked = Asked.of(CONF, args.items)
        if asked.chosen or asked.budget:
            raise ConfigError("the report shows every data set, network, method and budget: choose them on its pages")
        options = site.Options(args.figures, asked.settings, Tolerance.of(args.tolerance))
        runs = site.build(CONF, asked.roots, out, options)
        if args.wandb:
            track(out, args.wandb, args.group, runs)
    except BenchError as error:
        return launch.fail(str(error), error.exit_code, False)
    print(collect.utf8(f"{runs} runs: {out / 'index.html'}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
