"""Maps of features: forces against the exact sum, known geometry, fall-through, degenerate input."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backdoor_bench.detection import embedding
from backdoor_bench.detection.embedding import EmbeddingSettings, embed, nearest_neighbours
from backdoor_bench.errors import ConfigError, Diverged

CPU = torch.device("cpu")
SETTINGS = EmbeddingSettings(
    backend="opentsne", perplexity=20, learning_rate="auto", early_exaggeration=12, exaggeration_iter=60,
    iterations=120, early_momentum=0.8, momentum=0.8, neighbors="auto", repulsion="fft", initialisation="pca",
    pca_dims=0, rescale_radius=60.0,
)  # fmt: skip


def gaussians(each: int = 100, dims: int = 10) -> tuple[Tensor, Tensor]:
    """Three far apart clouds, and which one a sample is from."""
    generator = torch.Generator().manual_seed(0)
    cloud = torch.arange(3).repeat(each)
    return 30 * torch.eye(3, dims)[cloud] + torch.randn(3 * each, dims, generator=generator), cloud


def made(features: Tensor, warned: list[str] | None = None, **changes: Any) -> embedding.Embedding:
    settings = dataclasses.replace(SETTINGS, **changes)
    warn = (lambda message: None) if warned is None else warned.append
    return embed(features, settings, seed=1, threads=1, device=CPU, warn=warn)


def nearest_is_of_the_same_cloud(points: Tensor, cloud: Tensor) -> bool:
    distance = torch.cdist(points, points)
    distance.fill_diagonal_(float("inf"))
    return bool((cloud[distance.argmin(1)] == cloud).all())


def apart(points: Tensor, cloud: Tensor) -> bool:
    """Every cloud's members are nearer to their own centre than to another's."""
    centres = torch.stack([points[cloud == k].mean(0) for k in range(3)])
    return bool((torch.cdist(points, centres).argmin(1) == cloud).all())


def test_neighbours_equal_a_full_sort_far_from_the_origin() -> None:
    features = 1000 + torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    distance = torch.cdist(features.double(), features.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distance.fill_diagonal_(float("inf"))
    expected, order = distance.sort(1)
    indices, distances = nearest_neighbours(features, 12, CPU)
    assert torch.equal(indices, order[:, :12])
    torch.testing.assert_close(distances.double(), expected[:, :12], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["opentsne", "sklearn", "pca", "svd"])
def test_separate_clouds_stay_separate(backend: str) -> None:
    features, cloud = gaussians()
    result = made(features, backend=backend)
    assert result.backend == backend
    assert (result.points.dtype, result.points.shape) == (torch.float32, (300, 2))
    assert apart(result.points, cloud)
    side = result.points.amax(0) - result.points.amin(0)
    assert result.extent == pytest.approx(float(side.max()))
    assert result.version
    assert result.settings["seed"] == 1


@pytest.mark.parametrize("change", [{"repulsion": "bh"}, {"pca_dims": 4},
                                    {"initialisation": "random"}, {"neighbors": "approx"}])  # fmt: skip
def test_the_alternatives_of_opentsne_keep_the_clouds_together(change: dict[str, Any]) -> None:
    features, cloud = gaussians()
    result = made(features, **change)
    assert result.backend == "opentsne"
    assert nearest_is_of_the_same_cloud(result.points, cloud)


def test_interpolation_finds_as_low_a_divergence_as_barnes_hut() -> None:
    features, _ = gaussians()
    fft, tree = (made(features, repulsion=name).settings["kl_divergence"] for name in ("fft", "bh"))
    assert fft == pytest.approx(tree, rel=0.05)


@pytest.mark.parametrize("threads", [1, 2])
def test_same_seed_and_threads_same_points(threads: int) -> None:
    features, _ = gaussians()
    first, second, other = (embed(features, SETTINGS, seed, threads, CPU) for seed in (1, 1, 2))
    assert torch.equal(first.points, second.points)
    assert first.settings == second.settings
    assert not torch.equal(first.points, other.points)


@pytest.mark.parametrize("backend", ["pca", "svd"])
def test_linear_maps_have_the_asked_radius_and_ignore_signs(backend: str) -> None:
    features = torch.randn(400, 12, generator=torch.Generator().manual_seed(2)) * torch.arange(12, 0, -1) + 5
    points = made(features, backend=backend).points
    distance = (points - points.mean(0)).norm(dim=1)
    assert float(torch.quantile(distance, 0.95)) == pytest.approx(60, rel=1e-4)
    assert made(features, backend=backend, rescale_radius=10.0).extent == pytest.approx(
        made(features, backend=backend).extent / 6, rel=1e-4
    )


def test_pca_is_centred_and_svd_is_not() -> None:
    # Along x the points lie far from the origin and hardly vary; they vary along y, then along z.
    generator = torch.Generator().manual_seed(3)
    spread = torch.randn(200, 3, generator=generator) * torch.tensor([0.1, 3.0, 1.0])
    features = spread + torch.tensor([100.0, 0.0, 0.0])
    pca, svd = made(features, backend="pca").points, made(features, backend="svd").points
    centred = (spread - spread.mean(0)).double()

    def follows(map_axis: Tensor, axis: int) -> float:
        return float(torch.corrcoef(torch.stack([map_axis.double(), centred[:, axis]]))[0, 1].abs())

    assert follows(pca[:, 0], 1) > 0.99
    assert follows(pca[:, 1], 2) > 0.99
    assert follows(svd[:, 1], 1) > 0.99


def test_high_perplexity_is_lowered_and_said() -> None:
    warned: list[str] = []
    result = made(gaussians(each=10)[0], warned, perplexity=50)
    assert result.backend == "opentsne"
    assert result.settings["perplexity"] == pytest.approx(29 / 3)
    assert list(result.notes) == warned
    assert any("perplexity 50 lowered to 9.667" in message for message in warned)
    assert made(gaussians(each=51)[0], perplexity=50).notes == ()


@pytest.mark.parametrize("count", [0, 1, 2, 4, 5, 6, 8])
@pytest.mark.parametrize("backend", ["auto", "sklearn", "pca", "svd"])
def test_few_samples(count: int, backend: str) -> None:
    features = torch.randn(count, 7, generator=torch.Generator().manual_seed(4))
    result = made(features, backend=backend)
    assert result.points.shape == (count, 2)
    assert torch.isfinite(result.points).all()


def test_equal_features_fall_in_one_place() -> None:
    result = made(torch.ones(50, 7))
    assert result.extent == 0
    assert any("equal" in note for note in result.notes)


def test_many_equal_features_and_one_dimension() -> None:
    features = torch.cat([torch.zeros(150, 7), torch.randn(50, 7, generator=torch.Generator().manual_seed(5))])
    assert torch.isfinite(made(features).points).all()
    assert made(torch.arange(30.0)[:, None], backend="pca").points[:, 1].abs().max() == 0
    assert torch.isfinite(made(torch.arange(30.0)[:, None]).points).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_features_are_named(value: float) -> None:
    features, _ = gaussians()
    features[7, 3] = value
    with pytest.raises(Diverged, match="features of 1 of 300 samples"):
        made(features)


def test_a_failing_backend_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(task: Any) -> Any:
        raise ImportError("no such library")

    def nan(task: Any) -> Any:
        return embedding._Made(np.full((len(task.features), 2), np.nan), "0", {})

    features, cloud = gaussians()
    warned: list[str] = []
    monkeypatch.setitem(embedding._MAKERS, "cuml", missing)
    monkeypatch.setitem(embedding._MAKERS, "opentsne", nan)
    result = made(features, warned, backend="cuml")
    assert result.backend == result.settings["backend"] == "sklearn"
    assert apart(result.points, cloud)
    assert "cuml failed (ImportError: no such library); using opentsne" in warned[0]
    assert "opentsne failed" in warned[1]
    assert "NaN" in warned[1]
    monkeypatch.setitem(embedding._MAKERS, "sklearn", missing)
    assert made(features, backend="tsnecuda").backend == "pca"


def test_auto_on_a_gpu_without_cuml_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    features, _ = gaussians(each=5)
    settings = dataclasses.replace(SETTINGS, backend="auto", perplexity=4)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert embedding._plan(features, settings, torch.device("cuda"), notes.append)[1][0] == "opentsne"
    assert "cuml is not installed" in notes[0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert embedding._plan(features, settings, torch.device("cuda"), notes.append)[1][0] == "cuml"
    assert embedding._plan(features, settings, CPU, notes.append)[1][0] == "opentsne"


def test_arguments_follow_the_version_of_the_library() -> None:
    class Old:
        def __init__(self, n_iter: int, init: str) -> None: ...

    class New:
        def __init__(self, max_iter: int, init: str, seed: int) -> None: ...

    notes: list[str] = []
    task = embedding._Task(torch.zeros(1, 1), SETTINGS, 0, 1, CPU, notes.append)
    wanted = {"max_iter|n_iter": 9, "init": "pca", "seed": 3}
    assert embedding._accepted(New, wanted, task) == {"max_iter": 9, "init": "pca", "seed": 3}
    assert notes == []
    assert embedding._accepted(Old, wanted, task) == {"n_iter": 9, "init": "pca"}
    assert "takes no seed" in notes[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [("backend", "umap"), ("perplexity", 0), ("perplexity", "many"), ("learning_rate", "fast"), ("learning_rate", 0),
     ("early_exaggeration", 0.5), ("exaggeration_iter", -1), ("iterations", 0), ("momentum", 1.0),
     ("early_momentum", -0.1), ("neighbors", "some"), ("repulsion", "none"), ("initialisation", "spectral"),
     ("pca_dims", 2.5), ("rescale_radius", 0)],
)  # fmt: skip
def test_settings_out_of_range_name_their_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"defense.isolation.embedding.{key}="):
        dataclasses.replace(SETTINGS, **{key: value})


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuml", "tsnecuda", "torchdr"])
def test_gpu_libraries_keep_the_clouds_together(backend: str) -> None:
    pytest.importorskip(backend)
    features, cloud = gaussians(each=400)
    settings = dataclasses.replace(SETTINGS, backend=backend, exaggeration_iter=250, iterations=500)
    result = embed(features, settings, seed=1, threads=2, device=torch.device("cuda"))
    assert result.backend == backend, result.notes
    assert nearest_is_of_the_same_cloud(result.points, cloud)
    assert 10 < result.extent < 500
