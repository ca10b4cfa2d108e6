"""MeCa's score and enhancement against loops written out, closed forms, and stops in the middle."""

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from backdoor_bench.cache import Stages
from backdoor_bench.data.augment import Augmentation
from backdoor_bench.defenses.isolate_and_remove import IsolateAndRemove
from backdoor_bench.detection import kl
from backdoor_bench.detection.kl import KLIsolation, capped_ascent, class_report
from backdoor_bench.detection.kl_score import KLScore, largest, square_masks
from backdoor_bench.errors import ConfigError, Diverged
from backdoor_bench.progress import QuietProgress
from backdoor_bench.removal.hiding import Hiding
from backdoor_bench.training.fit import Batch, cross_entropy
from backdoor_bench.types import DefenderView, ImageSet, LossLandscape, ScoreHistogram
from tests.conftest import CONF

CPU = torch.device("cpu")
SCORE = KLScore(8 / 255, 0.25, "replace", "input", "forward")
METHOD = KLIsolation(
    epochs=3, gamma=0.2, clean_frac_max=0.5, p_is="untrusted", scored="all", eps=8 / 255, patch=0.25,
    perturb="replace", gradient="input", kl_direction="forward", lr=0.02, ascent_lr=1e-3, ce_cap=10.0, momentum=0.9,
    weight_decay=5e-4, batch_size=32, augment=False,
)  # fmt: skip


@pytest.fixture
def view(blobs, new_model, recipe, stages, rows, progress):
    return DefenderView(
        train=blobs, holdout=None, num_classes=4, new_model=new_model, victim=None, train_config=recipe,
        train_loss=cross_entropy(), generator=torch.Generator().manual_seed(5), stages=stages, probe=rows, device=CPU,
        progress=progress,
    )  # fmt: skip


@pytest.fixture
def fitted(new_model, blobs, recipe):
    """Knows the blobs; running statistics are its own."""
    from backdoor_bench.training.fit import fit

    model = new_model(4)
    fit(model, blobs, recipe, generator=torch.Generator(), stage="t", progress=QuietProgress())
    return model


def test_the_yaml_has_the_specs_values():
    """specs/seed_defenses.md 4.3, 4.6."""
    node = OmegaConf.to_container(OmegaConf.load(CONF / "defense" / "isolation" / "kl.yaml"))
    assert {key: value for key, value in node.items() if not key.startswith("_")} == {
        "epochs": 10, "gamma": 0.05, "clean_frac_max": 0.5, "p_is": "untrusted", "scored": "all",
        "eps": pytest.approx(8 / 255, rel=1e-12), "patch": 0.25, "perturb": "replace", "gradient": "input",
        "kl_direction": "forward", "lr": 0.01, "ascent_lr": 1e-4, "ce_cap": 10.0, "momentum": 0.9, "weight_decay": 5e-4,
        "batch_size": 128, "augment": False,
    }  # fmt: skip


def state(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------ the score


def literal_score(model, image, label, mask, score):
    """Q of one sample, by sums over pixels and classes."""

    def shares(x):
        exps = [math.exp(z) for z in model(x[None])[0].double().tolist()]
        return [e / sum(exps) for e in exps]

    def x_hat(step):
        changed = image.clone()
        for c in range(3):
            for h in range(image.shape[1]):
                for w in range(image.shape[2]):
                    if mask[0, h, w]:
                        start = 0.0 if score.perturb == "replace" else float(image[c, h, w])
                        changed[c, h, w] = min(1.0, max(0.0, start + float(step[c, h, w])))
        return changed

    with torch.enable_grad():
        step = torch.zeros_like(image, requires_grad=True)
        if score.gradient == "input":
            x = image + step
        else:
            x = (image * ~mask if score.perturb == "replace" else image) + mask * step
        logits = model(x[None])[0]
        (gradient,) = torch.autograd.grad(logits.exp().sum().log() - logits[label], step)
    norm = math.sqrt(sum(g * g for g in gradient.flatten().tolist()))
    step = (gradient / norm).clamp(-score.eps, score.eps)
    p, q = shares(image), shares(x_hat(step))
    if score.kl_direction == "reverse":
        p, q = q, p
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("perturb", ["replace", "add"])
@pytest.mark.parametrize("gradient", ["input", "patch"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("eps", [0.02, 0.5])
def test_score_is_the_loop_over_pixels_and_classes(fitted, blobs, perturb, gradient, direction, eps):
    score = KLScore(eps, 0.25, perturb, gradient, direction)
    images, labels = blobs.images[:5].float() / 255, (blobs.labels[:5] + torch.tensor([0, 1, 0, 1, 0])) % 4
    mask = square_masks(torch.arange(5), 16, 16, 0.25, 7, "t")
    found = score.of_batch(fitted.eval(), images, labels, mask)
    wanted = [literal_score(fitted, *row, score) for row in zip(images, labels, mask, strict=True)]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-3, atol=1e-8)
    assert found.dtype == torch.float32
    assert (found > 0).all()


class OneWeight(nn.Module):
    """Logits (0, 2 ln 3 x) of the red value x of a 1-pixel image."""

    def forward(self, images):
        red = images[:, 0, 0, 0] * 2 * math.log(3)
        return torch.stack([torch.zeros_like(red), red], 1)


@pytest.mark.parametrize(
    ("direction", "wanted"),
    [("forward", 0.5 * math.log(4 / 3)), ("reverse", 0.25 * math.log(0.5) + 0.75 * math.log(1.5))],
)
@pytest.mark.parametrize("gradient", ["input", "patch"])
def test_score_of_a_pixel_by_hand(direction, wanted, gradient):
    """A black pixel of class 0: (1/2, 1/2). Its CE grows with red, so the unit step is +1, clipped to 1/2: (1/4, 3/4)."""
    score = KLScore(0.5, 1.0, "replace", gradient, direction)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    found = score.of_batch(OneWeight(), torch.zeros(1, 3, 1, 1), torch.tensor([0]), mask)
    torch.testing.assert_close(found, torch.tensor([wanted], dtype=torch.float32))
    # The step of class 1 goes below black and is cut off: nothing changes.
    assert score.of_batch(OneWeight(), torch.zeros(1, 3, 1, 1), torch.tensor([1]), mask).abs().max() < 1e-12


def test_perturbed_changes_the_patch_alone():
    images, step = torch.full((1, 3, 4, 4), 0.9), torch.full((1, 3, 4, 4), 0.3)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 1:3, 2:] = True
    inside = mask.expand_as(images)
    replaced = SCORE.perturbed(images, mask, step)
    added = replace(SCORE, perturb="add").perturbed(images, mask, step)
    assert torch.equal(replaced[inside], step[inside])
    assert (added[inside] == 1).all()  # clipped
    for changed in (replaced, added):
        assert torch.equal(changed[~inside], images[~inside])
    assert (SCORE.perturbed(images, mask, -step)[inside] == 0).all()


def test_masks_are_squares_inside_the_image_anywhere():
    masks = square_masks(torch.arange(2000), 16, 16, 0.25, 3, "epoch 0")
    assert masks.shape == (2000, 1, 16, 16)
    assert masks.dtype == torch.bool
    found = set()
    for mask in masks[:, 0]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask.sum() == 16
        assert (rows[-1] - rows[0], columns[-1] - columns[0]) == (3, 3)
        found.add((int(rows[0]), int(columns[0])))
    assert found == {(top, left) for top in range(13) for left in range(13)}
    assert torch.equal(masks[[7, 3]], square_masks(torch.tensor([7, 3]), 16, 16, 0.25, 3, "epoch 0"))
    assert not torch.equal(masks, square_masks(torch.arange(2000), 16, 16, 0.25, 3, "epoch 1"))
    assert square_masks(torch.arange(3), 16, 16, 0.001, 3, "x").sum() == 3
    assert square_masks(torch.arange(3), 16, 16, 1.0, 3, "x").all()


def test_scoring_a_set_is_scoring_its_samples_and_leaves_the_model(fitted, blobs, hardware, monkeypatch):
    from backdoor_bench.detection import kl_score

    fitted.train()
    fitted.blocks[0].eval()
    fitted.zero_grad()
    before, modes = state(fitted), [module.training for module in fitted.modules()]
    whole = SCORE.of_set(fitted, blobs, hardware, 5, "a")
    monkeypatch.setattr(kl_score, "BATCH_CPU", 9)
    torch.testing.assert_close(whole, SCORE.of_set(fitted, blobs, hardware, 5, "a"), rtol=1e-3, atol=1e-7)
    assert [module.training for module in fitted.modules()] == modes
    assert same(state(fitted), before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in fitted.parameters())
    assert whole.shape == (128,)
    assert whole.device == CPU

    fitted.eval()
    mask = square_masks(torch.arange(128), 16, 16, 0.25, 5, "a")
    alone = SCORE.of_batch(fitted, blobs.images[77:78].float() / 255, blobs.labels[77:78], mask[77:78])
    torch.testing.assert_close(whole[77:78], alone, rtol=1e-3, atol=1e-7)
    assert not torch.equal(whole, SCORE.of_set(fitted, blobs, hardware, 5, "b"))


def test_it_scores_in_full_precision_and_small_batches(fitted, blobs, hardware, monkeypatch):
    seen = []
    switches = torch.backends.cuda.matmul, torch.backends.cudnn

    def noting(score, model, images, labels, mask):
        seen.append((len(images), *(switch.allow_tf32 for switch in switches), torch.is_autocast_enabled("cpu")))
        return torch.zeros(len(images))

    many = ImageSet(blobs.images.repeat(5, 1, 1, 1), blobs.labels.repeat(5), 4)
    like_a_gpu = SimpleNamespace(device="cpu:0", images=hardware.images)
    monkeypatch.setattr(KLScore, "of_batch", noting)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = True
        with torch.autocast("cpu", dtype=torch.bfloat16):
            SCORE.of_set(fitted, many, like_a_gpu, 5, "a")
        assert [switch.allow_tf32 for switch in switches] == [True, True]
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
    assert seen == [(256, False, False, False)] * 2 + [(128, False, False, False)]


# ------------------------------------------------------------------ the partition


@pytest.mark.parametrize("count", [0, 1, 3, 7, 10])
def test_largest_takes_the_largest(count):
    scores = torch.tensor([0.3, 2.0, -1.0, 0.7, 5.0, 0.0, 0.1, 9.0, 1.0, 0.5])
    wanted = sorted(range(10), key=lambda row: -scores[row])[:count]
    assert largest(scores, count, torch.Generator()).nonzero().flatten().tolist() == sorted(wanted)


def test_equal_scores_are_drawn_at_random():
    scores = torch.tensor([1.0] * 50 + [2.0] * 5 + [0.0] * 5)
    drawn = [largest(scores, 15, torch.Generator().manual_seed(seed)) for seed in range(20)]
    for chosen in drawn:
        assert chosen.sum() == 15
        assert chosen[50:55].all()
        assert not chosen[55:].any()
    assert torch.equal(drawn[3], largest(scores, 15, torch.Generator().manual_seed(3)))
    assert torch.stack(drawn)[:, :50].any(0).all()


def test_clean_shares_of_both_readings():
    def shares(**changed):
        return [round(replace(METHOD, **changed).clean_share(epoch), 9) for epoch in range(12)]

    assert shares(gamma=0.05) == [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.5, 0.5]
    assert shares(gamma=0.3, clean_frac_max=0.7) == [0.3, 0.6] + [0.7] * 10
    assert shares(gamma=0.1, p_is="clean") == [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0]


# ------------------------------------------------------------------ the ascent


class Given(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        return self.logits


def batch(labels):
    count = len(labels)
    images = torch.zeros(count, 3, 1, 1)
    return Batch(images, labels, torch.arange(count), 0, images, lambda x, _: x, torch.Generator())


@pytest.mark.parametrize("cap", [0.01, 0.9, 5.0, 100.0])
def test_ascent_is_minus_the_mean_of_the_losses_below_the_cap(cap):
    logits = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 2.0], [20.0, 0.0, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0])
    losses = [
        -math.log(math.exp(row[y]) / sum(map(math.exp, row))) for row, y in zip(logits.tolist(), labels, strict=True)
    ]
    kept = [loss for loss in losses if loss <= cap]
    model = Given(logits)
    found = capped_ascent(cap)(model, batch(labels))
    assert found.item() == pytest.approx(-sum(kept) / max(1, len(kept)))
    found.backward()
    skipped = torch.tensor([loss > cap for loss in losses])
    assert (model.logits.grad[skipped] == 0).all()
    assert (model.logits.grad[~skipped].abs().sum(1) > 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_ascent_does_not_skip_what_is_not_finite(bad):
    loss = capped_ascent(10.0)(Given(torch.tensor([[bad, 0.0], [1.0, 0.0]])), batch(torch.tensor([1, 0])))
    assert not loss.isfinite()


# ------------------------------------------------------------------ the enhancement


class Logged:
    """types.Images that notes the training batches (index tensors), not the slices of whole-set passes."""

    def __init__(self, images):
        self.images, self.shape, self.batches = images, images.shape, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, rows):
        if not isinstance(rows, slice):
            self.batches.append(rows.tolist())
        return self.images[rows]


@pytest.mark.parametrize("scored", ["all", "untrusted"])
def test_enhancement_is_the_algorithm_written_out(view, blobs, new_model, hardware, scored):
    """Algorithm 2 by hand over the batches that were visited: who they are, and what they do to the weights."""
    method = replace(METHOD, scored=scored, ascent_lr=0.01)
    images = Logged(blobs.images)
    given = method._enhanced(replace(view, train=ImageSet(images, blobs.labels, 4)))
    batches = list(images.batches)
    model = hardware.place(new_model(4))
    untrusted = torch.ones(128, dtype=torch.bool)

    def one_pass(rows, lr, sign):
        count = -(-int(rows.sum()) // 32)
        mine = [batches.pop(0) for _ in range(count)]
        assert sorted(row for part in mine for row in part) == rows.nonzero().flatten().tolist()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        losses = []
        for part in mine:
            model.train()
            optimizer.zero_grad()
            x = (blobs.images[part].float() / 255).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), blobs.labels[part])
            (sign * loss).backward()
            optimizer.step()
            losses.append(loss.item())
        return sum(losses) / len(losses)

    for epoch, count in enumerate([25, 51, 64]):  # 0.2, 0.4 and at most 0.5 of 128
        loss = one_pass(untrusted, 0.02, 1)
        assert given.losses[epoch].item() == pytest.approx(loss, rel=1e-4)
        seed = view.generator.initial_seed()
        scores = SCORE.of_set(model, blobs, hardware, seed, f"kl patch {epoch}")
        torch.testing.assert_close(given.scores[epoch], scores, rtol=2e-2, atol=1e-6)
        clean = given.clean[epoch]
        assert int(clean.sum()) == count
        before = ~untrusted
        if scored == "untrusted":
            assert (clean | ~before).all()
            assert given.scores[epoch][clean & ~before].min() >= given.scores[epoch][~clean].max()
        else:
            assert given.scores[epoch][clean].min() >= given.scores[epoch][~clean].max()
        untrusted = ~clean
        one_pass(clean, 0.01, -1)
    assert batches == []
    for name, value in given.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_p_is_clean_starts_with_nearly_all_clean(view):
    given = replace(METHOD, p_is="clean", epochs=6)._enhanced(view)
    assert given.clean.sum(1).tolist() == [102, 76, 51, 25, 0, 0]
    kept = replace(METHOD, p_is="clean", epochs=6, scored="untrusted")._enhanced(view)
    assert kept.clean.sum(1).tolist() == [102] * 6


def test_isolation_is_what_the_enhanced_model_gets_right(view, rows, blobs):
    isolation = METHOD.isolate(view)
    model = METHOD._enhanced(view).model
    with torch.no_grad():
        shares = model((blobs.images.float() / 255).contiguous(memory_format=torch.channels_last)).softmax(1)
    wanted = []
    for share, label in zip(shares, blobs.labels, strict=True):
        wanted.append(float(share[label] - max(p for k, p in enumerate(share) if k != label)))
    torch.testing.assert_close(isolation.score, torch.tensor(wanted))
    assert isolation.score.dtype == torch.float32
    assert torch.equal(isolation.flagged, shares.argmax(1) == blobs.labels)
    assert torch.equal(isolation.flagged, isolation.score >= 0)
    assert isolation.trusted is None
    assert isolation.extra["clean_histogram"] == torch.bincount(blobs.labels[~isolation.flagged], minlength=4).tolist()
    table = isolation.extra["enhancement"]
    assert [row["clean_count"] for row in table] == [25, 51, 64]
    assert all(row["q_min"] <= row["q_median"] <= row["q_cut"] <= row["q_max"] for row in table)
    json.dumps(isolation.extra)
    assert [(row["stage"], row["epoch"]) for row in rows.rows][:3] == [("enhance", 1), ("enhance", 2), ("enhance", 3)]


class Fixed(nn.Module):
    """The same logits for every image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        return self.logits.expand(len(images), -1) + 0 * images.mean((1, 2, 3))[:, None]


@pytest.mark.parametrize("logits", [[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, -1.0, 2.0], [0.0, 1.0, 0.0, 1.0 + 1e-6]])
def test_flagged_is_the_argmax_also_where_classes_tie(view, blobs, logits):
    flagged, margin = METHOD._predicted(view, Fixed(logits))
    assert torch.equal(flagged, torch.tensor(logits).argmax() == blobs.labels)
    assert (margin[flagged] >= 0).all()
    assert (margin[~flagged] <= 0).all()
    assert margin.dtype == torch.float32


def test_the_margin_is_exact_whatever_the_run_computes_in(view, blobs, fitted, hardware):
    fitted.eval()
    low = replace(view, train_config=replace(view.train_config, hardware=replace(hardware, precision="bf16")))
    assert torch.equal(METHOD._predicted(low, fitted)[1], METHOD._predicted(view, fitted)[1])


def test_figures_are_shown_again_from_the_cache(view):
    shown = []

    def probe(model=None, flagged=None, *, stage, epoch, detail=None):
        shown.extend((detail or {}).get("figures", ()))

    view = replace(view, probe=probe)
    METHOD.isolate(view)
    first = list(shown)
    assert [type(figure) for figure in first] == [ScoreHistogram] * 3 + [LossLandscape]
    assert len({figure.name for figure in first}) == 4
    assert all(figure.scores.isfinite().all() and len(figure.scores) == 128 for figure in first[:3])
    METHOD.isolate(view)
    assert all(torch.equal(a.scores, b.scores) for a, b in zip(first[:3], shown[4:7], strict=True))


def test_second_call_finds_the_cached_stage(view, rows, monkeypatch):
    calls = []
    fit = kl.fit
    monkeypatch.setattr(kl, "fit", lambda *args, **options: calls.append(1) or fit(*args, **options))
    first, curve = METHOD.isolate(view), list(rows.rows)
    rows.rows.clear()
    again = METHOD.isolate(view)
    assert len(calls) == 6
    assert torch.equal(first.flagged, again.flagged)
    assert torch.equal(first.score, again.score)
    assert first.extra == again.extra
    assert rows.rows == curve
    replace(METHOD, gamma=0.1).isolate(view)
    assert len(calls) == 12


class Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["descent", "score", "ascent", "probe"])
def test_resumes_bit_for_bit(view, rows, recipe, tmp_path, monkeypatch, where):
    """Stopped in the third of three epochs: the first two are not made again."""
    method = replace(METHOD, augment=True)
    view = replace(view, train_config=replace(recipe, augment=Augmentation(2, True, 0.0, 0)))
    elsewhere = Stages(tmp_path / "elsewhere", "scope", QuietProgress(), {}, rows)
    whole = method._enhanced(replace(view, stages=elsewhere))
    fit, of_set = kl.fit, KLScore.of_set

    def stopping_fit(*args, **options):
        if options["stage"] == f"enhance 3, {where}":
            raise Stop
        return fit(*args, **options)

    def stopping_score(*args):
        if where == "score" and args[-1] == "kl patch 2":
            raise Stop
        return of_set(*args)

    def stopping_probe(model=None, flagged=None, *, stage, epoch, detail=None):
        if where == "probe" and epoch == 3:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(kl, "fit", stopping_fit)
        patch.setattr(KLScore, "of_set", stopping_score)
        with pytest.raises(Stop):
            method._enhanced(replace(view, probe=stopping_probe))
    rows.rows.clear()
    resumed = method._enhanced(view)
    assert [row["epoch"] for row in rows.rows] == [3]
    assert same(state(whole), state(resumed))


def test_a_loss_that_is_not_finite_stops_the_run(view):
    with pytest.raises(Diverged, match=r"enhance \d, descent.*lower the learning rate"):
        replace(METHOD, lr=999.0).isolate(view)
    with pytest.raises(Diverged, match=r"enhance \d, "):
        replace(METHOD, ascent_lr=999.0, ce_cap=1e30).isolate(view)


# ------------------------------------------------------------------ what is told


def test_class_report_counts_and_warns(view, progress):
    clean = torch.arange(128) % 4 != 2
    report = class_report(view, clean)
    assert report == {"clean_histogram": [32, 32, 0, 32], "vanished_classes": [2]}
    assert "no sample of class 2 is left" in progress.warnings[0]
    progress.warnings.clear()
    assert class_report(view, ~clean)["vanished_classes"] == [0, 1, 3]
    progress.warnings.clear()
    clean[[2, 6, 10]] = True  # 3 of 32
    assert class_report(view, clean)["vanished_classes"] == []
    (warning,) = progress.warnings
    assert "of class 2 less than 10% is left in the clean set" in warning
    progress.warnings.clear()
    clean[14] = True
    class_report(view, clean)
    assert progress.warnings == []


def test_a_class_that_was_never_there_has_not_vanished(view, blobs):
    wide = replace(view, num_classes=6, train=ImageSet(blobs.images, blobs.labels, 6))
    assert class_report(wide, torch.ones(128, dtype=torch.bool))["vanished_classes"] == []


def test_a_model_that_gets_all_right_flags_all_with_a_warning(view, progress):
    """A tiny ascent on easy data leaves a perfect classifier."""
    isolation = replace(METHOD, gamma=0.01, ascent_lr=1e-9, lr=0.05, epochs=8).isolate(view)
    assert isolation.flagged.all()
    assert isolation.extra["clean_histogram"] == [0, 0, 0, 0]
    assert any("the clean set is empty" in warning for warning in progress.warnings)


@pytest.mark.parametrize(
    ("isolation", "honours"),
    [("trap", True), ("oracle", True), ("fct", True), ("spectral", True), ("sce", True), ("kl", False), ("abl", False)],
)
def test_an_attack_that_owns_the_loss_is_refused_where_the_isolation_trains_by_another(bench, isolation, honours):
    words = ("attack=loss_adaptive", "defense=isolate_only", f"defense.isolation={isolation}", "train.epochs=5")
    # Refused for the pair, or, where the pair is allowed, for the missing data.
    refused = bench(*words, "dataset=cifar10", "dataset.root=nowhere", "dataset.download=false")
    told = (
        "attack=loss_adaptive owns the training loss, which defense.isolation="
        f"{isolation} of defense=isolate_only cannot honour"
    )
    assert refused.code == (3 if honours else 2), refused.err
    assert (told in refused.err) != honours


def test_any_removal_can_follow(view, new_model):
    defense = IsolateAndRemove(METHOD, Hiding(2, 0.1, 0.9, 5e-4, 32, "cosine", True, False))
    result = defense.defend(replace(view, victim=lambda: copy.deepcopy(new_model(4)).eval()))
    assert result.model(torch.rand(2, 3, 16, 16)).shape == (2, 5)
    assert result.flagged.any()


@pytest.mark.parametrize(
    ("key", "value"),
    [("epochs", 0), ("gamma", 0), ("gamma", 1.0), ("clean_frac_max", 1), ("p_is", "p"), ("scored", "none"),
     ("eps", 0), ("eps", 8), ("patch", 0), ("patch", 1.5), ("perturb", "x"), ("gradient", "delta"),
     ("kl_direction", "both"), ("lr", 0), ("ascent_lr", "a"), ("ce_cap", 0), ("momentum", 1), ("weight_decay", -1),
     ("batch_size", 2.5), ("augment", "yes")],
)  # fmt: skip
def test_a_bad_value_names_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"defense\.isolation\.{key}={value!r}"):
        replace(METHOD, **{key: value})
