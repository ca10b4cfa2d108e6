"""FCT against literal versions: the intra-class loss, the two phases of training, the movement, the ranks."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from backdoor_bench.cache import Stages
from backdoor_bench.detection import distinguish, fct
from backdoor_bench.detection.distinguish import EarlyTraining, intra_class_loss, split_by_rank
from backdoor_bench.detection.embedding import embed
from backdoor_bench.detection.fct import FCTIsolation
from backdoor_bench.detection.transforms import TRANSFORMS, Composition
from backdoor_bench.errors import ConfigError
from backdoor_bench.progress import QuietProgress
from backdoor_bench.training.fit import cross_entropy
from backdoor_bench.training.seeds import derive
from backdoor_bench.types import DefenderView, Facts, ImageRows, SampleMap, ScoreHistogram, SplitGrid
from tests.conftest import other_in_everything

TRAINING = EarlyTraining(2, 0.02, 0.9, 5e-4, 32, 20)
FCT = FCTIsolation(TRAINING, 2, 1, ["rotate", "affine"], 0.2, 0.05, 0, False)


@pytest.fixture
def view(blobs, new_model, recipe, stages, rows, progress):
    return DefenderView(
        train=blobs, holdout=None, num_classes=4, new_model=new_model, victim=None, train_config=recipe,
        train_loss=cross_entropy(), generator=torch.Generator().manual_seed(5), stages=stages, probe=rows,
        device=torch.device("cpu"), progress=progress,
    )  # fmt: skip


def elsewhere(view, tmp_path, rows, name="elsewhere"):
    return replace(view, stages=Stages(tmp_path / name, "scope", QuietProgress(), {}, rows))


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------ loss


@pytest.mark.parametrize("labels", [[0, 1, 2, 0, 1, 2, 2], [3, 3, 0, 0, 3, 0, 0], [1] * 7], ids=["3", "2", "1"])
def test_intra_class_loss_is_the_loop_over_pairs(labels):
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).abs().requires_grad_()
    labels = torch.tensor(labels)
    centres = [features[labels == label].mean(0) for label in labels.unique()]
    wanted = torch.zeros(())
    for i, one in enumerate(centres):
        for j, two in enumerate(centres):
            if i != j:
                wanted = wanted + (one @ two) / (one.norm() * two.norm())
    wanted = wanted / len(centres) ** 2
    found = intra_class_loss(features, labels, 4)
    torch.testing.assert_close(found, wanted)
    slope = torch.autograd.grad(found, features)[0]
    if len(centres) == 1:
        assert found == 0
        assert not slope.any()
    else:
        torch.testing.assert_close(slope, torch.autograd.grad(wanted, features)[0], rtol=1e-4, atol=1e-6)


def test_intra_class_loss_by_hand():
    """Centres (1, 0), (1, 1), and zeros: cosines 1/sqrt(2), 0, 0; twice each, over 9."""
    features = torch.tensor([[2.0, 0.0], [0.0, 0.0], [3.0, 3.0], [0.0, 0.0]], requires_grad=True)
    loss = intra_class_loss(features, torch.tensor([0, 0, 1, 5]), 6)
    assert loss.item() == pytest.approx(2 / math.sqrt(2) / 9)
    loss.backward()
    assert features.grad.isfinite().all()


def test_intra_class_loss_stays_in_single_precision():
    features = torch.rand(8, 4)
    labels = torch.arange(8) % 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(intra_class_loss(features, labels, 3), intra_class_loss(features, labels, 3).float())
        inside = intra_class_loss(features, labels, 3)
    assert torch.equal(inside, intra_class_loss(features, labels, 3))


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("passes", [1, 2])
def test_training_is_the_literal_two_phases_of_one_optimiser(view, blobs, new_model, recipe, monkeypatch, passes):
    """Batches as ``fit`` drew them; the head rests in the second phase, momentum and schedule go on. Nothing comes from
    the victim's recipe; with two passes the statistics of the batch norms, and nothing else, move twice a step."""
    asked, seen = [], []

    def train_loss(model, batch):
        asked.append(batch.epoch)
        return cross_entropy()(model, batch)

    view = replace(view, train_loss=train_loss, train_config=other_in_everything(recipe))
    monkeypatch.setattr(distinguish, "fit", recording(seen, distinguish.fit))
    before, after = TRAINING.models(view, finetune_epochs=2, norm_passes=passes)

    model = new_model(4).train()
    sgd = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    assert len(seen) == 16  # four epochs of four batches
    for step, rows in enumerate(seen):
        if step == 8:
            first = state(model)
        sgd.param_groups[0]["lr"] = 0.02 * 0.5 * (1 + math.cos(math.pi * (step // 4) / 20))
        images, labels = blobs.images[rows].float() / 255, blobs.labels[rows]
        sgd.zero_grad(set_to_none=True)
        if step < 8:
            loss = F.cross_entropy(model(images), labels)
        else:
            for _ in range(passes):
                features = model.features(images)
            loss = intra_class_loss(features, labels, 4)
        loss.backward()
        sgd.step()
    for found, wanted in ((before, first), (after, state(model))):
        for name, value in state(found).items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-5)
    assert asked == [0] * 4 + [1] * 4  # the loss of plain training is that of the first phase, and of it alone
    assert torch.equal(after.head.weight, before.head.weight)
    assert torch.equal(after.head.bias, before.head.bias)
    assert not same(state(after), state(before))
    assert not before.training
    assert not after.training


def recording(seen, fit):
    def recorded(model, data, config, *, loss_fn, **options):
        def loss(trained, batch):
            seen.append(batch.index.tolist())
            assert torch.equal(batch.images, batch.pixels)  # no augmentation
            return loss_fn(trained, batch)

        return fit(model, data, config, loss_fn=loss, **options)

    return recorded


def test_a_second_pass_moves_the_statistics_alone(view):
    once, twice = (TRAINING.models(view, finetune_epochs=2, norm_passes=passes)[1] for passes in (1, 2))
    for (name, one), two in zip(state(once).items(), state(twice).values(), strict=True):
        assert torch.equal(one, two) != ("running" in name or "tracked" in name), name


def test_nothing_of_the_victims_recipe_leaks(view, recipe, tmp_path, rows):
    other = replace(elsewhere(view, tmp_path, rows), train_config=other_in_everything(recipe))
    one, two = FCT.isolate(view), FCT.isolate(other)
    assert torch.equal(one.score, two.score)
    assert torch.equal(one.flagged, two.flagged)


def test_fine_tuning_pushes_the_class_centres_apart(view, blobs):
    before, after = replace(TRAINING, lr=0.1).models(view, finetune_epochs=6)
    images = blobs.images.float() / 255
    with torch.no_grad():
        apart = [intra_class_loss(model.features(images), blobs.labels, 4).item() for model in (before, after)]
    assert apart[1] < apart[0] - 0.02


def test_training_alone_is_the_first_phase(view):
    alone, same_one = TRAINING.models(view)
    before, _ = TRAINING.models(view, finetune_epochs=2)
    assert same(state(alone), state(before))
    assert same(state(alone), state(same_one))


class Stop(Exception):
    pass


@pytest.mark.parametrize("killed_in", [2, 3])
def test_training_resumes_bit_for_bit(view, rows, tmp_path, killed_in):
    whole = TRAINING.models(elsewhere(view, tmp_path, rows), finetune_epochs=2)

    def killed(model=None, flagged=None, *, stage, epoch, detail=None):
        if epoch == killed_in:
            raise Stop

    with pytest.raises(Stop):
        TRAINING.models(replace(view, probe=killed), finetune_epochs=2)
    rows.rows.clear()
    resumed = TRAINING.models(view, finetune_epochs=2)
    assert [row["epoch"] for row in rows.rows] == list(range(killed_in, 5))
    for one, other in zip(whole, resumed, strict=True):
        assert same(state(one), state(other))


# ------------------------------------------------------------------ ranks


@pytest.mark.parametrize(
    ("alpha_c", "alpha_p", "sizes"), [(0.2, 0.05, (20, 5)), (0.29, 0.71, (29, 71)), (0, 0, (0, 0))]
)
def test_ranks_have_exact_sizes_whatever_the_ties(alpha_c, alpha_p, sizes):
    for score in (torch.zeros(100), torch.arange(100.0), (torch.arange(100) // 30).float()):
        flagged, trusted = split_by_rank(score, alpha_c, alpha_p, torch.Generator().manual_seed(0))
        assert (int(trusted.sum()), int(flagged.sum())) == sizes
        assert not (flagged & trusted).any()
        rest = score[~flagged & ~trusted]
        if len(rest) and sum(sizes):
            assert score[trusted].max() <= rest.min()
            assert score[flagged].min() >= rest.max()


def test_ranks_follow_the_score_and_chance_decides_ties():
    score = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])
    flagged, trusted = split_by_rank(score, 0.4, 0.2, torch.Generator())
    assert flagged.tolist() == [True, False, False, False, False]
    assert trusted.tolist() == [False, True, False, True, False]
    assert split_by_rank(score, None, 0.2, torch.Generator())[1] is None
    picks = {
        tuple(split_by_rank(torch.zeros(10), 0.2, 0.1, torch.Generator().manual_seed(k))[0].tolist()) for k in range(40)
    }
    assert len(picks) > 5  # not always the first or the last row


# ------------------------------------------------------------------ isolation


def test_movement_is_the_literal_distance_of_features(view, blobs):
    found = FCT.isolate(view)
    _, after = TRAINING.models(view, finetune_epochs=2)
    tau = Composition(("rotate", "affine"), derive(5, "fct transforms"))
    for row in (0, 17, 127):
        one = blobs.images[row : row + 1]
        two = tau(one, torch.tensor([row]))
        with torch.no_grad():
            f, g = (after.features(image.float() / 255)[0] for image in (one, two))
        wanted = sum((a - b) ** 2 for a, b in zip(f.tolist(), g.tolist(), strict=True))
        assert found.score[row].item() == pytest.approx(wanted, rel=1e-4)
    assert found.score.dtype == torch.float32
    assert (int(found.flagged.sum()), int(found.trusted.sum())) == (6, 25)
    assert found.score[found.flagged].min() >= found.score[~found.flagged].max()
    assert found.score[found.trusted].max() <= found.score[~found.trusted].min()
    report = found.extra["distinguish"]
    assert report["gamma_c"] == found.score[found.trusted].max()
    assert report["gamma_p"] == found.score[found.flagged].min()
    assert report["zero_feature_share"] == 0


def forbidden(*args):
    raise AssertionError("made again")


def test_second_call_finds_the_stages_and_shares_are_not_part_of_them(view, monkeypatch):
    first = FCT.isolate(view)
    monkeypatch.setattr(distinguish, "fit", None)
    monkeypatch.setattr(fct, "extract_features", forbidden)
    again = FCT.isolate(view)
    assert torch.equal(first.flagged, again.flagged)
    assert torch.equal(first.trusted, again.trusted)
    assert first.extra == again.extra
    wider = replace(FCT, alpha_c=None, alpha_p=0.5).isolate(view)
    assert wider.trusted is None
    assert int(wider.flagged.sum()) == 64
    assert wider.flagged[first.flagged].all()


def shown_by(isolation, view):
    """The split and the figures, by name."""
    shown = []

    def probe(model=None, flagged=None, *, stage, epoch, detail=None):
        shown.extend((detail or {}).get("figures", ()))

    found = isolation.isolate(replace(view, probe=probe))
    return found, {figure.name: figure for figure in shown}


def test_figures_are_shown_again_from_the_cache(view, monkeypatch):
    every = replace(FCT, all_pairs=True, map_samples=30)
    found, first = shown_by(every, view)
    assert list(first) == ["fct_before", "fct_after", "fct_transforms", "fct_map", "fct_pairs"]
    assert isinstance(first["fct_before"], ScoreHistogram)
    assert torch.equal(first["fct_after"].scores, found.score)
    assert not torch.equal(first["fct_before"].scores, found.score)
    grid = first["fct_pairs"]
    assert isinstance(grid, SplitGrid)
    assert len(grid.splits) == 36
    assert torch.equal(grid.splits["rotate", "affine"].score, found.score)
    assert torch.equal(grid.splits["rotate", "affine"].flagged, found.flagged)
    still = grid.splits["flip", "flip"]
    assert not still.score.any()
    assert (int(still.flagged.sum()), int(still.trusted.sum())) == (6, 25)
    assert all(split.score.isfinite().all() for split in grid.splits.values())

    for name in ("extract_features", "embed"):
        monkeypatch.setattr(fct, name, forbidden)
    _, again = shown_by(every, view)
    assert list(again) == list(first)
    assert torch.equal(again["fct_pairs"].splits["erase", "blur"].flagged, grid.splits["erase", "blur"].flagged)
    assert torch.equal(again["fct_map"].rows, first["fct_map"].rows)
    for name, points in first["fct_map"].panels.items():
        assert torch.equal(again["fct_map"].panels[name], points)


def test_the_gallery_shows_each_transformation_of_the_same_images(view, blobs):
    gallery = shown_by(FCT, view)[1]["fct_transforms"]
    assert isinstance(gallery, ImageRows)
    assert list(gallery.rows) == ["training image", *TRANSFORMS]
    rows = torch.tensor([0, 18, 36, 54, 72, 90, 108, 127])
    assert torch.equal(gallery.rows["training image"], blobs.images[rows].float() / 255)
    for name in TRANSFORMS:
        wanted = Composition((name,), derive(5, "fct transforms"))(blobs.images[rows], rows)
        assert torch.equal(gallery.rows[name], wanted.float() / 255)
    tiny = replace(view, train=replace(blobs, images=blobs.images[:, :, :7, :7].contiguous()))
    assert "blur" not in fct._gallery(tiny).rows  # it needs 8 px


def test_the_map_is_one_embedding_of_features_before_and_after(view, blobs, monkeypatch):
    given = {}

    def noted(features, settings, *rest):
        given["features"], given["settings"] = features, settings
        return embed(features, settings, *rest)

    monkeypatch.setattr(fct, "embed", noted)
    monkeypatch.setattr(fct, "CHUNK", 17)
    figure = shown_by(replace(FCT, map_samples=40), view)[1]["fct_map"]
    assert isinstance(figure, SampleMap)
    assert figure.rows.dtype == torch.int64
    assert len(set(figure.rows.tolist())) == len(figure.rows) == 40
    assert figure.rows.tolist() != list(range(40))
    _, model = TRAINING.models(view, finetune_epochs=2)
    images = blobs.images[figure.rows]
    moved = Composition(("rotate", "affine"), derive(5, "fct transforms"))(images, figure.rows)
    with torch.no_grad():
        wanted = model.features(torch.cat([images, moved]).float() / 255)
    torch.testing.assert_close(given["features"], wanted, rtol=1e-4, atol=1e-5)
    assert given["settings"].perplexity == 26  # a third of the 79 others
    assert list(figure.panels) == ["training samples", "after rotate, affine"]
    assert [points.shape for points in figure.panels.values()] == [(40, 2), (40, 2)]
    assert all(points.isfinite().all() for points in figure.panels.values())


@pytest.mark.parametrize(("asked", "drawn"), [(0, None), (1, 1), (10_000, 128)])
def test_the_map_of_none_of_one_and_of_all_samples(view, asked, drawn, progress):
    found, figures = shown_by(replace(FCT, map_samples=asked), view)
    assert torch.equal(found.score, FCT.isolate(view).score)
    if drawn is None:
        assert "fct_map" not in figures
    else:
        assert len(figures["fct_map"].rows) == drawn
    assert len(progress.warnings) == (asked == 1)  # two points have no neighbourhoods


def test_what_only_pictures_need_is_no_time_of_the_defence(view, tmp_path, rows):
    """The movement before fine-tuning, the map and the pairs: booked as ``figures``."""
    booked = []

    class Spied(Stages):
        def keep(self, name, build, settings=None):
            booked.append((name, settings.get("finetuned", "map")))
            return super().keep(name, build, settings)

    seconds = {}
    spied = Spied(tmp_path / "spied", "scope", QuietProgress(), seconds, rows)
    replace(FCT, map_samples=20, all_pairs=True).isolate(replace(view, stages=spied))
    assert booked[:3] == [("distinguish", True), ("figures", False), ("figures", "map")]
    assert [name for name, _ in booked[3:]].count("distinguish") == 1  # rotate, affine, which is there already
    assert set(seconds) == {"distinguish", "figures"}


@pytest.mark.parametrize("killed_in", range(1, 6))
def test_resumes_inside_its_stages(view, rows, tmp_path, killed_in, monkeypatch):
    """Stopped in one of the passes over the images (two for each movement, the map's first) nothing is trained anew."""
    isolation = replace(FCT, map_samples=30)
    whole, figures = shown_by(isolation, elsewhere(view, tmp_path, rows))
    passes, extract = [], fct.extract_features

    def killed(*args, **options):
        passes.append(args)
        if len(passes) == killed_in:
            raise Stop
        return extract(*args, **options)

    monkeypatch.setattr(fct, "extract_features", killed)
    with pytest.raises(Stop):
        isolation.isolate(view)
    monkeypatch.setattr(distinguish, "fit", forbidden)
    resumed, again = shown_by(isolation, view)
    assert torch.equal(whole.score, resumed.score)
    assert torch.equal(whole.flagged, resumed.flagged)
    assert torch.equal(whole.trusted, resumed.trusted)
    assert whole.extra == resumed.extra
    assert torch.equal(figures["fct_before"].scores, again["fct_before"].scores)
    for name, points in figures["fct_map"].panels.items():
        assert torch.equal(again["fct_map"].panels[name], points)
    # What was done is not done again: both passes of the movement that came first.
    assert len(passes) == killed_in + 6 - 2 * ((killed_in - 1) // 2)


def test_movement_is_measured_in_full_precision(view, hardware):
    """Sixteen bits of a feature are too few to rank its movement."""
    rough = replace(view, train_config=replace(view.train_config, hardware=replace(hardware, precision="bf16")))
    found = FCT.isolate(rough)
    _, model = TRAINING.models(rough, finetune_epochs=2)
    tau = Composition(("rotate", "affine"), derive(5, "fct transforms"))
    images = view.train.images
    with torch.no_grad():
        f, g = (model.features(part.float() / 255) for part in (images, tau(images, torch.arange(128))))
    torch.testing.assert_close(found.score, (f - g).square().sum(1), rtol=1e-4, atol=1e-7)


def test_collapsed_features_are_told(view):
    """A network whose features are all zero: every movement is 0, and the sizes still hold."""

    def dead(num_classes):
        model = view.new_model(num_classes)
        last = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)][-1]
        last.weight.data.zero_()
        last.bias.data.fill_(-100.0)
        return model

    found = FCT.isolate(replace(view, new_model=dead))
    assert not found.score.any()
    assert found.extra["distinguish"]["zero_feature_share"] == 1
    assert found.extra["distinguish"]["zero_movement_share"] == 1
    assert (int(found.flagged.sum()), int(found.trusted.sum())) == (6, 25)


@pytest.mark.parametrize(
    ("key", "value"),
    [("finetune_epochs", -1), ("finetune_epochs", 19), ("transforms", []), ("transforms", "rotate"),
     ("transforms", ["turn"]), ("alpha_c", 1.1), ("alpha_p", -0.1), ("alpha_c", "x"), ("all_pairs", 1),
     ("norm_passes", 0), ("norm_passes", 3), ("map_samples", -1), ("map_samples", 2.5)],
)  # fmt: skip
def test_a_bad_value_names_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"defense\.isolation\.{key}="):
        replace(FCT, **{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("epochs", 0), ("lr", 0), ("momentum", 1), ("weight_decay", -1), ("batch_size", 0), ("cosine_epochs", 1)],
)
def test_a_bad_value_of_the_training_names_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"defense\.isolation\.training\.{key}={value!r}"):
        replace(TRAINING, **{key: value})


def test_shares_of_more_than_the_whole_are_refused():
    with pytest.raises(ConfigError, match=r"alpha_c=0\.6 and .*alpha_p=0\.5 are not allowed together"):
        replace(FCT, alpha_c=0.6, alpha_p=0.5)
    replace(FCT, alpha_c=0.9, alpha_p=0.1)


def test_images_too_small_to_blur_are_refused():
    facts = Facts(num_classes=4, image_size=7, train_size=10, epochs=1, steps_per_epoch=1)
    FCT.check(facts)
    for other in (replace(FCT, all_pairs=True), replace(FCT, transforms=["blur", "flip"])):
        with pytest.raises(ConfigError, match="at least 8 px"):
            other.check(facts)


def test_dbr_from_the_command_line(bench):
    short = (
        "train.epochs=2", "defense.removal.epochs=2", "defense.isolation.finetune_epochs=1",
        "defense.isolation.map_samples=50",
    )  # fmt: skip
    outcome = bench("attack=badnets", "defense=dbr", *short)
    assert outcome.code == 0, outcome.err
    assert outcome.result["oracle"]["stage"] == "removal"
    assert outcome.result["diagnostics"]["distinguish"]["zero_movement_share"] <= 1
    drawn = {path.stem for path in (outcome.path.parent / "figures").iterdir()}
    assert {"fct_before", "fct_after", "fct_transforms", "fct_map"} <= drawn
    refused = bench("defense=dbr", "defense.isolation.alpha_c=0.99")
    assert refused.code == 2
    assert "defense.isolation.alpha_c=0.99" in refused.err
