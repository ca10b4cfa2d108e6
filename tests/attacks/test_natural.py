"""Triggers found in a finished model (attacks.md A24), on models whose weak spot is known."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backdoor_bench.attacks import natural
from backdoor_bench.attacks.natural import Natural, Searches
from backdoor_bench.errors import ConfigError
from backdoor_bench.evaluate import Evaluator, Truth
from backdoor_bench.types import Facts, ImageSet

SIZE = 16


class WeakSpot(nn.Module):
    """Says class 0, unless the four pixels at the centre are red (class 1); ``outputs`` logits, the others never win."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(20.0))
        self.register_buffer("others", torch.full((outputs - 2,), -50.0))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        spot = images[:, :, 8:10, 8:10].mean((2, 3))
        red = spot[:, 0] - spot[:, 1] / 2 - spot[:, 2] / 2
        logits = torch.stack([torch.zeros_like(red), self.strength * (red - 0.6)], 1)
        return torch.cat([logits, self.others.expand(len(images), -1)], 1)


def attack(**changes: Any) -> Natural:
    usual = {
        "seed": 0, "budgets": [0.04, 0.02], "classes": "all", "penalties": [0.01, 50, 100], "epochs": 15, "lr": 0.1,
        "n_images": 40, "batch_size": 20,
    }  # fmt: skip
    return Natural(**{**usual, **changes})


@pytest.fixture
def view(make_view: Callable[..., Any]) -> Any:
    return make_view(torch.arange(80) % 4, size=SIZE, classes=4)


def cases_of(view: Any, model: nn.Module, **changes: Any) -> Any:
    return attack(**changes).poison(view).tests_of(model)


def test_nothing_is_poisoned(view: Any) -> None:
    result = attack().poison(view)
    assert Natural.poisons is False
    assert result.train is view.train
    assert not result.is_poisoned.any()
    assert result.tests == ()


def test_the_weak_spot_is_found_and_only_there(view: Any) -> None:
    cases = cases_of(view, WeakSpot(4), epochs=40)
    assert [case.name for case in cases] == [f"{budget}%->{target}" for budget in (4, 2) for target in range(4)]
    assert [case.group for case in cases] == ["4%"] * 4 + ["2%"] * 4
    assert [case.target_class for case in cases] == [0, 1, 2, 3] * 2
    by_name = {case.name: case for case in cases}
    found = by_name["4%->1"]
    labels = torch.arange(4)
    assert found.pool(labels).tolist() == [True, False, True, True]
    assert found.label_rule(labels).tolist() == [1, 1, 1, 1]
    images = torch.randint(0, 256, (50, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    before = images.clone()
    stamped = found.trigger(images)
    assert torch.equal(images, before)
    assert stamped.dtype == torch.uint8
    assert (WeakSpot(4)(stamped.float() / 255).argmax(1) == 1).all()
    assert (WeakSpot(4)(images.float() / 255).argmax(1) == 0).all()
    changed = (stamped != images).any(1)
    assert int(changed.any(0).sum()) <= 10  # 4 % of 256 pixels
    assert torch.equal(found.trigger(images[3:5]), stamped[3:5])
    unreachable = by_name["4%->2"].trigger(images)
    assert not (WeakSpot(4)(unreachable.float() / 255).argmax(1) == 2).any()


def test_the_best_class_of_a_budget_counts_and_budgets_are_averaged(view: Any) -> None:
    test = ImageSet(view.train.images, view.train.labels, 4)
    truth = Truth(torch.zeros(80, dtype=torch.bool), None)
    model = WeakSpot(4)
    found = attack(classes=[1, 2], epochs=40).poison(view)
    evaluator = Evaluator(test, found.tests, truth, 4, view.train_config.hardware, found.tests_of)
    assert evaluator.model_metrics(model)["asr"] is None  # while it trains nothing is looked for
    metrics = evaluator.model_metrics(model, final=True)
    each = metrics["asr_per_trigger"]
    assert set(each) == {"4%->1", "4%->2", "2%->1", "2%->2"}
    assert each["4%->1"] == 1.0
    assert each["4%->2"] == each["2%->2"] == 0.0
    assert metrics["asr"] == pytest.approx((each["4%->1"] + each["2%->1"]) / 2)


def test_a_dummy_class_is_no_target(view: Any) -> None:
    cases = cases_of(view, WeakSpot(5), epochs=2)
    assert {case.target_class for case in cases} == {0, 1, 2, 3}


def test_the_model_stays_as_it_is(view: Any) -> None:
    model = WeakSpot(4).train()
    before = copy.deepcopy(model.state_dict())
    cases_of(view, model, epochs=2)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_searches_beside_each_other_are_as_good_as_one_by_one(
    view: Any, make_view: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(natural, "VALUES_CPU", 2**22)
    together = cases_of(view, WeakSpot(4), epochs=5)
    assert len(view.progress.tasks) == 1
    monkeypatch.setattr(natural, "VALUES_CPU", 1)
    alone = cases_of(make_view(torch.arange(80) % 4, size=SIZE, classes=4), WeakSpot(4), epochs=5)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.trigger.mask, other.trigger.mask)
        difference = (one.trigger.pattern.int() - other.trigger.pattern.int()).abs()
        assert int(difference.max()) <= 1


def test_found_triggers_are_kept_for_the_same_model_only(view: Any) -> None:
    first = cases_of(view, WeakSpot(4), epochs=2)
    made = len(view.progress.tasks)
    again = cases_of(view, WeakSpot(4), epochs=2)
    assert len(view.progress.tasks) == made
    assert all(torch.equal(a.trigger.pattern, b.trigger.pattern) for a, b in zip(first, again, strict=True))
    other = WeakSpot(4)
    with torch.no_grad():
        other.strength.fill_(21.0)
    cases_of(view, other, epochs=2)
    assert len(view.progress.tasks) == 2 * made
    cases_of(view, WeakSpot(4), epochs=3)
    assert len(view.progress.tasks) == 3 * made


def test_a_search_starts_as_in_none() -> None:
    """A square of 0.8 times the budget's side from the centre on, mask 0.98 inside and 0.0003 outside."""
    size, budget = 32, 0.12  # 122.88 pixels: side floor(0.8 * 11.08) = 8
    search = Searches([(budget, 3), (budget, 4)], size, seed=0)
    stamped, masks, budgets, targets = search(torch.zeros(2, 3, size, size))
    inside = masks[0, 16:24, 16:24]
    assert torch.allclose(inside, torch.tensor(0.98201), atol=1e-5)
    assert int((masks[0] > 0.01).sum()) == 64
    assert torch.allclose(masks[0, 0, 0], torch.tensor(3.3535e-4), atol=1e-6)
    assert budgets.tolist() == pytest.approx([122.88, 122.88])
    assert targets.tolist() == [3, 4]
    assert stamped.shape == (2, 2, 3, size, size)
    assert 0.116 < stamped[:, :, :, 16:24, 16:24].min() < stamped.max() < 0.882  # 0.982 of tanh(-1..1) / 2 + 0.5
    alone = Searches([(budget, 4)], size, seed=0)
    assert torch.equal(alone.raw_patterns[0], search.raw_patterns[1])


def test_a_patch_never_exceeds_its_budget() -> None:
    search = Searches([(0.02, 0)], 16, seed=0)
    with torch.no_grad():
        search.raw_masks.fill_(1.0)
    (patch,) = search.patches()
    assert int(patch.mask.sum()) == 5  # of 5.12
    with torch.no_grad():
        search.raw_masks.fill_(-1.2)  # 0.083: its square is below 0.01
    assert not search.patches()[0].mask.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, r"attack\.seed=-1"),
        ({"budgets": []}, r"attack\.budgets=\[\]"),
        ({"budgets": [0.1, 0.1]}, r"attack\.budgets=\[0\.1, 0\.1\] .*different"),
        ({"budgets": [1.5]}, r"attack\.budgets=1\.5 .*<= 1"),
        ({"classes": "some"}, r"attack\.classes='some'"),
        ({"classes": [-1]}, r"attack\.classes=-1"),
        ({"penalties": [1, 2]}, r"attack\.penalties=\[1, 2\]"),
        ({"epochs": 0}, r"attack\.epochs=0"),
        ({"lr": 0}, r"attack\.lr=0"),
        ({"n_images": 0}, r"attack\.n_images=0"),
        ({"batch_size": 0}, r"attack\.batch_size=0"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attack(**changes)


def test_what_the_data_rule_out() -> None:
    facts = Facts(4, 16, 100, epochs=1, steps_per_epoch=1)
    attack().check(facts)
    with pytest.raises(ConfigError, match=r"attack\.classes=4 .*<= 3"):
        attack(classes=[0, 4]).check(facts)
    with pytest.raises(ConfigError, match=r"attack\.budgets=.*0\.003 of 16 x 16 pixels is less than one"):
        attack(budgets=[0.003]).check(facts)
    with pytest.raises(ConfigError, match=r"attack\.n_images=200 .*<= 100"):
        attack(n_images=200).check(facts)


def test_a_run_looks_for_triggers_once(bench: Callable[..., Any]) -> None:
    """The undefended model is the result, so the second search is found in the cache."""
    words = ["attack=natural", "defense=no_defense", "train.epochs=1", "attack.epochs=2", "attack.budgets=[0.1]"]
    done = bench(*words, "attack.n_images=40", "attack.classes=[0, 1]")
    assert done.code == 0, done.err
    assert set(done.result["metrics"]["asr_per_trigger"]) == {"10%->0", "10%->1"}
    assert done.result["undefended"]["asr"] == done.result["metrics"]["asr"]
    assert done.result["poison"]["n_poisoned"] == 0
    assert done.out.count("natural: 2/2") == 1
