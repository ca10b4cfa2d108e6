"""Errors a user can cause or meet. Each carries the exit code that `run.py` ends with.

Anything else that escapes is a bug of ours and ends with exit code 1.
"""

from __future__ import annotations


class BenchError(Exception):
    """Base: one message that says what happened, where, and what to do."""

    exit_code = 1


class ConfigError(BenchError, ValueError):
    """A configuration value cannot work; the message names key, value and allowed range."""

    exit_code = 2


class DataError(BenchError):
    """The data (or a stored file) is damaged or does not fit; the message names the file."""

    exit_code = 3


class Diverged(BenchError):
    """The loss became NaN or infinite; the message names step and batch."""

    exit_code = 4


class OutOfMemory(BenchError):
    """The device ran out of memory."""

    exit_code = 5


class DiskError(BenchError):
    """A file could not be written; the message names path and bytes."""

    exit_code = 6


class Interrupted(BenchError):
    """SIGTERM or SIGINT; the same command resumes."""

    exit_code = 7


class SweepFailed(BenchError):
    """Some jobs of a sweep failed; the others finished."""

    exit_code = 8


def check_range(
    key: str,
    value: object,
    low: float,
    high: float,
    *,
    low_open: bool = False,
    high_open: bool = False,
    integer: bool = False,
) -> None:
    """Raise ConfigError unless ``value`` is a number (an int if ``integer``) within low..high.

    ``low_open``/``high_open`` exclude the ends. Strings, booleans and NaN are refused: Hydra does not check types.
    """
    kind = "an integer" if integer else "a number"
    bounds = f"{'>' if low_open else '>='} {low:g}"
    if high != float("inf"):
        bounds += f" and {'<' if high_open else '<='} {high:g}"
    ok = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    if ok:
        number = float(value)  # type: ignore[arg-type]
        ok = (low < number if low_open else low <= number) and (number < high if high_open else number <= high)
    if not ok:
        raise ConfigError(f"{key}={value!r} is not allowed: it must be {kind} {bounds}")


def check_flag(key: str, value: object) -> None:
    """Raise ConfigError unless ``value`` is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value!r} is not allowed: it must be true or false")


def check_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigError(f"{key}={value!r} is not allowed: choose one of {', '.join(choices)}")
