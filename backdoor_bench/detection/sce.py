"""Symmetric cross-entropy of an early model as EBD's metric in place of FCT: small = clean (EBD Fig. 4).

SCE = a * CE + b * RCE as in DBD (Huang et al., ICLR 2022; SCLBD/DBD:model/loss.py), RCE being the cross-entropy with
label and prediction swapped, where the label's zeros are raised to ``label_floor``. It falls with p_y, so that CE and
1 - p_y rank the samples the same way. It is read from the model before the intra-class fine-tuning; the paper does not
say from which one (specs/seed_defenses.md 3.9).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor

from backdoor_bench.detection.distinguish import KEY, STAGE, EarlyTraining, check_shares, split_by_rank
from backdoor_bench.errors import ConfigError, check_range
from backdoor_bench.inference import forward_all
from backdoor_bench.training.seeds import generator
from backdoor_bench.types import DefenderView, Facts, Isolation, ScoreHistogram


def symmetric_cross_entropy(
    logits: Tensor, labels: Tensor, ce_weight: float, rce_weight: float, label_floor: float
) -> Tensor:
    """float32 [B]: ce_weight * -log p_y + rce_weight * -log(label_floor) * (1 - p_y).

    logits: float [B, C]; labels: int64 [B]. In double precision, because well-fitted samples lie close to 0; 1 - p_y is
    the sum over the other classes that RCE is made of (its own class adds log 1 = 0).
    """
    log_p = logits.double().log_softmax(1).gather(1, labels[:, None])[:, 0]
    return (-ce_weight * log_p + rce_weight * math.log(label_floor) * log_p.expm1()).float()


@dataclass(frozen=True)
class SCEIsolation:
    """ce_weight, rce_weight, label_floor: of the loss. alpha_c, alpha_p: shares trusted (smallest loss; None: all that are
    not flagged) and flagged (largest)."""

    training: EarlyTraining
    ce_weight: float
    rce_weight: float
    label_floor: float
    alpha_c: float | None
    alpha_p: float

    honours_train_loss = True  # see EarlyTraining

    def __post_init__(self) -> None:
        for name in ("ce_weight", "rce_weight"):
            check_range(KEY + name, getattr(self, name), 0, float("inf"), high_open=True)
        if not (self.ce_weight or self.rce_weight):
            raise ConfigError(
                f"{KEY}ce_weight={self.ce_weight} and {KEY}rce_weight={self.rce_weight} are not allowed together: the "
                "loss would be 0 for every sample"
            )
        check_range(KEY + "label_floor", self.label_floor, 0, 1, low_open=True, high_open=True)
        check_shares(self.alpha_c, self.alpha_p)

    def check(self, facts: Facts) -> None:
        """Nothing to refuse: works on any data."""

    def isolate(self, view: DefenderView) -> Isolation:
        model = self.training.models(view)[0]
        weights = (self.ce_weight, self.rce_weight, self.label_floor)

        def build() -> Mapping[str, Tensor]:
            logits = forward_all(model, view.train.images, view.train_config.hardware, exact=True)
            return {"score": symmetric_cross_entropy(logits, view.train.labels.cpu(), *weights)}

        score = view.stages.tensors(STAGE, build, {"sce": asdict(self.training), "weights": weights})["score"]
        figure = ScoreHistogram("sce", "Symmetric cross-entropy", score, "loss")
        view.probe(stage=STAGE, epoch=self.training.epochs, detail={"figures": [figure]})
        stream = generator(view.generator.initial_seed(), "sce ties")
        flagged, trusted = split_by_rank(score, self.alpha_c, self.alpha_p, stream)
        return Isolation(flagged, trusted, score)
