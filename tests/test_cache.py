"""Stages: made once, found again, made anew when damaged; their curves and seconds come back."""

import pytest
import torch

from backdoor_bench.cache import WAITING, Stages
from backdoor_bench.errors import Interrupted


def folder_of(stages, name):
    return next(stages._root.glob(f"{name}-*"))


def test_a_step_is_made_once_and_keyed_by_its_settings(stages):
    calls = []

    def build():
        calls.append(1)
        return {"x": torch.tensor([len(calls)])}, {"note": "hello"}

    first = stages.keep("map", build, {"epoch": 1})
    again = stages.keep("map", build, {"epoch": 1})
    other = stages.keep("map", build, {"epoch": 2})
    assert len(calls) == 2
    assert first.tensors["x"].item() == again.tensors["x"].item() == 1
    assert other.tensors["x"].item() == 2
    assert again.meta == {"note": "hello"}


def test_scopes_do_not_share(tmp_path, progress, rows):
    one = Stages(tmp_path, {"attack": "a"}, progress, {}, rows)
    two = Stages(tmp_path, {"attack": "b"}, progress, {}, rows)
    one.tensors("x", lambda: {"v": torch.tensor(1)})
    assert two.tensors("x", lambda: {"v": torch.tensor(2)})["v"].item() == 2


def test_a_flipped_byte_is_noticed_and_the_step_made_again(stages, progress):
    def build():
        return {"x": torch.arange(1000)}

    stages.tensors("set", build)
    file = folder_of(stages, "set") / "bundle.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(bytes(data))
    assert torch.equal(stages.tensors("set", build)["x"], torch.arange(1000))
    assert "damaged" in progress.warnings[0]
    assert file.read_bytes() != bytes(data)


def test_seconds_of_a_cached_step_are_those_it_took(tmp_path, progress, rows):
    def build():
        return {}, {"seconds_by_stage": {"features": 1.5, "embedding": 20.0}}

    Stages(tmp_path, "s", progress, {}, rows).keep("embedding", build)
    seconds: dict[str, float] = {}
    stages = Stages(tmp_path, "s", progress, seconds, rows)
    stages.keep("embedding", build)
    stages.keep("embedding", build)
    assert seconds == {"features": 3.0, "embedding": 40.0}


def test_fitted_loads_weights_and_replays_rows(stages, rows):
    def train(checkpoints):
        with torch.no_grad():
            model.weight.fill_(7)
        rows.record({"stage": "removal", "epoch": 1, "acc": 0.5})

    model = torch.nn.Linear(2, 2)
    stages.fitted("removal", model, train, {"lr": 1})
    rows.rows.clear()
    model = torch.nn.Linear(2, 2)
    stages.fitted("removal", model, lambda checkpoints: 1 / 0, {"lr": 1})
    assert model.weight.eq(7).all()
    assert rows.rows == [{"stage": "removal", "epoch": 1, "acc": 0.5}]


def test_the_scope_cannot_be_read_back(stages):
    public = [name for name in vars(stages) if not name.startswith("_")]
    assert public == []


def test_a_second_run_waits_for_the_one_that_holds_the_step(stages, progress):
    import subprocess
    import sys

    stages.tensors("x", lambda: {"v": torch.tensor(1)})
    hold = (
        "import sys, time, filelock\nwith filelock.FileLock(sys.argv[1]):\n print('held', flush=True)\n time.sleep(0.5)"
    )
    lock = str(folder_of(stages, "x") / "lock")
    with subprocess.Popen([sys.executable, "-c", hold, lock], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert stages.tensors("x", lambda: {"v": torch.tensor(2)})["v"].item() == 1
    assert "waiting for it" in progress.said[0]


def test_a_wait_for_another_run_is_booked_and_hears_a_request_to_stop(stages, monkeypatch):
    """A job that waits must end with its sweep, and its wait is no time of its own."""
    import filelock

    stages.tensors("x", lambda: {"v": torch.tensor(1)})
    lock = filelock.FileLock(folder_of(stages, "x") / "lock")
    requests = iter([False, True])
    monkeypatch.setattr("backdoor_bench.training.interrupt.raise_if_requested", lambda: stop(next(requests)))

    def stop(asked):
        if asked:
            raise Interrupted("stopped by SIGTERM")

    with lock, pytest.raises(Interrupted):
        stages.tensors("x", dict)
    assert stages._seconds[WAITING] > 0
