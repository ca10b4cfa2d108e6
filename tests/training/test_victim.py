"""The victim is trained once; early epochs come from the same training."""

import torch

from backdoor_bench.cache import Stages
from backdoor_bench.training.victim import CachedVictim


def make(tmp_path, blobs, new_model, recipe, progress, rows):
    return CachedVictim(
        blobs, lambda: new_model(4), recipe, lambda: torch.Generator().manual_seed(1),
        Stages(tmp_path, "s", progress, {}, rows), rows, progress,
    )  # fmt: skip


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_trained_once_then_loaded_with_its_rows(tmp_path, blobs, new_model, recipe, progress, rows):
    victim = make(tmp_path, blobs, new_model, recipe, progress, rows)
    assert not victim.is_cached()
    first = victim()
    assert [row["epoch"] for row in rows.rows] == [1, 2, 3]
    rows.rows.clear()
    again = make(tmp_path, blobs, new_model, recipe, progress, rows)
    assert again.is_cached()
    assert same(first, again())
    assert [row["epoch"] for row in rows.rows] == [1, 2, 3]


def test_copies_are_fresh(tmp_path, blobs, new_model, recipe, progress, rows):
    victim = make(tmp_path, blobs, new_model, recipe, progress, rows)
    one = victim()
    with torch.no_grad():
        one.head.weight.zero_()
    assert not same(one, victim())


def test_epochs_nobody_kept_are_trained_again_to_the_same_weights(tmp_path, blobs, new_model, recipe, progress, rows):
    from dataclasses import replace

    everything = make(tmp_path / "a", blobs, new_model, replace(recipe, snapshots=3), progress, rows)
    expected = everything(snapshots=[1, 2, 3])
    few = make(tmp_path / "b", blobs, new_model, replace(recipe, snapshots=0), progress, rows)
    final = few()
    assert same(few(snapshots=[2])[0], expected[1])
    assert same(final, expected[2])
    assert not same(expected[0], expected[1])


def test_a_damaged_snapshot_is_made_again(tmp_path, blobs, new_model, recipe, progress, rows):
    victim = make(tmp_path, blobs, new_model, recipe, progress, rows)
    expected = victim(snapshots=[1])[0]
    file = next(tmp_path.glob("victim-*/weights-00001.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])
    assert same(victim(snapshots=[1])[0], expected)
    assert "damaged" in progress.warnings[0]
