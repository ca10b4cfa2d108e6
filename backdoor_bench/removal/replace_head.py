"""Trap and Replace's second stage: a new random head on a frozen stem, trained on the clean holdout.

The stem keeps its weights and batch norm statistics; all behind the split is drawn anew and learns by cross-entropy
with label smoothing and dropout (Trap and Replace sec. 3.2, App. B.2). Two recipes, because paper and released code
differ: ``recipes.paper`` and ``recipes.code`` (VITA-Group/Trap-and-Replace-Backdoor-Defense:
backdoor_trapper_remove_and_patch.py). Deviation: with CutMix off that code drops the smoothing, here it stays.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.errors import ConfigError, check_choice, check_flag, check_range
from backdoor_bench.models.classifier import Classifier
from backdoor_bench.models.resnet import BasicBlock, Bottleneck
from backdoor_bench.removal.common import KEY
from backdoor_bench.storage import Checkpoints
from backdoor_bench.training.config import TrainConfig
from backdoor_bench.training.fit import Batch, LossFn, fit
from backdoor_bench.training.seeds import generator
from backdoor_bench.types import DefenderView, Facts, ImageSet, Isolation


@dataclass(frozen=True)
class HeadRecipe:
    """How the new head is trained; None = as in the recipe of the first training (``train.*``), like all not named."""

    optimizer: str | None
    lr: float | None
    momentum: float | None
    weight_decay: float | None
    schedule: str | None
    epochs: int | None
    batch_size: int | None
    drop_last: bool
    cutmix: bool

    def check(self, key: str) -> None:
        """Raise ConfigError naming ``key`` + field for a value out of range."""
        ranges: dict[str, tuple[float, float, dict[str, bool]]] = {
            "lr": (0, 1000, {"low_open": True}),
            "momentum": (0, 1, {"high_open": True}),
            "weight_decay": (0, 1, {}),
            "epochs": (1, 100_000, {"integer": True}),
            "batch_size": (1, 1_000_000, {"integer": True}),
        }
        for name, (low, high, kind) in ranges.items():
            if getattr(self, name) is not None:
                check_range(key + name, getattr(self, name), low, high, **kind)
        for name, choices in (("optimizer", ("sgd", "adam")), ("schedule", ("cosine", "constant"))):
            if getattr(self, name) is not None:
                check_choice(key + name, getattr(self, name), choices)
        for name in ("drop_last", "cutmix"):
            check_flag(key + name, getattr(self, name))

    def on(self, base: TrainConfig, label_smoothing: float) -> TrainConfig:
        """``base`` with the values given here; the ends of its schedule are dropped where lr or schedule is given."""
        given = {name: value for name, value in asdict(self).items() if value is not None and name != "cutmix"}
        warmup = min(base.warmup_epochs, given.get("epochs", base.epochs))
        if "lr" in given or "schedule" in given:
            given |= {"lr_min": 0.0, "warmup_from": 0.0}
        return replace(base, label_smoothing=label_smoothing, warmup_epochs=warmup, **given)


@dataclass(frozen=True)
class ReplaceHead:
    """split: where the head begins, see ``split_block``. stage2: which of ``recipes`` is used.

    dropout: before the second convolution of each residual block of the head, except the first block of a ResNet's
    stage (as released); a head without such blocks has none. feature_dropout: also on the maps before the last norm
    (before pooling where none is there): the paper's wording, which the released code switches off by mistake.
    """

    split: str | int
    stage2: str
    dropout: float
    feature_dropout: bool
    label_smoothing: float
    recipes: Mapping[str, HeadRecipe]

    def __post_init__(self) -> None:
        check_choice(KEY + "stage2", self.stage2, tuple(self.recipes))
        check_range(KEY + "dropout", self.dropout, 0, 1, high_open=True)
        check_flag(KEY + "feature_dropout", self.feature_dropout)
        check_range(KEY + "label_smoothing", self.label_smoothing, 0, 1, high_open=True)
        for name, recipe in self.recipes.items():
            recipe.check(f"{KEY}recipes.{name}.")

    def check(self, facts: Facts) -> None:
        if facts.holdout_size == 0:
            raise ConfigError("defense.removal=replace_head needs a clean holdout: set holdout.size=...")
        check_split(facts, self.split, KEY + "split")

    def remove(self, view: DefenderView, model: Classifier, isolation: Isolation) -> nn.Module:
        """A copy of the model with a new head. Only the holdout is used, so the isolation changes nothing."""
        return self.replaced(view, model, "removal", "victim")

    def replaced(self, view: DefenderView, model: Classifier, stage: str, start: Any) -> Classifier:
        """A copy of ``model`` with a new head, trained as the cached stage ``stage``; probes after each epoch.

        start: plain values that say which model this is, for the cache.
        """
        holdout = view.holdout
        assert holdout is not None  # check()
        self._warn_of_unseen_classes(view, holdout)
        block = split_block(model, self.split, KEY + "split")
        chosen = self.recipes[self.stage2]
        config = chosen.on(view.train_config, self.label_smoothing)
        seed = view.generator.initial_seed()
        fresh = view.new_model(view.num_classes)
        new = with_new_head(model, block, fresh, generator(seed, "new head"))
        config.hardware.place(new)

        def on_epoch_end(epoch: int, trained: nn.Module, loss: float) -> None:
            view.probe(trained, stage=stage, epoch=epoch, detail={"loss": loss})

        def train(checkpoints: Checkpoints) -> None:
            with dropout_in_head(new, block, self.dropout, self.feature_dropout):
                fit(
                    new,
                    holdout,
                    config,
                    generator=generator(seed, "replace_head"),
                    stage=stage,
                    progress=view.progress,
                    loss_fn=cutmix_cross_entropy(self.label_smoothing) if chosen.cutmix else None,
                    trainable=new.split(block)[1],
                    on_epoch_end=on_epoch_end,
                    checkpoints=checkpoints,
                )

        settings = {
            "start": start,
            "block": block,
            "dropout": self.dropout,
            "feature_dropout": self.feature_dropout,
            "cutmix": chosen.cutmix,
            "recipe": config.key(),
        }
        view.stages.fitted(stage, new, train, settings)
        return new.eval()

    def _warn_of_unseen_classes(self, view: DefenderView, holdout: ImageSet) -> None:
        counts = torch.bincount(holdout.labels.cpu(), minlength=view.num_classes)
        unseen = (counts == 0).nonzero().flatten().tolist()
        if unseen:
            names = ", ".join(map(str, unseen[:10])) + (", ..." if len(unseen) > 10 else "")
            view.progress.warn(
                f"the holdout of {len(holdout)} images has none of class {names}: a new head cannot know that class, and an "
                "ASR of 0 then proves nothing; raise holdout.size"
            )


def split_table(model: Classifier) -> dict[str, str]:
    """ "<convolutions of the stem>/<layers of the head>" -> last block of the stem, from input to output.

    Counted as in the paper: shortcuts are no layers, the linear layer is one. Of blocks with equal counts the first.
    """
    counts = {
        name: sum(
            isinstance(module, nn.Conv2d) and not inner.startswith("shortcut")
            for inner, module in block.named_modules()
        )
        for name, block in model.blocks.named_children()
    }
    total, stem, table = sum(counts.values()) + 1, 0, {}
    for name, count in counts.items():
        stem += count
        if count:
            table[f"{stem}/{total - stem}"] = name
    return table


def split_block(model: Classifier, split: str | int, key: str) -> str:
    """The last block of the stem for ``split``: auto | 11/3 | 11 (the same by its first number) | name of a block.

    auto: the last block with convolutions is the head's, all before it the stem's. That is the paper's choice for its
    networks, 11/3 for WRN-16 and 31/3 for ResNet-34, and 15/3 for ResNet-18, 3/2 for small_cnn. Raises ConfigError,
    naming ``key`` and what is allowed.
    """
    table = split_table(model)
    if split == "auto":
        places = list(table.values())
        return places[-2] if len(places) > 1 else places[-1]
    if split in model.block_names:
        return str(split)
    for counts, block in table.items():
        if str(split) in (counts, counts.split("/")[0]):
            return block
    raise ConfigError(
        f"{key}={split!r} is not allowed with this model: choose auto, a split by layers ({', '.join(table)}) or the last "
        f"block of the stem ({', '.join(model.block_names)})"
    )


def check_split(facts: Facts, split: str | int, key: str) -> None:
    """Raise ConfigError if the chosen network cannot be split there; ``auto`` can be found in any."""
    if split != "auto" and facts.outline is not None:
        split_block(facts.outline(), split, key)


def with_new_head(model: Classifier, block: str, fresh: Classifier, stream: torch.Generator) -> Classifier:
    """A deep copy of ``model`` whose part behind ``block`` is that of ``fresh``, drawn anew.

    fresh: an untrained network of the same kind, used up. It starts like the victim did, so each of its tensors is
    shuffled: independent draws in another order are a new draw from the network's own initialisation.
    """
    new = copy.deepcopy(model)
    for name in model.block_names[model.block_names.index(block) + 1 :]:
        setattr(new.blocks, name, fresh.blocks.get_submodule(name))
    new.head = fresh.head
    with torch.no_grad():
        for parameter in new.split(block)[1].parameters():
            order = torch.randperm(parameter.numel(), generator=stream).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return new


@contextlib.contextmanager
def dropout_in_head(model: Classifier, block: str, rate: float, on_features: bool) -> Iterator[None]:
    """Inside, the parts of the head that are in train mode drop values; the modules and their names stay."""

    def drop(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (F.dropout(inputs[0], rate, module.training),)

    names = model.block_names[model.block_names.index(block) + 1 :]
    places: list[nn.Module] = []
    for name in names:
        for inner in model.blocks.get_submodule(name).modules():
            skipped = name.endswith("_0") and isinstance(inner, BasicBlock | Bottleneck)
            if hasattr(inner, "conv2") and not skipped:
                places.append(inner.get_submodule("conv2"))
    if on_features:
        places.append(model.blocks.get_submodule("norm") if "norm" in names else model.pool)
    handles = [place.register_forward_pre_hook(drop) for place in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cut_and_mix(images: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """(mixed images, int64 [B] whose pixels are in the box, share of the pixels that stay): CutMix with Beta(1, 1).

    images: float [B, 3, H, W], not changed. One box a batch: sides int(side sqrt(1 - lambda)) with lambda uniform, the
    centre uniform over the image, what lies beyond the border lost. As in the released code half a side, rounded down,
    lies on each side of the centre, so that odd sides lose a pixel. Yun et al., ICCV 2019.
    """
    height, width = images.shape[2:]
    scale = math.sqrt(1 - torch.rand((), generator=stream, dtype=torch.float64).item())
    partner = torch.randperm(len(images), generator=stream)
    spans = []
    for side in (height, width):
        centre, half = int(torch.randint(side, (), generator=stream)), int(side * scale) // 2
        spans.append(slice(max(0, centre - half), min(side, centre + half)))
    rows, columns = spans
    partner = partner.to(images.device)
    mixed = images.clone()
    mixed[..., rows, columns] = images[partner][..., rows, columns]
    return mixed, partner, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)


def cutmix_cross_entropy(label_smoothing: float) -> LossFn:
    """CutMix in every batch: the cross-entropy with both labels, weighted by their share of the pixels."""

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        images, partner, share = cut_and_mix(batch.images, batch.generator)
        logits = model(images)
        own = F.cross_entropy(logits, batch.labels, label_smoothing=label_smoothing)
        other = F.cross_entropy(logits, batch.labels[partner], label_smoothing=label_smoothing)
        return share * own + (1 - share) * other

    return loss_fn
