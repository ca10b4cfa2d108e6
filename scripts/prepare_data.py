#!/usr/bin/env python3
"""Fetch, unpack and check a data set, so that run.py finds it.

    python scripts/prepare_data.py cifar10 --root DIR                        fetch what is missing, then check
    python scripts/prepare_data.py tinyimagenet --root DIR --from-archive FILE   unpack FILE into DIR, then check
    python scripts/prepare_data.py folder --root DIR --set on_error=skip     check your own images

Afterwards set dataset.root=DIR or the environment variable BACKDOOR_BENCH_DATA. Exit codes: 0 done, 2 bad argument,
3 bad data, 6 disk.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a clone works without being installed

from backdoor_bench.data.archives import extract  # noqa: E402
from backdoor_bench.data.fetch import check_md5  # noqa: E402
from backdoor_bench.errors import BenchError, ConfigError  # noqa: E402
from backdoor_bench.types import Dataset  # noqa: E402

CONFIGS = ROOT / "conf" / "dataset"
FETCHED = ("cifar10", "cifar100", "gtsrb", "imagenette")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code; one line about the data set, or one message about what is wrong, is printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    parser.add_argument("--root", type=Path, help="folder of the data (dataset.root)")
    parser.add_argument("--from-archive", type=Path, metavar="FILE", help="zip or tar to unpack into the root first")
    parser.add_argument("--md5", help="refuse FILE unless it has this MD5")
    parser.add_argument("--cache", type=Path, default=Path("outputs/cache"), help="for lists and large arrays")
    parser.add_argument("--no-fetch", action="store_true", help="only check what is there")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another value of the YAML")
    args = parser.parse_args(arguments)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        if args.from_archive:
            if not args.root:
                raise ConfigError("--from-archive needs --root, the folder to unpack into")
            if args.md5:
                check_md5(args.from_archive, args.md5, "fetch it again")
            for path in extract(args.from_archive, args.root):
                print(f"unpacked {path}")
        fields = read_fields(args.name, args.cache, args.set)
        if args.root:
            if "root" not in fields:
                raise ConfigError(f"--root is not allowed: {args.name} is made, not read")
            fields["root"] = str(args.root)
        if args.name in FETCHED and not args.no_fetch and not args.from_archive:
            fields["download"] = True
        print(describe(args.name, build(fields).load()))
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def read_fields(name: str, cache: Path, changes: Sequence[str]) -> dict[str, Any]:
    """The values of ``conf/dataset/<name>.yaml`` with ``changes`` (KEY=VALUE, YAML) made."""
    fields: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    if "cache_dir" in fields:
        fields["cache_dir"] = str(cache)
    for change in changes:
        key, _, value = change.partition("=")
        if key not in fields or key.startswith("_"):
            known = ", ".join(sorted(key for key in fields if not key.startswith("_")))
            raise ConfigError(f"--set {change}: {name} has no key {key!r}; it has {known}")
        try:
            fields[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {change} is not allowed: the value is not YAML") from error
    return fields


def build(fields: dict[str, Any]) -> Any:
    """The loader that ``_target_`` names, which must be one of ours."""
    module, _, cls = str(fields["_target_"]).rpartition(".")
    if not module.startswith("backdoor_bench.data."):
        raise ConfigError(f"_target_={fields['_target_']} is not allowed: a loader of backdoor_bench.data is needed")
    values = {key: value for key, value in fields.items() if not key.startswith("_")}
    return getattr(importlib.import_module(module), cls)(**values)


def describe(name: str, data: Dataset) -> str:
    """One line: sizes, classes, and the range of class sizes."""
    sizes = data.train.labels.bincount(minlength=data.train.num_classes)
    test = "no test set" if data.test is None else f"{len(data.test)} test images"
    shape = " x ".join(map(str, data.train.images.shape[1:]))
    return (
        f"{name}: {len(data.train)} training images, {test}, {shape}, {data.train.num_classes} classes of "
        f"{int(sizes.min())} to {int(sizes.max())} images"
    )


if __name__ == "__main__":
    sys.exit(main())
