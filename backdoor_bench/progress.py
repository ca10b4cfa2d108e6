"""What a run says while it works: bars on a terminal, plain lines elsewhere, and a log file in the run folder."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from threading import RLock
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

LINE_SECONDS = 10.0  # without a terminal: at most one line a task in this time
_TABLE_WIDTH = 100  # of tables in the log and where there is no terminal that tells its width

# File names of an untrusted folder reach the terminal: escape sequences in them must not.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str, encoding: str = "utf-8") -> str:
    """``text`` with control characters, and what ``encoding`` cannot express, shown as backslash escapes."""
    return text.translate(_CONTROL).encode(encoding, "backslashreplace").decode(encoding)


@contextmanager
def going_on(console: Console | None = None) -> Iterator[None]:
    """What cannot be shown (its reader has gone, the disk under it is full) ends no work."""
    try:
        yield
    except (OSError, SystemExit):  # rich exits when its pipe is closed; it writes to nowhere from then on
        if console is not None:
            with contextlib.suppress(OSError, SystemExit), console.capture():
                pass  # forgets what it could not write, or it would try again with each line


def tell(text: str, file: IO[str] | None = None) -> None:
    """``print``, at once, to standard output by default; what cannot be shown is lost."""
    with going_on():
        print(text, file=file, flush=True)


def print_line(console: Console, message: str, style: str | None = None) -> None:
    """One line as it is: no markup, no wrapping, no commands to the terminal; lost where it cannot be shown."""
    text = printable(message, console.encoding)
    with going_on(console):
        console.print(text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)


def let_go() -> None:
    """At the end of a program: forget what standard output and error could not take. Python would turn the exit code
    into 120 for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError), Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def duration(seconds: float) -> str:
    """``7.1 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"


class RichProgress:
    """types.Progress on a rich console (standard output by default).

    log_path: everything said is also appended there with the time; when that fails, one warning is shown and the run
    goes on. None keeps no log. warnings: what was warned of, each text once.
    """

    def __init__(self, log_path: Path | None = None, console: Console | None = None) -> None:
        if console is None:
            from rich.console import Console

            console = Console(soft_wrap=True)
        self.console = console
        self.warnings: list[str] = []
        self._log_path = log_path
        self._log_failed = False
        self._lock = RLock()  # a map may be made beside the training of the next epoch
        self._bars: Bars | None = None
        self._open_tasks = 0

    def say(self, message: str) -> None:
        self._print(message)
        self._log(message)

    def warn(self, message: str) -> None:
        """Shown, logged and kept in ``warnings``; a text that was warned of before is not repeated."""
        with self._lock:
            if message in self.warnings:
                return
            self.warnings.append(message)
        self._print(f"warning: {message}", style="yellow")
        self._log(f"warning: {message}")

    def show(self, renderable: RenderableType) -> None:
        """Print something rich can draw (a table); the log gets it without colours."""
        from io import StringIO

        from rich.console import Console

        plain = Console(file=StringIO(), width=_TABLE_WIDTH, color_system=None, force_terminal=False)
        with plain.capture() as capture:
            plain.print(renderable)
        text = capture.get().rstrip("\n")
        if self.console.is_terminal:
            with going_on(self.console):
                self.console.print(renderable)
        else:
            self._print(text)
        self._log(text)

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        """Yields ``advance(n=1, **fields)``; the fields (``loss=0.12``) are shown beside the count. The end of the task
        prints one line with its seconds. Tasks may be nested and share one live display."""
        start = last_line = time.perf_counter()
        done = 0
        bar = self._open_bar(name, total)

        def advance(n: int = 1, **fields: Any) -> None:
            nonlocal done, last_line
            done += n
            note = ", ".join(f"{key} {_short(value)}" for key, value in fields.items())
            if self._bars is not None and bar is not None:
                self._bars.update(bar, completed=done, note=note)
                return
            now = time.perf_counter()
            if now - last_line >= LINE_SECONDS and done < total:
                last_line = now
                left = (now - start) * (total - done) / max(done, 1)
                parts = [f"{name}: {done}/{total}", duration(now - start), f"about {duration(left)} left"]
                self.say(", ".join([*parts, note] if note else parts))

        finished = False
        try:
            yield advance
            finished = True
        finally:
            self._close_bar(bar)
            seconds = duration(time.perf_counter() - start)
            count = f"{done}/{total}" if total else f"{done}"
            self.say(f"{name}: {count} in {seconds}" if finished else f"{name}: stopped at {count} after {seconds}")

    def _open_bar(self, name: str, total: int) -> TaskID | None:
        if not self.console.is_terminal:
            return None
        from rich import progress as rp

        with self._lock:
            if self._bars is None:
                self._bars = rp.Progress(
                    rp.TextColumn("{task.description}", markup=False),
                    rp.BarColumn(bar_width=30),
                    rp.MofNCompleteColumn(),
                    rp.TimeElapsedColumn(),
                    rp.TextColumn("left"),
                    rp.TimeRemainingColumn(),
                    rp.TextColumn("{task.fields[note]}", markup=False),
                    console=self.console,
                    refresh_per_second=4,
                    transient=True,
                )
                self._bars.start()
            self._open_tasks += 1
            return self._bars.add_task(printable(name, self.console.encoding), total=total or None, note="")

    def _close_bar(self, bar: TaskID | None) -> None:
        with self._lock:
            if self._bars is None or bar is None:
                return
            self._bars.remove_task(bar)
            self._open_tasks -= 1
            if self._open_tasks == 0:
                self._bars.stop()
                self._bars = None

    def _print(self, message: str, style: str | None = None) -> None:
        print_line(self.console, message, style)

    def _log(self, message: str) -> None:
        if self._log_path is None:
            return
        stamp = datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            # Opened for each line: a log on a disk that was full for a while goes on when there is space again.
            with self._lock, self._log_path.open("a", encoding="utf-8") as file:
                file.write(f"{stamp}  {printable(message)}\n")
        except OSError as error:
            if not self._log_failed:
                self._log_failed = True
                self.warn(f"could not write to {self._log_path} ({error.strerror}); the run goes on without this log")


@dataclass
class QuietProgress:
    """types.Progress that prints nothing and keeps what it was told."""

    said: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    tasks: list[tuple[str, int]] = field(default_factory=list)  # (name, how far it came), in order of their ends

    def say(self, message: str) -> None:
        self.said.append(message)

    def warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)

    def show(self, renderable: RenderableType) -> None:
        from rich.console import Console

        console = Console(width=_TABLE_WIDTH, color_system=None)
        with console.capture() as capture:
            console.print(renderable)
        self.said.append(capture.get())

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        done = 0

        def advance(n: int = 1, **fields: Any) -> None:
            nonlocal done
            done += n

        try:
            yield advance
        finally:
            self.tasks.append((name, done))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
