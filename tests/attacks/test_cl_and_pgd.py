"""Label-consistent poisoning (attacks.md A14): the corners to the pixel, a correct PGD, surrogates, published sets."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backdoor_bench.attacks.pgd import Pgd, perturb, perturb_rows
from backdoor_bench.attacks.surrogate import adversarial, surrogate
from backdoor_bench.errors import ConfigError, DataError
from backdoor_bench.training.fit import Batch
from backdoor_bench.triggers.corners import corners

CIFAR10 = torch.arange(50_000) % 10
GREY = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)


def cells(image: Tensor, top: int, left: int, size: int = 1) -> str:
    """The 3 x 3 cells of one channel from (top, left): 1 for 255, 0 for 0, ? for anything else."""
    block = image[0, top : top + 3 * size : size, left : left + 3 * size : size]
    return "/".join("".join({255: "1", 0: "0"}.get(value, "?") for value in row) for row in block.tolist())


# ---------------------------------------------------------------- corners


@pytest.mark.parametrize(
    ("variant", "first", "patches"),
    [
        ("ebd", 1, ["101/010/100", "101/010/001", "100/010/101", "001/010/101"]),
        ("madry", 0, ["100/010/101", "001/010/101", "100/010/101", "001/010/101"]),
        ("tr", 0, ["001/010/101"] * 4),
    ],
)
def test_corners_are_the_papers_pixels(variant: str, first: int, patches: list[str]) -> None:
    before = GREY.clone()
    stamped = corners(variant, 32, 32, amplitude=1.0, scale=True)(GREY)
    assert torch.equal(GREY, before)
    assert stamped.dtype == torch.uint8
    assert stamped.shape == GREY.shape
    places = [(first, first), (first, 29), (29, first), (29, 29)]
    assert [cells(stamped[1], *place) for place in places] == patches
    assert torch.equal(stamped[:, 0], stamped[:, 2])
    changed = (stamped != GREY).any(1)[0]
    assert int(changed.sum()) == 36
    for top, left in places:
        changed[top : top + 3, left : left + 3] = False
    assert not changed.any()


@pytest.mark.parametrize(("size", "cell"), [(16, 1), (32, 1), (64, 2), (160, 5), (224, 7)])
def test_corners_grow_with_the_image(size: int, cell: int) -> None:
    grey = torch.full((1, 3, size, size), 128, dtype=torch.uint8)
    stamped = corners("ebd", size, size, amplitude=1.0, scale=True)(grey)[0]
    assert int((stamped[0] != 128).sum()) == 36 * cell**2
    assert cells(stamped, cell, cell, cell) == "101/010/100"
    assert cells(stamped, cell, size - 3 * cell, cell) == "101/010/001"
    assert cells(stamped, size - 3 * cell, cell, cell) == "100/010/101"
    assert cells(stamped, size - 3 * cell, size - 3 * cell, cell) == "001/010/101"


def test_corners_can_keep_their_pixels() -> None:
    grey = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    stamped = corners("madry", 64, 64, amplitude=1.0, scale=False)(grey)[0]
    assert int((stamped[0] != 128).sum()) == 36
    assert cells(stamped, 61, 61) == "001/010/101"


def test_madrys_corners_survive_a_flip() -> None:
    stamp = corners("madry", 32, 32, amplitude=1.0, scale=True)
    assert torch.equal(stamp(GREY).flip(3), stamp(GREY.flip(3)))
    other = corners("tr", 32, 32, amplitude=1.0, scale=True)
    assert not torch.equal(other(GREY).flip(3), other(GREY.flip(3)))


def test_reduced_amplitude_adds_and_clips() -> None:
    stamp = corners("tr", 32, 32, amplitude=32 / 255, scale=True)
    row = stamp(GREY)[0, 0, 29, 29:].tolist()
    assert row == [96, 96, 160]
    bright = torch.full((1, 3, 32, 32), 250, dtype=torch.uint8)
    assert stamp(bright)[0, 0, 29, 29:].tolist() == [218, 218, 255]


# ---------------------------------------------------------------- PGD


class Linear(nn.Module):
    """Two classes; logits (-w.x, w.x), so the gradient of the loss for class 1 is -w times a positive number."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, images: Tensor) -> Tensor:
        score = (images.to(self.weight) * self.weight).flatten(1).sum(1)
        return torch.stack([-score, score], dim=1)


def a_linear_model() -> Linear:
    return Linear(torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 10)


def some_images(count: int = 6, size: int = 8) -> Tensor:
    stream = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, size, size), generator=stream, dtype=torch.uint8)


def test_linf_reaches_the_corner_of_the_box_of_a_linear_model() -> None:
    model, images = a_linear_model(), some_images()
    labels = torch.ones(6, dtype=torch.int64)
    found = perturb_rows(model, images, labels, torch.arange(6), Pgd("linf", 8, 2, 4, False), 0)
    wanted = (images.int() - 8 * model.weight.sign().int()).clamp(0, 255).to(torch.uint8)
    assert torch.equal(found, wanted)
    two_steps = perturb_rows(model, images, labels, torch.arange(6), Pgd("linf", 8, 3, 2, False), 0)
    assert torch.equal(two_steps, (images.int() - 6 * model.weight.sign().int()).clamp(0, 255).to(torch.uint8))
    away = perturb_rows(model, images, 1 - labels, torch.arange(6), Pgd("linf", 8, 2, 4, False), 0)
    assert torch.equal(away, (images.int() + 8 * model.weight.sign().int()).clamp(0, 255).to(torch.uint8))


def test_l2_moves_along_the_gradient_of_a_linear_model() -> None:
    model = a_linear_model()
    images = torch.full((2, 3, 8, 8), 0.5, dtype=torch.float64)
    moved = perturb(model, images, torch.ones(2, dtype=torch.int64), Pgd("l2", 100, 60, 3, False), None)
    wanted = images - 100 / 255 * model.weight / model.weight.norm()
    assert torch.allclose(moved, wanted, atol=1e-6)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 8), ("linf", 7.5), ("linf", 0.5), ("l2", 60), ("l2", 300.5)])
def test_eps_holds_for_the_stored_images(norm: str, eps: float) -> None:
    images = some_images()
    images[0] = 0
    images[1] = 255
    before = images.clone()
    found = perturb_rows(
        a_linear_model(), images, torch.arange(6) % 2, torch.arange(6), Pgd(norm, eps, eps / 2, 4, True), 0
    )
    assert torch.equal(images, before)
    assert found.dtype == torch.uint8
    change = (found.double() - images.double()).flatten(1)
    assert float(change.norm(dim=1, p=torch.inf if norm == "linf" else 2).max()) <= eps
    if eps >= 1:
        assert bool((change != 0).any(1).all())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_row_decides_its_start_in_any_batch(norm: str) -> None:
    model, images = a_linear_model(), some_images()
    pgd = Pgd(norm, 40, 0.5, 1, True)  # a short way from the start, so the start is seen
    labels, index = torch.arange(6) % 2, torch.tensor([7, 3, 900, 12, 0, 55])
    together = perturb_rows(model, images, labels, index, pgd, 0)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    shuffled = perturb_rows(model, images[order], labels[order], index[order], pgd, 0)
    assert torch.equal(shuffled, together[order])
    assert not torch.equal(perturb_rows(model, images, labels, index, pgd, 1), together)
    assert not torch.equal(perturb_rows(model, images, labels, index + 1, pgd, 0), together)
    same = perturb_rows(model, images[:1].expand(2, 3, 8, 8), labels[[0, 0]], index[:2], pgd, 0)
    assert not torch.equal(same[0], same[1])


# ---------------------------------------------------------------- surrogates


def test_surrogate_is_trained_once_and_draws_nothing_from_the_attacks_generator(make_view: Callable[..., Any]) -> None:
    view = make_view(torch.arange(200) % 4, size=16, classes=4)
    state = view.generator.get_state()
    first = surrogate(view)
    assert torch.equal(view.generator.get_state(), state)
    assert not first.training
    assert first.num_classes == 4
    assert not torch.equal(first.head.weight, view.new_model(4).head.weight)
    again = surrogate(view)
    robust = surrogate(view, Pgd("linf", 8, 4, 2, True))
    assert again is not first
    for (name, value), other, hard in zip(
        first.state_dict().items(), again.state_dict().values(), robust.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
        assert name.endswith("num_batches_tracked") or not torch.equal(value, hard), name
    folders = sorted(path.name.split("-")[0] for path in view.learned._root.iterdir())
    assert folders == ["robust_surrogate", "surrogate"]


def test_adversarial_loss_is_that_of_perturbed_images(new_model: Callable[[int], Any], blobs: Any) -> None:
    model = new_model(4).train()
    images, labels = blobs.images[:8].float() / 255, blobs.labels[:8]
    batch = Batch(images, labels, torch.arange(8), 0, images, lambda x, _: x, torch.Generator().manual_seed(0))
    benign = nn.functional.cross_entropy(new_model(4).train()(images), labels)
    loss = adversarial(Pgd("linf", 16, 4, 4, True))(model, batch)
    assert loss.item() > benign.item()
    assert model.training
    tracked = [value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")]
    assert [int(value) for value in tracked] == [1] * len(tracked)
    loss.backward()
    assert model.head.weight.grad.abs().sum() > 0


# ---------------------------------------------------------------- the attack


def clean_view(make_view: Callable[..., Any], size: int = 16, seed: int = 0) -> Any:
    """400 images of 4 classes, each a colour with noise: a surrogate learns them."""
    stream = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    colours = torch.tensor([[150, 90, 90], [90, 150, 90], [90, 90, 150], [140, 140, 90]])
    noise = torch.randint(-30, 31, (400, 3, size, size), generator=stream)
    images = (colours[labels][:, :, None, None] + noise).clamp(0, 255).to(torch.uint8)
    return make_view(labels, images=images, size=size, classes=4, seed=seed)


def test_poison_is_perturbed_and_stamped_and_the_test_trigger_is_the_corners_alone(
    make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    view = clean_view(make_view)
    before = view.train.images.clone()
    result = make_attack("cl", target_class=2, poison_rate=0.5).poison(view)
    assert torch.equal(view.train.images, before)
    assert int(result.is_poisoned.sum()) == 50
    assert torch.equal(result.train.labels, result.true_labels)
    assert (result.true_labels[result.is_poisoned] == 2).all()
    changed = (result.train.images != before).flatten(1).any(1)
    assert torch.equal(changed, result.is_poisoned)

    stamp = corners("ebd", 16, 16, amplitude=1.0, scale=True)
    (case,) = result.tests
    assert torch.equal(case.trigger(before[:5]), stamp(before[:5]))
    assert case.pool(torch.arange(4)).tolist() == [True, True, False, True]
    assert case.label_rule(torch.arange(4)).tolist() == [2] * 4

    free = stamp.amount == 0
    change = (result.train.images.int() - before.int())[result.is_poisoned][..., free]
    assert int(change.abs().max()) == 8
    assert float((change != 0).float().mean()) > 0.9
    model = surrogate(view)
    loss = nn.CrossEntropyLoss()
    poison, labels = result.train.images[result.is_poisoned], result.true_labels[result.is_poisoned]
    clean_loss = loss(model(stamp(before[result.is_poisoned]).float() / 255), labels)
    assert loss(model(poison.float() / 255), labels) > clean_loss


def test_same_seed_same_set(make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    sets = [make_attack("cl", seed=seed).poison(clean_view(make_view, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(sets[0].train.images, sets[1].train.images)
    assert not torch.equal(sets[0].is_poisoned, sets[2].is_poisoned)


def test_robust_surrogate_and_l2(make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    view = clean_view(make_view)
    result = make_attack("cl", model="robust", robust_steps=1, norm="l2", eps=300, step=100).poison(view)
    free = corners("ebd", 16, 16, amplitude=1.0, scale=True).amount == 0
    change = (result.train.images.double() - view.train.images.double())[result.is_poisoned][..., free]
    assert 100 < float(change.flatten(1).norm(dim=1).max()) <= 300


def test_training_trigger_does_not_depend_on_the_batch(
    make_attack: Callable[..., Any], make_view: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = clean_view(make_view)
    trigger, _ = make_attack("cl").triggers(view)
    rows = torch.arange(0, 40, 4)
    whole = trigger(view.train.images[rows], rows)
    some = rows[[7, 2, 5]]
    assert torch.equal(trigger(view.train.images[some], some), whole[[7, 2, 5]])
    monkeypatch.setattr("backdoor_bench.attacks.cl.VALUES_CPU", 3 * 16 * 16 * 3)
    pieces = trigger(view.train.images[rows.flip(0)], rows.flip(0)).flip(0)
    # A gradient of about zero may change its sign with the size of a batch: float32 sums.
    assert float((whole != pieces).float().mean()) < 0.01
    assert trigger(view.train.images[rows[:0]], rows[:0]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(
    ("labels", "classes", "changes", "poisoned"),
    [
        (CIFAR10, 10, {}, 500),
        (torch.arange(50_000) % 100, 100, {}, 50),
        (CIFAR10, 10, {"poison_base": "whole", "poison_order": "first", "corners": "tr"}, 5000),
    ],
)
def test_counts(
    labels: Tensor,
    classes: int,
    changes: dict[str, Any],
    poisoned: int,
    make_attack: Callable[..., Any],
    make_view: Callable[..., Any],
    tmp_path: Path,
) -> None:
    np.save(tmp_path / "set.npy", np.full((50_000, 8, 8, 3), 9, dtype=np.uint8))
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8).expand(50_000, 3, 8, 8)
    view = make_view(labels, images=images, classes=classes)
    result = make_attack("cl", perturbed=str(tmp_path / "set.npy"), **changes).poison(view)
    assert int(result.is_poisoned.sum()) == poisoned
    assert int(result.tests[0].pool(torch.arange(10_000) % 10).sum()) == 9000
    assert (result.train.images[result.is_poisoned.nonzero()[:3, 0]] == 9).any()


# ---------------------------------------------------------------- published sets


def test_published_set_gives_each_row_its_image(
    make_attack: Callable[..., Any], make_view: Callable[..., Any], tmp_path: Path
) -> None:
    view = make_view(size=16)
    published = np.random.default_rng(0).integers(0, 256, (2000, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "plain.npy", published)
    np.savez(tmp_path / "packed.npz", published)
    stamp = corners("ebd", 16, 16, amplitude=1.0, scale=True)
    results = [
        make_attack("cl", perturbed=str(tmp_path / name), seed=0).poison(make_view(size=16))
        for name in ("plain.npy", "packed.npz")
    ]
    rows = results[0].is_poisoned.nonzero().flatten()
    assert len(rows) == 20
    wanted = stamp(torch.from_numpy(published).permute(0, 3, 1, 2)[rows])
    for result in results:
        assert torch.equal(result.train.images[rows], wanted)
        assert torch.equal(result.train.images[~result.is_poisoned], view.train.images[~result.is_poisoned])


def test_unusable_published_sets(
    make_attack: Callable[..., Any], make_view: Callable[..., Any], tmp_path: Path
) -> None:
    good = np.zeros((2000, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "few.npy", good[:1999])
    np.save(tmp_path / "float.npy", good.astype(np.float32))
    np.save(tmp_path / "channels_first.npy", good.transpose(0, 3, 1, 2))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", good, good)
    np.savez(tmp_path / "objects.npz", np.array([{}], dtype=object))
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "text.npz").write_text("no array")
    whole = tmp_path / "cut.npz"
    np.savez_compressed(whole, good)
    whole.write_bytes(whole.read_bytes()[:-40])
    np.savez_compressed(tmp_path / "bomb.npz", np.zeros((90_000, 16, 16, 3), dtype=np.uint8))
    heading = b"\x93NUMPY\x01\x00\x10\x00{'descr': ((((,  "
    (tmp_path / "heading.npy").write_bytes(heading)
    with zipfile.ZipFile(tmp_path / "heading.npz", "w") as archive:
        archive.writestr("arr_0.npy", heading)
    with zipfile.ZipFile(tmp_path / "text_inside.npz", "w") as archive:
        archive.writestr("arr_0", b"no array")
    view = make_view(size=16)
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(files) == 13
    for path in files:
        with pytest.raises(DataError, match=rf"{path.name}.*attack\.perturbed"):
            make_attack("cl", perturbed=str(path)).poison(view)
    with pytest.raises(ConfigError, match=r"attack\.perturbed=.*missing\.npy"):
        make_attack("cl", perturbed=str(tmp_path / "missing.npy"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "best"}, r"attack\.model='best'"),
        ({"norm": "l1"}, r"attack\.norm='l1'"),
        ({"eps": 0}, r"attack\.eps=0"),
        ({"eps": 256}, r"attack\.eps=256"),
        ({"step": "two"}, r"attack\.step='two'"),
        ({"steps": 2.5}, r"attack\.steps=2\.5"),
        ({"random_start": 1}, r"attack\.random_start=1"),
        ({"robust_steps": 0}, r"attack\.robust_steps=0"),
        ({"corners": "none"}, r"attack\.corners='none'"),
        ({"amplitude": 1.1}, r"attack\.amplitude=1\.1"),
        ({"scale_patch": "yes"}, r"attack\.scale_patch='yes'"),
        ({"perturbed": 3}, r"attack\.perturbed=3"),
    ],
)
def test_bad_values_name_their_key(changes: dict[str, Any], message: str, make_attack: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        make_attack("cl", **changes)
