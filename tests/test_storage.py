"""Bundles and checkpoints: what is written comes back, and nothing damaged passes for good."""

import json
import os
from pathlib import Path

import pytest
import torch

from backdoor_bench.errors import DataError, DiskError
from backdoor_bench.storage import (
    Checkpoints,
    Damaged,
    digest,
    load_bundle,
    pack_optimizer,
    remove_stale_temporaries,
    save_bundle,
    unpack_optimizer,
    write_bytes,
)


def test_bundle_round_trip(tmp_path):
    tensors = {"a": torch.arange(6).reshape(2, 3), "flag": torch.tensor([True, False])}
    save_bundle(tmp_path / "x", tensors, {"epoch": 3, "name": "é"})
    bundle = load_bundle(tmp_path / "x")
    assert bundle.meta == {"epoch": 3, "name": "é"}
    assert all(torch.equal(bundle.tensors[name], tensor) for name, tensor in tensors.items())


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def damage(path: Path, how: str) -> None:
    if how == "flip data":
        flip_last_bit(path.with_suffix(".safetensors"))
    elif how == "truncate":
        data = path.with_suffix(".safetensors").read_bytes()
        path.with_suffix(".safetensors").write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.with_suffix(".safetensors").write_bytes(b"")
    elif how == "no checksum":
        path.with_suffix(".json").unlink()
    elif how == "altered meta":
        text = path.with_suffix(".json").read_text()
        path.with_suffix(".json").write_text(text.replace('"epoch": 2', '"epoch": 9'))


HOWS = ["flip data", "truncate", "empty", "no checksum", "altered meta"]


@pytest.mark.parametrize("how", HOWS)
def test_damaged_bundle_is_refused(tmp_path, how):
    save_bundle(tmp_path / "x", {"a": torch.ones(100)}, {"epoch": 2})
    damage(tmp_path / "x", how)
    with pytest.raises(Damaged):
        load_bundle(tmp_path / "x")


@pytest.mark.parametrize("how", HOWS)
def test_checkpoints_fall_back_to_the_one_before(tmp_path, how):
    checkpoints = Checkpoints(tmp_path, "key")
    for epoch in (1, 2):
        checkpoints.save(epoch, {"a": torch.full((50,), float(epoch))}, {})
    damage(tmp_path / "epoch-00002", how)
    said: list[str] = []
    bundle = Checkpoints(tmp_path, "key").load(said.append)
    assert bundle.meta["epoch"] == 1
    assert bundle.tensors["a"][0] == 1
    assert "epoch-00002" in said[0]


def test_only_the_last_two_checkpoints_are_kept_and_all_bad_is_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path, "key")
    for epoch in (1, 2, 3):
        checkpoints.save(epoch, {"a": torch.ones(1)}, {})
    assert sorted(file.name for file in tmp_path.glob("*.json")) == ["epoch-00002.json", "epoch-00003.json"]
    for epoch in (2, 3):
        damage(tmp_path / f"epoch-0000{epoch}", "flip data")
    with pytest.raises(DataError, match=r"resume\.restart=true"):
        checkpoints.load(lambda message: None)


def test_checkpoint_of_another_key_is_not_used(tmp_path):
    Checkpoints(tmp_path, "one").save(1, {"a": torch.ones(1)}, {})
    said: list[str] = []
    assert Checkpoints(tmp_path, "other").load(said.append) is None
    assert "another configuration" in said[0]


def test_newer_schema_is_refused_with_both_versions(tmp_path):
    save_bundle(tmp_path / "x", {}, {})
    record = json.loads((tmp_path / "x.json").read_text())
    record["schema"] = 99
    (tmp_path / "x.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"schema 99.*reads 1"):
        load_bundle(tmp_path / "x")


def test_a_pickle_in_place_of_tensors_is_not_run(tmp_path):
    import pickle

    sentinel = tmp_path / "ran"
    save_bundle(tmp_path / "x", {"a": torch.ones(1)}, {})

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(sentinel),)

    (tmp_path / "x.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(Damaged):
        load_bundle(tmp_path / "x")
    assert not sentinel.exists()


def test_write_that_cannot_be_done_names_path_and_bytes(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DiskError, match=r"5 bytes to .*file/inside"):
        write_bytes(tmp_path / "file" / "inside", b"12345")


def test_full_disk_keeps_the_old_file(tmp_path):
    """A child process may not write files above 1,000 bytes (as a full disk would)."""
    write_bytes(tmp_path / "x", b"old")
    child = os.fork()
    if child == 0:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_bytes(tmp_path / "x", b"n" * 5000)
        except DiskError as error:
            os._exit(42 if "disk is full" in str(error) and "5000 bytes" in str(error) else 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 42
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_stale_temporaries_go_and_living_ones_stay(tmp_path):
    (tmp_path / ".a.safetensors.999999999.tmp").write_text("")
    (tmp_path / f".b.json.{os.getpid()}.tmp").write_text("")
    remove_stale_temporaries(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [f".b.json.{os.getpid()}.tmp"]


def test_digest_does_not_depend_on_order():
    assert digest({"a": 1, "b": [1.5, None]}) == digest({"b": (1.5, None), "a": 1})
    assert digest({"a": 1}) != digest({"a": 1.0000001})


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_optimizer_state_round_trip_continues_identically(tmp_path, kind):
    def make():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return layer, kind(layer.parameters(), lr=0.1, **options)

    def step(layer, optimizer):
        optimizer.zero_grad()
        layer(torch.ones(1, 3)).pow(2).sum().backward()
        optimizer.step()

    one, one_optimizer = make()
    step(one, one_optimizer)
    tensors, plain = pack_optimizer(one_optimizer)
    save_bundle(tmp_path / "x", {**tensors, **one.state_dict()}, plain)
    bundle = load_bundle(tmp_path / "x")
    other, other_optimizer = make()
    other.load_state_dict({name: bundle.tensors[name] for name in other.state_dict()})
    unpack_optimizer(other_optimizer, bundle.tensors, bundle.meta)
    step(one, one_optimizer)
    step(other, other_optimizer)
    assert torch.equal(one.weight, other.weight)
