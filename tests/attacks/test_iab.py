"""IAB: generators that give every image a trigger of its own, static sets and poisons drawn anew in every batch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from backdoor_bench.attacks.common import all2one
from backdoor_bench.errors import ConfigError
from backdoor_bench.storage import load_bundle
from backdoor_bench.training import interrupt
from backdoor_bench.triggers.generators import (
    BorrowedTrigger,
    Generator,
    OwnTrigger,
    PatternAndMask,
    diversity,
    through_network,
    working_side,
)
from backdoor_bench.triggers.rows import uniform_of_rows
from backdoor_bench.types import Facts

CPU = torch.device("cpu")
SMALL = {"gen_width": 2, "gen_stages": 2, "gen_size": 16, "gen_batch": 20, "mask_epochs": 2, "gen_epochs": 2}


@pytest.fixture
def iab(make_attack: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **changes: make_attack("iab", **(SMALL | changes))


@pytest.fixture
def view(make_view: Callable[..., Any]) -> Any:
    return make_view(torch.arange(100) % 10, size=16)


@pytest.fixture
def nets() -> PatternAndMask:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nets = PatternAndMask(nn.Identity(), 16, 4, 2)
        nets(torch.rand(64, 3, 16, 16))  # moves the batch norms off their start
    return nets.requires_grad_(False).eval()


def pictures(count: int, size: int = 16) -> torch.Tensor:
    stream = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, size, size), generator=stream, dtype=torch.uint8)


# --- the networks ---


def test_generator_has_the_layers_of_the_original() -> None:
    layers = list(Generator(3, 32, 3))
    convolutions = [(layer.in_channels, layer.out_channels) for layer in layers if isinstance(layer, nn.Conv2d)]
    down = [(3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)]
    up = [(128, 128), (128, 64), (64, 64), (64, 32), (32, 32), (32, 3)]
    assert convolutions == [*down, (128, 128), *up]
    assert isinstance(layers[-1], nn.BatchNorm2d), "no ReLU at the end"
    assert all(layer.momentum == 0.05 for layer in layers if isinstance(layer, nn.BatchNorm2d))
    assert sum(isinstance(layer, nn.MaxPool2d) for layer in layers) == 3
    made = Generator(1, 2, 3)(torch.randn(2, 3, 32, 32))
    assert made.shape == (2, 1, 32, 32)
    assert 0 <= made.min() < made.max() <= 1


def test_mask_is_a_soft_threshold(nets: PatternAndMask) -> None:
    nets.mask = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (3, 16, 16)))  # type: ignore[assignment]
    grey = torch.tensor([0.0, 0.5, 0.6, 1.0])[:, None, None, None].expand(4, 3, 16, 16)
    masks = nets.masks(grey)[:, 0, 0, 0]
    assert masks == pytest.approx([0.0, 0.5, 0.982, 1.0], abs=1e-3)  # tanh(20 m - 10) / 2 + 0.5, tanh(2) = 0.964


def test_images_mix_with_patterns_below_the_mask(nets: PatternAndMask) -> None:
    images, lenders = torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)
    pattern, mask = nets.patterns(lenders), nets.masks(lenders)
    assert torch.allclose(nets(images, lenders), (1 - mask) * images + mask * pattern, atol=1e-6)
    assert torch.equal(nets(images), nets(images, images))


def test_diversity_by_hand() -> None:
    images, others = torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 0.6)
    made, made_of_others = torch.zeros(2, 1, 1, 2), torch.tensor([[[[0.3, 0.3]]], [[[0.0, 0.6]]]])
    # Pair 1: 0.6 / 0.3 = 2; pair 2: 0.6 / sqrt(0.18) = 1.41421.
    assert float(diversity(images, others, made, made_of_others)) == pytest.approx((2 + 2**0.5) / 2, rel=1e-4)


def test_equal_images_give_no_infinite_gradient() -> None:
    made = torch.zeros(2, 3, requires_grad=True)
    diversity(torch.zeros(2, 3), torch.zeros(2, 3), made, made.clone()).backward()
    assert made.grad is not None
    assert made.grad.isfinite().all()


@pytest.mark.parametrize(("image", "side"), [(16, 16), (20, 16), (32, 32), (45, 32), (224, 32)])
def test_any_image_size(image: int, side: int) -> None:
    assert working_side(32, image, 8) == side
    nets = PatternAndMask(nn.Identity(), side, 1, 3).requires_grad_(False).eval()
    images = torch.rand(1, 3, image, image)
    assert nets.patterns(images).shape == images.shape
    assert nets.masks(images).shape == (1, 1, image, image)


# --- the triggers ---


def test_own_trigger_is_a_pure_function_of_each_image(nets: PatternAndMask) -> None:
    images = pictures(300)
    before = images.clone()
    trigger = OwnTrigger(nets, CPU)
    stamped = trigger(images)
    assert torch.equal(images, before)
    assert stamped.dtype == torch.uint8
    assert stamped.shape == images.shape
    by_hand = (nets(images.float() / 255) * 255).clamp(0, 255).to(torch.uint8)
    assert (stamped.int() - by_hand.int()).abs().max() <= 1
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([trigger(part) for part in images[order].split(110)]), stamped[order])
    shift = stamped.int() - images.int()
    assert not torch.equal(shift[0], shift[1])
    assert trigger(images[:0]).shape == (0, 3, 16, 16)


def test_borrowed_trigger_is_another_rows(nets: PatternAndMask) -> None:
    images = pictures(50)
    trigger = BorrowedTrigger(nets, CPU, images, seed=5)
    index = torch.arange(50)
    lenders = (index + (uniform_of_rows(5, "iab lender", index, 1)[:, 0] * 49).long() + 1) % 50
    assert (lenders != index).all()
    stamped = trigger(images, index)
    assert torch.equal(stamped, through_network(nets, CPU, images, images[lenders]))
    assert torch.equal(trigger(images[[7, 3]], torch.tensor([7, 3])), stamped[[7, 3]])


# --- the static set ---


def test_static_set(iab: Callable[..., Any], view: Any) -> None:
    result = iab(cover_rate=0.05).poison(view)
    labels, images = view.train.labels, view.train.images
    assert (int(result.is_poisoned.sum()), int(result.is_cover.sum())) == (9, 5)
    assert not (result.is_poisoned & result.is_cover).any()
    assert (labels[result.is_poisoned] != 0).all()
    assert (result.train.labels[result.is_poisoned] == 0).all()
    rest = ~result.is_poisoned
    assert torch.equal(result.train.labels[rest], labels[rest])
    untouched = rest & ~result.is_cover
    assert torch.equal(result.train.images[untouched], images[untouched])
    own = result.tests[0].trigger(images, torch.arange(100))
    assert torch.equal(result.train.images[result.is_poisoned], own[result.is_poisoned])
    nets = result.tests[0].trigger.nets
    borrowed = BorrowedTrigger(nets, CPU, images, 0)(images, torch.arange(100))
    assert torch.equal(result.train.images[result.is_cover], borrowed[result.is_cover])
    assert (borrowed != images).any()
    assert not iab().controls_training
    assert result.train_loss is None


def test_same_seed_same_set(iab: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    labels = torch.arange(100) % 10
    one, two, other = (
        iab(seed=seed, cover_rate=0.05).poison(make_view(labels, size=16)).train.images for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_generators_are_shared_by_poison_rates_but_not_by_targets(iab: Callable[..., Any], view: Any) -> None:
    def made() -> list[str]:
        return sorted(path.name.split("-")[0] for path in view.learned._root.iterdir() if path.name.startswith("iab"))

    images = pictures(4)
    first = iab().triggers(view)[0](images)
    assert made() == ["iab_check", "iab_masks", "iab_patterns"]
    assert torch.equal(iab(poison_rate=0.3, cover_rate=0.1).triggers(view)[1](images), first)
    assert made() == ["iab_check", "iab_masks", "iab_patterns"]
    iab(target_class=1).triggers(view)
    assert made() == ["iab_check", "iab_check", "iab_masks", "iab_patterns", "iab_patterns"]


def test_generators_of_two_seeds_in_one_run(iab: Callable[..., Any], view: Any) -> None:
    """As parts of a multi-trigger attack with seeds of their own."""
    one, other = (iab(seed=seed).triggers(view)[0](pictures(4)) for seed in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("wanted", [0, 1])
def test_rows_sorted_by_class_can_be_tried(wanted: int, iab: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    view = make_view(torch.arange(1200) // 600, size=16, classes=2)  # as the files of an image tree are
    said: list[str] = []
    view.progress.say = said.append
    iab(mask_epochs=1, gen_epochs=1, gen_limit=40, target_class=wanted).triggers(view)
    assert "follows a trigger in" in said[-1]
    assert "nan" not in said[-1]


def test_interrupted_training_resumes(
    iab: Callable[..., Any], make_view: Callable[..., Any], view: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = iab().triggers(make_view(torch.arange(100) % 10, size=16))[0](pictures(8))
    for steps in (7, 12):  # in the second epoch of the masks, then of the patterns
        calls = iter(range(1000))

        def stop(calls: Any = calls, steps: int = steps) -> None:
            if next(calls) == steps:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(interrupt, "raise_if_requested", stop)
            with pytest.raises(KeyboardInterrupt):
                iab().triggers(view)
    assert torch.equal(iab().triggers(view)[0](pictures(8)), whole)


def test_masks_shrink_then_only_the_patterns_are_trained(iab: Callable[..., Any], view: Any) -> None:
    attack = iab(mask_epochs=15, gen_width=4, lambda_div=0.1, mask_density=0.05)
    trained = attack.triggers(view)[0].nets
    assert 0 < float(trained.masks(view.train.images.float() / 255).mean()) < 0.2

    def stored(name: str) -> dict[str, torch.Tensor]:
        (folder,) = view.learned._root.glob(f"{name}-*")
        return load_bundle(folder / "bundle").tensors

    first, second = stored("iab_masks"), stored("iab_patterns")
    changed = {name.split(".")[0] for name, value in first.items() if not torch.equal(value, second[f"nets.{name}"])}
    assert changed == {"pattern"}
    start = view.new_model(10).state_dict()
    assert not torch.equal(start["head.weight"], second["classifier.head.weight"])


def test_loss_of_the_patterns_by_hand(iab: Callable[..., Any], view: Any, nets: PatternAndMask) -> None:
    attack, model = iab(cross_rate=0.2, lambda_div=0.5), Listening()
    losses: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backdoor_bench.attacks.iab.fit", lambda *args, loss_fn, **rest: losses.append((loss_fn, rest)))
        attack._train_patterns(view, nets, model, nets, all2one(0))(None)
    loss_fn, rest = losses[0]
    rows = rest["order"](0, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in rows] == [24] * 5, "20 images and the four that lend their triggers"
    assert all(len(set(batch[:20].tolist())) == 20 for batch in rows)

    batch = batch_of([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 3, 3, 3])
    loss = loss_fn(model, batch)
    own, crossed, lenders = batch.images[:4], batch.images[4:8], batch.images[20:]
    assert torch.allclose(model.images[:4], nets(own), atol=1e-5)
    assert torch.allclose(model.images[4:8], nets(crossed, lenders), atol=1e-5)
    assert torch.equal(model.images[8:], batch.images[8:20])
    wanted = torch.cat([torch.zeros(4, dtype=torch.int64), batch.labels[4:20]])
    unlike = diversity(own, lenders, nets.patterns(own), nets.patterns(lenders))
    assert float(loss) == pytest.approx(float(nn.functional.cross_entropy(model.logits, wanted) + 0.5 * unlike))


def test_recipes_of_the_original(iab: Callable[..., Any], view: Any, nets: PatternAndMask) -> None:
    attack, model, given = iab(mask_epochs=25, gen_epochs=575), view.new_model(10), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "backdoor_bench.attacks.iab.fit", lambda net, data, *recipe, **rest: given.append((recipe[0], rest))
        )
        attack._train_masks(view, nets)(None)
        attack._train_patterns(view, nets, model, nets, all2one(0))(None)
    (masks, _), (classifier, rest) = given
    ((trained, patterns),) = rest["also"]
    assert trained is nets.pattern
    for recipe in (masks, patterns):
        assert (recipe.optimizer, recipe.lr, recipe.betas, recipe.weight_decay) == ("adam", 0.01, (0.5, 0.9), 0.0)
    kept = classifier.optimizer, classifier.lr, classifier.momentum, classifier.weight_decay, classifier.nesterov
    assert kept == ("sgd", 0.01, 0.9, 5e-4, False)
    assert [recipe.epochs for recipe in (masks, classifier, patterns)] == [25, 575, 575]
    assert masks.milestones == [10, 20]
    assert classifier.milestones == [100, 200, 300, 400]
    assert patterns.milestones == [200, 300, 400, 500]
    assert all(recipe.gamma == 0.1 and recipe.label_smoothing == 0 for recipe in (masks, classifier, patterns))


# --- online ---


def batch_of(labels: list[int]) -> Any:
    count = len(labels)
    images = pictures(count).float() / 255
    return SimpleNamespace(images=images, labels=torch.tensor(labels), index=torch.arange(count))


class Listening(nn.Module):
    """Remembers the images it is given; equal logits."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.images = images
        self.logits = torch.randn(len(images), 10, generator=torch.Generator().manual_seed(0))
        return self.logits


def test_online_stamps_every_batch(iab: Callable[..., Any], view: Any) -> None:
    attack = iab(mode="online", poison_rate=0.2, cross_rate=0.1)
    assert attack.controls_training
    result = attack.poison(view)
    assert torch.equal(result.train.images, view.train.images)
    assert not result.is_poisoned.any()
    assert [case.target_class for case in result.tests] == [0]

    batch = batch_of([0, 5, 0, 3, 1, 2, 2, 4, 6, 7])
    before = batch.images.clone()
    nets, model = result.tests[0].trigger.nets, Listening()
    loss = result.train_loss(model, batch)
    # The target class is not poisoned: rows 1 and 3 are, and row 0 borrows from row 1.
    assert torch.allclose(model.images[[1, 3]], nets(before[[1, 3]]), atol=1e-5)
    assert torch.allclose(model.images[:1], nets(before[:1], before[1:2]), atol=1e-5)
    rest = [2, 4, 5, 6, 7, 8, 9]
    assert torch.equal(model.images[rest], before[rest])
    assert torch.equal(batch.images, before)
    wanted = torch.tensor([0, 0, 0, 0, 1, 2, 2, 4, 6, 7])
    assert float(loss) == pytest.approx(float(nn.functional.cross_entropy(model.logits, wanted)))


def test_online_leaves_a_tiny_last_batch_alone(iab: Callable[..., Any], view: Any) -> None:
    result = iab(mode="online").poison(view)
    batch, model = batch_of([1, 2]), Listening()
    result.train_loss(model, batch)
    assert torch.equal(model.images, batch.images)


# --- what cannot work ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "both"}, r"attack\.mode='both' .*static, online"),
        ({"cross_rate": 0.5}, r"attack\.cross_rate=0\.5"),
        ({"gen_size": 18}, r"attack\.gen_size=18 .*divisible by 4"),
        ({"gen_epochs": 0}, r"attack\.gen_epochs=0"),
        ({"mask_density": 1.2}, r"attack\.mask_density=1\.2"),
        ({"gen_limit": 2}, r"attack\.gen_limit=2"),
        ({"mode": "online", "cover_rate": 0.1}, r"attack\.cover_rate=0\.1 .*mode=static"),
        ({"mode": "online", "poison_count": 5}, r"attack\.poison_count=5 .*mode=static"),
        ({"mode": "online", "poison_rate": 0.95}, r"attack\.cross_rate=0\.1 .*at most 1"),
    ],
)
def test_bad_values(iab: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        iab(**changes)


def test_image_too_small_for_the_halvings(iab: Callable[..., Any]) -> None:
    attack = iab(gen_stages=5, gen_size=32)
    with pytest.raises(ConfigError, match=r"attack\.gen_stages=5 needs .* 32 px"):
        attack.check(Facts(10, 16, 1000, epochs=1, steps_per_epoch=1))
    attack.check(Facts(10, 40, 1000, epochs=1, steps_per_epoch=1))
