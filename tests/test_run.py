"""The command line from end to end on the toy set, and everything that can be typed wrong."""

import csv
import json
from pathlib import Path

import pytest
import torch

from backdoor_bench.results import load_model, variant_name


def rows_of(path: Path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_its_evidence_and_a_second_does_nothing(bench):
    first = bench("attack=badnets", "defense=trap")
    assert first.code == 0, first.err
    result, folder = first.result, first.path.parent
    assert folder.parts[-6:-2] == ("toy", "tiny", "badnets", "trap")
    assert folder.name == "seed0"
    assert result["schema"] == 1
    assert result["status"] == "done"
    assert {"acc", "acc_nontarget", "asr", "target_class_acc", "precision", "recall", "fpr", "auroc"} <= set(
        result["metrics"]
    )
    assert {"total", "train", "features", "embedding", "clustering"} <= set(result["seconds"])
    assert result["undefended"]["asr"] > 0.9
    assert result["poison"]["n_poisoned"] > 0
    for name in ("config.yaml", "metrics.csv", "flagged.csv", "model.safetensors", "log.txt"):
        assert (folder / name).stat().st_size > 0, name
    pictures = {file.name for file in (folder / "figures").glob("*.png")}
    assert pictures == {"poisoned_pairs.png", "map_epoch_001.png", "map_epoch_002.png", "curves.png", "flagged.png"}
    flagged = rows_of(folder / "flagged.csv")
    assert len(flagged) == result["poison"]["n_train"]
    assert sum(int(row["flagged"]) for row in flagged) == result["poison"]["n_flagged"]
    assert sum(int(row["poisoned"]) for row in flagged) == result["poison"]["n_poisoned"]
    stages = {row["stage"] for row in rows_of(folder / "metrics.csv")}
    assert {"train", "detection", "isolation"} <= stages

    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    second = bench("attack=badnets", "defense=trap")
    assert second.code == 0
    assert "nothing to do" in second.out
    assert second.path == first.path
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert {p: t for p, t in after.items() if not p.name.startswith(".")} == {
        p: t for p, t in written.items() if not p.name.startswith(".")
    }


def test_the_saved_model_is_the_evaluated_one(bench):
    done = bench("attack=badnets", "defense=no_defense")
    model, meta = load_model(done.path.parent)
    import yaml

    from backdoor_bench.data.toy import Toy  # the loader of the same configuration gives the same test set

    config = yaml.safe_load((done.path.parent / "config.yaml").read_text())["dataset"]
    dataset = Toy(**{key: value for key, value in config.items() if not key.startswith("_")}).load()
    with torch.no_grad():
        predicted = model(dataset.test.images[:].float() / 255).argmax(1)
    assert (predicted == dataset.test.labels).double().mean().item() == pytest.approx(done.result["metrics"]["acc"])
    assert meta["num_outputs"] == 4
    assert meta["dummy_class"] is None


def test_the_victim_is_trained_once_for_two_defences(bench):
    one = bench("attack=badnets", "defense=no_defense").result
    two = bench("attack=badnets", "defense=trap").result
    assert two["seconds"]["train"] == one["seconds"]["train"]
    for name in ("acc", "asr"):
        assert two["undefended"][name] == one["metrics"][name]
    assert one["defense_seconds"] == {"train": one["seconds"]["train"]}
    assert {"train", "embedding"} <= set(two["defense_seconds"])
    # A defence that needs no victim is not charged for one that the evaluation found in the cache.
    words = ("extractor_epochs=1", "classifier_epochs=1", "extractor_batch_size=64", "classifier_batch_size=64")
    other = bench("attack=badnets", "defense=baseline1", *(f"defense.{word}" for word in words)).result
    assert "train" in other["seconds"]
    assert set(other["defense_seconds"]) == {"extractor", "classifier"}


def test_the_poisoned_set_does_not_depend_on_seed_of_training_when_fixed(bench, tmp_path):
    one = bench("attack.seed=5", "seed=1", "defense=no_defense")
    two = bench("attack.seed=5", "seed=2", "defense=no_defense")
    sets = {file.parent.name for file in (tmp_path / "outputs" / "cache").glob("poisoned_set-*/bundle.json")}
    assert len(sets) == 1
    assert one.result["metrics"]["acc"] != two.result["metrics"]["acc"] or one.path != two.path


@pytest.mark.parametrize("removal", ["hiding", "unlearning", "unlearn_relearn", "mixed_ce", "retrain"])
def test_every_removal_runs_from_the_command_line(bench, removal):
    done = bench("attack=badnets", f"defense.removal={removal}", "train.epochs=3")
    result = done.result
    assert f"backdoor_bench.removal.{removal}." in (done.path.parent / "config.yaml").read_text()
    assert 0 <= result["metrics"]["acc"] <= 1
    assert len(result["variant"]) == 60 + 1 + 8


@pytest.mark.parametrize(
    "attack",
    ["none", "badnets", "badnets_white", "badnets_grid", "badnets_all2all", "blend_strip", "blend_kitty", "sig"],
)
def test_every_attack_runs_from_the_command_line(bench, attack):
    result = bench(f"attack={attack}", "defense=no_defense", "train.epochs=1").result
    assert (result["metrics"]["asr"] is None) == (attack == "none")
    assert (result["poison"]["n_poisoned"] == 0) == (attack == "none")


def test_clean_floor_is_trained_on_request(bench):
    assert bench("attack=badnets", "defense=no_defense").result["metrics"]["asr_floor"] is None
    train = "evaluation.floor=train"
    trained = bench("attack=badnets", "defense=no_defense", train).result["metrics"]["asr_floor"]
    assert 0 <= trained < 0.5
    # The clean victim is the one of attack=none, trained once; its curves are measured by its own run.
    clean = bench("attack=none", "defense=no_defense")
    assert "waiting" not in clean.out
    assert clean.result["metrics"]["asr"] is None
    again = bench("attack=badnets", "defense=no_defense", train, "resume.redo=true").result["metrics"]["asr_floor"]
    assert again == trained


def test_infinite_values_become_null(bench):
    """With fewer samples than min_samples the median neighbour distance is infinite."""
    done = bench("dataset.limit=40", "defense.isolation.scale_min_samples=false", "train.batch_size=8")
    assert done.code == 0, done.err
    assert done.result["diagnostics"]["maps"][0]["median_kth_distance"] is None


def test_dropping_the_dummy_class_saves_the_model_that_was_evaluated(bench):
    done = bench("attack=badnets", "defense.removal.drop_dummy=true")
    model, meta = load_model(done.path.parent)
    assert model.num_classes == meta["num_outputs"] == 4


def test_papers_own_settings(bench):
    done = bench("attack=none", "paper=trap", "train.epochs=10", "--cfg", "job", toy=False)
    assert "detect_epochs: 10" in done.out
    assert "first_detection_step: 0" in done.out


@pytest.mark.parametrize("source", ["reserved", "seen"])
def test_holdout(bench, source):
    result = bench("attack=badnets", "defense=no_defense", "holdout.size=40", f"holdout.source={source}").result
    plain = bench("attack=badnets", "defense=no_defense").result
    assert result["poison"]["n_train"] == plain["poison"]["n_train"] - (40 if source == "reserved" else 0)


def test_a_sweep_finishes_what_it_can_and_reports_the_rest(bench):
    done = bench("-m", "attack=none,sig", "defense=no_defense", "attack.seed=0,-1")
    assert done.code == 8
    assert done.out.count("result: ") == 2
    assert "2 of 4 jobs failed" in done.err
    assert "attack.seed=-1" in done.err
    again = bench("-m", "attack=none,sig", "defense=no_defense", "attack.seed=0")
    assert again.code == 0
    assert again.out.count("nothing to do") == 2


WRONG = [
    (("attack=badnet",), "did you mean badnets", "blend_kitty"),
    (("defense=trapp",), "did you mean trap", "no_defense"),
    (("dataset=cifar",), "cifar10", "photo_digits"),
    (("model=resnet",), "resnet18", "small_cnn"),
    (("attack.poison_rat=0.1",), "attack.poison_rat", "attack.poison_rate"),
    (("atack=badnets",), "atack", "attack"),
    (("attack.poison_rate=ten",), "attack.poison_rate", "ten"),
    (("seed=-1",), "seed=-1", ">= 0"),
    (("attack.poison_rate=1.5",), "attack.poison_rate=1.5", "<= 1"),
    (("attack.poison_rate=-0.1",), "attack.poison_rate=-0.1", ">= 0"),
    (("attack.poison_rate=0.000001",), "attack.poison_rate", "0 images"),
    (("attack=sig", "attack.poison_rate=1.0"), "attack.poison_rate", "1"),
    (("attack.target_class=4",), "attack.target_class=4", "3"),
    (("attack.target_class=-1",), "attack.target_class=-1", "0"),
    (("attack.side=40", "attack.pattern=white"), "attack.side", "40"),
    (("attack.margin=30",), "attack.margin", "30"),
    (("train.epochs=0",), "train.epochs=0", ">= 1"),
    (("train.batch_size=0",), "train.batch_size=0", ">= 1"),
    (("train.lr=nan",), "train.lr", "nan"),
    (("defense.isolation.eps=0",), "defense.isolation.eps=0", "> 0"),
    (("defense.isolation.min_samples=0",), "defense.isolation.min_samples=0", ">= 1"),
    (("defense.isolation.detect_epochs=99",), "defense.isolation.detect_epochs=99", "train.epochs"),
    (("holdout.size=1000000",), "holdout.size=1000000", "0.."),
    (("attack._target_=os.system",), "attack._target_", "os.system"),
    (("+hydra.callbacks.x={_target_: pathlib.Path.touch, self: /nowhere}",), "_target_", "pathlib.Path.touch"),
    (("+x.y._target_=subprocess.run",), "_target_", "subprocess.run"),
    (("attack._target_=backdoor_bench.results.os.mkdir",), "_target_", "os.mkdir"),
    (("+x.y._target_=hydra._internal.core_plugins.basic_launcher.logging.os.system",), "_target_", "os.system"),
    (("--config-path=/tmp",), "--config-path", "neither"),
    (("--experimental-rerun", "x"), "--experimental-rerun", "neither"),
    (("evaluation=3",), "evaluation=3", "section"),
    (("holdout=5",), "holdout=5", "section"),
    (("train.milestones=5",), "train.milestones=5", "list"),
    (("train.nesterov=true", "train.momentum=0"), "train.nesterov", "momentum"),
    (("defense.removal.drop_dummy=maybe",), "defense.removal.drop_dummy", "true or false"),
    (("resume.redo=5",), "resume.redo=5", "true or false"),
    (("defense=no_defense", "defense.removal=retrain"), "defense/removal", "does not exist with"),
    (("seed=???",), "seed", "no value"),
    (("train.lr=${train.gamma}", "train.gamma=${train.lr}"), "train.lr=", "refers to itself"),
    (("hardware.device=cuda",), "hardware.device", "hardware=cpu"),
    (("hardware.device=tpu",), "hardware.device", "tpu"),
    (("-m", "seed=range(3,3)"), "seed", "empty"),
    (("attack=[",), "attack", ""),
]


@pytest.mark.parametrize(("args", "first", "second"), WRONG, ids=[" ".join(row[0]) for row in WRONG])
def test_wrong_configuration_exits_2_and_names_key_and_fix(bench, args, first, second, tmp_path):
    if torch.cuda.is_available() and "hardware.device=cuda" in args:
        pytest.skip("there is a CUDA device here")
    done = bench(*args)
    assert done.code == 2, done.out + done.err
    assert done.err.startswith("error: ")
    assert first in done.err
    assert second in done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.rglob("result.json"))


def test_a_folder_in_use_is_refused(bench, tmp_path):
    from filelock import FileLock

    done = bench("defense=no_defense", "train.epochs=1")
    (done.path.parent / ".holder").write_text("process 1 on elsewhere")
    with FileLock(done.path.parent / ".lock"):
        refused = bench("defense=no_defense", "train.epochs=1")
    assert refused.code == 2
    assert "in use by process 1 on elsewhere" in refused.err


def test_a_folder_of_another_configuration_is_refused_with_the_keys(bench):
    done = bench("defense=no_defense", "train.epochs=1")
    file = done.path.parent / "config.yaml"
    file.write_text(file.read_text().replace("momentum: 0.9", "momentum: 0.8"))
    refused = bench("defense=no_defense", "train.epochs=1")
    assert refused.code == 2
    assert "train.momentum" in refused.err


def test_a_torn_result_is_made_again(bench):
    done = bench("defense=no_defense", "train.epochs=1")
    whole = done.result
    done.path.write_text(done.path.read_text()[:100])
    again = bench("defense=no_defense", "train.epochs=1")
    assert again.code == 0
    assert again.result["metrics"] == whole["metrics"]


def test_diverged_training_exits_4(bench):
    done = bench("defense=no_defense", "train.lr=1000", "train.epochs=3")
    assert done.code == 4
    assert "lower the learning rate" in done.err


def test_help_lists_groups_without_composing(bench):
    done = bench("--help")
    assert done.code == 0
    for word in ("badnets_all2all", "trap", "photo_digits", "small_cnn", "unlearn_relearn", "exit codes"):
        assert word in done.out


def test_variant_names():
    assert variant_name([], "f" * 64) == "default"
    assert variant_name(["b=2", "a=1"], "f" * 64) == "a=1,b=2"
    long = variant_name([f"key{i}=value" for i in range(30)], "abcdef0123" * 7)
    assert len(long) == 60 + 1 + 8
    assert long.endswith("-abcdef01")
    for bad in ("../../up=1", "a=x/y", "..", "a=b\0c"):
        name = variant_name([bad], "f" * 64)
        assert "/" not in name
        assert "\0" not in name
        assert name.strip(".") != ""


def test_result_json_is_strict_json(bench):
    text = bench("attack=none", "defense=trap").path.read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
