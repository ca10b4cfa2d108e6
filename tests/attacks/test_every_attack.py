"""What every attack must hold (attacks.md 3.4, 4 and 9), whichever stands in conf/attack: new ones are found here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import get_class
from torch import Tensor

from backdoor_bench.attacks import common
from backdoor_bench.data.images import MappedImages
from backdoor_bench.errors import ConfigError
from backdoor_bench.types import AttackerView, Facts, Images, ImageSet, PoisonedSet, TestCase
from scripts.attack_gallery import QUICK, QUICK_TRAIN, build, changed, make_view
from scripts.make_attack_docs import rule, settings
from tests.conftest import CONF

IDS = sorted(path.stem for path in (CONF / "attack").glob("*.yaml") if path.stem != "import")  # it needs files
POISONING = [id_ for id_ in IDS if getattr(get_class(settings(id_)["_target_"]), "poisons", True)]
NETWORKS = [id_ for id_ in POISONING if id_ in QUICK and settings(id_)["label_rule"] != "clean"]  # fewer rows do
QUICKLY = ("dataset=toy", *QUICK_TRAIN, "hardware=cpu", "hardware.threads=1")
TEST10 = torch.arange(10_000) % 10
NOT_TARGET = [9000]  # of 10,000 test images

# Poisoned rows, cover rows and test images that count, on CIFAR-10 (attacks.md 3.2, 3.4, 9.6); poisoned rows on CIFAR-100.
EBD, TR = (4500, 0, NOT_TARGET, 4950), (5000, 0, NOT_TARGET, 5000)
CLEAN = (500, 0, NOT_TARGET, 50)
COUNTS: dict[str, tuple[int, int, list[int], int]] = {
    "badnets": EBD, "trojan": EBD, "blend_strip": EBD, "blend_kitty": EBD, "instagram": EBD, "iab": EBD, "ssba": EBD,
    "loss_adaptive": EBD, "wanet": (4500, 9000, NOT_TARGET, 4950), "badnets_all2all": (5000, 0, [10_000], 5000),
    "sig": CLEAN, "cl": CLEAN, "badnets_grid": TR, "badnets_white": TR, "trojan_sq": TR, "trojan_wm": TR, "l0_inv": TR,
    "l2_inv": TR, "smooth": TR, "lba_14": TR, "lba_12": TR, "lba_10": TR, "physical": (2500, 0, NOT_TARGET, 2500),
    "adap_patch": (2500, 500, NOT_TARGET, 2500), "adap_blend": (5000, 5000, NOT_TARGET, 5000),
    "tact": (2500, 500, [1000], 500), "multi_1trig_2target": (500, 0, [10_000], 500),
    "multi_1trig_sub2sub": (500, 0, [1000, 1000], 500), "multi_2trig_1target": (500, 0, [9000, 9000], 500),
    "multi_2trig_2target": (500, 0, [9000, 9000], 500), "multi_2trig_all2all": (500, 0, [10_000, 10_000], 500),
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A poisoned set with all that went into it; before: the images as they were."""

    attack: Any
    settings: Any
    view: AttackerView
    before: Tensor
    result: PoisonedSet

    @property
    def stamped(self) -> Tensor:
        return self.result.is_poisoned | self.result.is_cover

    @property
    def cases(self) -> list[TestCase]:
        return [case for case in self.result.tests if isinstance(case, TestCase)]

    @property
    def after(self) -> Tensor:
        return self.result.train.images[torch.arange(len(self.before))]


def random_images(count: int, size: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def poison(
    id_: str, folder: Path, *, labels: Tensor | None = None, images: Images | None = None, size: int = 32,
    classes: int = 10, seed: int = 0, sets: Path | None = None, **keys: Any,
) -> Made:  # fmt: skip
    """The set that run.py would make of these rows, by default some of random pixels, learning quickly. folder: where
    what is learnt is kept, and the stamped rows too unless ``sets`` is given."""
    labels = torch.arange(100 if id_ in NETWORKS else 400) % classes if labels is None else labels
    images = random_images(len(labels), size) if images is None else images
    config = changed(id_, QUICK.get(id_, {}) | keys, *QUICKLY)
    config.seed = seed
    attack = build(config)
    attack.check(Facts(classes, images.shape[-1], len(labels), epochs=1, steps_per_epoch=1))
    view = make_view(config, ImageSet(images, labels, classes), folder, sets)
    before = images[torch.arange(len(labels))].clone() if len(labels) <= 2000 else torch.empty(0)
    return Made(attack, config.attack, view, before, attack.poison(view))


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests keep what is learnt."""
    return tmp_path_factory.mktemp("learnt")


@pytest.fixture(scope="module")
def made(learnt: Path) -> Callable[..., Made]:
    """``poison``, once for the same arguments."""

    @cache
    def make(id_: str, size: int = 32, classes: int = 10) -> Made:
        return poison(id_, learnt, size=size, classes=classes)

    return make


def part_of(one: Made, trigger: int) -> Any:
    """The shared keys that hold for a trigger: the attack's own, or those of the part of a composition."""
    return one.settings[("first", "second")[trigger]] if "first" in one.settings else one.settings


# --- how many ---


@pytest.mark.parametrize("id_", POISONING)
def test_counts_on_cifar10_and_cifar100(id_: str, tmp_path: Path) -> None:
    assert id_ in COUNTS, "a new attack: state its counts here"
    poisoned, cover, tested, poisoned_100 = COUNTS[id_]
    learnt_on = 200 if id_ in NETWORKS else 1000 if id_ in QUICK else None  # fewer rows, of which fewer are poisoned
    for classes, expected, rows in ((10, poisoned, learnt_on or 50_000), (100, poisoned_100, learnt_on or 5000)):
        labels = torch.arange(rows) % classes
        black = torch.zeros(1, 3, 16, 16, dtype=torch.uint8).expand(rows, 3, 16, 16)
        one = poison(id_, tmp_path, labels=labels, images=black, classes=classes)
        result = one.result
        assert int(result.is_poisoned.sum()) == expected * rows // 50_000
        follows = cover * expected // poisoned if id_ == "wanet" else cover  # as many as there are poisoned rows, twice
        assert int(result.is_cover.sum()) == follows * rows // 50_000
        if classes == 10:
            assert [int(case.pool(TEST10).sum()) for case in one.cases if case.counts] == tested


@pytest.mark.parametrize("id_", POISONING)
def test_a_test_image_counts_only_if_the_attacker_wants_another_label(id_: str, made: Callable[..., Made]) -> None:
    rows = torch.arange(len(TEST10))
    cases = [case for case in made(id_).cases if case.counts]
    assert cases
    for case in cases:
        wanted, pool = case.label_rule(TEST10, rows), case.pool(TEST10)
        assert pool.dtype == torch.bool
        assert wanted.dtype == torch.int64
        assert (wanted[pool] != TEST10[pool]).all()
        if case.target_class is not None:
            assert (wanted[pool] == case.target_class).all()
    names = [case.name for case in made(id_).result.tests]
    assert len(set(names)) == len(names)


# --- what changes ---


@pytest.mark.parametrize("id_", POISONING)
def test_shape_dtype_and_input_untouched(id_: str, made: Callable[..., Made]) -> None:
    one = made(id_)
    result, count = one.result, len(one.before)
    assert torch.equal(one.view.train.images[:], one.before)
    assert torch.equal(one.view.train.labels, torch.arange(count) % 10)
    assert result.train.images.shape == one.before.shape
    assert one.after.dtype == torch.uint8
    assert result.train.num_classes == 10
    for mask in (result.is_poisoned, result.is_cover):
        assert mask.dtype == torch.bool
        assert mask.shape == (count,)
        assert mask.device.type == "cpu"
    assert result.train.labels.dtype == result.trigger_id.dtype == torch.int64
    assert torch.equal(result.true_labels, one.view.train.labels)
    assert torch.equal(result.originals, one.before[result.example_index])
    assert result.is_poisoned[result.example_index].all()
    assert (result.train_loss is not None) == getattr(one.attack, "controls_training", False)


@pytest.mark.parametrize("id_", POISONING)
def test_only_the_chosen_rows_change(id_: str, made: Callable[..., Made]) -> None:
    one = made(id_)
    result = one.result
    assert result.is_poisoned.any()
    assert not (result.is_poisoned & result.is_cover).any()
    assert torch.equal(result.trigger_id >= 0, one.stamped)
    changed_rows = (one.after != one.before).flatten(1).any(1)
    assert torch.equal(changed_rows, one.stamped)
    kept = ~result.is_poisoned  # cover rows keep their label too
    assert torch.equal(result.train.labels[kept], result.true_labels[kept])


@pytest.mark.parametrize("id_", POISONING)
def test_poisoned_labels_follow_the_rule(id_: str, made: Callable[..., Made]) -> None:
    result = made(id_).result
    for trigger in result.trigger_id.unique().tolist():
        if trigger < 0:
            continue
        keys = part_of(made(id_), trigger)
        mine = result.is_poisoned & (result.trigger_id == trigger)
        true, given = result.true_labels[mine], result.train.labels[mine]
        assert len(true)
        if keys.label_rule == "clean":
            assert torch.equal(given, true)
            assert (true == keys.target_class).all()
        elif keys.label_rule == "all2all":
            assert torch.equal(given, (true + 1) % 10)
        else:
            assert (given == keys.target_class).all()
        if keys.poison_pool == "non_target":
            assert (true != keys.target_class).all()
        elif keys.poison_pool == "source":
            assert (true == keys.source_class).all()


@pytest.mark.parametrize("id_", [id_ for id_ in IDS if id_ not in POISONING])
def test_what_poisons_nothing_changes_nothing(id_: str, made: Callable[..., Made]) -> None:
    one = made(id_)
    assert one.result.train is one.view.train
    assert not one.stamped.any()
    assert (one.result.trigger_id == -1).all()
    assert torch.equal(one.result.true_labels, one.view.train.labels)


# --- seeds, batches, stores ---


@pytest.mark.parametrize("id_", POISONING)
def test_the_seed_alone_decides(id_: str, learnt: Path, tmp_path: Path) -> None:
    def once(folder: Path, seed: int) -> PoisonedSet:
        places = ("first.", "second.") if id_.startswith("multi_") else ("",)
        order: dict[str, Any] = {f"{place}poison_order": "random" for place in places}
        return poison(id_, folder, seed=seed, **order).result

    first, again, other = once(learnt, 0), once(tmp_path, 0), once(tmp_path, 1)
    assert torch.equal(first.train.images[:], again.train.images[:])
    assert torch.equal(first.train.labels, again.train.labels)
    assert torch.equal(first.trigger_id, again.trigger_id)
    assert not torch.equal(first.is_poisoned, other.is_poisoned)


@pytest.mark.parametrize("id_", POISONING)
def test_rows_stamped_a_few_at_a_time_are_the_same(
    id_: str, made: Callable[..., Made], learnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "CHUNK_VALUES", 3 * 3 * 32 * 32)
    few = poison(id_, learnt, sets=tmp_path)
    assert close(id_, few.after, made(id_).after)
    assert torch.equal(few.result.train.labels, made(id_).result.train.labels)


def close(id_: str, one: Tensor, other: Tensor) -> bool:
    """Equal; networks that sum in another order may bring a pixel over the next integer."""
    if id_ not in QUICK:
        return torch.equal(one, other)
    difference = (one.int() - other.int()).abs()
    return int(difference.max()) <= 1 or float((difference > 0).double().mean()) < 1e-3


@pytest.mark.parametrize("id_", POISONING)
def test_test_triggers_are_pure_functions_of_image_and_row(id_: str, made: Callable[..., Made]) -> None:
    one = made(id_)
    rows = torch.tensor([7, 3, 91, 42, 4])
    images = one.before[rows]
    for case in one.cases:
        stamped = case.trigger(images, rows)
        assert torch.equal(images, one.before[rows])
        assert stamped.shape == images.shape
        assert stamped.dtype == torch.uint8
        assert (stamped != images).flatten(1).any(1).all()
        assert torch.equal(case.trigger(images, rows), stamped)
        assert close(id_, case.trigger(images.flip(0), rows.flip(0)).flip(0), stamped)
        assert close(id_, torch.cat([case.trigger(images[i : i + 1], rows[i : i + 1]) for i in range(5)]), stamped)
        assert case.trigger(images[:0], rows[:0]).shape == (0, *images.shape[1:])


@pytest.mark.parametrize("id_", POISONING)
def test_memory_mapped_images_give_the_same_set(
    id_: str, made: Callable[..., Made], learnt: Path, tmp_path: Path
) -> None:
    one = made(id_)
    np.save(tmp_path / "images.npy", one.before.numpy())
    mapped = poison(id_, learnt, images=MappedImages(tmp_path / "images.npy"), sets=tmp_path)
    assert torch.equal(mapped.after, one.after)
    assert torch.equal(mapped.result.train.labels, one.result.train.labels)
    assert isinstance(mapped.result.train.images, MappedImages)


# --- other sizes, other class counts, values that cannot be ---


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("id_", POISONING)
def test_other_sizes(id_: str, size: int, made: Callable[..., Made]) -> None:
    try:
        one = made(id_, size=size)
    except ConfigError:
        if size < 32:
            return  # refused, with a reason
        raise
    assert torch.equal((one.after != one.before).flatten(1).any(1), one.stamped)
    assert torch.equal(one.result.is_poisoned, made(id_).result.is_poisoned)
    for case in one.cases:
        assert case.trigger(one.before[:3], torch.arange(3)).shape == (3, 3, size, size)


@pytest.mark.parametrize("classes", [4, 43])
@pytest.mark.parametrize("id_", POISONING)
def test_other_class_counts(id_: str, classes: int, made: Callable[..., Made]) -> None:
    one = made(id_, size=16, classes=classes)
    result = one.result
    assert result.is_poisoned.any()
    assert int(result.train.labels.max()) < classes
    labels = torch.arange(classes)
    for case in one.cases:
        wanted = case.label_rule(labels, labels)
        assert int(wanted.min()) >= 0
        assert int(wanted.max()) < classes


@pytest.mark.parametrize("id_", POISONING)
def test_a_target_class_that_is_not_there_is_refused(id_: str) -> None:
    place = "first." if id_.startswith("multi_") else ""
    if rule(id_) == "all2all":
        keys = {f"{place}label_rule": "all2one", f"{place}poison_pool": "non_target", f"{place}target_class": 10}
    else:
        keys = {f"{place}target_class": 10}
    attack = build(changed(id_, keys, *QUICKLY))
    with pytest.raises(ConfigError, match=rf"attack\.{place}target_class=10 .*<= 9"):
        attack.check(Facts(10, 32, 400, epochs=1, steps_per_epoch=1))
