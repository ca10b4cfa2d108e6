"""TRAP's poisoned sample isolation: early in training, poison is a cluster of its own in the feature space.

After each of several early epochs of the undefended training, the penultimate features of all training samples are
embedded in the plane by t-SNE and clustered by DBSCAN; suspicious clusters are flagged, and the union over the epochs
is the result (TRAP sec. IV-A, Algorithm 1; rule and noise: specs/seed_defenses.md 1.4).

Deviations from the paper, each a key: ``detect_epochs`` 5 (paper 10), ``first_detection_step`` (the paper starts after
epoch 1, which on small sets is long before a trigger is learnt), ``detect_every``, ``scale_min_samples``,
``scale_iterations``, ``one_class_share``. ``paper=trap`` sets the paper's values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from backdoor_bench.detection.clusters import REFERENCE_SIZE
from backdoor_bench.detection.embedding import EmbeddingSettings, embed, resolved_backend
from backdoor_bench.errors import ConfigError, check_choice, check_range
from backdoor_bench.models.classifier import Classifier
from backdoor_bench.training.config import TrainConfig
from backdoor_bench.training.fit import epochs_for_steps
from backdoor_bench.training.interrupt import raise_if_requested
from backdoor_bench.types import DefenderView, Facts, Isolation

# Steps until small_cnn has learnt a 3x3 trigger with random crops (CIFAR-10) and without (photo_digits).
STEPS_WITH_CROP, STEPS_WITHOUT_CROP = 1500, 120
SCALE_BELOW = 20_000
FEWEST_ITERATIONS = 75
SMALL = 5_000  # samples, for which the fewest iterations are enough
MUCH_FLAGGED = 0.3


@dataclass(frozen=True)
class TrapIsolation:
    """detect_epochs: number of detection epochs (E_d). first_detection_step: detection starts after the first epoch
    that completes so many optimiser steps; 0 = after epoch 1 (paper); ``auto`` = 1,500 where the recipe crops at
    random, else 120. detect_every: epochs between detections. eps, min_samples: DBSCAN's, in units of the map.
    scale_min_samples: true|false|auto (auto: below 20,000 samples), min_samples then grows with sqrt(N / 50,000).
    scale_iterations: the same choices; t-SNE then takes half of its exaggerated and N / 50,000 of its other iterations
    (at least 75, and 75 x 5,000 / N below 5,000 samples). A map grows with its iterations, and eps is a length in it:
    176 wide with 50,000 samples and all iterations, 55-75 with 5,000 and 75, about equally dense.
    rule: one_or_all|not_largest. one_class_share: share of one label from which a cluster counts as one class.
    noise: benign|suspicious. reducer: tsne|pca|svd.
    """

    detect_epochs: int
    first_detection_step: int | str
    detect_every: int
    eps: float
    min_samples: int
    scale_min_samples: bool | str
    scale_iterations: bool | str
    rule: str
    one_class_share: float
    noise: str
    reducer: str
    embedding: EmbeddingSettings

    honours_train_loss = True  # it reads the undefended training

    def __post_init__(self) -> None:
        key = "defense.isolation."
        check_range(key + "detect_epochs", self.detect_epochs, 1, 100_000, integer=True)
        if self.first_detection_step != "auto":
            check_range(key + "first_detection_step", self.first_detection_step, 0, float("inf"), integer=True)
        check_range(key + "detect_every", self.detect_every, 1, 100_000, integer=True)
        check_range(key + "eps", self.eps, 0, float("inf"), low_open=True)
        check_range(key + "min_samples", self.min_samples, 1, float("inf"), integer=True)
        for name in ("scale_min_samples", "scale_iterations"):
            if not isinstance(getattr(self, name), bool):
                check_choice(key + name, getattr(self, name), ("auto",))
        check_choice(key + "rule", self.rule, ("one_or_all", "not_largest"))
        check_range(key + "one_class_share", self.one_class_share, 0, 1, low_open=True)
        check_choice(key + "noise", self.noise, ("benign", "suspicious"))
        check_choice(key + "reducer", self.reducer, ("tsne", "pca", "svd"))

    def check(self, facts: Facts) -> None:
        last = 1 + (self.detect_epochs - 1) * self.detect_every
        if last > facts.epochs:
            raise ConfigError(
                f"defense.isolation.detect_epochs={self.detect_epochs} with detect_every={self.detect_every} needs {last} "
                f"epochs, train.epochs={facts.epochs}: allowed is 1 to {1 + (facts.epochs - 1) // self.detect_every}"
            )

    def isolate(self, view: DefenderView) -> Isolation:
        count = len(view.train)
        epochs = self.epochs(view.train_config, count, view.progress.warn)
        min_samples = self.min_samples_for(count)
        total = torch.zeros(count, dtype=torch.int64)
        reports = []
        # Train (or load) everything first, so that what follows can be interrupted and resumed cheaply.
        models = view.victim(snapshots=epochs)
        with view.progress.task("isolation", total=len(epochs)) as advance:
            for epoch, model in zip(epochs, models, strict=True):
                raise_if_requested()
                points, meta = self._map(view, epoch, model)
                flagged, report = self._judge(view, points, meta, epoch, min_samples)
                total += flagged
                shown = {"points": points, "clusters": report.pop("clusters"), "flagged": flagged, "report": report}
                view.probe(flagged=flagged, stage="detection", epoch=epoch, detail=shown)
                view.probe(flagged=total > 0, stage="isolation", epoch=epoch)
                reports.append(report)
                advance(1, flagged=int((total > 0).sum()))
        flagged = total > 0
        share = flagged.double().mean().item()
        if share > MUCH_FLAGGED:
            view.progress.warn(
                f"TRAP flagged {share:.0%} of the training set: benign classes probably form clusters of their own; "
                "try an earlier defense.isolation.first_detection_step or fewer detect_epochs"
            )
        extra = {"detection_epochs": epochs, "min_samples": min_samples, "flagged_share": share, "epochs": reports}
        return Isolation(flagged=flagged, score=total.float() / len(epochs), extra=extra)

    def epochs(self, config: TrainConfig, count: int, warn: Callable[[str], None] = lambda message: None) -> list[int]:
        """The detection epochs (counted from 1), moved forward (and said so) where the training would end before."""
        steps = self.first_detection_step
        if isinstance(steps, str):
            steps = STEPS_WITH_CROP if config.augment.crop_padding else STEPS_WITHOUT_CROP
        first = epochs_for_steps(steps, max(1, config.steps_per_epoch(count)))
        latest = max(1, config.epochs - (self.detect_epochs - 1) * self.detect_every)
        if first > latest:
            warn(
                f"the training is too short for detection to start at step {steps} (after epoch {first}): it starts after "
                f"epoch {latest}, when the trigger may not be learnt yet; raise train.epochs"
            )
            first = latest
        epochs = range(first, config.epochs + 1, self.detect_every)
        return list(epochs)[: self.detect_epochs]

    def min_samples_for(self, count: int) -> int:
        """DBSCAN's min_samples for a set of this size."""
        from backdoor_bench.detection.clusters import scaled_min_samples

        return scaled_min_samples(self.min_samples, count) if _on(self.scale_min_samples, count) else self.min_samples

    def map_settings(self, count: int) -> EmbeddingSettings:
        """The settings of the maps of a set of this size."""
        settings = self.embedding if self.reducer == "tsne" else replace(self.embedding, backend=self.reducer)
        if _on(self.scale_iterations, count):
            share = round(settings.iterations * count / REFERENCE_SIZE)
            # Below: the learning rate is N, so a map spreads with N x iterations, and a gap must still exceed eps.
            enough = round(FEWEST_ITERATIONS * SMALL / count)
            settings = replace(
                settings,
                exaggeration_iter=settings.exaggeration_iter // 2,
                iterations=min(settings.iterations, max(share, FEWEST_ITERATIONS, enough)),
            )
        return settings

    def _map(self, view: DefenderView, epoch: int, model: Classifier) -> tuple[Tensor, Mapping[str, Any]]:
        """The 2-D map float[N, 2] of this epoch's features and what is known of it, cached."""
        from backdoor_bench.detection.features import extract_features

        hardware = view.train_config.hardware
        settings = self.map_settings(len(view.train))
        settings = replace(settings, backend=resolved_backend(settings.backend, view.device))
        # One seed for all epochs of a victim: whatever the eps or the rule, the same maps serve.
        seed = view.generator.initial_seed() % 2**31

        def build() -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
            start = time.perf_counter()
            features = extract_features(model, view.train, hardware)
            took = time.perf_counter() - start
            result = embed(
                features, settings, seed=seed, threads=hardware.threads, device=view.device, warn=view.progress.warn
            )
            meta = {
                "backend": result.backend,
                "version": result.version,
                "settings": result.settings,
                "extent": result.extent,
                "notes": list(result.notes),
                # A map of second choice is not kept: the next run should find the backend it asks for.
                "transient": result.backend != settings.backend,
                "seconds_by_stage": {"features": took, "embedding": result.seconds},
            }
            return {"points": result.points}, meta

        bundle = view.stages.keep("embedding", build, {"epoch": epoch, "seed": seed, **asdict(settings)})
        return bundle.tensors["points"], bundle.meta

    def _judge(
        self, view: DefenderView, points: Tensor, meta: Mapping[str, Any], epoch: int, min_samples: int
    ) -> tuple[Tensor, dict[str, Any]]:
        """flagged bool[N] of one map and a report of its clusters."""
        from backdoor_bench.detection.clusters import dbscan, median_kth_distance, suspicious_clusters

        with view.stages.timed("clustering"):
            clusters = dbscan(points, self.eps, min_samples)
            suspects = suspicious_clusters(
                clusters, view.train.labels.cpu(), view.num_classes, self.rule, self.one_class_share, self.noise
            )
            distance = median_kth_distance(points, min_samples)
        if distance > self.eps:
            view.progress.warn(
                f"epoch {epoch}: the median distance to neighbour {min_samples} in the map is {distance:.2f}, above "
                f"eps={self.eps:g}: most samples count as noise; raise defense.isolation.eps or lower min_samples"
            )
        if len(suspects.clusters) < 2:
            view.progress.warn(f"epoch {epoch}: DBSCAN found {len(suspects.clusters)} cluster(s), nothing is flagged")
        report = {
            "epoch": epoch,
            "eps": self.eps,
            "min_samples": min_samples,
            "suspicious": [cluster.id for cluster in suspects.clusters if cluster.suspicious],
            "map": dict(meta),
            "noise_share": suspects.noise_share,
            "median_kth_distance": distance,
            "table": [asdict(cluster) for cluster in suspects.clusters],
            "clusters": clusters,
        }
        return suspects.flagged, report


def _on(switch: bool | str, count: int) -> bool:
    """A true|false|auto switch for a set of this size."""
    return count < SCALE_BELOW if isinstance(switch, str) else switch
