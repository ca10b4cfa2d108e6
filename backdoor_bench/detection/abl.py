"""ABL's isolation: poison is learnt first, so under training that keeps the loss up it has the lowest loss.

A model of its own is trained without augmentation by local gradient ascent (or flooding, the released default with the
same gradients: specs/baseline_training_defenses.md 2.1), then samples are ranked by their cross-entropy (Li et al.,
NeurIPS 2021; bboylyg/ABL:backdoor_isolation.py; specs/baseline_removal_and_detection.md 5.3). As EBD's metric in place
of FCT the samples of largest loss are trusted (EBD Fig. 4). That code does not shuffle the samples; here they are.

The loss that is held up is always its own, plain cross-entropy, also where an attack owns the loss of plain training: the
attacker's loss would undo the isolation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.detection.distinguish import KEY, check_shares, split_by_rank
from backdoor_bench.errors import check_choice, check_flag, check_range
from backdoor_bench.inference import forward_all
from backdoor_bench.storage import Checkpoints
from backdoor_bench.training.fit import Batch, fit
from backdoor_bench.training.recipes import recipe
from backdoor_bench.training.seeds import generator
from backdoor_bench.types import DefenderView, Facts, Isolation, ScoreHistogram

STAGE = "isolation"


def held_up_loss(losses: Tensor, loss: str, gamma: float, reduction: str) -> Tensor:
    """Scalar: sign(l - gamma) * l (``lga``) or |l - gamma| + gamma (``flooding``) of the cross-entropies ``losses`` [B].

    reduction: batch = of their mean, as in the released code; sample = the mean over the samples.
    """
    value = losses.mean() if reduction == "batch" else losses
    held = (value - gamma).sign() * value if loss == "lga" else (value - gamma).abs() + gamma
    return held.mean()


@dataclass(frozen=True)
class ABLIsolation:
    """epochs, lr (constant), momentum, weight_decay, nesterov, batch_size: of the isolation training. loss: lga|flooding
    at the level ``gamma``. reduction: batch|sample. alpha_p, alpha_c: shares flagged (lowest loss) and trusted (largest;
    None: all that are not flagged)."""

    epochs: int
    loss: str
    gamma: float
    reduction: str
    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    batch_size: int
    alpha_c: float | None
    alpha_p: float

    def __post_init__(self) -> None:
        check_range(KEY + "epochs", self.epochs, 1, 100_000, integer=True)
        check_choice(KEY + "loss", self.loss, ("lga", "flooding"))
        check_range(KEY + "gamma", self.gamma, 0, float("inf"), high_open=True)
        check_choice(KEY + "reduction", self.reduction, ("batch", "sample"))
        check_range(KEY + "lr", self.lr, 0, 1000, low_open=True)
        check_flag(KEY + "nesterov", self.nesterov)
        check_range(KEY + "momentum", self.momentum, 0, 1, low_open=self.nesterov, high_open=True)
        check_range(KEY + "weight_decay", self.weight_decay, 0, 1)
        check_range(KEY + "batch_size", self.batch_size, 1, 1_000_000, integer=True)
        check_shares(self.alpha_c, self.alpha_p)

    def check(self, facts: Facts) -> None:
        """Nothing to refuse: works on any data."""

    def isolate(self, view: DefenderView) -> Isolation:
        """The split by the loss; ``score`` is minus the loss, so that it is higher where more suspicious."""
        config = recipe(
            view.train_config,
            epochs=self.epochs,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            batch_size=self.batch_size,
            schedule="constant",
            nesterov=self.nesterov,
            augment=False,
        )
        model = view.new_model(view.num_classes)
        config.hardware.place(model)

        def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
            losses = F.cross_entropy(model(batch.images), batch.labels, reduction="none")
            return held_up_loss(losses, self.loss, self.gamma, self.reduction)

        def on_epoch_end(epoch: int, trained: nn.Module, loss: float) -> None:
            view.probe(trained, stage=STAGE, epoch=epoch, detail={"loss": loss})

        def train(checkpoints: Checkpoints) -> None:
            fit(
                model,
                view.train,
                config,
                generator=generator(view.generator.initial_seed(), "abl"),
                stage=STAGE,
                progress=view.progress,
                loss_fn=loss_fn,
                on_epoch_end=on_epoch_end,
                checkpoints=checkpoints,
            )

        def build() -> Mapping[str, Tensor]:
            logits = forward_all(model, view.train.images, config.hardware, exact=True)
            return {"loss": F.cross_entropy(logits.double(), view.train.labels.cpu(), reduction="none").float()}

        # The shares play no part in the training, so that a sweep over them is trained once.
        settings = {name: value for name, value in asdict(self).items() if name not in ("alpha_c", "alpha_p")}
        view.stages.fitted(STAGE, model, train, {"abl": settings, "recipe": config.key()})
        losses = view.stages.tensors(STAGE, build, {"abl scores": settings})["loss"]
        figure = ScoreHistogram("abl", "Loss after ABL's isolation training", losses, "loss")
        view.probe(stage=STAGE, epoch=self.epochs, detail={"figures": [figure]})
        stream = generator(view.generator.initial_seed(), "abl ties")
        flagged, trusted = split_by_rank(-losses, self.alpha_c, self.alpha_p, stream)
        return Isolation(flagged, trusted, -losses)
