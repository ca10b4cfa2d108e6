"""What scripts/benchmark.py writes, without measuring anything."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "benchmark.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("value", "limit", "at_least", "ok", "target"),
    [
        (1.99, 2, False, True, "<= 2 s"),
        (2.0, 2, False, True, "<= 2 s"),
        (2.01, 2, False, False, "<= 2 s"),
        (41_666, 41_667, True, False, ">= 41,667 s"),
        (41_668, 41_667, True, True, ">= 41,667 s"),
        (7, None, False, None, ""),
    ],
)
def test_a_target_is_met_or_not_or_not_there(benchmark, value, limit, at_least, ok, target):
    measure = benchmark.Measure("x", value, limit=limit, at_least=at_least)
    assert measure.ok is ok
    assert measure.target == target


def test_the_table_shows_what_was_missed(benchmark):
    measures = [benchmark.Measure("start", 1.234, limit=2), benchmark.Measure("end", 2500, "images/s", 3000, True)]
    lines = [line.split() for line in benchmark.show(measures, "commit abc").splitlines()]
    assert lines[0] == ["commit", "abc"]
    assert ["start", "<=", "2", "s", "1.23", "s", "yes"] in lines
    assert ["end", ">=", "3,000", "images/s", "2,500", "images/s", "NO"] in lines


def test_the_csv_grows_and_has_one_heading(benchmark, tmp_path):
    file = tmp_path / "new" / "bench.csv"
    for commit in ("abc", "def"):
        context = {"commit": commit, "device": "cpu", "threads": 2, "date": "2025-01-01"}
        rows = [benchmark.Measure("a, b", 0.123456789, limit=2), benchmark.Measure("c", 5)]
        benchmark.append_csv(file, rows, context)
    with file.open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert tuple(found[0]) == benchmark.COLUMNS
    assert [row["commit"] for row in found] == ["abc", "abc", "def", "def"]
    assert [row["ok"] for row in found] == ["1", "", "1", ""]
    assert found[0]["what"] == "a, b"
    assert found[0]["measured"] == "0.123457"
    assert found[1]["target"] == ""
