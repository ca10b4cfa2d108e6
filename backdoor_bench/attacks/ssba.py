"""SSBA (ISSBA, Li et al. 2021): a steganographic network hides the same string, differently in every image.

The published encoder was trained on ImageNet; ours is trained on the data at hand with random strings. The loss is that
of BackdoorBench's port: cross-entropy of the bits, and a growing weight on the squared residual once they can be read;
no perceptual loss and no critic. Ours are the number of steps, which does not grow with the data, the weight, the
steps of its growth, and a learning rate that starts higher and falls to 0. The string fills the bits by repetition
instead of an error-correcting code: nobody has to correct it, it only has to be the same everywhere. Images larger than
``enc_size`` are shrunk for the encoder and its residual is enlarged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoor_bench.attacks.common import check_facts, check_rows, check_settings, poison_static
from backdoor_bench.data.augment import Augmentation
from backdoor_bench.errors import ConfigError, check_range
from backdoor_bench.training.fit import Batch, fit, shuffled
from backdoor_bench.training.seeds import derive, generator
from backdoor_bench.triggers.generators import working_side
from backdoor_bench.triggers.steganography import MULTIPLE, HiddenBits, Steganography, bits_of
from backdoor_bench.types import AttackerView, Facts, PoisonedSet, Trigger

SMALL_SIDE, SMALL_BITS, LARGE_BITS = 64, 20, 100  # bits=null: BackdoorBox's 20 at 32 px, ISSBA's 100
READABLE = 0.9  # share of bits from which the residual is held down; BackdoorBench
EPOCH_STEPS = 100  # at most so many steps between two checkpoints, with a new random choice of images
CHECKED = 512  # at most so many training images on which the finished encoder is tried
LEAST_ACCURACY, MOST_RESIDUAL, LEAST_PSNR = 0.98, 4.0, 30.0  # what a good encoder reaches (attacks.md A18)


@dataclass(frozen=True)
class Ssba:
    """Hides ``secret`` in ``bits`` bits of every image; ``enc_*`` say how the encoder is trained, see
    conf/attack/ssba.yaml."""

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
    secret: str
    bits: int | None
    enc_size: int
    enc_steps: int
    enc_lr: float
    enc_batch: int
    mse_weight: float
    ramp_wait: int
    ramp_steps: int

    def __post_init__(self) -> None:
        check_settings(self)
        if not isinstance(self.secret, str) or not self.secret:
            raise ConfigError(f"attack.secret={self.secret!r} is not allowed: give a text of at least one character")
        if self.bits is not None:
            check_range("attack.bits", self.bits, 1, 10_000, integer=True)
        check_range("attack.enc_size", self.enc_size, MULTIPLE, 4096, integer=True)
        if self.enc_size % MULTIPLE:
            raise ConfigError(f"attack.enc_size={self.enc_size} is not allowed: it must be divisible by {MULTIPLE}")
        check_range("attack.enc_steps", self.enc_steps, 1, 10_000_000, integer=True)
        check_range("attack.enc_lr", self.enc_lr, 0, 1000, low_open=True)
        check_range("attack.enc_batch", self.enc_batch, 1, 1_000_000, integer=True)
        check_range("attack.mse_weight", self.mse_weight, 0, float("inf"), high_open=True)
        check_range("attack.ramp_wait", self.ramp_wait, 0, float("inf"), integer=True)
        check_range("attack.ramp_steps", self.ramp_steps, 1, float("inf"), integer=True)

    def check(self, facts: Facts) -> None:
        """Raise ConfigError if the classes, the rate, the image or the string cannot fit."""
        check_facts(self, facts)
        side = working_side(self.enc_size, facts.image_size, MULTIPLE)
        if side == 0:
            raise ConfigError(
                f"attack=ssba needs images of at least {MULTIPLE} px, but dataset.image_size={facts.image_size}; "
                "use larger images"
            )
        length, room = 8 * len(self.secret.encode()), self._bits(side)
        if length > room:
            raise ConfigError(
                f"attack.secret={self.secret!r} has {length} bits, but attack.bits={self.bits} gives {room}; shorten it "
                f"or set attack.bits to at least {length}"
            )

    def poison(self, view: AttackerView) -> PoisonedSet:
        """The training set with the string hidden in the chosen rows."""
        check_rows(self, view)
        return poison_static(self, view, *self.triggers(view))

    def triggers(self, view: AttackerView) -> tuple[Trigger, Trigger]:
        """The hidden string, at training and at test."""
        side = working_side(self.enc_size, view.train.images.shape[-1], MULTIPLE)
        bits = self._bits(side)
        with torch.random.fork_rng():
            torch.manual_seed(derive(self.seed, "ssba networks"))
            nets = Steganography(bits, side)
        view.train_config.hardware.place(nets)
        settings = {
            name: value for name, value in asdict(self).items() if name.startswith(("enc_", "mse_", "ramp_"))
        } | {"bits": bits, "side": side, "seed": self.seed}
        view.learned.fitted("ssba_encoder", nets, self._train(view, nets), settings)
        nets.requires_grad_(False).eval()
        trigger = HiddenBits(nets, bits_of(self.secret, bits), view.device)
        found = view.learned.keep(
            "ssba_check", lambda: ({}, _tried(view, trigger)), settings | {"secret": self.secret}
        ).meta
        text = (
            f"ssba encoder: {found['bit_accuracy']:.1%} of the bits are read, mean residual {found['residual']:.2f} of "
            f"255, PSNR {found['psnr']:.1f} dB; residuals of two images are alike by {found['alike']:.2f} (cosine)"
        )
        view.progress.say(text)
        if found["bit_accuracy"] < LEAST_ACCURACY or found["residual"] > MOST_RESIDUAL or found["psnr"] < LEAST_PSNR:
            view.progress.warn(
                f"{text}; a good one has at least {LEAST_ACCURACY:.0%}, at most {MOST_RESIDUAL:g} and at least "
                f"{LEAST_PSNR:g} dB: raise attack.enc_steps or change attack.mse_weight"
            )
        return trigger, trigger

    def _bits(self, side: int) -> int:
        return self.bits if self.bits is not None else SMALL_BITS if side < SMALL_SIDE else LARGE_BITS

    def _train(self, view: AttackerView, nets: Steganography) -> Callable[[Any], None]:
        """Encoder and decoder together, each image with a new random string at every step."""
        hardware = view.train_config.hardware
        size = min(self.enc_batch, len(view.train))
        all_batches = shuffled(torch.arange(len(view.train)), size, drop_last=True)
        steps = min(EPOCH_STEPS, len(view.train) // size)
        recipe = replace(
            view.train_config, epochs=-(-self.enc_steps // steps), batch_size=size, optimizer="adam", lr=self.enc_lr,
            betas=(0.9, 0.999), weight_decay=0.0, nesterov=False, schedule="cosine", schedule_unit="step",
            warmup_epochs=0.0, warmup_from=0.0, lr_min=0.0, label_smoothing=0.0, augment=Augmentation(0, False, 0.0, 0),
            # The residual is smaller than what bfloat16 tells apart in a pixel.
            hardware=replace(hardware, precision="fp32") if hardware.precision == "bf16" else hardware,
        )  # fmt: skip

        def loss_fn(_model: nn.Module, batch: Batch) -> Tensor:
            count = (len(batch.images), nets.bits)
            bits = torch.randint(2, count, generator=batch.generator).float().to(batch.images.device)
            residual = nets.residual(batch.images, bits)
            logits = nets.read((batch.images + residual).clamp(0, 1))
            with torch.no_grad():
                readable = ((logits > 0) == (bits > 0.5)).float().mean() > READABLE
                nets.steps += (readable | (nets.steps > 0)).float()
                weight = self.mse_weight * ((nets.steps - self.ramp_wait) / self.ramp_steps).clamp(0, 1)
            return F.binary_cross_entropy_with_logits(logits, bits) + weight * residual.square().mean()

        return lambda checkpoints: fit(
            nets, view.train, recipe, generator=generator(self.seed, "ssba encoder"), stage="ssba_encoder",
            progress=view.progress, loss_fn=loss_fn, order=lambda epoch, stream: all_batches(epoch, stream)[:steps],
            checkpoints=checkpoints,
        )  # fmt: skip


@torch.no_grad()
def _tried(view: AttackerView, trigger: HiddenBits) -> dict[str, float]:
    """How well the string is read from the stored uint8 images, and how large the residual is, in units of 1/255."""
    total, count = len(view.train), min(CHECKED, len(view.train))
    images = view.train.images[torch.arange(count) * total // count].to(view.device)  # evenly: of all classes
    stamped = trigger(images)
    difference = stamped.float() - images.float()
    wanted = trigger.bits.to(view.device) > 0.5
    read = torch.cat([trigger.nets.read(part.float() / 255) > 0 for part in stamped.split(64)])
    mse = difference.square().mean((1, 2, 3)).clamp(min=1e-6)
    directions = F.normalize(difference.flatten(1))
    return {
        "alike": float((directions * directions.roll(1, 0)).sum(1).mean()),
        "bit_accuracy": float((read == wanted).float().mean()),
        "residual": float(difference.abs().mean()),
        "psnr": float((10 * (255**2 / mse).log10()).mean()),
    }
