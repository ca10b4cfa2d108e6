"""kill -9 at any moment, then the same command: the same metrics and the same bits."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import CONF, TOY

ROOT = CONF.parent
# t-SNE for real, so that a kill can fall between map and clusters; checkpoints after every epoch.
ARGS = (
    *TOY,
    "attack=badnets",
    "defense=trap",
    "train.epochs=6",
    "train.checkpoint_seconds=0",
    "dataset.train_size=1200",
    "defense.isolation.detect_epochs=3",
    "defense.isolation.first_detection_step=0",
    "defense.isolation.embedding.perplexity=20",
)


def start(root: Path, *extra: str, args: tuple[str, ...] = ARGS) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "run.py", *args, *extra, f"output_root={root}"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def evidence(root: Path) -> tuple[dict, str, list]:
    """Metrics, SHA-256 of the weights, curves."""
    result = next(root.rglob("result.json"))
    weights = hashlib.sha256((result.parent / "model.safetensors").read_bytes()).hexdigest()
    curves = (result.parent / "metrics.csv").read_text().splitlines()
    return json.loads(result.read_text())["metrics"], weights, sorted(curves)


def kill_when(process: subprocess.Popen, root: Path, pattern: str, delay: float = 0.0) -> bool:
    """SIGKILL once a file matching ``pattern`` is there; False if the process was faster."""
    while process.poll() is None:
        if any(root.glob(pattern)):
            time.sleep(delay)
            process.kill()
            process.communicate()
            return True
        time.sleep(0.002)
    return False


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    root = tmp_path_factory.mktemp("reference")
    finish(start(root))
    return evidence(root)


POINTS = {
    "attack training": "cache/victim-*/checkpoint/epoch-00003.json",
    "first step": "**/log.txt",
    "between map and clusters": "cache/embedding-*/bundle.json",
    "removal": "cache/removal-*/checkpoint/epoch-00004.json",
    "evaluation": "cache/removal-*/bundle.json",
}


def check_kill(tmp_path: Path, reference: tuple, point: str) -> None:
    killed = kill_when(start(tmp_path), tmp_path, POINTS[point])
    assert killed, "the run ended before it could be killed"
    finish(start(tmp_path))
    assert evidence(tmp_path) == reference


def test_killed_in_training(tmp_path, reference):
    """One kill in the fast suite; the rest are slow."""
    check_kill(tmp_path, reference, "attack training")


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_known_point(tmp_path, reference, point):
    check_kill(tmp_path, reference, point)


@pytest.mark.slow
def test_killed_three_times_at_random_moments(tmp_path, reference):
    """F01-F06, F15, F16: whatever was being written."""
    moments = random.Random(0)
    for _ in range(3):
        process = start(tmp_path)
        time.sleep(moments.uniform(3, 9))
        process.kill()
        process.communicate()
    finish(start(tmp_path))
    assert evidence(tmp_path) == reference


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(tmp_path, reference, number):
    """F07, F08: exit code 7, then the same result."""
    process = start(tmp_path)
    while not any(tmp_path.glob("cache/victim-*/checkpoint/epoch-00002.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 7, out
    assert "run the same command again" in out
    assert "Traceback" not in out
    finish(start(tmp_path))
    assert evidence(tmp_path) == reference


@pytest.mark.slow
def test_two_runs_side_by_side_share_one_victim(tmp_path):
    """The second waits for the first one's training and does not repeat it."""
    one, two = start(tmp_path), start(tmp_path, "defense.isolation.eps=2")
    first, second = finish(one), finish(two)
    assert ("waiting for it" in first) != ("waiting for it" in second)
    assert len(list(tmp_path.glob("cache/victim-*"))) == 1


# The other methods: command line, and where the cache shows that a stage has begun, is half-way or is done.
COMMON = (*TOY, "attack=badnets", "train.checkpoint_seconds=0", "dataset.train_size=1200")
METHODS = {
    "tr": (
        ("defense=tr", "holdout.size=100", "train.epochs=4"),
        ("trap-*/checkpoint/epoch-00002.json", "trap-*/bundle.json", "replace-*/checkpoint/epoch-00002.json"),
    ),
    "dbr": (
        ("defense=dbr", "train.epochs=4", "defense.isolation.finetune_epochs=4", "defense.removal.epochs=4"),
        (
            "victim-*/checkpoint/epoch-00002.json",
            "distinguish-*/checkpoint/epoch-*.json",
            "distinguish-*/bundle.json",
            "removal-*/checkpoint/epoch-00002.json",
        ),
    ),
    "dst": (
        (
            "defense=dst", "defense.isolation.finetune_epochs=2", "defense.extractor_epochs=4",
            "defense.extractor_lr=0.05", "defense.classifier_lr=0.5", "defense.classifier_epochs=4",
        ),
        (
            "extractor-*/checkpoint/epoch-00002.json",
            "extractor-*/bundle.json",
            "classifier-*/checkpoint/epoch-00002.json",
        ),
    ),
    "meca": (
        ("defense=meca", "train.epochs=4", "defense.isolation.epochs=4", "defense.relabel=true"),
        (
            "enhance-*/checkpoint/epoch-00002.json",
            "enhance-*/bundle.json",
            "retrain-*/checkpoint/epoch-00002.json",
            "relearn-*/checkpoint/epoch-00002.json",
        ),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_methods_killed_in_every_stage(tmp_path, method):
    words, points = METHODS[method]
    args = (*COMMON, *words)
    finish(start(tmp_path / "reference", args=args))
    expected = evidence(tmp_path / "reference")
    for number, point in enumerate(points):
        root = tmp_path / str(number)
        assert kill_when(start(root, args=args), root, f"cache/{point}"), f"{point}: ended before it could be killed"
        finish(start(root, args=args))
        assert evidence(root) == expected, point
