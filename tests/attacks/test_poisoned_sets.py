"""What every attack must hold (attacks.md 3.4, 4 and 9): counts, labels, pixels, seeds, test sets."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from backdoor_bench import evaluate
from backdoor_bench.attacks.common import (
    Part,
    all2one,
    any_class,
    assemble,
    keep_labels,
    only_classes,
    source2target,
    sub2sub,
)
from backdoor_bench.data.images import MappedImages
from backdoor_bench.evaluate import Evaluator, Truth
from backdoor_bench.triggers.patch import corner_patch, white_cells
from backdoor_bench.types import ImageSet, TestCase

CONF = Path(__file__).parents[2] / "conf" / "attack"
MINE = ("badnets", "badnets_white", "badnets_grid", "badnets_all2all", "blend_strip", "blend_kitty", "sig")
CIFAR10 = torch.arange(50_000) % 10


def tiny(count: int) -> torch.Tensor:
    return torch.zeros(1, 3, 8, 8, dtype=torch.uint8).expand(count, 3, 8, 8)


@pytest.mark.parametrize("id_", ["none", *MINE])
def test_yaml_lists_exactly_the_constructor_arguments(id_: str, make_attack: Callable[..., Any]) -> None:
    node = yaml.safe_load((CONF / f"{id_}.yaml").read_text())
    assert node["_convert_"] == "all"
    assert {key for key in node if not key.startswith("_")} == set(inspect.signature(type(make_attack(id_))).parameters)


@pytest.mark.parametrize(
    ("id_", "poisoned", "tested"),
    [
        ("none", 0, None),
        ("badnets", 4500, 9000),
        ("badnets_white", 5000, 9000),
        ("badnets_grid", 5000, 9000),
        ("badnets_all2all", 5000, 10000),
        ("blend_strip", 4500, 9000),
        ("blend_kitty", 4500, 9000),
        ("sig", 500, 9000),
    ],
)
def test_counts_on_cifar10(
    id_: str, poisoned: int, tested: int | None, make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    result = make_attack(id_).poison(make_view(CIFAR10, images=tiny(50_000)))
    assert int(result.is_poisoned.sum()) == poisoned
    assert not result.is_cover.any()
    test_labels = torch.arange(10_000) % 10
    assert [int(case.pool(test_labels).sum()) for case in result.tests] == ([] if tested is None else [tested])


@pytest.mark.parametrize(
    ("id_", "changes", "labels", "poisoned"),
    [
        ("badnets", {}, torch.arange(50_000) % 100, 4950),
        ("sig", {}, torch.arange(50_000) % 100, 50),
        ("badnets", {"target_class": 1, "poison_rate": 0.05, "poison_base": "whole"}, CIFAR10, 2500),  # MeCa
        ("sig", {"target_class": 1, "poison_rate": 0.05, "poison_base": "whole"}, CIFAR10, 2500),
        ("badnets", {"poison_rate": 0.05, "poison_base": "whole"}, torch.arange(9469) % 10, 473),
        ("badnets_grid", {"target_class": 1}, torch.arange(39_209) % 43, 3920),
        ("badnets", {"poison_count": 7}, CIFAR10, 7),
        ("badnets", {"poison_rate": 0.29, "poison_pool": "all"}, torch.arange(100) % 10, 29),
        ("badnets", {"poison_rate": 1.0}, torch.arange(100) % 10, 90),
    ],
)
def test_other_counts(
    id_: str,
    changes: dict[str, Any],
    labels: torch.Tensor,
    poisoned: int,
    make_attack: Callable[..., Any],
    make_view: Callable[..., Any],
) -> None:
    view = make_view(labels, images=tiny(len(labels)), classes=int(labels.max()) + 1)
    assert int(make_attack(id_, **changes).poison(view).is_poisoned.sum()) == poisoned
    assert view.warnings == []


@pytest.mark.parametrize("id_", MINE)
def test_only_the_chosen_rows_change(id_: str, make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    view = make_view()
    before = view.train.images.clone()
    result = make_attack(id_).poison(view)
    assert torch.equal(view.train.images, before)
    assert result.train.images.dtype == torch.uint8
    assert result.train.images.shape == before.shape
    changed = (result.train.images != before).flatten(1).any(1)
    assert torch.equal(changed, result.is_poisoned)
    assert torch.equal(result.true_labels, view.train.labels)
    assert torch.equal(result.train.labels[~changed], view.train.labels[~changed])
    assert torch.equal(result.trigger_id, result.is_poisoned.long() - 1)


@pytest.mark.parametrize("id_", [id_ for id_ in MINE if id_ not in ("badnets_all2all", "sig")])
def test_dirty_labels_become_the_target(
    id_: str, make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    result = make_attack(id_, target_class=3).poison(make_view())
    assert (result.train.labels[result.is_poisoned] == 3).all()
    assert (result.true_labels[result.is_poisoned] != 3).all()
    (case,) = result.tests
    labels = torch.arange(10)
    assert case.target_class == 3
    assert case.name == "to_3"
    assert case.label_rule(labels).tolist() == [3] * 10
    assert case.pool(labels).tolist() == [label != 3 for label in range(10)]


def test_all2all_moves_every_label_by_one(make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    result = make_attack("badnets_all2all").poison(make_view(classes=7))
    poisoned = result.is_poisoned
    assert torch.equal(result.train.labels[poisoned], (result.true_labels[poisoned] + 1) % 7)
    assert set(result.true_labels[poisoned].tolist()) == set(range(7))
    (case,) = result.tests
    assert case.target_class is None
    assert case.pool(torch.arange(7)).all()
    assert case.label_rule(torch.arange(7)).tolist() == [1, 2, 3, 4, 5, 6, 0]


def test_sig_keeps_labels_and_tests_with_a_stronger_wave(
    make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    view = make_view(images=torch.full((2000, 3, 32, 32), 128, dtype=torch.uint8))
    result = make_attack("sig", target_class=4).poison(view)
    assert torch.equal(result.train.labels, result.true_labels)
    assert (result.true_labels[result.is_poisoned] == 4).all()
    assert result.train.images[result.is_poisoned][0, 0, 0, :3].tolist() == [128, 164, 156]
    (case,) = result.tests
    assert case.trigger(view.train.images[:1])[0, 0, 0, :3].tolist() == [128, 183, 170]
    assert case.label_rule(torch.arange(10)).tolist() == [4] * 10
    assert int(case.pool(torch.arange(10)).sum()) == 9


def test_sig_as_stripes_is_the_same_at_training_and_test(
    make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    view = make_view(images=torch.full((2000, 3, 32, 32), 128, dtype=torch.uint8))
    result = make_attack("sig", mode="stripe_blend").poison(view)
    expected = [102, 105, 106, 105, 153, 150]  # (4 * 128 + s) // 5 with s = 0 14 19 13 255 241
    assert result.train.images[result.is_poisoned][0, 0, 0, :6].tolist() == expected
    assert result.tests[0].trigger(view.train.images[:1])[0, 0, 0, :6].tolist() == expected


def test_source_class_attack(make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    keys = {"label_rule": "source2target", "source_class": 5, "poison_pool": "source", "poison_rate": 0.5}
    result = make_attack("badnets", **keys).poison(make_view())
    assert int(result.is_poisoned.sum()) == 100
    assert (result.true_labels[result.is_poisoned] == 5).all()
    assert (result.train.labels[result.is_poisoned] == 0).all()
    (case,) = result.tests
    assert case.name == "5_to_0"
    assert case.pool(torch.arange(10)).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("id_", MINE)
def test_the_seed_alone_decides(id_: str, make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    attack = make_attack(id_, poison_order="random")
    first, again, other = (attack.poison(make_view(seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.train.labels, again.train.labels)
    assert torch.equal(first.is_poisoned, again.is_poisoned)
    assert not torch.equal(first.is_poisoned, other.is_poisoned)


def test_noise_follows_the_seed_of_the_attack(make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    black = torch.zeros(2000, 3, 32, 32, dtype=torch.uint8)
    stamped = []
    for seed in (0, 0, 1):
        result = make_attack("blend_kitty", asset="noise_rgb", seed=seed).poison(make_view(images=black, seed=seed))
        rows = result.train.images[result.is_poisoned]
        assert (rows == rows[:1]).all()  # one noise picture for all images
        assert torch.equal(result.tests[0].trigger(black[:1]), rows[:1])
        stamped.append(rows[0])
    assert torch.equal(stamped[0], stamped[1])
    assert not torch.equal(stamped[0], stamped[2])


def test_same_rows_whatever_the_trigger(make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    sets = [make_attack(id_).poison(make_view()).is_poisoned for id_ in ("badnets", "blend_strip", "blend_kitty")]
    assert torch.equal(sets[0], sets[1])
    assert torch.equal(sets[0], sets[2])


def test_first_order_takes_the_first_rows_of_the_pool(
    make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    labels = torch.tensor([0, 1, 0, 2, 3, 1, 2, 3, 0, 1])
    attack = make_attack("badnets_grid", poison_rate=0.3)
    assert attack.poison(make_view(labels)).is_poisoned.nonzero().flatten().tolist() == [1, 3, 4]


def test_clean_label_share_of_the_whole_set_is_capped_with_a_warning(
    make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    view = make_view()
    result = make_attack("sig", poison_base="whole", poison_rate=0.2).poison(view)
    assert int(result.is_poisoned.sum()) == 200
    assert torch.equal(result.is_poisoned, result.true_labels == 0)
    (warning,) = view.warnings
    assert "attack.poison_rate=0.2 asks for 400 images" in warning
    assert "200" in warning


def test_all2all_warns_of_a_target_class(make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    view = make_view()
    make_attack("badnets_all2all", target_class=2).poison(view)
    assert any("attack.target_class" in warning for warning in view.warnings)


def test_cover_rows_carry_the_trigger_and_keep_their_label(
    make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    view = make_view()
    result = make_attack("badnets", cover_rate=0.05).poison(view)
    assert int(result.is_cover.sum()) == 100
    assert not (result.is_cover & result.is_poisoned).any()
    assert torch.equal(result.train.labels[result.is_cover], view.train.labels[result.is_cover])
    corner = result.train.images[result.is_cover][:, 0, 29:, 29:]
    assert (corner == torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]])).all()
    without = make_attack("badnets").poison(make_view())
    assert torch.equal(without.is_poisoned, result.is_poisoned)


def test_cover_rows_of_a_clean_label_attack_are_of_other_classes(
    make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    result = make_attack("sig", cover_rate=0.4).poison(make_view())
    assert int(result.is_cover.sum()) == 800
    assert not (result.true_labels[result.is_cover] == 0).any()


def test_examples_are_clean_pixels_of_poisoned_rows(
    make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    view = make_view()
    result = make_attack("badnets", cover_rate=0.1).poison(view)
    assert torch.equal(result.example_index, result.is_poisoned.nonzero().flatten()[:16])
    assert torch.equal(result.originals, view.train.images[result.example_index])


def test_none_changes_nothing(make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    view = make_view()
    result = make_attack("none").poison(view)
    assert result.train is view.train
    assert result.tests == ()
    assert result.originals.shape == (0, 3, 32, 32)
    assert (result.trigger_id == -1).all()


def test_memory_mapped_images_give_the_same_set(
    tmp_path: Path, make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    in_memory = make_view()
    np.save(tmp_path / "images.npy", in_memory.train.images.numpy())
    expected = make_attack("blend_strip").poison(in_memory)
    mapped = make_attack("blend_strip").poison(make_view(images=MappedImages(tmp_path / "images.npy")))
    assert torch.equal(mapped.train.images[:], expected.train.images)
    assert torch.equal(mapped.train.labels, expected.train.labels)


def test_several_triggers_rules_and_covers_in_one_set(make_view: Callable[..., Any]) -> None:
    view = make_view(images=torch.zeros(2000, 3, 32, 32, dtype=torch.uint8))
    small, large = (corner_patch(white_cells(side), 32, 32) for side in (1, 2))
    parts = (
        Part(torch.tensor([12, 2]), large, all2one(1), trigger_id=1),
        Part(torch.tensor([3, 13]), small, source2target(3, 0)),
        Part(torch.tensor([4]), small, keep_labels, is_cover=True),
    )
    result = assemble(view, parts, ())
    assert result.is_poisoned.nonzero().flatten().tolist() == [2, 3, 12, 13]
    assert result.is_cover.nonzero().flatten().tolist() == [4]
    assert result.trigger_id[:14].tolist() == [-1, -1, 1, 0, 0, -1, -1, -1, -1, -1, -1, -1, 1, 0]
    assert result.train.labels[:14].tolist() == [0, 1, 1, 0, 4, 5, 6, 7, 8, 9, 0, 1, 1, 0]
    white = (result.train.images[:14, 0] == 255).sum((1, 2))
    assert white.tolist() == [0, 0, 4, 1, 1, 0, 0, 0, 0, 0, 0, 0, 4, 1]


def test_parts_may_not_overlap(make_view: Callable[..., Any]) -> None:
    part = Part(torch.tensor([1, 2]), corner_patch(white_cells(1), 32, 32), keep_labels)
    with pytest.raises(AssertionError, match="one trigger only"):
        assemble(make_view(), (part, part), ())


def test_what_the_stage_stores_is_what_is_used(make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    store: dict[str, Any] = {}

    def tensors(name: str, build: Callable[[], Any]) -> Any:
        return store.setdefault(name, None) or store.__setitem__(name, build()) or store[name]

    results = []
    for _ in range(2):
        view = replace(make_view(), stages=SimpleNamespace(tensors=tensors))
        results.append(make_attack("badnets", cover_rate=0.01).poison(view))
    assert set(store) == {"poisoned_set"}
    assert set(store["poisoned_set"]) == {"index", "rows", "labels", "is_cover", "trigger_id"}
    assert torch.equal(results[0].train.images, results[1].train.images)
    assert torch.equal(results[0].is_cover, results[1].is_cover)


def test_label_rules_leave_their_argument_alone() -> None:
    labels = torch.arange(5)
    assert sub2sub({2: 0, 3: 1})(labels).tolist() == [0, 1, 0, 1, 4]
    assert source2target(4, 2)(labels).tolist() == [0, 1, 2, 3, 2]
    assert only_classes(1, 3)(labels).tolist() == [False, True, False, True, False]
    assert labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("id_", "changes", "size", "box"),
    [
        ("badnets", {}, 224, (203, 223, 203, 223)),
        ("badnets", {"hires": "white22"}, 224, (202, 223, 202, 223)),
        ("badnets", {"hires": "white22"}, 64, (58, 63, 58, 63)),
        ("badnets", {"scale_patch": False}, 64, (61, 63, 61, 63)),
        ("badnets", {"pattern": "white", "margin": 1}, 32, (28, 30, 28, 30)),
        ("badnets_grid", {}, 256, (32, 61, 32, 61)),
        ("badnets_grid", {}, 32, (29, 31, 29, 31)),
        ("badnets_white", {}, 32, (27, 30, 27, 30)),
        ("badnets_all2all", {}, 32, (28, 30, 28, 30)),
    ],
)
def test_where_the_square_lies(
    id_: str,
    changes: dict[str, Any],
    size: int,
    box: tuple[int, int, int, int],
    make_attack: Callable[..., Any],
    make_view: Callable[..., Any],
) -> None:
    images = torch.full((1, 3, size, size), 100, dtype=torch.uint8)
    view = make_view(torch.arange(20) % 10, images=images.expand(20, 3, size, size))
    stamped = make_attack(id_, **changes).poison(view).tests[0].trigger(images)
    changed = (stamped != images)[0, 0].nonzero()
    (top, left), (bottom, right) = changed.min(0).values.tolist(), changed.max(0).values.tolist()
    assert (top, bottom, left, right) == box


def test_strip_mode_auto_changes_above_64_pixels(
    make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    def row(size: int, mode: str) -> list[int]:
        images = torch.full((1, 3, size, size), 200, dtype=torch.uint8)
        view = make_view(torch.arange(20) % 10, images=images.expand(20, 3, size, size))
        stamped = make_attack("blend_strip", strip_mode=mode).poison(view).tests[0].trigger(images)
        return [int(value) for value in stamped[0, 0, 0]]

    assert row(32, "auto")[:6] == [160, 162, 163, 162, 211, 208]  # (4 * 200 + s) // 5
    assert row(64, "auto") == row(64, "wrapped") != row(64, "sine")
    assert row(160, "auto") == row(160, "sine") != row(160, "wrapped")


def test_large_test_images_are_stamped_a_few_at_a_time(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def trigger(images: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        sizes.append(len(images))
        return 255 - images

    test = ImageSet(torch.arange(10 * 3 * 16 * 16).remainder(256).to(torch.uint8).view(10, 3, 16, 16), CIFAR10[:10], 10)
    monkeypatch.setattr(evaluate, "STAMPED_VALUES", 4 * 3 * 16 * 16 + 1)
    case = TestCase("inverted", trigger, all2one(0), any_class, 0)
    (stamped,) = Evaluator(test, (case,), Truth(None, None), 10, recipe.hardware).stamped()
    assert sizes == [4, 4, 2]
    assert torch.equal(stamped.images, 255 - test.images)
