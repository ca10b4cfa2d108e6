"""Trap and Replace (Wang et al., NeurIPS 2022): bait the trigger into a light head, then replace the head.

Stage 1 (``trap``) trains stem, classification head and a decoder together on the poisoned set: cross-entropy +
lambda1 (MSE of the reconstructed images + lambda2 x their total variation). The stem must keep the whole image, so the
easy trigger is learnt in the head. Stage 2 (``replace``) is the removal ``replace_head``: stem frozen, new head, clean
holdout (specs/seed_defenses.md 2).

The reconstruction is compared with what the network was given: the augmented images in [0, 1], or those that the loss of
an attacker who owns the training made of them. Without it (``lambda1=0``) stage 1 is plain training, so the shared victim
is taken; the authors take a normally trained network too. What the paper leaves open, and where its code says something
else, is documented at ``removal.replace_head`` and in the two YAML files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.errors import ConfigError, check_flag, check_range
from backdoor_bench.inference import forward_all
from backdoor_bench.models.classifier import Classifier
from backdoor_bench.models.decoder import Decoder, build_decoder
from backdoor_bench.removal.replace_head import ReplaceHead, check_split, split_block, split_table
from backdoor_bench.storage import Checkpoints
from backdoor_bench.training.fit import Batch, LossFn, fit
from backdoor_bench.training.interrupt import raise_if_requested
from backdoor_bench.training.seeds import derive, generator
from backdoor_bench.types import DefenderView, DefenseResult, Facts, FeatureScatter, Figure, ImageSet, Reconstructions

MEASURED = 2000  # training images on which the reconstruction is measured where there is no holdout
TERMS = ("ce", "mse", "tv")  # of the loss, told apart in the curve; ce is the loss of plain training


@dataclass(frozen=True)
class TrapAndReplace:
    """split: where the head begins, see ``removal.replace_head.split_block``. lambda1, lambda2: weights of the
    reconstruction and of its total variation. train_on_holdout: stage 1 sees the holdout too. replace: whether there is
    a second stage; removal: that stage, at the same split. compare_with_victim: draw the stem features of the undefended
    model, too, which is trained for it."""

    split: str | int
    lambda1: float
    lambda2: float
    train_on_holdout: bool
    replace: bool
    compare_with_victim: bool
    removal: ReplaceHead

    honours_train_loss = True  # in stage 1; stage 2 trains on the defender's own data

    def __post_init__(self) -> None:
        check_range("defense.lambda1", self.lambda1, 0, float("inf"), high_open=True)
        check_range("defense.lambda2", self.lambda2, 0, float("inf"), high_open=True)
        for name in ("train_on_holdout", "replace", "compare_with_victim"):
            check_flag(f"defense.{name}", getattr(self, name))
        if not isinstance(self.removal, ReplaceHead):
            raise ConfigError(
                "defense=tr takes defense.removal=replace_head, its second stage, and no other: "
                f"{type(self.removal).__name__} was given"
            )
        if self.removal.split not in ("auto", self.split):
            raise ConfigError(
                f"defense.removal.split={self.removal.split!r} is not allowed with defense.split={self.split!r}: both "
                "stages of defense=tr share one split, so set defense.split alone"
            )

    def check(self, facts: Facts) -> None:
        if facts.holdout_size == 0 and (self.replace or self.train_on_holdout):
            raise ConfigError(
                "defense=tr needs a clean holdout: set holdout.size=... (Trap and Replace: 5 % of the training set)"
            )
        if self.train_on_holdout and facts.holdout_source == "seen":
            raise ConfigError(
                "defense.train_on_holdout=true is not allowed with holdout.source=seen, where the holdout is part of the "
                "training set already: leave it false, or set holdout.source=reserved"
            )
        check_split(facts, self.split, "defense.split")

    def defend(self, view: DefenderView) -> DefenseResult:
        untrained = view.new_model(view.num_classes)
        block = split_block(untrained, self.split, "defense.split")
        counts = {name: label for label, name in split_table(untrained).items()}
        settings = {name: getattr(self, name) for name in ("lambda1", "lambda2", "train_on_holdout")}
        settings["block"] = block
        model, decoder = self._trapped(view, untrained, block, settings)
        extra: dict[str, Any] = {"split": block, "layers": counts.get(block)}
        if decoder is not None:
            extra |= self._measured(view, model.split(block)[0], decoder)
        self._show(view, model, decoder, block)
        raise_if_requested()
        if self.replace:
            model = replace(self.removal, split=self.split).replaced(view, model, "replace", settings)
        return DefenseResult(model=model, extra=extra)

    def _trapped(
        self, view: DefenderView, model: Classifier, block: str, settings: dict[str, Any]
    ) -> tuple[Classifier, Decoder | None]:
        """The model of stage 1 and its decoder, both in eval mode; no decoder without reconstruction."""
        if not self.lambda1 and not self.train_on_holdout:
            return view.victim(), None
        seed = view.generator.initial_seed()
        data = _joined(view.train, view.holdout) if self.train_on_holdout else view.train
        size = data.images.shape[-1]
        with torch.no_grad():
            channels, side = model.eval().split(block)[0](torch.zeros(1, 3, size, size)).shape[1:3]
        # Beside the classifier's parts: trained, checkpointed and stored with them, and no part of its output.
        model.decoder = build_decoder(channels, side, size, derive(seed, "tr decoder"))
        view.train_config.hardware.place(model)

        steps: list[Tensor] = []  # of this epoch, a row of TERMS each

        def on_epoch_end(epoch: int, trained: nn.Module, loss: float) -> None:
            means = dict(zip(TERMS, torch.stack(steps).double().mean(0).tolist(), strict=False))
            steps.clear()
            view.probe(trained, stage="trap", epoch=epoch, detail={"loss": loss, **means})

        def train(checkpoints: Checkpoints) -> None:
            with watched(model, block) as seen:
                fit(
                    model,
                    data,
                    view.train_config,
                    generator=generator(seed, "tr trap"),
                    stage="trap",
                    progress=view.progress,
                    loss_fn=trap_loss(view.train_loss, seen, self.lambda1, self.lambda2, steps.append),
                    on_epoch_end=on_epoch_end,
                    checkpoints=checkpoints,
                )

        view.stages.fitted("trap", model, train, settings)
        model.eval()
        decoder = cast(Decoder, model.decoder)
        del model.decoder
        return model, decoder if self.lambda1 else None

    def _measured(self, view: DefenderView, stem: nn.Module, decoder: Decoder) -> dict[str, Any]:
        """The mean squared error of the reconstruction (T&R Table 8), and of which images."""

        def errors(images: Tensor) -> Tensor:
            return (decoder(stem(images)).float() - images).square().mean((1, 2, 3))

        if view.holdout is not None:
            images, source = view.holdout.images, "holdout, trained on too" if self.train_on_holdout else "holdout"
        else:
            rows = torch.linspace(0, len(view.train) - 1, min(MEASURED, len(view.train))).long()
            images, source = view.train.images[rows], f"{len(rows)} training images"
        found = forward_all(stem, images, view.train_config.hardware, errors).mean().item()
        return {"reconstruction_mse": found, "reconstruction_mse_of": source}

    def _show(self, view: DefenderView, model: Classifier, decoder: Decoder | None, block: str) -> None:
        """Figures 2 and 4: stem features; reconstructed test images."""
        figures: list[Figure] = []
        name = "without" if decoder is None else "with"
        figures.append(_scatter(model, block, f"{name}_reconstruction"))
        if decoder is not None:
            stem = model.split(block)[0]
            title = f"reconstructions after stage 1, lambda1 = {self.lambda1:g}, lambda2 = {self.lambda2:g}"
            figures.append(Reconstructions("tr_reconstructions", title, lambda images: decoder(stem(images)).float()))
            if self.compare_with_victim:
                figures.append(_scatter(view.victim(), block, "without_reconstruction"))
        view.probe(stage="trap", epoch=view.train_config.epochs, detail={"figures": figures})


def _scatter(model: Classifier, block: str, name: str) -> FeatureScatter:
    stem = model.split(block)[0]
    title = f"pooled stem features (up to {block}), {name.replace('_', ' ')}"
    return FeatureScatter(f"tr_features_{name}", title, lambda images: stem(images).float().mean((2, 3)))


def total_variation(images: Tensor) -> Tensor:
    """Squared differences of vertical and of horizontal neighbours, summed, over B*3*H*W; scalar.

    images: float [B, 3, H, W]. VITA-Group/Trap-and-Replace-Backdoor-Defense:utils/utils.py.
    """
    vertical = (images[..., 1:, :] - images[..., :-1, :]).square().sum()
    horizontal = (images[..., 1:] - images[..., :-1]).square().sum()
    return (vertical + horizontal) / images.numel()


@contextlib.contextmanager
def watched(model: Classifier, block: str) -> Iterator[dict[str, Tensor]]:
    """Inside, what the model was last given (``images``) and what its stem made of it (``maps``).

    A hook, so that any loss which uses the model or its parts is served with one pass through the stem.
    """
    seen: dict[str, Tensor] = {}

    def keep_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen["images"] = inputs[0]

    def keep_output(_: nn.Module, inputs: tuple[Tensor, ...], maps: Tensor) -> None:
        seen["maps"] = maps

    handles = [
        model.normalise.register_forward_pre_hook(keep_input),
        model.blocks.get_submodule(block).register_forward_hook(keep_output),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def trap_loss(
    train_loss: LossFn,
    seen: dict[str, Tensor],
    lambda1: float,
    lambda2: float,
    told: Callable[[Tensor], object] = lambda _: None,
) -> LossFn:
    """``train_loss`` + lambda1 (MSE + lambda2 TV) of the reconstruction (T&R Eq. 1); the code's Lambda2 = lambda1 lambda2.

    seen: of ``watched``: what is reconstructed is what ``train_loss`` sent through the network last, which under a loss
    of the attacker's may be other images than the batch's, or more. told: called with the values of TERMS, float32 [3] or,
    without reconstruction, [1].
    """

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        loss = train_loss(model, batch)
        if not lambda1:
            told(loss.detach().float()[None])
            return loss
        images, made = seen["images"], cast(nn.Module, model.decoder)(seen["maps"]).float()
        error, variation = F.mse_loss(made, images), total_variation(made)
        told(torch.stack([loss, error, variation]).detach())
        return loss + lambda1 * (error + lambda2 * variation)

    return loss_fn


def _joined(train: ImageSet, holdout: ImageSet | None) -> ImageSet:
    assert holdout is not None  # check()
    if not isinstance(train.images, Tensor) or not isinstance(holdout.images, Tensor):
        raise ConfigError("defense.train_on_holdout=true needs data in memory: leave it false, or lower dataset.limit")
    images = torch.cat([train.images, holdout.images.to(train.images.device)])
    return replace(train, images=images, labels=torch.cat([train.labels, holdout.labels.to(train.labels.device)]))
