from __future__ import annotations

import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from backdoor_bench.errors import ConfigError
from backdoor_bench.tracking import Tracker, TrackingConfig, start

CONF = Path(__file__).resolve().parents[1] / "conf" / "tracking"
OFFLINE = TrackingConfig("offline", "test", None, None, 10.0, 30.0)


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))


class FakeRun:
    """Stands for a W&B run and keeps what it gets; ``fail`` names the method that raises, ``block`` holds finish."""

    def __init__(self, fail: str = "", block: threading.Event | None = None) -> None:
        self.fail, self.block = fail, block
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None

    def log(self, row: dict[str, Any]) -> None:
        if self.fail == "log" and len(self.rows) == 2:
            raise OSError("No space left on device")
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        if self.block is not None:
            self.block.wait(20)
        self.exit_code = exit_code


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_yaml_lists_exactly_the_constructor_arguments(path: Path) -> None:
    node = yaml.safe_load(path.read_text())
    values = {key: value for key, value in node.items() if not key.startswith("_")}
    assert set(values) == set(inspect.signature(TrackingConfig).parameters)
    assert TrackingConfig(**values).mode == path.stem
    assert node["_target_"] == "backdoor_bench.tracking.TrackingConfig"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"mode": "on"}, "tracking.mode"),
        ({"init_timeout": 0}, "tracking.init_timeout"),
        ({"finish_timeout": "ten"}, "tracking.finish_timeout"),
        ({"project": "a/b"}, "tracking.project"),
        ({"project": None}, "tracking.project"),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_its_key(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        replace(OFFLINE, **change)


def test_disabled_writes_nothing_and_does_not_import_wandb(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from backdoor_bench.tracking import TrackingConfig, start\n"
        "t = start(TrackingConfig('disabled', 'p', None, None, 1.0, 1.0), Path(sys.argv[1]), {}, 'n', [], print)\n"
        "t.log({'acc': 1.0}, 1); t.image('x', Path('x')); t.finish({'acc': 1.0})\n"
        "assert 'wandb' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_offline_leaves_files_says_nothing_and_keeps_its_id(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    (tmp_path / "flagged.csv").write_text("index,file\n1,a\n2,b\n3,c\n")
    warned: list[str] = []
    ids = []
    for _ in range(2):
        tracker = start(
            OFFLINE, tmp_path, {"seed": 1}, "run " * 50, ["badnets", "badnets", "", "x" * 80], warned.append
        )
        tracker.log({"stage": "train", "epoch": 1, "acc": 0.5, "asr": None}, 1)
        tracker.image("grid", tmp_path / "grid.png")
        tracker.table("flagged", tmp_path / "flagged.csv", max_rows=2)
        tracker.finish({"acc": 0.5})
        tracker.finish({"acc": 0.5})
        ids.append((tmp_path / "tracking" / "id.txt").read_text().strip())
    assert warned == []
    assert ids[0] == ids[1]
    files = list((tmp_path / "tracking").rglob(f"run-{ids[0]}.wandb"))
    assert files
    # W&B's own process writes them, and on a busy machine may still do so after finish() has returned.
    until = time.monotonic() + 30
    while any(file.stat().st_size <= 500 for file in files) and time.monotonic() < until:
        time.sleep(0.1)
    assert all(file.stat().st_size > 500 for file in files)
    [table] = {json.dumps(json.loads(file.read_text())["data"]) for file in tmp_path.rglob("flagged*.table.json")}
    assert json.loads(table) == [["1", "a"], ["2", "b"]]
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_damaged_id_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking" / "id.txt").write_bytes(b"\xff../../x")
    start(OFFLINE, tmp_path, {}, "n", [], pytest.fail).finish({})
    assert (tmp_path / "tracking" / "id.txt").read_text().strip().isalnum()


def test_rows_are_named_by_stage_and_hold_numbers_only() -> None:
    run = FakeRun()
    tracker = Tracker(lambda: run, 5.0, pytest.fail)
    tracker.log({"stage": "train", "epoch": 2, "acc": 0.5, "asr": None, "note": "x"}, 7)
    tracker.log({"acc": 0.25}, 3)
    tracker.log({"stage": "train"}, 4)
    tracker.finish({"acc": 0.75}, failed=True)
    assert run.rows == [{"train/epoch": 2, "train/acc": 0.5, "step": 7}, {"acc": 0.25, "step": 3}]
    assert run.summary == {"acc": 0.75}
    assert run.exit_code == 1


def test_online_without_a_key_goes_offline_with_one_warning(tmp_path: Path) -> None:
    warned: list[str] = []
    tracker = start(replace(OFFLINE, mode="online"), tmp_path, {}, "n", [], warned.append)
    tracker.log({"acc": 0.5}, 1)
    tracker.finish({})
    assert len(warned) == 1
    assert "tracked offline" in warned[0]
    assert "wandb login" in warned[0]
    assert list((tmp_path / "tracking" / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize("name", ["CommError", "UsageError", "TimeoutError"])
def test_online_unreachable_goes_offline_with_one_warning(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    error = {"TimeoutError": TimeoutError}.get(name) or getattr(wandb.errors, name)
    run, modes = FakeRun(), []

    def init(mode: str, resume: str | None, **arguments: Any) -> FakeRun:
        modes.append((mode, resume))
        if mode == "online":
            raise error("no\nroute")
        return run

    run.define_metric = lambda *_, **__: None  # type: ignore[attr-defined]
    monkeypatch.setattr(wandb, "init", init)
    warned: list[str] = []
    tracker = start(replace(OFFLINE, mode="online"), tmp_path, {}, "n", [], warned.append)
    tracker.log({"acc": 0.5}, 1)
    tracker.finish({})
    assert modes == [("online", "allow"), ("offline", None)]
    assert run.rows == [{"acc": 0.5, "step": 1}]
    assert len(warned) == 1
    assert f"{name}: no route" in warned[0]


@pytest.mark.parametrize("answers", ["refuses", "is silent"])
def test_an_unreachable_host_is_given_up_after_the_init_timeout(
    answers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the end of the process, where wandb's telemetry would wait for a host that does not answer."""
    silent = socket.create_server(("127.0.0.1", 0))  # takes connections, never answers
    port = silent.getsockname()[1] if answers == "is silent" else 9
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    code = (
        "import sys, time; from pathlib import Path; from backdoor_bench.tracking import TrackingConfig, start\n"
        "begin = time.time()\n"
        "c = TrackingConfig('online', 'p', None, None, 1.0, 12.0)\n"
        "start(c, Path(sys.argv[1]), {}, 'n', [], print).finish({})\n"
        "assert time.time() - begin < 12, time.time() - begin"
    )
    with silent:
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, timeout=50
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert "tracked offline" in done.stdout
    assert list(tmp_path.rglob("offline-run-*/*.wandb"))


def test_wandb_missing_or_broken_disables_tracking_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    warned: list[str] = []
    tracker = start(OFFLINE, tmp_path, {}, "n", [], warned.append)
    tracker.log({"acc": 0.5}, 1)
    tracker.finish({})
    assert len(warned) == 1
    assert "pip install wandb" in warned[0]


def test_a_folder_that_cannot_be_written_disables_tracking_with_one_warning(tmp_path: Path) -> None:
    (tmp_path / "tracking").write_text("a file where the folder should be")
    warned: list[str] = []
    tracker = start(OFFLINE, tmp_path, {}, "n", [], warned.append)
    tracker.log({"acc": 0.5}, 1)
    tracker.finish({})
    assert len(warned) == 1
    assert "tracking is off" in warned[0]


def test_a_log_that_raises_switches_the_sink_off_with_one_warning() -> None:
    run, warned = FakeRun(fail="log"), list[str]()
    tracker = Tracker(lambda: run, 5.0, warned.append)
    for step in range(5):
        tracker.log({"acc": 0.5}, step)
    tracker.finish({"acc": 0.5})
    assert len(run.rows) == 2
    assert len(warned) == 1
    assert "No space left on device" in warned[0]


def test_a_picture_that_is_missing_switches_the_sink_off_with_one_warning(tmp_path: Path) -> None:
    warned: list[str] = []
    tracker = start(OFFLINE, tmp_path, {}, "n", [], warned.append)
    tracker.image("grid", tmp_path / "missing.png")
    tracker.finish({})
    assert len(warned) == 1


def test_a_finish_that_hangs_is_given_up() -> None:
    release = threading.Event()
    warned: list[str] = []
    tracker = Tracker(lambda: FakeRun(block=release), 0.3, warned.append)
    begin = time.perf_counter()
    tracker.finish({})
    assert time.perf_counter() - begin < 5
    assert len(warned) == 1
    assert "tracking.finish_timeout=0.3" in warned[0]
    release.set()


def test_a_wandb_process_that_hangs_does_not_delay_the_exit(tmp_path: Path) -> None:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("finds the process of W&B through /proc")
    code = """
import os, signal, sys, time
from pathlib import Path
from backdoor_bench.tracking import TrackingConfig, start
folder = Path(sys.argv[1])
tracker = start(TrackingConfig("offline", "p", None, None, 10.0, 1.0), folder, {}, "n", [], print)
tracker.log({"acc": 0.5}, 1)
while not list(folder.rglob("*.wandb")):
    time.sleep(0.05)
time.sleep(0.5)
[child] = [c for task in Path("/proc/self/task").iterdir() for c in (task / "children").read_text().split()]
(folder / "pid").write_text(child)
os.kill(int(child), signal.SIGSTOP)
tracker.finish({"acc": 0.5})
print("end", time.time(), flush=True)
"""
    out = tmp_path / "out.txt"
    try:
        with out.open("w") as file:  # no pipe: the stopped process would hold it open
            command = [sys.executable, "-c", code, str(tmp_path)]
            done = subprocess.run(command, stdout=file, stderr=file, timeout=60, check=False)
        end = time.time()
    finally:
        if (tmp_path / "pid").exists():
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    lines = out.read_text().splitlines()
    assert done.returncode == 0
    # On a busy machine a request that was still under way may add a line of its own before the end.
    assert any("left alone" in line for line in lines)
    assert lines[-1].startswith("end ")
    assert end - float(lines[-1].split()[1]) < 5


def test_config_fields_have_no_defaults() -> None:
    assert len(inspect.signature(TrackingConfig).parameters) == len(fields(TrackingConfig))
    with pytest.raises(TypeError):
        TrackingConfig()  # type: ignore[call-arg]
