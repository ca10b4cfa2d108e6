"""Penultimate features of a whole image set, which TRAP, spectral signatures and activation clustering look at."""

from __future__ import annotations

from torch import Tensor

from backdoor_bench.inference import forward_all
from backdoor_bench.models.classifier import Classifier
from backdoor_bench.training.hardware import Hardware
from backdoor_bench.types import ImageSet


def extract_features(model: Classifier, image_set: ImageSet, hardware: Hardware, *, exact: bool = False) -> Tensor:
    """The features float32 [N, d] on the CPU, row i of image i.

    Eval mode and no augmentation, so that a sample's features depend on nothing but the sample (specs/seed_defenses.md
    1.3). exact: in full float32, see forward_all.
    """
    return forward_all(model, image_set.images, hardware, lambda batch: model.features(batch).float(), exact=exact)
