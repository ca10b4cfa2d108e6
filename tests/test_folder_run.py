"""The engineer's way: an untrusted folder of images from the command line, with and without what is known of it."""

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image

from backdoor_bench.data.toy import Toy
from backdoor_bench.results import load_model

CLASSES = ("cat", "dog", "öl tank")
# Seconds a run: the smallest network, maps without t-SNE after the first two epochs.
FAST = (
    "dataset=folder", "dataset.image_size=16", "attack=none", "model=tiny", "train.epochs=2", "train.batch_size=32",
    "defense.isolation.reducer=pca", "defense.isolation.detect_epochs=2", "defense.isolation.first_detection_step=0",
    "hardware=cpu", "hardware.threads=1", "tracking=disabled",
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
    done = clean(tmp_path / "data", "defense=trap")
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


def test_what_the_user_knows_is_scored(clean, tmp_path):
    names = write_tree(tmp_path / "data", 60)
    known = names[:6]
    listed = [f"{name},{int(name in known)}" for name in names]
    (tmp_path / "truth.csv").write_text("file,poisoned\n" + "\n".join(listed), encoding="utf-8")
    # Everything lies in the core of one cluster or is noise, which counts as suspicious: all 60 are flagged.
    done = clean(
        tmp_path / "data", f"dataset.truth={tmp_path}/truth.csv", "defense=trap", "defense.removal=retrain",
        "defense.isolation.eps=0.000001", "defense.isolation.min_samples=30", "defense.isolation.noise=suspicious",
        "defense.isolation.scale_min_samples=false",
    )  # fmt: skip
    assert done.code in (0, 2), done.err
    metrics, rows = done.result["metrics"], flagged(done)
    assert {row["file"] for row in rows if row["poisoned"] == "1"} == set(known)
    picked = [row for row in rows if row["flagged"] == "1"]
    hits = sum(row["poisoned"] == "1" for row in picked)
    assert metrics["precision"] == pytest.approx(hits / len(picked))
    assert metrics["recall"] == pytest.approx(hits / 6)
    assert metrics["acc"] is None


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
