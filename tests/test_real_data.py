"""CIFAR-10 itself: TRAP with the scale-aware settings finds the poison and removes the backdoor (docs/results.md)."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def cifar10() -> Path:
    """A folder that holds cifar-10-batches-py; skips where BACKDOOR_BENCH_DATA has no CIFAR-10."""
    root = Path(os.environ.get("BACKDOOR_BENCH_DATA") or "/nonexistent")
    if (root / "cifar-10-batches-py").is_dir():
        return root
    if not (root / "unpack.py").is_file():
        pytest.skip("no CIFAR-10: set BACKDOOR_BENCH_DATA to a folder with cifar-10-batches-py")
    unpacked = Path(tempfile.gettempdir()) / "backdoor_bench_cifar10"
    if not (unpacked / "cifar-10-batches-py" / "test_batch").is_file():
        subprocess.run([sys.executable, str(root / "unpack.py"), str(unpacked)], check=True)
    return unpacked


@pytest.mark.slow
def test_trap_on_10000_images(bench, cifar10):
    """About ten minutes on two cores. The bounds are half of what was measured, not a target."""
    done = bench(
        "dataset=cifar10", f"dataset.root={cifar10}", "dataset.verify=false", "dataset.limit=10000", "model=small_cnn",
        "attack=badnets", "defense=trap", "tracking=disabled", "hardware=cpu", toy=False,
    )  # fmt: skip
    assert done.code == 0, done.err
    result = done.result
    assert result["undefended"]["asr"] >= 0.9
    assert result["metrics"]["precision"] >= 0.9
    assert result["metrics"]["recall"] >= 0.9
    assert result["metrics"]["asr"] <= 0.05
    assert result["metrics"]["acc"] >= result["undefended"]["acc"] - 0.03


@pytest.mark.slow
def test_cifar10_without_its_published_checksums_is_refused(bench, cifar10):
    """The unpacked files lack the file names of the originals, so their MD5 differ."""
    done = bench("dataset=cifar10", f"dataset.root={cifar10}", "model=small_cnn", "defense=no_defense", toy=False)
    if done.code == 0:
        pytest.skip("these are the original files")
    assert done.code == 3
    assert "dataset.verify=false" in done.err
