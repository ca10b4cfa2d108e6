"""Trap and Replace: its losses by hand, one joint step against autograd, what stage 2 leaves alone, the ablations."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf

from backdoor_bench.cache import Stages
from backdoor_bench.data.augment import Augmentation
from backdoor_bench.defenses import tr
from backdoor_bench.defenses.tr import TrapAndReplace, total_variation, trap_loss, watched
from backdoor_bench.errors import ConfigError
from backdoor_bench.models.decoder import build_decoder
from backdoor_bench.models.wrn import WideResNet16
from backdoor_bench.removal.hiding import Hiding
from backdoor_bench.training.fit import Batch, cross_entropy
from backdoor_bench.types import DefenderView, Facts, FeatureScatter, ImageSet, Reconstructions
from tests.conftest import CONF

REMOVAL = instantiate(OmegaConf.load(CONF / "defense" / "removal" / "replace_head.yaml"))
METHOD = TrapAndReplace(
    split="auto", lambda1=10.0, lambda2=0.1, train_on_holdout=False, replace=True, compare_with_victim=False,
    removal=REMOVAL,
)  # fmt: skip  # the values of conf/defense/tr.yaml, see the first test


def variant(**values):
    return replace(METHOD, **values)


def build(classes=4):
    torch.manual_seed(0)
    return WideResNet16(1, "none").build(classes, 16, (0.0,) * 3, (1.0,) * 3)


class Victim:
    """types.Victim: an untrained network."""

    def __init__(self, cached):
        self.cached, self.calls = cached, 0

    def __call__(self):
        self.calls += 1
        return build().eval()

    def is_cached(self):
        return self.cached


class Shown:
    """types.Probe that keeps curves and figures apart."""

    def __init__(self):
        self.rows, self.details, self.figures = [], [], []

    def __call__(self, model=None, flagged=None, *, stage, epoch, detail=None):
        self.figures += detail.get("figures", ())
        if "loss" in detail:
            self.rows.append((stage, epoch))
            self.details.append(detail)


@pytest.fixture
def view(blobs, recipe, stages, progress):
    held = torch.arange(40)
    return DefenderView(
        train=blobs, holdout=ImageSet(blobs.images[held], blobs.labels[held], 4), num_classes=4, new_model=build,
        victim=Victim(False), train_config=recipe, train_loss=cross_entropy(),
        generator=torch.Generator().manual_seed(5), stages=stages, probe=Shown(), device=torch.device("cpu"),
        progress=progress,
    )  # fmt: skip


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_the_yaml_has_the_papers_values():
    node = OmegaConf.load(CONF / "defense" / "tr.yaml")
    keys = ("split", "lambda1", "lambda2", "train_on_holdout", "replace", "compare_with_victim")
    assert {key: node[key] for key in keys} == {key: getattr(METHOD, key) for key in keys}


def test_the_papers_settings():
    """specs/seed_defenses.md 2.2, 2.5, 2.6."""
    node = OmegaConf.load(CONF / "paper" / "tr.yaml")
    assert {"override /model": "wrn16_1"} in OmegaConf.to_container(node)["defaults"]
    assert node.holdout == {"size": 0.05}
    assert node.train == {
        "epochs": 200, "batch_size": 256, "drop_last": True, "optimizer": "adam", "lr": 1e-3, "weight_decay": 5e-4,
        "schedule": "cosine", "schedule_unit": "epoch",
    }  # fmt: skip
    base = OmegaConf.load(CONF / "train" / "base.yaml")
    assert (base.lr_min, base.warmup_epochs, base.label_smoothing) == (0, 0, 0)
    assert (base.augment.crop_padding, base.augment.flip) == (4, True)
    assert OmegaConf.load(CONF / "model" / "wrn16_1.yaml").normalise == "none"
    assert (REMOVAL.stage2, REMOVAL.dropout, REMOVAL.label_smoothing) == ("paper", 0.5, 0.1)


# ------------------------------------------------------------------ losses


def test_total_variation_by_hand():
    image = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]])
    vertical = 2**2 + 1**2 + 1**2
    horizontal = 1**2 + 2**2
    images = torch.stack([image, 2 * image])[:, None].expand(2, 3, 2, 3)
    # Each of three channels: once with factor 1, once with 2, squared.
    assert total_variation(images).item() == pytest.approx(3 * (1 + 4) * (vertical + horizontal) / (2 * 3 * 2 * 3))


def test_the_loss_is_the_loop_over_pixels():
    stream = torch.Generator().manual_seed(0)
    made, images = torch.rand(2, 3, 4, 5, generator=stream), torch.rand(2, 3, 4, 5, generator=stream)
    model, told = torch.nn.Module(), []
    model.decoder = torch.nn.Identity()
    seen = {"images": images, "maps": made}
    found = trap_loss(lambda *_: torch.tensor(2.0), seen, 10.0, 0.3, told.append)(model, None)
    error = variation = 0.0
    for b in range(2):
        for c in range(3):
            for y in range(4):
                for x in range(5):
                    here = made[b, c, y, x].item()
                    error += (here - images[b, c, y, x].item()) ** 2
                    variation += (made[b, c, y - 1, x].item() - here) ** 2 if y else 0.0
                    variation += (made[b, c, y, x - 1].item() - here) ** 2 if x else 0.0
    assert found.item() == pytest.approx(2 + 10 * (error + 0.3 * variation) / 120, rel=1e-5)
    (terms,) = told
    assert terms.tolist() == pytest.approx([2, error / 120, variation / 120], rel=1e-5)


def batch_of(blobs, count=8):
    """Its pixels before augmentation are others."""
    images = blobs.images[:count].float() / 255
    return Batch(
        images, blobs.labels[:count], torch.arange(count), 0, 1 - images, lambda some, _: some, torch.Generator()
    )


@pytest.mark.parametrize(("lambda1", "lambda2"), [(10.0, 0.1), (1.0, 0.0), (0.0, 0.1)])
def test_the_codes_second_weight_is_the_product(blobs, lambda1, lambda2):
    model, batch = build().eval(), batch_of(blobs)
    model.decoder = build_decoder(64, 4, 16, 0)
    with watched(model, "layer3_0") as seen, torch.no_grad():
        found = trap_loss(cross_entropy(), seen, lambda1, lambda2)(model, batch)
        stem, head = model.split("layer3_0")
        made = model.decoder(stem(batch.images))
        code_lambda, code_lambda2 = lambda1, lambda1 * lambda2
        wanted = F.cross_entropy(head(stem(batch.images)), batch.labels)
        wanted = wanted + code_lambda * F.mse_loss(made, batch.images) + code_lambda2 * total_variation(made)
    torch.testing.assert_close(found, wanted)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_an_attackers_loss_sends_through_the_network_is_reconstructed(blobs):
    """Also more than the batch, and in one pass: the statistics of the batch norms move once."""
    model, batch = build(), batch_of(blobs)
    model.decoder = build_decoder(64, 4, 16, 0)
    given = torch.cat([batch.images, 1 - batch.images])

    def owned(model, batch):
        return model.head(model.features(given)).square().mean()

    other = copy.deepcopy(model).train()
    with watched(model.train(), "layer3_0") as seen, torch.no_grad():
        found = trap_loss(owned, seen, 10.0, 0.1)(model, batch)
    assert model.blocks.norm[0].num_batches_tracked == model.blocks.layer1_0.norm1.num_batches_tracked == 1
    with torch.no_grad():
        maps = other.split("layer3_0")[0](given)
        made = other.decoder(maps)
        wanted = other.split("layer3_0")[1](maps).square().mean()
        wanted = wanted + 10 * F.mse_loss(made, given) + total_variation(made)
    torch.testing.assert_close(found, wanted)


# ------------------------------------------------------------------ stage 1


def test_stage_1_is_joint_training_of_all_three(view, blobs, recipe):
    """One epoch of one batch, SGD without momentum, against autograd."""
    config = replace(recipe, epochs=1, batch_size=128, momentum=0.0, weight_decay=0.0, lr=0.1)
    view = replace(view, train_config=config)
    trained, decoder = METHOD._trapped(view, build(), "layer3_0", {})
    model = build().train()
    model.decoder = build_decoder(64, 4, 16, tr.derive(5, "tr decoder"))
    before = state(model.decoder)
    images = blobs.images.float() / 255
    stem, head = model.split("layer3_0")
    maps = stem(images)
    made = model.decoder(maps)
    terms = F.cross_entropy(head(maps), blobs.labels), F.mse_loss(made, images), total_variation(made)
    loss = terms[0] + 10 * (terms[1] + 0.1 * terms[2])
    loss.backward()
    start = build().state_dict()
    for name, parameter in model.named_parameters():
        if not name.startswith("decoder"):
            moved = trained.state_dict()[name]
            torch.testing.assert_close(moved, start[name] - 0.1 * parameter.grad, rtol=1e-3, atol=1e-4)
    for name, parameter in model.decoder.named_parameters():
        moved = decoder.state_dict()[name] - before[name]
        torch.testing.assert_close(moved, -0.1 * parameter.grad, rtol=1e-2, atol=1e-6)
        assert moved.abs().max() > 1e-4
    assert {name for name, _ in trained.named_children()} == {"normalise", "blocks", "pool", "head"}
    (detail,) = view.probe.details
    assert detail == pytest.approx(
        {"loss": loss.item(), **dict(zip(("ce", "mse", "tv"), (term.item() for term in terms), strict=True))}, rel=1e-3
    )


def test_the_curve_tells_the_terms_of_every_epoch_apart(view):
    variant(replace=False).defend(view)
    assert len(view.probe.details) == 3
    for detail in view.probe.details:
        assert detail["loss"] == pytest.approx(detail["ce"] + 10 * (detail["mse"] + 0.1 * detail["tv"]), rel=1e-5)
    assert len({detail["mse"] for detail in view.probe.details}) == 3
    view.probe.details.clear()
    variant(lambda1=0.0, train_on_holdout=True, replace=False).defend(view)
    assert [set(detail) for detail in view.probe.details] == [{"loss", "ce"}] * 3
    assert all(detail["loss"] == pytest.approx(detail["ce"]) for detail in view.probe.details)


def test_the_decoder_learns(view, recipe, tmp_path, progress, rows):
    def mse(epochs):
        stages = Stages(tmp_path / str(epochs), "s", progress, {}, rows)
        config = replace(recipe, epochs=epochs, augment=Augmentation(2, True, 0.0, 0))
        return variant(replace=False).defend(replace(view, stages=stages, train_config=config)).extra

    first, last = mse(1), mse(5)
    assert last["reconstruction_mse"] < 0.8 * first["reconstruction_mse"]
    assert (last["split"], last["layers"]) == ("layer3_0", "11/3")


def test_the_reconstruction_is_measured_with_and_without_a_holdout(view, blobs, recipe, monkeypatch):
    view = replace(view, train_config=replace(recipe, epochs=1))

    def measured(view, **values):
        method = variant(replace=False, **values)
        extra = method.defend(view).extra
        model, decoder = method._trapped(view, build(), "layer3_0", {**settings, **values, "block": "layer3_0"})
        stem = model.split("layer3_0")[0]

        def error(rows):
            x = blobs.images[rows].float() / 255
            with torch.no_grad():
                return F.mse_loss(decoder(stem(x)), x).item()

        return extra["reconstruction_mse_of"], extra["reconstruction_mse"], error

    settings = {"lambda1": 10.0, "lambda2": 0.1, "train_on_holdout": False}
    of, found, error = measured(view)
    assert (of, found) == ("holdout", pytest.approx(error(torch.arange(40)), rel=1e-4))
    of, found, error = measured(view, train_on_holdout=True)
    assert (of, found) == ("holdout, trained on too", pytest.approx(error(torch.arange(40)), rel=1e-4))
    blind = replace(view, holdout=None)
    of, found, error = measured(blind)
    assert (of, found) == ("128 training images", pytest.approx(error(torch.arange(128)), rel=1e-4))
    monkeypatch.setattr(tr, "MEASURED", 3)
    of, found, error = measured(blind)
    assert (of, found) == ("3 training images", pytest.approx(error(torch.tensor([0, 63, 127])), rel=1e-4))
    assert math.isfinite(found)
    assert "reconstruction_mse" not in variant(lambda1=0.0, replace=False).defend(view).extra


def test_the_loss_of_the_view_is_used(view):
    seen = []

    def owned(model, batch):
        seen.append(batch.epoch)
        return F.cross_entropy(model(batch.images), batch.labels)

    METHOD.defend(replace(view, train_loss=owned))
    assert seen == [0] * 4 + [1] * 4 + [2] * 4  # and not in stage 2
    assert TrapAndReplace.honours_train_loss


def test_the_holdout_can_be_trained_on_too(view):
    seen = set()

    def noting(model, batch):
        seen.update(batch.index.tolist())
        return F.cross_entropy(model(batch.images), batch.labels)

    variant(train_on_holdout=True, lambda1=0.0, replace=False).defend(replace(view, train_loss=noting))
    assert seen == set(range(168))


# ------------------------------------------------------------------ stage 2 and the ablations


@pytest.mark.parametrize("split", ["9/5", "11/3", "13/1"])
def test_stage_2_leaves_the_stem_of_stage_1_bit_for_bit(view, split):
    trapped = state(variant(split=split, replace=False).defend(view).model)
    repaired = state(variant(split=split).defend(view).model)
    block = {"9/5": "layer2_1", "11/3": "layer3_0", "13/1": "layer3_1"}[split]
    names = build().block_names
    frozen = {"blocks." + name for name in names[: names.index(block) + 1]}
    assert repaired.keys() == trapped.keys()
    for name, value in repaired.items():
        if ".".join(name.split(".")[:2]) in frozen:
            assert torch.equal(value, trapped[name]), name
    assert not torch.equal(repaired["head.weight"], trapped["head.weight"])
    assert not torch.equal(repaired["blocks.norm.0.running_var"], trapped["blocks.norm.0.running_var"])


def test_without_reconstruction_the_victim_is_taken(view):
    method = variant(lambda1=0.0)
    repaired = method.defend(view).model
    assert view.victim.calls == 1
    assert {stage for stage, _ in view.probe.rows} == {"replace"}
    assert torch.equal(repaired.blocks.stem.weight, build().blocks.stem.weight)
    plain = variant(lambda1=0.0, replace=False).defend(view).model
    assert all(torch.equal(value, build().state_dict()[name]) for name, value in plain.state_dict().items())


def test_cached_resumed_and_separate_by_setting(view, recipe, tmp_path, progress, rows, monkeypatch):
    view = replace(view, train_config=replace(recipe, augment=Augmentation(2, True, 0.0, 0)))
    whole = state(METHOD.defend(replace(view, stages=Stages(tmp_path / "o", "s", progress, {}, rows))).model)

    class Stop(Exception):
        pass

    for stage in ("trap", "replace"):

        def killed(model=None, flagged=None, *, stage, epoch, detail=None, at=stage):
            if (stage, epoch) == (at, 2):
                raise Stop

        with pytest.raises(Stop):
            METHOD.defend(replace(view, probe=killed))
    resumed = METHOD.defend(view)
    assert all(torch.equal(value, whole[name]) for name, value in state(resumed.model).items())

    monkeypatch.setattr(tr, "fit", None)
    assert all(torch.equal(value, whole[name]) for name, value in state(METHOD.defend(view).model).items())
    for other in (variant(lambda1=1.0), variant(lambda2=0.0), variant(split="9/5"), variant(train_on_holdout=True)):
        with pytest.raises(TypeError):
            other.defend(view)


def test_figures_come_from_the_cache_too(view):
    METHOD.defend(view)
    shown = copy.copy(view.probe.figures)
    scatter, pictures = shown
    assert view.victim.calls == 0
    assert isinstance(scatter, FeatureScatter)
    assert scatter.name == "tr_features_with_reconstruction"
    assert scatter.features(torch.rand(5, 3, 16, 16)).shape == (5, 64)
    assert isinstance(pictures, Reconstructions)
    images = view.train.images[:10].float() / 255
    with torch.no_grad():
        made = pictures.made(images)
    assert made.shape == images.shape
    assert F.mse_loss(made, images) < F.mse_loss(made.flip(0), images)  # each of its own

    view.victim.cached = True  # which changes nothing
    view.probe.figures.clear()
    METHOD.defend(view)
    assert [figure.name for figure in view.probe.figures] == ["tr_features_with_reconstruction", "tr_reconstructions"]
    with torch.no_grad():
        assert torch.equal(view.probe.figures[1].made(images), made)

    view.victim.cached = False
    view.probe.figures.clear()
    variant(compare_with_victim=True).defend(view)
    assert view.victim.calls == 1
    assert [figure.name for figure in view.probe.figures] == [
        "tr_features_with_reconstruction", "tr_reconstructions", "tr_features_without_reconstruction",
    ]  # fmt: skip
    with torch.no_grad():
        wanted = build().eval().split("layer3_0")[0](images).mean((2, 3))
        torch.testing.assert_close(view.probe.figures[2].features(images), wanted)

    view.probe.figures.clear()
    variant(lambda1=0.0, replace=False).defend(view)
    assert [figure.name for figure in view.probe.figures] == ["tr_features_without_reconstruction"]


# ------------------------------------------------------------------ refusals


def test_no_holdout_is_refused_before_anything_is_loaded(bench):
    refused = bench("attack=none", "defense=tr")
    assert refused.code == 2
    assert "defense=tr needs a clean holdout: set holdout.size=..." in refused.err
    facts = Facts(4, 16, 128, 3, 4, holdout_size=0)
    variant(replace=False).check(facts)
    with pytest.raises(ConfigError, match="needs a clean holdout"):
        variant(replace=False, train_on_holdout=True).check(facts)


def test_a_holdout_that_is_in_the_training_set_is_not_trained_on_twice(bench):
    facts = Facts(4, 16, 128, 3, 4, holdout_size=40, holdout_source="seen")
    METHOD.check(facts)
    variant(train_on_holdout=True).check(replace(facts, holdout_source="reserved"))
    told = r"defense\.train_on_holdout=true is not allowed with holdout\.source=seen"
    with pytest.raises(ConfigError, match=told):
        variant(train_on_holdout=True).check(facts)
    words = ("attack=none", "defense=tr", "holdout.size=64", "holdout.source=seen", "defense.train_on_holdout=true")
    refused = bench(*words)
    assert (refused.code, refused.out) == (2, "")
    assert "defense.train_on_holdout=true is not allowed with holdout.source=seen" in refused.err


def test_a_split_out_of_range_is_refused_before_anything_is_loaded(bench):
    facts = Facts(4, 16, 128, 3, 4, holdout_size=40, outline=build)
    variant(split="9/5").check(facts)
    with pytest.raises(ConfigError, match=r"defense\.split='12/2' .* 9/5, 11/3, 13/1"):
        variant(split="12/2").check(facts)
    refused = bench("attack=none", "defense=tr", "holdout.size=64", "defense.split=12/2")
    assert (refused.code, refused.out) == (2, "")
    assert "defense.split='12/2' is not allowed with this model: choose auto, a split by layers (1/2," in refused.err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lambda1", -1),
        ("lambda2", float("inf")),
        ("train_on_holdout", 1),
        ("replace", "no"),
        ("compare_with_victim", 0),
    ],
)
def test_a_bad_value_names_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"defense\.{key}={value!r}"):
        replace(METHOD, **{key: value})


def test_one_split_for_both_stages():
    replace(METHOD, split="9/5", removal=replace(REMOVAL, split="9/5"))
    with pytest.raises(ConfigError, match=r"defense\.removal\.split='9/5' .* so set defense\.split alone"):
        replace(METHOD, removal=replace(REMOVAL, split="9/5"))


def test_another_removal_is_refused(bench):
    with pytest.raises(ConfigError, match=r"takes defense\.removal=replace_head.* no other: Hiding was given"):
        replace(METHOD, removal=Hiding(2, 0.1, 0.9, 5e-4, 32, "cosine", True, False))
    refused = bench("attack=none", "defense=tr", "holdout.size=64", "defense.removal=unlearning")
    assert (refused.code, refused.out) == (2, "")
    assert "defense=tr takes defense.removal=replace_head, its second stage, and no other" in refused.err


def test_a_whole_run(bench):
    done = bench("attack=badnets", "defense=tr", "holdout.size=64", "train.epochs=2", "defense.split=2/1")
    assert done.code == 0, done.err
    assert done.result["diagnostics"]["split"] == "conv2"
    assert (done.path.parent / "figures" / "tr_reconstructions.png").exists()
    assert {"trap", "replace"} <= done.result["seconds"].keys()
