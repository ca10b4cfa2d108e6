"""Attacks with cover rows, and the one with a train transform: counts, labels, pixels, what is drawn for each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.data.augment import Augmentation
from backdoor_bench.data.images import MappedImages
from backdoor_bench.data.physical import PhysicalTransform
from backdoor_bench.errors import ConfigError
from backdoor_bench.training.fit import Batch, fit
from backdoor_bench.triggers.logos import QUARTERS, logo
from backdoor_bench.triggers.overlay import Overlay
from backdoor_bench.types import Facts, PoisonedSet

MINE = ("wanet", "adap_blend", "adap_patch", "tact", "physical")
CIFAR10 = torch.arange(50_000) % 10


def tiny(count: int) -> Tensor:
    return torch.zeros(1, 3, 16, 16, dtype=torch.uint8).expand(count, 3, 16, 16)


@pytest.mark.parametrize(
    ("id_", "changes", "labels", "poisoned", "cover", "tested"),
    [
        ("wanet", {}, CIFAR10, 4500, 9000, [9000]),
        (
            "wanet",
            {"poison_rate": 0.05, "poison_base": "whole", "noise_ratio": 1, "target_class": 1},
            CIFAR10,
            2500,
            2500,
            [9000],
        ),
        ("wanet", {"poison_count": 3, "noise_ratio": 0.7}, CIFAR10, 3, 2, [9000]),
        ("wanet", {"noise_ratio": 0}, CIFAR10, 4500, 0, [9000]),
        ("adap_blend", {}, CIFAR10, 5000, 5000, [9000]),
        ("adap_blend", {"poison_rate": 0.003, "cover_rate": 0.003}, CIFAR10, 150, 150, [9000]),
        ("adap_patch", {}, CIFAR10, 2500, 500, [9000]),
        ("adap_patch", {}, torch.arange(9469) % 10, 473, 94, [9000]),
        ("tact", {}, CIFAR10, 2500, 500, [1000, 8000]),
        ("tact", {}, torch.arange(50_000) % 100, 500, 500, [100, 9800]),
        ("physical", {}, CIFAR10, 2500, 0, [9000]),
    ],
)
def test_counts(
    id_: str,
    changes: dict[str, Any],
    labels: Tensor,
    poisoned: int,
    cover: int,
    tested: list[int],
    make_attack: Callable[..., Any],
    make_view: Callable[..., Any],
) -> None:
    classes = int(labels.max()) + 1
    result = make_attack(id_, **changes).poison(make_view(labels, images=tiny(len(labels)), classes=classes))
    assert int(result.is_poisoned.sum()) == poisoned
    assert int(result.is_cover.sum()) == cover
    assert not (result.is_poisoned & result.is_cover).any()
    assert [int(case.pool(torch.arange(10_000) % classes).sum()) for case in result.tests] == tested


@pytest.mark.parametrize("id_", MINE)
@pytest.mark.parametrize("size", [16, 30, 32])
def test_only_chosen_rows_change_and_only_poison_is_relabelled(
    id_: str, size: int, make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    view = make_view(size=size)
    before = view.train.images.clone()
    result = make_attack(id_, target_class=3).poison(view)
    assert torch.equal(view.train.images, before)
    assert result.train.images.dtype == torch.uint8
    assert result.train.images.shape == before.shape
    changed = (result.train.images != before).flatten(1).any(1)
    assert torch.equal(changed, result.is_poisoned | result.is_cover)
    assert (result.train.labels[result.is_poisoned] == 3).all()
    assert torch.equal(result.train.labels[~result.is_poisoned], view.train.labels[~result.is_poisoned])
    assert torch.equal(result.trigger_id >= 0, changed)
    rows = torch.arange(5)
    test_images = before[:5].clone()
    for case in result.tests:
        stamped = case.trigger(test_images, rows)
        assert stamped.dtype == torch.uint8
        assert stamped.shape == test_images.shape
        assert not torch.equal(stamped, test_images)
    assert torch.equal(test_images, before[:5])


@pytest.mark.parametrize("id_", MINE)
def test_the_seed_alone_decides(id_: str, make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    attack = make_attack(id_)
    first, again, other = (attack.poison(make_view(seed=seed)) for seed in (0, 0, 1))
    for name in ("is_poisoned", "is_cover", "trigger_id"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.train.labels, again.train.labels)
    assert not torch.equal(first.is_poisoned, other.is_poisoned)


@pytest.mark.parametrize("id_", MINE)
def test_mapped_images_give_the_same_set(
    id_: str, make_attack: Callable[..., Any], make_view: Callable[..., Any], tmp_path: Path
) -> None:
    view = make_view()
    np.save(tmp_path / "images.npy", view.train.images.numpy())
    mapped = make_view(images=MappedImages(tmp_path / "images.npy"))
    ours = make_attack(id_).poison(view).train.images
    assert torch.equal(make_attack(id_).poison(mapped).train.images[torch.arange(2000)], ours)


@pytest.mark.parametrize("id_", ["adap_patch", "tact", "physical"])
def test_patches_that_do_not_fit_are_refused(id_: str, make_attack: Callable[..., Any]) -> None:
    keys = {} if id_ == "adap_patch" else {"patch": "firefox"}
    attack = make_attack(id_, **keys)
    for size in (16, 32, 64, 160, 224):
        attack.check(Facts(10, size, 50_000, 1, 1))
    with pytest.raises(ConfigError, match="needs images of at least 14 pixels"):
        attack.check(Facts(10, 12, 50_000, 1, 1))


def test_adap_patch_names_the_key_of_the_patch_that_does_not_fit(make_attack: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"^attack\.set=firefox4 needs"):
        make_attack("adap_patch").check(Facts(10, 12, 50_000, 1, 1))


@pytest.mark.parametrize(
    ("id_", "changes", "message"),
    [
        ("wanet", {"k": 1}, "attack.k"),
        ("wanet", {"s": "strong"}, "attack.s="),
        ("wanet", {"s": 0}, "attack.s="),
        ("wanet", {"grid_rescale": 0}, "attack.grid_rescale"),
        ("wanet", {"noise_ratio": -1}, "attack.noise_ratio"),
        ("wanet", {"noise_shared": "yes"}, "attack.noise_shared"),
        ("wanet", {"mode": "dynamic"}, "attack.mode"),
        ("wanet", {"cover_rate": 0.1}, "attack.noise_ratio"),
        ("wanet", {"mode": "online", "poison_count": 5}, "attack.poison_count"),
        ("wanet", {"mode": "online", "poison_order": "first"}, "attack.poison_order"),
        ("wanet", {"mode": "online", "poison_rate": 0.5}, "at most 1"),
        ("adap_blend", {"pieces": 15}, "square number, e.g. 9 or 16"),
        ("adap_blend", {"mask_rate": 0.99}, "hides all 16 pieces"),
        ("adap_blend", {"alpha_train": 0}, "attack.alpha_train"),
        ("adap_blend", {"alpha_test": 1.2}, "attack.alpha_test"),
        ("adap_blend", {"asset": "dog"}, "attack.asset"),
        ("adap_patch", {"set": "five"}, "attack.set"),
        ("adap_patch", {"set": "official", "test_set": ["firefox_tl"]}, r"e\.g\. \[phoenix2, checker\]"),
        ("adap_patch", {"test_set": []}, "attack.test_set"),
        ("adap_patch", {"test_set": "firefox"}, "attack.test_set"),
        ("adap_patch", {"alphas_train": [1, 1, 1]}, "attack.alphas_train"),
        ("adap_patch", {"alphas_train": [1, 1, 1, 0]}, "attack.alphas_train"),
        ("adap_patch", {"scale_patch": 1}, "attack.scale_patch"),
        ("tact", {"patch": "phoenix"}, "attack.patch"),
        ("tact", {"source_class": None}, "attack.source_class"),
        ("tact", {"label_rule": "all2one"}, "attack.label_rule"),
        ("tact", {"cover_classes": "none"}, "attack.cover_classes"),
        ("tact", {"cover_classes": []}, "attack.cover_classes"),
        ("tact", {"cover_classes": [5, 1]}, "holds class 1"),
        ("tact", {"cover_classes": [0]}, "holds class 0"),
        ("physical", {"patch": "trojan8"}, "attack.patch"),
        ("physical", {"degrees": 181}, "attack.degrees"),
        ("physical", {"translate": -0.1}, "attack.translate"),
        ("physical", {"scale": [0.9, 0.8]}, "attack.scale"),
        ("physical", {"scale": 0.9}, "attack.scale"),
        ("physical", {"jitter": [0.2, -0.1]}, "attack.jitter"),
        ("physical", {"hflip": 2}, "attack.hflip"),
    ],
)
def test_bad_values_name_the_key(
    id_: str, changes: dict[str, Any], message: str, make_attack: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_attack(id_, **changes)


def test_what_the_data_rule_out(make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"attack\.k=20 .*<= 16"):
        make_attack("wanet", k=20).check(Facts(10, 16, 1000, 1, 1))
    with pytest.raises(ConfigError, match=r"attack\.pieces"):
        make_attack("adap_blend", pieces=1024).check(Facts(10, 16, 1000, 1, 1))
    with pytest.raises(ConfigError, match=r"attack\.cover_classes=7 .*<= 6"):
        make_attack("tact", cover_classes=[5, 7]).check(Facts(7, 32, 1000, 1, 1))
    with pytest.raises(ConfigError, match="cover images, but only"):
        make_attack("wanet", poison_rate=0.4).poison(make_view())


# --- wanet ---


def test_wanet_warps_poison_alike_and_noise_by_row(
    make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    one = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    view = make_view(images=one.repeat(2000, 1, 1, 1))
    result = make_attack("wanet").poison(view)
    (case,) = result.tests
    poison, noise = result.train.images[result.is_poisoned], result.train.images[result.is_cover]
    assert (poison == case.trigger(one)).all()  # the same field at training and test
    assert len(noise.unique(dim=0)) == len(noise) == 360
    shared = make_attack("wanet", noise_shared=True).poison(make_view(images=one.repeat(2000, 1, 1, 1)))
    assert len(shared.train.images[shared.is_cover].unique(dim=0)) == 1
    assert not torch.equal(shared.train.images[shared.is_cover][0], poison[0])
    other = make_attack("wanet", seed=1).poison(make_view(images=one.repeat(2000, 1, 1, 1)))
    assert not torch.equal(other.tests[0].trigger(one), case.trigger(one))


@pytest.mark.parametrize(("size", "s", "shift"), [(32, "auto", 0.185), (160, "auto", 0.37), (32, 2, 0.74)])
def test_wanet_says_how_far_it_moves(
    size: int, s: Any, shift: float, make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    view = make_view(torch.arange(10), size=size)
    said: list[str] = []
    view.progress.say = said.append
    make_attack("wanet", s=s).triggers(view)
    (line,) = said
    assert float(line.split("mean shift ")[1].split()[0]) == pytest.approx(shift, rel=0.3)


class Recorder(nn.Module):
    """A linear model that keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, 10)
        self.shown: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.shown.append(images)
        logits: Tensor = self.linear(images.flatten(1))
        return logits


def batch_of(view: Any, labels: Tensor, augmentation: Augmentation, seed: int) -> Batch:
    pixels = view.train.images[: len(labels)].float() / 255
    drawn = augmentation.draw(len(labels), 32, torch.Generator().manual_seed(3))
    return Batch(
        images=augmentation.apply(pixels, drawn),
        labels=labels,
        index=torch.arange(len(labels)),
        epoch=0,
        pixels=pixels,
        augmented=lambda images, places: augmentation.apply(images, {k: v[places] for k, v in drawn.items()}),
        generator=torch.Generator().manual_seed(seed),
    )


def online(make_attack: Callable[..., Any], view: Any, **changes: Any) -> tuple[Any, PoisonedSet]:
    attack = make_attack("wanet", mode="online", poison_rate=0.25, noise_ratio=1, **changes)
    return attack, attack.poison(view)


def test_online_wanet_leaves_the_set_clean(make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    view = make_view()
    attack, result = online(make_attack, view)
    assert attack.controls_training
    assert not make_attack("wanet").controls_training
    assert result.train is view.train
    assert not result.is_poisoned.any()
    assert not result.is_cover.any()
    assert (result.trigger_id == -1).all()
    assert [case.name for case in result.tests] == ["to_0"]
    assert torch.equal(
        result.tests[0].trigger(view.train.images[:3]),
        make_attack("wanet").triggers(view)[1](view.train.images[:3]),
    )


@pytest.mark.parametrize(
    ("changes", "poison", "noise"),
    [
        ({"poison_pool": "all", "poison_base": "whole"}, [0, 1], [2, 3]),  # the first shares of the batch
        ({"poison_base": "whole"}, [1, 2], [0, 3]),
        ({}, [1], [0]),  # a quarter of the six that are not of the target class
        ({"label_rule": "clean", "poison_pool": "target", "poison_base": "whole"}, [0, 5], [1, 2]),
        ({"label_rule": "all2all", "poison_pool": "all"}, [0, 1], [2, 3]),
    ],
)
def test_online_rows_of_a_batch(
    changes: dict[str, Any],
    poison: list[int],
    noise: list[int],
    make_attack: Callable[..., Any],
) -> None:
    attack = make_attack("wanet", mode="online", poison_rate=0.25, noise_ratio=1, **changes)
    labels = torch.tensor([0, 1, 2, 3, 1, 0, 4, 5])
    assert [rows.tolist() for rows in attack.rows_of_batch(labels)] == [poison, noise]


def test_online_wanet_warps_before_the_augmentation(
    make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    view = make_view()
    labels = torch.tensor([0, 1, 2, 3, 1, 0, 4, 5])
    _attack, result = online(make_attack, view, poison_base="whole")
    assert result.train_loss is not None
    augmentation, model = Augmentation(4, True, 0.0, 0), Recorder()
    batch = batch_of(view, labels, augmentation, seed=0)
    before = batch.images.clone()
    loss = result.train_loss(model, batch)
    (shown,) = model.shown
    assert torch.equal(batch.images, before)
    assert batch.labels.tolist() == labels.tolist()
    changed = (shown != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == [0, 1, 2, 3]
    stored = result.tests[0].trigger(view.train.images[:8]).float() / 255
    expected = batch.augmented(stored[[1, 2]], torch.tensor([1, 2]))
    assert (shown[[1, 2]] - expected).abs().max() <= 1.01 / 255  # the stored trigger truncates
    wanted = torch.tensor([0, 0, 0, 3, 1, 0, 4, 5])
    assert torch.allclose(loss, F.cross_entropy(model.linear(shown.flatten(1)), wanted))

    result.train_loss(model, batch_of(view, labels, augmentation, seed=1))  # other noise, the same warp
    again = model.shown[1]
    assert torch.equal(again[[1, 2]], shown[[1, 2]])
    assert not torch.equal(again[[0, 3]], shown[[0, 3]])


def test_online_wanet_trains(make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    view = make_view(torch.arange(100) % 10, size=16)
    _, result = online(make_attack, view)
    model = view.new_model(10)
    losses: list[float] = []
    fit(
        model, result.train, view.train_config, generator=torch.Generator().manual_seed(0), stage="train",
        progress=view.progress, loss_fn=result.train_loss, on_epoch_end=lambda epoch, model, loss: losses.append(loss),
    )  # fmt: skip
    assert losses[-1] < losses[0]


def test_online_wanet_refuses_batches_without_poison(
    make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=r"poisons no image of a batch of 32: set it to at least 0\.032 "):
        make_attack("wanet", mode="online", poison_rate=0.03, poison_base="whole").poison(make_view())


# --- adap_blend, adap_patch ---


def test_adap_blend_shows_half_at_training_and_all_at_test(
    make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    black = torch.zeros(2000, 3, 32, 32, dtype=torch.uint8)
    result = make_attack("adap_blend").poison(make_view(images=black))
    (case,) = result.tests
    whole = case.trigger(black[:1])[0].double()
    assert (whole > 0).float().mean() > 0.9
    stamped = result.train.images[result.is_poisoned | result.is_cover]
    assert len(stamped) == 400
    pieces = stamped.view(400, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).flatten(3)
    full = (whole * 0.75).floor().view(3, 4, 8, 4, 8).permute(1, 3, 0, 2, 4).flatten(2)  # 0.15 k beside 0.2 k
    shown = pieces.amax(-1) > 0
    assert (shown.flatten(1).sum(1) == 8).all()
    assert (torch.where(shown[..., None], (pieces - full).abs(), 0) <= 1).all()
    assert len(shown.unique(dim=0)) > 380
    poisoned_classes = set(result.true_labels[result.is_poisoned].tolist())
    assert poisoned_classes == set(range(10))  # the target class too


@pytest.mark.parametrize(
    ("changes", "names", "alphas", "tested"),
    [
        ({}, QUARTERS, (1, 1, 1, 1), ("firefox",)),
        (
            {"set": "official"},
            ("phoenix", "firefox", "checker", "trojan8"),
            (0.5, 0.2, 0.5, 0.3),
            ("phoenix2", "checker"),
        ),
        (
            {"alphas_train": [0.1, 0.2, 0.3, 0.4], "test_set": ["firefox_br"]},
            QUARTERS,
            (0.1, 0.2, 0.3, 0.4),
            ("firefox_br",),
        ),
    ],
)
def test_adap_patch_gives_each_quarter_its_patch(
    changes: dict[str, Any],
    names: tuple[str, ...],
    alphas: tuple[float, ...],
    tested: tuple[str, ...],
    make_attack: Callable[..., Any],
    make_view: Callable[..., Any],
) -> None:
    view = make_view()
    attack = make_attack("adap_patch", poison_count=42, **changes)
    result = attack.poison(view)
    for mask, sizes in ((result.is_poisoned, [10, 11, 10, 11]), (result.is_cover, [5, 5, 5, 5])):
        rows = mask.nonzero().flatten()
        ids = result.trigger_id[rows]
        assert ids.tolist() == [number for number, size in enumerate(sizes) for _ in range(size)]
        for number, name in enumerate(names):
            mine = rows[ids == number]
            stamp = Overlay(logo(name, 32, 32, scale=True), alphas[number])
            assert torch.equal(result.train.images[mine], stamp(view.train.images[mine]))
    (case,) = result.tests
    together = tuple(p for name in tested for p in logo(name, 32, 32, scale=True))
    expected = Overlay(together, 1.0)(view.train.images[:4])
    assert torch.equal(case.trigger(view.train.images[:4]), expected)


def test_half_opaque_phoenix_pixel(make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    keys = {"set": "official"}
    grey = torch.full((2000, 3, 32, 32), 100, dtype=torch.uint8)
    result = make_attack("adap_patch", **keys).poison(make_view(images=grey))
    rows = (result.is_poisoned & (result.trigger_id == 0)).nonzero().flatten()
    assert result.train.images[rows[0], :, 27, 27].tolist() == [168, 171, 176]  # (237, 243, 252) halfway from 100


# --- tact, physical ---


@pytest.mark.parametrize(
    ("cover", "classes", "expected"),
    [
        ("auto", 10, {5, 7}),
        ("auto", 4, {2, 3}),
        ("all_other", 10, set(range(2, 10))),
        ([9, 2], 10, {9, 2}),
    ],
)
def test_tact_cover_classes(
    cover: Any, classes: int, expected: set[int], make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    view = make_view(classes=classes)
    result = make_attack("tact", cover_classes=cover, cover_rate=0.1).poison(view)
    assert int(result.is_cover.sum()) == 200
    assert set(result.true_labels[result.is_cover].tolist()) == expected
    assert torch.equal(result.train.labels[result.is_cover], result.true_labels[result.is_cover])
    assert (result.true_labels[result.is_poisoned] == 0).all()
    assert (result.train.labels[result.is_poisoned] == 1).all()
    assert (result.train.images[result.is_poisoned | result.is_cover][..., 29:, 29:] == 255).all()


def test_tact_measures_the_other_classes_without_counting_them(
    make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    asr, nonsource = make_attack("tact").poison(make_view()).tests
    labels = torch.arange(10)
    assert (asr.name, asr.counts, asr.target_class) == ("0_to_1", True, 1)
    assert asr.pool(labels).nonzero().flatten().tolist() == [0]
    assert (nonsource.name, nonsource.counts) == ("asr_nonsource", False)
    assert nonsource.pool(labels).nonzero().flatten().tolist() == list(range(2, 10))
    assert nonsource.label_rule(labels).tolist() == [1] * 10


def test_tact_takes_the_whole_source_class_where_it_is_small(
    make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    view = make_view(torch.arange(2000) % 40, classes=40)
    result = make_attack("tact").poison(view)
    assert int(result.is_poisoned.sum()) == 50
    assert len(view.warnings) == 1
    assert "all of them are poisoned" in view.warnings[0]


def test_physical_carries_its_transform(make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    view = make_view()
    result = make_attack("physical").poison(view)
    assert result.train.augment == PhysicalTransform(10, 0.1, (0.8, 0.9), (0.2, 0.2), 0.5)
    assert view.train.augment is None
    (patch,) = logo("firefox", 32, 32, scale=True)
    rows = result.is_poisoned.nonzero().flatten()
    assert torch.equal(result.train.images[rows], patch(view.train.images[rows]))
    assert torch.equal(result.tests[0].trigger(view.train.images[:2]), patch(view.train.images[:2]))
    white = make_attack("physical", patch="white3").poison(make_view())
    assert (white.train.images[white.is_poisoned][..., 29:, 29:] == 255).all()
    small = replace(result.train, images=result.train.images[:64], labels=result.train.labels[:64])
    fit(
        view.new_model(10), small, view.train_config, generator=torch.Generator().manual_seed(0), stage="train",
        progress=view.progress,
    )  # fmt: skip
