"""Several triggers or targets in one training set (TRAP VI-G, Table VI): two whole attacks, side by side.

Serves the five ids ``multi_*``, which differ in the attacks they nest and in those attacks' keys. Nothing is said here
of patches or label rules: any attack with a trigger of its own, under any label rule, can be a part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backdoor_bench.attacks.common import (
    MAX_SEED,
    Choice,
    Part,
    Settings,
    all2one,
    any_class,
    assemble,
    choose,
    keep_labels,
    rule_and_test,
)
from backdoor_bench.attacks.nested import Component, built, named
from backdoor_bench.errors import ConfigError, check_choice, check_range
from backdoor_bench.triggers.rows import uniform_of_rows
from backdoor_bench.types import AttackerView, Facts, PoisonedSet, TestCase, Trigger

PARTS = ("first", "second")
TARGETED_RULES = ("all2one", "clean")  # each image has one wanted class, whatever its own


@dataclass(frozen=True)
class Multi:
    """Poisons some rows as the attack ``first`` does, and others as ``second`` does.

    first, second: make the nested attack (``_partial_: true`` in the YAML; a finished attack is taken as well), so that
    what is wrong with it is told under its own key, ``attack.first.<key>``. assignment: ``each`` tests every part by
    itself, and the ASR is the mean; ``random`` is for one trigger with two targets, where a model can serve one of them
    only: every test image is assigned one of the targets, never its own class.

    Cover rows follow each part's ``cover_rate`` and carry its training trigger. What a part does beyond its trigger and
    the shared keys (further kinds of cover rows, test sets of its own) stays out.
    """

    first: partial[Component] | Component
    second: partial[Component] | Component
    seed: int
    assignment: str

    def __post_init__(self) -> None:
        check_range("attack.seed", self.seed, 0, MAX_SEED, integer=True)
        check_choice("attack.assignment", self.assignment, ("each", "random"))
        for name in PARTS:
            object.__setattr__(self, name, built(name, getattr(self, name)))
        if self.assignment == "random":
            self._check_one_trigger()

    def _check_one_trigger(self) -> None:
        first, second = self._parts()
        differing = _differing_keys(first, second)
        if differing:
            raise ConfigError(
                f"attack.assignment='random' is not allowed: it needs one trigger, but attack.first and attack.second "
                f"differ in {', '.join(differing)}; make them equal or set attack.assignment=each"
            )
        if getattr(first, "made_for_target", False):
            raise ConfigError(
                f"attack.assignment='random' is not allowed with {type(first).__name__}: it needs one trigger, and this "
                "attack makes another one for every target class; set attack.assignment=each"
            )
        for name, part in zip(PARTS, (first, second), strict=True):
            if part.label_rule not in TARGETED_RULES:
                raise ConfigError(
                    f"attack.{name}.label_rule={part.label_rule!r} is not allowed with attack.assignment=random: choose "
                    f"{' or '.join(TARGETED_RULES)}, or set attack.assignment=each"
                )
        if first.target_class == second.target_class:
            raise ConfigError(
                f"attack.second.target_class={second.target_class} is attack.first.target_class too, which leaves "
                "attack.assignment=random nothing to assign; choose another"
            )

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if a part cannot fit."""
        for name, part in zip(PARTS, self._parts(), strict=True):
            with named(name):
                part.check(facts)

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with both parts on disjoint rows; ``trigger_id`` is 0 for the first, 1 for the second."""
        taken = torch.zeros(len(view.train), dtype=torch.bool)
        rows: list[Part] = []
        tests: list[TestCase] = []
        for number, (name, part) in enumerate(zip(PARTS, self._parts(), strict=True)):
            with named(name):
                chosen = choose(part, view, taken=taken)
                train_trigger, test_trigger = part.triggers(view)
            rule, test = rule_and_test(part, view.num_classes, test_trigger)
            rows.append(Part(chosen.poison, train_trigger, rule, number))
            rows.append(Part(chosen.cover, train_trigger, keep_labels, number, is_cover=True))
            tests.append(replace(test, name=f"{name}_{test.name}"))  # two parts may have the same target
            taken = _with(taken, chosen)
        cases = tuple(tests) if self.assignment == "each" else self._assigned(tests[0].trigger)
        return assemble(view, rows, cases)

    def _assigned(self, trigger: Trigger) -> tuple[TestCase, ...]:
        """All test images, each with a target drawn for its row; beside it, how often each target is predicted."""
        one, other = (part.target_class for part in self._parts())
        assert one is not None
        assert other is not None

        def rule(labels: Tensor, index: Tensor | None = None) -> Tensor:
            assert index is not None
            drawn = uniform_of_rows(self.seed, "assigned target", index, 1)[:, 0] < 0.5
            to_one = ((labels == other) | drawn.to(labels.device)) & (labels != one)
            return torch.where(to_one, one, other)

        listed = (
            TestCase(f"predicted_{target}", trigger, all2one(target), any_class, target, counts=False)
            for target in (one, other)
        )
        return TestCase("assigned", trigger, rule, any_class), *listed

    def _parts(self) -> tuple[Component, Component]:
        first: Any = self.first
        second: Any = self.second
        return first, second


def _differing_keys(first: Component, second: Component) -> list[str]:
    """In what two parts' triggers differ: their kind, or keys that are not shared by all attacks."""
    if type(first) is not type(second):
        return [f"kind ({type(first).__name__}, {type(second).__name__})"]
    shared = {name for name in vars(Settings) if not name.startswith("_")} - {"seed"}
    return [name for name, value in vars(first).items() if name not in shared and value != getattr(second, name)]


def _with(taken: Tensor, chosen: Choice) -> Tensor:
    """``taken`` (bool [N]) and the rows just chosen."""
    taken = taken.clone()
    taken[torch.cat([chosen.poison, chosen.cover])] = True
    return taken
