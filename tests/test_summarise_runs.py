"""The table of runs: exact lines for a stored result."""

import json

import yaml

from scripts.summarise_runs import changed, main

RESULT = {
    "dataset": "d", "model": "m", "attack": "badnets", "defense": "trap", "variant": "default", "seed": 0,
    "metrics": {"acc": 0.7, "asr": 0.001, "target_class_acc": None, "precision": 0.5, "recall": 1.0},
    "undefended": {"acc": 0.72, "asr": 0.99},
    "poison": {"n_train": 20, "n_poisoned": 2, "n_cover": 0, "n_flagged": 4},
    "seconds": {"total": 3.0, "train": 2.0}, "diagnostics": {"maps": []},
    "environment": {"device": "cpu", "threads": 1, "precision": "fp32", "embedding": None, "torch": "2", "git": None},
}  # fmt: skip


def test_table_of_a_stored_result(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(RESULT))
    attack = {"poison_rate": 0.05, "seed": 3, "pattern": "grid3"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"attack": attack, "train": {"epochs": 7}}))
    columns = "stage,epoch,acc,asr,precision,recall,n_flagged"
    rows = ["train,3,0.5,1.0,,,", "detection,3,,,0.5,1.0,4", "isolation,3,,,0.25,1.0,8"]
    (folder / "metrics.csv").write_text("\n".join([columns, *rows]) + "\n")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "result.json").write_text('{"da')
    assert main([str(tmp_path), "--epochs", "--csv", str(tmp_path / "x.csv")]) == 0
    told = capsys.readouterr()
    assert "| d | badnets | trap | 0 | 72.00 / 99.00 | 70.00 | 0.10 | - | 50.00 | 100.00 | 4 |" in told.out
    assert "| 3 | 50.00 / 100.00 | 4 | 50.00 | 100.00 | 25.00 | 100.00 |" in told.out
    assert "torn" in told.err
    assert (tmp_path / "x.csv").read_text().startswith("dataset,model,attack,defense,variant,seed,undefended_acc")


def test_nothing_finished(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err


def test_undefended_attacks_stand_beside_the_printed_values(tmp_path, capsys):
    metrics = RESULT["metrics"] | {"asr_floor": 0.02}
    (tmp_path / "result.json").write_text(
        json.dumps(RESULT | {"dataset": "cifar10", "defense": "no_defense", "metrics": metrics})
    )
    attack = {"poison_rate": 0.05, "seed": 3, "pattern": "grid3"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"attack": attack, "train": {"epochs": 7}}))
    assert main([str(tmp_path), "--attacks"]) == 0
    told = capsys.readouterr().out
    assert (
        "| badnets | poison_rate=0.05, 7 epochs, no crop or flip | 2, 0 of 20 | 70.00 | 0.10 | 2.00 | EBD 91.64 / 100.00;"
        in told
    )
    assert "TRAP 94.8 / 100.0 |" in told


def test_changed_keys_of_nested_attacks_are_named_in_full():
    told = {"first": {"poison_rate": 0.1, "target_class": 0, "seed": 5}, "assignment": "each", "seed": 5}
    assert changed("multi_2trig_2target", {"attack": told}) == "first.poison_rate=0.1"


def test_odd_results_of_others_end_nothing_and_break_no_row(tmp_path, capsys):
    odd = RESULT | {"attack": "a|b<script>\x1b[31m" + 300 * "x", "metrics": RESULT["metrics"] | {"acc": "high"}}
    for name in ("torn", "columns", "nul"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(odd))
        (tmp_path / name / "config.yaml").write_text("attack: 5\ntrain: {augment: [1], epochs: x|y}\n")
    (tmp_path / "torn" / "metrics.csv").write_text("stage,epoch,acc,asr,precision,recall,n_flagged\ndetection,3,,,hi")
    (tmp_path / "columns" / "metrics.csv").write_text("stage,acc\ndetection,0.5\ntrain,0.5\n")
    (tmp_path / "nul" / "metrics.csv").write_text("stage,epoch\ndetection," + 200_000 * "x")
    assert main([str(tmp_path), "--epochs"]) == 0
    told = capsys.readouterr()
    assert f"| d | a\\|b\\<script\\> \\[31m{300 * 'x'} | trap | 0 | 72.00 / 99.00 | - | 0.10 |" in told.out
    assert "\x1b" not in told.out
    assert "| 3 | - | - | - | - | - | - |" in told.out
    assert "nul/metrics.csv cannot be read: field larger than field limit" in told.err
    assert main([str(tmp_path), "--attacks"]) == 0
