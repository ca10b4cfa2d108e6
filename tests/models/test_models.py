"""Every model YAML keeps the contract of Classifier."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backdoor_bench.errors import ConfigError
from backdoor_bench.models.classifier import Classifier, count_parameters, gated_logits, replace_head
from backdoor_bench.types import Facts

CONF = Path(__file__).parents[2] / "conf" / "model"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.5)
FEATURE_DIM = {
    "small_cnn": 128, "tiny": 16, "resnet18": 512, "resnet34": 512, "resnet50": 2048, "wrn16_1": 64, "wrn16_4": 256,
    "mobilenetv2": 1280, "vgg19": 512, "densenet161": 2208,
}  # fmt: skip
# A pair a convolution, except for those whose output is added or concatenated before the next norm.
PAIRS = {
    "small_cnn": 4, "tiny": 2, "resnet18": 20, "resnet34": 36, "resnet50": 53, "wrn16_1": 6, "wrn16_4": 7,
    "mobilenetv2": 52, "vgg19": 16, "densenet161": 79,
}  # fmt: skip


def spec(name: str, **changes: Any) -> Any:
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    module, _, kind = values["_target_"].rpartition(".")
    arguments = {key: value for key, value in values.items() if not key.startswith("_")}
    return getattr(importlib.import_module(module), kind)(**(arguments | changes))


def build(name: str, num_classes: int = 10, image_size: int = 32, **changes: Any) -> Classifier:
    """A network in eval mode whose batch norms have statistics and weights of a trained one's kind, not 0 and 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Classifier = spec(name, **changes).build(num_classes, image_size, MEAN, STD)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.7, 1.3)
                nn.init.uniform_(module.bias, -0.2, 0.2)
                module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
                module.running_var.uniform_(0.7, 1.3)  # type: ignore[union-attr]
    return model.eval()


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> Classifier:
    """Shared by the tests of one network, which must leave it as it is."""
    return build(name)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def facts(image_size: int) -> Facts:
    return Facts(num_classes=10, image_size=image_size, train_size=1000, epochs=1, steps_per_epoch=8)


def stored_inputs_and_outputs(model: nn.Module, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (input, output) of every convolution, batch norm and linear layer in one forward pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear)
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


def test_yaml_lists_exactly_the_constructor_arguments(name: str) -> None:
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    parameters = inspect.signature(type(spec(name))).parameters
    assert {key for key in values if not key.startswith("_")} == set(parameters)
    assert all(parameter.default is inspect.Parameter.empty for parameter in parameters.values())
    assert values["_convert_"] == "all"


def test_shapes(name: str, model: Classifier, images: Tensor) -> None:
    images = torch.cat([images, images.flip(3)])
    with torch.no_grad():
        features = model.features(images)
        logits, maps = model.logits_and_stages(images)
        assert torch.equal(model.head(features), logits)
        assert torch.equal(model(images), logits)
    assert model.feature_dim == FEATURE_DIM[name]
    assert features.shape == (2, FEATURE_DIM[name])
    assert logits.shape == (2, model.num_classes) == (2, 10)
    assert list(maps) == list(model.stages) == [f"layer{k + 1}" for k in range(len(maps))]
    sides = [map_.shape[-1] for map_ in maps.values()]
    assert all(map_.ndim == 4 for map_ in maps.values())
    assert sides == sorted(sides, reverse=True)
    assert sides[-1] > 1


def test_split_anywhere_gives_the_same_logits(model: Classifier, images: Tensor) -> None:
    with torch.no_grad():
        wanted = model(images)
        for block in model.block_names:
            stem, rest = model.split(block)
            assert torch.equal(rest(stem(images)), wanted), block
        for stage, maps in model.stage_outputs(images).items():
            assert torch.equal(model.split(model.stages[stage])[0](images), maps), stage
    ours = {id(parameter) for parameter in model.parameters()}
    stem, rest = model.split(model.block_names[0])
    assert {id(parameter) for part in (stem, rest) for parameter in part.parameters()} == ours


def test_unknown_split_names_the_blocks(model: Classifier) -> None:
    with pytest.raises(ConfigError, match=model.block_names[0]):
        model.split("layer9_9")


def test_pairs_are_norms_that_read_exactly_the_convolution(name: str, model: Classifier, images: Tensor) -> None:
    seen = stored_inputs_and_outputs(model, images)
    assert len(model.channels) == PAIRS[name]
    for pair in model.channels:
        assert torch.equal(seen[pair.norm][0], seen[pair.conv][1]), pair
        readers = [other for other, (x, _) in seen.items() if x is seen[pair.conv][1]]
        assert readers == [pair.norm]
    assert set(model.norm_names) >= {pair.norm for pair in model.channels}


def test_consumers_are_the_only_ones_that_see_a_change_first(name: str, model: Classifier, images: Tensor) -> None:
    """With all consumers held back, a change of the channels reaches no other convolution or linear layer."""
    pair = model.channels[len(model.channels) // 2]
    before = stored_inputs_and_outputs(model, images)
    norm = model.get_submodule(pair.norm)
    handles = [norm.register_forward_hook(lambda *args: args[2] + 1)]
    handles += [
        model.get_submodule(reader).register_forward_hook(lambda *_, kept=before[reader][1]: kept)
        for reader in pair.consumers
    ]
    after = stored_inputs_and_outputs(model, images)
    for handle in handles:
        handle.remove()
    assert pair.consumers
    changed = {
        other
        for other, (x, _) in after.items()
        if not torch.equal(x, before[other][0]) and not isinstance(model.get_submodule(other), nn.BatchNorm2d)
    }
    assert changed == set(pair.consumers)


def test_gates(model: Classifier, images: Tensor) -> None:
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    sizes = {norm: model.get_submodule(norm).num_features for norm in model.norm_names}
    ones = {norm: torch.ones(size, requires_grad=True) for norm, size in sizes.items()}
    logits = gated_logits(model, images, ones, ones)
    assert torch.equal(logits, model(images))
    logits.square().sum().backward()
    assert all(gate.grad is not None and gate.grad.abs().sum() > 0 for gate in ones.values())
    assert all(parameter.grad is None for parameter in model.parameters())

    norm = model.norm_names[len(sizes) // 2]
    gate = torch.ones(sizes[norm])
    gate[0] = 0
    outputs: list[Tensor] = []
    handle = model.get_submodule(norm).register_forward_hook(lambda *args: outputs.append(args[2]))
    with torch.no_grad():
        model(images)
        gated_logits(model, images, {norm: gate})
        gated_logits(model, images, {norm: gate}, {norm: gate})
    handle.remove()
    plain, weight_only, both = outputs
    assert plain[:, 0].std() > 0
    assert torch.all(weight_only[:, 0] == saved[f"{norm}.bias"][0])
    assert torch.all(both[:, 0] == 0)
    assert torch.equal(both[:, 1:], plain[:, 1:])

    model.train()
    gated_logits(model, images, {norm: gate})
    model.eval()
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())


def test_gates_refuse_what_is_no_norm_and_wrong_sizes(images: Tensor) -> None:
    model = build("tiny")
    with pytest.raises(KeyError, match="head"):
        gated_logits(model, images, {"head": torch.ones(10)})
    with pytest.raises(ValueError, match="8 channels"):
        gated_logits(model, images, {"blocks.conv1.norm": torch.ones(1)})


def test_new_head(name: str, model: Classifier, images: Tensor) -> None:
    before = torch.random.get_rng_state()
    first = replace_head(model, 11, torch.Generator().manual_seed(3))
    again = replace_head(model, 11, torch.Generator().manual_seed(3))
    other = replace_head(model, 11, torch.Generator().manual_seed(4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.head.weight, again.head.weight)
    assert torch.equal(first.head.bias, again.head.bias)
    assert not torch.equal(first.head.weight, other.head.weight)
    bound = FEATURE_DIM[name] ** -0.5
    assert 0.9 * bound < first.head.weight.abs().max() <= bound
    with torch.no_grad():
        assert torch.equal(first.features(images), model.features(images))
        assert first(images).shape == (1, 11)
    assert model.num_classes == 10
    assert first.blocks is not model.blocks
    assert all(parameter.requires_grad for parameter in first.head.parameters())


def test_safetensors_round_trip(name: str, model: Classifier, images: Tensor, tmp_path: Path) -> None:
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh: Classifier = spec(name).build(10, 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).eval()
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(fresh(images), model(images))


def test_hooks_store_what_the_norm_put_out(model: Classifier, images: Tensor) -> None:
    """No later layer may write into a stored map in place."""
    versions: dict[str, tuple[Tensor, int]] = {}
    handles = [
        module.register_forward_hook(lambda _, __, y, name=name: versions.update({name: (y, y._version)}))
        for name, module in model.named_modules()
        if name
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    assert [name for name, (stored, version) in versions.items() if stored._version != version] == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != "densenet161"])  # its step takes seconds
def test_training_step_reaches_every_parameter(name: str) -> None:
    model = build(name, num_classes=3).train()
    model(torch.rand(2, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["tiny", "resnet18", "wrn16_1"])
def test_same_seed_same_weights(name: str) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(spec(name).build(10, 32, MEAN, STD).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])


def test_normalisation_is_the_first_layer(images: Tensor) -> None:
    with_dataset, without = build("tiny"), build("tiny", normalise="none")
    scaled = (images - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(with_dataset(images), without(scaled))
    assert with_dataset.normalise.mean.shape == (1, 3, 1, 1)
    assert not [key for key in without.state_dict() if key.startswith("normalise")]


def test_parameter_counts_by_hand() -> None:
    # tiny: 3*8*9 + 2*8, 8*16*9 + 2*16, 16*10 + 10
    assert count_parameters(build("tiny")) == 216 + 16 + 1152 + 32 + 170
    # WRN-16-1, 3x3 convolutions with bias: i*o*9 + o; norms 2 a channel; 1x1 shortcuts i*o + o.
    conv = {
        pair: pair[0] * pair[1] * 9 + pair[1] for pair in [(3, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
    }
    group1 = 4 * conv[16, 16] + 2 * 4 * 16
    group2 = conv[16, 32] + 3 * conv[32, 32] + 2 * (16 + 3 * 32) + (16 * 32 + 32)
    group3 = conv[32, 64] + 3 * conv[64, 64] + 2 * (32 + 3 * 64) + (32 * 64 + 64)
    assert count_parameters(build("wrn16_1")) == conv[3, 16] + group1 + group2 + group3 + 2 * 64 + 64 * 10 + 10


def test_wrn_initialisation() -> None:
    torch.manual_seed(0)
    model = spec("wrn16_4").build(10, 32, MEAN, STD)
    conv = model.blocks.layer3_1.conv2
    assert conv.weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)  # gain sqrt(2), fan-out 256*9
    assert model.head.weight.std().item() == pytest.approx((2 / (256 + 10)) ** 0.5, rel=0.1)
    assert torch.all(model.head.bias == 0)


def test_wrn_split_of_trap_and_replace(images: Tensor) -> None:
    model = build("wrn16_1")
    shapes = {block: tuple(model.split(block)[0](images).shape[1:]) for block in ("layer2_1", "layer3_0", "layer3_1")}
    assert shapes == {"layer2_1": (32, 16, 16), "layer3_0": (64, 8, 8), "layer3_1": (64, 8, 8)}
    # 11 / 3: the head holds two convolutions and one linear layer.
    rest = [type(module) for module in model.split("layer3_0")[1].modules()]
    assert rest.count(nn.Conv2d) == 2
    assert rest.count(nn.Linear) == 1


def test_small_cnn_pools_down_to_four_pixels() -> None:
    sides = {
        size: [
            maps.shape[-1]
            for maps in build("small_cnn", image_size=size).stage_outputs(torch.rand(1, 3, size, size)).values()
        ]
        for size in (8, 32, 64)
    }
    assert sides == {8: [4, 4, 4, 4], 32: [16, 8, 4, 4], 64: [32, 16, 8, 8]}


@pytest.mark.parametrize(
    ("stem", "size", "last"),
    [("cifar", 32, 4), ("cifar_maxpool", 32, 2), ("imagenet", 64, 2), ("auto", 64, 8), ("auto", 128, 4)],
)
def test_stems(stem: str, size: int, last: int) -> None:
    maps = build("resnet18", image_size=size, stem=stem).stage_outputs(torch.rand(1, 3, size, size))
    assert maps["layer4"].shape == (1, 512, last, last)


@pytest.mark.parametrize(
    ("name", "changes", "size", "message"),
    [
        ("resnet18", {"stem": "imagenet"}, 32, "model.stem=imagenet.*64 px.*dataset.image_size=32.*model.stem=cifar"),
        ("resnet50", {"stem": "cifar_maxpool"}, 28, "model.stem=cifar_maxpool.*32 px"),
        ("densenet161", {"stem": "imagenet"}, 32, "64 px"),
        ("mobilenetv2", {"stem": "imagenet"}, 32, "64 px"),
        ("vgg19", {}, 28, "32 px"),
        ("wrn16_1", {}, 4, "8 px"),
        ("tiny", {}, 2, "4 px"),
    ],
)
def test_images_too_small_for_the_network(name: str, changes: dict[str, str], size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec(name, **changes).check(facts(size))


def test_ordinary_sizes_pass_the_check(name: str) -> None:
    for size in (32, 64, 224):
        spec(name).check(facts(size))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("resnet18", {"depth": 20}, "model.depth=20"),
        ("resnet18", {"stem": "big"}, "model.stem='big'"),
        ("mobilenetv2", {"stem": "cifar_maxpool"}, "model.stem"),
        ("tiny", {"widths": [8, 0]}, r"model.widths\[1\]=0"),
        ("tiny", {"widths": []}, "model.widths"),
        ("tiny", {"widths": 16}, "model.widths"),
        ("wrn16_1", {"width": "two"}, "model.width='two'"),
        ("vgg19", {"normalise": True}, "model.normalise"),
    ],
)
def test_values_that_cannot_work(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec(name, **changes)


class TestAgainstTorchvision:
    """With torchvision's weights in our networks the logits are torchvision's."""

    @staticmethod
    def load_in_order(ours: nn.Module, theirs: nn.Module) -> None:
        state = dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True))
        ours.load_state_dict(state)

    @pytest.mark.parametrize("depth", [18, 34, 50])
    def test_resnet(self, depth: int) -> None:
        import backdoor_bench._torchvision  # noqa: F401, I001
        from torchvision.models import get_model

        reference = get_model(f"resnet{depth}", weights=None, num_classes=7).eval()
        model = build(f"resnet{depth}", num_classes=7, image_size=64, stem="imagenet", normalise="none")
        assert count_parameters(model) == count_parameters(reference)
        self.load_in_order(model, reference)
        images = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(model(images), reference(images))

    def test_vgg(self) -> None:
        import backdoor_bench._torchvision  # noqa: F401, I001
        from torchvision.models.vgg import cfgs, make_layers

        reference = make_layers(cfgs["E"], batch_norm=True).eval()
        model = build("vgg19", normalise="none")
        self.load_in_order(model.blocks, reference)
        images = torch.rand(2, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(model.features(images), reference(images).mean((2, 3)))

    def test_mobilenet(self) -> None:
        import backdoor_bench._torchvision  # noqa: F401, I001
        from torchvision.models import mobilenet_v2

        reference = mobilenet_v2(weights=None, num_classes=7).eval()
        images = torch.rand(1, 3, 64, 64)
        model = build("mobilenetv2", num_classes=7, image_size=64, stem="imagenet", normalise="none")
        self.load_in_order(model, reference)
        with torch.no_grad():
            torch.testing.assert_close(model(images), reference(images))
        small = build("mobilenetv2", num_classes=7)
        assert count_parameters(small) == count_parameters(reference)
        assert small.stage_outputs(torch.rand(1, 3, 32, 32))["layer7"].shape == (1, 320, 4, 4)

    def test_densenet(self) -> None:
        import backdoor_bench._torchvision  # noqa: F401, I001
        from torchvision.models import densenet161

        reference = densenet161(weights=None, num_classes=7).eval()
        model = build("densenet161", num_classes=7, image_size=64, stem="imagenet", normalise="none")
        self.load_in_order(model, reference)
        images = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(model(images), reference(images))


def test_own_networks_do_not_import_torchvision_and_it_can_be_imported_later() -> None:
    script = (
        "import sys; from backdoor_bench.models import densenet, mobilenetv2, resnet, small_cnn, vgg, wrn\n"
        "wrn.WideResNet16(1, 'none').build(10, 32, (), ())\n"
        "assert not any(name.startswith('torchvision') for name in sys.modules), 'torchvision was imported'\n"
        "import backdoor_bench._torchvision\n"
        "assert 'torchvision' not in sys.modules\n"
        "from torchvision import datasets, models\n"
        "from torchvision.transforms import v2\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
