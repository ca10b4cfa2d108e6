from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from backdoor_bench.errors import DiskError
from backdoor_bench.reporting.figures import _array, curves, flagged_grid, map_scatter, pairs_grid

NAMES = ["$a", "b$", "$x^{$", "_hidden", "<script>", "a_b^c\\frac", "x\ny", "\x1b[2J", "汉字", "a very long name " * 9]


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def images(count: int, size: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def pixels(path: Path) -> np.ndarray:
    """RGB of a picture, after checking that it stands alone in its folder: no temporary file is left."""
    assert list(path.parent.iterdir()) == [path]
    return np.asarray(Image.open(path).convert("RGB"))


def has_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == np.array(colour, dtype=np.uint8)).all(axis=-1).any())


def test_pairs_show_the_trigger_amplified_to_full_range(tmp_path: Path) -> None:
    clean = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    poisoned = clean.clone()
    poisoned[:, 1, 6:, 6:] += 50
    path = pairs_grid(tmp_path / "p.png", clean, poisoned, [0, 1], [1, 1], NAMES, "pairs of $x^{$")
    picture = pixels(path)
    assert has_colour(picture, (100, 100, 100))
    assert has_colour(picture, (100, 150, 100))
    assert has_colour(picture, (0, 250, 0))  # 50 times 5, the largest whole factor that fits 255


@pytest.mark.parametrize("count", [0, 1, 10, 14])
def test_pairs_of_any_number_and_unchanged_images(count: int, tmp_path: Path) -> None:
    labels = torch.arange(count) % 10
    path = tmp_path / "p.png"
    assert pairs_grid(path, images(count), images(count), labels, labels, NAMES, "title") == path
    assert pixels(path).std() > 0


def small_map(count: int = 200) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 2, generator=generator) * 20, torch.arange(count)


def test_a_map_draws_poison_black_noise_grey_and_suspicious_clusters_in_colour(tmp_path: Path) -> None:
    points, rows = small_map()
    poisoned = rows < 20
    clusters = torch.where(poisoned, 1, 0)
    clusters[rows >= 190] = -1
    path = map_scatter(
        tmp_path / "m.png", points, rows % 10, clusters, NAMES, poisoned,
        suspicious_ids=[1], flagged=poisoned, title="map", eps=3.0,
    )  # fmt: skip
    left, right = np.array_split(pixels(path), 2, axis=1)
    assert has_colour(left, (0, 0, 0))
    assert has_colour(right, (0xD4, 0xD4, 0xD4))  # noise
    assert has_colour(right, (0x33, 0x22, 0x88))  # the largest cluster
    assert has_colour(right, (0xDD, 0xCC, 0x77))  # the suspicious one


def test_a_map_of_many_classes_names_those_with_most_flagged_samples(tmp_path: Path) -> None:
    points, rows = small_map(2000)
    labels = rows % 200
    flagged = labels >= 195
    arguments = {"suspicious_ids": [1], "flagged": flagged, "title": "200", "eps": None}
    names = [f"class {i}" for i in range(200)]
    path = map_scatter(tmp_path / "m.png", points, labels, flagged.long(), names, None, **arguments)
    picture = pixels(path)
    assert picture.shape == (1035, 1800, 3)  # no legend has blown it up
    assert has_colour(picture, (0xB8, 0xBE, 0xC6))  # the other 190


@pytest.mark.parametrize("clusters", [-1, 0])
@pytest.mark.parametrize("flagged", [None, False])
def test_a_map_with_one_class_one_or_no_cluster_and_no_truth(
    clusters: int, flagged: bool | None, tmp_path: Path
) -> None:
    points, rows = small_map(30)
    path = map_scatter(
        tmp_path / "m.png", points, rows * 0, torch.full((30,), clusters), NAMES, None,
        suspicious_ids=[], flagged=None if flagged is None else rows < 0, title="one", eps=1000.0,
    )  # fmt: skip
    assert pixels(path).std() > 0


def test_a_map_of_forty_clusters_keeps_its_size(tmp_path: Path) -> None:
    points, rows = small_map(400)
    path = map_scatter(
        tmp_path / "m.png", points, rows % 3, rows % 40, NAMES, rows < 5,
        suspicious_ids=list(range(1, 30)), flagged=rows % 40 > 0, title="forty", eps=3,
    )  # fmt: skip
    assert pixels(path).shape == (1035, 1800, 3)


@pytest.mark.parametrize("finite", [0, 1, 100])
def test_a_map_with_points_that_are_no_numbers(finite: int, tmp_path: Path) -> None:
    points, rows = small_map(100)
    points[finite:] = float("nan")
    path = map_scatter(
        tmp_path / "m.png", points, rows % 2, rows * 0, NAMES, rows < 9,
        suspicious_ids=[0], flagged=rows < 9, title="nan", eps=3,
    )  # fmt: skip
    assert pixels(path).std() > 0


def test_curves_draw_every_stage_and_skip_what_is_unknown(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"stage": "train", "epoch": 1, "acc": 0.1, "asr": None, "loss": 2.0},
        {"stage": "train", "epoch": 2, "acc": 0.5, "asr": float("nan")},
        {"stage": "detection", "epoch": 1, "precision": None, "recall": 0.0},
        {"stage": "isolation", "epoch": 1, "precision": 1.0, "recall": 0.5},
        {"stage": "$removal_", "epoch": 1, "acc": 0.5, "asr": 0.0},
    ]
    assert pixels(curves(tmp_path / "c.png", rows)).std() > 0


@pytest.mark.parametrize("kind", ["none", "loss only", "models only", "detection only", "eight stages"])
def test_curves_of_partial_histories(kind: str, tmp_path: Path) -> None:
    rows: dict[str, list[dict[str, object]]] = {
        "none": [],
        "loss only": [{"stage": "train", "epoch": 1, "loss": 0.5}],
        "models only": [{"stage": "train", "epoch": 1, "acc": 0.5, "asr": 1}],
        "detection only": [{"stage": "s", "epoch": 3, "precision": 0.5, "recall": 1.0}],
        "eight stages": [
            {"stage": f"_stage {i}", "epoch": e, "acc": 0.5, "asr": 0.1, "precision": 0.1, "recall": 0.2}
            for i in range(8)
            for e in range(3)
        ],
    }
    assert pixels(curves(tmp_path / "c.png", rows[kind])).std() > 0


BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def test_flagged_frames_tell_poisoned_from_clean(tmp_path: Path) -> None:
    grey = torch.full((4, 3, 8, 8), 128, dtype=torch.uint8)
    (tmp_path / "all").mkdir()
    (tmp_path / "none").mkdir()
    path = flagged_grid(tmp_path / "all" / "f.png", grey, [0, 1, 2, 3], [0.9, 0.8, 0.7, 0.6], [1, 1, 0, 1], NAMES, 90)
    assert has_colour(pixels(path), BLUE)
    assert has_colour(pixels(path), ORANGE)
    path = flagged_grid(tmp_path / "none" / "f.png", grey, [0, 1, 2, 3], None, None, NAMES)
    assert not has_colour(pixels(path), BLUE)
    assert not has_colour(pixels(path), ORANGE)


@pytest.mark.parametrize("count", [0, 1, 9, 70])
def test_flagged_grid_of_any_number(count: int, tmp_path: Path) -> None:
    labels, scores = torch.arange(count) % 10, torch.linspace(1, 0, count)
    path = flagged_grid(tmp_path / "f.png", images(count), labels, scores, torch.arange(count) % 2 == 0, NAMES)
    assert pixels(path).std() > 0


def test_a_picture_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("a file where the folder should be")
    with pytest.raises(DiskError, match="figures"):
        curves(tmp_path / "figures" / "c.png", [])


def test_no_global_matplotlib_state_is_used() -> None:
    source = Path(curves.__code__.co_filename).read_text()
    assert "pyplot" not in source
    assert "rcParams" not in source


def test_lists_arrays_and_tensors_are_taken_alike() -> None:
    for values in ([1, 2], np.array([1, 2]), torch.tensor([1, 2])):
        assert _array(values).tolist() == [1, 2]
