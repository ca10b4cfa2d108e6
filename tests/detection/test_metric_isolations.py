"""Spectral signatures, symmetric cross-entropy and ABL's loss against literal versions and hand-made cases."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from backdoor_bench.cache import Stages
from backdoor_bench.detection import abl, distinguish
from backdoor_bench.detection.abl import ABLIsolation, held_up_loss
from backdoor_bench.detection.distinguish import EarlyTraining
from backdoor_bench.detection.sce import SCEIsolation, symmetric_cross_entropy
from backdoor_bench.detection.spectral import SpectralIsolation, spectral_scores, top_direction
from backdoor_bench.errors import ConfigError
from backdoor_bench.progress import QuietProgress
from backdoor_bench.training.fit import cross_entropy
from backdoor_bench.types import DefenderView, ImageSet
from tests.conftest import CONF, other_in_everything

TRAINING = EarlyTraining(2, 0.02, 0.9, 5e-4, 32, 20)
SPECTRAL = SpectralIsolation(TRAINING, True, False, 0.2, 0.05)
SCE = SCEIsolation(TRAINING, 0.1, 1.0, 1e-4, 0.2, 0.05)
ABL = ABLIsolation(3, "lga", 0.5, "batch", 0.05, 0.9, 1e-4, True, 32, 0.2, 0.05)
EVERY = pytest.mark.parametrize("isolation", [SPECTRAL, SCE, ABL], ids=["spectral", "sce", "abl"])


@pytest.fixture
def view(blobs, new_model, recipe, stages, rows, progress):
    return DefenderView(
        train=blobs, holdout=None, num_classes=4, new_model=new_model, victim=lambda: new_model(4).eval(),
        train_config=recipe, train_loss=cross_entropy(), generator=torch.Generator().manual_seed(5), stages=stages,
        probe=rows, device=torch.device("cpu"), progress=progress,
    )  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ spectral signatures


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", [(60, 5), (40, 30)], ids=["tall", "wide"])
def test_spectral_scores_are_the_singular_vectors_projections(centred, shape):
    features = normal(*shape) + 3 * normal(1, shape[1], seed=1)
    labels = torch.arange(shape[0]) % 3
    found = spectral_scores(features, labels, centred)
    assert found.dtype == torch.float32
    for label in range(3):
        rows = (labels == label).nonzero().flatten()
        mean = features[rows].mean(0)
        vector = torch.linalg.svd(features[rows] - mean).Vh[0]
        for row in rows:
            wanted = ((features[row] - mean if centred else features[row]) @ vector) ** 2
            assert found[row].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_shifted_cluster_of_one_class_has_the_largest_scores():
    features, labels = normal(400, 8), torch.arange(400) // 200
    poisoned = torch.arange(400) < 20
    features[poisoned, 2] += 10
    score = spectral_scores(features, labels, True)
    assert poisoned[score[:200].argsort(descending=True)[:20]].float().mean() > 0.95
    features += 50 * normal(1, 8, seed=3)
    uncentred = spectral_scores(features, labels, False)
    assert not torch.equal(uncentred.argsort(), score.argsort())


@pytest.mark.parametrize("rows", [torch.zeros(4, 3), torch.zeros(2, 3), torch.ones(1, 3) - 1])
def test_a_class_without_any_spread_scores_zero(rows):
    assert not top_direction(rows).any()
    assert not spectral_scores(rows + 7, torch.zeros(len(rows), dtype=torch.int64), True).any()


def test_spectral_of_the_victim_takes_its_share_of_each_class(view):
    labels = view.train.labels.clone()
    labels[:20] = 0  # classes of 47, 27, 27, 27
    view = replace(view, train=ImageSet(view.train.images, labels, 4))
    sizes = labels.bincount().tolist()
    detector = SpectralIsolation(None, True, True, None, 0.15)
    found = detector.isolate(view)
    assert found.trusted is None
    for label, size in enumerate(sizes):
        mine = labels == label
        assert int(found.flagged[mine].sum()) == int(0.15 * size)
        assert found.score[mine & found.flagged].min() >= found.score[mine & ~found.flagged].max()
    with torch.no_grad():
        features = view.victim().features(view.train.images.float() / 255)
    torch.testing.assert_close(found.score, spectral_scores(features, labels, True), rtol=1e-3, atol=1e-7)
    both = replace(detector, alpha_c=0.2).isolate(view)
    assert [int(both.trusted[labels == label].sum()) for label in range(4)] == [int(0.2 * size) for size in sizes]
    assert not (both.flagged & both.trusted).any()


def test_spectral_of_the_early_model_is_not_that_of_the_victim(view):
    early = SPECTRAL.isolate(view)
    victims = replace(SPECTRAL, training=None).isolate(view)
    assert not torch.equal(early.score, victims.score)


# ------------------------------------------------------------------ symmetric cross-entropy


def test_sce_is_the_code_of_dbd():
    """CE by softmax, and the swapped CE with label and prediction clamped."""
    logits, labels = 3 * normal(50, 6).float(), torch.arange(50) % 6
    found = symmetric_cross_entropy(logits, labels, 0.1, 1.0, 1e-4)
    for row, label, score in zip(logits, labels, found, strict=True):
        p = row.softmax(0).clamp(1e-7, 1)
        q = F.one_hot(label, 6).float().clamp(1e-4, 1)
        wanted = 0.1 * -p[label].log() + 1.0 * -(p * q.log()).sum()
        assert score.item() == pytest.approx(wanted.item(), abs=1e-4)
        closed = -0.1 * p[label].log() + 9.21034 * (1 - p[label])
        assert score.item() == pytest.approx(closed.item(), abs=1e-4)
    p_y = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    assert torch.equal(found.argsort(), p_y.argsort(descending=True))


def test_sce_tells_well_fitted_samples_apart():
    logits = torch.tensor([[30.0, 0.0], [31.0, 0.0], [32.0, 0.0]])
    found = symmetric_cross_entropy(logits, torch.zeros(3, dtype=torch.int64), 0.1, 1.0, 1e-4)
    assert (found > 0).all()
    assert len(set(found.tolist())) == 3
    assert found[0].item() == pytest.approx((0.1 + math.log(1e4)) * math.exp(-30), rel=1e-3)


def test_sce_flags_what_the_early_model_fits_least(view):
    found = SCE.isolate(view)
    model = TRAINING.models(view)[0]
    with torch.no_grad():
        p = model(view.train.images.float() / 255).softmax(1).gather(1, view.train.labels[:, None])[:, 0]
    assert (int(found.flagged.sum()), int(found.trusted.sum())) == (6, 25)
    assert p[found.flagged].max() <= p[~found.flagged].min() + 1e-6
    assert p[found.trusted].min() >= p[~found.trusted].max() - 1e-6


# ------------------------------------------------------------------ ABL


@pytest.mark.parametrize("loss", ["lga", "flooding"])
@pytest.mark.parametrize("reduction", ["batch", "sample"])
@pytest.mark.parametrize("gamma", [0.05, 0.5, 5.0])
def test_held_up_loss_is_the_literal_one(loss, reduction, gamma):
    losses = torch.tensor([0.1, 0.2, 0.9, 1.6], requires_grad=True)
    found = held_up_loss(losses, loss, gamma, reduction)
    values = [0.7] if reduction == "batch" else losses.tolist()
    literal = []
    for value in values:
        sign = 1 if value > gamma else -1
        literal.append(sign * value if loss == "lga" else abs(value - gamma) + gamma)
    assert found.item() == pytest.approx(sum(literal) / len(literal))
    found.backward()
    signs = [gamma < 0.7] * 4 if reduction == "batch" else [value > gamma for value in losses.tolist()]
    assert losses.grad.tolist() == [0.25 if up else -0.25 for up in signs]


def test_abl_flags_the_lowest_and_trusts_the_largest_losses(view):
    found = ABL.isolate(view)
    assert (int(found.flagged.sum()), int(found.trusted.sum())) == (6, 25)
    losses = -found.score
    assert (losses > 0).all()
    assert losses[found.flagged].max() <= losses[~found.flagged].min()
    assert losses[found.trusted].min() >= losses[~found.trusted].max()
    alone = replace(ABL, alpha_c=None, alpha_p=0.01).isolate(view)
    assert alone.trusted is None
    assert alone.flagged.nonzero().flatten().tolist() == [int(losses.argmin())]


def test_abl_holds_the_loss_up(view):
    def mean_loss(gamma):
        found = replace(ABL, epochs=12, nesterov=False, gamma=gamma).isolate(view)
        return -found.score.mean().item()

    assert mean_loss(0.0) < 0.1
    assert mean_loss(0.5) > 0.2


def test_abl_score_is_the_cross_entropy_of_its_own_model(view, recipe, monkeypatch):
    models = []
    view = replace(view, train_config=other_in_everything(recipe, nesterov=False))
    fit = abl.fit

    def spy(model, data, config, **options):
        models.append((model, config))
        return fit(model, data, config, **options)

    monkeypatch.setattr(abl, "fit", spy)
    found = ABL.isolate(view)
    ((model, config),) = models
    assert [config.lr_at(epoch, 1, 4) for epoch in range(3)] == [0.05] * 3
    assert (config.momentum, config.weight_decay, config.nesterov) == (0.9, 1e-4, True)
    assert (config.optimizer, config.batch_size, config.drop_last) == ("sgd", 32, False)
    assert (config.augment.crop_padding, config.augment.flip) == (0, False)
    with torch.no_grad():
        wanted = F.cross_entropy(model(view.train.images.float() / 255), view.train.labels, reduction="none")
    torch.testing.assert_close(-found.score, wanted, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------ all


@EVERY
@pytest.mark.parametrize("nesterov", [False, True])
def test_nothing_of_the_victims_recipe_leaks(view, isolation, nesterov, recipe, rows, tmp_path):
    elsewhere = Stages(tmp_path / "elsewhere", "scope", QuietProgress(), {}, rows)
    config = other_in_everything(recipe, nesterov=nesterov)
    one, two = isolation.isolate(view), isolation.isolate(replace(view, train_config=config, stages=elsewhere))
    assert torch.equal(one.score, two.score)
    assert torch.equal(one.flagged, two.flagged)


@EVERY
def test_scores_are_computed_in_full_precision(view, isolation, hardware, rows, tmp_path):
    """bfloat16 logits and features have ties, and a rank among ties is chance: a run in it trains in it but scores in
    float32. Here the trained weights stand still, so that the scores must be those of a float32 run."""
    elsewhere = Stages(tmp_path / "elsewhere", "scope", QuietProgress(), {}, rows)
    still = {"lr": 1e-30, "weight_decay": 0.0}
    if isolation is ABL:
        isolation = replace(isolation, **still)
    else:
        isolation = replace(isolation, training=replace(TRAINING, **still))
    rough = replace(view.train_config, hardware=replace(hardware, precision="bf16"))
    # Batch norms see rounded activations in training: they must not move either.
    build = view.new_model

    def with_still_norms(num_classes):
        model = build(num_classes)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.0
        return model

    view = replace(view, new_model=with_still_norms)
    one, two = isolation.isolate(view), isolation.isolate(replace(view, train_config=rough, stages=elsewhere))
    torch.testing.assert_close(one.score, two.score, rtol=1e-6, atol=1e-9)
    assert len(two.score.unique()) > 100


@EVERY
def test_second_call_finds_the_stages(view, isolation, monkeypatch, rows):
    first = isolation.isolate(view)
    monkeypatch.setattr(distinguish, "fit", None)
    monkeypatch.setattr(abl, "fit", None)
    again = replace(isolation, alpha_c=0.3).isolate(view)
    assert torch.equal(first.score, again.score)
    assert torch.equal(first.flagged, again.flagged)
    assert int(again.trusted.sum()) == 38
    assert first.score.dtype == torch.float32


class Stop(Exception):
    pass


@EVERY
def test_resumes_to_the_same_split(view, isolation, rows, tmp_path):
    elsewhere = Stages(tmp_path / "elsewhere", "scope", QuietProgress(), {}, rows)
    whole = isolation.isolate(replace(view, stages=elsewhere))

    def killed(model=None, flagged=None, *, stage, epoch, detail=None):
        if epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        isolation.isolate(replace(view, probe=killed))
    resumed = isolation.isolate(view)
    assert torch.equal(whole.score, resumed.score)
    assert torch.equal(whole.flagged, resumed.flagged)
    assert torch.equal(whole.trusted, resumed.trusted)


@EVERY
def test_histogram_is_shown(view, isolation):
    shown = []

    def probe(model=None, flagged=None, *, stage, epoch, detail=None):
        shown.extend((detail or {}).get("figures", ()))

    found = isolation.isolate(replace(view, probe=probe))
    (figure,) = shown
    assert torch.equal(figure.scores.abs(), found.score.abs())


@pytest.mark.parametrize(
    ("isolation", "key", "value"),
    [(SPECTRAL, "centered", "yes"), (SPECTRAL, "per_class", 1), (SPECTRAL, "alpha_p", 2), (SCE, "label_floor", 0),
     (SCE, "ce_weight", -1), (SCE, "ce_weight", float("inf")), (SCE, "rce_weight", float("inf")),
     (SCE, "alpha_c", 0.99), (ABL, "gamma", float("inf")), (ABL, "loss", "ce"), (ABL, "reduction", "mean"),
     (ABL, "gamma", -1), (ABL, "momentum", 0.0), (ABL, "epochs", 0), (ABL, "alpha_c", 0.99)],
)  # fmt: skip
def test_a_bad_value_names_its_key(isolation, key, value):
    with pytest.raises(ConfigError, match=rf"defense\.isolation\.{key}={value!r}"):
        replace(isolation, **{key: value})


def test_sce_without_any_weight_is_refused():
    with pytest.raises(ConfigError, match=r"defense\.isolation\.ce_weight=0 and defense\.isolation\.rce_weight=0"):
        replace(SCE, ce_weight=0, rce_weight=0)
    replace(SCE, ce_weight=0)
    replace(SCE, rce_weight=0)


def test_a_rival_and_a_detector_are_one_class_with_other_values():
    built = {name: load(name) for name in ("spectral", "rank_spectral", "sce", "abl", "rank_abl", "fct")}
    assert built["spectral"].training is None
    assert built["rank_spectral"].training == built["sce"].training == built["fct"].training
    assert replace(built["abl"], alpha_c=0.2, alpha_p=0.05) == built["rank_abl"]
    rivals = [built[name] for name in ("fct", "rank_spectral", "sce", "rank_abl")]
    assert {(rival.alpha_c, rival.alpha_p) for rival in rivals} == {(0.2, 0.05)}


def load(name):
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    return instantiate(OmegaConf.load(CONF / "defense" / "isolation" / f"{name}.yaml"))


def test_from_the_command_line(bench):
    chosen = ("defense=isolate_only", "defense/isolation=rank_spectral", "train.epochs=2")
    outcome = bench("attack=badnets", *chosen)
    assert outcome.code == 0, outcome.err
    assert outcome.result["oracle"]["stage"] == "train"
    assert (outcome.path.parent / "figures" / "spectral.png").exists()
