"""The whole run on a CUDA device."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("change", [(), ("hardware.precision=fp32",), ("hardware.compile=true",)], ids=str)
def test_a_run_on_the_gpu(bench, change):
    done = bench("hardware=auto", "attack=badnets", "defense=trap", *change)
    assert done.code == 0, done.err
    assert done.result["environment"]["device"] != "cpu"
    assert done.result["undefended"]["asr"] > 0.8


def test_deterministic_runs_are_equal(bench, tmp_path):
    results = []
    for name in ("a", "b"):
        done = bench("hardware=gpu_deterministic", "defense=no_defense", f"output_root={tmp_path}/{name}")
        results.append((done.path.parent / "model.safetensors").read_bytes())
    assert results[0] == results[1]
