"""The closing table of a run, and text that is safe in a spreadsheet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from backdoor_bench.progress import duration, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

_METRICS = (  # key in result.json, what the table calls it
    ("acc", "ACC"),
    ("asr", "ASR"),
    ("target_class_acc", "target-class ACC"),
    ("precision", "precision"),
    ("recall", "recall"),
)
_FILES = (  # what a run folder may hold, and what it is good for
    ("flagged.csv", "every training sample, most suspicious first"),
    ("model.safetensors", "the defended model"),
    ("metrics.csv", "curves, one row an epoch"),
    ("figures", "pictures"),
    ("log.txt", "everything said during the run"),
)


class Shows(Protocol):
    """A progress object that can also print what rich can draw."""

    def say(self, message: str) -> None: ...
    def show(self, renderable: RenderableType) -> None: ...


def print_summary(
    progress: Shows, result: Mapping[str, Any], victim_metrics: Mapping[str, float | None] | None
) -> None:
    """Print the main metrics in percent beside those of the undefended victim, seconds a stage, and where files are.

    result: the content of result.json. victim_metrics: the evaluator's metrics of the undefended model, or None when it
    was not evaluated. A value that does not exist is shown as a dash.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    metrics, victim, poison = result["metrics"], victim_metrics or {}, result["poison"]
    progress.say(" / ".join(str(result[key]) for key in ("dataset", "model", "attack", "defense")))
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("metric")
    table.add_column("undefended victim", justify="right")
    table.add_column("defended", justify="right", style="bold")
    for key, label in _METRICS:
        table.add_row(label, percent(victim.get(key)), percent(metrics.get(key)))
    table.add_row("flagged samples", "-", _flagged(poison))

    times = Table(box=box.SIMPLE_HEAD)
    times.add_column("stage")
    times.add_column("time", justify="right")
    seconds = dict(result["seconds"])
    total = seconds.pop("total", None)
    for stage, value in seconds.items():
        times.add_row(Text(printable(stage)), duration(value))
    if total is not None:
        times.add_row("total", duration(total), style="bold")

    folder = Path(result["run_dir"])
    lines = []
    if metrics.get("acc") is None:
        lines.append(
            "ACC and ASR need a test set: none came with these data (dataset=folder: put clean images in ROOT/test)"
        )
    if metrics.get("recall") is None and poison.get("n_poisoned") is None:
        lines.append("precision and recall need the truth (dataset=folder: dataset.truth=FILE.csv)")
    lines.append(f"files in {folder}:")
    lines += [f"  {name:<18} {meaning}" for name, meaning in _FILES if (folder / name).exists()]
    progress.show(Group(table, times))
    progress.say("\n".join(lines))


def percent(value: float | None) -> str:
    """``97.31 %``, or a dash for None."""
    return "-" if value is None else f"{100 * value:.2f} %"


def csv_safe(value: object) -> object:
    """``value``, with an apostrophe before text that a spreadsheet would run as a formula (``= + - @``, also behind
    white space). Numbers stay numbers."""
    if isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@"):
        return "'" + value
    return value


def _flagged(poison: Mapping[str, Any]) -> str:
    count = poison.get("n_flagged")
    return "-" if count is None else f"{count:,} of {poison['n_train']:,}"
