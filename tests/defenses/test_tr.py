"""Trap and Replace: its losses by hand, one joint step against autograd, what stage 2 leaves alone, the ablations."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf

from backdoor_bench.cache import Stages
from backdoor_bench.data.augment import Augmentation
from backdoor_bench.defenses import tr
from backdoor_bench.defenses.tr import TrapAndReplace, reconstruction_loss, total_variation, trap_loss, watched
from backdoor_bench.errors import ConfigError
from backdoor_bench.models.decoder import build_decoder
from backdoor_bench.models.wrn import WideResNet16
from backdoor_bench.training.fit import Batch, cross_entropy
from backdoor_bench.types import DefenderView, Facts, FeatureScatter, ImageRows, ImageSet
from tests.conftest import CONF

REMOVAL = instantiate(OmegaConf.load(CONF / "defense" / "removal" / "replace_head.yaml"))
METHOD = TrapAndReplace(
    split="auto", lambda1=10.0, lambda2=0.1, train_on_holdout=False, replace=True, removal=REMOVAL
)  # the values of conf/defense/tr.yaml, see the first test


def variant(**values):
    removal = replace(METHOD.removal, split=values["split"]) if "split" in values else METHOD.removal
    return replace(METHOD, removal=removal, **values)


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
        self.rows, self.figures = [], []

    def __call__(self, model=None, flagged=None, *, stage, epoch, detail=None):
        self.figures += detail.get("figures", ())
        if "loss" in detail:
            self.rows.append((stage, epoch))


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
    keys = ("split", "lambda1", "lambda2", "train_on_holdout", "replace")
    assert {key: node[key] for key in keys} == {key: getattr(METHOD, key) for key in keys}


# ------------------------------------------------------------------ losses


def test_total_variation_by_hand():
    image = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]])
    vertical = 2**2 + 1**2 + 1**2
    horizontal = 1**2 + 2**2
    images = torch.stack([image, 2 * image])[:, None].expand(2, 3, 2, 3)
    # Each of three channels: once with factor 1, once with 2, squared.
    assert total_variation(images).item() == pytest.approx(3 * (1 + 4) * (vertical + horizontal) / (2 * 3 * 2 * 3))


def test_reconstruction_loss_is_the_loop_over_pixels():
    stream = torch.Generator().manual_seed(0)
    made, images = torch.rand(2, 3, 4, 5, generator=stream), torch.rand(2, 3, 4, 5, generator=stream)
    error = variation = 0.0
    for b in range(2):
        for c in range(3):
            for y in range(4):
                for x in range(5):
                    here = made[b, c, y, x].item()
                    error += (here - images[b, c, y, x].item()) ** 2
                    variation += (made[b, c, y - 1, x].item() - here) ** 2 if y else 0.0
                    variation += (made[b, c, y, x - 1].item() - here) ** 2 if x else 0.0
    assert reconstruction_loss(made, images, 0.3).item() == pytest.approx((error + 0.3 * variation) / 120, rel=1e-5)


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
        found = trap_loss(cross_entropy(), seen, "layer3_0", lambda1, lambda2)(model, batch)
        stem, head = model.split("layer3_0")
        made = model.decoder(stem(batch.images))
        code_lambda, code_lambda2 = lambda1, lambda1 * lambda2
        wanted = F.cross_entropy(head(stem(batch.images)), batch.labels)
        wanted = wanted + code_lambda * F.mse_loss(made, batch.images) + code_lambda2 * total_variation(made)
    torch.testing.assert_close(found, wanted)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_loss_of_the_attackers_may_send_more_through_the_network(blobs):
    model, batch = build().eval(), batch_of(blobs)
    model.decoder = build_decoder(64, 4, 16, 0)

    def owned(model, batch):
        return model.head(model.features(torch.cat([batch.images, 1 - batch.images]))).square().mean()

    with watched(model, "layer3_0") as seen, torch.no_grad():
        found = trap_loss(owned, seen, "layer3_0", 10.0, 0.1)(model, batch)
        made = model.decoder(model.split("layer3_0")[0](batch.images))
        torch.testing.assert_close(found, owned(model, batch) + 10 * reconstruction_loss(made, batch.images, 0.1))


# ------------------------------------------------------------------ stage 1


def test_stage_1_is_joint_training_of_all_three(view, blobs, recipe):
    """One epoch of one batch, SGD without momentum, against autograd."""
    config = replace(recipe, epochs=1, batch_size=128, momentum=0.0, weight_decay=0.0, lr=0.1)
    method = variant(replace=False)
    trained = method.defend(replace(view, train_config=config)).model
    model = build().train()
    model.decoder = build_decoder(64, 4, 16, tr.derive(5, "tr decoder"))
    images = blobs.images.float() / 255
    stem, head = model.split("layer3_0")
    maps = stem(images)
    loss = F.cross_entropy(head(maps), blobs.labels) + 10 * reconstruction_loss(model.decoder(maps), images, 0.1)
    loss.backward()
    start = build().state_dict()
    for name, parameter in model.named_parameters():
        if not name.startswith("decoder"):
            moved = trained.state_dict()[name]
            torch.testing.assert_close(moved, start[name] - 0.1 * parameter.grad, rtol=1e-3, atol=1e-4)
    assert {name for name, _ in trained.named_children()} == {"normalise", "blocks", "pool", "head"}


def test_the_decoder_learns(view, recipe, tmp_path, progress, rows):
    def mse(epochs):
        stages = Stages(tmp_path / str(epochs), "s", progress, {}, rows)
        config = replace(recipe, epochs=epochs, augment=Augmentation(2, True, 0.0, 0))
        return variant(replace=False).defend(replace(view, stages=stages, train_config=config)).extra

    first, last = mse(1), mse(5)
    assert last["holdout_reconstruction_mse"] < 0.8 * first["holdout_reconstruction_mse"]
    assert (last["split"], last["layers"]) == ("layer3_0", "11/3")


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
    assert isinstance(scatter, FeatureScatter)
    assert scatter.name == "tr_features_with_reconstruction"
    assert scatter.features(torch.rand(5, 3, 16, 16)).shape == (5, 64)
    assert isinstance(pictures, ImageRows)
    original, made = pictures.rows.values()
    assert original.shape == made.shape == (10, 3, 16, 16)
    assert 0 <= made.min() <= made.max() <= 1
    assert torch.equal(original[0], view.train.images[0].float() / 255)

    view.victim.cached = True
    view.probe.figures.clear()
    METHOD.defend(view)
    again = view.probe.figures
    assert [figure.name for figure in again] == [
        "tr_features_with_reconstruction", "tr_reconstructions", "tr_features_without_reconstruction",
    ]  # fmt: skip
    assert torch.equal(again[1].rows["reconstructed"], made)

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


def test_a_split_out_of_range_is_refused_before_training(view):
    with pytest.raises(ConfigError, match=r"defense\.split='12/2' .* 9/5, 11/3, 13/1"):
        variant(split="12/2").defend(view)
    assert view.probe.rows == []


@pytest.mark.parametrize(
    ("key", "value"), [("lambda1", -1), ("lambda2", float("inf")), ("train_on_holdout", 1), ("replace", "no")]
)
def test_a_bad_value_names_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"defense\.{key}={value!r}"):
        replace(METHOD, **{key: value})


def test_one_split_for_both_stages():
    with pytest.raises(ConfigError, match=r"set defense\.split"):
        replace(METHOD, split="9/5")


def test_a_whole_run(bench):
    done = bench("attack=badnets", "defense=tr", "holdout.size=64", "train.epochs=2", "defense.split=2/1")
    assert done.code == 0, done.err
    assert done.result["diagnostics"]["split"] == "conv2"
    assert (done.path.parent / "figures" / "tr_reconstructions.png").exists()
    assert {"trap", "replace"} <= done.result["seconds"].keys()
