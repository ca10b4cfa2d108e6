#!/usr/bin/env python3
"""A paper's table or figure beside what was measured: paper, ours (mean, deviation, 95 % interval over seeds), difference.

    python scripts/make_tables.py trap_table1                        runs below outputs, Markdown on the screen
    python scripts/make_tables.py trap_table1 DIR1 DIR2 --format latex
    python scripts/make_tables.py trap_table1 budget=small dataset=photo_digits --measured
    python scripts/make_tables.py trap_table5 train.epochs=30 --out tables

Give the words that the sweep was started with: a run counts for a cell only if all of its settings are the cell's (seed,
hardware and paths do not matter). --out writes NAME.md, NAME.tex and NAME.csv. Exit codes: 0 done, 2 unknown name or
option, 3 a result that cannot be read. docs/tables.md explains the columns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a clone works without being installed

from backdoor_bench import collect, experiments, launch  # noqa: E402
from backdoor_bench.errors import BenchError, ConfigError  # noqa: E402
from backdoor_bench.experiments import Experiment  # noqa: E402
from backdoor_bench.reporting import compare, tables  # noqa: E402
from backdoor_bench.reporting.compare import Comparison, Tolerance  # noqa: E402

CONF = ROOT / "conf"
MAX_TRACKED_ROWS = 10_000


def make(args: argparse.Namespace) -> int:
    """Print the table, write the files that are asked for."""
    experiment = compare.find(CONF, args.table)
    asked = compare.Asked.of(CONF, args.items)
    if args.wandb and args.out is None:
        raise ConfigError("--wandb needs --out DIR: W&B is a mirror of the files there")
    runs = collect.newest(collect.read(asked.roots))
    comparison = compare.compare(
        CONF,
        experiment,
        runs,
        budget=asked.budget,
        chosen=asked.chosen,
        settings=asked.settings,
        tolerance=Tolerance.of(args.tolerance),
    )
    if not comparison.count(compare.MEASURED):
        check_words(experiment, asked)
        hint(comparison, runs)
    texts = render(comparison, args.measured)
    sys.stdout.write(texts[args.format])
    if args.out is not None:
        files = write(texts, args.out, file_name(comparison, asked.chosen))
        if args.wandb:
            track(comparison, args, files)
    return 0


def render(comparison: Comparison, measured_only: bool) -> dict[str, str]:
    """The text of each format; the CSV always has all rows."""
    return {
        "md": tables.markdown(comparison, measured_only),
        "latex": tables.latex(comparison, measured_only),
        "csv": tables.csv_text(comparison),
    }


def check_words(experiment: Experiment, asked: compare.Asked) -> None:
    """Raise ConfigError for a setting that run.py would refuse: it, and no missing run, may be why nothing was found."""
    from hydra.errors import HydraException

    fixed = experiments.budget_groups(CONF, asked.budget)
    job = next((job for job in experiments.jobs(CONF, experiment, asked.chosen, fixed=fixed) if not job.missing), None)
    if job is None or not asked.settings:
        return
    words = [*job.overrides, *map(experiments.subgroup, asked.settings)]
    try:
        launch.check_command(CONF, words)
    except HydraException as error:
        raise ConfigError(launch.explain(error, CONF, words) or str(error)) from None


def hint(comparison: Comparison, runs: compare.Cells) -> None:
    """Say why nothing was found, where the runs there are tell."""
    budgets = {str(cell[5]) for cell in runs if cell[5] is not None}
    others = f"; those there are have the budget {', '.join(sorted(budgets))}" if budgets - {comparison.budget} else ""
    told = f"at budget {comparison.budget}" if comparison.budget else "without a budget"
    collect.to_stderr(
        f"no run of {comparison.name} was found {told}{others}; give the sweep's words (budget=small dataset=...)"
    )


def file_name(comparison: Comparison, chosen: Mapping[str, Sequence[str]]) -> str:
    """The experiment's name, and what was chosen on the command line."""
    from backdoor_bench.results import variant_name
    from backdoor_bench.storage import digest

    words = [f"{group}={'+'.join(values)}" for group, values in chosen.items()] + list(comparison.settings)
    words += [f"budget={comparison.budget}"] if comparison.budget else []
    return f"{comparison.name}-{variant_name(words, digest(words))}" if words else comparison.name


def write(texts: dict[str, str], folder: Path, name: str) -> list[Path]:
    """NAME.md, NAME.tex and NAME.csv in ``folder``."""
    from backdoor_bench.storage import write_text

    files = []
    for form, ending in (("md", "md"), ("latex", "tex"), ("csv", "csv")):
        files.append(folder / f"{name}.{ending}")
        write_text(files[-1], texts[form])
    print(f"written: {', '.join(map(str, files))}", file=sys.stderr)
    return files


def track(comparison: Comparison, args: argparse.Namespace, files: Sequence[Path]) -> None:
    """Mirror the files as one artefact, and the rows as a table, in the sweep's group at W&B."""
    from backdoor_bench import tracking

    config = tracking.load(CONF, args.wandb, args.group or comparison.name)
    about = {"experiment": comparison.name, "budget": comparison.budget, "settings": list(comparison.settings)}
    title = f"table {files[0].stem}"
    tracker = tracking.start(config, args.out, about, title, ("table", comparison.name), collect.to_stderr)
    tracker.artifact(files[0].stem, "table", files)
    tracker.table("table", files[-1], MAX_TRACKED_ROWS)
    counts = {status: comparison.count(status) for status, _ in tables.COUNTED}
    tracker.finish({**counts, "marked": comparison.outside})


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("table", metavar="TABLE", help="an experiment or a printed table: trap_table1, ...")
    made.add_argument(
        "items", nargs="*", metavar="ROOT|KEY=VALUE",
        help="folders with runs below them (outputs), and the words of the sweep: budget=small dataset=cifar10 ...",
    )  # fmt: skip
    made.add_argument("--format", choices=("md", "latex", "csv"), default="md", help="of what is printed; md")
    made.add_argument("--out", type=Path, metavar="DIR", help="write all three formats there as well")
    made.add_argument(
        "--tolerance", action="append", default=[], metavar="POINTS",
        help="POINTS for all shares, METRIC=POINTS, or 'interval' (what our 95 %% interval does not hold is marked); "
        f"may be repeated; {', '.join(f'{metric}={points:g}' for metric, points in compare.TOLERANCE.items())}",
    )  # fmt: skip
    made.add_argument("--measured", action="store_true", help="leave out the rows without a result")
    made.add_argument(
        "--wandb", nargs="?", const="offline", choices=("offline", "online"), help="mirror the table; offline"
    )
    made.add_argument("--group", metavar="NAME", help="its group at W&B: the sweep's name; TABLE")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    args = parser().parse_intermixed_args(argv)
    try:
        return make(args)
    except BenchError as error:
        return launch.fail(str(error), error.exit_code, False)


if __name__ == "__main__":
    sys.exit(main())
