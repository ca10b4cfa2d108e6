"""What every data-poisoning attack shares: label rules, the choice of rows, and the assembly of the poisoned set.

A static attack declares its keys, builds a trigger and calls ``poison_static``. An attack with several triggers,
targets or kinds of cover samples chooses its rows with ``draw`` and hands ``assemble`` one ``Part`` for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, floor
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from backdoor_bench.data.images import replace_rows
from backdoor_bench.errors import ConfigError, check_choice, check_range
from backdoor_bench.types import AttackerView, Facts, ImageSet, LabelRule, PoisonedSet, Pool, TestCase, Trigger

if TYPE_CHECKING:
    from backdoor_bench.training.fit import LossFn

EXAMPLES = 16  # originals kept for the picture of clean and poisoned pairs
CHUNK_VALUES = 2**24  # pixel values stamped at a time: a float64 trigger then needs 128 MiB
MAX_SEED = 2**32 - 1

# Pools that make sense with each label rule; any other pair would poison rows whose label the rule leaves alone, or
# would give the attacker's label to rows that should keep theirs.
RULE_POOLS = {
    "all2one": ("non_target", "all"),
    "all2all": ("all",),
    "source2target": ("source",),
    "clean": ("target",),
}


class Settings(Protocol):
    """The keys that every poisoning attack has under ``attack.`` (see conf/attack/badnets.yaml for their meaning)."""

    @property
    def seed(self) -> int: ...
    @property
    def target_class(self) -> int | None: ...
    @property
    def source_class(self) -> int | None: ...
    @property
    def label_rule(self) -> str: ...
    @property
    def poison_rate(self) -> float: ...
    @property
    def poison_base(self) -> str: ...
    @property
    def poison_pool(self) -> str: ...
    @property
    def poison_order(self) -> str: ...
    @property
    def poison_count(self) -> int | None: ...
    @property
    def cover_rate(self) -> float: ...


# --- label rules and test pools: int64 [B] true labels -> int64 [B] wanted labels, or bool [B] "counts for the ASR" ---


def all2one(target: int) -> LabelRule:
    """Every label becomes ``target``."""
    return lambda labels, index=None: torch.full_like(labels, target)


def all2all(num_classes: int) -> LabelRule:
    """Label y becomes (y + 1) mod ``num_classes``."""
    return lambda labels, index=None: (labels + 1) % num_classes


def keep_labels(labels: Tensor, index: Tensor | None = None) -> Tensor:
    """Labels stay: clean-label poisons and cover samples."""
    return labels.clone()


def source2target(source: int, target: int) -> LabelRule:
    """Label ``source`` becomes ``target``; the others stay."""
    return sub2sub({source: target})


def sub2sub(mapping: Mapping[int, int]) -> LabelRule:
    """Label a becomes ``mapping[a]`` where there is one; the others stay."""

    def rule(labels: Tensor, index: Tensor | None = None) -> Tensor:
        wanted = labels.clone()
        for source, target in mapping.items():
            wanted[labels == source] = target
        return wanted

    return rule


def any_class(labels: Tensor) -> Tensor:
    """All images count."""
    return torch.ones_like(labels, dtype=torch.bool)


def except_class(target: int) -> Pool:
    """Images whose true class is not ``target`` count."""
    return lambda labels: labels != target


def only_classes(*classes: int) -> Pool:
    """Images of these true classes count."""
    return lambda labels: torch.isin(labels, torch.tensor(classes, device=labels.device))


# --- checks ---


def check_settings(settings: Settings, rules: tuple[str, ...] = tuple(RULE_POOLS)) -> None:
    """Raise ConfigError if a shared key cannot work by itself or with another. rules: what the attack allows."""
    check_range("attack.seed", settings.seed, 0, MAX_SEED, integer=True)
    check_choice("attack.label_rule", settings.label_rule, rules)
    check_range("attack.poison_rate", settings.poison_rate, 0, 1)
    check_range("attack.cover_rate", settings.cover_rate, 0, 1)
    check_choice("attack.poison_base", settings.poison_base, ("eligible", "whole"))
    check_choice("attack.poison_pool", settings.poison_pool, ("non_target", "all", "target", "source"))
    check_choice("attack.poison_order", settings.poison_order, ("random", "first"))
    if settings.poison_count is not None:
        check_range("attack.poison_count", settings.poison_count, 1, float("inf"), integer=True)
    pools = RULE_POOLS[settings.label_rule]
    if settings.poison_pool not in pools:
        raise ConfigError(
            f"attack.label_rule={settings.label_rule!r} does not go with attack.poison_pool={settings.poison_pool!r}: "
            f"set attack.poison_pool to {' or '.join(pools)}"
        )
    if settings.label_rule != "all2all" or settings.target_class is not None:
        check_range("attack.target_class", settings.target_class, 0, float("inf"), integer=True)
    if settings.label_rule == "source2target":
        check_range("attack.source_class", settings.source_class, 0, float("inf"), integer=True)
        if settings.source_class == settings.target_class:
            raise ConfigError(f"attack.source_class={settings.source_class} is attack.target_class too; choose another")
    elif settings.source_class is not None:
        raise ConfigError(
            f"attack.source_class={settings.source_class} is used by label_rule=source2target only; set it to null"
        )
    if settings.label_rule == "clean" and settings.poison_rate >= 1:
        raise ConfigError(
            f"attack.poison_rate={settings.poison_rate} is not allowed with a clean-label attack: it must be below 1, "
            "because the target class must keep clean images (attack.poison_base=whole triggers as many as there are)"
        )


def check_facts(settings: Settings, facts: Facts) -> None:
    """Raise ConfigError for what the class count and the size of the training set already rule out."""
    _check_against(settings, facts.num_classes, facts.train_size)


def check_rows(settings: Settings, view: AttackerView) -> None:
    """Raise ConfigError if the labels cannot give the rows that ``choose`` will want; draws nothing.

    For attacks that learn a trigger: what cannot work must be refused before minutes are spent on it.
    """
    labels = view.train.labels.cpu()
    _check_against(settings, view.num_classes, len(labels))
    available = int(poison_pool(settings, labels).sum())
    poison_count(settings, available, len(labels), warn=lambda message: None)  # choose will warn


def _check_against(settings: Settings, num_classes: int | None, train_size: int | None) -> None:
    if num_classes is not None:
        for key, value in (("target_class", settings.target_class), ("source_class", settings.source_class)):
            if value is not None:
                check_range(f"attack.{key}", value, 0, num_classes - 1, integer=True)
    if train_size is None:
        return
    if settings.poison_count is not None:
        check_range("attack.poison_count", settings.poison_count, 1, train_size, integer=True)
    elif _share(settings.poison_rate, train_size) == 0:  # no base is larger than the whole set
        raise _nothing_poisoned(settings, train_size)


def _nothing_poisoned(settings: Settings, base: int) -> ConfigError:
    advice = (
        f"set it to at least {ceil(1e7 / base) / 1e7:g} (at most 1)" if base else "choose another attack.poison_pool"
    )
    return ConfigError(
        f"attack.poison_rate={settings.poison_rate} of {base} images poisons 0 images: {advice} or use attack=none"
    )


# --- which rows ---


def _share(rate: float, base: int) -> int:
    """floor(rate * base) of the rate as it is written: 0.29 of 100 is 29, not the 28 of floating point."""
    return floor(Fraction(str(rate)) * base)


def _rounded_down(fraction: float) -> str:
    return f"{floor(fraction * 10_000) / 10_000:g}"


def poison_pool(settings: Settings, labels: Tensor) -> Tensor:
    """bool ``[N]``: the rows that ``attack.poison_pool`` lets be poisoned, from the true labels int64 ``[N]``."""
    if settings.poison_pool == "all":
        return any_class(labels)
    chosen = settings.source_class if settings.poison_pool == "source" else settings.target_class
    assert chosen is not None  # check_settings
    return labels != chosen if settings.poison_pool == "non_target" else only_classes(chosen)(labels)


def poison_count(
    settings: Settings, available: int, total: int, warn: Callable[[str], None], eligible: int | None = None
) -> int:
    """How many rows to poison when ``available`` of ``total`` rows can be had from the pool, at least 1.

    eligible: size of the pool where another trigger has taken some of its rows, default ``available``.

    The share of ``attack.poison_base`` (the pool, or the whole set), rounded down, unless ``attack.poison_count`` says
    it. A pool of one class that cannot fill a share of the whole set gives all it has, with a warning (so do
    Trap-and-Replace and MeCa); any other request that is too large is a ConfigError.
    """
    eligible = available if eligible is None else eligible
    base = eligible if settings.poison_base == "eligible" else total
    wanted = settings.poison_count if settings.poison_count is not None else _share(settings.poison_rate, base)
    if wanted == 0 or available == 0:
        raise _nothing_poisoned(settings, base if available else 0)
    if wanted <= available:
        return wanted
    if settings.poison_count is not None:
        key, asked, most = "attack.poison_count", str(settings.poison_count), str(available)
    else:
        key, asked, most = "attack.poison_rate", str(settings.poison_rate), _rounded_down(available / base)
    if settings.poison_base == "whole" and settings.poison_pool in ("target", "source"):
        warn(
            f"{key}={asked} asks for {wanted} images, but the {settings.poison_pool} class has {available}; "
            "all of them are poisoned"
        )
        return available
    raise ConfigError(
        f"{key}={asked} asks for {wanted} images, but attack.poison_pool={settings.poison_pool} has {available}; "
        f"set it to at most {most}"
    )


def draw(candidates: Tensor, count: int, order: str, generator: torch.Generator) -> Tensor:
    """int64 ``[count]``, ascending: rows of the mask ``candidates`` (bool ``[N]``), at random or the first ones."""
    rows = candidates.nonzero().flatten()
    assert count <= len(rows)
    if order == "first":
        return rows[:count]
    return rows[torch.randperm(len(rows), generator=generator)[:count]].sort().values


def draw_cover(settings: Settings, candidates: Tensor, generator: torch.Generator, count: int | None = None) -> Tensor:
    """int64, ascending: ``attack.cover_rate`` of the whole set, or ``count`` rows, of ``candidates`` (bool ``[N]``)."""
    wanted, available = _share(settings.cover_rate, len(candidates)) if count is None else count, int(candidates.sum())
    if wanted > available and count is not None:
        raise ConfigError(
            f"the attack asks for {wanted} cover images, but only {available} remain; lower attack.poison_rate or the "
            "share of cover images"
        )
    if wanted > available:
        raise ConfigError(
            f"attack.cover_rate={settings.cover_rate} asks for {wanted} images, but only {available} remain; "
            f"set it to at most {_rounded_down(available / len(candidates))} or lower attack.poison_rate"
        )
    return draw(candidates, wanted, "random", generator)


# --- the poisoned set ---


@dataclass(frozen=True, eq=False)
class Part:
    """Rows (int64) that get one trigger and one label rule. Cover rows carry the trigger but are not poison."""

    index: Tensor
    trigger: Trigger
    label_rule: LabelRule
    trigger_id: int = 0
    is_cover: bool = False


def assemble(view: AttackerView, parts: Sequence[Part], tests: tuple[TestCase, ...]) -> PoisonedSet:
    """The training set with the rows of ``parts`` stamped and relabelled, and the truth about it.

    Rows of different parts must not overlap. Stamped rows are made once and cached under the stage ``poisoned_set``;
    every other row keeps its pixels and label. The masks and ``trigger_id`` are on the CPU.
    """
    train = view.train
    stored = view.stages.tensors("poisoned_set", lambda: _stamp(train, parts))
    index, is_cover = stored["index"], stored["is_cover"]
    poisoned_index = index[~is_cover]
    example_index = poisoned_index[:EXAMPLES]
    labels = train.labels.clone()
    labels[index.to(labels.device)] = stored["labels"].to(labels.device)
    count = len(train)
    return PoisonedSet(
        train=replace(train, images=replace_rows(train.images, index, stored["rows"]), labels=labels),
        is_poisoned=_mask(count, poisoned_index),
        is_cover=_mask(count, index[is_cover]),
        true_labels=train.labels,
        trigger_id=torch.full((count,), -1).scatter(0, index, stored["trigger_id"]),
        tests=tests,
        example_index=example_index,
        originals=train.images[example_index].cpu(),
    )


def unpoisoned(
    view: AttackerView,
    tests: tuple[TestCase, ...] = (),
    *,
    train_loss: LossFn | None = None,
    tests_of: Callable[[nn.Module], tuple[TestCase, ...]] | None = None,
) -> PoisonedSet:
    """The training set as it is, with empty truth: no attack, or one that does not write its poison into the set."""
    nothing = torch.zeros(len(view.train), dtype=torch.bool)
    return PoisonedSet(
        train=view.train,
        is_poisoned=nothing,
        is_cover=nothing.clone(),
        true_labels=view.train.labels,
        trigger_id=torch.full((len(view.train),), -1),
        tests=tests,
        example_index=torch.empty(0, dtype=torch.int64),
        originals=torch.empty(0, *view.train.images.shape[1:], dtype=torch.uint8),
        train_loss=train_loss,
        tests_of=tests_of,
    )


def _mask(count: int, index: Tensor) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool)
    mask[index] = True
    return mask


def _stamp(train: ImageSet, parts: Sequence[Part]) -> dict[str, Tensor]:
    """What the stage stores: rows in ascending order of ``index``, with their new labels."""
    owner = torch.full((len(train),), -1)
    for number, part in enumerate(parts):
        assert bool((owner[part.index] == -1).all()), "a row may carry one trigger only"
        owner[part.index] = number
    index = (owner >= 0).nonzero().flatten()
    owner = owner[index]
    true_labels = train.labels.cpu()[index]
    labels = true_labels.clone()
    rows = torch.empty(len(index), *train.images.shape[1:], dtype=torch.uint8)
    chunk = max(1, CHUNK_VALUES // rows[:1].numel())
    for number, part in enumerate(parts):
        mine = (owner == number).nonzero().flatten()
        labels[mine] = part.label_rule(true_labels[mine], index[mine])
        for some in mine.split(chunk):
            rows[some] = part.trigger(train.images[index[some]], index[some]).cpu()
    return {
        "index": index,
        "rows": rows,
        "labels": labels,
        "is_cover": torch.tensor([part.is_cover for part in parts], dtype=torch.bool)[owner],
        "trigger_id": torch.tensor([part.trigger_id for part in parts], dtype=torch.int64)[owner],
    }


@dataclass(frozen=True, eq=False)
class Choice:
    """The rows an attack poisons, and those it stamps without changing their label; int64, ascending, disjoint."""

    poison: Tensor
    cover: Tensor


def choose(
    settings: Settings,
    view: AttackerView,
    *,
    taken: Tensor | None = None,
    cover_from: Tensor | None = None,
    cover_count: Callable[[int], int] | None = None,
) -> Choice:
    """Rows as the shared keys say; poison rows first, then cover rows from those that remain.

    The choice depends on ``view.generator`` alone. taken: bool ``[N]``, rows that another trigger has. cover_from: bool
    ``[N]``, where cover rows may come from, default all rows. cover_count: number of cover rows given that of poison
    rows, default ``attack.cover_rate`` of the whole set. Cover rows of a clean-label attack are not of the target class:
    there they would be poison.
    """
    labels = view.train.labels.cpu()
    _check_against(settings, view.num_classes, len(labels))
    if settings.label_rule == "all2all" and settings.target_class is not None:
        view.progress.warn("attack.target_class is ignored: label_rule=all2all wants every class")
    free = ~taken if taken is not None else torch.ones(len(labels), dtype=torch.bool)
    pool = poison_pool(settings, labels)
    base = int(pool.sum())
    pool &= free
    count = poison_count(settings, int(pool.sum()), len(labels), view.progress.warn, base)
    index = draw(pool, count, settings.poison_order, view.generator)
    remaining = free & ~_mask(len(labels), index)
    if cover_from is not None:
        remaining &= cover_from
    if settings.label_rule == "clean":
        remaining &= labels != settings.target_class
    wanted = cover_count(len(index)) if cover_count is not None else None
    return Choice(index, draw_cover(settings, remaining, view.generator, wanted))


def poison_static(
    settings: Settings,
    view: AttackerView,
    trigger: Trigger,
    test_trigger: Trigger | None = None,
    *,
    cover_trigger: Trigger | None = None,
    **rows: Any,
) -> PoisonedSet:
    """The poisoned set of an attack with one trigger. test_trigger, cover_trigger: where they differ from the one that
    poison rows get. rows: keywords of ``choose``."""
    chosen = choose(settings, view, **rows)
    train_rule, test = rule_and_test(settings, view.num_classes, test_trigger or trigger)
    parts = (
        Part(chosen.poison, trigger, train_rule),
        Part(chosen.cover, cover_trigger or trigger, keep_labels, is_cover=True),
    )
    return assemble(view, parts, (test,))


def rule_and_test(settings: Settings, num_classes: int, trigger: Trigger) -> tuple[LabelRule, TestCase]:
    """The rule for training labels, and the test set whose images count for the ASR (attacks.md section 4)."""
    if settings.label_rule == "all2all":
        rule = all2all(num_classes)
        return rule, TestCase("all2all", trigger, rule, any_class)
    target = settings.target_class
    assert target is not None
    if settings.label_rule == "source2target":
        assert settings.source_class is not None
        rule = source2target(settings.source_class, target)
        name, pool = f"{settings.source_class}_to_{target}", only_classes(settings.source_class)
        return rule, TestCase(name, trigger, rule, pool, target)
    train_rule = keep_labels if settings.label_rule == "clean" else all2one(target)
    return train_rule, TestCase(f"to_{target}", trigger, all2one(target), except_class(target), target)
