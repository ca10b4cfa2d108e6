from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from backdoor_bench.progress import QuietProgress, RichProgress
from backdoor_bench.reporting.summary import csv_safe, percent, print_summary


def result(folder: Path) -> dict[str, Any]:
    return {
        "run_dir": str(folder),
        "dataset": "folder",
        "model": "small_cnn",
        "attack": "bad[/b]nets\x1b[2J",
        "defense": "trap",
        "metrics": {"acc": 0.68126, "asr": 0.0, "target_class_acc": 0.7, "precision": None, "recall": 1},
        "poison": {"n_train": 5000, "n_poisoned": 250, "n_cover": 0, "n_flagged": 1249},
        "seconds": {"train": 31.04, "embedding": 185.0, "total": 216.04},
    }


def lines_of(progress: QuietProgress) -> dict[str, list[str]]:
    """Every table row by its first cell."""
    text = "\n".join(progress.said)
    cells = [line.split("  ") for line in text.splitlines() if line.strip()]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in cells]
    return {row[0]: row[1:] for row in rows if row}


def test_the_table_shows_percent_beside_the_undefended_model_and_dashes_for_none(tmp_path: Path) -> None:
    progress = QuietProgress()
    print_summary(progress, result(tmp_path), {"acc": 0.7, "asr": 0.99123, "target_class_acc": None})
    rows = lines_of(progress)
    assert rows["metric"] == ["undefended victim", "defended"]
    assert rows["ACC"] == ["70.00 %", "68.13 %"]
    assert rows["ASR"] == ["99.12 %", "0.00 %"]
    assert rows["target-class ACC"] == ["-", "70.00 %"]
    assert rows["precision"] == ["-", "-"]
    assert rows["recall"] == ["-", "100.00 %"]
    assert rows["flagged samples"] == ["-", "1,249 of 5,000"]
    assert (rows["train"], rows["embedding"], rows["total"]) == (["31.0 s"], ["3 min 05 s"], ["3 min 36 s"])


def test_without_a_victim_and_without_flags_there_are_dashes(tmp_path: Path) -> None:
    values = result(tmp_path)
    values["poison"]["n_flagged"] = None
    values["seconds"] = {}
    progress = QuietProgress()
    print_summary(progress, values, None)
    rows = lines_of(progress)
    assert rows["ACC"] == ["-", "68.13 %"]
    assert rows["flagged samples"] == ["-", "-"]
    assert "total" not in rows


def test_below_stand_the_files_that_exist_and_all_is_logged(tmp_path: Path) -> None:
    (tmp_path / "flagged.csv").touch()
    out = StringIO()
    progress = RichProgress(tmp_path / "log.txt", Console(file=out, force_terminal=False, width=40))
    print_summary(progress, result(tmp_path), None)
    for text in (out.getvalue(), (tmp_path / "log.txt").read_text()):
        assert "flagged.csv" in text
        assert "model.safetensors" not in text
        assert "bad[/b]nets\\x1b[2J" in text
        assert f"files in {tmp_path}:\n" in text  # in one piece, to be copied
        assert "undefended victim" in text


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0, "0.00 %"), (0.99999, "100.00 %"), (0.12345, "12.35 %")])
def test_percent(value: float | None, text: str) -> None:
    assert percent(value) == text


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "\r@x", "=cmd|' /C calc'!A0"])
def test_text_a_spreadsheet_would_run_is_quoted(text: str) -> None:
    assert csv_safe(text) == "'" + text


@pytest.mark.parametrize("value", ["", "cat", "a=1", "'x", " a", -1, -0.5, None, True])
def test_other_cells_stay_as_they_are(value: object) -> None:
    assert csv_safe(value) is value
