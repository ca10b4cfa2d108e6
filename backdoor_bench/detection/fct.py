"""EBD's sample distinguishment: features of poisoned samples move farther when the image is transformed.

A model is trained for a few epochs without augmentation, then fine-tuned by the intra-class loss; the movement of a
sample is |f(x) - f(tau(x))|^2, and the least moved samples are trusted, the most moved ones flagged (EBD sec. 3.2,
Algorithm 2; specs/seed_defenses.md 3.2, 3.3). Training and split, and how they differ from the released code, are in
detection.distinguish; tau is drawn once a sample, where that code draws it again to split.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from backdoor_bench.detection.distinguish import KEY, STAGE, EarlyTraining, check_shares, split_by_rank
from backdoor_bench.detection.features import extract_features
from backdoor_bench.detection.transforms import BLUR_KERNEL, TRANSFORMS, Composition, Transformed
from backdoor_bench.errors import ConfigError, check_choice, check_flag, check_range
from backdoor_bench.training.interrupt import raise_if_requested
from backdoor_bench.training.seeds import derive, generator
from backdoor_bench.types import DefenderView, Facts, Figure, Isolation, ScoreHistogram, SplitGrid

PAIRS = "pairs"


@dataclass(frozen=True)
class FCTIsolation:
    """transforms: names of detection.transforms, applied in this order. alpha_c, alpha_p: shares of the samples that
    are trusted (least moved; None: all that are not flagged) and flagged (most moved). all_pairs: draw the map of the
    split under all 36 ordered pairs of transformations, too."""

    training: EarlyTraining
    finetune_epochs: int
    transforms: Sequence[str]
    alpha_c: float | None
    alpha_p: float
    all_pairs: bool

    def __post_init__(self) -> None:
        check_range(KEY + "finetune_epochs", self.finetune_epochs, 0, 100_000, integer=True)
        together = self.training.epochs + self.finetune_epochs
        if together > self.training.cosine_epochs:
            raise ConfigError(
                f"{KEY}finetune_epochs={self.finetune_epochs} is not allowed: with training.epochs it makes {together} "
                f"epochs, and the schedule ends after training.cosine_epochs={self.training.cosine_epochs}"
            )
        if not isinstance(self.transforms, list | tuple) or not self.transforms:
            raise ConfigError(f"{KEY}transforms={self.transforms!r} is not allowed: give a list, e.g. [rotate, affine]")
        for name in self.transforms:
            check_choice(KEY + "transforms", name, tuple(TRANSFORMS))
        check_shares(self.alpha_c, self.alpha_p)
        check_flag(KEY + "all_pairs", self.all_pairs)

    def check(self, facts: Facts) -> None:
        least = BLUR_KERNEL // 2 + 1
        if facts.image_size < least and (self.all_pairs or "blur" in self.transforms):
            raise ConfigError(
                f"{KEY}transforms=blur (and all_pairs) needs images of at least {least} px, but they have "
                f"{facts.image_size}"
            )

    def isolate(self, view: DefenderView) -> Isolation:
        """The split by the fine-tuned model; ``score`` is the movement."""
        models = self.training.models(view, self.finetune_epochs)
        hardware = view.train_config.hardware
        # Kept, because all pairs of transformations compare with the same features.
        originals = [
            functools.cache(functools.partial(extract_features, model, view.train, hardware)) for model in models
        ]
        chosen = tuple(self.transforms)

        def movement(names: tuple[str, ...], finetuned: bool) -> Mapping[str, Tensor]:
            """``delta`` float32 [N] = |f(x) - f(tau(x))|^2 and ``zero`` bool [N], whose features are all zero."""

            def build() -> Mapping[str, Tensor]:
                features = originals[finetuned]()
                tau = Composition(names, derive(view.generator.initial_seed(), "fct transforms"))
                transformed = replace(view.train, images=Transformed(view.train.images, tau))
                moved = extract_features(models[finetuned], transformed, hardware)
                return {"delta": (features - moved).square().sum(1), "zero": (features == 0).all(1)}

            settings = {"training": asdict(self.training), "finetune_epochs": self.finetune_epochs}
            stage = STAGE if names == chosen else PAIRS  # the map is no part of the defence's time
            return view.stages.tensors(stage, build, {**settings, "finetuned": finetuned, "transforms": names})

        before, after = movement(chosen, False), movement(chosen, True)
        figures: list[Figure] = [
            ScoreHistogram(f"fct_{when}", f"FCT {when} the intra-class fine-tuning", found["delta"], "feature movement")
            for when, found in (("before", before), ("after", after))
        ]
        if self.all_pairs:
            figures.append(self._grid(view, lambda names: movement(names, True)["delta"]))
        view.probe(stage=STAGE, epoch=self.training.epochs + self.finetune_epochs, detail={"figures": figures})
        split = self._split(view, after["delta"], chosen)
        return replace(split, extra={STAGE: _report(split, before, after)})

    def _grid(self, view: DefenderView, movement: Callable[[tuple[str, ...]], Tensor]) -> SplitGrid:
        """The split under each ordered pair of transformations, all of the one model."""
        names = tuple(TRANSFORMS)
        pairs = [(one, two) for one in names for two in names]
        splits = {}
        with view.progress.task(PAIRS, total=len(pairs)) as advance:
            for pair in pairs:
                raise_if_requested()
                splits[pair] = self._split(view, movement(pair), pair)
                advance()
        axes = ("first transformation", "second transformation")
        return SplitGrid("fct_pairs", "Samples told apart by two transformations", names, splits, axes)

    def _split(self, view: DefenderView, delta: Tensor, names: tuple[str, ...]) -> Isolation:
        stream = generator(view.generator.initial_seed(), f"fct ties {' '.join(names)}")
        flagged, trusted = split_by_rank(delta, self.alpha_c, self.alpha_p, stream)
        return Isolation(flagged, trusted, delta)


def _report(split: Isolation, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Any]:
    """Thresholds, and the shares that tell a collapse of the features (specs/seed_defenses.md 3.11)."""
    delta = after["delta"]
    trusted = split.trusted if split.trusted is not None else ~split.flagged
    return {
        "gamma_c": float(delta[trusted].max()) if trusted.any() else None,
        "gamma_p": float(delta[split.flagged].min()) if split.flagged.any() else None,
        "zero_feature_share": float(after["zero"].float().mean()),
        "zero_feature_share_before": float(before["zero"].float().mean()),
        "zero_movement_share": float((delta == 0).float().mean()),
        "zero_movement_share_before": float((before["delta"] == 0).float().mean()),
    }
