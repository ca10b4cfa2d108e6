"""D-ST and its baselines: which samples attract, what is trained on what, what stays, what is found in the cache."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from backdoor_bench.cache import Stages
from backdoor_bench.data.contrastive import ViewAugmentation
from backdoor_bench.defenses import dst
from backdoor_bench.defenses.dst import DST, Projected
from backdoor_bench.errors import BenchError, ConfigError, DataError
from backdoor_bench.progress import QuietProgress
from backdoor_bench.training.contrastive import positive_mask
from backdoor_bench.training.fit import cross_entropy, fit
from backdoor_bench.types import DefenderView, Facts, ImageSet, Isolation
from tests.conftest import CONF, other_in_everything

SIZE = 128
FLAGGED = torch.arange(SIZE) % 8 == 3
TRUSTED = torch.arange(SIZE) % 8 < 2  # classes 0 and 1 of 4: 32 rows
MILD = ViewAugmentation(0.6, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Given:
    """An isolation that is told its split."""

    split: Any

    def check(self, facts):
        if facts == "refuse":
            raise ConfigError("refused by the isolation")

    def isolate(self, view):
        return self.split


SPLIT = Isolation(FLAGGED, TRUSTED, FLAGGED.float(), {"note": 1})
SMALL = DST(
    isolation=Given(SPLIT), extractor="ssctl", classifier="mixed_ce", views=MILD, temperature=0.1, base_temperature=0.07,
    asymmetric_mask=False, projection_size=8, momentum=0.9, extractor_epochs=3, extractor_lr=0.05,
    extractor_warmup=0.34, extractor_warmup_from=0.01, extractor_lr_end=1e-3, extractor_weight_decay=1e-4,
    extractor_batch_size=48, lambda_p=0.001, classifier_epochs=3, classifier_lr=1.0,
    classifier_milestones=[2], classifier_gamma=0.1, classifier_weight_decay=0.0, classifier_batch_size=20,
)  # fmt: skip
BASELINE1 = replace(SMALL, isolation=None, extractor="simclr", classifier="ce")


@pytest.fixture
def view(blobs, new_model, recipe, rows, progress, tmp_path):
    seldom = Stages(tmp_path / "cache", "scope", progress, {}, rows, checkpoint_seconds=1e6)
    return DefenderView(
        train=blobs, holdout=None, num_classes=4, new_model=new_model, victim=None, train_config=recipe,
        train_loss=cross_entropy(), generator=torch.Generator().manual_seed(5), stages=seldom, probe=rows,
        device=torch.device("cpu"), progress=progress,
    )  # fmt: skip


@pytest.fixture
def fits(monkeypatch):
    """What ``fit`` was called with: (stage, network, data, config, options)."""
    seen = []

    def noted(model, data, config, **options):
        seen.append((options["stage"], model, data, config, options))
        return fit(model, data, config, **options)

    monkeypatch.setattr(dst, "fit", noted)
    return seen


@pytest.fixture
def masks(monkeypatch):
    """Of every contrastive batch the images it holds and who may attract."""
    seen = []

    def noted(labels, may_attract, asymmetric=False):
        seen.append((labels, may_attract, asymmetric))
        return positive_mask(labels, may_attract, asymmetric)

    monkeypatch.setattr(dst, "positive_mask", noted)
    return seen


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_result_carries_model_and_split(view, rows):
    result = SMALL.defend(view)
    assert result.flagged is FLAGGED
    assert result.trusted is TRUSTED
    assert torch.equal(result.score, FLAGGED.float())
    assert result.extra == {"note": 1}
    assert result.model(torch.rand(2, 3, 16, 16)).shape == (2, 4)
    assert not result.model.training
    assert [(row["stage"], row["epoch"]) for row in rows.rows] == [
        (stage, epoch) for stage in ("extractor", "classifier") for epoch in (1, 2, 3)
    ]


def test_the_projection_is_two_layers_on_the_unit_sphere(new_model):
    network = Projected(new_model(4), 8).eval()
    images = torch.rand(5, 3, 16, 16)
    first, last = network.projection[0], network.projection[2]
    by_hand = network.encoder.features(images) @ first.weight.T + first.bias
    by_hand = by_hand.relu() @ last.weight.T + last.bias
    by_hand = by_hand / by_hand.pow(2).sum(1, keepdim=True).sqrt()
    assert first.weight.shape == (network.encoder.feature_dim,) * 2
    assert torch.allclose(network(images), by_hand, atol=1e-6)


# ------------------------------------------------------------------ stage 1


@pytest.mark.parametrize(
    ("extractor", "attracts"),
    [("ssctl", TRUSTED), ("simclr", torch.zeros(SIZE, dtype=torch.bool)), ("supcon", torch.ones(SIZE, dtype=torch.bool))],
)  # fmt: skip
def test_who_attracts(view, masks, extractor, attracts):
    """Labels count for the trusted only, for nobody, for everybody; every row is visited once an epoch."""
    replace(SMALL, extractor=extractor).defend(view)
    assert [len(labels) for labels, _, _ in masks] == [48, 48, 32] * 3
    for epoch in range(3):
        part = masks[3 * epoch : 3 * epoch + 3]
        assert sum(int(may.sum()) for _, may, _ in part) == int(attracts.sum())
        assert torch.cat([labels for labels, _, _ in part]).bincount().tolist() == [32] * 4
    assert not any(asymmetric for _, _, asymmetric in masks)


def test_without_trusted_the_unflagged_attract(view, masks):
    replace(SMALL, isolation=Given(Isolation(FLAGGED))).defend(view)
    assert sum(int(may.sum()) for _, may, _ in masks[:3]) == SIZE - int(FLAGGED.sum())


def test_the_asymmetric_mask_reaches_the_loss(view, masks):
    replace(SMALL, asymmetric_mask=True).defend(view)
    assert all(asymmetric for _, _, asymmetric in masks)


def test_two_different_views_of_every_image_go_through_in_one_batch(view, fits, monkeypatch):
    sizes, shown = [], []
    forward = Projected.forward

    def noted(network, images):
        sizes.append(len(images))
        shown.append(images.detach().clone())
        return forward(network, images)

    monkeypatch.setattr(Projected, "forward", noted)
    SMALL.defend(view)
    assert sizes == [96, 96, 64] * 3
    one, two = shown[0].chunk(2)
    assert torch.allclose(one.mean((2, 3)), two.mean((2, 3)), atol=0.1)  # the same blobs
    assert ((one - two).abs().amax((1, 2, 3)) > 0).all()


def test_the_extractors_learning_rates(recipe):
    """As SCLBD/Effective_backdoor_defense:ST/train_extractor.py; nothing of the victim's recipe is left."""
    values = replace(SMALL, extractor_epochs=200, extractor_lr=0.5, extractor_warmup=0.05)
    made = values._extractor_recipe(other_in_everything(recipe))

    def cosine(epoch):  # counted from 1
        return 5e-4 + (0.5 - 5e-4) * (1 + math.cos(math.pi * epoch / 200)) / 2

    for epoch, step in itertools.product(range(10), range(98)):
        share = (step + 98 * epoch) / 980
        assert made.lr_at(epoch, step, 98) == pytest.approx(0.01 + share * (cosine(10) - 0.01))
    assert cosine(10) == pytest.approx(0.4969, abs=1e-4)
    assert [made.lr_at(epoch, 3, 98) for epoch in range(10, 200)] == pytest.approx([cosine(e) for e in range(11, 201)])
    assert (made.epochs, made.batch_size, made.momentum, made.weight_decay) == (200, 48, 0.9, 1e-4)
    assert made.label_smoothing == 0


def test_the_extractors_head_stays_as_initialised(view, fits, new_model):
    SMALL.defend(view)
    head = fits[0][1].encoder.head
    assert same(state(head), state(new_model(4).head))
    fresh = state(new_model(4).blocks)
    assert not any(torch.equal(value, fresh[name]) for name, value in fits[0][1].encoder.blocks.state_dict().items())


# ------------------------------------------------------------------ stage 2


def test_the_classifier_visits_trusted_and_flagged_rows_only(view, fits):
    SMALL.defend(view)
    order = fits[1][4]["order"]
    visited = torch.cat(order(0, torch.Generator().manual_seed(0)))
    assert sorted(visited.tolist()) == (TRUSTED | FLAGGED).nonzero().flatten().tolist()


def test_the_encoder_is_bit_identical_buffers_included(view, fits):
    model = SMALL.defend(view).model
    encoder = fits[0][1].encoder
    kept = {name: value for name, value in state(model).items() if not name.startswith("head.")}
    assert any(name.endswith("running_mean") for name in kept)
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in kept.items())
    assert not torch.equal(model.head.weight, encoder.head.weight)


@dataclass(frozen=True)
class Still:
    """Views that change nothing: stands in for ViewAugmentation."""

    def __call__(self, images, generator):
        return images


@pytest.mark.parametrize(("classifier", "isolation"), [("mixed_ce", Given(SPLIT)), ("ce", None)])
def test_one_step_of_the_classifier_equals_the_formula(view, monkeypatch, classifier, isolation):
    """All rows in one batch: head - lr * gradient of CE(trusted) - lambda_p CE(flagged), or of CE(all)."""
    values = replace(
        SMALL, isolation=isolation, extractor="simclr", classifier=classifier, views=Still(), lambda_p=0.5,
        classifier_epochs=1, classifier_batch_size=SIZE,
    )  # fmt: skip
    before = {}

    def one_step(model, data, config, **options):
        before[options["stage"]] = state(model)
        return fit(model, data, config, **options)

    monkeypatch.setattr(dst, "fit", one_step)
    model = values.defend(view).model
    start = before["classifier"]
    weight, bias = (start[f"head.{name}"].clone().requires_grad_() for name in ("weight", "bias"))
    with torch.no_grad():
        features = model.features(view.train.images.float() / 255)
    losses = torch.nn.functional.cross_entropy(features @ weight.T + bias, view.train.labels, reduction="none")
    loss = losses[TRUSTED].mean() - 0.5 * losses[FLAGGED].mean() if isolation else losses.mean()
    loss.backward()
    assert torch.allclose(model.head.weight, start["head.weight"] - weight.grad, atol=1e-5)
    assert torch.allclose(model.head.bias, start["head.bias"] - bias.grad, atol=1e-5)


def test_the_classifiers_learning_rates(view, fits, recipe):
    SMALL.defend(replace(view, train_config=other_in_everything(recipe)))
    config = fits[1][3]
    assert [config.lr_at(epoch, 1, 3) for epoch in range(3)] == [1.0, 1.0, pytest.approx(0.1)]
    assert (config.batch_size, config.momentum, config.weight_decay) == (20, 0.9, 0.0)


def test_both_stages_apply_the_transform_of_the_data(view, monkeypatch):
    """An attack's own transform comes after the views, once a view: black here, so all features agree."""
    seen = []

    def camera(images, generator):
        seen.append(len(images))
        return torch.zeros_like(images)

    shown = []
    features = dst.Classifier.features

    def noted(model, images):
        shown.append(float(images.abs().max()))
        return features(model, images)

    monkeypatch.setattr(dst.Classifier, "features", noted)
    dark = replace(view, train=replace(view.train, augment=camera))
    replace(SMALL, extractor_epochs=1, classifier_epochs=1).defend(dark)
    assert seen == [96, 96, 64, 20, 20, 8]  # 48 trusted and flagged rows in the second stage
    assert shown[:6] == [0.0] * 6


# ------------------------------------------------------------------ empty groups


def test_no_trusted_sample_is_refused_before_any_training(view, fits):
    nothing = Isolation(FLAGGED, torch.zeros(SIZE, dtype=torch.bool))
    with pytest.raises(DataError, match=r"trusts no sample .*defense\.isolation\.alpha_c"):
        replace(SMALL, isolation=Given(nothing)).defend(view)
    with pytest.raises(DataError, match="every training sample is flagged"):
        replace(SMALL, isolation=Given(Isolation(torch.ones(SIZE, dtype=torch.bool)))).defend(view)
    assert fits == []


@dataclass(frozen=True)
class Ranked(Given):
    """An isolation that trusts a share."""

    alpha_c: float | None = 0.2


@pytest.mark.parametrize(
    ("share", "count", "refused"),
    [(0, None, True), (0.0, 1000, True), (0.009, 100, True), (0.009, None, False), (0.009, 112, False),
     (0.29, 100, False), (None, 100, False)],
)  # fmt: skip
def test_a_share_that_trusts_nobody_is_refused_before_any_data(share, count, refused):
    facts = Facts(num_classes=4, image_size=16, train_size=count, epochs=1, steps_per_epoch=None)
    values = replace(SMALL, isolation=Ranked(SPLIT, share))
    if refused:
        with pytest.raises(ConfigError, match=rf"defense\.isolation\.alpha_c={share} is not allowed"):
            values.check(facts)
    else:
        values.check(facts)
    replace(values, extractor="supcon", classifier="ce").check(facts)  # no split is needed


def test_nothing_flagged_trains_on_the_trusted_and_says_so(view, progress, fits):
    model = replace(SMALL, isolation=Given(Isolation(torch.zeros(SIZE, dtype=torch.bool), TRUSTED))).defend(view).model
    assert torch.isfinite(model.head.weight).all()
    assert sum(map(len, fits[1][4]["order"](0, torch.Generator()))) == int(TRUSTED.sum())
    assert progress.warnings[0].startswith("no sample of the classes [2, 3]")
    assert progress.warnings[1].startswith("nothing is flagged")


def test_batches_of_one_group_only_are_harmless(view):
    """With batches of one every batch lacks a group."""
    model = replace(SMALL, classifier_batch_size=1, classifier_epochs=1, classifier_lr=0.1).defend(view).model
    assert all(torch.isfinite(value).all() for value in state(model).values())


# ------------------------------------------------------------------ baselines


def test_baselines_need_no_isolation(view, fits, masks):
    result = BASELINE1.defend(view)
    assert result.flagged is None
    assert result.score is None
    assert not any(may.any() for _, may, _ in masks)
    assert sum(map(len, fits[1][4]["order"](0, torch.Generator()))) == SIZE
    masks.clear()
    replace(BASELINE1, extractor="supcon").defend(view)
    assert all(may.all() for _, may, _ in masks)


@pytest.mark.parametrize(("extractor", "classifier"), [("ssctl", "ce"), ("simclr", "mixed_ce"), ("ssctl", "mixed_ce")])
def test_what_needs_a_split_is_refused_without_one(extractor, classifier):
    with pytest.raises(ConfigError, match=rf"defense\.isolation=null .*defense\.extractor={extractor}"):
        replace(BASELINE1, extractor=extractor, classifier=classifier)


@pytest.mark.parametrize(
    ("name", "extractor", "classifier", "temperature", "lr", "epochs"),
    [("baseline1", "simclr", "ce", 0.5, 1.0, 100), ("baseline2", "supcon", "ce", 0.1, 5.0, 100),
     ("dst", "ssctl", "mixed_ce", 0.1, 5.0, 10)],
)  # fmt: skip
def test_the_configurations_build_what_the_papers_say(name, extractor, classifier, temperature, lr, epochs):
    folder = CONF / "defense"
    node = OmegaConf.load(folder / f"{name}.yaml")
    for base in node.pop("defaults", []):
        if isinstance(base, str) and base != "_self_":
            node = OmegaConf.merge(OmegaConf.load(folder / f"{base}.yaml"), node)
    made = instantiate(node, **({"isolation": Given(SPLIT)} if name == "dst" else {}))
    assert (made.extractor, made.classifier, made.temperature) == (extractor, classifier, temperature)
    assert (made.classifier_lr, made.classifier_epochs) == (lr, epochs)
    assert (made.extractor_epochs, made.extractor_lr, made.extractor_batch_size) == (200, 0.5, 512)


# ------------------------------------------------------------------ cache


def test_found_again_and_shared_over_what_it_does_not_depend_on(view, fits, rows):
    first = SMALL.defend(view)
    curve = list(rows.rows)
    rows.rows.clear()
    again = SMALL.defend(view)
    assert same(state(first.model), state(again.model))
    assert rows.rows == curve

    def stages_fitted(values):
        fits.clear()
        values.defend(view)
        return [stage for stage, *_ in fits]

    assert stages_fitted(SMALL) == []
    assert stages_fitted(replace(SMALL, lambda_p=0.01)) == ["classifier"]
    assert stages_fitted(replace(SMALL, temperature=0.2)) == ["extractor", "classifier"]
    assert stages_fitted(replace(SMALL, views=replace(MILD, flip=0.0))) == ["extractor", "classifier"]
    simclr = replace(SMALL, extractor="simclr")
    assert stages_fitted(simclr) == ["extractor", "classifier"]
    other_split = Given(Isolation(FLAGGED, ~FLAGGED))
    assert stages_fitted(replace(simclr, isolation=other_split)) == ["classifier"]
    assert stages_fitted(replace(SMALL, isolation=other_split)) == ["extractor", "classifier"]
    assert stages_fitted(BASELINE1) == ["classifier"]


def test_nothing_of_the_victims_recipe_leaks(view, recipe, rows, tmp_path):
    elsewhere = Stages(tmp_path / "elsewhere", "scope", QuietProgress(), {}, rows)
    other = replace(view, train_config=other_in_everything(recipe), stages=elsewhere)
    assert same(state(SMALL.defend(view).model), state(SMALL.defend(other).model))


class Stop(Exception):
    pass


def test_stopped_between_its_stages_it_goes_on_with_the_classifier(view, rows, fits, monkeypatch, tmp_path):
    elsewhere = Stages(tmp_path / "elsewhere", "scope", QuietProgress(), {}, rows)
    whole = SMALL.defend(replace(view, stages=elsewhere)).model
    fits.clear()
    asked = []

    def stopped():
        asked.append(1)
        if len(asked) == 2:  # before the extractor, before the classifier
            raise Stop

    monkeypatch.setattr(dst, "raise_if_requested", stopped)
    with pytest.raises(Stop):
        SMALL.defend(view)
    assert [stage for stage, *_ in fits] == ["extractor"]
    rows.rows.clear()
    resumed = SMALL.defend(view).model
    assert [stage for stage, *_ in fits] == ["extractor", "classifier"]
    assert [(row["stage"], row["epoch"]) for row in rows.rows] == [
        (stage, epoch) for stage in ("extractor", "classifier") for epoch in (1, 2, 3)
    ]
    assert same(state(whole), state(resumed))


@pytest.mark.parametrize("stage", ["extractor", "classifier"])
def test_resumes_bit_for_bit(view, rows, stages, stage, tmp_path):
    view = replace(view, stages=stages)  # a checkpoint an epoch
    elsewhere = Stages(tmp_path / "elsewhere", "scope", QuietProgress(), {}, rows)
    whole = SMALL.defend(replace(view, stages=elsewhere)).model

    def killed(model=None, flagged=None, **point):
        if (point["stage"], point["epoch"]) == (stage, 3):
            raise Stop

    with pytest.raises(Stop):
        SMALL.defend(replace(view, probe=killed))
    rows.rows.clear()
    resumed = SMALL.defend(view).model
    assert [row["epoch"] for row in rows.rows if row["stage"] == stage][-1] == 3
    assert same(state(whole), state(resumed))


def test_the_global_generator_is_left_alone_and_does_not_matter(view, tmp_path, rows):
    torch.manual_seed(1)
    one = SMALL.defend(replace(view, stages=Stages(tmp_path / "one", "scope", QuietProgress(), {}, rows))).model
    torch.manual_seed(2)
    expected = torch.rand(3)
    torch.manual_seed(2)
    two = SMALL.defend(replace(view, stages=Stages(tmp_path / "two", "scope", QuietProgress(), {}, rows))).model
    assert torch.equal(torch.rand(3), expected)
    assert same(state(one), state(two))


# ------------------------------------------------------------------ what it does, and bad values


def test_it_learns_what_the_trusted_show_and_not_the_trigger(view, blobs):
    """Class 0's trigger is a white corner on blobs of other classes; a quarter of the clean rows is trusted."""
    poisoned = torch.arange(SIZE) % 16 == 5  # true class 1
    images, labels = blobs.images.clone(), blobs.labels.clone()
    images[poisoned, :, :6, :6] = 255
    labels[poisoned] = 0
    trusted = ~poisoned & (torch.arange(SIZE) % 16 < 8)
    values = replace(
        SMALL, isolation=Given(Isolation(poisoned, trusted)), extractor_epochs=14, classifier_epochs=20, lambda_p=0.1,
        classifier_milestones=[],
    )  # fmt: skip
    model = values.defend(replace(view, train=ImageSet(images, labels, 4))).model
    with torch.no_grad():
        clean = model(blobs.images.float() / 255).argmax(1)
        stamped = blobs.images[blobs.labels != 0].clone()
        stamped[:, :, :6, :6] = 255
        fooled = model(stamped.float() / 255).argmax(1)
    assert (clean == blobs.labels).float().mean() > 0.95
    assert (fooled == 0).float().mean() < 0.1


@pytest.mark.parametrize(
    ("key", "value"),
    [("extractor", "ctl"), ("classifier", "sce"), ("temperature", 0), ("base_temperature", float("inf")),
     ("asymmetric_mask", 1), ("projection_size", 0), ("momentum", 1), ("extractor_epochs", 0), ("extractor_lr", 0),
     ("extractor_warmup", 1.1), ("extractor_lr_end", 1.1), ("extractor_warmup_from", -1),
     ("extractor_weight_decay", -1), ("extractor_batch_size", 2.5), ("lambda_p", -0.1),
     ("classifier_epochs", "ten"), ("classifier_lr", float("nan")), ("classifier_milestones", 60),
     ("classifier_gamma", 2), ("classifier_weight_decay", 2), ("classifier_batch_size", 0)],
)  # fmt: skip
def test_a_bad_value_names_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"defense\.{key}={value!r}"):
        replace(SMALL, **{key: value})


def test_a_bad_milestone_names_its_key():
    with pytest.raises(ConfigError, match=r"defense\.classifier_milestones=0"):
        replace(SMALL, classifier_milestones=[2, 0])


def test_the_isolation_is_asked_about_the_facts():
    with pytest.raises(BenchError, match="refused by the isolation"):
        SMALL.check("refuse")
    BASELINE1.check("refuse")
