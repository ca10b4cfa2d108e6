"""The new head: where the network is cut, that the stem stays bit for bit, dropout, CutMix, both recipes."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from backdoor_bench.data.augment import Augmentation
from backdoor_bench.errors import ConfigError
from backdoor_bench.models.resnet import ResNet
from backdoor_bench.models.small_cnn import SmallCNN
from backdoor_bench.models.vgg import VGG19
from backdoor_bench.models.wrn import WideResNet16
from backdoor_bench.removal import replace_head
from backdoor_bench.removal.replace_head import (
    cut_and_mix,
    cutmix_cross_entropy,
    dropout_in_head,
    split_block,
    split_table,
    with_new_head,
)
from backdoor_bench.training.fit import Batch, cross_entropy
from backdoor_bench.types import DefenderView, Facts, ImageSet, Isolation
from tests.conftest import CONF

MEAN = STD = (0.5,) * 3
NOTHING = Isolation(flagged=torch.zeros(128, dtype=torch.bool))
DEFAULT = instantiate(OmegaConf.load(CONF / "defense" / "removal" / "replace_head.yaml"))
WRN, RESNET34, SMALL = WideResNet16(1, "none"), ResNet(34, "auto", "none"), SmallCNN([16, 32, 64, 128], "none")


def with_recipe(**values):
    return replace(DEFAULT, recipes=DEFAULT.recipes | {"paper": replace(DEFAULT.recipes["paper"], **values)})


def build(spec, size=32, classes=4):
    torch.manual_seed(0)
    return spec.build(classes, size, MEAN, STD)


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def make_view(blobs, new_model, recipe, stages, rows, progress):
    rest = torch.arange(40)
    return DefenderView(
        train=blobs, holdout=ImageSet(blobs.images[rest], blobs.labels[rest], 4), num_classes=4, new_model=new_model,
        victim=None, train_config=recipe, train_loss=cross_entropy(), generator=torch.Generator().manual_seed(5),
        stages=stages, probe=rows, device=torch.device("cpu"), progress=progress,
    )  # fmt: skip


@pytest.fixture
def view(blobs, recipe, stages, rows, progress):
    return make_view(blobs, lambda classes: build(WRN, 16, classes), recipe, stages, rows, progress)


# ------------------------------------------------------------------ where the network is cut


@pytest.mark.parametrize(
    ("spec", "wanted", "auto"),
    [
        (WRN, {"9/5": "layer2_1", "11/3": "layer3_0", "13/1": "layer3_1", "1/13": "stem"}, "layer3_0"),
        (
            RESNET34,
            {"27/7": "layer3_5", "29/5": "layer4_0", "31/3": "layer4_1", "33/1": "layer4_2", "1/33": "stem"},
            "layer4_1",
        ),
        (ResNet(18, "auto", "none"), {"13/5": "layer3_1", "15/3": "layer4_0", "17/1": "layer4_1"}, "layer4_0"),
        (SMALL, {"1/4": "conv1", "3/2": "conv3", "4/1": "conv4"}, "conv3"),
        (VGG19("none"), {"15/2": "conv5_3", "12/5": "conv4_4"}, "conv5_3"),
        (SmallCNN([8], "none"), {"1/1": "conv1"}, "conv1"),
    ],
)
def test_split_table(spec, wanted, auto):
    model = build(spec)
    table = split_table(model)
    assert wanted.items() <= table.items()
    assert split_block(model, "auto", "k") == auto
    for counts, block in wanted.items():
        first = counts.split("/")[0]
        assert {split_block(model, name, "k") for name in (counts, first, int(first), block)} == {block}


def test_a_norm_block_can_be_named_too():
    assert split_block(build(WRN), "norm", "k") == "norm"


@pytest.mark.parametrize("split", ["10/4", "12", 12, "layer9", 0, "11/2", [11], None])
def test_a_split_that_is_not_there_names_those_that_are(split):
    with pytest.raises(ConfigError, match=r"defense\.split=.*9/5, 11/3, 13/1.*layer3_0, layer3_1, norm"):
        split_block(build(WRN), split, "defense.split")


# ------------------------------------------------------------------ the new head


def test_the_new_head_is_a_new_draw_of_the_networks_own_initialisation():
    victim = build(WRN).eval()
    with torch.no_grad():
        for value in victim.parameters():
            value.add_(1.0)
    new = with_new_head(victim, "layer3_0", build(WRN), torch.Generator().manual_seed(1))
    start = build(WRN).state_dict()
    for name, value in new.state_dict().items():
        if name.startswith(("blocks.layer3_1", "blocks.norm", "head")):
            assert torch.equal(value.flatten().sort().values, start[name].flatten().sort().values), name
            if name.endswith("weight") and value.dim() > 1:
                assert not torch.equal(value, start[name]), name
        else:
            assert torch.equal(value, victim.state_dict()[name]), name
    assert not {id(p) for p in new.parameters()} & {id(p) for p in victim.parameters()}


@pytest.mark.parametrize("stage2", ["paper", "code"])
@pytest.mark.parametrize("split", ["9/5", "11/3", "13/1"])
def test_the_stem_stays_bit_for_bit(view, split, stage2):
    victim = build(WRN, 16).eval()
    for name, value in victim.named_buffers():
        if name.endswith("running_mean"):
            value.add_(0.25)
    before = state(victim)
    short = {name: replace(one, epochs=2) for name, one in DEFAULT.recipes.items()}
    removal = replace(DEFAULT, split=split, stage2=stage2, recipes=short, feature_dropout=True)
    repaired = removal.remove(view, victim, NOTHING)
    assert before.keys() == repaired.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in victim.state_dict().items())
    block = split_block(victim, split, "k")
    frozen = {"blocks." + name for name in victim.block_names[: victim.block_names.index(block) + 1]}
    moved = set()
    for name, value in repaired.state_dict().items():
        if ".".join(name.split(".")[:2]) in frozen:
            assert torch.equal(value, before[name]), name
        elif not torch.equal(value, before[name]):
            moved.add(name)
    assert {"head.weight", "blocks.norm.0.running_mean"} <= moved
    assert not repaired.training
    assert not any(module._forward_pre_hooks for module in repaired.modules())


def test_it_learns_from_the_holdout_alone_and_the_curve_is_told(view, rows, blobs):
    class Forbidden:
        shape = blobs.images.shape

        def __len__(self):
            return 128

    blind = replace(view, train=ImageSet(Forbidden(), blobs.labels, 4))
    repaired = with_recipe(epochs=8, lr=0.05).remove(blind, build(WRN, 16).eval(), NOTHING)
    with torch.no_grad():
        right = (repaired(blobs.images.float() / 255).argmax(1) == blobs.labels).float().mean()
    assert right > 0.9
    assert [(row["stage"], row["epoch"]) for row in rows.rows] == [("removal", epoch) for epoch in range(1, 9)]


def test_it_is_cached_and_resumes_bit_for_bit(view, recipe, rows, stages, tmp_path, progress, monkeypatch):
    from backdoor_bench.cache import Stages

    view = replace(view, train_config=replace(recipe, augment=Augmentation(2, True, 0.0, 0)))
    removal = replace(
        DEFAULT, stage2="code", recipes={"code": replace(DEFAULT.recipes["code"], epochs=3, batch_size=8)}
    )
    victim = build(WRN, 16).eval()
    elsewhere = Stages(tmp_path / "elsewhere", "scope", progress, {}, rows)
    whole = state(removal.remove(replace(view, stages=elsewhere), victim, NOTHING))

    class Stop(Exception):
        pass

    def killed(model=None, flagged=None, *, stage, epoch, detail=None):
        if epoch == 3:
            raise Stop

    with pytest.raises(Stop):
        removal.remove(replace(view, probe=killed), victim, NOTHING)
    resumed = state(removal.remove(view, victim, NOTHING))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())

    monkeypatch.setattr(replace_head, "fit", None)
    found = state(removal.remove(view, victim, Isolation(flagged=torch.ones(128, dtype=torch.bool))))
    assert all(torch.equal(value, found[name]) for name, value in whole.items())
    with pytest.raises(TypeError):
        replace(removal, dropout=0.25).remove(view, victim, NOTHING)


def test_without_a_holdout_it_is_refused():
    facts = Facts(4, 16, 128, 3, 4, holdout_size=0)
    with pytest.raises(ConfigError, match=r"defense\.removal=replace_head needs a clean holdout: set holdout\.size="):
        DEFAULT.check(facts)
    DEFAULT.check(replace(facts, holdout_size=1))


def test_a_split_that_is_not_there_is_refused_before_anything_is_loaded(bench):
    asked = []
    facts = Facts(4, 16, 128, 3, 4, holdout_size=40, outline=lambda: asked.append(1) or build(WRN, 16))
    DEFAULT.check(facts)
    assert not asked  # auto is in every network
    replace(DEFAULT, split=11).check(facts)
    with pytest.raises(ConfigError, match=r"defense\.removal\.split='12/2' .* 9/5, 11/3, 13/1"):
        replace(DEFAULT, split="12/2").check(facts)
    words = ("attack=none", "defense=trap", "defense.removal=replace_head", "holdout.size=64")
    refused = bench(*words, "defense.removal.split=12/2")
    assert (refused.code, refused.out) == (2, "")
    assert "defense.removal.split='12/2' is not allowed with this model: choose auto" in refused.err


@pytest.mark.parametrize("spec", [WRN, RESNET34, SMALL, VGG19("none")])
def test_the_outline_has_the_blocks_of_the_network_and_no_storage(spec):
    with torch.device("meta"):
        outline = spec.build(2, 32, MEAN, STD)
    assert {value.device.type for value in outline.state_dict().values()} == {"meta"}
    assert split_table(outline) == split_table(build(spec))


def test_classes_that_the_holdout_lacks_are_told(view, blobs, progress):
    short = with_recipe(epochs=1)
    short.remove(view, build(WRN, 16).eval(), NOTHING)
    assert progress.warnings == []
    held = (blobs.labels % 2 == 0).nonzero().flatten()
    few = replace(view, holdout=ImageSet(blobs.images[held], blobs.labels[held], 4))
    short.remove(few, build(WRN, 16).eval(), NOTHING)
    (warning,) = progress.warnings
    assert "the holdout of 64 images has none of class 1, 3: a new head cannot know that class" in warning


# ------------------------------------------------------------------ dropout


def dropped(model, block, on_features, images):
    """Names of modules whose input has entries set to 0 (and others doubled) by dropout of 0.5."""
    plain, seen = {}, {}

    def note(store):
        return [
            module.register_forward_hook(lambda _, x, y, name=name: store.update({name: x[0].detach().clone()}))
            for name, module in model.named_modules()
            if name
        ]

    model.eval()
    model.split(block)[1].train()
    with torch.no_grad():
        buffers = copy.deepcopy(model.state_dict())
        handles = note(plain)
        model(images)
        [handle.remove() for handle in handles]
        model.load_state_dict(buffers)
        with dropout_in_head(model, block, 0.5, on_features):
            handles = note(seen)
            model(images)
            [handle.remove() for handle in handles]
            names = {
                name
                for name, module in model.named_modules()
                if module._forward_pre_hooks and (seen[name] == 0).float().mean() > 0.4
            }
            count = sum(bool(module._forward_pre_hooks) for module in model.modules())
    assert count == len(names)
    first = [name for name in plain if name in names][:1]
    for name in first:  # what comes before the first is untouched
        kept = seen[name] != 0
        torch.testing.assert_close(seen[name][kept], 2 * plain[name][kept])
    return names


@pytest.mark.parametrize(
    ("spec", "block", "on_features", "wanted"),
    [
        (WRN, "layer2_1", False, {"blocks.layer3_0.conv2", "blocks.layer3_1.conv2"}),
        (WRN, "layer3_0", False, {"blocks.layer3_1.conv2"}),
        (WRN, "layer3_0", True, {"blocks.layer3_1.conv2", "blocks.norm"}),
        (WRN, "layer3_1", False, set()),
        (WRN, "layer3_1", True, {"blocks.norm"}),
        (RESNET34, "layer3_5", False, {"blocks.layer4_1.conv2", "blocks.layer4_2.conv2"}),
        (RESNET34, "layer4_1", True, {"blocks.layer4_2.conv2", "pool"}),
        (RESNET34, "layer4_2", False, set()),
        (SMALL, "conv2", False, set()),
        (SMALL, "conv2", True, {"pool"}),
    ],
)
def test_where_values_are_dropped(spec, block, on_features, wanted):
    model = build(spec)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert dropped(model, block, on_features, images) == wanted
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad(), dropout_in_head(model.eval(), block, 0.5, True):
        assert torch.equal(model(images), model(images))  # not in eval mode


# ------------------------------------------------------------------ CutMix


class Draws:
    """Stands in for torch.rand, torch.randint and torch.randperm in turn."""

    def __init__(self, monkeypatch, lam, centres, partner):
        numbers = iter(centres)
        monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(lam, dtype=torch.float64))
        monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(next(numbers)))
        monkeypatch.setattr(torch, "randperm", lambda *_, **__: torch.tensor(partner))


@pytest.mark.parametrize(
    ("lam", "centres", "rows", "columns"),
    [
        (0.75, (4, 4), (2, 6), (2, 6)),  # side int(8 * 0.5) = 4, two on each side
        (0.75, (0, 7), (0, 2), (5, 8)),  # clipped at the border
        (0.36, (4, 4), (1, 7), (1, 7)),  # int(8 * 0.8) = 6
        (0.6, (4, 4), (2, 6), (2, 6)),  # int(8 * 0.632) = 5, of which 2 on each side
        (0.0, (4, 4), (0, 8), (0, 8)),  # all of the partner
        (0.999, (4, 4), (4, 4), (4, 4)),  # nothing
    ],
)
def test_the_box_by_hand(monkeypatch, lam, centres, rows, columns):
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 8, 8).clone()
    before = images.clone()
    Draws(monkeypatch, lam, centres, [1, 2, 0])
    mixed, partner, share = cut_and_mix(images, torch.Generator())
    wanted = before.clone()
    for i in range(3):
        for y in range(*rows):
            for x in range(*columns):
                wanted[i, :, y, x] = before[[1, 2, 0][i], :, y, x]
    assert torch.equal(mixed, wanted)
    assert torch.equal(images, before)
    assert partner.tolist() == [1, 2, 0]
    assert share == pytest.approx(1 - (rows[1] - rows[0]) * (columns[1] - columns[0]) / 64)


def test_the_loss_weighs_both_labels_by_pixels(monkeypatch):
    torch.manual_seed(0)
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    batch = Batch(images, labels, torch.arange(4), 0, images, lambda some, places: some, torch.Generator())
    Draws(monkeypatch, 0.75, (0, 7), [2, 3, 1, 0])
    found = cutmix_cross_entropy(0.1)(model, batch)
    mixed = images.clone()
    mixed[:, :, :2, 5:] = images[[2, 3, 1, 0], :, :2, 5:]
    log_p = model(mixed).log_softmax(1)
    total = 0.0
    for i, partner in enumerate([2, 3, 1, 0]):
        for share, label in ((58 / 64, labels[i]), (6 / 64, labels[partner])):
            target = 0.9 * F.one_hot(label, 3) + 0.1 / 3
            total = total - share * (target * log_p[i]).sum()
    torch.testing.assert_close(found, total / 4)


def test_cutmix_draws_from_its_stream():
    images = torch.rand(6, 3, 16, 16)
    one, two, three = (cut_and_mix(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], three[0])


# ------------------------------------------------------------------ recipes


def test_paper_trains_as_stage_1_and_code_has_its_own_values(recipe):
    base = replace(recipe, optimizer="adam", lr=1e-3, epochs=200, batch_size=256, drop_last=True, warmup_epochs=3.0)
    paper = DEFAULT.recipes["paper"].on(base, 0.1)
    assert paper == replace(base, batch_size=32, drop_last=False, label_smoothing=0.1)
    code = DEFAULT.recipes["code"].on(recipe, 0.1)
    assert code == replace(
        recipe, optimizer="adam", lr=0.03, weight_decay=5e-4, schedule="cosine", epochs=100, batch_size=64,
        drop_last=True, label_smoothing=0.1,
    )  # fmt: skip
    assert replace(DEFAULT.recipes["paper"], epochs=2).on(base, 0.0).warmup_epochs == 2


@pytest.mark.parametrize("own", [{"lr": 0.01}, {"schedule": "cosine"}])
def test_a_schedule_of_its_own_does_not_end_where_the_first_training_does(recipe, own):
    base = replace(recipe, lr=0.5, lr_min=0.05, warmup_epochs=1.0, warmup_from=0.2)
    paper = DEFAULT.recipes["paper"]
    assert (paper.on(base, 0.1).lr_min, paper.on(base, 0.1).warmup_from) == (0.05, 0.2)
    config = replace(paper, **own).on(base, 0.1)
    assert (config.lr_min, config.warmup_from) == (0, 0)
    assert config.lr == own.get("lr", 0.5)


@pytest.mark.parametrize(
    ("key", "value"),
    [("epochs", 0), ("lr", 0), ("momentum", 1), ("weight_decay", -1), ("batch_size", 2.5), ("schedule", "step"),
     ("optimizer", "adamw"), ("cutmix", 1), ("drop_last", None)],
)  # fmt: skip
def test_a_bad_value_of_a_recipe_names_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"defense\.removal\.recipes\.paper\.{key}={value!r}"):
        with_recipe(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"), [("stage2", "other"), ("dropout", 1), ("feature_dropout", None), ("label_smoothing", 1)]
)
def test_a_bad_value_names_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"defense\.removal\.{key}={value!r}"):
        replace(DEFAULT, **{key: value})
