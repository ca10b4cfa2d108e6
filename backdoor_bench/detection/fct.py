"""EBD's sample distinguishment: features of poisoned samples move farther when the image is transformed.

A model is trained for a few epochs without augmentation, then fine-tuned by the intra-class loss; the movement of a
sample is |f(x) - f(tau(x))|^2, and the least moved samples are trusted, the most moved ones flagged (EBD sec. 3.2,
Algorithm 2; specs/seed_defenses.md 3.2, 3.3). Training and split, and how they differ from the released code, are in
detection.distinguish; tau is drawn once a sample (not selectable), where that code draws it again to split.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from backdoor_bench.cache import PICTURES
from backdoor_bench.detection.distinguish import KEY, STAGE, EarlyTraining, check_shares, split_by_rank
from backdoor_bench.detection.embedding import EmbeddingSettings, embed
from backdoor_bench.detection.features import extract_features
from backdoor_bench.detection.transforms import BLUR_KERNEL, TRANSFORMS, Composition, Transformed
from backdoor_bench.errors import ConfigError, check_choice, check_flag, check_range
from backdoor_bench.models.classifier import Classifier
from backdoor_bench.training.interrupt import raise_if_requested
from backdoor_bench.training.seeds import derive, generator
from backdoor_bench.types import DefenderView, Facts, Figure, ImageRows, Isolation, SampleMap, ScoreHistogram, SplitGrid

SHOWN = 8  # images in the gallery
CHUNK = 1024  # images transformed at a time for the map
# Of the picture only, so no setting. The same library on every device, and no perplexity that few samples cannot have.
EMBEDDING = EmbeddingSettings(
    backend="opentsne", perplexity=30.0, learning_rate="auto", early_exaggeration=12.0, exaggeration_iter=125,
    iterations=250, early_momentum=0.8, momentum=0.8, neighbors="exact", repulsion="bh", initialisation="pca",
    pca_dims=0, rescale_radius=60.0,
)  # fmt: skip


@dataclass(frozen=True)
class FCTIsolation:
    """norm_passes: how often a step of the fine-tuning moves the batch norms' statistics. transforms: names of
    detection.transforms, applied in this order. alpha_c, alpha_p: shares of the samples that are trusted (least moved;
    None: all that are not flagged) and flagged (most moved). map_samples: that many samples are drawn in a t-SNE map of
    their features before and after tau (0: no map). all_pairs: draw the map of the split under all 36 ordered pairs of
    transformations, too."""

    training: EarlyTraining
    finetune_epochs: int
    norm_passes: int
    transforms: Sequence[str]
    alpha_c: float | None
    alpha_p: float
    map_samples: int
    all_pairs: bool

    honours_train_loss = True  # see EarlyTraining

    def __post_init__(self) -> None:
        check_range(KEY + "finetune_epochs", self.finetune_epochs, 0, 100_000, integer=True)
        together = self.training.epochs + self.finetune_epochs
        if together > self.training.cosine_epochs:
            raise ConfigError(
                f"{KEY}finetune_epochs={self.finetune_epochs} is not allowed: with training.epochs it makes {together} "
                f"epochs, and the schedule ends after training.cosine_epochs={self.training.cosine_epochs}"
            )
        check_range(KEY + "norm_passes", self.norm_passes, 1, 2, integer=True)
        if not isinstance(self.transforms, list | tuple) or not self.transforms:
            raise ConfigError(f"{KEY}transforms={self.transforms!r} is not allowed: give a list, e.g. [rotate, affine]")
        for name in self.transforms:
            check_choice(KEY + "transforms", name, tuple(TRANSFORMS))
        check_shares(self.alpha_c, self.alpha_p)
        check_range(KEY + "map_samples", self.map_samples, 0, 100_000, integer=True)
        check_flag(KEY + "all_pairs", self.all_pairs)

    def check(self, facts: Facts) -> None:
        if not _can_be_blurred(facts.image_size) and (self.all_pairs or "blur" in self.transforms):
            raise ConfigError(
                f"{KEY}transforms=blur (and all_pairs) needs images of at least {BLUR_KERNEL // 2 + 1} px, but they have "
                f"{facts.image_size}"
            )

    def isolate(self, view: DefenderView) -> Isolation:
        """The split by the fine-tuned model; ``score`` is the movement."""
        models = self.training.models(view, self.finetune_epochs, self.norm_passes)
        hardware = view.train_config.hardware
        # Kept, because all pairs of transformations compare with the same features.
        originals = [
            functools.cache(functools.partial(extract_features, model, view.train, hardware, exact=True))
            for model in models
        ]
        chosen = tuple(self.transforms)

        def movement(names: tuple[str, ...], finetuned: bool) -> Mapping[str, Tensor]:
            """``delta`` float32 [N] = |f(x) - f(tau(x))|^2 and ``zero`` bool [N], whose features are all zero."""

            def build() -> Mapping[str, Tensor]:
                features = originals[finetuned]()
                transformed = replace(view.train, images=Transformed(view.train.images, _tau(view, names)))
                moved = extract_features(models[finetuned], transformed, hardware, exact=True)
                return {"delta": (features - moved).square().sum(1), "zero": (features == 0).all(1)}

            stage = STAGE if finetuned and names == chosen else PICTURES
            settings = {**self._trained(), "finetuned": finetuned, "transforms": names}
            return view.stages.tensors(stage, build, settings)

        after = movement(chosen, True)
        split = self._split(view, after["delta"], chosen)
        before = movement(chosen, False)
        figures: list[Figure] = [
            ScoreHistogram(f"fct_{when}", f"FCT {when} the intra-class fine-tuning", found["delta"], "feature movement")
            for when, found in (("before", before), ("after", after))
        ]
        figures.append(_gallery(view))
        if self.map_samples:
            figures.append(self._map(view, models[1], chosen))
        if self.all_pairs:
            figures.append(self._grid(view, lambda names: movement(names, True)["delta"]))
        view.probe(stage=STAGE, epoch=self.training.epochs + self.finetune_epochs, detail={"figures": figures})
        return replace(split, extra={STAGE: _report(split, before, after)})

    def _trained(self) -> dict[str, Any]:
        """What the two models depend on."""
        return {
            "training": asdict(self.training),
            "finetune_epochs": self.finetune_epochs,
            "norm_passes": self.norm_passes,
        }

    def _map(self, view: DefenderView, model: Classifier, names: tuple[str, ...]) -> SampleMap:
        """Some samples before and after tau in one t-SNE map of the model's features (EBD Figs. 1, 7)."""
        seed, count = view.generator.initial_seed(), min(self.map_samples, len(view.train))
        rows = torch.randperm(len(view.train), generator=generator(seed, "fct map"))[:count].sort().values
        settings = replace(EMBEDDING, perplexity=float(max(1, min(EMBEDDING.perplexity, (2 * count - 1) // 3))))

        def build() -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
            hardware = view.train_config.hardware
            moved = Transformed(view.train.images, _tau(view, names))
            features = [
                extract_features(model, replace(view.train, images=images[part]), hardware, exact=True)
                for images in (view.train.images, moved)
                for part in rows.split(CHUNK)
            ]
            made = embed(torch.cat(features), settings, seed % 2**31, hardware.threads, view.device, view.progress.warn)
            # A map of second choice is not kept, as in detection.trap.
            return {"points": made.points}, {"transient": made.backend != settings.backend}

        stage = {**self._trained(), "transforms": names, "map": [count, asdict(settings)]}
        points = view.stages.keep(PICTURES, build, stage).tensors["points"]
        panels = {"training samples": points[:count], f"after {', '.join(names)}": points[count:]}
        return SampleMap("fct_map", "Features of the fine-tuned model, one t-SNE map", rows, panels)

    def _grid(self, view: DefenderView, movement: Callable[[tuple[str, ...]], Tensor]) -> SplitGrid:
        """The split under each ordered pair of transformations, all of the one model."""
        names = tuple(TRANSFORMS)
        pairs = [(one, two) for one in names for two in names]
        splits = {}
        with view.progress.task("pairs", total=len(pairs)) as advance:
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


def _tau(view: DefenderView, names: tuple[str, ...]) -> Composition:
    return Composition(names, derive(view.generator.initial_seed(), "fct transforms"))


def _can_be_blurred(image_size: int) -> bool:
    return image_size > BLUR_KERNEL // 2


def _gallery(view: DefenderView) -> ImageRows:
    """A few training images and what each transformation makes of them (EBD Fig. 10)."""
    rows = torch.linspace(0, len(view.train) - 1, min(SHOWN, len(view.train))).long()
    images = view.train.images[rows]
    shown = {"training image": images}
    for name in TRANSFORMS:
        if name != "blur" or _can_be_blurred(images.shape[-1]):
            shown[name] = _tau(view, (name,))(images, rows.to(images.device))
    pixels = {name: part.cpu().float() / 255 for name, part in shown.items()}
    return ImageRows("fct_transforms", "The transformations, each with one of its draws", pixels)


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
