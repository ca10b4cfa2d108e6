"""The attacker's own classifier of the clean data, from which optimised triggers are learnt."""

from __future__ import annotations

from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.attacks.pgd import Pgd, perturb
from backdoor_bench.models.classifier import Classifier
from backdoor_bench.training.fit import Batch, LossFn, fit
from backdoor_bench.training.seeds import generator
from backdoor_bench.types import AttackerView


def surrogate(view: AttackerView, robust: Pgd | None = None) -> Classifier:
    """A classifier of ``view.train`` trained with ``view.train_config``, in eval mode on ``view.device``.

    Trained once and shared by all attacks on the same data, model, recipe and ``attack.seed``. robust: train it on
    images perturbed like this in every batch (PGD adversarial training, Madry et al. 2018) instead of the images.
    """
    model = view.new_model(view.num_classes).to(view.device)
    # The view has no seed of its own; that of the generator is derived from attack.seed and stays what it is.
    seed = view.generator.initial_seed()
    name = "surrogate" if robust is None else "robust_surrogate"
    view.learned.fitted(
        name,
        model,
        lambda checkpoints: fit(
            model,
            view.train,
            view.train_config,
            generator=generator(seed, name),
            stage=name,
            progress=view.progress,
            loss_fn=None if robust is None else adversarial(robust, view.train_config.label_smoothing),
            checkpoints=checkpoints,
        ),
        None if robust is None else asdict(robust),
    )
    view.train_config.hardware.place(model)
    return model.eval()


def adversarial(pgd: Pgd, label_smoothing: float = 0.0) -> LossFn:
    """The mean cross-entropy of the batch's perturbed images.

    The perturbation is looked for in eval mode, so that its steps leave the batch norms' statistics alone.
    """

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        uniform = torch.rand(batch.images.shape, generator=batch.generator) if pgd.random_start else None
        model.eval()
        images = perturb(model, batch.images, batch.labels, pgd, uniform)
        model.train()
        return F.cross_entropy(model(images), batch.labels, label_smoothing=label_smoothing)

    return loss_fn
