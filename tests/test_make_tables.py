"""A printed table beside stored results: the exact files, statistics, what is not there, bad input."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from backdoor_bench import collect, experiments
from backdoor_bench.errors import ConfigError
from backdoor_bench.reporting import compare, tables
from backdoor_bench.reporting.compare import Tolerance, stat
from scripts import make_tables
from tests.conftest import CONF as REAL
from tests.fake_runs import fake_run

EXPECTED = Path(__file__).parent / "expected"
HEAD = "paper,table,dataset,model,attack,defense,poison_rate,metric,value,unit,notes"
PRINTED = [
    "none,no_defense,0,acc,95.1",
    "badnets,no_defense,0.1,acc,94.8", "badnets,no_defense,0.1,asr,100.0",
    "sig,no_defense,0.1,acc,94.0", "sig,no_defense,0.1,asr,99.0",
    "average,no_defense,0.1,acc,94.4", "average,no_defense,0.1,asr,90.0",
    "badnets,trap,0.1,acc,94.5", "badnets,trap,0.1,asr,0.1",
    "sig,trap,0.1,acc,94.1", "sig,trap,0.1,asr,",
    "average,trap,0.1,acc,94.3",
    "badnets,trap:eps=2.5,0.1,precision,99.9",
    "badnets,ghost,0.1,acc,90.0",
    "any,trap,0.1,recall_lower_bound,94",
]  # fmt: skip
DEMO = """# @package _global_
# Demo Table 1: two defences
defaults:
  - override /paper: trap
sweep:
  tables: [demo_table1]
  variants: {"trap:eps=2.5": defense.isolation.eps=2.5}
  cells: [dataset=cifar10 model=resnet18 attack=badnets defense=trap defense.isolation.eps=3.5]
"""


@pytest.fixture
def conf(tmp_path, monkeypatch):
    """A folder of configurations with one experiment, and the printed table it stands for."""
    conf, reference = tmp_path / "conf", tmp_path / "reference"
    reference.mkdir()
    rows = [line.split(",") for line in PRINTED]
    lines = [f"demo,1,cifar10,resnet18,{a},{d},{rate},{metric},{value},%," for a, d, rate, metric, value in rows]
    (reference / "demo_table1.csv").write_text("\n".join([HEAD, *lines]) + "\n")
    names = {
        "dataset": ["cifar10", "photo_digits"], "model": ["resnet18", "small_cnn"], "attack": ["none", "badnets", "sig"],
        "defense": ["no_defense", "trap"], "paper": ["trap"],
    }  # fmt: skip
    for group, files in names.items():
        (conf / group).mkdir(parents=True)
        for name in files:
            (conf / group / f"{name}.yaml").touch()
    (conf / "experiment").mkdir()
    (conf / "experiment" / "demo_table1.yaml").write_text(DEMO)
    (conf / "budget").mkdir()
    small = "# @package _global_\n# Minutes a run.\ndefaults:\n  - override /model: small_cnn\n"
    (conf / "budget" / "small.yaml").write_text(small)
    monkeypatch.setattr(experiments, "REFERENCE", reference)
    monkeypatch.setattr(make_tables, "CONF", conf)
    return conf


@pytest.fixture
def runs(tmp_path):
    """Three seeds without a defence, one or two of TRAP, one with another eps."""
    root = tmp_path / "runs"
    for attack in ("badnets", "sig"):
        for seed, shift in enumerate((0.0, 0.01, 0.02)):
            fake_run(root, attack, "no_defense", seed, acc=0.93 + shift, asr=0.99)
    fake_run(root, "badnets", "trap", 0, acc=0.901, asr=0.0, precision=1.0)
    fake_run(root, "badnets", "trap", 1, acc=0.903, asr=0.004, precision=1.0)
    fake_run(root, "sig", "trap", 0, acc=0.95, asr=0.02, precision=None)
    fake_run(root, "badnets", "trap", 0, settings=("defense.isolation.eps=2.5",), acc=0.9, precision=None)
    # None of these belongs to a cell: another paper, another setting, a reduced budget.
    fake_run(root / "x", "none", "no_defense", paper=None, acc=0.1)
    fake_run(root / "y", "none", "no_defense", settings=("train.epochs=3",), acc=0.1)
    fake_run(root / "z", "none", "no_defense", budget="small", acc=0.1)
    return root


def test_the_exact_files_of_stored_results(conf, runs, tmp_path, capsys):
    assert make_tables.main(["demo_table1", str(runs), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == (EXPECTED / "demo_table1.md").read_text()
    for ending in ("md", "csv", "tex"):
        made = (tmp_path / "out" / f"demo_table1.{ending}").read_text()
        assert made == (EXPECTED / f"demo_table1.{ending}").read_text()


# ------------------------------------------------------------------ statistics


def test_students_interval_by_hand():
    # Mean 4, sum of squares 8, deviation 2; t(0.975, 2) = 4.302653 from a printed table; 4.302653 * 2 / sqrt(3).
    found = stat([2.0, 4.0, 6.0])
    assert (found.mean, found.std, found.n) == (4.0, 2.0, 3)
    assert found.high - found.mean == pytest.approx(4.968276, abs=1e-5)
    assert found.mean - found.low == pytest.approx(4.968276, abs=1e-5)
    # t(0.975, 4) = 2.776445: five values 1..5, deviation sqrt(2.5).
    assert stat([1, 2, 3, 4, 5]).high == pytest.approx(3 + 2.776445 * (2.5 / 5) ** 0.5, abs=1e-5)


def test_one_seed_has_no_interval_and_none_no_statistics():
    assert stat([7.0]) == compare.Stat(7.0, None, None, None, 1)
    assert stat([]) is None


def test_an_average_uses_the_seeds_that_all_its_cells_have(conf, runs):
    rows = _rows(conf, runs)
    average = next(row for row in rows if (row.attack, row.defense, row.metric) == ("average", "trap", "acc"))
    assert average.ours.mean == pytest.approx((90.1 + 95) / 2)
    assert average.ours.n == 1


def test_an_average_of_which_a_cell_lacks_is_not_compared(conf, runs, tmp_path):
    rows = _rows(conf, runs, chosen={"attack": ["badnets"]})
    assert {row.attack for row in rows} == {"badnets", "average"}
    assert {row.status for row in rows if row.attack == "average"} == {compare.INCOMPLETE}
    sig = next(path for path in runs.rglob("sig/trap/default/seed0/result.json"))
    sig.unlink()
    average = next(row for row in _rows(conf, runs) if (row.attack, row.defense) == ("average", "trap"))
    assert (average.status, average.ours, average.note) == (compare.INCOMPLETE, None, "1 of 2 attacks")


def test_the_deviation_a_paper_prints_is_compared_with_ours(conf, runs):
    lines = [
        "demo,1,cifar10,resnet18,badnets,no_defense,0.1,acc_std,0.9,%,",
        "demo,1,cifar10,resnet18,sig,trap,0.1,acc_std,1,%,",
    ]
    file = experiments.REFERENCE / "demo_table1.csv"
    file.write_text("\n".join([HEAD, *lines]) + "\n")
    first, second, _ = _rows(conf, runs)
    assert first.ours.mean == pytest.approx(1.0)
    assert first.ours.n == 3
    assert first.within is None
    assert (second.ours, second.note) == (None, "a deviation needs two seeds")


def test_time_and_reconstruction_error(conf, tmp_path):
    lines = [
        "demo,1,cifar10,resnet18,badnets,trap,0.1,time_min,36.45,min,",
        "demo,1,cifar10,resnet18,badnets,trap,0.1,mse,0.0085,,",
    ]
    (experiments.REFERENCE / "demo_table1.csv").write_text("\n".join([HEAD, *lines]) + "\n")
    folder = fake_run(tmp_path / "runs", acc=0.5)
    text = (
        (folder / "result.json")
        .read_text()
        .replace('"diagnostics": null', '"diagnostics": {"reconstruction_mse": 0.0123}')
    )
    (folder / "result.json").write_text(text)
    time, mse = _rows(conf, tmp_path / "runs")[:2]
    # A minute of the defence's stages: not the attacker's, not the 90.5 s of a run that took some from the cache.
    assert (time.ours.mean, time.within, mse.ours.mean, mse.within) == (1.0, None, 0.0123, None)
    assert tables.ours(mse) == "0.0123"


# ------------------------------------------------------------------ tolerance


def test_tolerances():
    ours, wide = compare.Stat(94.0, 1.0, 91.5, 96.5, 3), compare.Stat(94.0, None, None, None, 1)
    assert Tolerance().judge("acc", 95.0, ours) is True
    assert Tolerance().judge("acc", 95.1, ours) is False
    assert Tolerance().judge("asr", 99.0, ours) is True
    assert Tolerance().judge("time_min", 1.0, ours) is None
    assert Tolerance.of(["2"]).judge("acc", 96.0, ours) is True
    assert Tolerance.of(["asr=0.5"]).judge("asr", 95.0, ours) is False
    assert Tolerance.of(["interval"]).judge("acc", 96.4, ours) is True
    assert Tolerance.of(["interval"]).judge("acc", 97.0, ours) is False
    assert Tolerance.of(["interval"]).judge("acc", 97.0, wide) is None
    # Equal numbers lie in an interval without a width, whatever their last bits.
    assert stat([100 * 0.901] * 3).low > 90.1
    assert Tolerance.of(["interval"]).judge("acc", 90.1, stat([100 * 0.901] * 3)) is True
    for words in (["acc=0.5", "2"], ["2", "acc=0.5"]):
        assert (Tolerance.of(words).points["acc"], Tolerance.of(words).points["asr"]) == (0.5, 2)
    for bad in ("-1", "acc=x", "nonsense=1", "", "1e400"):
        with pytest.raises(ConfigError, match="--tolerance"):
            Tolerance.of([bad])


# ------------------------------------------------------------------ which run belongs to which cell


def test_a_budget_and_other_data_stand_in_the_title(conf, tmp_path, capsys):
    root = tmp_path / "runs"
    fake_run(root, "badnets", "trap", dataset="photo_digits", model="small_cnn", budget="small", acc=0.7, asr=0.1)
    arguments = ["demo_table1", str(root), "budget=small", "dataset=photo_digits", "--measured"]
    assert make_tables.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == (
        "# Demo Table 1: two defences; at the reduced budget small (Minutes a run); dataset photo_digits instead of "
        "cifar10; model small_cnn instead of resnet18"
    )
    assert out[2] == "## cifar10, resnet18 (ours: photo_digits, small_cnn)"
    assert "| badnets | trap | ACC | 94.5 | 70.00 | 1 | -24.50 |" in out
    assert out[-1].startswith("- difference: ours - paper; nothing is marked, because the settings are not the paper's")
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        f"demo_table1-budget=small,dataset=photo_digits.{ending}" for ending in ("csv", "md", "tex")
    ]


def test_a_budget_that_was_not_named_is_hinted_at(conf, tmp_path, capsys):
    fake_run(tmp_path / "runs", model="small_cnn", budget="small", acc=0.7)
    assert make_tables.main(["demo_table1", str(tmp_path / "runs")]) == 0
    assert "those there are have the budget small" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("attack=wanet", "attack wanet in place of the printed ones"),
        ("defense=meca", "defense meca in place of the printed ones"),
    ],
)
def test_another_method_does_not_stand_beside_the_printed_value(conf, tmp_path, capsys, word, told):
    group, _, name = word.partition("=")
    (conf / group / f"{name}.yaml").touch()
    methods = {"attack": "badnets", "defense": "trap", group: name}
    fake_run(tmp_path / "runs", **methods, acc=0.5)
    assert make_tables.main(["demo_table1", str(tmp_path / "runs"), word, "--measured"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"# Demo Table 1: two defences; {told}"
    assert out.count("## ") == out.count("## Not printed: ") == 1
    assert out.count(f"| {methods['attack']} | {methods['defense']} | ACC | 50.00 | 1 |") == 1


def test_a_method_of_the_table_keeps_its_printed_values_beside_another(conf, tmp_path):
    (conf / "attack" / "wanet.yaml").touch()
    fake_run(tmp_path / "runs", acc=0.5)
    rows = _rows(conf, tmp_path / "runs", chosen={"attack": ["badnets", "wanet"], "defense": ["trap"]})
    assert [(row.attack, row.paper) for row in rows if row.ours] == [("badnets", 94.5)]
    assert {row.attack for row in rows if not row.table} == {"badnets", "wanet"}


def test_two_data_sets_of_one_name_stand_side_by_side(conf, tmp_path, capsys):
    (conf / "dataset" / "folder.yaml").touch()
    for name, acc in (("a", 0.5), ("b", 0.6)):
        fake_run(tmp_path / "runs" / name, dataset="folder", acc=acc, more={"data": 12 * name})
    assert make_tables.main(["demo_table1", str(tmp_path / "runs"), "dataset=folder", "--measured"]) == 0
    out = capsys.readouterr().out
    for name, acc in (("a", "50.00"), ("b", "60.00")):
        heading = f"(ours: folder ({8 * name}), resnet18)"
        assert f"| {acc} | 1 |" in out.split(heading)[1].split("##")[0]


def test_the_rate_is_there_where_the_table_has_several(tmp_path):
    fake_run(tmp_path, "badnets", "trap", settings=("attack.poison_rate=0.05",), acc=0.9)
    made = compare.compare(REAL, experiments.load(REAL, "trap_table4"), collect.newest(collect.read([tmp_path])))
    (section,) = tables.sections(made, measured_only=True)
    assert section.rows[0][: section.columns.index("rate") + 1] == ("badnets", "trap", "0.05")


def test_a_job_of_a_grid_with_nulls_alone_is_counted(conf, tmp_path):
    fake_run(tmp_path / "runs", settings=("defense.isolation.eps=3.5",))
    (row,) = (row for row in _rows(conf, tmp_path / "runs") if not row.table)
    assert (row.status, row.note) == (compare.NO_NUMBER, compare.NULL)


def test_a_seed_without_the_number_is_not_named(conf, tmp_path):
    for seed, precision in enumerate((0.5, None, 0.7)):
        settings = ("defense.isolation.eps=2.5",)
        fake_run(tmp_path / "runs", seed=seed, settings=settings, acc=0.5, precision=precision)
    made = compare.compare(
        conf, experiments.load(conf, "demo_table1"), collect.newest(collect.read([tmp_path / "runs"]))
    )
    (record,) = (one for one in tables.records(made) if one["n"])
    assert (record["n"], record["seeds"]) == (2, "0 2")


def test_a_long_word_is_no_path(conf, runs, capsys):
    assert make_tables.main(["demo_table1", str(runs), f"budget={'x' * 300}"]) == 2
    assert "is unknown; valid: small" in capsys.readouterr().err


def test_settings_of_the_whole_sweep(conf, tmp_path, capsys):
    settings = ("defense.isolation.eps=2.5", "train.epochs=3")
    fake_run(tmp_path / "runs", settings=settings, precision=0.5)
    assert make_tables.main(["demo_table1", str(tmp_path / "runs"), "--measured", "train.epochs=3", "seed=0,1"]) == 0
    out = capsys.readouterr().out
    assert "with train.epochs=3" in out
    assert "| badnets | trap:eps=2.5 | precision | 99.9 | 50.00 |" in out
    # As in a sweep, a later word replaces an earlier one with its key.
    assert compare.merged(["a=1", "b=2"], ["a=3"]) == ("a=3", "b=2")


def test_a_result_from_before_settings_were_recorded_is_no_cell(conf, tmp_path, capsys):
    folder = fake_run(tmp_path / "runs", acc=0.5)
    text = (folder / "result.json").read_text().replace('"settings": [], ', "")
    (folder / "result.json").write_text(text)
    assert not any(row.ours for row in _rows(conf, tmp_path / "runs"))
    assert "1 results are from before their settings were recorded" in capsys.readouterr().err


# ------------------------------------------------------------------ text


def test_names_with_specials_are_escaped_in_every_format(conf, tmp_path, capsys):
    name = r"a|b_<script>&%$#{}~^\[x](y)"
    (conf / "attack" / f"{name}.yaml").touch()
    file = conf / "experiment" / "demo_table1.yaml"
    cell = f"'dataset=cifar10 model=resnet18 defense=trap attack={name}'"
    file.write_text(DEMO.replace("tables: [demo_table1]", "tables: []").split("  cells:")[0] + f"  cells: [{cell}]\n")
    fake_run(tmp_path / "runs", attack=name, acc=0.5, folder=tmp_path / "runs" / "odd")
    comparison = compare.compare(
        conf, experiments.load(conf, "demo_table1"), collect.newest(collect.read([tmp_path / "runs"]))
    )
    assert r"| a\|b\_\<script\>\&%\$#{}\~^\\\[x\](y) | trap | ACC | 50.00 | 1 |" in tables.markdown(comparison)
    latex = tables.latex(comparison)
    assert (
        r"a\textbar{}b\_\textless{}script\textgreater{}\&\%\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}{[}x{]}(y)"
        r" & trap & ACC & 50.00 & 1 \\"
    ) in latex
    assert "95 \\% interval" not in latex  # empty columns are left out


def test_control_characters_do_not_break_a_row(conf, tmp_path):
    assert tables._plain("a\nb\t\x1b[31mc") == "a b [31mc"
    assert tables._plain("\ud800") == "\\ud800"


def test_what_the_fonts_of_latex_lack_becomes_a_question_mark():
    assert tables._latex("a\u2212b \u4e2d \u200b é − × ±") == r"a$-$b ? ? é $-$ $\times$ $\pm$"


@pytest.mark.slow
def test_latex_reads_every_character_that_is_left(tmp_path):
    if shutil.which("pdflatex") is None:
        pytest.skip("needs pdflatex on the PATH")
    every = "".join(map(chr, range(0x20, 0x3000)))
    lines = "\n\n".join(tables._latex(tables._plain(every[start : start + 64])) for start in range(0, len(every), 64))
    head = r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{textcomp,booktabs,longtable}\begin{document}"
    (tmp_path / "t.tex").write_text(f"{head}\n{lines}\n\\end{{document}}\n")
    made = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"], cwd=tmp_path, capture_output=True
    )
    assert made.returncode == 0, made.stdout[-2000:]


def test_a_table_without_rows_has_its_header():
    empty = compare.Comparison("x", "x", None, (), Tolerance(), ())
    assert tables.csv_text(empty) == ",".join(tables.RECORD) + "\n"


def test_csv_rows_are_disarmed(conf, runs):
    made = compare.compare(conf, experiments.load(conf, "demo_table1"), collect.newest(collect.read([runs])))
    odd = compare.Comparison("x", "x", None, ("=cmd",), Tolerance(), made.rows[:1])
    assert "'=cmd" in tables.csv_text(odd)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["demo_tabel1"], "'demo_tabel1' is no table and no experiment (did you mean demo_table1?)"),
        (["demo_table1", "budget=smal"], "budget=smal is unknown; valid: small"),
        (["demo_table1", "dataset=cifar"], "dataset=cifar is unknown (did you mean cifar10?)"),
        (["demo_table1", "--tolerance", "x"], "--tolerance x is not allowed"),
        (["demo_table1", "train.epochs"], "train.epochs is no folder"),
        (["demo_table1", "train.epochs=3,4"], "train.epochs has several values (train.epochs=3, train.epochs=4)"),
        (["demo_table1", "train.epochs=[3"], "train.epochs=[3 cannot be read as KEY=VALUE"),
        (["demo_table1", "--wandb"], "--wandb needs --out DIR"),
    ],
)
def test_bad_words_end_with_2_and_one_message(conf, runs, capsys, argv, told):
    assert make_tables.main([argv[0], str(runs), *argv[1:]]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {told}")
    assert err.count("\n") == 1


def test_a_folder_that_is_not_there_and_a_newer_schema(conf, tmp_path, capsys):
    assert make_tables.main(["demo_table1", str(tmp_path / "nowhere")]) == 2
    fake_run(tmp_path / "runs", schema=99, acc=0.5)
    assert make_tables.main(["demo_table1", str(tmp_path / "runs")]) == 3
    assert "schema 99" in capsys.readouterr().err


# ------------------------------------------------------------------ the real tables


def test_a_printed_table_without_an_experiment_of_its_own_and_one_with():
    assert compare.find(REAL, "trap_table1").name == "trap_table1"
    with pytest.raises(ConfigError, match="no experiment runs the whole of the printed table trap_text"):
        compare.find(REAL, "trap_text")


@pytest.mark.parametrize("name", experiments.names(REAL))
def test_every_experiment_lists_all_its_printed_numbers(name):
    experiment = experiments.load(REAL, name)
    made = compare.compare(REAL, experiment, {})
    printed = [row for row in made.rows if row.table]
    of_tables = [
        row
        for table in experiment.tables
        for row in experiments.printed(table)
        if experiment.notes is None or experiment.notes in row.notes
    ]
    assert len(printed) == len(of_tables)
    assert made.count(compare.MEASURED) == 0
    assert tables.markdown(made)
    assert tables.latex(made)
    assert tables.csv_text(made)


def test_w_and_b_is_told_through_tracking_alone(conf, runs, tmp_path, monkeypatch):
    from backdoor_bench import tracking

    told = []

    class Fake:
        def artifact(self, name, kind, paths):
            told.append((name, kind, [path.name for path in paths]))

        def table(self, name, path, max_rows):
            told.append((name, path.name))

        def finish(self, summary):
            told.append(summary["measured"])

    def start(config, folder, about, title, tags, warn):
        told.append((config.mode, config.group, folder, about["experiment"]))
        return Fake()

    monkeypatch.setattr(tracking, "start", start)
    (conf / "tracking").symlink_to(REAL / "tracking")
    out = tmp_path / "out"
    assert make_tables.main(["demo_table1", str(runs), "--out", str(out), "--wandb"]) == 0
    files = [f"demo_table1.{ending}" for ending in ("md", "tex", "csv")]
    assert told == [
        ("offline", "demo_table1", out, "demo_table1"),
        ("demo_table1", "table", files),
        ("table", "demo_table1.csv"),
        11,
    ]


def test_files_and_folders_become_one_artefact(tmp_path, monkeypatch):
    from backdoor_bench import tracking

    told = []

    class Artifact:
        def __init__(self, name, type):
            told.append((name, type))

        def add_file(self, path, policy):
            told.append(path)

        def add_dir(self, path, name, policy):
            told.append((path, name))

    run = SimpleNamespace(
        log_artifact=lambda made: told.append(type(made)), summary={}, finish=lambda exit_code: told.append(exit_code)
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Artifact=Artifact))
    (tmp_path / "a.csv").touch()
    (tmp_path / "runs").mkdir()
    tracker = tracking.Tracker(lambda: run, 20.0, told.append)
    tracker.artifact("table=<1>", "table", [tmp_path / "a.csv", tmp_path / "runs"])
    tracker.finish({})
    file, folder = str(tmp_path / "a.csv"), (str(tmp_path / "runs"), "runs")
    assert told == [("table--1-", "table"), file, folder, Artifact, 0]
    config = tracking.load(REAL, "offline", "trap_table1")
    assert (config.mode, config.group, config.init_timeout) == ("offline", "trap_table1", 10.0)


def _rows(conf, root, **more):
    runs = collect.newest(collect.read([root]))
    return compare.compare(conf, experiments.load(conf, "demo_table1"), runs, **more).rows
