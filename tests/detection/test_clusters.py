"""Clustering and the suspicious-cluster rule on maps whose answer can be seen by eye."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backdoor_bench.detection.clusters import dbscan, median_kth_distance, scaled_min_samples, suspicious_clusters


def blob(centre: tuple[float, float], count: int, radius: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(centre) + radius * (2 * torch.rand(count, 2, generator=generator) - 1)


def three_blobs() -> tuple[Tensor, Tensor]:
    """100 points of all four classes, 40 of class 2 alone, 30 of classes 0 and 1."""
    points = torch.cat([blob((0, 0), 100), blob((20, 0), 40), blob((0, 20), 30)])
    labels = torch.cat([torch.arange(100) % 4, torch.full((40,), 2), torch.arange(30) % 2])
    return points, labels


def ids(sizes: list[int], noise: int = 0) -> Tensor:
    return torch.cat([torch.full((size,), k) for k, size in enumerate(sizes)] + [torch.full((noise,), -1)])


def test_dbscan_finds_the_blobs_and_the_stray_point() -> None:
    points, _ = three_blobs()
    labels = dbscan(torch.cat([points, torch.tensor([[50.0, 50.0]])]), eps=1.0, min_samples=5)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0] * 100 + [1] * 40 + [2] * 30 + [-1]


def test_dbscan_counts_the_point_itself() -> None:
    points = torch.tensor([[0.0, 0.0], [0.5, 0.0], [1.0, 0.0], [9.0, 0.0]])
    assert dbscan(points, eps=0.6, min_samples=3).tolist() == [0, 0, 0, -1]
    assert dbscan(points, eps=0.6, min_samples=4).tolist() == [-1, -1, -1, -1]


def test_dbscan_of_coinciding_points_equals_that_of_the_plain_algorithm() -> None:
    from sklearn.cluster import DBSCAN

    generator = torch.Generator().manual_seed(3)
    points = torch.randint(0, 12, (400, 2), generator=generator).float()
    expected = DBSCAN(eps=1.0, min_samples=14).fit_predict(points.numpy())
    assert dbscan(points, eps=1.0, min_samples=14).tolist() == expected.tolist()
    assert 0 < (expected == -1).sum() < 400


def test_dbscan_of_one_place_and_of_nothing() -> None:
    assert dbscan(torch.zeros(30_000, 2), eps=3.0, min_samples=50).unique().tolist() == [0]
    assert dbscan(torch.empty(0, 2), eps=3.0, min_samples=50).shape == (0,)


def test_one_or_all_flags_the_pure_cluster_only() -> None:
    points, labels = three_blobs()
    report = suspicious_clusters(dbscan(points, 1.0, 5), labels, 4, "one_or_all", 0.99)
    assert [c.suspicious for c in report.clusters] == [False, True, False]
    assert [c.is_largest for c in report.clusters] == [True, False, False]
    assert [c.size for c in report.clusters] == [100, 40, 30]
    assert report.clusters[1].label_counts == (0, 0, 40, 0)
    assert (report.clusters[1].top_label, report.clusters[1].top_share) == (2, 1.0)
    assert report.clusters[2].label_counts == (15, 15, 0, 0)
    assert report.clusters[2].top_share == 0.5
    assert report.flagged.dtype == torch.bool
    assert report.flagged.nonzero().flatten().tolist() == list(range(100, 140))


def test_not_largest_flags_both_side_clusters() -> None:
    points, labels = three_blobs()
    report = suspicious_clusters(dbscan(points, 1.0, 5), labels, 4, "not_largest", 0.99)
    assert report.flagged.nonzero().flatten().tolist() == list(range(100, 170))


def test_a_side_cluster_of_all_classes_is_suspicious() -> None:
    labels = torch.cat([torch.zeros(50, dtype=torch.int64), torch.arange(20) % 4, torch.arange(21) % 3])
    report = suspicious_clusters(ids([50, 20, 21]), labels, 4, "one_or_all", 0.99)
    assert [c.suspicious for c in report.clusters] == [False, True, False]


@pytest.mark.parametrize(
    ("strays", "share", "suspicious"), [(0, 1.0, True), (1, 1.0, False), (2, 0.99, True), (3, 0.99, False)]
)
def test_strays_clear_a_cluster_above_the_allowed_share(strays: int, share: float, suspicious: bool) -> None:
    side = torch.cat([torch.full((200 - strays,), 1), torch.full((strays,), 2)])
    labels = torch.cat([torch.arange(300) % 4, side])
    report = suspicious_clusters(ids([300, 200]), labels, 4, "one_or_all", share)
    assert report.clusters[1].suspicious is suspicious


def test_of_equal_clusters_the_lowest_id_is_the_largest() -> None:
    labels = torch.cat([torch.full((10,), 1), torch.full((30,), 2), torch.full((30,), 3)])
    report = suspicious_clusters(ids([10, 30, 30]), labels, 4, "one_or_all", 0.99)
    assert [c.is_largest for c in report.clusters] == [False, True, False]
    assert [c.suspicious for c in report.clusters] == [True, False, True]


def test_noise_is_no_cluster_and_is_flagged_only_on_request() -> None:
    # The noise is more than any cluster and holds all classes: as a cluster it would be the largest, and suspicious.
    labels = torch.cat([torch.arange(30) % 4, torch.full((10,), 1), torch.arange(60) % 4])
    assignment = ids([30, 10], noise=60)
    benign = suspicious_clusters(assignment, labels, 4, "one_or_all", 0.99)
    assert benign.flagged.nonzero().flatten().tolist() == list(range(30, 40))
    assert benign.noise_share == 0.6
    assert len(benign.clusters) == 2
    suspicious = suspicious_clusters(assignment, labels, 4, "one_or_all", 0.99, noise="suspicious")
    assert suspicious.flagged.nonzero().flatten().tolist() == list(range(30, 100))


@pytest.mark.parametrize("noise", ["benign", "suspicious"])
@pytest.mark.parametrize("rule", ["one_or_all", "not_largest"])
@pytest.mark.parametrize("assignment", [ids([], noise=20), ids([20]), ids([15], noise=5)])
def test_fewer_than_two_clusters_flag_nothing(assignment: Tensor, rule: str, noise: str) -> None:
    report = suspicious_clusters(assignment, torch.zeros(20, dtype=torch.int64), 4, rule, 0.99, noise)
    assert not report.flagged.any()
    assert report.flagged.shape == (20,)
    assert not any(c.suspicious for c in report.clusters)


def test_empty_set_and_unknown_rule() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    report = suspicious_clusters(nothing, nothing, 4, "one_or_all", 0.99)
    assert (report.clusters, report.flagged.shape, report.noise_share) == ((), (0,), 0.0)
    with pytest.raises(ValueError, match="not_largest"):
        suspicious_clusters(ids([3]), torch.zeros(3, dtype=torch.int64), 4, "densest", 0.99)


@pytest.mark.parametrize(("n", "expected"), [(50_000, 50), (5_000, 16), (200_000, 100), (100, 5), (1, 5)])
def test_scaled_min_samples(n: int, expected: int) -> None:
    assert scaled_min_samples(50, n) == expected


def test_median_kth_distance_counts_the_point_itself() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0], [7.0, 0.0], [15.0, 0.0]])
    assert median_kth_distance(points, 1) == 0.0
    assert median_kth_distance(points, 2) == 2.0  # nearest others at 1, 1, 2, 4, 8
    assert median_kth_distance(points, 6) == float("inf")
