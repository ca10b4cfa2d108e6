"""What a sweep shows while its jobs run: a line for each that ends and, on a terminal, a live one below."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from backdoor_bench import sweep as sweeps
from backdoor_bench.progress import duration, going_on, print_line, printable, tell

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from backdoor_bench.sweep import Status, Sweep, SweepJob

_SHOWN = 3  # running jobs named in the live line


class SweepScreen:
    """processes.Screen for people: ``with SweepScreen(sweep, slots) as screen``. slots: jobs side by side."""

    def __init__(self, sweep: Sweep, slots: int, console: Console | None = None) -> None:
        from rich.console import Console

        self._console = console or Console()
        self._sweep = sweep
        self._labels = sweep.labels()
        self._slots = slots
        self._running: dict[str, float] = {}
        self._ended = self._bad = 0
        self._seconds: list[float] = []

    def __enter__(self) -> SweepScreen:
        self.say(
            f"sweep {self._sweep.name}: {len(self._sweep.jobs)} jobs, {self._slots} at a time; logs in "
            f"{self._sweep.folder / 'logs'}"
        )
        self._live = None
        if self._console.is_terminal:
            from rich.live import Live

            self._live = Live(
                get_renderable=self._line, console=self._console, refresh_per_second=2, transient=True,
                redirect_stderr=False,
            )  # fmt: skip
            with going_on():
                self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            with going_on():
                self._live.stop()

    def started(self, job: SweepJob, attempt: int) -> None:
        self._running[job.id] = time.monotonic()

    def ended(self, job: SweepJob, status: Status, again: bool) -> None:
        self._running.pop(job.id, None)
        if status.state == sweeps.RUNNING:
            return  # back among those that wait
        if not again:
            self._ended += 1
        count = f"[{self._ended}/{len(self._sweep.jobs)}]"
        label = self._labels[job.id]
        if status.state == sweeps.BEFORE:
            self.say(f"{count} already done, nothing to do: {label}")
        elif status.state == sweeps.DONE:
            self._seconds.append(status.seconds or 0.0)
            self.say(f"{count} done in {duration(status.seconds or 0.0)}: {label}")
        elif status.state == sweeps.STOPPED:
            self.say(f"{count} stopped: {label}")
        else:
            self._bad += not again
            more = "; it is tried again" if again else ""
            self._warn(f"{count} {status.state}: {label}: {status.reason}{more}")
        if status.result is not None:
            self.say(f"result: {status.result}")

    def say(self, message: str) -> None:
        print_line(self._console, message)

    def _warn(self, message: str) -> None:
        if self._console.is_terminal:
            print_line(self._console, message, "yellow")
        else:
            tell(printable(message, sys.stderr.encoding or "utf-8"), sys.stderr)

    def _line(self) -> Text:
        """``3/25 done, 1 failed, about 12 min left; running: attack=sig defense=trap (1 min 3 s)``"""
        from rich.text import Text

        now = time.monotonic()
        parts = [f"{self._ended}/{len(self._sweep.jobs)} ended"]
        if self._bad:
            parts.append(f"{self._bad} not done")
        left = len(self._sweep.jobs) - self._ended
        if self._seconds and left:
            parts.append(f"about {duration(sum(self._seconds) / len(self._seconds) * left / self._slots)} left")
        running = [f"{self._labels[id_]} ({duration(now - start)})" for id_, start in list(self._running.items())]
        names = ", ".join(running[:_SHOWN]) + (f" and {len(running) - _SHOWN} more" if len(running) > _SHOWN else "")
        return Text(printable(", ".join(parts) + (f"; running: {names}" if names else ""), self._console.encoding))
