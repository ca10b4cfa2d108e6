"""Reading run folders back: tidy rows, torn and foreign files, schemas, what is missing."""

import json
import os

import pytest

from backdoor_bench import collect
from backdoor_bench.errors import ConfigError, DataError
from backdoor_bench.results import SCHEMA
from scripts import summarise_runs
from tests.fake_runs import fake_run


@pytest.fixture
def told():
    return []


def test_one_row_a_run_and_metric_in_the_units_of_the_printed_tables(tmp_path):
    settings = ("defense.isolation.eps=2.5", "attack.poison_rate=0.1")
    folder = fake_run(
        tmp_path, "badnets", "trap", 3, settings=settings, budget="small", undefended={"acc": 0.5}, acc=0.948, asr=0.0
    )
    table = collect.frame(collect.read([tmp_path]))
    assert tuple(table.columns) == collect.COLUMNS
    assert table.set_index("metric")["value"].to_dict() == pytest.approx(
        {"acc": 94.8, "asr": 0.0, "undefended_acc": 50.0, "time_min": 1.0}
    )
    assert table.set_index("metric")["unit"].to_dict()["time_min"] == "min"
    first = table.iloc[0].to_dict()
    assert first == {
        "paper": "trap", "dataset": "cifar10", "model": "resnet18", "attack": "badnets", "defense": "trap",
        "poison_rate": 0.1, "metric": "acc", "value": pytest.approx(94.8), "unit": "%", "budget": "small",
        "settings": "attack.poison_rate=0.1 defense.isolation.eps=2.5", "seed": 3, "seconds": 90.5, "device": "cpu",
        "commit": "abc123", "run_dir": str(folder), "status": "done",
    }  # fmt: skip


def test_csv_and_unknown_endings(tmp_path):
    fake_run(tmp_path / "runs", attack="=cmd|x", acc=0.5, settings=("a=1",))
    table = collect.frame(collect.read([tmp_path / "runs"]))
    collect.write(table, tmp_path / "t.csv")
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[0] == ",".join(collect.COLUMNS)
    assert lines[1].startswith("trap,cifar10,resnet18,'=cmd|x,trap,0.1,acc,50.0,%,,a=1,0,90.5,cpu,abc123,")
    with pytest.raises(ConfigError, match=r"\.csv or \.parquet"):
        collect.write(table, tmp_path / "t.xlsx")


def test_parquet_needs_its_package(tmp_path, monkeypatch):
    fake_run(tmp_path / "runs", acc=0.5)
    table = collect.frame(collect.read([tmp_path / "runs"]))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="pyarrow"):
        collect.write(table, tmp_path / "t.parquet")


def test_parquet_keeps_every_value(tmp_path):
    pytest.importorskip("pyarrow")
    import pandas

    fake_run(tmp_path / "runs", acc=0.5, asr=1.0)
    table = collect.frame(collect.read([tmp_path / "runs"]))
    collect.write(table, tmp_path / "t.parquet")
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "t.parquet"), table, check_dtype=False)


def test_torn_and_foreign_files_are_named_and_left_out(tmp_path, told):
    good = fake_run(tmp_path, acc=0.5)
    for name, text in (("torn", '{"da'), ("list", "[1]"), ("other", '{"dataset": "x", "seed": 0}'), ("empty", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(text)
    assert [run.folder for run in collect.read([tmp_path], told.append)] == [good]
    assert sorted(line.split(" is ")[0].split("/")[-2] for line in told) == ["empty", "list", "other", "torn"]
    assert any("torn/result.json is torn and left out" in line for line in told)
    assert any("other/result.json is no result of a run" in line for line in told)


def test_a_newer_schema_is_refused_with_both_versions(tmp_path):
    folder = fake_run(tmp_path, acc=0.5, schema=SCHEMA + 1)
    with pytest.raises(DataError, match=rf"schema {SCHEMA + 1}, this version reads {SCHEMA}") as caught:
        collect.read([tmp_path])
    assert str(folder / "result.json") in str(caught.value)


def test_an_older_schema_is_read_as_far_as_it_goes(tmp_path, told):
    old = {"dataset": "d", "model": "m", "attack": "a", "defense": "b", "seed": 1, "metrics": {"acc": 0.25}}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "result.json").write_text(json.dumps(old))
    fake_run(tmp_path, acc=0.5)
    runs = {run.dataset: run for run in collect.read([tmp_path], told.append)}
    assert told == [f"1 results are of a schema before {SCHEMA}: what they do not hold stays empty"]
    assert runs["d"].value("acc") == 25
    assert runs["d"].settings is None
    assert runs["d"].stages() == {}
    assert len(collect.frame(list(runs.values()))) == 3


def test_a_run_without_config_or_with_a_torn_one(tmp_path):
    fake_run(tmp_path, "badnets", config=False, acc=0.5)
    torn = fake_run(tmp_path, "sig", acc=0.5)
    (torn / "config.yaml").write_text("attack: {poison_rate: [")
    for run in collect.read([tmp_path]):
        assert (run.config("attack"), run.poison_rate, run.isolation) == (None, None, None)
    assert summarise_runs.main([str(tmp_path), "--tidy", str(tmp_path / "t.csv")]) == 0


def test_each_folder_counts_once_and_caches_are_not_searched(tmp_path):
    fake_run(tmp_path / "a", acc=0.5)
    fake_run(tmp_path / "cache", acc=0.5)
    assert len(collect.read([tmp_path, tmp_path / "a", tmp_path])) == 1
    with pytest.raises(ConfigError, match="is no folder"):
        collect.read([tmp_path / "nowhere"])


def test_a_seed_twice_is_no_second_sample(tmp_path, told):
    # By the time in the result, not by that of the file, which a copy changes.
    before = fake_run(tmp_path / "2", acc=0.5)
    after = fake_run(tmp_path / "1", acc=0.6, more={"finished": "2026-01-01T00:00:00.000001+00:00"})
    fake_run(tmp_path / "2", seed=1, acc=0.7)
    os.utime(after / "result.json", (1, 1))
    ((cell, seeds),) = collect.newest(collect.read([tmp_path]), told.append).items()
    assert cell == ("cifar10", "resnet18", "badnets", "trap", "trap", None, (), None)
    assert {seed: run.value("acc") for seed, run in seeds.items()} == {0: 60.0, 1: 70.0}
    assert len(told) == 1
    assert str(before) in told[0]
    assert str(after) in told[0]


def test_results_without_a_time_come_first_and_by_their_files(tmp_path, told):
    old = {"finished": None}
    first, second = fake_run(tmp_path / "1", acc=0.5, more=old), fake_run(tmp_path / "0", acc=0.6, more=old)
    os.utime(first / "result.json", (1, 1))
    assert next(iter(collect.newest(collect.read([tmp_path]), told.append).values()))[0].folder == second
    new = fake_run(tmp_path / "2", acc=0.7)
    os.utime(new / "result.json", (0, 0))
    assert next(iter(collect.newest(collect.read([tmp_path]), told.append).values()))[0].folder == new


def test_seeds_of_another_configuration_are_no_samples_of_the_same(tmp_path, told):
    other = fake_run(tmp_path, seed=0, acc=0.5, more={"cell_hash": "other"})
    fake_run(tmp_path, seed=1, acc=0.6, more={"cell_hash": None})
    fake_run(tmp_path, seed=2, acc=0.7, more={"finished": "2026-01-02T00:00:00+00:00"})
    (seeds,) = collect.newest(collect.read([tmp_path]), told.append).values()
    assert list(seeds) == [1, 2]
    (line,) = told
    assert line.startswith(f"{other}: made with another configuration than the newer ")


def test_two_folders_of_images_are_two_cells(tmp_path, told):
    for name in ("a", "b"):
        fake_run(tmp_path / name, dataset="folder", acc=0.5, more={"data": name})
    cells = collect.newest(collect.read([tmp_path]), told.append)
    assert [(cell[-1], len(seeds)) for cell, seeds in cells.items()] == [("a", 1), ("b", 1)]


def test_the_time_is_that_of_the_defence_alone(tmp_path):
    for seed, own in enumerate(({"embedding": 30.0}, {}, None)):
        fake_run(tmp_path, seed=seed, acc=0.5, more={"defense_seconds": own})
    assert [run.value("time_min") for run in collect.read([tmp_path])] == [0.5, 2.0, 2.0]
    assert [sum(run.all_stages().values()) for run in collect.read([tmp_path])] == [120, 120, 120]


def test_one_odd_value_ends_no_reading(tmp_path, told):
    def write(name, **changed):
        place = fake_run(tmp_path, name, acc=0.5)
        result = json.loads((place / "result.json").read_text()) | changed
        (place / "result.json").write_text(json.dumps(result))
        return place

    write("a", seconds={"total": float("inf"), "train": float("nan"), "embedding": 10**400}, warnings=5)
    write("b", metrics={"acc": 10**400, "asr": "high", "acc_per_class": 5}, environment={"device": 7})
    write("c", metrics={"acc": 0.5, "acc_per_class": ["x", 0.25]}, attack="\ud800")
    write("seed", seed=float("inf"))
    deep = fake_run(tmp_path, "deep")
    (deep / "result.json").write_text("[" * 100_000)
    runs = collect.read([tmp_path], told.append)
    assert len(told) == 2
    first, second, third = runs
    assert (first.part("seconds")["total"], first.all_stages(), first.warnings) == (None, {}, [])
    assert (second.value("acc"), second.value("asr"), second.acc_per_class) == (None, None, [])
    assert (third.acc_per_class, third.attack) == ([None, 0.25], "\\ud800")
    assert len(collect.frame(runs))


def test_a_config_that_is_a_link_out_of_its_folder_is_not_read(tmp_path):
    (tmp_path / "secret.yaml").write_text("attack: {poison_rate: 0.5}")
    place = fake_run(tmp_path / "runs", config=False, acc=0.5)
    (place / "config.yaml").symlink_to(tmp_path / "secret.yaml")
    (run,) = collect.read([tmp_path / "runs"])
    assert run.config_text is None


def test_paths_that_are_not_utf_8(tmp_path):
    place = tmp_path / os.fsdecode(b"caf\xe9")
    fake_run(place, acc=0.5, folder=place / "run")
    assert summarise_runs.main([str(place), "--tidy", str(tmp_path / "t.csv"), "--csv", str(tmp_path / "u.csv")]) == 0
    assert r"caf\udce9/run" in (tmp_path / "t.csv").read_text()


def test_the_isolation_of_a_run(tmp_path):
    fake_run(tmp_path, defense="trap", acc=0.5)
    fake_run(tmp_path, defense="isolate_only", settings=("defense/isolation=spectral",), acc=0.5)
    assert [run.isolation for run in collect.read([tmp_path])] == ["spectral", "trap"]


def test_numbers_that_are_none(tmp_path):
    folder = fake_run(tmp_path, acc=float("nan"), asr=0.5)
    (run,) = collect.read([tmp_path])
    assert (run.value("acc"), run.value("precision"), run.value("acc_gap"), run.value("mse")) == (None,) * 4
    assert run.measured() == ["asr", "time_min"]
    assert run.folder == folder


def test_the_command_line_ends_with_the_code_of_its_error(tmp_path, capsys):
    fake_run(tmp_path, acc=0.5, schema=SCHEMA + 1)
    assert summarise_runs.main([str(tmp_path)]) == 3
    assert summarise_runs.main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
