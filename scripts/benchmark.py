#!/usr/bin/env python3
"""Measure how fast this machine runs the project, and compare with the project's targets.

    python scripts/benchmark.py                    everything a CPU can do, about five minutes
    python scripts/benchmark.py --quick            without whole runs, about one minute
    python scripts/benchmark.py --csv FILE         also append the rows to FILE, with commit, device, threads, date
    python scripts/benchmark.py --full --data DIR  also resnet18, and CIFAR-10 for 100 epochs where there is a GPU

Times are wall-clock seconds on the machine as it is: other work on it counts. Exit code 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a clone works without being installed

STATIC = (
    "badnets", "badnets_white", "badnets_grid", "badnets_all2all", "blend_strip", "blend_kitty", "sig",
    "multi_2trig_1target", "multi_2trig_2target", "all2all_2", "mix", "trojan_sq", "trojan_wm", "ssba", "wanet", "physical",
)  # fmt: skip
IMAGES = 50_000  # of CIFAR-10
MAP_SAMPLES = 5_000  # of the default run
COLUMNS = ("what", "target", "measured", "unit", "ok", "commit", "device", "threads", "date")


@dataclass(frozen=True)
class Measure:
    """One line of the table. limit: most (or with ``at_least`` least) that is wanted, None where nothing is promised."""

    what: str
    value: float
    unit: str = "s"
    limit: float | None = None
    at_least: bool = False

    @property
    def ok(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.limit is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def target(self) -> str:
        """``<= 5 s``, or nothing."""
        return "" if self.limit is None else f"{'>=' if self.at_least else '<='} {number(self.limit)} {self.unit}"


def number(value: float) -> str:
    """Three significant digits, without exponents."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def show(measures: Sequence[Measure], title: str) -> str:
    """The table as text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name, side in (("what", "left"), ("target", "right"), ("measured", "right"), ("ok?", "left")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for one in measures:
        table.add_row(
            one.what, one.target, f"{number(one.value)} {one.unit}", {None: "", True: "yes", False: "NO"}[one.ok]
        )
    console = Console(file=io.StringIO(), width=110)
    console.print(table)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def append_csv(path: Path, measures: Sequence[Measure], context: Mapping[str, Any]) -> None:
    """Add one row a measure to ``path``, with a heading where the file is new. context: the last four of COLUMNS."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for one in measures:
            ok = "" if one.ok is None else int(one.ok)
            row = {"what": one.what, "target": one.target, "measured": f"{one.value:.6g}", "unit": one.unit, "ok": ok}
            writer.writerow({**row, **context})


# ---------------------------------------------------------------------- what is measured


def command(*arguments: str, code: int = 0) -> float:
    """Seconds of ``python run.py ARGUMENTS``; stops when it does not end with ``code``."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "run.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != code:
        raise SystemExit(f"run.py {' '.join(arguments)} ended with {done.returncode}, not {code}:\n{done.stderr}")
    return seconds


def starts(repeats: int) -> Iterator[Measure]:
    """The quickest of several starts: the first one also reads the libraries from disk."""
    yield Measure("run.py --help", min(command("--help") for _ in range(repeats)), limit=2)
    wrong = min(command("attack.poison_rate=2", code=2) for _ in range(repeats))
    yield Measure("a configuration error", wrong, limit=3)


def compose(*overrides: str) -> Any:
    """The objects of a configuration, made as run.py makes them."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = hydra_compose("config", list(overrides))
    hardware = instantiate(config.hardware).resolve()
    return argparse.Namespace(
        attack=instantiate(config.attack),
        model=instantiate(config.model),
        isolation=instantiate(config.defense.isolation),
        train=instantiate(config.train, _partial_=True)(hardware=hardware),
        hardware=hardware,
    )


def synthetic(count: int) -> Any:
    """``count`` random images of CIFAR-10's shape, ten classes."""
    import torch

    from backdoor_bench.types import ImageSet

    stream = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=stream)
    return ImageSet(images, torch.arange(count) % 10, 10)


def poisoning(names: Sequence[str], hardware: Sequence[str], train: Any) -> Iterator[Measure]:
    """Seconds of each attack on ``train`` on the CPU, and the most memory that one takes beside the clean images."""
    import torch

    from backdoor_bench.cache import Stages
    from backdoor_bench.progress import QuietProgress
    from backdoor_bench.types import AttackerView

    most: float | None = None
    size = train.images.numel() / 2**20
    for name in names:
        parts = compose(f"attack={name}", *hardware)
        with tempfile.TemporaryDirectory() as folder:
            view = AttackerView(
                train=train, num_classes=10, new_model=no_model, train_config=parts.train,
                generator=torch.Generator().manual_seed(0), assets=None, device=torch.device("cpu"),
                stages=Stages(Path(folder), name, QuietProgress(), {}, NoRows()), progress=QuietProgress(),
            )  # fmt: skip
            before = resident_mib(peak=False, reset=True)
            start = time.perf_counter()
            parts.attack.poison(view)
            seconds = time.perf_counter() - start
            after = resident_mib(peak=True)
        if before is not None and after is not None:
            most = max(most or 0.0, after - before)
        yield Measure(f"poisoning {len(train):,} images, {name}", seconds, limit=5)
    if most is not None:
        # The poisoned set is the one copy that training needs; the clean one it is made from is counted before.
        yield Measure("most memory that poisoning adds (one copy + batches)", most, "MiB", limit=size + 256)


def no_model(_num_classes: int) -> Any:
    raise AssertionError("a static attack trains no model")


class NoRows:
    """Stages without curves."""

    def record(self, row: Any) -> None: ...
    def listen(self, listener: Any) -> None: ...


def resident_mib(*, peak: bool, reset: bool = False) -> float | None:
    """Memory of this process in MiB, now or at its peak since the last reset; None where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    field = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def training(model: str, hardware: Sequence[str], count: int, limit: float | None = None) -> Measure:
    """Images a second of plain training, the first epoch left out."""
    import torch

    from backdoor_bench.progress import QuietProgress
    from backdoor_bench.training.fit import fit

    parts = compose(f"model={model}", *hardware, "train.epochs=3", "train.snapshots=0")
    parts.hardware.apply()
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
    import torch

    from backdoor_bench.detection.embedding import embed

    parts = compose("defense=trap", *hardware)
    stream = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(10, 128, generator=stream)
    features = centres[torch.arange(MAP_SAMPLES) % 10] + torch.randn(MAP_SAMPLES, 128, generator=stream)
    device = torch.device(parts.hardware.device)
    result = embed(features, parts.isolation.map_settings(MAP_SAMPLES), 0, parts.hardware.threads, device)
    return Measure(f"one t-SNE map of {MAP_SAMPLES:,} samples, {result.backend}", result.seconds)


def runs(title: str, overrides: Sequence[str], seconds: float | None, factor: float | None) -> Iterator[Measure]:
    """Seconds a stage of a run with TRAP, and its whole time as a multiple of that without defence. Nothing is shared."""
    took: dict[str, float] = {}
    for defense in ("no_defense", "trap"):
        with tempfile.TemporaryDirectory() as folder:
            wall = command(f"defense={defense}", *overrides, f"output_root={folder}", "tracking=disabled")
            result = json.loads(next(Path(folder).rglob("result.json")).read_text())
        took[defense] = result["seconds"]["total"]
        if defense == "trap":
            yield Measure(f"{title}, from start to end", wall, limit=seconds)
            for stage, value in result["seconds"].items():
                yield Measure(f"{title}: {stage}", value)
    yield Measure(f"{title}: TRAP against no_defense", took["trap"] / took["no_defense"], "x", limit=factor)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="no whole runs, fewer repeats")
    parser.add_argument("--full", action="store_true", help="resnet18 on a CPU too, and on a GPU the runs on CIFAR-10")
    parser.add_argument("--data", default=os.environ.get("BACKDOOR_BENCH_DATA"), help="folder of CIFAR-10, for --full")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append the rows to FILE")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:NUMBER")
    parser.add_argument("--threads", type=int, help="CPU threads (default: those of the hardware configuration)")
    args = parser.parse_args(arguments)

    hardware = [f"hardware.device={args.device}", *([f"hardware.threads={args.threads}"] if args.threads else [])]
    measures: list[Measure] = []

    def add(parts: Iterator[Measure]) -> None:
        for one in parts:
            measures.append(one)
            print(f"{one.what}: {number(one.value)} {one.unit}", file=sys.stderr, flush=True)

    add(starts(1 if args.quick else 3))
    from backdoor_bench.errors import BenchError
    from backdoor_bench.results import environment

    try:
        machine = compose(*hardware).hardware
        machine.apply()
    except BenchError as error:
        parser.error(str(error))
    on_gpu = machine.device.startswith("cuda")
    available = [name for name in STATIC if (ROOT / "conf" / "attack" / f"{name}.yaml").exists()]
    add(poisoning(available, hardware, synthetic(IMAGES)))
    later: list[Callable[[], Measure]] = [lambda: training("small_cnn", hardware, 50_000 if on_gpu else 5_000)]
    if on_gpu or args.full:
        # 100 epochs of 50,000 images in 120 s
        later.append(lambda: training("resnet18", hardware, 50_000 if on_gpu else 512, 41_667 if on_gpu else None))
    later.append(lambda: one_map(hardware))
    add(step() for step in later)
    if not args.quick:
        add(runs("default run", hardware, 120, None))
    if args.full and on_gpu and args.data:
        cell = ["dataset=cifar10", f"dataset.root={args.data}", "model=resnet18", *hardware]
        add(runs("CIFAR-10, resnet18, 100 epochs", cell, None, 1.10))
    about = environment(machine.describe(), None)
    context = {"commit": about["git"], "device": about["device"], "threads": about["threads"]}
    context["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    print(show(measures, ", ".join(f"{key} {value}" for key, value in context.items())))
    if args.csv:
        append_csv(args.csv, measures, context)
    return 0 if all(one.ok is not False for one in measures) else 1


if __name__ == "__main__":
    sys.exit(main())
