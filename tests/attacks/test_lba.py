"""The latent backdoor (attacks.md A23): where it cuts, what the patch learns, and its loss worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from hydra.utils import instantiate
from torch import Tensor, nn

from backdoor_bench.attacks.lba import TanhSquare, cut, hidden, latent_loss
from backdoor_bench.attacks.surrogate import surrogate
from backdoor_bench.errors import ConfigError
from backdoor_bench.models.small_cnn import SmallCNN
from backdoor_bench.models.wrn import WideResNet16
from backdoor_bench.training.fit import Batch, fit
from backdoor_bench.types import Facts, PoisonedSet
from tests.conftest import CONF

BLACK_AND_WHITE = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
FEW = {"trig_batches": 2, "trig_steps": 3}


def facts(size: int = 32) -> Facts:
    return Facts(num_classes=10, image_size=size, train_size=1000, epochs=1, steps_per_epoch=1)


# ---------------------------------------------------------------- where it cuts


def test_layers_of_wrn16_1_are_those_of_trap_and_replace() -> None:
    model = WideResNet16(width=1, normalise="none").build(10, 32, **BLACK_AND_WHITE).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        for layer, block, shape in ((12, "layer3_0", (2, 64, 8, 8)), (10, "layer2_1", (2, 32, 16, 16))):
            found = hidden(model, images, cut(model, layer))
            assert found.shape == shape
            assert torch.equal(found, model.split(block)[0](images))
        assert torch.equal(hidden(model, images, cut(model, 14)), model.features(images))


@pytest.mark.parametrize("path", sorted((CONF / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_network_can_be_cut(path: Any) -> None:
    node = yaml.safe_load(path.read_text())
    with torch.device("meta"):
        model = instantiate(node).build(10, 32, **BLACK_AND_WHITE)
    last, before = list(model.stages.values())[-1], list(model.stages.values())[-2]
    assert model.block_names[cut(model, 12) or 0] == last
    assert model.block_names[(cut(model, 10) or 0) - 1] == before
    assert cut(model, 14) is None


def test_a_network_without_inner_layers_is_refused(
    make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    model = SmallCNN(widths=[8], normalise="none").build(4, 16, **BLACK_AND_WHITE)
    view = replace(make_view(torch.arange(40) % 4, size=16, classes=4), new_model=lambda _: model)
    for layer in (12, 10):
        with pytest.raises(ConfigError, match=rf"attack\.layer={layer} .*attack\.layer=14"):
            cut(model, layer)
        with pytest.raises(ConfigError, match=rf"attack\.layer={layer} "):
            make_attack(f"lba_{layer}").triggers(view)
    assert not list(view.learned._root.iterdir())  # before anything is trained


# ---------------------------------------------------------------- the patch


@pytest.mark.parametrize(
    ("size", "changes", "first", "side"),
    [
        (16, {}, 12, 3),
        (32, {}, 25, 6),
        (64, {}, 50, 12),
        (160, {}, 123, 32),
        (224, {}, 173, 44),
        (224, {"scale_patch": False}, 179, 44),
        (32, {"margin": 0, "side_ratio": 0.125}, 28, 4),
    ],
)
def test_place_of_the_square(
    size: int,
    changes: dict[str, Any],
    first: int,
    side: int,
    make_attack: Callable[..., Any],
    make_view: Callable[..., Any],
) -> None:
    view = make_view(torch.arange(8) % 4, size=size, classes=4)
    view = replace(view, train_config=replace(view.train_config, epochs=1))
    attack = make_attack("lba_14", trig_batches=1, trig_steps=1, target_class=0, **changes)
    attack.check(facts(size))
    trigger, test_trigger = attack.triggers(view)
    before = view.train.images.clone()
    stamped = trigger(view.train.images)
    assert torch.equal(view.train.images, before)
    assert torch.equal(stamped, test_trigger(view.train.images))
    assert stamped.dtype == torch.uint8
    square = stamped[:, :, first : first + side, first : first + side]
    assert torch.equal(square, square[:1].expand_as(square))  # opaque: the same on every image
    outside = torch.ones(size, size, dtype=torch.bool)
    outside[first : first + side, first : first + side] = False
    assert torch.equal(stamped[..., outside], before[..., outside])


@pytest.mark.parametrize("id_", ["lba_14", "lba_12", "lba_10"])
def test_learnt_patch_comes_closer_to_the_target_class(
    id_: str, make_attack: Callable[..., Any], make_view: Callable[..., Any], blobs: Any
) -> None:
    view = make_view(blobs.labels, images=blobs.images, size=16, classes=4)
    attack = make_attack(id_, trig_batches=4, trig_steps=10, target_class=1, side_ratio=0.5)
    learnt, _ = attack.triggers(view)
    start, _ = replace(attack, trig_lr=1e-9).triggers(view)
    model = surrogate(view)
    depth = cut(model, attack.layer)

    def distance(images: Tensor) -> float:
        with torch.no_grad():
            goal = hidden(model, blobs.images[blobs.labels == 1].float() / 255, depth).mean(0)
            values = hidden(model, images.float() / 255, depth)
        return F.mse_loss(values, goal.expand_as(values)).item()

    others = blobs.images[blobs.labels != 1]
    assert distance(learnt(others)) < distance(start(others))


def test_square_stays_a_picture() -> None:
    square = TanhSquare(2, 1, 0, torch.Generator().manual_seed(0))
    assert square.raw.abs().max() <= 1
    with torch.no_grad():
        square.raw.copy_(torch.tensor([[-99.0, 0.0], [0.5, 99.0]]).expand(3, 2, 2))
    images = torch.full((2, 3, 4, 4), 0.25)
    found = square(images)
    half = (torch.tensor(0.5).tanh().item() + 1) / 2
    assert torch.allclose(found[1, 2, 1:3, :2], torch.tensor([[0.0, 0.5], [half, 1.0]]))
    assert (images == 0.25).all()
    assert int((found != 0.25).sum()) == 2 * 3 * 4


# ---------------------------------------------------------------- the poisoned set


def test_data_mode_is_ordinary_poisoning(make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    view = make_view(torch.arange(200) % 4, size=16, classes=4)
    before = view.train.images.clone()
    attack = make_attack("lba_12", **FEW)
    result = attack.poison(view)
    assert not attack.controls_training
    assert result.train_loss is None
    assert torch.equal(view.train.images, before)
    # The first of the pool, as in Trap-and-Replace.
    assert result.is_poisoned.nonzero().flatten().tolist() == [row for row in range(27) if row % 4]
    assert (result.train.labels[result.is_poisoned] == 0).all()
    again = make_attack("lba_12", **FEW).poison(make_view(torch.arange(200) % 4, size=16, classes=4))
    assert torch.equal(again.train.images, result.train.images)


def test_patch_is_shared_by_both_modes_and_any_rate(
    make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    view = make_view(torch.arange(200) % 4, size=16, classes=4)
    for changes in ({}, {"mode": "loss", "mse_weight": 0.5}, {"poison_rate": 0.05}, {"target_class": 1}):
        make_attack("lba_14", **FEW, **changes).triggers(view)
    names = [path.name.split("-")[0] for path in view.learned._root.iterdir()]
    assert sorted(names) == ["latent_patch", "latent_patch", "surrogate"]


def test_loss_mode_trains_what_it_poisoned(make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    view = make_view(torch.arange(200) % 4, size=16, classes=4)
    attack = make_attack("lba_10", mode="loss", **FEW)
    assert attack.controls_training
    result = attack.poison(view)
    losses = []
    for _ in range(2):
        model = view.new_model(4)
        fit(
            model,
            result.train,
            view.train_config,
            generator=torch.Generator().manual_seed(0),
            stage="train",
            progress=view.progress,
            loss_fn=result.train_loss,
            on_epoch_end=lambda epoch, model, loss: losses.append(loss),
        )
    assert losses[:3] == losses[3:]  # nothing is left over from one training for the next


# ---------------------------------------------------------------- the loss


class Halves(nn.Module):
    """One block that halves, pooled to the first two of three channels, a fixed linear head of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.normalise, self.blocks = nn.Identity(), nn.Sequential(nn.Flatten(), Scale(0.5), Scale(3.0))
        self.pool = Keep()
        self.head = nn.Linear(2, 3)

    def features(self, images: Tensor) -> Tensor:
        kept: Tensor = self.pool(self.blocks(self.normalise(images)))
        return kept

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values: Tensor) -> Tensor:
        return values * self.factor


class Keep(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values[:, :2]


def a_set() -> PoisonedSet:
    """Ten rows: 2 and 5 poisoned, 7 a cover row of the target class 1."""
    none: Any = None
    poisoned, trigger_id = torch.zeros(10, dtype=torch.bool), torch.full((10,), -1)
    poisoned[[2, 5]] = True
    trigger_id[[2, 5, 7]] = 0
    return PoisonedSet(none, poisoned, none, none, trigger_id, (), none, none)


def a_batch(rows: list[int], labels: list[int], stream: torch.Generator) -> Batch:
    images = torch.tensor(rows).float().view(-1, 1, 1, 1).expand(-1, 3, 1, 1) / 10 + torch.tensor([0.0, 0.1, 0.3]).view(
        1, 3, 1, 1
    )
    return Batch(images, torch.tensor(labels), torch.tensor(rows), 0, images, lambda x, _: x, stream)


@pytest.mark.parametrize(("depth", "factor", "kept"), [(None, 1.5, 2), (2, 0.5, 3)])
def test_loss_by_hand(depth: int | None, factor: float, kept: int) -> None:
    model = Halves()
    loss_fn = latent_loss(a_set(), target=1, depth=depth, weight=0.5, momentum=0.75, label_smoothing=0.1)
    stream = torch.Generator()
    # Rows 0 and 1 are clean target images, 7 is stamped, 3 is another class, 12 lies beyond the poisoned set.
    first = a_batch([2, 0, 1, 7, 3, 12], [1, 1, 1, 1, 0, 2], stream)
    second = a_batch([2, 5, 4], [1, 1, 1], stream)

    def plain(batch: Batch) -> float:
        return F.cross_entropy(model(batch.images), batch.labels, label_smoothing=0.1).item()

    def h(value: float) -> list[float]:
        return [factor * (value + offset) for offset in (0.0, 0.1, 0.3)[:kept]]

    def mse(values: list[float], mean: list[float]) -> float:
        return sum((value - goal) ** 2 for row in values for value, goal in zip(h(row), mean, strict=True)) / (
            len(values) * kept
        )

    mean = h(0.05)  # of rows 0 and 1
    assert loss_fn(model, first).item() == pytest.approx(plain(first) + 0.5 * mse([0.2], mean), rel=1e-5)
    moved = [0.75 * old + 0.25 * new for old, new in zip(mean, h(0.4), strict=True)]  # row 4 is a clean target image
    assert loss_fn(model, second).item() == pytest.approx(plain(second) + 0.5 * mse([0.2, 0.5], moved), rel=1e-5)
    # A new epoch has a new generator and forgets the mean.
    fresh = a_batch([2, 5, 4], [1, 1, 1], torch.Generator())
    assert loss_fn(model, fresh).item() == pytest.approx(plain(fresh) + 0.5 * mse([0.2, 0.5], h(0.4)), rel=1e-5)


def test_loss_without_poison_or_without_target_is_cross_entropy() -> None:
    model = Halves()
    loss_fn = latent_loss(a_set(), target=1, depth=None, weight=0.5, momentum=0.9, label_smoothing=0.0)
    for batch in (a_batch([0, 1, 3], [1, 1, 0], torch.Generator()), a_batch([2, 5, 3], [1, 1, 0], torch.Generator())):
        assert torch.equal(loss_fn(model, batch), F.cross_entropy(model(batch.images), batch.labels))


def test_loss_reaches_the_inner_layer_and_not_the_mean(make_view: Callable[..., Any]) -> None:
    model = make_view(classes=3).new_model(3).train()
    stream = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 32, 32, generator=stream)
    batch = Batch(images, torch.tensor([1, 1, 0, 1]), torch.tensor([0, 1, 3, 2]), 0, images, lambda x, _: x, stream)
    depth = cut(model, 10)
    latent_loss(a_set(), 1, depth, 1000.0, 0.9, 0.0)(model, batch).backward()
    with_mse = model.blocks[0].conv.weight.grad.clone()
    model.zero_grad()
    latent_loss(a_set(), 1, depth, 0.0, 0.9, 0.0)(model, batch).backward()
    assert with_mse.abs().sum() > 2 * model.blocks[0].conv.weight.grad.abs().sum()


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 11}, r"attack\.layer=11"),
        ({"mode": "inject"}, r"attack\.mode='inject'"),
        ({"label_rule": "all2all", "poison_pool": "all"}, r"attack\.label_rule='all2all'"),
        ({"side_ratio": 0}, r"attack\.side_ratio=0"),
        ({"margin": -1}, r"attack\.margin=-1"),
        ({"trig_steps": 0}, r"attack\.trig_steps=0"),
        ({"target_images": None}, r"attack\.target_images=None"),
        ({"trig_lr": 0}, r"attack\.trig_lr=0"),
        ({"mse_weight": -0.1}, r"attack\.mse_weight=-0\.1"),
        ({"mean_momentum": 1}, r"attack\.mean_momentum=1"),
    ],
)
def test_bad_values_name_their_key(changes: dict[str, Any], message: str, make_attack: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        make_attack("lba_14", **changes)


def test_squares_that_do_not_fit(make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"attack\.side_ratio=0\.01 of 32 pixels"):
        make_attack("lba_14", side_ratio=0.01).check(facts())
    with pytest.raises(ConfigError, match=r"attack\.margin=27 leaves no room for a square of 6"):
        make_attack("lba_14", margin=27).check(facts())
    view = make_view(torch.arange(8) % 2, classes=4)
    with pytest.raises(ConfigError, match=r"attack\.target_class=3 has 0 of 8 images"):
        make_attack("lba_14", target_class=3).triggers(view)
