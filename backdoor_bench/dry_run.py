"""``sweep.dry_run=true``: what a sweep would do, how long it may take and how much disk, without starting anything."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from backdoor_bench import composing
from backdoor_bench import sweep as sweeps
from backdoor_bench.errors import ConfigError

if TYPE_CHECKING:
    from backdoor_bench.plan import Plan
    from backdoor_bench.sweep import Options, Sweep, SweepJob

TRAINING = "train"  # the stage of the victim, in seconds of result.json
_VICTIM = ("dataset", "model", "attack")
_HARDWARE = ("device", "threads", "precision")  # what a result says of it; a victim is that of its hardware


@dataclass(frozen=True)
class Past:
    """A finished run. scale: equal for runs of about the same work; victim: equal for runs of one victim; alone: seconds
    without the victim's training; training: that training's, None where the run did none."""

    defense: str
    scale: tuple[Any, ...]
    victim: tuple[Any, ...]
    alone: float
    training: float | None


@dataclass(frozen=True)
class Estimate:
    """Seconds of a job, None where nothing like it has run. training: of the victim, 0 for a defence that needs none."""

    alone: float | None
    training: float | None


@dataclass(frozen=True)
class Line:
    """One job of the list. state: done, to do, missing or refused; note: where or why, or whose victim it shares."""

    job: SweepJob
    state: str
    note: str = ""
    seconds: float | None = None


def history(root: Path) -> list[Past]:
    """The finished runs below ``root``; torn results are passed over."""
    found = []
    for file in root.glob("*/*/*/*/*/*/result.json"):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            seconds = {str(name): float(value) for name, value in result["seconds"].items()}
            hardware = result.get("environment", {})
            settings = result.get("settings", [])
            victim = _victim(result, result["paper"], result["budget"], result["seed"], settings, hardware)
            scale = _scale(result, result["paper"], result["budget"], settings)
            defense = str(result["defense"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        total, training = seconds.pop("total", 0.0), seconds.get(TRAINING)
        # A stage from the cache books what it took when it was made: the stages are then longer than the run was.
        cached = sum(seconds.values()) > total + 1
        alone = total if cached or training is None else max(0.0, total - training)
        found.append(Past(defense, scale, victim, alone, training))
    return found


def _scale(names: Any, paper: Any, budget: Any, settings: Iterable[str]) -> tuple[Any, ...]:
    """What the length of a run depends on beside its method: data, network, paper, budget and the recipe's words."""
    words = sorted(word for word in settings if word.lstrip("+~").startswith(("train.", "dataset.", "model.")))
    return (str(names["dataset"]), str(names["model"]), paper, budget, *words)


def _victim(
    names: Any, paper: Any, budget: Any, seed: Any, settings: Iterable[str], hardware: Mapping[str, Any]
) -> tuple[Any, ...]:
    rest = sorted(word for word in settings if not word.lstrip("+~").startswith(("defense.", "defense/")))
    place = (hardware.get(name) for name in _HARDWARE)
    return (*(names[name] for name in _VICTIM), paper, budget, seed, *rest, *place)


def estimate(past: Sequence[Past], plan: Plan) -> Estimate:
    """Medians over runs of the same data, network, paper, budget and recipe; None where no run was like it."""
    scale = _scale(plan.names, plan.config["paper"], plan.config["budget"], plan.settings)
    same = [run for run in past if run.scale == scale]
    alike = [run for run in same if run.defense == plan.names["defense"]]
    if alike and all(run.training is None for run in alike):
        return Estimate(median(run.alone for run in alike), 0.0)
    trained = [run.training for run in same if run.training is not None]
    alone = median(run.alone for run in alike) if alike else None
    return Estimate(alone, median(trained) if trained else None)


def lines(conf: Path, sweep: Sweep, past: Sequence[Past]) -> Iterator[Line]:
    """What each job would do, in order."""
    todo = [sweeps.composed_words(job.words, sweep.name) for job in sweep.jobs if not job.missing]
    configs = composing.compose_all(conf, todo)
    labels = sweep.labels()
    victims = {run.victim: "" for run in past if run.training is not None}
    for job in sweep.jobs:
        if job.missing:
            yield Line(job, sweeps.MISSING, f"no file in conf/ for {', '.join(job.missing)}")
            continue
        seen = sweeps.look(conf, job.words, sweep.name, next(configs))
        if seen.error is not None:
            yield Line(job, "refused", sweeps.reason(seen.error, conf, job.words))
            continue
        assert seen.plan is not None
        plan = seen.plan
        config, hardware = plan.config, plan.hardware.describe()
        victim = _victim(plan.names, config["paper"], config["budget"], plan.seed, plan.settings, hardware)
        if seen.result is not None:
            victims.setdefault(victim, "")
            yield Line(job, sweeps.DONE, str(seen.result.parent))
            continue
        guess = estimate(past, plan)
        maker = victims.get(victim) if guess.training != 0 else None
        if maker == "" and not any(plan.cache_dir.glob("victim-*")):
            maker = None  # somebody has cleared the cache
        note = "" if maker is None else f"victim shared with {maker}" if maker else "victim in the cache"
        seconds = guess.alone
        if maker is None and guess.training != 0:
            victims[victim] = labels[job.id]
            seconds = None if guess.alone is None else guess.alone + (guess.training or 0.0)
        if plan.redo:
            note = "made again (resume.redo)"
        yield Line(job, "to do", note, seconds)


def _bytes_a_run(root: Path, runs: int) -> float | None:
    """Bytes on disk for each finished run, its share of the cache included."""
    if not runs:
        return None
    size = 0
    for folder, below, files in os.walk(root):
        if Path(folder) == root:
            below[:] = [name for name in below if name != "sweeps"]
            continue
        for name in files:
            with contextlib.suppress(FileNotFoundError):  # a run beside us tidies up
                size += Path(folder, name).lstat().st_size
    return size / runs


def print_plan(conf: Path, sweep: Sweep, options: Options) -> None:
    """Print the list of jobs and what they would take."""
    from backdoor_bench.progress import duration, printable, tell

    # Composing makes a great many objects, and looking through torch's with them takes a tenth of the time.
    gc.freeze()
    root = sweep.folder.parent.parent
    past = history(root)
    jobs = []
    labels = sweep.labels()
    encoding = sys.stdout.encoding or "utf-8"
    tell(f"sweep {sweep.name}: {len(sweep.jobs)} jobs, results below {root}")
    for line in lines(conf, sweep, past):
        jobs.append(line)
        took = f"about {duration(line.seconds)}" if line.seconds is not None else "?" if line.state == "to do" else ""
        text = f"  {line.state:<8}  {took:<18}{labels[line.job.id]}" + (f"  [{line.note}]" if line.note else "")
        tell(printable(text, encoding))
    todo = [line for line in jobs if line.state == "to do"]
    counts = [(state, sum(line.state == state for line in jobs)) for state in ("done", "to do", "refused", "missing")]
    tell(", ".join(f"{number} {state}" for state, number in counts if number))
    known = [line.seconds for line in todo if line.seconds is not None]
    if known:
        # The others are taken to be like those that are known.
        total = sum(known) / len(known) * len(todo) / options.jobs
        unsure = f"; {len(todo) - len(known)} of them are like no run so far" if len(known) < len(todo) else ""
        tell(f"time: about {duration(total)} with sweep.jobs={options.jobs}{unsure}")
    elif todo:
        tell("time: unknown, nothing like these jobs has run below this output_root")
    place = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    each = _bytes_a_run(root, len(past)) if known else None
    if each is not None:
        tell(f"disk: about {_size(each * len(todo))}, free {_size(free)}")
    else:
        tell(f"disk: free {_size(free)}")
    tell("nothing was started (sweep.dry_run=true)")
    refused = [line for line in jobs if line.state == "refused"]
    if refused and len(refused) == sum(line.state != "missing" for line in jobs):
        raise ConfigError(f"every job is refused; the first: {refused[0].note}")


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"
