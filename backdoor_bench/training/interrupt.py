"""SIGTERM and SIGINT end a run at the next safe point; the second SIGINT ends it at once."""

from __future__ import annotations

import signal
from types import FrameType

from backdoor_bench.errors import Interrupted

_requested: list[int] = []


def install() -> None:
    """Turn SIGTERM and the first SIGINT into a request that ``raise_if_requested`` honours."""

    def handler(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and _requested:
            raise KeyboardInterrupt
        _requested.append(number)

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)


def requested() -> bool:
    """Whether the process was asked to stop."""
    return bool(_requested)


def raise_if_requested() -> None:
    """Raise Interrupted if the process was asked to stop. Called between steps and between stages."""
    if _requested:
        name = signal.Signals(_requested[0]).name
        raise Interrupted(f"stopped by {name}; run the same command again to resume from the last checkpoint")
