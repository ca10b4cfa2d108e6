#!/usr/bin/env python3
"""Send runs that were tracked offline to Weights & Biases (needs ``wandb login`` or WANDB_API_KEY).

python scripts/sync_wandb.py                    # all below outputs that have not been sent yet
python scripts/sync_wandb.py DIR ... --dry-run  # only list them
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from backdoor_bench.processes import is_held
from backdoor_bench.progress import tell

_FOLDER = re.compile(r"offline-run-(\d{8}_\d{6})-(\w+)")
_AT_ONCE = 50  # folders in one call of wandb: command lines have a limit


@dataclass(frozen=True)
class Offline:
    """A start of a run that W&B kept in files. run_dir: of the benchmark's run; id: W&B's, the same for every start of
    one run; started: as in the folder's name, which sorts."""

    folder: Path
    run_dir: Path
    id: str
    started: str
    synced: bool


def offline_runs(roots: Sequence[Path]) -> Iterator[Offline]:
    """What there is below some folders, in order of time: the starts of a resumed run must be sent in theirs."""
    folders = {folder for root in roots for folder in root.rglob("tracking/wandb/offline-run-*") if folder.is_dir()}
    found = [(match[1], folder, match[2]) for folder in folders if (match := _FOLDER.fullmatch(folder.name))]
    for started, folder, run_id in sorted(found):
        files = list(folder.glob("run-*.wandb"))
        if files:
            synced = all(file.with_name(f"{file.name}.synced").exists() for file in files)
            yield Offline(folder, folder.parent.parent.parent, run_id, started, synced)


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when everything is sent, 1 when wandb could not, 2 for a folder that is not there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("outputs")], help="output roots or run folders")
    parser.add_argument("--dry-run", action="store_true", help="list what would be sent and stop")
    options = parser.parse_args(argv)
    absent = [folder for folder in options.folders if not folder.is_dir()]
    if absent:
        print(f"error: {absent[0]} is no folder; give the output_root of your runs", file=sys.stderr)
        return 2
    runs = list(offline_runs(options.folders))
    unsent = [run for run in runs if not run.synced]
    # What a run that goes on has written so far would count as all of it.
    going = {run.run_dir for run in unsent if is_held(run.run_dir / ".lock")}
    waiting = [run for run in unsent if run.run_dir not in going]
    tell(f"{len(runs)} offline runs, {len(runs) - len(unsent)} of them sent before, {len(waiting)} to send")
    for folder in sorted(going):
        tell(f"  left out, it is still running: {folder}")
    for run in waiting:
        tell(f"  {run.started}  {run.id}  {run.run_dir}")
    if options.dry_run or not waiting:
        return 0
    failed = 0
    for start in range(0, len(waiting), _AT_ONCE):
        folders = [str(run.folder) for run in waiting[start : start + _AT_ONCE]]
        failed += subprocess.run([sys.executable, "-m", "wandb", "sync", *folders], check=False).returncode != 0
    left = sum(not run.synced and run.run_dir not in going for run in offline_runs(options.folders))
    if failed or left:
        print(
            f"error: {left} runs were not sent; check `wandb login` and the network, then run the same command again",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
