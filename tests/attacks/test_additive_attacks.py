"""trojan, trojan_sq, trojan_wm, l0_inv, l2_inv, smooth, instagram: counts, places, options, bad values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from backdoor_bench.attacks import surrogate as surrogate_module
from backdoor_bench.attacks.smooth import steps_towards, universal_pattern
from backdoor_bench.data.images import MappedImages
from backdoor_bench.errors import ConfigError, DataError
from backdoor_bench.progress import QuietProgress
from backdoor_bench.types import Facts

TR = ("trojan_sq", "trojan_wm", "l0_inv", "l2_inv", "smooth")
MINE = ("trojan", "instagram", *TR)
Make = Callable[..., Any]


def tiny(count: int) -> Tensor:
    return torch.zeros(1, 3, 16, 16, dtype=torch.uint8).expand(count, 3, 16, 16)


@pytest.mark.parametrize("id_", MINE)
def test_counts_on_cifar10(id_: str, make_attack: Make, make_view: Make) -> None:
    labels = torch.arange(50_000) % 10
    result = make_attack(id_).poison(make_view(labels, images=tiny(50_000)))
    rows = result.is_poisoned.nonzero().flatten()
    assert len(rows) == (5000 if id_ in TR else 4500)
    assert not result.is_cover.any()
    if id_ in TR:
        assert torch.equal(rows, (labels != 0).nonzero().flatten()[:5000])
    (case,) = result.tests
    assert int(case.pool(torch.arange(10_000) % 10).sum()) == 9000


@pytest.mark.parametrize("id_", MINE)
@pytest.mark.parametrize("size", [16, 32, 64, 160, 224])
def test_only_the_chosen_rows_change_at_every_size(id_: str, size: int, make_attack: Make, make_view: Make) -> None:
    labels = torch.arange(43) % 43
    attack = make_attack(id_, target_class=1)
    attack.check(Facts(43, size, 43, epochs=1, steps_per_epoch=1))
    view = make_view(labels, size=size, classes=43)
    before = view.train.images.clone()
    result = attack.poison(view)
    assert torch.equal(view.train.images, before)
    assert result.train.images.dtype == torch.uint8
    changed = (result.train.images != before).flatten(1).any(1)
    assert torch.equal(changed, result.is_poisoned)
    assert (result.train.labels[changed] == 1).all()
    assert torch.equal(result.train.labels[~changed], labels[~changed])
    stamped = result.tests[0].trigger(before)  # the same at test
    assert torch.equal(stamped[changed], result.train.images[changed])


@pytest.mark.parametrize("id_", MINE)
def test_the_seed_alone_decides(id_: str, make_attack: Make, make_view: Make) -> None:
    attack = make_attack(id_, poison_order="random")
    first, again, other = (attack.poison(make_view(seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.train.labels, again.train.labels)
    assert not torch.equal(first.is_poisoned, other.is_poisoned)


@pytest.mark.parametrize(("id_", "changes"), [("l2_inv", {}), ("trojan", {"variant": "random8"})])
def test_drawn_patterns_follow_the_seed_of_the_attack(
    id_: str, changes: dict[str, Any], make_attack: Make, make_view: Make
) -> None:
    black = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    first, again, other = (make_attack(id_, seed=seed, **changes).triggers(make_view())[0](black) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("id_", "changes", "size", "box"),
    [
        ("trojan", {}, 32, (25, 27, 25, 27)),
        ("trojan_sq", {}, 64, (50, 55, 50, 55)),
        ("trojan", {}, 160, (125, 139, 125, 139)),
        ("trojan_sq", {}, 224, (175, 195, 175, 195)),
        ("trojan", {"scale_patch": False}, 224, (217, 219, 217, 219)),
        ("trojan", {"variant": "random8"}, 32, (21, 28, 21, 28)),
        ("trojan", {"variant": "random8"}, 64, (42, 57, 42, 57)),
        ("l0_inv", {}, 32, (31, 31, 23, 31)),
        ("l0_inv", {}, 64, (62, 63, 46, 63)),
        ("l0_inv", {}, 160, (155, 159, 115, 159)),
        ("l0_inv", {}, 224, (217, 223, 161, 223)),
    ],
)
def test_where_the_patch_lies(
    id_: str, changes: dict[str, Any], size: int, box: tuple[int, ...], make_attack: Make, make_view: Make
) -> None:
    images = torch.full((20, 3, size, size), 90, dtype=torch.uint8)
    trigger, _ = make_attack(id_, **changes).triggers(make_view(torch.arange(20) % 10, images=images))
    changed = (trigger(images[:1]) != 90).any(1)[0].nonzero()
    (top, left), (bottom, right) = changed.min(0).values.tolist(), changed.max(0).values.tolist()
    assert (top, bottom, left, right) == box


def test_trojan_wraps_and_trojan_sq_saturates(make_attack: Make, make_view: Make) -> None:
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    wrapped = make_attack("trojan").triggers(make_view())[1](grey)
    stopped = make_attack("trojan_sq").triggers(make_view())[1](grey)
    assert wrapped[0, :, 25, 25].tolist() == [79, 3, 53]
    assert stopped[0, :, 25, 25].tolist() == [255, 255, 255]
    again = make_attack("trojan", add="saturate").triggers(make_view())[1](grey)
    assert torch.equal(again, stopped)


def test_nine_colours_of_l0_inv(make_attack: Make, make_view: Make) -> None:
    trigger, _ = make_attack("l0_inv").triggers(make_view())
    row = trigger(torch.full((1, 3, 32, 32), 90, dtype=torch.uint8))[0, :, 31].T.tolist()
    assert row[22] == [90, 90, 90]
    assert row[23:] == [
        [0, 0, 0],
        [255, 0, 255],
        [0, 0, 255],
        [255, 255, 0],
        [255, 255, 255],
        [0, 255, 255],
        [0, 255, 255],
        [255, 0, 0],
        [255, 255, 255],
    ]


def test_smooth_stretches_unless_told_not_to(make_attack: Make, make_view: Make) -> None:
    grey = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    stretched = make_attack("smooth").triggers(make_view())[0](grey)
    assert (int(stretched.min()), int(stretched.max())) == (0, 255)
    added = make_attack("smooth", stretch=False).triggers(make_view())[0](grey)
    assert (int(added.min()), int(added.max())) == (100, 151)
    magenta = make_attack("smooth", stretch=False, fit="gtsrb", max=40).triggers(make_view())[0](grey)
    assert int(magenta.max()) == 140
    assert magenta[0, 0].double().mean() > magenta[0, 1].double().mean()


def test_filter_may_be_a_number(make_attack: Make, make_view: Make) -> None:
    images = make_view().train.images[:2]
    stamped = [make_attack("instagram", filter=name).triggers(make_view())[0](images) for name in (1977, "1977")]
    assert torch.equal(*stamped)


@pytest.mark.parametrize(("id_", "key"), [("trojan_wm", "asset"), ("l2_inv", "asset"), ("smooth", "fit")])
def test_a_picture_of_the_users_is_added(
    id_: str, key: str, tmp_path: Path, make_attack: Make, make_view: Make
) -> None:
    pixels = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3) // 3
    file = tmp_path / "mark.png"
    Image.fromarray(pixels).save(file)
    changes = {key: str(file)} | ({"stretch": False} if id_ == "smooth" else {})
    attack = make_attack(id_, **changes)
    grey = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    expected = (200 + torch.from_numpy(pixels.astype(np.int64))).clamp(max=255).permute(2, 0, 1)
    assert torch.equal(attack.triggers(make_view())[0](grey)[0].long(), expected)
    if id_ == "trojan_wm":
        wrapped = make_attack(id_, add="wrap", **changes).triggers(make_view())[0](grey)
        assert torch.equal(wrapped[0].long(), (200 + torch.from_numpy(pixels.astype(np.int64))).permute(2, 0, 1) % 256)
    file.write_text("no picture")
    with pytest.raises(DataError, match=r"mark\.png"):
        attack.poison(make_view())


@pytest.mark.parametrize("id_", ["smooth", "instagram"])
def test_memory_mapped_images_give_the_same_set(id_: str, tmp_path: Path, make_attack: Make, make_view: Make) -> None:
    in_memory = make_view(size=16)
    np.save(tmp_path / "images.npy", in_memory.train.images.numpy())
    expected = make_attack(id_).poison(in_memory)
    mapped = make_attack(id_).poison(make_view(images=MappedImages(tmp_path / "images.npy"), size=16))
    assert torch.equal(mapped.train.images[:], expected.train.images)


@pytest.mark.parametrize(
    ("id_", "changes", "message"),
    [
        ("trojan", {"variant": "abl4"}, r"attack\.variant='abl4' .*abl3, random8"),
        ("trojan_sq", {"add": "clip"}, r"attack\.add='clip' .*saturate, wrap"),
        ("trojan", {"scale_patch": 1}, r"attack\.scale_patch=1"),
        ("trojan_wm", {"add": True}, r"attack\.add=True"),
        ("trojan_wm", {"asset": "missing.png"}, r"attack\.asset='missing.png' .*generated"),
        ("trojan_wm", {"asset": None}, r"attack\.asset=None"),
        ("l0_inv", {"scale_patch": "no"}, r"attack\.scale_patch='no'"),
        ("l2_inv", {"norm": 0}, r"attack\.norm=0 .*> 0"),
        ("l2_inv", {"norm": 10}, r"attack\.norm=10 .*attack\.max=68.*at most 8\.87"),
        ("l2_inv", {"max": 256}, r"attack\.max=256 .*<= 255"),
        ("l2_inv", {"max": 60.5}, r"attack\.max=60\.5 .*an integer"),
        ("l2_inv", {"asset": "missing.png"}, r"attack\.asset='missing.png'"),
        ("smooth", {"fit": "imagenet"}, r"attack\.fit='imagenet' .*cifar10, gtsrb, optimise"),
        ("smooth", {"fit": 10}, r"attack\.fit=10"),
        ("smooth", {"stretch": "yes"}, r"attack\.stretch='yes'"),
        ("smooth", {"max": 0}, r"attack\.max=0 .*>= 1"),
        ("instagram", {"filter": "lomo"}, r"attack\.filter='lomo' .*1977, nashville, kelvin, gotham"),
        ("instagram", {"poison_rate": 2}, r"attack\.poison_rate=2"),
        ("smooth", {"label_rule": "all2all"}, r"attack\.label_rule='all2all' .*poison_pool to all"),
    ],
)
def test_values_that_are_refused(id_: str, changes: dict[str, Any], message: str, make_attack: Make) -> None:
    with pytest.raises(ConfigError, match=message):
        make_attack(id_, **changes)


@pytest.mark.parametrize(
    ("id_", "changes", "size", "message"),
    [
        ("trojan", {"variant": "random8"}, 10, r"attack\.variant=random8 needs images of at least 11 .*have 10"),
        ("trojan_sq", {"variant": "random8", "scale_patch": False}, 8, r"attack\.variant=random8 .* at least 11"),
        ("l0_inv", {}, 8, r"the row of l0_inv needs images of at least 9 pixels, but these have 8"),
    ],
)
def test_patches_that_do_not_fit_are_refused(
    id_: str, changes: dict[str, Any], size: int, message: str, make_attack: Make
) -> None:
    attack = make_attack(id_, **changes)
    attack.check(Facts(10, 11, 400, epochs=1, steps_per_epoch=1))
    with pytest.raises(ConfigError, match=message):
        attack.check(Facts(10, size, 400, epochs=1, steps_per_epoch=1))


@pytest.mark.parametrize("id_", MINE)
def test_classes_are_checked(id_: str, make_attack: Make) -> None:
    with pytest.raises(ConfigError, match=r"attack\.target_class=10 .*<= 9"):
        make_attack(id_, target_class=10).check(Facts(10, 32, 50_000, epochs=1, steps_per_epoch=1))


# --- fit=optimise ---


class Brightness(nn.Module):
    """Class k wins where the mean of channel k is largest; the logits are linear in the image."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * 10


def test_deepfool_steps_end_just_behind_the_boundary(recipe: Any) -> None:
    images = torch.full((3, 3, 16, 16), 0.4)
    images[0, 0] += 0.1  # class 0, 0.1 ahead of class 2
    images[1, 1] += 0.2
    images[2, 2] += 0.1  # class 2 already
    steps = steps_towards(Brightness(), images, 2, recipe.hardware)
    assert steps.shape == images.shape
    # The least change moves both channels half of the way, and the overshoot 2 % beyond it.
    assert torch.allclose(steps[0].mean((1, 2)), torch.tensor([-0.051, 0, 0.051]), atol=1e-5)
    assert torch.allclose(steps[1].mean((1, 2)), torch.tensor([0, -0.102, 0.102]), atol=1e-5)
    assert not steps[2].any()
    assert len(steps_towards(Brightness(), images[:0], 2, recipe.hardware)) == 0


def test_steps_that_never_arrive_are_left_out(recipe: Any) -> None:
    class Never(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([images.mean((1, 2, 3)) * 0 + 1, images.mean((1, 2, 3)) * 0], 1)

    assert len(steps_towards(Never(), torch.rand(2, 3, 16, 16), 1, recipe.hardware)) == 0


def optimised(recipe: Any, peak: float, seed: int = 0) -> tuple[Tensor, float]:
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(20, 3, 32, 32, generator=random) * 0.1 + 0.4
    images[:, 0] += 0.05
    return universal_pattern(Brightness(), images, peak, 1, random, recipe.hardware, QuietProgress())


def test_universal_pattern_is_smooth_within_its_budget_and_changes_the_class(recipe: Any) -> None:
    pattern, share = optimised(recipe, 0.2)
    assert share >= 0.2
    assert (float(pattern.min()), float(pattern.max())) == (0, 0.2)
    assert pattern[1].mean() > pattern[0].mean()  # towards class 1, away from class 0
    assert float((pattern[:, 1:] - pattern[:, :-1]).abs().max()) < 0.02
    again, _ = optimised(recipe, 0.2)
    assert torch.equal(pattern, again)


def test_a_hopeless_budget_ends_after_some_passes(recipe: Any) -> None:
    pattern, share = optimised(recipe, 0.01)
    assert share == 0
    assert float(pattern.max()) <= 0.01


def test_optimised_pattern_is_kept(make_attack: Make, make_view: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def stand_in(view: Any) -> nn.Module:
        calls.append(view)
        return Brightness()

    monkeypatch.setattr(surrogate_module, "surrogate", stand_in)
    view = make_view(torch.arange(60) % 3, size=16, classes=3)
    attack = make_attack("smooth", fit="optimise", stretch=False)
    first, second = attack.triggers(view)[0].pattern, attack.triggers(view)[0].pattern
    assert torch.equal(first, second)
    assert first.dtype == torch.uint8
    assert int(first.max()) in (50, 51)  # truncated
    monkeypatch.setattr("backdoor_bench.attacks.smooth.universal_pattern", None)
    assert torch.equal(attack.triggers(view)[0].pattern, first)  # from the cache
    with pytest.raises(TypeError):
        make_attack("smooth", fit="optimise", max=30).triggers(view)  # another budget is another pattern
    assert len(calls) == 4
