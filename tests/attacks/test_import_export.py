"""The open format: what scripts/export_poisoned.py writes is what attack=import reads, and nothing damaged passes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from backdoor_bench.attacks.imported import Imported
from backdoor_bench.data.poisoned_files import count_rows, fingerprint, read
from backdoor_bench.errors import ConfigError, DataError
from backdoor_bench.types import Facts
from scripts import export_poisoned
from tests.conftest import TOY

SIZE, CLASSES, TRAIN, TESTS = 8, 3, 12, 6
LABELS = torch.arange(TRAIN) % CLASSES


def arrays() -> dict[str, np.ndarray]:
    """A set as another tool would store it: two poisoned rows, one cover row, two triggered test sets."""
    stream = np.random.default_rng(0)
    poisoned, cover = np.zeros(TRAIN, dtype=bool), np.zeros(TRAIN, dtype=bool)
    poisoned[[1, 5]], cover[4] = True, True
    true_labels = LABELS.numpy().copy()
    labels = true_labels.copy()
    labels[[1, 5]] = 0
    return {
        "train_images": stream.integers(0, 256, (TRAIN, SIZE, SIZE, 3), dtype=np.uint8),
        "train_labels": labels,
        "true_labels": true_labels,
        "is_poisoned": poisoned,
        "is_cover": cover,
        "trigger_id": np.where(poisoned, 1, np.where(cover, 0, -1)),
        "test_images": stream.integers(0, 256, (TESTS, SIZE, SIZE, 3), dtype=np.uint8),
        "test_wanted": np.array([0, 0, 0, 1, 2, 0]),
        "test_true_labels": np.array([1, 2, 0, 0, 1, 2]),
        "test_case": np.array([0, 0, 0, 1, 1, 1]),
        "case_names": np.array(["to_0", "all2all"]),
        "case_counts": np.array([1, 0]),
        "case_group": np.array(["", "both"]),
        "case_leave_out": np.array([1, 0]),
    }


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., Path]:
    """An NPZ of ``arrays()`` with changes; None leaves an array out."""

    def write(**changes: Any) -> Path:
        values = {name: value for name, value in (arrays() | changes).items() if value is not None}
        np.savez(tmp_path / "set.npz", **values)
        return tmp_path / "set.npz"

    return write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same as images and tables."""
    root, values = tmp_path / "set", arrays()
    root.mkdir()
    for part in ("train", "test"):
        for row, image in enumerate(values[f"{part}_images"]):
            Image.fromarray(image).save(root / f"{part}{row}.png")
    names = values["case_names"].tolist()
    columns = [
        values[name].astype(int) for name in ("train_labels", "true_labels", "is_poisoned", "is_cover", "trigger_id")
    ]
    rows = [f"train{row}.png,{','.join(map(str, found))}" for row, found in enumerate(zip(*columns, strict=True))]
    table(root / "train.csv", "file,label,true_label,is_poisoned,is_cover,trigger_id", rows)
    tests = zip(values["test_wanted"], values["test_true_labels"], values["test_case"], strict=True)
    rows = [f"test{row}.png,{wanted},{true},{names[case]}" for row, (wanted, true, case) in enumerate(tests)]
    table(root / "test.csv", "file,wanted,true_label,case", rows)
    table(root / "cases.csv", "case,counts,group,leave_out", ["to_0,1,,1", "all2all,0,both,0"])
    return root


def table(path: Path, heading: str, rows: list[str]) -> None:
    path.write_text("\n".join([heading, *rows]) + "\n")


def same(found: Any, other: Any) -> None:
    """Two sets hold the same: pixels, labels, truth, triggered test sets."""
    assert torch.equal(found.train.images, other.train.images)
    assert torch.equal(found.train.labels, other.train.labels)
    for name in ("is_poisoned", "is_cover", "true_labels", "trigger_id"):
        assert torch.equal(getattr(found, name), getattr(other, name)), name
    cases, others = (getattr(one, "tests", None) or one.cases for one in (found, other))
    assert len(cases) == len(others)
    for case, expected in zip(cases, others, strict=True):
        assert torch.equal(case.test.images, expected.test.images)
        assert torch.equal(case.test.labels, expected.test.labels)
        for name in ("name", "target_class", "counts", "group"):
            assert getattr(case, name) == getattr(expected, name)


# ---------------------------------------------------------------------- reading


def test_what_another_tool_stored_is_what_is_read(npz: Callable[..., Path]) -> None:
    found, values = read(npz(), SIZE, CLASSES), arrays()
    assert found.train.images.dtype == torch.uint8
    assert torch.equal(found.train.images, torch.from_numpy(values["train_images"].transpose(0, 3, 1, 2).copy()))
    assert found.train.labels.tolist() == [0, 0, 2, 0, 1, 0, 0, 1, 2, 0, 1, 2]
    assert found.is_poisoned.nonzero().flatten().tolist() == [1, 5]
    assert found.is_cover.nonzero().flatten().tolist() == [4]
    assert torch.equal(found.true_labels, LABELS)
    assert found.trigger_id.tolist() == [-1, 1, -1, -1, 0, 1, -1, -1, -1, -1, -1, -1]
    first, second = found.cases
    assert (first.name, first.target_class, first.counts, first.group) == ("to_0", 0, True, None)
    assert first.test.labels.tolist() == [0, 0]  # the third image is of class 0 itself
    assert torch.equal(first.test.images[1], torch.from_numpy(values["test_images"][1].transpose(2, 0, 1).copy()))
    assert (second.name, second.target_class, second.counts, second.group) == ("all2all", None, False, "both")
    assert second.test.labels.tolist() == [1, 2, 0]


def test_both_forms_and_both_layouts_hold_the_same(npz: Callable[..., Path], folder: Path) -> None:
    found = read(npz(), SIZE, CLASSES)
    same(read(folder, SIZE, CLASSES), found)
    first = {f"{part}_images": arrays()[f"{part}_images"].transpose(0, 3, 1, 2) for part in ("train", "test")}
    same(read(npz(**first), SIZE, CLASSES), found)
    assert count_rows(folder) == count_rows(npz()) == TRAIN


def test_little_is_needed(npz: Callable[..., Path]) -> None:
    needed = {"train_images", "train_labels", "is_poisoned", "test_images", "test_wanted"}
    found = read(npz(**{name: None for name in arrays() if name not in needed}), SIZE, CLASSES)
    assert torch.equal(found.true_labels, found.train.labels)
    assert not found.is_cover.any()
    assert torch.equal(found.trigger_id, found.is_poisoned.long() - 1)
    (case,) = found.cases
    assert (case.name, case.target_class, case.counts, len(case.test)) == ("imported", None, True, TESTS)
    without = npz(**{name: None for name in arrays() if name not in {"train_images", "train_labels", "is_poisoned"}})
    assert read(without, SIZE, CLASSES).cases == ()


def changed(name: str, row: int, value: Any) -> dict[str, np.ndarray]:
    values = arrays()[name]
    values[row] = value
    return {name: values}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": None}, r"set\.npz has no training images"),
        ({"train_labels": None}, r"set\.npz has no train_labels"),
        ({"is_poisoned": None}, r"set\.npz has no is_poisoned"),
        ({"test_wanted": None}, r"set\.npz has no test_wanted"),
        ({"test_true_labels": None}, r"set\.npz has no test_true_labels"),  # leave_out needs them
        (changed("train_labels", 7, 3), r"set\.npz \(train\): 1 labels lie outside 0\.\.2, the first is 3 in row 7"),
        (changed("train_labels", 7, -100), r"the first is -100 in row 7"),  # B38
        (changed("test_wanted", 2, 5), r"set\.npz \(test\): .*the first is 5 in row 2"),
        ({"train_labels": arrays()["train_labels"].astype(np.float64)}, r"train_labels is float64"),  # B39
        ({"train_labels": arrays()["train_labels"][:-1]}, r"train_labels is int64 \(11,\), expected .* 12 images"),
        ({"train_images": arrays()["train_images"] / 255}, r"train_images: float64; store pixels as uint8"),  # B42
        ({"train_images": arrays()["train_images"][..., :2]}, r"train_images: shape \(12, 8, 8, 2\)"),
        ({"train_images": arrays()["train_images"][:, :-1]}, r"images have 8 x 7 pixels, but dataset\.image_size=8"),
        (
            {"train_images": arrays()["train_images"][:0], "train_labels": np.zeros(0, int)},
            r"there are no images",
        ),  # B40
        ({"train_labels": np.zeros(TRAIN, int)}, r"2 of 3 classes have no images"),  # B41
        ({"is_poisoned": np.full(TRAIN, 2)}, r"is_poisoned must be 12 values 0 or 1"),
        (changed("is_cover", 5, True), r"set\.npz, train row 5: both poisoned and cover"),
        (changed("true_labels", 3, 9), r"set\.npz, train row 3: true_labels must lie in 0\.\.2"),
        (changed("trigger_id", 5, -1), r"set\.npz, train row 5: trigger_id"),
        (changed("trigger_id", 0, 0), r"set\.npz, train row 0: trigger_id"),
        (changed("test_case", 4, 2), r"set\.npz, test row 4: test_case must lie in 0\.\.1"),
        ({"case_names": np.array(["x", "x"])}, r"names of the cases must differ"),
        ({"case_names": np.array("x")}, r"case_names is <U1 \(\), expected texts in a row"),
        ({"case_names": np.array([1.5, 2.5])}, r"case_names is float64 \(2,\), expected texts"),
        ({"case_counts": np.array([1])}, r"case_counts must be 2 values"),
        ({"case_group": np.array(["one"])}, r"case_group is <U3 \(1,\), expected 2 texts"),
        ({"train_labels": np.array([None] * TRAIN, dtype=object)}, r"cannot be read as an NPZ of plain arrays"),  # B49
    ],
)
def test_what_does_not_fit_is_told_with_file_and_row(
    changes: dict[str, Any], message: str, npz: Callable[..., Path]
) -> None:
    with pytest.raises(DataError, match=message):
        read(npz(**changes), SIZE, CLASSES)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("train.csv", "train3.png,0", "train3.png,x", r"train\.csv, line 5: label='x' must be an integer"),
        ("train.csv", "train3.png,0", "train99.png,0", r"train\.csv, line 5: .*train99\.png is not a regular file"),
        ("train.csv", "train3.png,0", "../out.png,0", r"train\.csv, line 5: .*out of the data folder"),
        ("train.csv", "train3.png,0,0,0,0,-1", "train3.png,0", r"train\.csv, line 5: not as many values"),
        ("train.csv", "file,label", "file,class", r"train\.csv has no label"),
        ("train.csv", "file,label", "name,label", r"train\.csv has no column file"),
        ("train.csv", "train4.png,1,1,0,1,0", "train4.png,1,1,1,1,0", r"train\.csv, line 6: both poisoned and cover"),
        ("test.csv", "all2all", "other", r"test\.csv, line 5: case 'other' is not in cases\.csv"),
        ("test.csv", "file,wanted", "file,want", r"test\.csv has no wanted"),
    ],
)
def test_tables_are_told_with_their_line(file: str, old: str, new: str, message: str, folder: Path) -> None:
    edit(folder / file, old, new)
    with pytest.raises(DataError, match=message):
        read(folder, SIZE, CLASSES)


def test_damaged_images_and_files(tmp_path: Path, folder: Path, npz: Callable[..., Path]) -> None:
    whole = (folder / "train2.png").read_bytes()
    for content in (whole[:60], b"no picture at all"):  # B47, B48
        (folder / "train2.png").write_bytes(content)
        with pytest.raises(DataError, match=r"train\.csv, line 4: .*train2\.png cannot be decoded"):
            read(folder, SIZE, CLASSES)
    Image.new("RGB", (SIZE + 1, SIZE)).save(folder / "train2.png")
    with pytest.raises(DataError, match=r"line 4: train2\.png has 9 x 8 pixels, but dataset\.image_size=8"):
        read(folder, SIZE, CLASSES)
    path = npz()
    content = bytearray(path.read_bytes())
    content[500] ^= 1  # in the pixels: the ZIP's own checksum
    for damaged in (bytes(content), content[:3000], b"text"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"set\.npz cannot be read"):
            read(path, SIZE, CLASSES)
    np.save(tmp_path / "one.npy", LABELS.numpy())
    with pytest.raises(DataError, match="single array"):
        read(tmp_path / "one.npy", SIZE, CLASSES)
    with pytest.raises(DataError, match=r"neither a file nor a folder; check attack\.path"):
        read(tmp_path / "nowhere", SIZE, CLASSES)
    with pytest.raises(DataError, match=r"neither poisoned\.npz nor train\.csv"):
        read(tmp_path, SIZE, CLASSES)


def repacked(path: Path, name: str, content: bytes) -> Path:
    """``path`` with other bytes in one member."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for member, before in members.items():
            archive.writestr(member, content if member == name else before)
    return path


def heading(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no array", "magic"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': ((((,  ", "EOF in multi-line"),
        (heading((10**9, SIZE, SIZE, 3)) + b"x", "does not have the size that it declares"),
        (heading((-1, SIZE, SIZE, 3)), "does not have the size that it declares"),
        (heading((TRAIN, SIZE, SIZE, 3)) + bytes(TRAIN * SIZE**2 * 3 - 1), "does not have the size that it declares"),
    ],
)
def test_members_that_are_not_what_they_say(content: bytes, message: str, npz: Callable[..., Path]) -> None:
    path = repacked(npz(), "train_images.npy", content)
    with pytest.raises(DataError, match=rf"set\.npz cannot be read as an NPZ of plain arrays: .*{message}"):
        read(path, SIZE, CLASSES)


def test_an_encrypted_archive(npz: Callable[..., Path]) -> None:
    path = npz()
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.find(signature)
        while place >= 0:
            content[place + flags] |= 1
            place = content.find(signature, place + 4)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"set\.npz cannot be read as an NPZ of plain arrays: .*encrypted"):
        read(path, SIZE, CLASSES)


def test_an_archive_that_grows_a_thousandfold_is_not_unpacked(npz: Callable[..., Path]) -> None:
    path, count = npz(), 360_000
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_images.npy", heading((count, SIZE, SIZE, 3)) + bytes(count * SIZE**2 * 3))
    with pytest.raises(DataError, match=r"set\.npz: its arrays pass \d+ bytes unpacked.*zip bomb"):
        read(path, SIZE, CLASSES)


def test_what_is_not_asked_for_is_not_read(npz: Callable[..., Path]) -> None:
    same(read(npz(notes=np.array([{}], dtype=object)), SIZE, CLASSES), read(npz(), SIZE, CLASSES))


def test_files_that_are_no_plain_files(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "poisoned.npz")  # opening it would wait for ever
    for use in (fingerprint, count_rows, lambda path: read(path, SIZE, CLASSES)):
        with pytest.raises(DataError, match=r"neither poisoned\.npz nor train\.csv"):
            use(tmp_path / "pipe")
    (folder / "train.csv").rename(tmp_path / "train.csv")
    (folder / "train.csv").symlink_to(tmp_path / "train.csv")
    with pytest.raises(DataError, match=r"train\.csv is a link out of the data folder"):
        read(folder, SIZE, CLASSES)


def test_a_manifest_is_verified(folder: Path, npz: Callable[..., Path]) -> None:
    path = npz()
    sums = path.with_name("SHA256SUMS")
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    sums.write_text(f"{'0' * 64}  other.npz\n{right}  set.npz\n")
    read(path, SIZE, CLASSES)
    sums.write_text(f"{'0' * 64}  set.npz\n")
    with pytest.raises(DataError, match=r"set\.npz was altered"):
        read(path, SIZE, CLASSES)
    sums = folder / "SHA256SUMS"
    sums.write_text(f"{hashlib.sha256((folder / 'train.csv').read_bytes()).hexdigest()}  train.csv\n")
    read(folder, SIZE, CLASSES)
    edit(folder / "train.csv", "train3.png,0", "train3.png,1")
    with pytest.raises(DataError, match=r"train\.csv was altered"):
        read(folder, SIZE, CLASSES)
    for line, message in (
        (f"{'0' * 64}  gone.png", "line 1: gone.png is missing"),
        (f"{'0' * 64}  {folder.parent}/set.npz", "line 1: not of the form"),
        (f"{'0' * 64}  ../set.npz", "line 1: not of the form"),
        ("what", "line 1: not of the form"),
    ):
        sums.write_text(line + "\n")
        with pytest.raises(DataError, match=message):
            read(folder, SIZE, CLASSES)


def test_other_files_have_another_fingerprint(folder: Path, npz: Callable[..., Path]) -> None:
    path = npz()
    before = fingerprint(path)
    assert fingerprint(npz()) == before  # written anew with the same content
    assert fingerprint(npz(**changed("test_wanted", 0, 1))) != before
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    edit(folder / "train.csv", "train3.png,0", "train3.png,11")
    assert fingerprint(folder) != before


# ---------------------------------------------------------------------- the attack


def test_the_imported_rows_replace_those_of_the_data_set(
    npz: Callable[..., Path], make_view: Callable[..., Any]
) -> None:
    view = make_view(torch.arange(30) % CLASSES, size=SIZE, classes=CLASSES)
    result = Imported(str(npz()), 0, "refuse").poison(view)
    same(result, read(npz(), SIZE, CLASSES))
    assert len(result.train) == TRAIN
    assert result.train.num_classes == CLASSES
    assert len(result.example_index) == len(result.originals) == 0
    assert view.warnings == []
    clean = npz(is_poisoned=np.zeros(TRAIN, bool), trigger_id=None, test_images=None)
    Imported(str(clean), 0, "refuse").poison(view)
    assert [warning.split("set.npz ")[1] for warning in view.warnings] == [
        "has no poisoned image",
        "has no triggered test images: its ASR is unknown",
    ]


def test_a_holdout_that_may_hold_poisoned_images_is_refused(npz: Callable[..., Path]) -> None:
    def check(train_size: int, holdout: int, choice: str = "refuse") -> None:
        facts = Facts(CLASSES, SIZE, train_size, epochs=1, steps_per_epoch=1, holdout_size=holdout)
        Imported(str(npz()), 0, choice).check(facts)

    check(30, 0)
    check(TRAIN, 3)  # the data set without its holdout
    check(TRAIN + 3, 3)  # holdout.source=seen, before the data are read
    check(30, 3, "allow")
    with pytest.raises(DataError, match="train_labels, one integer an image"):
        Imported(str(npz(train_labels=np.array(3))), 0, "refuse").check(Facts(CLASSES, SIZE, 30, 1, 1, 3))
    with pytest.raises(
        ConfigError, match=r"holdout\.size=3 is not allowed: .*12 training images.*attack\.holdout=allow"
    ):
        check(30, 3)


def test_settings_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match=r"attack\.path is not set"):
        Imported(None, 0, "refuse")
    with pytest.raises(ConfigError, match=r"attack\.holdout='no'"):
        Imported("x", 0, "no")
    with pytest.raises(DataError, match=r"nowhere is neither"):
        Imported("nowhere", 0, "refuse").fingerprint()


# ---------------------------------------------------------------------- there and back

EXPORTED = (
    "attack=multi_2trig_2target", "attack@attack.second=blend_kitty", "attack.first.poison_rate=0.05",
    "attack.second.poison_rate=0.1", "attack.second.cover_rate=0.05",
)  # fmt: skip


def exported(tmp_path: Path, *words: str, form: str = "npz", out: str = "out") -> Path:
    machine = ["dataset=toy", "model=tiny", "hardware=cpu", "hardware.threads=1", f"output_root={tmp_path}/outputs"]
    code = export_poisoned.main([*words, *machine, "--out", str(tmp_path / out), "--format", form])
    assert code == 0
    return tmp_path / out


@pytest.fixture
def as_poisoned(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What an export poisoned and stamped, caught on its way to the files."""
    caught: dict[str, Any] = {}
    before = export_poisoned.triggered

    def triggered(run: Any, dataset: Any, poisoned: Any) -> Any:
        caught["poisoned"], caught["tests"] = poisoned, before(run, dataset, poisoned)
        return caught["tests"]

    monkeypatch.setattr(export_poisoned, "triggered", triggered)
    return caught


@pytest.mark.parametrize("form", ["npz", "folder"])
def test_an_export_is_read_back_to_the_same_set(form: str, tmp_path: Path, as_poisoned: dict[str, Any]) -> None:
    out = exported(tmp_path, *EXPORTED, form=form)
    poisoned, tests = as_poisoned["poisoned"], as_poisoned["tests"]
    assert (int(poisoned.is_poisoned.sum()), int(poisoned.is_cover.sum())) == (76, 25)
    found = read(out, 16, 4)
    assert torch.equal(found.train.images, poisoned.train.images)
    assert torch.equal(found.train.labels, poisoned.train.labels)
    for name in ("is_poisoned", "is_cover", "true_labels", "trigger_id"):
        assert torch.equal(getattr(found, name), getattr(poisoned, name)), name
    assert [(case.name, case.target_class, case.counts, len(case.test)) for case in found.cases] == [
        ("first_to_0", 0, True, 192),
        ("second_to_1", 1, True, 192),
    ]
    for case, test in zip(found.cases, tests, strict=True):
        assert torch.equal(case.test.images, test.case.test.images)
        assert torch.equal(case.test.labels, test.case.test.labels)
        assert (test.true_labels != case.target_class).all()


def test_an_export_says_what_it_is_and_is_the_same_each_time(tmp_path: Path) -> None:
    out, again = (exported(tmp_path, *EXPORTED, out=name) for name in ("out", "again"))
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "SHA256SUMS", "card.json", "poisoned.npz"]
    for file in out.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name
    listed = dict(reversed(line.split("  ")) for line in (out / "SHA256SUMS").read_text().splitlines())
    assert set(listed) == {"README.md", "card.json", "poisoned.npz"}
    for name, found in listed.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == found
    card = json.loads((out / "card.json").read_text())
    assert card["attack"]["name"] == "multi_2trig_2target"
    assert "TRAP VI-G" in card["attack"]["about"]
    assert card["attack"]["config"]["second"]["alpha"] == 0.2
    assert card["counts"]["poisoned_by_trigger"] == {"0": 25, "1": 51}
    assert "licence" in card
    page = (out / "README.md").read_text()
    assert "python run.py dataset=toy attack=import" in page
    assert str(tmp_path) not in page + json.dumps(card)
    with np.load(out / "poisoned.npz", allow_pickle=False) as archive:
        assert archive["train_images"].shape == (512, 16, 16, 3)


def test_an_import_measures_what_the_attack_itself_measures(tmp_path: Path, bench: Callable[..., Any]) -> None:
    out = exported(tmp_path, "attack=badnets", "holdout.size=12")
    words = ["defense=no_defense", "train.epochs=2", "holdout.size=12"]
    own, imported = bench("attack=badnets", *words), bench("attack=import", f"attack.path={out}", *words)
    assert imported.code == 0, imported.err
    assert imported.result["metrics"] == own.result["metrics"]
    assert imported.result["poison"] == own.result["poison"]
    shutil.rmtree(out)
    gone = bench("attack=import", f"attack.path={out}", *words)
    assert gone.code == 3
    assert "check attack.path" in gone.err


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    stale, living, other = (tmp_path / f".{name}.{owner}.tmp" for name, owner in (
        ("out", process.pid), ("out", os.getppid()), ("out.more", process.pid),
    ))  # fmt: skip
    for folder in (stale, living, other):
        (folder / "train").mkdir(parents=True)
    export_poisoned.remove_stale(tmp_path / "out")
    assert [folder.exists() for folder in (stale, living, other)] == [False, True, True]


def test_nothing_is_left_of_an_export_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("backdoor_bench.data.poisoned_files.write_sums", full)
    words = [*TOY[:-1], f"output_root={tmp_path}/outputs", "--out", str(tmp_path / "out")]
    assert export_poisoned.main(["attack=badnets", *words]) == 6
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out")) + list(tmp_path.glob(".*"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert export_poisoned.main(["attack=badnets", *words]) == 2
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"
    for attack, reason in (("none", "poisons nothing"), ("loss_adaptive", "owns the training loss")):
        assert export_poisoned.main([f"attack={attack}", *words]) == 2
        assert reason in capsys.readouterr().err
