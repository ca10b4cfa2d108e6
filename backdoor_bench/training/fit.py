"""The one training loop.

What methods differ in goes in as arguments: the loss of a batch, which samples come in which order, which submodule is
trained, what happens after an epoch. Everything random is drawn on the CPU from one generator, an epoch at a time, so
that the same seed gives the same batches on every device and a resumed run continues as if never stopped.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.errors import ConfigError, DataError, Diverged
from backdoor_bench.storage import Checkpoints, pack_optimizer, unpack_optimizer
from backdoor_bench.training import interrupt
from backdoor_bench.training.config import TrainConfig
from backdoor_bench.types import Images, ImageSet, Progress


@dataclass(frozen=True)
class Batch:
    """images: float [B, 3, H, W] in [0, 1], augmented, on the device. labels: int64 [B]. index: int64 [B], rows of the
    training set. epoch: counted from 0. pixels: the images before augmentation. augmented: (float images [K, 3, H, W],
    int64 [K] places in this batch) -> those images with the crops and flips that these places drew. generator: on the
    CPU, for what else a loss draws; seeded anew each epoch."""

    images: Tensor
    labels: Tensor
    index: Tensor
    epoch: int
    pixels: Tensor
    augmented: Callable[[Tensor, Tensor], Tensor]
    generator: torch.Generator


LossFn = Callable[[nn.Module, Batch], Tensor]
Order = Callable[[int, torch.Generator], list[Tensor]]


def cross_entropy(label_smoothing: float = 0.0) -> LossFn:
    """The mean cross-entropy of a batch."""

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch.images), batch.labels, label_smoothing=label_smoothing)

    return loss_fn


def shuffled(rows: Tensor, batch_size: int, drop_last: bool = False) -> Order:
    """Every row once an epoch, in random order, in batches of ``batch_size``."""

    def order(_epoch: int, generator: torch.Generator) -> list[Tensor]:
        batches = list(rows[torch.randperm(len(rows), generator=generator)].split(batch_size))
        return batches[:-1] if drop_last and len(batches) > 1 and len(batches[-1]) < batch_size else batches

    return order


def make_optimizer(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD or Adam with the recipe's constants."""
    if config.optimizer == "adam":
        betas = (config.betas[0], config.betas[1])
        return torch.optim.Adam(parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov
    )


def fit(
    model: nn.Module,
    data: ImageSet,
    config: TrainConfig,
    *,
    generator: torch.Generator,
    stage: str,
    progress: Progress,
    loss_fn: LossFn | None = None,
    order: Order | None = None,
    trainable: nn.Module | None = None,
    also: Sequence[tuple[nn.Module, TrainConfig]] = (),
    on_epoch_end: Callable[[int, nn.Module, float], None] | None = None,
    checkpoints: Checkpoints | None = None,
    stop_after: int | None = None,
) -> None:
    """Trains ``model`` in place and leaves it in eval mode.

    data: the training set (labels may be the method's own). generator: CPU generator; its state travels with the
    checkpoints. stage: name shown and written with the curves. loss_fn: scalar loss of a batch, default cross-entropy.
    order: the epoch's batches of row numbers, default a shuffle of all rows. trainable: the submodule that is trained;
    the rest keeps its weights, gets no gradient and stays in eval mode (its batch norms do not move). also: further
    submodules that are trained by the same loss, each with the optimiser and learning rates of its own recipe.
    on_epoch_end: called with (epoch counted from 1, model in eval mode, mean loss). checkpoints: where to resume from
    and save to. stop_after: stop after this epoch of the same schedule.

    Raises Diverged (step and rows of the batch) at the first non-finite loss; Interrupted when asked to stop.
    """
    hardware = config.hardware
    device = torch.device(hardware.device)
    hardware.place(model)
    images = resident(data.images, hardware.resident_gib, device)
    labels = data.labels.to(device)
    loss_fn = loss_fn or cross_entropy(config.label_smoothing)
    order = order or shuffled(torch.arange(len(data)), config.batch_size, config.drop_last)
    recipes = [(trainable if trainable is not None else model, config), *also]
    trained = [part for part, _ in recipes]
    last_epoch = min(stop_after or config.epochs, config.epochs)

    def make_batch(part: slice, rows: Tensor, drawn: dict[str, Tensor], epoch: int, extra: torch.Generator) -> Batch:
        pixels = hardware.images(images[rows[part]])
        mine = {name: value[part] for name, value in drawn.items()}

        def augmented(others: Tensor, places: Tensor) -> Tensor:
            return config.augment.apply(others, {name: value[places] for name, value in mine.items()})

        batch = config.augment.apply(pixels, mine)
        if data.augment is not None:
            batch = data.augment(batch, extra)
        index = rows[part].to(device)
        return Batch(hardware.format(batch), labels[index], index, epoch, pixels, augmented, extra)

    with _only_trainable(model, trained), torch.random.fork_rng(devices=_devices(device)):
        optimizers = [make_optimizer(recipe, list(part.parameters())) for part, recipe in recipes]
        start = _resume(checkpoints, model, optimizers, generator, progress) if checkpoints else 0
        forward = cast(nn.Module, torch.compile(model)) if hardware.compile else model
        with progress.task(stage, total=last_epoch) as advance:
            advance(start)
            for epoch in range(start, last_epoch):
                _set_modes(model, trained)
                batches = order(epoch, generator)
                if not batches:
                    raise ConfigError(
                        f"{stage}: no batch to train on ({len(data)} samples, batch_size={config.batch_size}, "
                        f"drop_last={config.drop_last}); lower train.batch_size"
                    )
                rows = torch.cat(batches)
                drawn = config.augment.draw(len(rows), data.images.shape[-1], generator)
                drawn = {name: value.to(device) for name, value in drawn.items()}
                own_seed = int(torch.randint(2**62, (), generator=generator))
                torch.manual_seed(own_seed)  # dropout draws from the global generator
                extra = torch.Generator().manual_seed(own_seed)
                rows = rows.to(images.device if isinstance(images, Tensor) else "cpu")

                losses = torch.zeros(len(batches), device=device)
                done = 0
                for step, rows_of_batch in enumerate(batches):
                    interrupt.raise_if_requested()
                    batch = make_batch(slice(done, done + len(rows_of_batch)), rows, drawn, epoch, extra)
                    done += len(rows_of_batch)
                    for optimizer, (_, recipe) in zip(optimizers, recipes, strict=True):
                        for group in optimizer.param_groups:
                            group["lr"] = recipe.lr_at(epoch, step, len(batches))
                        optimizer.zero_grad(set_to_none=True)
                    with hardware.autocast():
                        loss = loss_fn(forward, batch)
                    loss.backward()
                    for optimizer in optimizers:
                        optimizer.step()
                    losses[step] = loss.detach()
                mean_loss = _finite_mean(losses, batches, epoch, stage)
                model.eval()
                if not all(bool(value.isfinite().all()) for value in model.state_dict().values()):
                    raise Diverged(
                        f"{stage}: the weights became infinite or NaN in epoch {epoch + 1}; lower the learning rate; the "
                        "last good checkpoint is kept"
                    )
                if on_epoch_end is not None:
                    with checkpoints.uncounted() if checkpoints else contextlib.nullcontext():
                        on_epoch_end(epoch + 1, model, mean_loss)
                if checkpoints is not None and epoch + 1 < last_epoch and checkpoints.due():
                    _save(checkpoints, epoch + 1, model, optimizers, generator)
                advance(1, loss=f"{mean_loss:.3f}")
    model.eval()


def resident(images: Images, limit_gib: float, device: torch.device) -> Images:
    """The images on the device when they fit into ``limit_gib``, else as they are (batches then travel)."""
    if isinstance(images, Tensor) and images.numel() <= limit_gib * 2**30:
        return images.to(device)
    return images


def _devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


@contextlib.contextmanager
def _only_trainable(model: nn.Module, trained: list[nn.Module]) -> Iterator[None]:
    """Gradients only for ``trained`` inside; as before afterwards."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for part in trained:
        part.requires_grad_(True)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def _set_modes(model: nn.Module, trained: list[nn.Module]) -> None:
    model.eval()
    for part in trained:
        part.train()


def _finite_mean(losses: Tensor, batches: list[Tensor], epoch: int, stage: str) -> float:
    """The epoch's mean loss. Looking once an epoch spares a device synchronisation every step; nothing of the epoch
    was saved yet, so the last checkpoint is still good."""
    values = losses.cpu()
    bad = (~torch.isfinite(values)).nonzero().flatten()
    if len(bad):
        step = int(bad[0])
        rows = batches[step].tolist()
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        raise Diverged(
            f"{stage}: the loss became {values[step].item()} at epoch {epoch + 1}, step {step + 1} of {len(values)} "
            f"(training rows {shown}); lower the learning rate; the last good checkpoint is kept"
        )
    return float(values.double().mean())


def _save(
    checkpoints: Checkpoints,
    epoch: int,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    generator: torch.Generator,
) -> None:
    tensors = {f"model/{name}": value.clone() for name, value in model.state_dict().items()}
    plain = []
    for number, optimizer in enumerate(optimizers):
        packed, values = pack_optimizer(optimizer)
        tensors |= {f"{number}/{name}": value for name, value in packed.items()}
        plain.append(values)
    tensors["generator"] = generator.get_state()
    checkpoints.save(epoch, tensors, {"optimizers": plain})


def _resume(
    checkpoints: Checkpoints,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    generator: torch.Generator,
    progress: Progress,
) -> int:
    """Loads the newest good checkpoint; returns the number of epochs already done."""
    bundle = checkpoints.load(progress.warn)
    if bundle is None:
        return 0
    weights = {name[6:]: value for name, value in bundle.tensors.items() if name.startswith("model/")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"the checkpoint in {checkpoints.folder} does not fit the model: {error}") from error
    for number, (optimizer, plain) in enumerate(zip(optimizers, bundle.meta["optimizers"], strict=True)):
        start = f"{number}/optim/"
        packed = {name[len(start) - 6 :]: value for name, value in bundle.tensors.items() if name.startswith(start)}
        unpack_optimizer(optimizer, packed, plain)
    generator.set_state(bundle.tensors["generator"])
    epoch = int(bundle.meta["epoch"])
    progress.say(f"resuming after epoch {epoch}")
    return epoch


def epochs_for_steps(steps: int, steps_per_epoch: int) -> int:
    """The first epoch (counted from 1) after which at least ``steps`` steps were made."""
    return max(1, math.ceil(steps / steps_per_epoch))
