"""The decoders of Trap and Replace: those of the paper's code layer by layer, the rule for all others by its shapes."""

import pytest
import torch
from torch import nn

from backdoor_bench.models.decoder import build_decoder
from backdoor_bench.models.resnet import ResNet
from backdoor_bench.models.small_cnn import SmallCNN
from backdoor_bench.models.wrn import WideResNet16

MEAN = STD = (0.5,) * 3


def layers(channels, side, size):
    """In short: "32>16 k4s2p1", "relu", "norm16", "sigmoid"."""
    found = []
    for layer in build_decoder(channels, side, size, 0).layers:
        if isinstance(layer, nn.ConvTranspose2d):
            shape = f"k{layer.kernel_size[0]}s{layer.stride[0]}p{layer.padding[0]}"
            found.append(f"{layer.in_channels}>{layer.out_channels} {shape}")
        elif isinstance(layer, nn.InstanceNorm2d):
            assert not layer.affine
            found.append(f"norm{layer.num_features}")
        else:
            found.append(type(layer).__name__.lower())
    return found


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((32, 16, 32), "32>32 k4s2p1, relu, 32>3 k3s1p1, sigmoid"),  # WRN-16-1, 9/5
        ((64, 8, 32), "64>32 k4s2p1, relu, 32>3 k4s2p1, sigmoid"),  # 11/3 and 13/1
        (
            (256, 14, 224),  # ResNet-34, 27/7
            "256>128 k4s2p1, 128>128 k4s2p1, norm128, relu, 128>64 k4s2p1, norm64, relu, 64>3 k4s2p1, sigmoid",
        ),
        (
            (512, 7, 224),  # 29/5, 31/3, 33/1
            "512>256 k4s2p1, 256>128 k4s2p1, norm128, relu, 128>64 k4s2p1, 64>32 k4s2p1, norm32, relu, "
            "32>3 k4s2p1, sigmoid",
        ),
        # ours
        ((64, 4, 32), "64>32 k4s2p1, 32>16 k4s2p1, norm16, relu, 16>3 k4s2p1, sigmoid"),
        ((16, 32, 32), "16>16 k3s1p1, relu, 16>3 k3s1p1, sigmoid"),
        ((12, 2, 16), "12>8 k4s2p1, 8>8 k4s2p1, norm8, relu, 8>3 k4s2p1, sigmoid"),
    ],
)
def test_layers(shape, wanted):
    assert layers(*shape) == wanted.split(", ")


def every_split(model, size):
    """Each place's decoder applied to what the stem makes of one black image."""
    maps = model.eval().normalise(torch.zeros(1, 3, size, size))
    for name, block in model.blocks.named_children():
        maps = block(maps)
        decoder = build_decoder(maps.shape[1], maps.shape[-1], size, 0)
        yield name, decoder(maps)


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        (WideResNet16(1, "none"), 32),
        (WideResNet16(1, "none"), 50),  # 7 x 8 exceeds it: cut off
        (ResNet(34, "auto", "none"), 32),
        (ResNet(18, "auto", "none"), 32),
        (SmallCNN([16, 32, 64, 128], "none"), 32),
    ],
)
def test_every_split_gives_images_of_the_right_size(spec, size):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, made in every_split(spec.build(10, size, MEAN, STD), size):
            assert made.shape == (1, 3, size, size), name
            assert 0 < made.min() <= made.max() < 1, name


def test_the_printed_splits_of_resnet34_at_224_px():
    torch.manual_seed(0)
    model = ResNet(34, "auto", "none").build(10, 224, MEAN, STD).eval()
    seen = {}
    with torch.no_grad():
        maps = model.split("layer3_5")[0](torch.zeros(1, 3, 224, 224))
        seen["layer3_5"] = maps
        for name in ("layer4_0", "layer4_1", "layer4_2"):
            maps = seen[name] = model.blocks.get_submodule(name)(maps)
        assert seen["layer3_5"].shape == (1, 256, 14, 14)
        for name, maps in seen.items():
            assert build_decoder(maps.shape[1], maps.shape[-1], 224, 0)(maps).shape == (1, 3, 224, 224), name


def test_the_seed_draws_it_and_leaves_the_global_stream_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    one, two, other = (build_decoder(8, 8, 16, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), wanted)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["layers.0.weight"], other["layers.0.weight"])
