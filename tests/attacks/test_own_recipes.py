"""What attacks train on their own follows a schedule of their own: warm-up and end of the victim's are left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from backdoor_bench.attacks import iab, ssba
from backdoor_bench.training.config import TrainConfig


@pytest.fixture
def base(recipe: TrainConfig) -> TrainConfig:
    """A learning rate that never falls below what these attacks begin with, and a warm-up."""
    return replace(recipe, lr=0.9, lr_min=0.8, warmup_epochs=2.0, warmup_from=0.7)


def test_adam_recipes_of_latent_backdoor_and_natural(make_attack: Callable[..., Any], base: TrainConfig) -> None:
    for name, lr in (("lba_10", "trig_lr"), ("natural", "lr")):
        attack = make_attack(name)
        made = attack._recipe(base)
        assert [made.lr_at(epoch, 0, 2) for epoch in range(3)] == [getattr(attack, lr)] * 3
        assert (made.lr_min, made.warmup_from, made.warmup_epochs) == (0, 0, 0)


def test_recipe_of_iab(make_attack: Callable[..., Any], make_view: Callable[..., Any], base: TrainConfig) -> None:
    view = replace(make_view(size=16), train_config=base)
    made = make_attack("iab")._recipe(view, 10, 32, (0.5,), iab._adam(0.01))
    assert [made.lr_at(epoch, 0, 2) for epoch in range(10)] == pytest.approx([0.01] * 5 + [0.001] * 5)
    assert (made.lr_min, made.warmup_from) == (0, 0)


def test_recipe_of_ssba(
    make_attack: Callable[..., Any], make_view: Callable[..., Any], base: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[TrainConfig] = []
    monkeypatch.setattr(ssba, "fit", lambda nets, data, recipe, **rest: given.append(recipe))
    make_attack("ssba")._train(replace(make_view(size=16), train_config=base), None)(None)
    (made,) = given
    assert made.lr_at(0, 0, 10) == made.lr
    assert made.lr_at(made.epochs - 1, 9, 10) < 0.01 * made.lr
    assert (made.lr_min, made.warmup_from) == (0, 0)
