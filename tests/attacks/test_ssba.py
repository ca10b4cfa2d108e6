"""SSBA: a string hidden in every image by a network that was trained to hide strings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from backdoor_bench.errors import ConfigError
from backdoor_bench.training import interrupt
from backdoor_bench.triggers.steganography import Decoder, Encoder, HiddenBits, Steganography, bits_of
from backdoor_bench.types import Facts

CPU = torch.device("cpu")


@pytest.fixture
def ssba(make_attack: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **changes: make_attack("ssba", **({"enc_steps": 6, "enc_batch": 16, "bits": 8} | changes))


@pytest.fixture
def view(make_view: Callable[..., Any]) -> Any:
    return make_view(torch.arange(50) % 10, size=16)


def pictures(count: int, size: int = 16) -> torch.Tensor:
    stream = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, size, size), generator=stream, dtype=torch.uint8)


# --- the networks ---


def test_secret_becomes_bits() -> None:
    # "a" is 0x61 = 01100001.
    assert bits_of("a", 20).tolist() == [0, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1, 0]
    assert bits_of("ab", 16).tolist()[8:] == [0, 1, 1, 0, 0, 0, 1, 0]
    assert bits_of("\u00e9", 8).tolist() == [1, 1, 0, 0, 0, 0, 1, 1]  # the first of its two bytes, 0xC3


def test_networks_have_the_layers_of_the_original() -> None:
    encoder, decoder = Encoder(100, 224), Decoder(100, 224)
    assert encoder.plane.out_features == 16 * 16 * 3

    def shapes(module: nn.Module) -> list[tuple[int, int, int, int]]:
        return [
            (layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0])
            for layer in module.modules()
            if isinstance(layer, nn.Conv2d)
        ]

    assert shapes(encoder.down) == [(6, 32, 3, 1), (32, 32, 3, 2), (32, 64, 3, 2), (64, 128, 3, 2), (128, 256, 3, 2)]
    assert shapes(encoder.up) == [(256, 128, 2, 1), (128, 64, 2, 1), (64, 32, 2, 1), (32, 32, 2, 1)]
    assert shapes(encoder.join) == [(256, 128, 3, 1), (128, 64, 3, 1), (64, 32, 3, 1), (70, 32, 3, 1)]
    assert shapes(encoder.residual) == [(32, 3, 1, 1)]
    assert [shape[1:] for shape in shapes(decoder)] == [
        (32, 3, 2), (32, 3, 1), (64, 3, 2), (64, 3, 1), (64, 3, 2), (128, 3, 2), (128, 3, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(("image", "side"), [(16, 16), (32, 32), (40, 32), (224, 48)])
def test_any_image_size(image: int, side: int) -> None:
    nets = Steganography(8, side).requires_grad_(False)
    images, bits = torch.rand(2, 3, image, image), torch.tensor([[0.0] * 8, [1.0] * 8])
    hidden = nets.hide(images, bits)
    assert hidden.shape == images.shape
    assert 0 <= hidden.min() <= hidden.max() <= 1
    assert nets.read(hidden).shape == (2, 8)
    assert not torch.equal(nets.residual(images[:1], bits[:1]), nets.residual(images[:1], bits[1:]))


def test_trigger_is_a_pure_function_of_each_image() -> None:
    nets = Steganography(8, 16).requires_grad_(False).eval()
    nets.encoder.residual.weight *= 0.05  # as small as a trained one
    trigger = HiddenBits(nets, bits_of("a", 8), CPU)
    images = pictures(300)
    before = images.clone()
    stamped = trigger(images)
    assert torch.equal(images, before)
    assert (stamped.dtype, stamped.shape) == (torch.uint8, images.shape)
    by_hand = nets.hide(images.float() / 255, bits_of("a", 8).expand(300, -1)).mul(255).to(torch.uint8)
    assert (stamped.int() - by_hand.int()).abs().max() <= 1
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([trigger(part) for part in images[order].split(110)]), stamped[order])
    shift = stamped.int() - images.int()
    assert not torch.equal(shift[0], shift[1])


# --- the attack ---


def test_poisoned_set(ssba: Callable[..., Any], view: Any) -> None:
    result = ssba(poison_rate=0.2, cover_rate=0.1).poison(view)
    labels, images = view.train.labels, view.train.images
    assert (int(result.is_poisoned.sum()), int(result.is_cover.sum())) == (9, 5)
    assert (result.train.labels[result.is_poisoned] == 0).all()
    assert torch.equal(result.train.labels[~result.is_poisoned], labels[~result.is_poisoned])
    touched = result.is_poisoned | result.is_cover
    assert torch.equal(result.train.images[~touched], images[~touched])
    assert torch.equal(result.train.images[touched], result.tests[0].trigger(images)[touched])
    assert any("of the bits are read" in text for text in view.warnings), "six steps teach nothing"


def test_same_seed_same_set_and_one_encoder_for_all_rates(ssba: Callable[..., Any], make_view: Any) -> None:
    labels = torch.arange(50) % 10
    view = make_view(labels, size=16)
    one = ssba().poison(view).train.images
    assert torch.equal(one, ssba().poison(make_view(labels, size=16)).train.images)
    assert not torch.equal(one, ssba(seed=1).poison(make_view(labels, size=16)).train.images)
    ssba(poison_rate=0.5, target_class=2, secret="b").triggers(view)
    made = [path.name.split("-")[0] for path in view.learned._root.iterdir()]
    assert sorted(name for name in made if name.startswith("ssba")) == ["ssba_check", "ssba_check", "ssba_encoder"]


def test_encoders_of_two_seeds_in_one_run(ssba: Callable[..., Any], view: Any) -> None:
    """As parts of a multi-trigger attack with seeds of their own."""
    one, other = (ssba(seed=seed).triggers(view)[0](pictures(4)) for seed in (0, 1))
    assert not torch.equal(one, other)


def test_encoder_is_tried_on_all_classes(ssba: Callable[..., Any], view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backdoor_bench.attacks.ssba.CHECKED", 5)
    seen: list[torch.Tensor] = []

    def stamp(self: HiddenBits, images: torch.Tensor, index: Any = None) -> torch.Tensor:
        seen.append(images)
        return images

    monkeypatch.setattr(HiddenBits, "__call__", stamp)
    ssba().triggers(view)
    assert torch.equal(seen[0], view.train.images[::10])  # of 50 rows, which may be sorted by class


def test_interrupted_training_resumes(
    ssba: Callable[..., Any], make_view: Callable[..., Any], view: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ssba().triggers(make_view(torch.arange(50) % 10, size=16))[0](pictures(8))
    calls = iter(range(1000))

    def stop() -> None:
        if next(calls) == 4:  # in the second epoch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(interrupt, "raise_if_requested", stop)
        with pytest.raises(KeyboardInterrupt):
            ssba().triggers(view)
    assert torch.equal(ssba().triggers(view)[0](pictures(8)), whole)


@pytest.mark.slow
def test_encoder_learns_to_hide_bits_faintly(ssba: Callable[..., Any], make_view: Callable[..., Any]) -> None:
    ramp = torch.linspace(40, 210, 16)
    phases = torch.arange(128)[:, None, None, None] * 5 % 40
    images = (ramp.view(16, 1) + ramp.view(1, 16)).div(2).add(phases).expand(128, 3, 16, 16).to(torch.uint8)
    view = make_view(torch.arange(128) % 10, images=images, size=16)
    said: list[str] = []
    view.progress.say = said.append
    ssba(enc_steps=220, ramp_steps=60, enc_lr=2e-3).triggers(view)
    words = said[-1].replace(",", "").replace("%", "").split()
    accuracy, residual, psnr = (float(words[words.index(name) + 1]) for name in ("encoder:", "residual", "PSNR"))
    assert accuracy > 95
    assert residual < 8
    assert psnr > 25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"secret": ""}, r"attack\.secret=''"),
        ({"secret": 5}, r"attack\.secret=5"),
        ({"bits": 0}, r"attack\.bits=0"),
        ({"enc_size": 40}, r"attack\.enc_size=40 .*divisible by 16"),
        ({"enc_steps": 0}, r"attack\.enc_steps=0"),
        ({"mse_weight": -1}, r"attack\.mse_weight=-1"),
    ],
)
def test_bad_values(ssba: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ssba(**changes)


def test_what_the_image_size_rules_out(ssba: Callable[..., Any]) -> None:
    def facts(size: int) -> Facts:
        return Facts(10, size, 1000, epochs=1, steps_per_epoch=1)

    with pytest.raises(ConfigError, match="needs images of at least 16 px"):
        ssba().check(facts(15))
    with pytest.raises(ConfigError, match=r"attack\.secret='abc' has 24 bits, but attack\.bits=None gives 20"):
        ssba(secret="abc", bits=None).check(facts(32))
    ssba(secret="abc", bits=None).check(facts(64))
