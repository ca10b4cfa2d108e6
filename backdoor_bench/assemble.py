"""Builds what run.py hands around: data with holdout, models, views, evaluator."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from backdoor_bench.cache import Stages
from backdoor_bench.data.checks import holdout_count, split_holdout
from backdoor_bench.data.images import select, to_device
from backdoor_bench.errors import ConfigError
from backdoor_bench.evaluate import Evaluator, Recorder, Truth
from backdoor_bench.models.classifier import Classifier
from backdoor_bench.plan import Plan
from backdoor_bench.training.fit import cross_entropy, resident
from backdoor_bench.training.seeds import derive, generator
from backdoor_bench.training.victim import CachedVictim
from backdoor_bench.types import (
    AttackerView,
    Dataset,
    DefenderView,
    DefenseResult,
    Facts,
    Images,
    ImageSet,
    PoisonedSet,
    Probe,
    Progress,
)


@dataclass(frozen=True)
class Run:
    """What the parts of one run share: where seconds are booked, how progress is told, how a model is made."""

    plan: Plan
    progress: Progress
    seconds: dict[str, float]
    new_model: Callable[[int], Classifier]
    data_hash: str  # of the training images and labels as loaded: another folder's data are another scope

    def stages(self, scope: Any, rows: Any) -> Stages:
        """The stage cache of one scope."""
        return Stages(
            self.plan.cache_dir,
            [scope, self.data_hash],
            self.progress,
            self.seconds,
            rows,
            checkpoint_seconds=self.plan.train.checkpoint_seconds,
            restart=self.plan.restart,
        )


def load(plan: Plan, progress: Progress) -> tuple[Dataset, ImageSet | None]:
    """The data set and the defender's clean holdout (None when holdout.size=0), cut before anything is poisoned.

    With ``holdout.source=seen`` the holdout rows are taken out for the attack and come back, clean, at the end.
    """
    dataset: Dataset = plan.dataset.load(progress)
    asked = plan.config["holdout"]["size"]
    if asked == 0:
        return dataset, None
    size = holdout_count(asked, len(dataset.train))
    if size == 0:
        raise ConfigError(f"holdout.size={asked} of {len(dataset.train)} training images is none: raise it")
    if size >= len(dataset.train):
        raise ConfigError(
            f"holdout.size={size} is not allowed: the training set has {len(dataset.train)} images, so it must lie in "
            f"0..{len(dataset.train) - 1}"
        )
    # From a fixed seed: the holdout is the same for a whole table, whatever the training seed.
    clean = _known_clean(dataset)
    if size >= len(clean):
        raise ConfigError(f"holdout.size={size} is not allowed: {len(clean)} images are not known to be poisoned")
    _, picked = split_holdout(select(dataset.train, clean), size, generator(0, "holdout"))
    held = clean[picked]
    rest_mask = torch.ones(len(dataset.train), dtype=torch.bool)
    rest_mask[held] = False
    rows = rest_mask.nonzero().flatten()
    holdout = select(dataset.train, held)
    names = dataset.file_names
    order = torch.cat([rows, held]) if plan.config["holdout"]["source"] == "seen" else rows
    rest = replace(
        dataset,
        train=select(dataset.train, rows),
        file_names=tuple(names[row] for row in order.tolist()) if names is not None else None,
        known_poison=_take(dataset.known_poison, rows),
        known_cover=_take(dataset.known_cover, rows),
        true_labels=_take(dataset.true_labels, rows),
    )
    return rest, holdout


def _known_clean(dataset: Dataset) -> torch.Tensor:
    """int64 rows that nobody says are poisoned or cover."""
    clean = torch.ones(len(dataset.train), dtype=torch.bool)
    for known in (dataset.known_poison, dataset.known_cover):
        if known is not None:
            clean &= ~known
    return clean.nonzero().flatten()


def _take(values: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    return None if values is None else values[rows]


def prepare_run(
    plan: Plan, dataset: Dataset, progress: Progress, seconds: dict[str, float], holdout: ImageSet | None = None
) -> Run:
    """A Run whose models fit the data; refuses what only the data could tell (their class count and size)."""
    facts = Facts(
        num_classes=dataset.train.num_classes,
        image_size=dataset.train.images.shape[-1],
        train_size=len(dataset.train),
        epochs=plan.train.epochs,
        steps_per_epoch=plan.train.steps_per_epoch(len(dataset.train)),
        holdout_size=len(holdout) if holdout is not None else 0,
        holdout_source=str(plan.config["holdout"]["source"]),
    )
    for part in (plan.model, plan.attack, plan.defense):
        part.check(facts)
    if plan.train.batch_size > len(dataset.train):
        progress.warn(
            f"train.batch_size={plan.train.batch_size} exceeds the {len(dataset.train)} training images: "
            "one batch an epoch"
        )

    return Run(plan, progress, seconds, _model_maker(plan, facts.image_size, plan.seed), _content_hash(dataset.train))


def _model_maker(plan: Plan, image_size: int, seed: int) -> Callable[[int], Classifier]:
    """num_classes -> an untrained model, the same at every call."""

    def new_model(num_classes: int) -> Classifier:
        with torch.random.fork_rng():
            torch.manual_seed(derive(seed, "model"))
            model: Classifier = plan.model.build(
                num_classes, image_size, tuple(plan.dataset.mean), tuple(plan.dataset.std)
            )
        return model

    return new_model


def _content_hash(train: ImageSet) -> str:
    """Hex SHA-256 of images and labels (of a memory-mapped set every hundredth image: the rest stays on disk)."""
    found = hashlib.sha256(train.labels.numpy().tobytes())
    images = train.images
    step = 1 if isinstance(images, torch.Tensor) else 100
    for start in range(0, len(images), 4096 * step):
        rows = torch.arange(start, min(start + 4096 * step, len(images)), step)
        found.update(images[rows].contiguous().numpy().tobytes())
    return found.hexdigest()


class _NoRows:
    """For stages that record no curves."""

    def record(self, row: Any) -> None: ...
    def listen(self, listener: Any) -> None: ...


def attacker_view(run: Run, dataset: Dataset) -> AttackerView:
    """All the attack may see."""
    plan = run.plan
    return AttackerView(
        train=dataset.train,
        num_classes=dataset.train.num_classes,
        # An attacker's own models depend on the attack's seed, not on the victim's.
        new_model=_model_maker(plan, dataset.train.images.shape[-1], plan.attack_seed),
        train_config=plan.train,
        generator=generator(plan.attack_seed, "attack"),
        stages=run.stages([plan.poison_scope(), plan.config["model"], plan.train.key()], _NoRows()),
        learned=run.stages(
            [plan.poison_scope(poisons=False), plan.config["model"], plan.train.key(), plan.attack_seed], _NoRows()
        ),
        device=torch.device(plan.hardware.device),
        progress=run.progress,
    )


def with_holdout(plan: Plan, poisoned: PoisonedSet, holdout: ImageSet | None) -> PoisonedSet:
    """The poisoned set as the defence sees it: with the holdout's rows at its end where ``holdout.source=seen``."""
    if holdout is None or plan.config["holdout"]["source"] == "reserved":
        return poisoned
    count = len(holdout)
    none = torch.zeros(count, dtype=torch.bool)
    return replace(
        poisoned,
        train=_appended(poisoned.train, holdout),
        is_poisoned=torch.cat([poisoned.is_poisoned, none]),
        is_cover=torch.cat([poisoned.is_cover, none]),
        true_labels=torch.cat([poisoned.true_labels, holdout.labels]),
        trigger_id=torch.cat([poisoned.trigger_id, torch.full((count,), -1)]),
    )


def _appended(train: ImageSet, holdout: ImageSet) -> ImageSet:
    """The training set with the holdout's rows at its end."""
    images, extra = train.images, holdout.images
    if not isinstance(images, torch.Tensor) or not isinstance(extra, torch.Tensor):
        raise ConfigError("holdout.source=seen needs data in memory; set holdout.source=reserved")
    return replace(train, images=torch.cat([images, extra]), labels=torch.cat([train.labels, holdout.labels]))


def truth_of(dataset: Dataset, poisoned: PoisonedSet, poisons: bool) -> Truth:
    """What is known of the training rows: the attack's own truth, or what a user says of a folder, or nothing."""
    if poisons or not dataset.untrusted:
        return Truth(poisoned.is_poisoned, poisoned.is_cover)
    if dataset.known_poison is None:
        return Truth(None, None)
    missing = len(poisoned.train) - len(dataset.known_poison)  # a holdout that is seen again
    none = torch.zeros(missing, dtype=torch.bool)
    cover = dataset.known_cover if dataset.known_cover is not None else torch.zeros_like(dataset.known_poison)
    return Truth(torch.cat([dataset.known_poison, none]), torch.cat([cover, none]))


def evaluator_for(run: Run, dataset: Dataset, poisoned: PoisonedSet) -> Evaluator:
    """The evaluator, its test set on the device."""
    hardware = run.plan.hardware
    test = dataset.test
    if test is not None:
        test = replace(to_device(test, torch.device(hardware.device)), labels=test.labels)
    truth = truth_of(dataset, poisoned, run.plan.poisons)
    return Evaluator(test, poisoned.tests, truth, dataset.train.num_classes, hardware, poisoned.tests_of)


def defender_view(run: Run, poisoned: PoisonedSet, holdout: ImageSet | None, recorder: Recorder) -> DefenderView:
    """All the defence may see. Only images, labels and class count of the poisoned set go in."""
    plan = run.plan
    train = replace(poisoned.train, images=_resident(poisoned.train.images, plan))
    train_loss = poisoned.train_loss or cross_entropy(plan.train.label_smoothing)
    stages = run.stages(plan.victim_scope(), recorder)
    victim = CachedVictim(
        train,
        lambda: run.new_model(train.num_classes),
        plan.train,
        lambda: generator(plan.seed, "training"),
        stages,
        recorder,
        run.progress,
        loss_fn=train_loss,
    )
    return DefenderView(
        train=train,
        holdout=holdout,
        num_classes=train.num_classes,
        new_model=run.new_model,
        victim=victim,
        train_config=plan.train,
        train_loss=train_loss,
        generator=generator(plan.seed, "defense"),
        stages=stages,
        probe=_probe_of(recorder),
        device=torch.device(plan.hardware.device),
        progress=_Told(run.progress),
    )


def _probe_of(recorder: Recorder) -> Probe:
    """The recorder without what it has recorded: a defence must not read its own test results back."""

    def probe(
        model: nn.Module | None = None,
        flagged: torch.Tensor | None = None,
        *,
        stage: str,
        epoch: int,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        recorder(model, flagged, stage=stage, epoch=epoch, detail=detail)

    return probe


class _Told:
    """Progress to speak to, not to read: its warnings may name the attack."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def task(self, name: str, total: int) -> AbstractContextManager[Callable[..., None]]:
        return self._progress.task(name, total)

    def say(self, message: str) -> None:
        self._progress.say(message)

    def warn(self, message: str) -> None:
        self._progress.warn(message)


def checked(result: DefenseResult, count: int) -> DefenseResult:
    """The result, if its flags and scores fit the training set; a defence's bug must not pass for a number."""
    for name, kind in (("flagged", torch.bool), ("trusted", torch.bool), ("score", torch.float32)):
        value = getattr(result, name)
        assert value is None or (value.dtype == kind and value.shape == (count,) and value.device.type == "cpu"), (
            f"DefenseResult.{name} must be {kind} [{count}] on the CPU"
        )
    return result


def _resident(images: Images, plan: Plan) -> Images:
    """On the device once, not again in every fit."""
    return resident(images, plan.hardware.resident_gib, torch.device(plan.hardware.device))


def asr_floor(run: Run, evaluator: Evaluator) -> float | None:
    """The ASR of a model of the same recipe and seed that never saw the trigger; None with ``evaluation.floor=never``.

    It is the victim of the unpoisoned set, under the cache key that ``attack=none defense=no_defense`` gives it; if the
    cache does not hold it, the data are loaded again and it is trained.
    """
    plan = run.plan
    if not evaluator.tests or plan.floor == "never":
        return None
    # Its curves would be measured with this attack's trigger: none are kept.
    stages = Stages(plan.cache_dir, [plan.victim_scope(poisons=False), run.data_hash], run.progress, {}, _NoRows())

    def victim(train: ImageSet) -> CachedVictim:
        return CachedVictim(
            train,
            lambda: run.new_model(evaluator.num_classes),
            plan.train,
            lambda: generator(plan.seed, "training"),
            stages,
            lambda *args, **details: None,
            run.progress,
        )

    empty = ImageSet(torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0, dtype=torch.int64), 0)
    clean = victim(empty)
    if not clean.is_cached():
        run.progress.say("training on the clean set for the ASR floor")
        dataset, holdout = load(plan, run.progress)
        seen = holdout is not None and plan.config["holdout"]["source"] == "seen"
        train = _appended(dataset.train, holdout) if seen and holdout is not None else dataset.train
        clean = victim(ImageSet(_resident(train.images, plan), train.labels, train.num_classes))
    floor: float | None = evaluator.model_metrics(clean())["asr"]
    return floor
