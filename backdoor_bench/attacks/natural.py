"""The natural trigger (TRAP Table II, after NONE and ABS): nothing is poisoned, a small patch is looked for afterwards.

A model of clean data has inputs that send any image to some class. For a budget of pixels and a class, mask and pattern
of a patch are optimised on training images; the best class of a budget is what the model can be attacked with, and the
mean over the budgets is the ASR. This is the plain equivalent of NONE's procedure (attacks.md A24): cross-entropy to
the class in place of ten candidate neurons, every class in place of theirs. Two choices of ours: the cross-entropy is
summed over the batch, as NONE's target logits are, so that its penalties weigh what they weigh there; and the finished
patch keeps the strongest pixels where the search ended above its budget.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import floor, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.attacks.common import MAX_SEED, all2one, except_class, unpoisoned
from backdoor_bench.data.augment import Augmentation
from backdoor_bench.data.images import select
from backdoor_bench.errors import ConfigError, check_range
from backdoor_bench.inference import predict
from backdoor_bench.storage import Checkpoints, digest
from backdoor_bench.training.config import TrainConfig
from backdoor_bench.training.fit import Batch, LossFn, fit
from backdoor_bench.training.seeds import generator
from backdoor_bench.triggers.patch import Patch
from backdoor_bench.triggers.pixels import to_uint8
from backdoor_bench.types import AttackerView, Facts, ImageSet, PoisonedSet, TestCase

COUNTED = 0.01  # NONE: a pixel is used where the mask is above this ...
KEPT = 0.1  # ... and stays in the patch where its square is
FAR = 1.2  # NONE: how far above the budget the penalty is at its largest
# Pixel values stamped in one step: one search of 80 images of 32 px, or 17. More are no faster on a CPU, and need 10 MiB
# an image in ResNet-18, 85 in DenseNet-161.
VALUES_CPU, VALUES_GPU = 2**18, 2**22


@dataclass(frozen=True)
class Natural:
    """Leaves the training set as it is, and tests a finished model with patches found in it.

    budgets: shares of the image's pixels. classes: the targets that are tried, ``all`` or a list. penalties: of a unit
    of the mask's sum below the budget, above it, and above 1.2 times it. n_images training images, the same for every
    search, go through ``epochs`` of Adam with ``lr``.
    """

    seed: int
    budgets: list[float]
    classes: str | list[int]
    penalties: list[float]
    epochs: int
    lr: float
    n_images: int
    batch_size: int

    poisons = False

    def __post_init__(self) -> None:
        check_range("attack.seed", self.seed, 0, MAX_SEED, integer=True)
        _check_list("attack.budgets", self.budgets, "shares of the image, e.g. [0.12, 0.06]")
        for budget in self.budgets:
            check_range("attack.budgets", budget, 0, 1, low_open=True)
        if self.classes != "all":
            _check_list("attack.classes", self.classes, "all, or class numbers, e.g. [0, 1]")
            for target in self.classes:
                check_range("attack.classes", target, 0, float("inf"), integer=True)
        if not isinstance(self.penalties, list) or len(self.penalties) != 3:
            raise ConfigError(f"attack.penalties={self.penalties!r} is not allowed: give three numbers >= 0")
        for penalty in self.penalties:
            check_range("attack.penalties", penalty, 0, float("inf"), high_open=True)
        check_range("attack.epochs", self.epochs, 1, 100_000, integer=True)
        check_range("attack.lr", self.lr, 0, 1000, low_open=True)
        check_range("attack.n_images", self.n_images, 1, float("inf"), integer=True)
        check_range("attack.batch_size", self.batch_size, 1, 1_000_000, integer=True)

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if a class does not exist, a budget holds no pixel, or there are too few images."""
        if self.classes != "all" and facts.num_classes is not None:
            for target in self.classes:
                check_range("attack.classes", target, 0, facts.num_classes - 1, integer=True)
        for budget in self.budgets:
            if budget * facts.image_size**2 < 1:
                raise ConfigError(
                    f"attack.budgets={self.budgets} is not allowed: {budget:g} of {facts.image_size} x "
                    f"{facts.image_size} pixels is less than one; give at least {1 / facts.image_size**2:.2g}"
                )
        if facts.train_size is not None:
            check_range("attack.n_images", self.n_images, 1, facts.train_size, integer=True)

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The clean set, with ``tests_of`` that looks for the triggers of a finished model."""
        return unpoisoned(view, tests_of=lambda model: self._tests_of(model, view))

    def _tests_of(self, model: nn.Module, view: AttackerView) -> tuple[TestCase, ...]:
        """One test case a budget and class; the classes of a budget are one group."""
        frozen = copy.deepcopy(model).to(view.device).eval().requires_grad_(False)
        rows = torch.randperm(len(view.train), generator=generator(self.seed, "natural images"))[: self.n_images]
        images = select(replace(view.train, augment=None), rows.sort().values)
        recipe = self._recipe(view.train_config)
        subject = _identity(frozen, images, recipe)
        targets = self.classes if isinstance(self.classes, list) else range(view.num_classes)
        wanted = [(budget, target) for budget in self.budgets for target in targets]
        room = VALUES_CPU if view.device.type == "cpu" else VALUES_GPU
        at_once = max(1, room // (self.batch_size * images.images.shape[1:].numel()))
        cases: list[TestCase] = []
        for start in range(0, len(wanted), at_once):
            some = wanted[start : start + at_once]
            search = self._fitted(
                Searches(some, images.images.shape[-1], self.seed), frozen, images, recipe, view, subject
            )
            cases += [
                _case(budget, target, patch) for (budget, target), patch in zip(some, search.patches(), strict=True)
            ]
        return tuple(cases)

    def _fitted(
        self,
        search: Searches,
        model: nn.Module,
        images: ImageSet,
        recipe: TrainConfig,
        view: AttackerView,
        subject: str,
    ) -> Searches:
        search = search.to(view.device)
        stream = generator(self.seed, "natural batches")  # the same batches for every search, however they are grouped

        def train(checkpoints: Checkpoints) -> None:
            fit(
                search,
                images,
                recipe,
                generator=stream,
                stage="natural",
                progress=view.progress,
                loss_fn=self._loss(model),
                checkpoints=checkpoints,
            )

        own = [self.epochs, self.lr, self.n_images, self.batch_size, self.penalties]
        view.learned.fitted("natural", search, train, {"searches": search.wanted, "own": own, "model": subject})
        return search

    def _recipe(self, base: TrainConfig) -> TrainConfig:
        return replace(
            base,
            epochs=self.epochs,
            batch_size=self.batch_size,
            drop_last=False,
            optimizer="adam",
            lr=self.lr,
            betas=(0.9, 0.999),
            weight_decay=0.0,
            nesterov=False,
            schedule="constant",
            warmup_epochs=0.0,
            warmup_from=0.0,
            lr_min=0.0,
            label_smoothing=0.0,
            augment=Augmentation(0, False, 0.0, 0),
        )

    def _loss(self, model: nn.Module) -> LossFn:
        """Sum over searches and images of the cross-entropy to the target, and each mask's sum times its penalty."""
        below, above, far = self.penalties

        def loss_fn(search: nn.Module, batch: Batch) -> Tensor:
            stamped, masks, budgets, targets = search(batch.images)
            logits = model(stamped.flatten(0, 1)).float()
            wanted = targets.repeat_interleave(stamped.shape[1])
            used = (masks > COUNTED).sum((1, 2))
            weight = torch.where(used > budgets, above, below)
            weight = torch.where(used > FAR * budgets, far, weight)
            return F.cross_entropy(logits, wanted, reduction="sum") + (weight * masks.sum((1, 2))).sum()

        return loss_fn


class Searches(nn.Module):
    """Masks and patterns under optimisation, one for each (budget, class) of ``wanted``: ``[S, H, W]``, ``[S, 3, H, W]``.

    Both are tanh(raw) / 2 + 0.5. A mask starts as a square of 0.8 times the budget's side, from the centre on; a pattern
    starts at random (its own stream: what is searched beside it changes nothing).
    """

    budgets: Tensor
    targets: Tensor

    def __init__(self, wanted: Sequence[tuple[float, int]], size: int, seed: int) -> None:
        super().__init__()
        self.wanted = [list(pair) for pair in wanted]
        pixels = [budget * size**2 for budget, _ in wanted]
        masks = torch.full((len(wanted), size, size), -4.0)
        patterns = torch.empty(len(wanted), 3, size, size)
        for number, (budget, target) in enumerate(wanted):
            end = size // 2 + max(1, floor(0.8 * sqrt(pixels[number])))
            masks[number, size // 2 : end, size // 2 : end] = 2.0
            patterns[number].uniform_(-1, 1, generator=generator(seed, f"natural pattern {budget:g} {target}"))
        self.raw_masks, self.raw_patterns = nn.Parameter(masks), nn.Parameter(patterns)
        self.register_buffer("budgets", torch.tensor(pixels), persistent=False)
        self.register_buffer("targets", torch.tensor([target for _, target in wanted]), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(stamped [S, B, 3, H, W], masks [S, H, W], budgets in pixels [S], targets [S]) for float images [B, 3, H, W]."""
        masks, patterns = self._shown()
        opacity = masks[:, None, None]
        return images * (1 - opacity) + patterns[:, None] * opacity, masks, self.budgets, self.targets

    def _shown(self) -> tuple[Tensor, Tensor]:
        return self.raw_masks.tanh() / 2 + 0.5, self.raw_patterns.tanh() / 2 + 0.5

    @torch.no_grad()
    def patches(self) -> list[Patch]:
        """The finished patches: opaque where the mask's square exceeds 0.01, never more pixels than the budget."""
        masks, patterns = (values.cpu() for values in self._shown())
        found = []
        for mask, pattern, budget in zip(masks, patterns, self.budgets.tolist(), strict=True):
            kept = torch.zeros(mask.numel(), dtype=torch.bool)
            kept[mask.flatten().topk(floor(budget)).indices] = True
            found.append(Patch(to_uint8(pattern * 255), kept.view_as(mask) & (mask > KEPT), 0, 0))
        return found


def _case(budget: float, target: int, patch: Patch) -> TestCase:
    group = f"{100 * budget:g}%"
    return TestCase(f"{group}->{target}", patch, all2one(target), except_class(target), target, group=group)


def _identity(model: nn.Module, images: ImageSet, recipe: TrainConfig) -> str:
    """What a search depends on beside its settings: the weights, and, where a model hides some of what it does from its
    weights, its predictions on the images."""
    found = hashlib.sha256(type(model).__qualname__.encode())
    for name, value in model.state_dict().items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest([found.hexdigest(), predict(model, images.images, recipe.hardware).tolist()])


def _check_list(key: str, values: object, meaning: str) -> None:
    """Raise ConfigError unless ``values`` is a list of different things."""
    if not isinstance(values, list) or not values or len(set(map(str, values))) != len(values):
        raise ConfigError(f"{key}={values!r} is not allowed: give different {meaning}")
