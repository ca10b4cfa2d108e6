#!/usr/bin/env python3
"""Poison a data set and write it in an open format, for other tools and for attack=import.

    python scripts/export_poisoned.py attack=badnets dataset=photo_digits --out DIR
    python scripts/export_poisoned.py attack=sig attack.delta_train=20 seed=1 --out DIR --format folder

The words with = are those of run.py. DIR must be new or empty; it appears when everything is written: poisoned.npz, or
train.csv, test.csv, cases.csv and PNG files; README.md and card.json, which say what it is; SHA256SUMS. The format is
described in backdoor_bench/data/poisoned_files.py. Exit codes: those of run.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a clone works without being installed

from backdoor_bench import launch  # noqa: E402
from backdoor_bench.errors import ConfigError, DiskError  # noqa: E402

if TYPE_CHECKING:
    from backdoor_bench.data.poisoned_files import TestImages
    from backdoor_bench.plan import Plan
    from backdoor_bench.types import Dataset, PoisonedSet

CONF = ROOT / "conf"
PRIVATE = (
    "root",
    "path",
    "cache_dir",
    "truth",
    "download",
    "verify",
)  # keys that say where files lie, not what they are
LICENCE = (
    "The images keep the licence of the data set they come from, here with a trigger on some of them; ask its owners "
    "before you pass them on. The program that poisoned them is under the MIT licence."
)


def export(plan: Plan, out: Path, form: str) -> Path:
    """Poison as ``plan`` says and write folder ``out``; returns it. ``form``: npz or folder."""
    from backdoor_bench import assemble
    from backdoor_bench.data import poisoned_files
    from backdoor_bench.progress import RichProgress
    from backdoor_bench.storage import write_json, write_text

    if not plan.poisons or getattr(plan.attack, "controls_training", False):
        told = "owns the training loss, which no data set can hold" if plan.poisons else "poisons nothing"
        raise ConfigError(f"attack={plan.names['attack']} {told}: choose another attack to export")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there already; choose a new or an empty folder")
    plan.hardware.apply()
    out, progress = out.resolve(), RichProgress()
    dataset, holdout = assemble.load(plan, progress)
    run = assemble.prepare_run(plan, dataset, progress, {}, holdout)
    poisoned = plan.attack.poison(assemble.attacker_view(run, dataset))
    tests = triggered(run, dataset, poisoned)
    if poisoned.train.augment is not None:
        progress.warn("the attack's own augmentation cannot be written: whoever trains on the files trains without it")

    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        remove_stale(out)
        temporary.mkdir(parents=True)
        if form == "npz":
            poisoned_files.write_npz(temporary, poisoned, tests)
        else:
            poisoned_files.write_folder(temporary, poisoned, tests, progress)
        about = card(plan, dataset, poisoned, tests, holdout=0 if holdout is None else len(holdout))
        write_json(temporary / "card.json", about)
        write_text(temporary / "README.md", readme(about, form))
        poisoned_files.write_sums(temporary)
        sync(temporary)
        temporary.replace(out)
        sync(out.parent)
    except OSError as error:
        raise DiskError(
            f"could not write {out}: {error.strerror or error}; free space or choose another --out"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def triggered(run: Any, dataset: Dataset, poisoned: PoisonedSet) -> list[TestImages]:
    """The triggered test sets as the evaluator stamps them, with the true labels."""
    import torch

    from backdoor_bench.assemble import evaluator_for
    from backdoor_bench.data.poisoned_files import TestImages
    from backdoor_bench.types import ImageSet, StoredCase

    found = []
    for case, images, wanted in evaluator_for(run, dataset, poisoned).stamped():
        if isinstance(case, StoredCase):
            true_labels = torch.full((len(wanted),), -1)
        else:
            assert dataset.test is not None
            true_labels = dataset.test.labels[case.pool(dataset.test.labels)]
        test = ImageSet(images, wanted, dataset.train.num_classes)
        found.append(TestImages(StoredCase(case.name, test, case.target_class, case.counts, case.group), true_labels))
    return [one for one in found if len(one.true_labels)]


def card(
    plan: Plan, dataset: Dataset, poisoned: PoisonedSet, tests: Sequence[TestImages], holdout: int
) -> dict[str, Any]:
    """What the files hold and where they come from, as plain values; the same for the same files."""
    from backdoor_bench import __version__

    ids = poisoned.trigger_id[poisoned.is_poisoned]

    def part(group: str) -> dict[str, Any]:
        name = plan.names[group]
        return {"name": name, "about": header(group, name), "config": open_part(plan.config[group])}

    return {
        "format": "backdoor_bench poisoned set",
        "format_version": 1,
        "made_by": f"backdoor_bench {__version__}",
        "attack": part("attack"),
        "dataset": {**part("dataset"), "class_names": list(dataset.class_names)},
        "seed": plan.seed,
        "holdout_left_out": holdout,
        "counts": {
            "train": len(poisoned.train),
            "poisoned": int(poisoned.is_poisoned.sum()),
            "cover": int(poisoned.is_cover.sum()),
            "poisoned_by_trigger": {str(k): int((ids == k).sum()) for k in ids.unique().tolist()},
            "classes": poisoned.train.num_classes,
            "image_size": poisoned.train.images.shape[-1],
        },
        "tests": [
            {
                "name": test.case.name,
                "images": len(test.case.test),
                "target_class": test.case.target_class,
                "counts": test.case.counts,
            }
            for test in tests
        ],
        "own_augmentation": poisoned.train.augment is not None,
        "licence": LICENCE,
    }


def readme(about: Mapping[str, Any], form: str) -> str:
    """The data card in Markdown."""
    counts, attack, dataset = about["counts"], about["attack"], about["dataset"]
    size = counts["image_size"]
    tests = "\n".join(
        f"| {test['name']} | {test['images']} | {'several' if test['target_class'] is None else test['target_class']} | "
        f"{'yes' if test['counts'] else 'listed only'} |"
        for test in about["tests"]
    )
    keys = "\n".join(f"- `{key}`: {value}" for key, value in attack["config"].items())
    path = "DIR/poisoned.npz" if form == "npz" else "DIR"
    left_out = f" (without a holdout of {about['holdout_left_out']})" if about["holdout_left_out"] else ""
    own = (
        "The attack augments its training images itself; that is not in these files.\n\n"
        if about["own_augmentation"]
        else ""
    )
    return f"""# Poisoned data set: {attack["name"]} on {dataset["name"]}

**These images carry a backdoor on purpose.** They are for research on defences; a model trained on them misbehaves.

{counts["train"]} training images{left_out} of {size} x {size} pixels, {counts["classes"]} classes; {counts["poisoned"]} are
poisoned (trigger and attacker's label), {counts["cover"]} are cover images (trigger, true label). Seed {about["seed"]}.

| triggered test set | images | wanted class | counts for the ASR |
| --- | --- | --- | --- |
{tests}

{own}## Attack
{attack["about"]}

{keys}

## Source of the images
{dataset["about"]} Classes: {", ".join(dataset["class_names"])}.

## Licence
{about["licence"]}

## Files
`SHA256SUMS` lists all of them (`sha256sum -c SHA256SUMS`), `card.json` holds this page for programs. The arrays and columns
are described in `backdoor_bench/data/poisoned_files.py`. To measure a defence on them:

    python run.py dataset={dataset["name"]} attack=import attack.path={path}

Made by {about["made_by"]}.
"""


def header(group: str, name: str) -> str:
    """The comment at the top of a configuration file: what it is and its sources."""
    lines = (CONF / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    top = lines[: next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    return " ".join(line.removeprefix("#").strip() for line in top)


def open_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what only this machine understands: of a path its last part stays."""
    return {
        key: open_part(value)
        if isinstance(value, Mapping)
        else Path(value).name
        if isinstance(value, str) and "/" in value
        else value
        for key, value in config.items()
        if key not in PRIVATE and not key.startswith("_")
    }


def remove_stale(out: Path) -> None:
    """Delete what killed exports to ``out`` left beside it (that of living processes stays)."""
    for folder in out.parent.glob(".*.tmp"):
        name, _, owner = folder.stem.rpartition(".")
        if (
            name == f".{out.name}"
            and owner.isdigit()
            and (owner == str(os.getpid()) or not Path(f"/proc/{owner}").exists())
        ):
            shutil.rmtree(folder, ignore_errors=True)


def sync(folder: Path) -> None:
    """Have everything in ``folder`` on the disk before it gets its name."""
    for path in [*folder.rglob("*"), folder] if folder.name.endswith(".tmp") else [folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code; the last line printed is the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="as for run.py: attack=..., dataset=..., seed=..."
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--format", choices=("npz", "folder"), default="npz", help="one NPZ file, or images and tables")
    args = parser.parse_intermixed_args(arguments)
    words = list(args.overrides)
    if not any(word.startswith("defense=") for word in words):
        words.append("defense=no_defense")  # plays no part, and refuses nothing
    return launch.main(lambda plan: export(plan, args.out.expanduser(), args.format), CONF, words)


if __name__ == "__main__":
    sys.exit(main())
