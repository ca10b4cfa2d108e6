"""The engineer's way: an untrusted folder of images from the command line, with and without what is known of it."""

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image

from backdoor_bench.data.toy import Toy
from backdoor_bench.results import load_model

CLASSES = ("cat", "dog", "öl tank")
# Seconds a run: the smallest network.
FAST = (
    "dataset=folder", "dataset.image_size=16", "attack=none", "model=tiny", "train.epochs=2", "train.batch_size=32",
    "hardware=cpu", "hardware.threads=1", "tracking=disabled",
)  # fmt: skip
# Maps without t-SNE after both epochs.
TRAP = (
    "defense=trap", "defense.isolation.reducer=pca", "defense.isolation.detect_epochs=2",
    "defense.isolation.first_detection_step=0",
)  # fmt: skip


def write_tree(folder: Path, count: int) -> list[str]:
    """``count`` images in class folders; their names relative to ``folder``, as given to dataset.truth."""
    made = Toy("toy", 3, 16, count, 3, (0.5,) * 3, (0.25,) * 3, None, None, 0, 0.1).load().train
    names = []
    for row, label in enumerate(made.labels.tolist()):
        file = folder / CLASSES[label] / f"{row:03d} é.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(made.images[row].permute(1, 2, 0).numpy()).save(file)
        names.append(file.relative_to(folder).as_posix())
    return names


@pytest.fixture
def clean(bench):
    """Runs the command line on a tree."""

    def call(root: Path, *args: str):
        return bench(*FAST, f"dataset.root={root}", *args, toy=False)

    return call


def flagged(done) -> list[dict[str, str]]:
    with (done.path.parent / "flagged.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_without_any_knowledge_every_file_is_listed_and_nothing_is_claimed(clean, tmp_path):
    names = write_tree(tmp_path / "data", 60)
    done = clean(tmp_path / "data", *TRAP)
    assert done.code == 0, done.err
    rows, result = flagged(done), done.result
    assert sorted(row["file"] for row in rows) == sorted(names)
    assert {row["file"].split("/")[0] == row["class"] for row in rows} == {True}
    assert {row["poisoned"] for row in rows} == {""}
    for name in ("acc", "asr", "target_class_acc", "precision", "recall", "fpr", "auroc"):
        assert result["metrics"][name] is None, name
    assert result["poison"]["n_poisoned"] is None
    assert result["poison"]["n_train"] == 60
    assert result["poison"]["n_flagged"] == sum(int(row["flagged"]) for row in rows)

    model, meta = load_model(done.path.parent)
    assert meta["class_names"] == sorted(CLASSES)
    with torch.no_grad():
        assert model(torch.rand(2, 3, 16, 16)).shape == (2, meta["num_outputs"])


# Whatever is not in the largest cluster: flags something on any map of a few points.
FLAG_SOME = (
    *TRAP, "defense.isolation.rule=not_largest", "defense.isolation.noise=suspicious",
    "defense.isolation.min_samples=2", "defense.isolation.scale_min_samples=false",
)  # fmt: skip


def test_what_the_user_knows_is_scored_and_changes_nothing_else(clean, tmp_path):
    names = write_tree(tmp_path / "data", 60)
    before = clean(tmp_path / "data", *FLAG_SOME)
    assert before.code == 0, before.err
    picked = sorted(row["file"] for row in flagged(before) if row["flagged"] == "1")
    passed = sorted(set(names) - set(picked))
    assert len(picked) >= 2, "the settings above flag something"
    assert len(passed) >= 1
    known = {*picked[:2], passed[0]}  # two that are flagged, one that is not
    listed = [f"{name},{int(name in known)}" for name in names]
    (tmp_path / "truth.csv").write_text("file,poisoned\n" + "\n".join(listed) + "\n", encoding="utf-8")

    after = clean(tmp_path / "data", f"dataset.truth={tmp_path}/truth.csv", *FLAG_SOME)
    assert after.code == 0, after.err
    rows, metrics = flagged(after), after.result["metrics"]
    assert sorted(row["file"] for row in rows if row["flagged"] == "1") == picked
    assert {row["file"] for row in rows if row["poisoned"] == "1"} == known
    assert after.result["poison"]["n_poisoned"] == 3
    assert metrics["precision"] == pytest.approx(2 / len(picked))
    assert metrics["recall"] == pytest.approx(2 / 3)
    assert metrics["fpr"] == pytest.approx((len(picked) - 2) / 57)
    assert metrics["acc"] is None
    assert metrics["asr"] is None


def test_a_test_folder_is_for_testing_only(clean, tmp_path):
    names = write_tree(tmp_path / "data" / "train", 60)
    write_tree(tmp_path / "data" / "test", 15)
    done = clean(tmp_path / "data", "defense=no_defense")
    assert done.code == 0, done.err
    assert done.result["poison"]["n_train"] == len(names)
    assert 0 <= done.result["metrics"]["acc"] <= 1
    assert done.result["metrics"]["asr"] is None
    # 15 images: accuracy is a multiple of 1/15
    assert (15 * done.result["metrics"]["acc"]) % 1 == pytest.approx(0, abs=1e-9)


def test_bad_files_are_skipped_and_listed(clean, tmp_path):
    names = write_tree(tmp_path / "data", 30)
    broken, text = tmp_path / "data" / names[0], tmp_path / "data" / names[1]
    broken.write_bytes(broken.read_bytes()[:60])
    text.write_text("no image")
    done = clean(tmp_path / "data", *TRAP, "dataset.on_error=skip")
    assert done.code == 0, done.err
    assert sorted(row["file"] for row in flagged(done)) == sorted(names[2:])
    assert done.result["poison"]["n_train"] == 28
    lists = list((tmp_path / "outputs" / "cache").glob("skipped-*.txt"))
    assert len(lists) == 1
    told = lists[0].read_text(encoding="utf-8")
    assert names[0] in told
    assert names[1] in told
    assert told.count("\n") == 2


def test_a_damaged_file_stops_the_run(clean, tmp_path):
    names = write_tree(tmp_path / "data", 30)
    broken = tmp_path / "data" / names[7]
    broken.write_bytes(broken.read_bytes()[:60])
    done = clean(tmp_path / "data", *TRAP)
    assert done.code == 3
    assert names[7] in done.err
    assert "dataset.on_error=skip" in done.err
    assert not list((tmp_path / "outputs").rglob("result.json"))
