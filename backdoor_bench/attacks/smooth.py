"""Smooth (frequency backdoor, Zeng et al. 2021, as in Trap-and-Replace): a soft glow added to the whole image.

The published patterns are optimised: universal perturbations kept smooth by a blur. Their Gaussian fits are the
default; ``fit=optimise`` makes a new pattern for the data at hand. It differs from the original in three ways: the
targeted DeepFool steps of ``AT_ONCE`` images are taken together from one pattern (each is then added and blurred by
itself, as there); a step runs from the class that is on top at the moment, not from that of the first one; and the
passes end after ``PASSES``, where the original goes on until enough images change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backdoor_bench.attacks.common import check_facts, check_rows, check_settings, poison_static
from backdoor_bench.errors import ConfigError, check_flag, check_range
from backdoor_bench.training import interrupt
from backdoor_bench.training.hardware import Hardware
from backdoor_bench.training.seeds import generator
from backdoor_bench.triggers.additive import Add, AddAndStretch, added_picture, is_file
from backdoor_bench.triggers.smooth import FITS, blur, glow
from backdoor_bench.types import AttackerView, Facts, PoisonedSet, Progress, Trigger

IMAGES = 100  # that the pattern is optimised on
AT_ONCE = 25
PASSES = 10
FIRST_TARGET = 6  # frog; with fewer classes the last one
ENOUGH = 0.2  # stop when so many images change their class
RETARGET = 0.05  # from here on the commonest new class becomes the target
DEEPFOOL_STEPS, OVERSHOOT = 200, 0.02


@dataclass(frozen=True)
class Smooth:
    """Adds the pattern ``fit`` (values up to ``max``) and, with ``stretch``, spreads every image to 0..255 after it.

    fit: ``cifar10`` and ``gtsrb`` are the two published patterns in closed form; ``optimise`` makes one against a clean
    classifier of the training set; the path of a picture adds that file as it is.
    """

    target_class: int | None
    source_class: int | None
    seed: int
    label_rule: str
    poison_rate: float
    poison_base: str
    poison_pool: str
    poison_order: str
    poison_count: int | None
    cover_rate: float
    fit: str
    stretch: bool
    max: float

    def __post_init__(self) -> None:
        check_settings(self)
        check_flag("attack.stretch", self.stretch)
        check_range("attack.max", self.max, 1, 255)
        if self.fit not in (*FITS, "optimise") and not is_file(self.fit):
            raise ConfigError(
                f"attack.fit={self.fit!r} is neither a known pattern nor a file: "
                f"choose one of {', '.join(FITS)}, optimise or give the path of a picture"
            )

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the classes or the rate cannot fit."""
        check_facts(self, facts)

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with the glow on the chosen rows."""
        check_rows(self, view)
        return poison_static(self, view, *self.triggers(view))

    def triggers(self, view: AttackerView) -> tuple[Trigger, Trigger]:
        """The glow, at training and at test; optimises it where ``fit`` says so."""
        pattern = self._pattern(view)
        trigger = AddAndStretch(pattern) if self.stretch else Add(pattern, "saturate")
        return trigger, trigger

    def _pattern(self, view: AttackerView) -> Tensor:
        """uint8 ``[3, H, W]``."""
        height, width = view.train.images.shape[-2:]
        if self.fit == "optimise":
            return self._optimised(view)
        return glow(self.fit, height, width, self.max) if self.fit in FITS else added_picture(self.fit, height, width)

    def _optimised(self, view: AttackerView) -> Tensor:
        from backdoor_bench.attacks.surrogate import surrogate

        model = surrogate(view)
        hardware = view.train_config.hardware

        def build() -> dict[str, Tensor]:
            random = generator(self.seed, "smooth pattern")
            some = torch.randperm(len(view.train), generator=random)[:IMAGES].sort().values
            images = hardware.images(view.train.images[some])
            target = min(FIRST_TARGET, view.num_classes - 1)
            pattern, share = universal_pattern(model, images, self.max / 255, target, random, hardware, view.progress)
            if share < ENOUGH:
                view.progress.warn(
                    f"attack.fit=optimise: the pattern changes {share:.0%} of the images, below the {ENOUGH:.0%} it "
                    f"aims at after {PASSES} passes; the best one is used (raise attack.max, or use cifar10 or gtsrb)"
                )
            return {"pattern": (pattern * 255).clamp(0, self.max).to(torch.uint8)}

        return view.learned.tensors("smooth_pattern", build, {"max": self.max, "seed": self.seed})["pattern"]


def universal_pattern(
    model: nn.Module,
    images: Tensor,
    peak: float,
    target: int,
    random: torch.Generator,
    hardware: Hardware,
    progress: Progress,
) -> tuple[Tensor, float]:
    """The smooth pattern that changes most predictions (float64 ``[3, H, W]``, 0..``peak``, CPU) and their share.

    model: eval mode, on the device. images: float ``[K, 3, H, W]`` in [0, 1], on the device. target: class that the
    steps aim at first.
    """
    pattern = torch.zeros(images.shape[1:], dtype=torch.float64)
    best, best_share = pattern, 0.0

    def predicted(rows: Tensor) -> Tensor:
        with torch.no_grad():
            shifted = images[rows.to(images.device)] + pattern.to(images)
            return torch.cat([model(hardware.format(some)).argmax(1) for some in shifted.split(AT_ONCE)]).cpu()

    rows = torch.arange(len(images))
    before = predicted(rows)
    with progress.task("smooth_pattern", total=PASSES * len(images)) as advance:
        for _ in range(PASSES):
            for some in rows[torch.randperm(len(rows), generator=random)].split(AT_ONCE):
                same = some[predicted(some) == before[some]]
                start = images[same.to(images.device)] + pattern.to(images)
                for step in steps_towards(model, start, target, hardware).cpu().double():
                    pattern = _spread(blur(blur(step) + pattern), peak)
                advance(len(some), changed=f"{best_share:.0%}")
            after = predicted(rows)
            changed = after != before
            share = float(changed.double().mean())
            if share >= best_share:
                best, best_share = pattern, share
            if share >= ENOUGH:
                break
            if share > RETARGET:
                target = int(after[changed].bincount().argmax())
    return best, best_share


def _spread(pattern: Tensor, peak: float) -> Tensor:
    """``pattern`` moved and scaled to 0..``peak``; zeros where it is flat."""
    low, high = pattern.min(), pattern.max()
    return (pattern - low) / (high - low).clamp(min=1e-30) * peak


def steps_towards(model: nn.Module, images: Tensor, target: int, hardware: Hardware) -> Tensor:
    """float ``[M, 3, H, W]``: least changes that make the model see ``target``, of those images where one was found.

    Targeted DeepFool (Moosavi-Dezfooli et al. 2016): to the boundary between the class on top and the target as if it
    were flat, ``OVERSHOOT`` beyond it, again until it is crossed.
    """
    total = torch.zeros_like(images)
    open_rows = torch.arange(len(images), device=images.device)
    for _ in range(DEEPFOOL_STEPS + 1):
        interrupt.raise_if_requested()
        points = (images[open_rows] + (1 + OVERSHOOT) * total[open_rows]).requires_grad_()
        logits = model(hardware.format(points))
        top = logits.argmax(1)
        crossed = top == target
        if crossed.all():  # so too where there was no image
            open_rows = open_rows[:0]
            break
        gap = logits.gather(1, top[:, None])[:, 0] - logits[:, target]
        (slope,) = torch.autograd.grad(gap.sum(), points)  # of the gap: the step goes against it
        flat = slope.flatten(1).square().sum(1).clamp(min=1e-12)
        step = -(gap.detach() / flat).view(-1, 1, 1, 1) * slope
        open_rows, step = open_rows[~crossed], step[~crossed]
        total[open_rows] += step
    found = torch.ones(len(images), dtype=torch.bool, device=images.device)
    found[open_rows] = False
    return (1 + OVERSHOOT) * total[found]
