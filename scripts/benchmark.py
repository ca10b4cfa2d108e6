#!/usr/bin/env python3
"""Measure how fast this machine runs the project, and compare with the project's targets.

    python scripts/benchmark.py          everything a CPU can do, about five minutes
    python scripts/benchmark.py --quick  without whole runs, about one minute

Times are wall-clock seconds on the machine as it is: other work on it counts.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import io
import json
import operator
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.utils import instantiate
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a clone works without being installed

from backdoor_bench.cache import Stages  # noqa: E402
from backdoor_bench.detection.embedding import embed  # noqa: E402
from backdoor_bench.detection.features import extract_features  # noqa: E402
from backdoor_bench.detection.transforms import Composition, Transformed  # noqa: E402
from backdoor_bench.progress import QuietProgress  # noqa: E402
from backdoor_bench.results import environment  # noqa: E402
from backdoor_bench.training.fit import fit  # noqa: E402
from backdoor_bench.types import AttackerView, ImageSet  # noqa: E402

# Attacks that train nothing; those that are not there are left out.
STATIC = (
    "badnets", "badnets_white", "badnets_grid", "badnets_all2all", "blend_strip", "blend_kitty", "sig", "trojan",
    "trojan_sq", "trojan_wm", "l0_inv", "l2_inv", "smooth", "instagram", "wanet", "tact", "adap_blend", "physical",
    "adap_patch", "multi_1trig_2target", "multi_2trig_2target",
)  # fmt: skip
SLOW = ("wanet", "instagram")
IMAGES, MAP_SAMPLES = 50_000, 5_000  # CIFAR-10's, the default run's
COLUMNS = ("what", "target", "measured", "unit", "ok", "commit", "device", "threads", "date")


@dataclass(frozen=True)
class Measure:
    """One line of the table. limit: most (``at_least``: least) that is wanted, None where nothing is promised."""

    what: str
    value: float
    unit: str = "s"
    limit: float | None = None
    at_least: bool = False

    @property
    def ok(self) -> bool | None:
        """Whether the target is met; None without one."""
        met = operator.ge if self.at_least else operator.le
        return None if self.limit is None else met(self.value, self.limit)

    @property
    def target(self) -> str:
        """``<= 5 s``, or nothing."""
        return "" if self.limit is None else f"{'>=' if self.at_least else '<='} {number(self.limit)} {self.unit}"


def number(value: float) -> str:
    """Three significant digits, without exponents."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def show(measures: Sequence[Measure], title: str) -> str:
    """The table as text."""
    table = Table("what", box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for name in ("target", "measured", "ok?"):
        table.add_column(name, justify="right")
    for one in measures:
        verdict = {None: "", True: "yes", False: "NO"}[one.ok]
        table.add_row(one.what, one.target, f"{number(one.value)} {one.unit}", verdict)
    Console(file=(text := io.StringIO()), width=120).print(table)
    return text.getvalue()


def append_csv(path: Path, measures: Sequence[Measure], context: Mapping[str, Any]) -> None:
    """Add one row a measure to ``path``, with a heading where the file is new. context: the last four of COLUMNS."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        for one in measures:
            ok = "" if one.ok is None else int(one.ok)
            own = {"what": one.what, "target": one.target, "measured": f"{one.value:.6g}", "unit": one.unit, "ok": ok}
            writer.writerow({**own, **context})


def command(*arguments: str, code: int = 0) -> float:
    """Seconds of ``python run.py ARGUMENTS``; ends the program unless it ends with ``code``."""
    start, words = time.perf_counter(), [sys.executable, "run.py", *arguments]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != code:
        raise SystemExit(f"run.py {' '.join(arguments)} ended with {done.returncode}, not {code}:\n{done.stderr}")
    return seconds


def starts(repeats: int) -> Iterator[Measure]:
    """The quickest of several starts: the first one also reads the libraries from disk."""
    yield Measure("run.py --help", min(command("--help") for _ in range(repeats)), limit=2)
    yield Measure(
        "a configuration error", min(command("attack.poison_rate=2", code=2) for _ in range(repeats)), limit=3
    )


def compose(*overrides: str) -> argparse.Namespace:
    """The objects of a configuration, made as run.py makes them."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = hydra_compose("config", list(overrides))
    hardware = instantiate(config.hardware).resolve()
    train = instantiate(config.train, _partial_=True)(hardware=hardware)
    parts = {"attack": config.attack, "model": config.model, "isolation": config.defense.isolation}
    return argparse.Namespace(hardware=hardware, train=train, **{key: instantiate(node) for key, node in parts.items()})


def synthetic(count: int) -> ImageSet:
    """``count`` random images of CIFAR-10's shape, ten classes."""
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(images, torch.arange(count) % 10, 10)


def poisoning(hardware: Sequence[str], train: ImageSet) -> Iterator[Measure]:
    """Seconds of each static attack on ``train`` on the CPU; the most memory one takes beside the clean images."""
    unused: Any = None
    most, quiet = 0.0, QuietProgress()
    for name in (name for name in STATIC if (ROOT / "conf" / "attack" / f"{name}.yaml").exists()):
        parts = compose(f"attack={name}", *hardware)
        with tempfile.TemporaryDirectory() as folder:
            view = AttackerView(
                train=train, num_classes=10, new_model=unused, train_config=parts.train, progress=quiet,
                generator=torch.Generator().manual_seed(0), device=torch.device("cpu"),
                stages=Stages(Path(folder), name, quiet, {}, unused), learned=unused,
            )  # fmt: skip
            with contextlib.suppress(OSError):  # forget the peak so far; the next one is then this attack's
                Path("/proc/self/clear_refs").write_text("5")
            before, start = memory_mib("VmRSS"), time.perf_counter()
            parts.attack.poison(view)
            seconds, most = time.perf_counter() - start, max(most, memory_mib("VmHWM") - before)
        yield Measure(f"poisoning {len(train):,} images, {name}", seconds, limit=15 if name in SLOW else 5)
    if most > 0:
        limit = train.images.shape.numel() / 2**20 + 256  # the poisoned set; its clean original was there before
        yield Measure("memory that poisoning adds, at most (one copy + batches)", most, "MiB", limit)


def memory_mib(field: str) -> float:
    """Memory of this process in MiB, VmRSS now, VmHWM at its peak; 0 where the system does not tell."""
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), 0.0)


def training(model: str, hardware: Sequence[str], count: int, limit: float | None = None) -> Measure:
    """Images a second of plain training, the first epoch left out."""
    parts = compose(f"model={model}", *hardware, "train.epochs=3")
    network = parts.model.build(10, 32, (0.5,) * 3, (0.25,) * 3)
    ends: list[float] = []
    fit(
        network, synthetic(count), parts.train, generator=torch.Generator().manual_seed(0), stage="benchmark",
        progress=QuietProgress(), on_epoch_end=lambda *_: ends.append(time.perf_counter()),
    )  # fmt: skip
    speed = count * (len(ends) - 1) / (ends[-1] - ends[0])
    return Measure(f"training {model}, 32 px, {parts.hardware.precision}", speed, "images/s", limit, at_least=True)


def one_map(hardware: Sequence[str]) -> Measure:
    """Seconds of one map of the default run, of ten clouds of points in 128 dimensions."""
    parts, stream = compose("defense=trap", *hardware), torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(10, 128, generator=stream)
    features = centres[torch.arange(MAP_SAMPLES) % 10] + torch.randn(MAP_SAMPLES, 128, generator=stream)
    settings, machine = parts.isolation.map_settings(MAP_SAMPLES), parts.hardware
    result = embed(features, settings, 0, machine.threads, torch.device(machine.device))
    return Measure(f"one t-SNE map of {MAP_SAMPLES:,} samples, {result.backend}", result.seconds)


def scoring(hardware: Sequence[str], data: ImageSet) -> Iterator[Measure]:
    """Seconds of FCT's and of MeCa's scores of ``data`` by small_cnn."""
    machine = compose(*hardware).hardware
    network = machine.place(compose("model=small_cnn").model.build(10, 32, (0.5,) * 3, (0.25,) * 3))
    start = time.perf_counter()
    tau = Composition(compose("defense=dbr").isolation.transforms, 0)
    for images in (data, replace(data, images=Transformed(data.images, tau))):
        extract_features(network, images, machine, exact=True)
    yield Measure(f"FCT of {len(data):,} images, small_cnn", time.perf_counter() - start, limit=60)
    start = time.perf_counter()
    compose("defense=meca").isolation.score.of_set(network, data, machine, 0, "benchmark")
    yield Measure(f"KL score of {len(data):,} images, small_cnn", time.perf_counter() - start, limit=60)


def runs(title: str, overrides: Sequence[str], limits: Mapping[str, float]) -> Iterator[Measure]:
    """Seconds a stage of a run with TRAP, and its time as a multiple of that without defence; nothing is shared."""
    took: dict[str, dict[str, float]] = {}
    for defense in ("no_defense", "trap"):
        with tempfile.TemporaryDirectory() as folder:
            wall = command(f"defense={defense}", *overrides, f"output_root={folder}", "tracking=disabled")
            took[defense] = json.loads(next(Path(folder).rglob("result.json")).read_text())["seconds"]
    yield Measure(f"{title}, start to end", wall, limit=limits.get("wall"))
    for stage, value in took["trap"].items():
        yield Measure(f"{title}: {stage}", value, limit=limits.get(stage))
    more = took["trap"]["total"] / took["no_defense"]["total"]
    yield Measure(f"{title}: TRAP / no_defense", more, "x", limits.get("x"))


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="no whole runs, fewer repeats")
    parser.add_argument("--full", action="store_true", help="resnet18 on a CPU too, and on a GPU the runs on CIFAR-10")
    parser.add_argument("--data", default=os.environ.get("BACKDOOR_BENCH_DATA"), help="folder of CIFAR-10, for --full")
    parser.add_argument("--csv", type=Path, help="append the rows to this file, with commit, device, threads, date")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:NUMBER")
    parser.add_argument("--threads", type=int, help="CPU threads (default: those of the hardware configuration)")
    args = parser.parse_args(arguments)
    hardware = [f"hardware.device={args.device}", *([f"hardware.threads={args.threads}"] if args.threads else [])]
    machine = compose(*hardware).hardware
    machine.apply()

    def steps(on_gpu: bool) -> Iterator[Measure]:
        yield from starts(1 if args.quick else 3)
        yield from poisoning(hardware, synthetic(IMAGES))
        yield training("small_cnn", hardware, IMAGES if on_gpu else 5_000)
        yield one_map(hardware)
        yield from scoring(hardware, synthetic(IMAGES))
        if on_gpu or args.full:  # 100 epochs in 120 s
            yield training("resnet18", hardware, IMAGES if on_gpu else 512, 100 * IMAGES / 120 if on_gpu else None)
        if not args.quick:
            yield from runs("default run", hardware, {"wall": 120})
        if args.full and on_gpu and args.data:
            cell = ["dataset=cifar10", f"dataset.root={args.data}", "model=resnet18", *hardware]
            yield from runs("CIFAR-10, resnet18", cell, {"train": 120, "x": 1.10})

    measures = []
    for one in steps(machine.device.startswith("cuda")):
        measures.append(one)
        print(f"{one.what}: {number(one.value)} {one.unit}", file=sys.stderr, flush=True)

    about = environment(machine.describe(), None)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    context = {"commit": about["git"], "device": about["device"], "threads": about["threads"], "date": now}
    print(show(measures, ", ".join(f"{key} {value}" for key, value in context.items())))
    if args.csv:
        append_csv(args.csv, measures, context)
    return 0


if __name__ == "__main__":
    sys.exit(main())
