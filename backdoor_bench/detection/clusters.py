"""Clusters of a 2-D map and TRAP's rule which of them look poisoned (TRAP sec. IV-A; specs/seed_defenses.md 1.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = -1  # DBSCAN's label of a point that belongs to no cluster
REFERENCE_SIZE = 50_000  # the training set TRAP's min_samples was printed for


@dataclass(frozen=True)
class Cluster:
    """One cluster: label_counts are the members' labels as given, class by class; top_share the most frequent one's."""

    id: int
    size: int
    label_counts: tuple[int, ...]
    top_label: int
    top_share: float
    is_largest: bool
    suspicious: bool


@dataclass(frozen=True)
class SuspectReport:
    """clusters: by id. flagged: bool [N]. noise_share: share of points in no cluster."""

    clusters: tuple[Cluster, ...]
    flagged: Tensor
    noise_share: float


def dbscan(points: Tensor, eps: float, min_samples: int, threads: int = 1) -> Tensor:
    """Cluster ids int64 [N], 0.. in the order of their first core point, -1 for noise.

    points: float [N, 2]. A point is a core point if ``min_samples`` points, itself included, lie within ``eps``
    (scikit-learn's DBSCAN). Takes 1-2 s for 50,000 points of a t-SNE map; memory grows with the number of pairs within
    ``eps``.
    """
    import numpy as np
    from sklearn.cluster import DBSCAN

    count = len(points)
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    # Points on top of each other become one with a weight, which is the same clustering: a collapsed map would
    # otherwise need N^2 pairs.
    unique, first, inverse, weight = np.unique(
        points.numpy(), axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    order = np.argsort(first)  # ids stay in the order of the samples
    model = DBSCAN(eps=eps, min_samples=min_samples, metric="euclidean", algorithm="kd_tree", n_jobs=threads)
    labels = np.empty(len(unique), dtype=np.int64)
    labels[order] = model.fit_predict(unique[order], sample_weight=weight[order])
    return torch.from_numpy(labels[inverse.reshape(-1)])


def scaled_min_samples(min_samples: int, n: int) -> int:
    """``min_samples`` for a map of ``n`` points: max(5, round(min_samples * sqrt(n / 50,000))).

    The map shrinks more slowly than n; the square root passes through the two known anchors, 50 at 50,000 (TRAP) and
    about 15 at 5,000 (specs/seed_defenses.md 1.10).
    """
    return max(5, round(min_samples * (n / REFERENCE_SIZE) ** 0.5))


def median_kth_distance(points: Tensor, k: int) -> float:
    """Median over the points of the distance to the k-th nearest, itself counted as DBSCAN does; inf with fewer than k.

    Above eps it says that with ``min_samples=k`` fewer than half of the points are core points. points: float [N, 2].
    """
    import numpy as np
    from scipy.spatial import cKDTree

    if len(points) < k:
        return float("inf")
    array = points.double().numpy()
    distances, _ = cKDTree(array).query(array, k=[k])
    return float(np.median(distances))


def suspicious_clusters(
    cluster_labels: Tensor,
    given_labels: Tensor,
    num_classes: int,
    rule: str,
    one_class_share: float,
    noise: str = "benign",
) -> SuspectReport:
    """Which clusters look poisoned, and their members.

    cluster_labels: int64 [N], -1 = noise. given_labels: int64 [N] in 0..num_classes-1, as they stand in the training
    set. The largest cluster (ties: lowest id) is never suspicious. rule ``not_largest``: every other one is;
    ``one_or_all``: every other one whose most frequent label has at least ``one_class_share`` of its members, or in
    which all classes occur (TRAP sec. IV-A3). noise ``suspicious``: points in no cluster are flagged as well. With
    fewer than two clusters nothing is flagged.
    """
    member = cluster_labels != NOISE
    ids = int(cluster_labels.max()) + 1 if len(cluster_labels) else 0
    pairs = cluster_labels[member] * num_classes + given_labels[member]
    table = torch.bincount(pairs, minlength=ids * num_classes).view(ids, num_classes)
    sizes = table.sum(1)
    # The first of equal maxima: argmax over a tensor does not promise which one.
    largest = int((sizes == sizes.max()).nonzero()[0]) if ids else NOISE
    top = table.max(1).values if ids else sizes
    share = top / sizes.clamp(min=1)
    other = (torch.arange(ids) != largest) & (sizes > 0)
    if rule == "one_or_all":
        suspicious = other & ((share >= one_class_share) | (table > 0).all(1))
    elif rule == "not_largest":
        suspicious = other
    else:
        raise ValueError(f"rule={rule!r}: choose one_or_all or not_largest")
    # One extra entry at the end, where the index -1 of noise points to.
    flag = torch.cat([suspicious, torch.tensor([noise == "suspicious" and ids >= 2])])
    clusters = tuple(
        Cluster(
            id=k,
            size=int(sizes[k]),
            label_counts=tuple(counts),
            top_label=counts.index(max(counts)),
            top_share=float(share[k]),
            is_largest=k == largest,
            suspicious=bool(suspicious[k]),
        )
        for k, counts in enumerate(table.tolist())
    )
    noise_share = float((~member).double().mean()) if len(member) else 0.0
    return SuspectReport(clusters=clusters, flagged=flag[cluster_labels], noise_share=noise_share)
