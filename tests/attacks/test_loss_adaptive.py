"""The loss-based adaptive attack (attacks.md A26): TRAP's Eq. 2 against a slow loop, and whose trigger it stamps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from backdoor_bench.attacks.blend_kitty import BlendKitty
from backdoor_bench.attacks.loss_adaptive import LossAdaptive, adaptive_loss
from backdoor_bench.attacks.none import NoAttack
from backdoor_bench.data.augment import Augmentation
from backdoor_bench.errors import ConfigError
from backdoor_bench.training.fit import Batch, fit
from backdoor_bench.training.hardware import Hardware
from backdoor_bench.types import Facts
from tests.conftest import CONF


def adaptive(trigger: Any, **changes: Any) -> LossAdaptive:
    """The attack from its YAML, with a nested one in hand."""
    node = yaml.safe_load((CONF / "attack" / "loss_adaptive.yaml").read_text())
    keys = {key: value for key, value in node.items() if not key.startswith("_") and key != "defaults"}
    return LossAdaptive(**(keys | {"seed": 0, "trigger": trigger} | changes))


# ---------------------------------------------------------------- the loss


def pictures(count: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def by_hand(model: Any, batch: Batch, rows: list[int], clean: Tensor, true_labels: list[int], alpha: float) -> float:
    """Eq. 2, one sample at a time, with a model in eval mode."""
    first, second, third = [], [], []

    def ce(image: Tensor, label: int) -> float:
        return F.cross_entropy(model(image[None]), torch.tensor([label]), label_smoothing=0.1).item()

    for place, (row, label) in enumerate(zip(batch.index.tolist(), batch.labels.tolist(), strict=True)):
        image = batch.images[place]
        if row not in rows:
            first.append(ce(image, label))
            continue
        slot = rows.index(row)
        original = batch.augmented(clean[slot : slot + 1].float() / 255, torch.tensor([place]))[0]
        first.append(ce(original, true_labels[slot]))
        second.append(ce(image, label))
        distance = (model.features(original[None]) - model.features(image[None])) ** 2
        third.append(distance.mean().item())

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    return mean(first) + mean(second) + alpha * mean(third)


@pytest.mark.parametrize(
    "index",
    [[0, 1, 3, 8, 99], [1, 8], [0, 2], [8, 0, 1, 2, 3, 4]],
    ids=["mixed and beyond the set", "all poisoned", "none poisoned", "any order"],
)
def test_loss_is_equation_2(index: list[int], new_model: Callable[[int], Any], hardware: Hardware) -> None:
    model = new_model(4).eval()
    rows, true_labels, clean = [1, 3, 8], [2, 0, 3], pictures(3, 1)
    images = pictures(len(index), 2).float() / 255
    mirrored = torch.arange(len(index)) % 2 == 1

    def augmented(others: Tensor, places: Tensor) -> Tensor:
        return torch.where(mirrored[places][:, None, None, None], others.flip(3), others)

    labels = torch.arange(len(index)) % 4
    batch = Batch(images, labels, torch.tensor(index), 0, images, augmented, torch.Generator())
    loss_fn = adaptive_loss(torch.tensor(rows), clean, torch.tensor(true_labels), 5.0, 0.1, hardware)
    with torch.no_grad():
        assert loss_fn(model, batch).item() == pytest.approx(
            by_hand(model, batch, rows, clean, true_labels, 5.0), rel=1e-5
        )
        without = adaptive_loss(torch.tensor(rows), clean, torch.tensor(true_labels), 0.0, 0.1, hardware)
        assert without(model, batch).item() == pytest.approx(
            by_hand(model, batch, rows, clean, true_labels, 0.0), rel=1e-5
        )


def test_all_images_pass_the_batch_norms_together(new_model: Callable[[int], Any], hardware: Hardware) -> None:
    model = new_model(4).train()
    images = pictures(4, 2).float() / 255
    batch = Batch(images, torch.zeros(4).long(), torch.arange(4), 0, images, lambda x, _: x, torch.Generator())
    adaptive_loss(torch.tensor([2]), pictures(1, 1), torch.tensor([1]), 5.0, 0.0, hardware)(model, batch).backward()
    tracked = [int(value) for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")]
    assert tracked == [1] * len(tracked)
    assert model.head.weight.grad.abs().sum() > 0


# ---------------------------------------------------------------- the attack


def test_poison_is_the_nested_trigger_on_rows_of_its_own_keys(
    make_attack: Callable[..., Any], make_view: Callable[..., Any]
) -> None:
    view = make_view(torch.arange(200) % 4, size=32, classes=4)
    before = view.train.images.clone()
    attack = adaptive(make_attack("badnets", target_class=3, poison_rate=0.9), target_class=2)
    result = attack.poison(view)
    assert attack.controls_training
    assert torch.equal(view.train.images, before)
    assert int(result.is_poisoned.sum()) == 15
    assert (result.train.labels[result.is_poisoned] == 2).all()
    rows = result.is_poisoned.nonzero().flatten()
    patch, _ = make_attack("badnets").triggers(view)
    assert torch.equal(result.train.images[rows], patch(before[rows]))
    (case,) = result.tests
    assert case.target_class == 2
    assert torch.equal(case.trigger(before[:4]), patch(before[:4]))
    again = adaptive(make_attack("badnets"), target_class=2).poison(make_view(torch.arange(200) % 4, classes=4))
    assert torch.equal(again.train.images, result.train.images)


def test_training_and_test_trigger_may_differ(make_attack: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    view = make_view(torch.arange(200) % 4, size=16, classes=4)
    result = adaptive(make_attack("sig"), label_rule="clean", poison_pool="target", poison_rate=0.5).poison(view)
    train_wave, test_wave = make_attack("sig").triggers(view)
    rows = result.is_poisoned.nonzero().flatten()
    assert len(rows) == 25
    assert torch.equal(result.train.labels, result.true_labels)
    assert torch.equal(result.train.images[rows], train_wave(view.train.images[rows]))
    assert torch.equal(result.tests[0].trigger(view.train.images[:4]), test_wave(view.train.images[:4]))


def test_loss_knows_the_originals_in_their_twins_crops(
    make_attack: Callable[..., Any], make_view: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through fit: a trigger that changes nothing leaves no distance between the pairs, whatever the crops and flips."""
    view = make_view(torch.arange(64) % 4, size=16, classes=4)
    view = replace(view, train_config=replace(view.train_config, augment=Augmentation(2, True, 0.0, 0), epochs=1))
    nested = make_attack("badnets", target_class=0)
    monkeypatch.setattr(type(nested), "triggers", lambda self, view: (lambda x, index=None: x.clone(),) * 2)
    losses = {}
    for alpha in (0, 5):
        result = adaptive(nested, alpha=alpha, poison_rate=0.5).poison(view)
        fit(
            view.new_model(4),
            result.train,
            view.train_config,
            generator=torch.Generator().manual_seed(0),
            stage="train",
            progress=view.progress,
            loss_fn=result.train_loss,
            on_epoch_end=lambda epoch, model, loss, alpha=alpha: losses.update({alpha: loss}),
        )
    assert losses[0] == losses[5]


def test_nested_errors_name_their_key(make_attack: Callable[..., Any]) -> None:
    facts = Facts(num_classes=4, image_size=16, train_size=100, epochs=1, steps_per_epoch=1)
    with pytest.raises(ConfigError, match=r"attack\.trigger\.margin=14"):
        adaptive(make_attack("badnets", margin=14)).check(facts)
    adaptive(make_attack("badnets", poison_rate=0.001)).check(facts)  # its rate is not used
    with pytest.raises(ConfigError, match=r"attack\.poison_rate=0\.001"):
        adaptive(make_attack("badnets"), poison_rate=0.001).check(facts)
    with pytest.raises(ConfigError, match=r"attack\.trigger\.alpha=2"):
        adaptive(partial(BlendKitty, **vars(make_attack("blend_kitty")) | {"alpha": 2}))


def test_attacks_that_cannot_be_nested(make_attack: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"attack\.trigger is NoAttack.*no trigger"):
        adaptive(partial(NoAttack))
    with pytest.raises(ConfigError, match=r"attack\.trigger is LatentBackdoor.*owns the training loss"):
        adaptive(make_attack("lba_14", mode="loss"))
    adaptive(make_attack("lba_14", mode="data"))


@pytest.mark.parametrize("alpha", [-1, "five", float("inf"), None])
def test_bad_alpha(alpha: Any, make_attack: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"attack\.alpha="):
        adaptive(make_attack("badnets"), alpha=alpha)


def test_command_line_chooses_the_nested_attack(bench: Callable[..., Any]) -> None:
    done = bench(
        "attack=loss_adaptive", "attack@attack.trigger=blend_kitty", "attack.target_class=1", "attack.trigger.alpha=0.4",
        "defense=no_defense",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.result["metrics"]["asr"] > 0.5
    refused = bench("attack=loss_adaptive", "attack.trigger.side=99", "defense=no_defense")
    assert refused.code == 2
    assert "attack.trigger.side" in refused.err
