"""What every part speaks: the data that travels and the protocols that methods fulfil.

Nothing is inherited: a method is a frozen dataclass whose fields are its hyper-parameters and which has the one public
method of its protocol. Images are uint8 ``[N, 3, H, W]`` where they are stored or stamped, and float in [0, 1] where a
model computes on them (normalisation is the model's first layer).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from backdoor_bench.cache import Stages
    from backdoor_bench.models.classifier import Classifier
    from backdoor_bench.training.config import TrainConfig
    from backdoor_bench.training.fit import LossFn


class Images(Protocol):
    """What can stand where images stand: a uint8 tensor ``[N, 3, H, W]``, or a memory-mapped set that acts like one."""

    @property
    def shape(self) -> torch.Size: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: Any) -> Tensor: ...


# Float batch [B, 3, H, W] in [0, 1], CPU generator -> the transformed batch.
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class ImageSet:
    """Images with labels as given.

    images: uint8 ``[N, 3, H, W]`` (tensor, or memory-mapped: index it with an int64 tensor or a slice, get a tensor).
    labels: int64 ``[N]`` in 0..num_classes-1. augment: a transform that belongs to these data and is drawn anew in every
    training step on them (the attack ``physical``), after the recipe's own augmentation; ``fit`` applies it, so that no
    defence can lose it.
    """

    images: Images
    labels: Tensor
    num_classes: int
    augment: Augment | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """What a loader returns.

    test is None when the data come without one (a user's folder). file_names: one a training row, or None.
    known_poison, known_cover, true_labels: what a user says of the training rows (bool[N], bool[N], int64[N]) or None.
    untrusted: the rows may be poisoned by somebody else, so what is not known is unknown (else: all clean).
    """

    train: ImageSet
    test: ImageSet | None
    class_names: tuple[str, ...]
    file_names: tuple[str, ...] | None = None
    known_poison: Tensor | None = None
    known_cover: Tensor | None = None
    true_labels: Tensor | None = None
    untrusted: bool = False


@dataclass(frozen=True)
class Facts:
    """What can be known before any data are read; a method's ``check(facts)`` refuses what cannot work.

    num_classes and train_size are None where only the data tell (``dataset=folder``). holdout_source: reserved | seen.
    outline: makes the chosen network without storage (on the meta device), for its blocks and shapes; None where the data
    are there already, so that it was asked before.
    """

    num_classes: int | None
    image_size: int
    train_size: int | None
    epochs: int
    steps_per_epoch: int | None
    holdout_size: int = 0
    holdout_source: str = "reserved"
    outline: Callable[[], Classifier] | None = None


class Trigger(Protocol):
    """uint8 ``[B, 3, H, W]`` -> a new uint8 tensor of the same shape; ``index`` int64 [B] are the row numbers in the
    set that the images come from, for triggers that differ a sample. The input is never changed."""

    def __call__(self, images: Tensor, index: Tensor | None = None) -> Tensor: ...


class LabelRule(Protocol):
    """int64 [B] true labels -> a new int64 [B], the labels the attacker wants; ``index`` int64 [B] are the row numbers,
    for rules that differ a sample."""

    def __call__(self, labels: Tensor, index: Tensor | None = None) -> Tensor: ...


Pool = Callable[[Tensor], Tensor]  # int64 [B] true labels -> bool [B], True = counts for the ASR


@dataclass(frozen=True)
class TestCase:
    """One triggered test set: these images (``pool``), this stamp, this wanted label.

    target_class: the one class the attacker wants, None where there are several. counts: whether it enters the ASR, or
    is only listed in ``asr_per_trigger``. group: cases of one group compete, and the best of them counts (``natural``
    tries every class); by default each case stands for itself.
    """

    __test__ = False  # not a pytest class

    name: str
    trigger: Trigger
    label_rule: LabelRule
    pool: Pool
    target_class: int | None = None
    counts: bool = True
    group: str | None = None


@dataclass(frozen=True)
class StoredCase:
    """A triggered test set that exists already (``attack=import``): images with the labels the attacker wants."""

    name: str
    test: ImageSet
    target_class: int | None = None
    counts: bool = True
    group: str | None = None


@dataclass(frozen=True)
class PoisonedSet:
    """A poisoned training set with the truth about it (which only the evaluator sees).

    is_poisoned: bool[N], trigger and attacker's label. is_cover: bool[N], trigger but true label.
    true_labels: int64[N]. trigger_id: int64[N], -1 where no trigger. originals: clean pixels of the first rows in
    ``example_index`` for the picture of clean/poisoned pairs. train_loss: the loss of plain training where the attacker
    owns it (the attack then has ``controls_training = True``). tests_of: triggers that are looked for in a finished
    model (``natural``); its cases come beside ``tests``.
    """

    train: ImageSet
    is_poisoned: Tensor
    is_cover: Tensor
    true_labels: Tensor
    trigger_id: Tensor
    tests: tuple[TestCase | StoredCase, ...]
    example_index: Tensor
    originals: Tensor
    train_loss: LossFn | None = None
    tests_of: Callable[[nn.Module], tuple[TestCase, ...]] | None = None


class Progress(Protocol):
    """Reports long work: ``with progress.task("embedding", total=5) as advance: advance()``."""

    def task(self, name: str, total: int) -> AbstractContextManager[Callable[..., None]]: ...
    def say(self, message: str) -> None: ...
    def warn(self, message: str) -> None: ...


class Probe(Protocol):
    """Records the metrics of a model (and of a flagged set) at this point of a method; returns nothing, so that nothing
    can be chosen by it. ``stage`` names the curve, ``epoch`` its x value, ``detail`` holds what else belongs to the
    point: numbers for the curve (``loss``), or a map for a picture (``points`` float[N, 2], ``clusters`` int64[N],
    ``flagged`` bool[N], ``report`` plain values: ``epoch``, ``eps``, ``suspicious`` ids, ``table``, ``map``), or
    ``figures``, a sequence of ``Figure``. What a cached step shows is shown again when it is found in the cache: call
    the probe for figures outside of the step, from what the step has stored."""

    def __call__(
        self,
        model: nn.Module | None = None,
        flagged: Tensor | None = None,
        *,
        stage: str,
        epoch: int,
        detail: Mapping[str, Any] | None = None,
    ) -> None: ...


@dataclass(frozen=True, eq=False)
class ScoreHistogram:
    """Scores of all training samples, float[N]; drawn apart for clean and poisoned ones where the truth is known."""

    name: str  # of the file, and unique in a run; the same for every figure below
    title: str
    scores: Tensor
    label: str  # of the score axis


@dataclass(frozen=True, eq=False)
class ImageRows:
    """Rows of images below each other: name of the row -> float [K, 3, H, W] in [0, 1], the same K for all."""

    name: str
    title: str
    rows: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class SplitGrid:
    """One split of the training set for each pair of ``names``; drawn as a map of their clean and poison precision."""

    name: str
    title: str
    names: tuple[str, ...]
    splits: Mapping[tuple[str, str], Isolation]
    axes: tuple[str, str]


@dataclass(frozen=True, eq=False)
class FeatureScatter:
    """``features``: float images [B, 3, H, W] -> [B, D]; drawn as the first two principal components of clean images of
    two classes and of triggered ones, all from the test set."""

    name: str
    title: str
    features: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class SampleMap:
    """Some training samples in the plane: name of the panel -> float [K, 2], where point i is training row ``rows[i]``
    (int64 [K]). The panels are drawn beside each other on the same axes, coloured by given class, poisoned samples
    black where the truth is known."""

    name: str
    title: str
    rows: Tensor
    panels: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Reconstructions:
    """``made``: float images [B, 3, H, W] in [0, 1] -> images of the same shape; drawn below clean test images, and below
    the same with the trigger."""

    name: str
    title: str
    made: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LossLandscape:
    """Loss of ``model`` around one clean and one poisoned training image, where the truth is known."""

    name: str
    title: str
    model: nn.Module


Figure = ScoreHistogram | ImageRows | SplitGrid | FeatureScatter | SampleMap | Reconstructions | LossLandscape


class Victim(Protocol):
    """``victim()`` -> the model trained without defence; ``victim(snapshots=[3, 5])`` -> the models after these epochs.
    Trained once, then loaded; every call returns fresh copies on the device, in eval mode."""

    def __call__(self, snapshots: Sequence[int] | None = None) -> Any: ...
    def is_cached(self) -> bool: ...


@dataclass(frozen=True)
class AttackerView:
    """All an attack may see. ``train`` is the clean training set (without a reserved holdout).

    stages: steps that depend on everything the attack is set to. learned: generators and surrogate models, which depend
    on data, model, recipe and ``attack.seed`` only and are shared by all attacks on them; what else a step depends on
    must stand in its ``settings``.
    """

    train: ImageSet
    num_classes: int
    new_model: Callable[[int], Classifier]
    train_config: TrainConfig
    generator: torch.Generator  # on the CPU, for the choice of samples and everything random in the trigger
    stages: Stages
    learned: Stages
    device: torch.device
    progress: Progress


@dataclass(frozen=True)
class DefenderView:
    """All a defence may see: no test data, no poison mask, no attack name.

    train_loss: the loss of plain training on ``train``, the victim's. A defence that uses it wherever it trains plainly
    says so with ``honours_train_loss = True``; the others are refused with attacks that own the loss.
    """

    train: ImageSet
    holdout: ImageSet | None
    num_classes: int
    new_model: Callable[[int], Classifier]
    victim: Victim
    train_config: TrainConfig
    train_loss: LossFn
    generator: torch.Generator
    stages: Stages
    probe: Probe
    device: torch.device
    progress: Progress


@dataclass(frozen=True)
class Isolation:
    """Which training samples look poisoned.

    flagged: bool[N]. trusted: bool[N] picked as clean, None = the complement of flagged. score: float[N], higher = more
    suspicious, or None. extra: plain numbers, strings, lists, dicts for result.json.
    """

    flagged: Tensor
    trusted: Tensor | None = None
    score: Tensor | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DefenseResult:
    """model: float ``[B, 3, H, W]`` in [0, 1] -> logits (C, or C+1 with the dummy class last); evaluated and saved.
    flagged, trusted, score, extra: as in Isolation; tensors on the CPU."""

    model: nn.Module
    flagged: Tensor | None = None
    trusted: Tensor | None = None
    score: Tensor | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class Attack(Protocol):
    def check(self, facts: Facts) -> None: ...
    def poison(self, view: AttackerView) -> PoisonedSet: ...


class StampingAttack(Attack, Protocol):
    """An attack whose poison is a stamp on chosen rows: its trigger can be used in others (``multi_*``, ``tact``, ...)."""

    def triggers(self, view: AttackerView) -> tuple[Trigger, Trigger]:
        """The trigger at training and at test time; trains what has to be learnt."""
        ...


class Defense(Protocol):
    def check(self, facts: Facts) -> None: ...
    def defend(self, view: DefenderView) -> DefenseResult: ...


class IsolationMethod(Protocol):
    """With ``honours_train_loss = True`` it trains by ``view.train_loss`` or not at all; the others are refused with
    attacks that own the loss."""

    def check(self, facts: Facts) -> None: ...
    def isolate(self, view: DefenderView) -> Isolation: ...


class RemovalMethod(Protocol):
    def check(self, facts: Facts) -> None: ...
    def remove(self, view: DefenderView, model: Classifier, isolation: Isolation) -> nn.Module: ...
