from __future__ import annotations

import os
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from backdoor_bench import progress as module
from backdoor_bench.progress import QuietProgress, RichProgress, duration, printable


def plain(log: Path | None = None) -> tuple[RichProgress, StringIO]:
    out = StringIO()
    return RichProgress(log, Console(file=out, force_terminal=False, width=60)), out


def test_without_a_terminal_a_short_task_prints_one_line_at_its_end() -> None:
    progress, out = plain()
    with progress.task("embedding", total=5) as advance:
        for _ in range(5):
            advance()
    assert re.fullmatch(r"embedding: 5/5 in \d+\.\d s\n", out.getvalue())


def test_without_a_terminal_a_long_task_prints_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    progress, out = plain()
    with progress.task("train", total=10) as advance:
        for step in range(10):
            now[0] += 4.0
            advance(1, loss=0.5 / (step + 1), epoch=step + 1)
    assert out.getvalue().splitlines() == [
        "train: 3/10, 12.0 s, about 28.0 s left, loss 0.1667, epoch 3",
        "train: 6/10, 24.0 s, about 16.0 s left, loss 0.08333, epoch 6",
        "train: 9/10, 36.0 s, about 4.0 s left, loss 0.05556, epoch 9",
        "train: 10/10 in 40.0 s",
    ]


def test_a_task_that_fails_says_how_far_it_came() -> None:
    progress, out = plain()

    def work() -> None:
        with progress.task("map", total=3) as advance:
            advance()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert out.getvalue().startswith("map: stopped at 1/3 after ")


def test_nested_tasks_share_one_live_display_that_is_gone_at_the_end() -> None:
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    progress = RichProgress(None, console)
    with progress.task("outer [/b]", total=2) as outer:
        with progress.task("inner", total=3) as inner:
            inner(3, loss=0.25)
            progress.say("between")
        with progress.task("inner again", total=0) as inner:
            inner(7)
        outer()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "outer [/b]: 1/2 in" in text
    assert "inner: 3/3 in" in text
    assert "inner again: 7 in" in text
    assert "between" in text
    assert console._live_stack == []
    # The cursor was hidden and is back.
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1


def test_the_log_gets_everything_that_was_said_with_the_time(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    progress, _ = plain(log)
    progress.say("hello")
    progress.warn("careful")
    with progress.task("work", total=1) as advance:
        advance()
    lines = log.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d  ", line) for line in lines)
    assert [line.split("  ", 1)[1].split(" in ")[0] for line in lines] == ["hello", "warning: careful", "work: 1/1"]


def test_a_log_that_cannot_be_written_warns_once(tmp_path: Path) -> None:
    progress, out = plain(tmp_path / "missing" / "log.txt")
    progress.say("one")
    progress.say("two")
    progress.warn("three")
    assert out.getvalue().count("could not write") == 1
    assert len(progress.warnings) == 2
    assert "No such file" in progress.warnings[0]
    assert out.getvalue().splitlines()[-1] == "warning: three"


def test_what_cannot_be_shown_ends_no_work(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        progress = RichProgress(tmp_path / "log.txt", Console(file=full))
        progress.say("one")
        progress.show("two")
        progress.warn("three")
        with progress.task("work", total=1) as advance:
            advance()
        module.tell("four", full)
        assert progress.console._buffer == []
        with pytest.raises(OSError, match="No space left"):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 4


def test_a_warning_is_kept_and_shown_once() -> None:
    progress, out = plain()
    progress.warn("same")
    progress.warn("same")
    assert progress.warnings == ["same"]
    assert out.getvalue() == "warning: same\n"


def test_what_is_said_is_neither_markup_nor_wrapped_nor_a_terminal_command() -> None:
    progress, out = plain()
    message = "[red]x[/red] :smile: " + "long " * 30 + "\x1b[2J\x07 \udcff"
    progress.say(message)
    assert out.getvalue() == "[red]x[/red] :smile: " + "long " * 30 + "\\x1b[2J\\x07 \\udcff\n"


def test_printable_keeps_text_and_escapes_the_rest() -> None:
    assert printable("a\tb\nü") == "a\tb\nü"
    assert printable("ü→", "latin-1") == "ü\\u2192"
    assert printable("\r\x9b") == "\\x0d\\x9b"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (185.9, "3 min 05 s"), (7650.0, "2 h 07 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_quiet_progress_keeps_what_it_was_told(capsys: pytest.CaptureFixture[str]) -> None:
    progress = QuietProgress()
    with progress.task("outer", total=2) as outer:
        with progress.task("inner", total=1) as inner:
            inner(1, loss=1.0)
        outer()
    progress.say("a")
    progress.warn("b")
    progress.show("c")
    assert progress.tasks == [("inner", 1), ("outer", 1)]
    assert (progress.said, progress.warnings) == (["a", "c\n"], ["b"])
    assert capsys.readouterr().out == ""
