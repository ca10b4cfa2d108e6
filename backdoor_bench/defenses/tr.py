"""Trap and Replace (Wang et al., NeurIPS 2022): bait the trigger into a light head, then replace the head.

Stage 1 (``trap``) trains stem, classification head and a decoder together on the poisoned set: cross-entropy +
lambda1 (MSE of the reconstructed images + lambda2 x their total variation). The stem must keep the whole image, so the
easy trigger is learnt in the head. Stage 2 (``replace``) is the removal ``replace_head``: stem frozen, new head, clean
holdout (specs/seed_defenses.md 2).

The reconstruction is compared with the augmented image in [0, 1]. Without it (``lambda1=0``) stage 1 is plain training,
so the shared victim is taken; the authors take a normally trained network too. What the paper leaves open, and where
its code says something else, is documented at ``removal.replace_head`` and in the two YAML files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.errors import ConfigError, check_flag, check_range
from backdoor_bench.inference import forward_all
from backdoor_bench.models.classifier import Classifier
from backdoor_bench.models.decoder import Decoder, build_decoder
from backdoor_bench.removal.replace_head import ReplaceHead, split_block, split_table
from backdoor_bench.storage import Checkpoints
from backdoor_bench.training.fit import Batch, LossFn, fit
from backdoor_bench.training.interrupt import raise_if_requested
from backdoor_bench.training.seeds import derive, generator
from backdoor_bench.types import DefenderView, DefenseResult, Facts, FeatureScatter, Figure, ImageRows, ImageSet

SHOWN = 10  # reconstructed images in the picture


@dataclass(frozen=True)
class TrapAndReplace:
    """split: where the head begins, see ``removal.replace_head.split_block``. lambda1, lambda2: weights of the
    reconstruction and of its total variation. train_on_holdout: stage 1 sees the holdout too. replace: whether there is
    a second stage; removal: that stage."""

    split: str | int
    lambda1: float
    lambda2: float
    train_on_holdout: bool
    replace: bool
    removal: ReplaceHead

    honours_train_loss = True  # in stage 1; stage 2 trains on the defender's own data

    def __post_init__(self) -> None:
        check_range("defense.lambda1", self.lambda1, 0, float("inf"), high_open=True)
        check_range("defense.lambda2", self.lambda2, 0, float("inf"), high_open=True)
        check_flag("defense.train_on_holdout", self.train_on_holdout)
        check_flag("defense.replace", self.replace)
        if not isinstance(self.removal, ReplaceHead) or self.removal.split != self.split:
            raise ConfigError(
                "defense=tr takes its removal as it is: set defense.split, and leave defense.removal.split"
            )

    def check(self, facts: Facts) -> None:
        if facts.holdout_size == 0 and (self.replace or self.train_on_holdout):
            raise ConfigError(
                "defense=tr needs a clean holdout: set holdout.size=... (Trap and Replace: 5 % of the training set)"
            )

    def defend(self, view: DefenderView) -> DefenseResult:
        untrained = view.new_model(view.num_classes)
        block = split_block(untrained, self.split, "defense.split")
        counts = {name: label for label, name in split_table(untrained).items()}
        settings = {name: getattr(self, name) for name in ("lambda1", "lambda2", "train_on_holdout")}
        settings["block"] = block
        model, decoder = self._trapped(view, untrained, block, settings)
        extra: dict[str, Any] = {"split": block, "layers": counts.get(block)}
        if decoder is not None and view.holdout is not None:
            extra["holdout_reconstruction_mse"] = self._mse(view, view.holdout, model.split(block)[0], decoder)
        self._show(view, model, decoder, block)
        raise_if_requested()
        if self.replace:
            model = self.removal.replaced(view, model, "replace", settings)
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
        model.to(view.device)

        def on_epoch_end(epoch: int, trained: nn.Module, loss: float) -> None:
            view.probe(trained, stage="trap", epoch=epoch, detail={"loss": loss})

        def train(checkpoints: Checkpoints) -> None:
            with watched(model, block) as seen:
                fit(
                    model,
                    data,
                    view.train_config,
                    generator=generator(seed, "tr trap"),
                    stage="trap",
                    progress=view.progress,
                    loss_fn=trap_loss(view.train_loss, seen, block, self.lambda1, self.lambda2),
                    on_epoch_end=on_epoch_end,
                    checkpoints=checkpoints,
                )

        view.stages.fitted("trap", model, train, settings)
        model.eval()
        decoder = cast(Decoder, model.decoder)
        del model.decoder
        return model, decoder if self.lambda1 else None

    def _mse(self, view: DefenderView, data: ImageSet, stem: nn.Module, decoder: Decoder) -> float:
        def errors(images: Tensor) -> Tensor:
            return (decoder(stem(images)).float() - images).square().mean((1, 2, 3))

        return forward_all(stem, data.images, view.train_config.hardware, errors).mean().item()

    def _show(self, view: DefenderView, model: Classifier, decoder: Decoder | None, block: str) -> None:
        """Figures 2 and 4: reconstructed training images; stem features, also of the victim if it is there anyway."""
        figures: list[Figure] = []
        name = "without" if decoder is None else "with"
        figures.append(_scatter(model, block, f"{name}_reconstruction"))
        if decoder is not None:
            stem = model.split(block)[0]
            rows = torch.linspace(0, len(view.train) - 1, min(SHOWN, len(view.train))).long()
            images = view.train.images[rows]
            made = forward_all(
                stem, images, view.train_config.hardware, lambda batch: decoder(stem(batch)).float().clamp(0, 1)
            )
            shown = {"training image": images.cpu().float() / 255, "reconstructed": made}
            title = f"reconstructions after stage 1, lambda1 = {self.lambda1:g}, lambda2 = {self.lambda2:g}"
            figures.append(ImageRows("tr_reconstructions", title, shown))
            if view.victim.is_cached():
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


def reconstruction_loss(made: Tensor, images: Tensor, lambda2: float) -> Tensor:
    """Mean squared error over all values + lambda2 x total variation of ``made``; both float [B, 3, H, W]."""
    return F.mse_loss(made, images) + lambda2 * total_variation(made)


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


def trap_loss(train_loss: LossFn, seen: dict[str, Tensor], block: str, lambda1: float, lambda2: float) -> LossFn:
    """``train_loss`` + lambda1 x reconstruction_loss of the batch (T&R Eq. 1); the code's Lambda2 = lambda1 lambda2.

    seen: of ``watched``. A loss of the attacker's may send other images through the network, or more; the batch then
    passes the stem once more.
    """

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        loss = train_loss(model, batch)
        if not lambda1:
            return loss
        maps = seen["maps"]
        if seen["images"] is not batch.images:
            maps = cast(Classifier, model).split(block)[0](batch.images)
        made = cast(nn.Module, model.decoder)(maps)
        return loss + lambda1 * reconstruction_loss(made.float(), batch.images, lambda2)

    return loss_fn


def _joined(train: ImageSet, holdout: ImageSet | None) -> ImageSet:
    assert holdout is not None  # check()
    if not isinstance(train.images, Tensor) or not isinstance(holdout.images, Tensor):
        raise ConfigError("defense.train_on_holdout=true needs data in memory: leave it false, or lower dataset.limit")
    images = torch.cat([train.images, holdout.images.to(train.images.device)])
    return replace(train, images=images, labels=torch.cat([train.labels, holdout.labels.to(train.labels.device)]))
