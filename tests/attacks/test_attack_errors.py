"""Settings that cannot work end in one message with key, value and range (faults.md B08-B16, B29)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from backdoor_bench.errors import ConfigError
from backdoor_bench.types import Facts


def facts(num_classes: int | None = 10, image_size: int = 32, train_size: int | None = 50_000) -> Facts:
    return Facts(num_classes, image_size, train_size, epochs=1, steps_per_epoch=1)


@pytest.mark.parametrize(
    ("id_", "changes", "message"),
    [
        ("badnets", {"seed": -1}, r"attack\.seed=-1 .* >= 0"),  # B08
        ("none", {"seed": -1}, r"attack\.seed=-1 .* >= 0"),
        ("badnets", {"seed": 0.5}, r"attack\.seed=0\.5 .* an integer"),
        ("badnets", {"poison_rate": 1.5}, r"attack\.poison_rate=1\.5 .*<= 1"),  # B09
        ("badnets", {"poison_rate": -0.1}, r"attack\.poison_rate=-0\.1 .*>= 0"),  # B10
        ("badnets", {"poison_rate": "ten"}, r"attack\.poison_rate='ten'"),
        ("badnets", {"poison_rate": float("nan")}, r"attack\.poison_rate=nan"),
        ("badnets", {"cover_rate": 2}, r"attack\.cover_rate=2 .*<= 1"),
        ("badnets", {"poison_count": 0}, r"attack\.poison_count=0 .*>= 1"),
        ("sig", {"poison_rate": 1.0}, r"attack\.poison_rate=1\.0 .*clean-label.*below 1"),  # B12
        ("badnets", {"target_class": -1}, r"attack\.target_class=-1 .*>= 0"),  # B14
        ("badnets", {"target_class": None}, r"attack\.target_class=None .*>= 0"),
        ("badnets", {"target_class": "cat"}, r"attack\.target_class='cat'"),
        ("badnets", {"poison_base": "all"}, r"attack\.poison_base='all' .*eligible, whole"),
        ("badnets", {"poison_pool": "some"}, r"attack\.poison_pool='some' .*non_target"),
        ("badnets", {"poison_order": "last"}, r"attack\.poison_order='last' .*random, first"),
        ("badnets", {"label_rule": "all"}, r"attack\.label_rule='all' .*all2one"),
        ("badnets", {"label_rule": "all2all"}, r"attack\.label_rule='all2all' .*poison_pool to all"),
        ("badnets", {"label_rule": "clean"}, r"attack\.label_rule='clean' .*poison_pool to target"),
        ("sig", {"label_rule": "all2all"}, r"attack\.label_rule='all2all' .*choose one of clean"),  # B29
        ("sig", {"label_rule": "all2all", "poison_pool": "all"}, r"attack\.label_rule='all2all'"),  # B29
        ("badnets_all2all", {"label_rule": "clean"}, r"attack\.label_rule='clean' .*poison_pool='all'"),  # B29
        ("badnets_all2all", {"poison_pool": "target"}, r"poison_pool='target'.*poison_pool to all"),
        ("badnets", {"source_class": 3}, r"attack\.source_class=3"),
        ("badnets", {"label_rule": "source2target", "poison_pool": "source"}, r"attack\.source_class=None"),
        (
            "badnets",
            {"label_rule": "source2target", "poison_pool": "source", "source_class": 0},
            r"attack\.source_class=0 .*target_class",
        ),
        ("badnets", {"pattern": "star"}, r"attack\.pattern='star' .*grid3, white"),
        ("badnets", {"hires": "big"}, r"attack\.hires='big'"),
        ("badnets", {"side": 0}, r"attack\.side=0 .*>= 1"),
        ("badnets", {"margin": -1}, r"attack\.margin=-1 .*>= 0"),  # B16
        ("badnets", {"side": 4}, r"attack\.cells=.*attack\.side=4"),
        ("badnets", {"cells": [[0, 0, 255], [0, 255], [255, 0, 0]]}, r"attack\.cells"),
        ("badnets", {"cells": [[0, 0, 256], [0, 255, 0], [255, 0, 0]]}, r"attack\.cells=256 .*<= 255"),
        ("badnets", {"scale_patch": "yes"}, r"attack\.scale_patch='yes'"),
        ("blend_strip", {"alpha": 0}, r"attack\.alpha=0 .*> 0"),
        ("blend_strip", {"alpha": 1.2}, r"attack\.alpha=1\.2"),
        ("blend_strip", {"strip_mode": "zigzag"}, r"attack\.strip_mode='zigzag'"),
        ("blend_strip", {"delta": 300}, r"attack\.delta=300"),
        ("blend_strip", {"omega": 0}, r"attack\.omega=0"),
        ("blend_strip", {"freq": float("inf")}, r"attack\.freq=inf"),
        ("blend_kitty", {"alpha": -1}, r"attack\.alpha=-1"),
        ("blend_kitty", {"asset": "dog"}, r"attack\.asset='dog'.*kitty_white"),
        ("sig", {"delta_train": 0}, r"attack\.delta_train=0"),
        ("sig", {"delta_test": 256}, r"attack\.delta_test=256"),
        ("sig", {"freq": 0}, r"attack\.freq=0"),
        ("sig", {"mode": "ramp"}, r"attack\.mode='ramp' .*add, stripe_blend"),
    ],
)
def test_values_that_are_refused_at_once(
    id_: str, changes: dict[str, Any], message: str, make_attack: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_attack(id_, **changes)


@pytest.mark.parametrize(
    ("id_", "changes", "known", "message"),
    [
        ("badnets", {"target_class": 10}, facts(), r"attack\.target_class=10 .*<= 9"),  # B13
        (
            "badnets",
            {"label_rule": "source2target", "poison_pool": "source", "source_class": 10},
            facts(),
            r"attack\.source_class=10 .*<= 9",
        ),
        ("badnets", {"poison_rate": 0.00001}, facts(), r"attack\.poison_rate=1e-05 of 50000 images poisons 0"),  # B11
        ("badnets", {"poison_rate": 0}, facts(), r"attack\.poison_rate=0 .*attack=none"),
        ("sig", {"poison_rate": 0.001}, facts(train_size=512), r"attack\.poison_rate=0\.001 of 512 .*0\.0019532"),
        ("badnets", {"poison_count": 50_001}, facts(), r"attack\.poison_count=50001 .*<= 50000"),
        ("badnets", {"pattern": "white", "side": 33}, facts(), r"attack\.side=33 .*<= 32"),  # B15
        ("badnets", {"pattern": "white", "side": 33}, facts(image_size=224), r"attack\.side=33 .*<= 32"),
        ("badnets", {"pattern": "white", "side": 20}, facts(image_size=16), r"attack\.side=20 .*<= 16"),
        ("badnets", {"margin": 30}, facts(), r"attack\.margin=30 .*<= 29"),  # B16
        ("badnets", {"margin": 62, "scale_patch": False}, facts(image_size=64), r"attack\.margin=62 .*<= 61"),
    ],
)
def test_what_the_facts_rule_out(
    id_: str, changes: dict[str, Any], known: Facts, message: str, make_attack: Callable[..., Any]
) -> None:
    attack = make_attack(id_, **changes)
    with pytest.raises(ConfigError, match=message):
        attack.check(known)


@pytest.mark.parametrize(
    "id_",
    ["none", "badnets", "badnets_white", "badnets_grid", "badnets_all2all", "blend_strip", "blend_kitty", "sig"],
)
@pytest.mark.parametrize("known", [facts(), facts(None, 16, None), facts(43, 224, 39_209)])
def test_defaults_pass(id_: str, known: Facts, make_attack: Callable[..., Any]) -> None:
    make_attack(id_).check(known)


@pytest.mark.parametrize(
    ("id_", "changes", "message"),
    [
        ("badnets", {"target_class": 10}, r"attack\.target_class=10 .*<= 9"),
        ("badnets", {"poison_rate": 0.0001}, r"attack\.poison_rate=0\.0001 of 2000 images poisons 0"),
        ("sig", {"poison_rate": 0.004}, r"attack\.poison_rate=0\.004 of 200 images poisons 0.*0\.005"),
        (
            "badnets_grid",
            {"poison_rate": 0.95},
            r"asks for 1900 images, .*non_target has 1800; set it to at most 0\.9$",
        ),
        ("badnets", {"poison_count": 1801}, r"attack\.poison_count=1801 asks for 1801 .*at most 1800$"),
        ("sig", {"poison_count": 201}, r"attack\.poison_count=201 .*target has 200; set it to at most 200$"),
        (
            "badnets",
            {"poison_rate": 0.5, "cover_rate": 0.6},
            r"attack\.cover_rate=0\.6 asks for 1200 .*1100 remain.*0\.55",
        ),
        ("badnets", {"poison_rate": 1.0, "poison_pool": "all", "cover_rate": 0.1}, r"only 0 remain"),
    ],
)
def test_what_only_the_labels_tell(
    id_: str, changes: dict[str, Any], message: str, make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_attack(id_, **changes).poison(make_view())


def test_a_class_without_images_cannot_be_poisoned(
    make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    labels = torch.arange(100) % 5
    with pytest.raises(ConfigError, match=r"poisons 0 images.*another attack\.poison_pool"):
        make_attack("sig", target_class=7).poison(make_view(labels))


def test_square_of_a_folder_is_checked_when_its_size_is_known(
    make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    attack = make_attack("badnets", pattern="white", side=20)
    with pytest.raises(ConfigError, match=r"attack\.side=20 .*<= 16"):
        attack.poison(make_view(size=16))


@pytest.mark.parametrize("id_", ["cl", "lba_14", "iab", "ssba", "smooth"])
def test_learned_attacks_refuse_before_they_learn(
    id_: str, make_attack: Callable[..., Any], make_view: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = make_attack(id_, poison_count=1999)  # more than any pool of 2,000 rows in ten classes has
    for name in ("triggers", "_generators"):
        monkeypatch.setattr(type(attack), name, lambda self, view: pytest.fail("it learns first"), raising=False)
    with pytest.raises(ConfigError, match=r"attack\.poison_count=1999"):
        attack.poison(make_view())
