"""CL, label-consistent (Turner et al. 2019): images of the target class that are hard to recognise, with a trigger.

The perturbation makes the image itself a poor sign of its class, so that the network learns the corners instead; at
test time the corners alone are stamped.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backdoor_bench.attacks.common import check_facts, check_rows, check_settings, poison_static
from backdoor_bench.attacks.pgd import Pgd, perturb_rows
from backdoor_bench.attacks.surrogate import surrogate
from backdoor_bench.data.poisoned_files import load_arrays
from backdoor_bench.errors import ConfigError, DataError, check_choice, check_flag, check_range
from backdoor_bench.models.classifier import Classifier
from backdoor_bench.triggers.corners import VARIANTS, Corners, corners
from backdoor_bench.types import AttackerView, Facts, PoisonedSet, Progress, Trigger

# Pixel values perturbed at a time: 85 images of 32 pixels, or 341 (1 MiB an image in small_cnn, 85 in DenseNet-161).
VALUES_CPU, VALUES_GPU = 2**18, 2**20


@dataclass(frozen=True)
class LabelConsistent:
    """Perturbs images by PGD against a surrogate (keys ``model`` to ``robust_steps``), then stamps ``corners``.

    perturbed: a file with the perturbed images instead: uint8 ``[N, H, W, 3]``, row i for training row i. amplitude: of
    the corners. Unlike EBD's code, the surrogate sees images as it was trained on them, they are clipped to 0..255 and
    rounded (nothing wraps), and the constants hold for the stored image.
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
    model: str
    norm: str
    eps: float
    step: float
    steps: int
    random_start: bool
    robust_eps: float
    robust_step: float
    robust_steps: int
    perturbed: str | None
    corners: str
    amplitude: float
    scale_patch: bool

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice("attack.model", self.model, ("benign", "robust"))
        self._pgd().check("attack.")
        self._robust().check("attack.robust_")
        check_choice("attack.corners", self.corners, tuple(VARIANTS))
        check_range("attack.amplitude", self.amplitude, 0, 1, low_open=True)
        check_flag("attack.scale_patch", self.scale_patch)
        is_path = self.perturbed is None or isinstance(self.perturbed, str)
        if not is_path or (self.perturbed and not Path(self.perturbed).expanduser().is_file()):
            raise ConfigError(
                f"attack.perturbed={self.perturbed!r} is no file: give the path of an NPY or NPZ, or null"
            )

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the classes or the rate cannot fit."""
        check_facts(self, facts)

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with the chosen rows perturbed and stamped."""
        check_rows(self, view)
        return poison_static(self, view, *self.triggers(view))

    def triggers(self, view: AttackerView) -> tuple[Trigger, Trigger]:
        """Perturbation and corners at training, the corners alone at test. Raises DataError for an unusable file."""
        height, width = view.train.images.shape[-2:]
        stamp = corners(self.corners, height, width, amplitude=self.amplitude, scale=self.scale_patch)
        if self.perturbed:
            return Prepared(_published(self.perturbed, view), stamp), stamp
        classifier = surrogate(view, self._robust() if self.model == "robust" else None).requires_grad_(False)
        return Perturbed(classifier, self._pgd(), view.train.labels, self.seed, view.progress, stamp), stamp

    def _pgd(self) -> Pgd:
        return Pgd(self.norm, self.eps, self.step, self.steps, self.random_start)

    def _robust(self) -> Pgd:
        return Pgd("linf", self.robust_eps, self.robust_step, self.robust_steps, random_start=True)


@dataclass(frozen=True, eq=False)
class Perturbed:
    """Moves uint8 ``[B, 3, H, W]`` away from their labels (int64 ``[N]``, by row) as ``classifier`` sees them, then
    stamps. The rows of ``index`` decide label and random start."""

    classifier: Classifier
    pgd: Pgd
    labels: Tensor
    seed: int
    progress: Progress
    stamp: Corners

    def __call__(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        assert index is not None, "the perturbation belongs to a row"
        device = next(self.classifier.parameters()).device
        moved = images.clone()
        room = VALUES_CPU if device.type == "cpu" else VALUES_GPU
        chunk = max(1, room // images.shape[1:].numel())
        starts = range(0, len(images), chunk)
        with self.progress.task("perturbing", total=len(starts)) as advance:
            for start in starts:
                some = slice(start, start + chunk)
                count = len(images[some])
                # Always as many images: the last bits of a gradient depend on their number, and a step on its sign.
                rows = F.pad(index[some], (0, chunk - count))
                labels = self.labels[rows.to(self.labels.device)].to(device)
                batch = F.pad(images[some], (0, 0, 0, 0, 0, 0, 0, chunk - count)).to(device)
                found = perturb_rows(self.classifier, batch, labels, rows.to(device), self.pgd, self.seed)
                moved[some] = found[:count].to(images.device)
                advance(1)
        return self.stamp(moved)


@dataclass(frozen=True, eq=False)
class Prepared:
    """Replaces each image by row ``index`` of ``images`` (uint8 ``[N, H, W, 3]``), then stamps."""

    images: np.ndarray
    stamp: Corners

    def __call__(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        assert index is not None, "the perturbed image belongs to a row"
        rows = torch.from_numpy(self.images[index.cpu().numpy()]).permute(0, 3, 1, 2)
        return self.stamp(rows.contiguous().to(images.device))


def _published(path: str, view: AttackerView) -> np.ndarray:
    """The array uint8 ``[N, H, W, 3]`` in an NPY or NPZ file. DataError unless it fits the training set."""
    count, channels, height, width = view.train.images.shape
    file = Path(path).expanduser()
    try:
        if zipfile.is_zipfile(file):
            arrays = list(load_arrays(file).values())
        else:
            arrays = [np.lib.format.open_memmap(file, mode="r")]  # arrays of objects cannot be mapped
    except MemoryError:
        raise
    except Exception as error:  # a damaged heading raises almost anything
        raise DataError(f"{path}: attack.perturbed is no readable NPY or NPZ file ({error})") from error
    if len(arrays) != 1:
        raise DataError(f"{path}: attack.perturbed holds {len(arrays)} arrays; it must hold one")
    loaded = arrays[0]
    if loaded.dtype != np.uint8 or loaded.shape != (count, height, width, channels):
        raise DataError(
            f"{path}: attack.perturbed holds {loaded.dtype} {list(loaded.shape)}, but the training set asks for uint8 "
            f"{[count, height, width, channels]}: one image for each of its rows (dataset.limit=null, holdout.size=0)"
        )
    return loaded
