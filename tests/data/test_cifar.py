"""CIFAR's layouts on tiny batches: hashes, safe unpickling, npz, and the faults they may carry."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backdoor_bench.data import cifar
from backdoor_bench.data.cifar import CIFAR, PUBLISHED
from backdoor_bench.data.restricted_pickle import read_pickle
from backdoor_bench.errors import ConfigError, DataError

TEN = CIFAR("cifar10", 10, 32, 50, 10, [0.5] * 3, [0.2] * 3, None, None, 0, None, False, False)
HUNDRED = replace(TEN, name="cifar100", num_classes=100, train_size=100, test_size=10)


def pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def write_batches(root: Path, keys: type = bytes, protocol: int = 2) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def key(text: str) -> Any:
        return text.encode() if keys is bytes else text

    for number in range(5):
        batch = {key("data"): pixels(10, number), key("labels"): [(number + i) % 10 for i in range(10)]}
        (folder / f"data_batch_{number + 1}").write_bytes(pickle.dumps(batch, protocol=protocol))
    test = {key("data"): pixels(10, 9), key("labels"): list(range(10))}
    (folder / "test_batch").write_bytes(pickle.dumps(test, protocol=protocol))
    names = [key(f"kind{i}") for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({key("label_names"): names}, protocol=protocol))
    return folder


@pytest.mark.parametrize("keys", [bytes, str])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_batches_are_read_in_order_in_every_spelling(tmp_path: Path, keys: type, protocol: int) -> None:
    write_batches(tmp_path, keys, protocol)
    data = replace(TEN, root=str(tmp_path)).load()
    assert data.test is not None
    expected = np.concatenate([pixels(10, number) for number in range(5)]).reshape(-1, 3, 32, 32)
    assert isinstance(data.train.images, Tensor)
    assert np.array_equal(data.train.images.numpy(), expected)
    assert data.train.labels.tolist() == [(number + i) % 10 for number in range(5) for i in range(10)]
    assert data.train.labels.dtype == torch.int64
    assert data.test.labels.tolist() == list(range(10))
    assert data.class_names == tuple(f"kind{i}" for i in range(10))


def test_numpy_1_pickles_are_read(tmp_path: Path) -> None:
    """NumPy 1 wrote another module name, of the same length class, into its pickles."""
    folder = write_batches(tmp_path)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert b"numpy.core.multiarray" in (folder / "test_batch").read_bytes()
    assert len(replace(TEN, root=str(tmp_path)).load().train) == 50


def test_python_2_pickles_are_read(tmp_path: Path) -> None:
    """Protocol 0 by hand, as Python 2 wrote it: byte strings without a codec."""
    (tmp_path / "x").write_bytes(b"(dS'label_names'\n(lS'caf\\xe9'\nas.")
    assert read_pickle(tmp_path / "x") == {"label_names": ["café"]}


def test_root_may_be_the_folder_itself_or_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_batches(tmp_path)
    assert len(replace(TEN, root=str(folder)).load().train) == 50
    monkeypatch.setenv("BACKDOOR_BENCH_DATA", str(tmp_path))
    assert len(TEN.load().train) == 50
    monkeypatch.delenv("BACKDOOR_BENCH_DATA")
    with pytest.raises(DataError, match=r"dataset\.root"):
        TEN.load()


def test_absent_data_say_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cifar-10-batches-py/data_batch_1 nor cifar10\.npz; set dataset\.root"):
        replace(TEN, root=str(tmp_path)).load()


def test_verify_refuses_other_files_with_both_hashes(tmp_path: Path) -> None:
    folder = write_batches(tmp_path)
    found = hashlib.md5((folder / "data_batch_1").read_bytes()).hexdigest()
    with pytest.raises(DataError) as caught:
        replace(TEN, root=str(tmp_path), verify=True).load()
    for part in ("data_batch_1", PUBLISHED["cifar10"].train[0][1], found, "dataset.verify=false"):
        assert part in str(caught.value)


def test_verify_accepts_the_published_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_batches(tmp_path)

    def hashes(names: list[str]) -> tuple[tuple[str, str], ...]:
        return tuple((name, hashlib.md5((folder / name).read_bytes()).hexdigest()) for name in names)

    layout = replace(
        PUBLISHED["cifar10"],
        train=hashes([f"data_batch_{i}" for i in range(1, 6)]),
        test=hashes(["test_batch"]),
        meta=hashes(["batches.meta"])[0],
    )
    monkeypatch.setitem(cifar.PUBLISHED, "cifar10", layout)
    assert len(replace(TEN, root=str(tmp_path), verify=True).load().train) == 50


class Runs:
    """Pickled, it touches a file when it is unpickled by the standard unpickler."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.sentinel}",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    folder = write_batches(tmp_path)
    sentinel = tmp_path / "sentinel"
    (folder / "data_batch_1").write_bytes(pickle.dumps({"data": Runs(sentinel)}))
    with pytest.raises(DataError, match=r"data_batch_1 .*system"):
        replace(TEN, root=str(tmp_path)).load()
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"data": np.zeros(2)})[:-9],
        b"",
        pickle.dumps([1, 2]),
        b"c_codecs\nencode\n(Vabc\nVzlib_codec\ntR.",
        b"cbuiltins\neval\n(V1\ntR.",
    ],
    ids=["torn", "empty", "no dictionary", "other codec", "eval"],
)
def test_damaged_and_foreign_pickles_are_data_errors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "batch").write_bytes(content)
    with pytest.raises(DataError, match="batch"):
        read_pickle(tmp_path / "batch")


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"data": pixels(10, 0), "labels": [10] * 10}, r"outside 0\.\.9"),
        ({"data": pixels(10, 0), "labels": [-100] * 10}, "-100"),
        ({"data": pixels(10, 0), "labels": [0.5] * 10}, "float64"),
        ({"data": pixels(10, 0), "labels": [[1], [2, 3]]}, "class numbers"),
        ({"data": pixels(10, 0)}, "class numbers"),
        ({"data": pixels(10, 0), "labels": [1] * 9}, "10 images but 9 labels"),
        ({"data": pixels(10, 0)[:, :3000], "labels": [1] * 10}, "3072"),
        ({"data": np.zeros((10, 3072)), "labels": [1] * 10}, "3072"),
        ({"labels": [1] * 10}, "3072"),
    ],
)
def test_bad_batches_are_refused(batch: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = write_batches(tmp_path)
    (folder / "data_batch_2").write_bytes(pickle.dumps(batch))
    with pytest.raises(DataError, match=words):
        replace(TEN, root=str(tmp_path)).load()


def test_a_part_of_the_set_does_not_pass_for_the_whole(tmp_path: Path) -> None:
    write_batches(tmp_path)
    with pytest.raises(DataError, match=r"has 50 train images, cifar10 has 60; .*dataset\.train_size=50"):
        replace(TEN, root=str(tmp_path), train_size=60).load()
    assert len(replace(TEN, root=str(tmp_path), train_size=None).load().train) == 50


def test_limits_are_stratified(tmp_path: Path) -> None:
    write_batches(tmp_path)
    data = replace(TEN, root=str(tmp_path), limit=20, test_limit=5).load()
    assert data.test is not None
    assert data.train.labels.bincount().tolist() == [2] * 10
    assert len(data.test) == 5


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", 100), ("test", 10)):
        fine = list(range(100))[:count]
        batch = {"data": pixels(count, 0), "fine_labels": fine, "coarse_labels": [0] * count}
        (folder / name).write_bytes(pickle.dumps(batch))
    data = replace(HUNDRED, root=str(tmp_path)).load()
    assert data.train.labels.tolist() == list(range(100))
    assert data.class_names[99] == "99"  # no meta file here


def write_npz(root: Path, **changes: Any) -> None:
    arrays: dict[str, Any] = {
        "x_train": pixels(50, 0).reshape(-1, 3, 32, 32),
        "y_train": np.arange(50) % 10,
        "x_test": pixels(10, 1).reshape(-1, 3, 32, 32),
        "y_test": np.arange(10).astype(np.uint8),
    }
    arrays.update(changes)
    np.savez(root / "cifar10.npz", **{key: value for key, value in arrays.items() if value is not None})


def test_npz_is_read_only_without_verification(tmp_path: Path) -> None:
    write_npz(tmp_path)
    data = replace(TEN, root=str(tmp_path)).load()
    assert data.test is not None
    assert isinstance(data.train.images, Tensor)
    assert np.array_equal(data.train.images.numpy(), pixels(50, 0).reshape(-1, 3, 32, 32))
    assert data.test.labels.tolist() == list(range(10))
    with pytest.raises(DataError, match=r"no published checksum; set dataset\.verify=false"):
        replace(TEN, root=str(tmp_path), verify=True).load()


def with_nan() -> np.ndarray:
    images = np.zeros((50, 3, 32, 32), np.float32)
    images[7] = np.nan
    return images


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"y_train": np.arange(50)}, r"outside 0\.\.9", id="B37"),
        pytest.param({"y_train": np.full(50, -100)}, "-100", id="B38"),
        pytest.param({"y_train": np.arange(50) % 10 + 0.0}, "float64", id="B39"),
        pytest.param({"y_train": np.arange(50) % 9}, r"no images \(class 9\)", id="B41"),
        pytest.param({"x_train": with_nan()}, "1 of them with NaN", id="B42"),
        pytest.param({"x_train": np.array([{}], dtype=object)}, "Object arrays cannot be loaded", id="B49"),
        pytest.param({"y_test": None}, "y_test", id="missing"),
        pytest.param({"x_train": np.zeros((50, 32, 32, 3), np.uint8)}, r"\(50, 32, 32, 3\)", id="channels last"),
        pytest.param({"x_train": np.zeros((50, 3, 32, 32), np.int16)}, "int16", id="int16"),
    ],
)
def test_bad_npz_files_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_npz(tmp_path, **changes)
    with pytest.raises(DataError, match=words):
        replace(TEN, root=str(tmp_path)).load()


def test_an_empty_npz_is_refused(tmp_path: Path) -> None:
    """B40."""
    write_npz(tmp_path, x_train=np.zeros((0, 3, 32, 32), np.uint8), y_train=np.zeros(0, np.int64))
    with pytest.raises(DataError, match="no images"):
        replace(TEN, root=str(tmp_path), train_size=None).load()


def test_a_torn_npz_is_refused(tmp_path: Path) -> None:
    write_npz(tmp_path)
    path = tmp_path / "cifar10.npz"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"cifar10\.npz cannot be read"):
        replace(TEN, root=str(tmp_path)).load()


@pytest.mark.parametrize(
    ("values", "key"),
    [({"name": "cifar11"}, "name"), ({"num_classes": 100}, "num_classes"), ({"verify": "yes"}, "verify")],
)
def test_bad_values_name_their_key(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"dataset.{key}"):
        replace(TEN, **values)


@pytest.mark.slow
def test_real_cifar10_has_the_published_statistics(tmp_path: Path) -> None:
    """The set as packed beside this project: its batches are not the published files, so it must not verify."""
    root = os.environ.get("BACKDOOR_BENCH_DATA")
    if not root or not (Path(root) / "unpack.py").exists():
        pytest.skip("BACKDOOR_BENCH_DATA names no folder with packed CIFAR-10 and its unpack.py")
    subprocess.run([sys.executable, str(Path(root) / "unpack.py"), str(tmp_path)], check=True, capture_output=True)
    real = replace(TEN, train_size=50000, test_size=10000, root=str(tmp_path))
    with pytest.raises(DataError, match="MD5 expected"):
        replace(real, verify=True).load()
    data = real.load()
    assert data.class_names[6] == "frog"
    assert isinstance(data.train.images, Tensor)
    assert data.train.labels.bincount().tolist() == [5000] * 10
    mean = data.train.images.float().mean((0, 2, 3)) / 255
    assert mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
