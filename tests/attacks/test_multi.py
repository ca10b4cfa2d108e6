"""Two attacks in one set (attacks.md A25): counts, labels, disjoint rows, test sets, composition by configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate

from backdoor_bench.errors import BenchError, ConfigError
from backdoor_bench.types import Facts
from scripts.attack_gallery import QUICK
from scripts.make_attack_docs import settings
from tests.conftest import CONF

CIFAR10 = torch.arange(50_000) % 10
IDS = (
    "multi_1trig_2target", "multi_1trig_sub2sub", "multi_2trig_1target", "multi_2trig_2target", "multi_2trig_all2all",
)  # fmt: skip
# The attacks that can be a part.
SINGLE = [
    id_ for id_ in (path.stem for path in sorted((CONF / "attack").glob("*.yaml")))
    if hasattr(get_class(settings(id_)["_target_"]), "triggers") and id_ != "loss_adaptive"
]  # fmt: skip
TEST_LABELS = torch.arange(10_000) % 10
ROWS = torch.arange(10_000)


@cache
def attack(*overrides: str) -> Any:
    """The attack that a command line gives."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return unwrapped(lambda: instantiate(compose("config", list(overrides)).attack))


def unwrapped(make: Callable[[], Any]) -> Any:
    """What Hydra wraps is what the user sees."""
    try:
        return make()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, BenchError):
            cause = cause.__cause__
        raise (cause or error) from None


def black(count: int, size: int = 8) -> torch.Tensor:
    return torch.zeros(1, 3, size, size, dtype=torch.uint8).expand(count, 3, size, size)


@pytest.mark.parametrize("id_", IDS)
def test_250_rows_a_part_on_cifar10(id_: str, make_view: Callable[..., Any]) -> None:
    view = make_view(CIFAR10, images=black(50_000))
    result = attack(f"attack={id_}").poison(view)
    first, second = result.trigger_id == 0, result.trigger_id == 1
    assert (int(first.sum()), int(second.sum())) == (250, 250)
    assert torch.equal(first | second, result.is_poisoned)
    assert not result.is_cover.any()
    assert torch.equal(result.true_labels, CIFAR10)
    assert torch.equal(result.train.labels[~result.is_poisoned], CIFAR10[~result.is_poisoned])
    assert not result.train.images[~result.is_poisoned].any()
    assert len({case.name for case in result.tests}) == len(result.tests)
    assert view.warnings == []


@pytest.mark.parametrize(
    ("id_", "labels", "sources"),
    [
        ("multi_1trig_2target", ({0}, {1}), (set(range(1, 10)), {0, *range(2, 10)})),
        ("multi_1trig_sub2sub", ({0}, {1}), ({2}, {3})),
        ("multi_2trig_1target", ({0}, {0}), (set(range(1, 10)), set(range(1, 10)))),
        ("multi_2trig_2target", ({0}, {1}), (set(range(1, 10)), {0, *range(2, 10)})),
    ],
)
def test_labels(id_: str, labels: Any, sources: Any, make_view: Callable[..., Any]) -> None:
    result = attack(f"attack={id_}").poison(make_view(CIFAR10, images=black(50_000)))
    for number in (0, 1):
        rows = result.trigger_id == number
        assert set(result.train.labels[rows].tolist()) == labels[number]
        assert set(CIFAR10[rows].tolist()) == sources[number]


def test_all2all_moves_every_label_by_one(make_view: Callable[..., Any]) -> None:
    result = attack("attack=multi_2trig_all2all").poison(make_view(CIFAR10, images=black(50_000)))
    rows = result.is_poisoned
    assert torch.equal(result.train.labels[rows], (CIFAR10[rows] + 1) % 10)
    assert [int(case.pool(TEST_LABELS).sum()) for case in result.tests] == [10_000, 10_000]
    assert [case.name for case in result.tests] == ["first_all2all", "second_all2all"]


def test_two_triggers_are_the_checker_and_the_wrapping_patch(make_view: Callable[..., Any]) -> None:
    grey = torch.full((2000, 3, 32, 32), 128, dtype=torch.uint8)
    result = attack("attack=multi_2trig_2target").poison(make_view(images=grey))
    first, second = (result.train.images[result.trigger_id == number] for number in (0, 1))
    checker = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)
    assert (first[:, :, 29:, 29:] == checker).all()
    assert (first[:, :, :29] == 128).all()
    assert second[0, :, 25, 25:28].T.tolist() == [[79, 3, 53], [47, 115, 248], [157, 104, 51]]  # attacks.md A5
    assert (second[:, :, 28:] == 128).all()
    for case, rows in zip(result.tests, (first, second), strict=True):
        assert torch.equal(case.trigger(grey[:1]), rows[:1])


@pytest.mark.parametrize(
    ("id_", "tested", "targets"),
    [
        ("multi_1trig_sub2sub", [1000, 1000], [0, 1]),
        ("multi_2trig_1target", [9000, 9000], [0, 0]),
        ("multi_2trig_2target", [9000, 9000], [0, 1]),
    ],
)
def test_every_part_is_tested_on_its_own_pool(
    id_: str, tested: list[int], targets: list[int], make_view: Callable[..., Any]
) -> None:
    cases = attack(f"attack={id_}").poison(make_view()).tests
    assert [int(case.pool(TEST_LABELS).sum()) for case in cases] == tested
    assert [case.target_class for case in cases] == targets
    assert all(case.counts for case in cases)
    for case, target in zip(cases, targets, strict=True):
        kept = case.pool(TEST_LABELS)
        assert (case.label_rule(TEST_LABELS[kept], ROWS[kept]) == target).all()


def test_each_image_is_assigned_one_target_that_is_not_its_class(make_view: Callable[..., Any]) -> None:
    case, *listed = attack("attack=multi_1trig_2target").poison(make_view()).tests
    assert case.pool(TEST_LABELS).all()
    assert case.target_class is None
    wanted = case.label_rule(TEST_LABELS, ROWS)
    assert (wanted != TEST_LABELS).all()
    assert (wanted[TEST_LABELS == 0] == 1).all()
    assert (wanted[TEST_LABELS == 1] == 0).all()
    others = wanted[TEST_LABELS > 1]
    assert set(others.tolist()) == {0, 1}
    assert abs(others.double().mean().item() - 0.5) < 0.02  # 8,000 draws: 3.5 standard deviations
    some = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[:100]
    assert torch.equal(case.label_rule(TEST_LABELS[some], some), wanted[some])  # whatever stands beside it
    again = attack("attack=multi_1trig_2target", "attack.seed=1").poison(make_view()).tests[0]
    assert not torch.equal(again.label_rule(TEST_LABELS, ROWS), wanted)
    assert [(one.name, one.target_class, one.counts) for one in listed] == [
        ("predicted_0", 0, False),
        ("predicted_1", 1, False),
    ]
    assert all(one.pool(TEST_LABELS).all() for one in listed)
    assert [set(one.label_rule(TEST_LABELS).tolist()) for one in listed] == [{0}, {1}]


def test_any_attack_under_any_rule_can_be_a_part(make_view: Callable[..., Any]) -> None:
    words = ["attack=multi_2trig_2target", "attack@attack.first=sig", "attack@attack.second=blend_kitty"]
    view = make_view()
    result = attack(*words, "attack.second.label_rule=all2all", "attack.second.poison_pool=all").poison(view)
    first, second = result.trigger_id == 0, result.trigger_id == 1
    assert (int(first.sum()), int(second.sum())) == (10, 10)  # 0.5 % of 2,000
    assert (view.train.labels[first] == 0).all()
    assert torch.equal(result.train.labels[first], view.train.labels[first])
    assert torch.equal(result.train.labels[second], (view.train.labels[second] + 1) % 10)
    assert [case.name for case in result.tests] == ["first_to_0", "second_all2all"]


def test_cover_rows_of_a_part_keep_their_label(make_view: Callable[..., Any]) -> None:
    view = make_view(images=black(2000, 32))
    result = attack("attack=multi_2trig_2target", "attack.second.cover_rate=0.02").poison(view)
    assert int(result.is_cover.sum()) == 40
    assert (result.trigger_id[result.is_cover] == 1).all()
    assert not (result.is_cover & result.is_poisoned).any()
    assert torch.equal(result.train.labels[result.is_cover], view.train.labels[result.is_cover])
    stamped = result.train.images[result.is_cover]
    assert (stamped == stamped[:1]).all()
    assert stamped.any()


@pytest.mark.parametrize("id_", IDS)
def test_same_seed_same_set_and_clean_images_stay(id_: str, make_view: Callable[..., Any]) -> None:
    labels = torch.arange(800) % 10
    view = make_view(labels, size=16)
    before = view.train.images.clone()
    one, same, other = (attack(f"attack={id_}").poison(make_view(labels, size=16, seed=seed)) for seed in (0, 0, 1))
    again = attack(f"attack={id_}").poison(view)
    assert torch.equal(view.train.images, before)
    for result in (same, again):
        assert torch.equal(one.train.images, result.train.images)
        assert torch.equal(one.train.labels, result.train.labels)
        assert torch.equal(one.trigger_id, result.trigger_id)
    assert not torch.equal(one.trigger_id, other.trigger_id)


def test_the_parts_follow_the_seed() -> None:
    built = attack("attack=multi_2trig_2target", "attack.seed=7")
    assert (built.seed, built.first.seed, built.second.seed) == (7, 7, 7)
    assert attack("attack=multi_2trig_2target", "seed=3").second.seed == 3


@pytest.mark.parametrize("size", [16, 32, 64, 160, 224])
@pytest.mark.parametrize("id_", IDS)
def test_every_size_is_accepted(id_: str, size: int) -> None:
    attack(f"attack={id_}").check(Facts(10, size, 50_000, epochs=1, steps_per_epoch=1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attack.first.poison_rate=2"], r"^attack\.first\.poison_rate=2 .*<= 1"),
        (["attack.second.target_class=-1"], r"^attack\.second\.target_class=-1 .*>= 0"),
        (
            ["attack.second.label_rule=all2all"],
            r"^attack\.second\.label_rule='all2all' .*attack\.second\.poison_pool to all",
        ),
        (["attack@attack.second=none"], r"attack\.second is NoAttack, which has no trigger"),
        (["attack@attack.first=natural"], r"attack\.first is Natural, which has no trigger"),
        (
            ["attack@attack.second=wanet", "attack.second.mode=online"],
            r"attack\.second is WaNet, which owns the training",
        ),
        (["attack.assignment=both"], r"attack\.assignment='both' .*each, random"),
        (["attack.assignment=random"], r"attack\.assignment='random' .*kind \(BadNets, Trojan\)"),
        (["attack.seed=-1"], r"attack\.(first\.)?seed=-1"),
    ],
)
def test_what_cannot_work_is_told_with_its_key(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attack("attack=multi_2trig_2target", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attack.second.side=2", "attack.second.cells=[[0,255],[255,0]]"], r"differ in cells, side; make them equal"),
        (["attack.second.target_class=0"], r"attack\.second\.target_class=0 is attack\.first\.target_class too"),
        (
            ["attack.first.label_rule=all2all", "attack.first.poison_pool=all"],
            r"attack\.first\.label_rule='all2all' .*choose all2one or clean",
        ),
    ],
)
def test_random_targets_need_one_trigger_and_two_targets(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attack("attack=multi_1trig_2target", *words)


@pytest.mark.parametrize("part", ["iab", "lba_14"])
def test_random_targets_need_a_trigger_that_serves_both(part: str) -> None:
    words = [f"attack@attack.{name}={part}" for name in ("first", "second")]
    with pytest.raises(ConfigError, match=r"attack\.assignment='random' .*for every target class"):
        attack("attack=multi_1trig_2target", *words)
    attack("attack=multi_2trig_2target", *words)


@pytest.mark.parametrize("id_", SINGLE)
def test_a_trigger_that_another_target_changes_says_so(
    id_: str, make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    view = make_view(torch.arange(40) % 4, size=32, classes=4)
    keys = {"cover_classes": [3]} if id_ == "tact" else {}
    parts = [make_attack(id_, target_class=target, **QUICK.get(id_, {}), **keys) for target in (1, 2)]
    stamped = [part.triggers(view)[1](view.train.images, torch.arange(40)) for part in parts]
    assert torch.equal(*stamped) != getattr(parts[0], "made_for_target", False)


def test_what_the_data_rule_out_is_told_with_its_key(make_view: Callable[..., Any]) -> None:
    facts = Facts(10, 32, 50_000, epochs=1, steps_per_epoch=1)
    with pytest.raises(ConfigError, match=r"^attack\.first\.source_class=2 .*<= 1"):
        attack("attack=multi_1trig_sub2sub").check(replace(facts, num_classes=2))
    with pytest.raises(ConfigError, match=r"^attack\.second\.poison_rate=0\.005 of 100 images poisons 0"):
        attack("attack=multi_2trig_1target", "attack.first.poison_rate=0.1").check(replace(facts, train_size=100))
    words = ["attack.first.poison_rate=0.9", "attack.first.poison_base=eligible", "attack.second.poison_rate=0.2"]
    with pytest.raises(ConfigError, match=r"^attack\.second\.poison_rate=0\.2 asks for 400"):
        attack("attack=multi_2trig_1target", *words).poison(make_view())


def test_a_part_is_chosen_on_the_command_line(bench: Callable[..., Any]) -> None:
    words = ["attack=multi_2trig_2target", "attack@attack.second=blend_kitty", "train.epochs=1", "defense=no_defense"]
    done = bench(*words, "attack.first.poison_rate=0.05", "attack.second.poison_rate=0.05")
    assert done.code == 0, done.err
    assert done.result["poison"]["n_poisoned"] == 50
    assert set(done.result["metrics"]["asr_per_trigger"]) == {"first_to_0", "second_to_1"}
    refused = bench(*words, "attack.second.alpha=3")
    assert refused.code == 2
    assert "attack.second.alpha=3 is not allowed" in refused.err
