"""TRAP's isolation on hand-made maps: what is flagged, scored, told, cached; when it looks."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from backdoor_bench.data.augment import Augmentation
from backdoor_bench.defenses.isolate_and_remove import IsolateAndRemove
from backdoor_bench.detection import trap
from backdoor_bench.detection.embedding import Embedding, EmbeddingSettings
from backdoor_bench.detection.trap import TrapIsolation
from backdoor_bench.errors import ConfigError
from backdoor_bench.training.fit import cross_entropy
from backdoor_bench.types import DefenderView, Facts, ImageSet, Isolation

SETTINGS = EmbeddingSettings(
    backend="opentsne", perplexity=50.0, learning_rate="auto", early_exaggeration=12.0, exaggeration_iter=250,
    iterations=500, early_momentum=0.8, momentum=0.8, neighbors="auto", repulsion="auto", initialisation="pca",
    pca_dims=0, rescale_radius=60.0,
)  # fmt: skip
# As printed in the paper; the tests change what they are about.
PAPER = TrapIsolation(
    detect_epochs=10, first_detection_step=0, detect_every=1, eps=3.0, min_samples=50, scale_min_samples=False,
    scale_iterations=False, rule="one_or_all", one_class_share=0.99, noise="benign", reducer="tsne",
    embedding=SETTINGS,
)  # fmt: skip
# For the hand-made maps of 20 samples, one after each of two epochs.
SMALL = replace(PAPER, detect_epochs=2, min_samples=3, eps=1.5)
# 20 samples of 4 classes: 0..15 in turn, then four more of class 0 (the poison).
LABELS = torch.tensor([0, 1, 2, 3] * 4 + [0] * 4)


def place(*groups):
    """float [20, 2]: group k (row numbers) on a unit line that starts at (100 k, 0), all other rows far from anyone."""
    points = torch.stack([torch.full((20,), 5000.0), 50.0 * torch.arange(20)], dim=1)
    for k, group in enumerate(groups):
        for step, row in enumerate(group):
            points[row] = torch.tensor([100.0 * k + step, 0.0])
    return points


BENIGN = list(range(16))
NOTHING = place(range(20))


class Epoch(nn.Module):
    """A model whose features say after which epoch it was taken."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def features(self, images):
        return torch.full((len(images), 2), float(self.epoch))

    def forward(self, images):
        return torch.zeros(len(images), 4)


class Snapshots:
    """types.Victim that trains nothing and notes what was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, snapshots=None):
        self.asked.append(snapshots)
        return Epoch(99).eval() if snapshots is None else [Epoch(epoch).eval() for epoch in snapshots]

    def is_cached(self):
        return False


class Probe:
    def __init__(self):
        self.calls = []

    def __call__(self, model=None, flagged=None, *, stage, epoch, detail=None):
        self.calls.append((stage, epoch, model, None if flagged is None else flagged.clone(), detail))


@pytest.fixture
def view(recipe, stages, progress):
    train = ImageSet(torch.zeros(20, 3, 8, 8, dtype=torch.uint8), LABELS, 4)
    return DefenderView(
        train=train, holdout=None, num_classes=4, new_model=None, victim=Snapshots(), train_config=recipe,
        train_loss=cross_entropy(), generator=torch.Generator().manual_seed(7), stages=stages,
        probe=Probe(), device=torch.device("cpu"),
        progress=progress,
    )  # fmt: skip


@pytest.fixture
def maps(monkeypatch):
    """``maps[epoch] = points`` is what the embedding of that epoch's features gives; ``maps.calls`` says what it saw."""

    class Maps(dict):
        calls = None
        backend = None  # None: the one that was asked for

    made = Maps()
    made.calls = []

    def embed(features, settings, seed, threads, device, warn=None):
        epoch = int(features[0, 0])
        made.calls.append(
            {"epoch": epoch, "settings": settings, "seed": seed, "threads": threads, "shape": features.shape}
        )
        backend = made.backend or settings.backend
        return Embedding(made[epoch], backend, "1.0", {"perplexity": 5.0}, 42.0, 2.5, ("a note",))

    monkeypatch.setattr(trap, "embed", embed)
    return made


def rows(mask):
    return mask.nonzero().flatten().tolist()


# ------------------------------------------------------------------ what is flagged


def test_union_over_epochs_and_score_is_the_share_of_epochs(view, maps):
    maps[1] = place(BENIGN, [16, 17, 18])
    maps[2] = NOTHING
    maps[3] = place(BENIGN, [17, 18, 19])
    isolation = replace(SMALL, detect_epochs=3).isolate(view)
    assert rows(isolation.flagged) == [16, 17, 18, 19]
    assert isolation.flagged.dtype == torch.bool
    wanted = torch.zeros(20)
    wanted[16:] = torch.tensor([1, 2, 2, 1]) / 3
    torch.testing.assert_close(isolation.score, wanted)
    assert isolation.trusted is None
    assert isolation.extra["detection_epochs"] == [1, 2, 3]
    assert isolation.extra["flagged_share"] == 0.2
    assert isolation.extra["min_samples"] == 3
    assert [row["epoch"] for row in isolation.extra["epochs"]] == [1, 2, 3]
    assert [row["suspicious"] for row in isolation.extra["epochs"]] == [[1], [], [1]]
    json.dumps(isolation.extra, allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, [16, 17, 18]),
        ({"rule": "not_largest"}, [4, 5, 6, 16, 17, 18]),
        ({"noise": "suspicious"}, [16, 17, 18, 19]),
        ({"one_class_share": 0.3}, [4, 5, 6, 16, 17, 18]),
        ({"min_samples": 4}, []),
        ({"eps": 0.5}, []),
        ({"eps": 1000.0}, []),
    ],
)
def test_keys_reach_the_rule(view, maps, changes, wanted):
    """A large mixed cluster, one of three classes (rows 4..6), one of label 0 (16..18), and row 19 alone."""
    maps[1] = place([*range(4), *range(7, 16)], [4, 5, 6], [16, 17, 18])
    isolation = replace(SMALL, detect_epochs=1, **changes).isolate(view)
    assert rows(isolation.flagged) == wanted


def test_one_cluster_flags_nothing_and_says_so(view, maps, progress):
    maps[1] = maps[2] = NOTHING
    isolation = SMALL.isolate(view)
    assert not isolation.flagged.any()
    assert not isolation.score.any()
    assert progress.warnings == [f"epoch {epoch}: DBSCAN found 1 cluster(s), nothing is flagged" for epoch in (1, 2)]


def test_noise_only_flags_nothing_and_warns_of_eps(view, maps, progress):
    maps[1] = maps[2] = place()  # neighbours 50 apart: the third nearest, itself counted, is 50 away (100 at the ends)
    isolation = replace(SMALL, noise="suspicious").isolate(view)
    assert not isolation.flagged.any()
    assert "epoch 1: DBSCAN found 0 cluster(s), nothing is flagged" in progress.warnings
    assert len(progress.warnings) == 4
    assert progress.warnings[0].startswith("epoch 1: the median distance to neighbour 3 in the map is 50.00, above eps")
    assert isolation.extra["epochs"][0]["noise_share"] == 1.0
    assert isolation.extra["epochs"][0]["median_kth_distance"] == 50.0


def test_no_warning_where_most_samples_have_neighbours(view, maps, progress):
    maps[1] = maps[2] = place(BENIGN[:11], [16, 17, 18])  # 6 of 20 alone
    SMALL.isolate(view)
    assert progress.warnings == []


@pytest.mark.parametrize(("size", "warns"), [(6, False), (7, True)])
def test_warns_when_more_than_30_percent_are_flagged(view, maps, progress, size, warns):
    labels = torch.tensor([0, 1, 2, 3] * 5)
    labels[20 - size :] = 0
    view = replace(view, train=ImageSet(view.train.images, labels, 4))
    maps[1] = maps[2] = place(range(20 - size), range(20 - size, 20))
    isolation = SMALL.isolate(view)
    assert int(isolation.flagged.sum()) == size
    assert progress.warnings == (
        ["TRAP flagged 35% of the training set: benign classes probably form clusters of their own; try an earlier "
         "defense.isolation.first_detection_step or fewer detect_epochs"] if warns else []
    )  # fmt: skip


# ------------------------------------------------------------------ what is shown, cached, asked for


def test_probe_sees_each_epoch_and_the_union_so_far(view, maps):
    maps[1] = place(BENIGN, [16, 17, 18])
    maps[2] = place(BENIGN, [17, 18, 19])
    SMALL.isolate(view)
    calls = view.probe.calls
    assert [(stage, epoch) for stage, epoch, *_ in calls] == [
        ("detection", 1), ("isolation", 1), ("detection", 2), ("isolation", 2),
    ]  # fmt: skip
    assert [rows(flagged) for _, _, _, flagged, _ in calls] == [
        [16, 17, 18], [16, 17, 18], [17, 18, 19], [16, 17, 18, 19],
    ]  # fmt: skip
    assert all(model is None for _, _, model, _, _ in calls)
    detail = calls[2][4]
    assert torch.equal(detail["points"], maps[2])
    assert torch.equal(detail["clusters"], torch.tensor([0] * 16 + [-1, 1, 1, 1]))
    assert rows(detail["flagged"]) == [17, 18, 19]
    report = detail["report"]
    assert (report["epoch"], report["eps"], report["min_samples"], report["suspicious"]) == (2, 1.5, 3, [1])
    assert report["table"][1] == {
        "id": 1, "size": 3, "label_counts": (3, 0, 0, 0), "top_label": 0, "top_share": 1.0, "is_largest": False,
        "suspicious": True,
    }  # fmt: skip
    assert report["noise_share"] == 0.05
    assert report["map"] == {
        "backend": "opentsne", "version": "1.0", "settings": {"perplexity": 5.0}, "extent": 42.0, "notes": ["a note"],
    }  # fmt: skip


def test_maps_are_cached_for_another_eps_or_rule(view, maps):
    maps[1] = maps[2] = place(BENIGN, [16, 17, 18])
    assert rows(SMALL.isolate(view).flagged) == [16, 17, 18]
    assert [call["epoch"] for call in maps.calls] == [1, 2]
    assert rows(replace(SMALL, eps=0.5).isolate(view).flagged) == []
    replace(SMALL, min_samples=2, rule="not_largest", noise="suspicious", one_class_share=0.5).isolate(view)
    replace(SMALL, detect_epochs=1).isolate(view)
    assert len(maps.calls) == 2

    replace(SMALL, embedding=replace(SETTINGS, perplexity=30.0), detect_epochs=1).isolate(view)
    replace(SMALL, reducer="svd", detect_epochs=1).isolate(view)
    SMALL.isolate(replace(view, generator=torch.Generator().manual_seed(8)))
    assert [call["epoch"] for call in maps.calls[2:]] == [1, 1, 1, 2]


def test_a_map_of_second_choice_is_not_kept(view, maps):
    maps[1] = place(BENIGN, [16, 17, 18])
    maps.backend = "sklearn"
    method = replace(SMALL, detect_epochs=1)
    assert method.isolate(view).extra["epochs"][0]["map"]["backend"] == "sklearn"
    maps.backend = None
    assert method.isolate(view).extra["epochs"][0]["map"]["backend"] == "opentsne"
    method.isolate(view)
    assert len(maps.calls) == 2


def test_embedding_is_asked_with_one_seed_for_all_epochs(view, maps):
    maps[1] = maps[2] = NOTHING
    SMALL.isolate(view)
    torch.rand(5, generator=view.generator)  # a generator that was used is still the same seed
    SMALL.isolate(view)
    assert [call["seed"] for call in maps.calls] == [7, 7]
    assert maps.calls[0]["settings"] == SETTINGS
    assert maps.calls[0]["shape"] == (20, 2)
    assert maps.calls[0]["threads"] == 1


def test_seconds_of_features_and_embedding_are_booked_apart(view, maps, stages):
    maps[1] = maps[2] = NOTHING
    SMALL.isolate(view)
    assert stages._seconds["embedding"] == 5.0
    assert stages._seconds["features"] > 0
    assert stages._seconds["clustering"] > 0


def test_all_snapshots_are_asked_for_at_once(view, maps):
    maps[1] = maps[3] = NOTHING
    replace(SMALL, detect_every=2).isolate(view)
    assert view.victim.asked == [[1, 3]]


@pytest.mark.parametrize("reducer", ["pca", "svd"])
def test_pca_and_svd_maps_are_real(view, reducer):
    """Features on a plane: the map is that plane, rescaled, so the four distant samples stay distant."""

    class Plane(nn.Module):
        def features(self, images):
            return place(BENIGN, [16, 17, 18, 19])[: len(images)] @ torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])

    view = replace(view, victim=lambda snapshots: [Plane().eval() for _ in snapshots])
    isolation = replace(SMALL, reducer=reducer, eps=25.0).isolate(view)
    assert rows(isolation.flagged) == [16, 17, 18, 19]
    assert isolation.extra["epochs"][0]["map"]["backend"] == reducer


# ------------------------------------------------------------------ when it looks


@pytest.fixture
def cifar(recipe):
    """100 epochs in batches of 128 with random crops: 391 steps an epoch of 50,000 images."""
    return replace(recipe, epochs=100, batch_size=128, augment=Augmentation(4, True, 0.0, 0))


@pytest.mark.parametrize(
    ("changes", "count", "wanted"),
    [
        ({"first_detection_step": "auto"}, 50_000, [4, 5, 6, 7, 8]),  # 1,500 steps / 391 = 3.8
        ({"first_detection_step": "auto"}, 5_000, [38, 39, 40, 41, 42]),  # / 40 = 37.5
        ({"first_detection_step": "auto", "detect_every": 2}, 50_000, [4, 6, 8, 10, 12]),
        ({"first_detection_step": 391}, 50_000, [1, 2, 3, 4, 5]),
        ({"first_detection_step": 392}, 50_000, [2, 3, 4, 5, 6]),
        ({"first_detection_step": 0, "detect_epochs": 10}, 50_000, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),  # the paper
        ({"first_detection_step": "auto", "detect_epochs": 1}, 50_000, [4]),
        ({"first_detection_step": "auto"}, 100, [96, 97, 98, 99, 100]),  # one step an epoch: never 1,500
    ],
)
def test_detection_epochs(cifar, changes, count, wanted):
    assert replace(PAPER, **{"detect_epochs": 5, **changes}).epochs(cifar, count) == wanted


@pytest.mark.parametrize(
    ("count", "wanted"), [(50_000, [1, 2, 3, 4, 5]), (5_000, [3, 4, 5, 6, 7]), (2_000, [8, 9, 10, 11, 12])]
)
def test_detection_starts_earlier_without_crops(cifar, count, wanted):
    """120 steps: of 391, 40 and 16 an epoch."""
    plain = replace(cifar, augment=Augmentation(0, True, 0.0, 0))
    assert replace(PAPER, detect_epochs=5, first_detection_step="auto").epochs(plain, count) == wanted


@pytest.mark.parametrize(
    ("epochs", "every", "wanted"),
    [
        (8, 1, [4, 5, 6, 7, 8]),
        (7, 1, [3, 4, 5, 6, 7]),
        (5, 1, [1, 2, 3, 4, 5]),
        (12, 2, [4, 6, 8, 10, 12]),
        (9, 2, [1, 3, 5, 7, 9]),
        (6, 2, [1, 3, 5]),
        (1, 1, [1]),
    ],
)
def test_a_training_too_short_is_looked_at_in_its_last_epochs(cifar, epochs, every, wanted):
    method = replace(PAPER, detect_epochs=5, first_detection_step="auto", detect_every=every)
    told = []
    assert method.epochs(replace(cifar, epochs=epochs), 50_000, told.append) == wanted
    assert [text.split(":")[0] for text in told] == (
        ["the training is too short for detection to start at step 1500 (after epoch 4)"] if wanted[0] < 4 else []
    )


def test_fewer_samples_than_a_batch_with_drop_last(cifar):
    method = replace(PAPER, detect_epochs=2, first_detection_step=3)
    assert method.epochs(replace(cifar, drop_last=True), 100) == [3, 4]


# ------------------------------------------------------------------ what is scaled


@pytest.mark.parametrize(
    ("switch", "count", "wanted"),
    [
        ("auto", 50_000, 50),  # TRAP
        ("auto", 20_000, 50),
        ("auto", 19_999, 32),  # 50 sqrt(0.39998) = 31.6
        ("auto", 5_000, 16),  # 15.8
        ("auto", 500, 5),  # exactly 5
        ("auto", 20, 5),  # never fewer
        (False, 20, 50),
        (True, 50_000, 50),
        (True, 200_000, 100),
    ],
)
def test_min_samples_passes_through_its_anchors(switch, count, wanted):
    assert replace(PAPER, scale_min_samples=switch).min_samples_for(count) == wanted


@pytest.mark.parametrize(
    ("switch", "count", "exaggerated", "others"),
    [
        ("auto", 50_000, 250, 500),
        ("auto", 20_000, 250, 500),
        ("auto", 19_999, 125, 200),
        ("auto", 8_000, 125, 80),
        ("auto", 5_000, 125, 75),  # never fewer
        ("auto", 2_500, 125, 150),  # N x iterations stays the same below
        ("auto", 100, 125, 500),  # never more than asked for
        (False, 100, 250, 500),
        (True, 50_000, 125, 500),
    ],
)
def test_iterations_scale_with_the_samples(switch, count, exaggerated, others):
    made = replace(PAPER, scale_iterations=switch).map_settings(count)
    assert (made.exaggeration_iter, made.iterations) == (exaggerated, others)
    assert replace(made, exaggeration_iter=250, iterations=500) == SETTINGS


@pytest.mark.parametrize(("reducer", "backend"), [("tsne", "opentsne"), ("pca", "pca"), ("svd", "svd")])
def test_reducer_chooses_the_backend(reducer, backend):
    assert replace(PAPER, reducer=reducer).map_settings(50_000) == replace(SETTINGS, backend=backend)


def test_min_samples_and_iterations_are_used(view, maps):
    """20 samples: min_samples 3 becomes 5, and a group of four is no cluster."""
    maps[1] = place(BENIGN, [16, 17, 18, 19])
    method = replace(SMALL, detect_epochs=1, eps=3.5)
    assert rows(method.isolate(view).flagged) == [16, 17, 18, 19]
    scaled = replace(method, scale_min_samples=True, scale_iterations=True).isolate(view)
    assert rows(scaled.flagged) == []
    assert scaled.extra["min_samples"] == 5
    assert (maps.calls[1]["settings"].exaggeration_iter, maps.calls[1]["settings"].iterations) == (125, 500)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("detect_epochs", 0), ("first_detection_step", -1), ("first_detection_step", "late"), ("detect_every", 0),
        ("eps", 0), ("eps", "3"), ("min_samples", 0), ("min_samples", 2.5), ("scale_min_samples", "yes"),
        ("scale_iterations", 1), ("rule", "all"), ("one_class_share", 0), ("one_class_share", 1.01), ("noise", "bad"),
        ("reducer", "umap"),
    ],
)  # fmt: skip
def test_a_bad_value_names_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"defense\.isolation\.{key}={value!r}"):
        replace(PAPER, **{key: value})


def test_more_detection_epochs_than_epochs_are_refused():
    facts = Facts(num_classes=10, image_size=32, train_size=50_000, epochs=9, steps_per_epoch=391)
    with pytest.raises(ConfigError, match=r"detect_epochs=10 with detect_every=1 .* train.epochs=9: allowed is 1 to 9"):
        PAPER.check(facts)
    PAPER.check(replace(facts, epochs=10))
    with pytest.raises(ConfigError, match=r"needs 28 epochs, train.epochs=27: allowed is 1 to 9"):
        replace(PAPER, detect_every=3).check(replace(facts, epochs=27))
    replace(PAPER, detect_every=3).check(replace(facts, epochs=28))


# ------------------------------------------------------------------ the whole method


def test_trap_hands_the_split_and_the_trained_model_to_its_removal(view):
    isolation = Isolation(torch.arange(20) > 15, torch.arange(20) < 3, torch.arange(20.0), {"note": 1})
    repaired = nn.Linear(1, 1)

    class Isolate:
        def isolate(self, given):
            assert given is view
            return isolation

    class Remove:
        def remove(self, given, model, split):
            assert given is view
            assert model.epoch == 99  # the end of the training, not a snapshot
            assert split is isolation
            return repaired

    result = IsolateAndRemove(Isolate(), Remove()).defend(view)
    assert result.model is repaired
    assert result.flagged is isolation.flagged
    assert result.trusted is isolation.trusted
    assert result.score is isolation.score
    assert result.extra == {"note": 1}


def test_trap_asks_both_parts_what_they_refuse():
    facts, asked = Facts(4, 8, 20, 3, 1), []

    class Part:
        def check(self, given):
            asked.append(given)

    IsolateAndRemove(Part(), Part()).check(facts)
    assert asked == [facts, facts]
