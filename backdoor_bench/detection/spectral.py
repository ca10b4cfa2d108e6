"""Spectral signatures: poisoned samples lie far out along the first principal direction of their class.

Per given class: the penultimate features minus their mean, their top right singular vector v, and as score the squared
projection on v (Tran et al., NeurIPS 2018; specs/baseline_removal_and_detection.md 5.1). Two uses: a detector on the
plainly trained model that flags a share of each class, and EBD's metric in place of FCT (Fig. 4), which reads the model
of the first epochs and ranks over all classes (specs/seed_defenses.md 3.9; the paper does not say which model).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from backdoor_bench.detection.distinguish import KEY, STAGE, EarlyTraining, check_shares, split_by_rank
from backdoor_bench.detection.features import extract_features
from backdoor_bench.errors import check_flag
from backdoor_bench.training.seeds import generator
from backdoor_bench.types import DefenderView, Facts, Isolation, ScoreHistogram


def spectral_scores(features: Tensor, labels: Tensor, centered: bool) -> Tensor:
    """float32 [N]: ((f - mean of the class) . v)^2, or (f . v)^2 where not ``centered``; v belongs to the centred ones.

    features: float [N, D]; labels: int64 [N]. A class of one sample has no direction: its score is 0.
    """
    scores = torch.zeros(len(features), dtype=torch.float64)
    for label in labels.unique().tolist():
        rows = labels == label
        raw = features[rows].double()
        around = raw - raw.mean(0)
        scores[rows] = ((around if centered else raw) @ top_direction(around)).square()
    return scores.float()


def top_direction(rows: Tensor) -> Tensor:
    """The top right singular vector, unit float [D], of ``rows`` float [N, D]; zeros if all of these are zero."""
    wide = rows.shape[0] < rows.shape[1]
    top = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows).eigenvectors[:, -1]
    direction = rows.T @ top if wide else top
    return direction / direction.norm().clamp(min=1e-30) if bool(rows.any()) else torch.zeros_like(direction)


@dataclass(frozen=True)
class SpectralIsolation:
    """training: the model whose features are read, None = the plainly trained one. centered: project centred features, as
    the paper has it (its code: uncentred ones). per_class: take the shares of each class, not of the whole set. alpha_p,
    alpha_c: shares flagged (largest scores) and trusted (smallest; None: all that are not flagged)."""

    training: EarlyTraining | None
    centered: bool
    per_class: bool
    alpha_c: float | None
    alpha_p: float

    honours_train_loss = True  # it reads the undefended model, or see EarlyTraining

    def __post_init__(self) -> None:
        check_flag(KEY + "centered", self.centered)
        check_flag(KEY + "per_class", self.per_class)
        check_shares(self.alpha_c, self.alpha_p)

    def check(self, facts: Facts) -> None:
        """Nothing to refuse: works on any data."""

    def isolate(self, view: DefenderView) -> Isolation:
        labels = view.train.labels.cpu()
        model = view.victim() if self.training is None else self.training.models(view)[0]

        def build() -> Mapping[str, Tensor]:
            features = extract_features(model, view.train, view.train_config.hardware, exact=True)
            return {"score": spectral_scores(features, labels, self.centered)}

        training = None if self.training is None else asdict(self.training)
        score = view.stages.tensors(STAGE, build, {"spectral": training, "centered": self.centered})["score"]
        figure = ScoreHistogram("spectral", "Spectral signatures", score, "squared projection")
        view.probe(stage=STAGE, epoch=0, detail={"figures": [figure]})
        stream = generator(view.generator.initial_seed(), "spectral ties")
        flagged = torch.zeros(len(score), dtype=torch.bool)
        trusted = None if self.alpha_c is None else flagged.clone()
        everything = torch.ones_like(flagged)
        for rows in [labels == label for label in labels.unique().tolist()] if self.per_class else [everything]:
            most, least = split_by_rank(score[rows], self.alpha_c, self.alpha_p, stream)
            flagged[rows] = most
            if trusted is not None and least is not None:
                trusted[rows] = least
        return Isolation(flagged, trusted, score)
