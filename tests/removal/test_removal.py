"""Removal modules against sums and loops written out: who is visited, what is trained, in which direction."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from backdoor_bench.cache import Stages
from backdoor_bench.data.augment import Augmentation
from backdoor_bench.errors import ConfigError, DataError
from backdoor_bench.models.classifier import Classifier, assemble
from backdoor_bench.progress import QuietProgress
from backdoor_bench.removal import common
from backdoor_bench.removal.hiding import Hiding
from backdoor_bench.removal.mixed_ce import MixedCE, mixed_cross_entropy
from backdoor_bench.removal.retrain import Retrain
from backdoor_bench.removal.unlearn_relearn import UnlearnRelearn
from backdoor_bench.removal.unlearning import Unlearning
from backdoor_bench.training.fit import cross_entropy
from backdoor_bench.training.recipes import recipe as made_recipe
from backdoor_bench.types import DefenderView, ImageSet, Isolation
from tests.conftest import other_in_everything

CPU = torch.device("cpu")
REMOVALS = {
    "hiding": Hiding(3, 0.1, 0.9, 5e-4, 32, "cosine", True, False),
    "unlearning": Unlearning(3, 5e-4, 0.9, 1e-4, True, 8, "constant", True),
    "unlearn_relearn": UnlearnRelearn(3, 1e-3, 0.9, 5e-4, 32, "constant", True, "both"),
    "mixed_ce": MixedCE(3, 0.1, 0.9, 0.0, 32, "constant", True, 0.01),
    "retrain": Retrain("unflagged"),
}
every_removal = pytest.mark.parametrize("removal", REMOVALS.values(), ids=REMOVALS)
EXTRACTOR_STAYS = ("hiding", "mixed_ce")


class Logged:
    """types.Images that notes which rows were asked for, batch by batch."""

    def __init__(self, images):
        self.images, self.shape, self.batches = images, images.shape, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, rows):
        self.batches.append(rows.tolist())
        return self.images[rows]

    @property
    def visited(self):
        return {row for batch in self.batches for row in batch}


@pytest.fixture
def view(blobs, new_model, recipe, stages, rows, progress):
    return make_view(blobs, new_model, recipe, stages, rows, progress)


def make_view(train, new_model, recipe, stages, probe, progress):
    return DefenderView(
        train=train, holdout=None, num_classes=train.num_classes, new_model=new_model, victim=None,
        train_config=recipe, train_loss=cross_entropy(), generator=torch.Generator().manual_seed(5), stages=stages,
        probe=probe, device=CPU,
        progress=progress,
    )  # fmt: skip


@pytest.fixture
def logged(view, blobs):
    """The same view over images that note who is visited."""
    return replace(view, train=ImageSet(Logged(blobs.images), blobs.labels, 4))


@pytest.fixture
def isolation():
    """Rows 0, 6, 12, ..., 126 of 128 are flagged: 22."""
    return Isolation(flagged=torch.arange(128) % 6 == 0)


@pytest.fixture
def victim(new_model):
    """In eval mode with batch norm statistics that no training would give."""
    model = new_model(4).eval()
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            value.add_(0.25)
    return model


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def colour_means(num_classes):
    """features = the mean of each colour channel, in front of a linear head: every gradient fits on a line."""
    torch.manual_seed(0)
    return assemble({}, {}, 3, num_classes, "none", (0.0,) * 3, (1.0,) * 3).eval()


def features_of(images):
    return images.float().div(255).mean((2, 3))


# ------------------------------------------------------------------ what all share


@every_removal
def test_the_given_model_stays_as_it_is(view, isolation, victim, removal):
    before, modes = state(victim), [module.training for module in victim.modules()]
    repaired = removal.remove(view, victim, isolation)
    assert repaired is not victim
    assert same(state(victim), before)
    assert [module.training for module in victim.modules()] == modes
    assert all(parameter.requires_grad for parameter in victim.parameters())
    assert not set(map(id, repaired.parameters())) & set(map(id, victim.parameters()))
    assert not repaired.training
    assert all(torch.isfinite(value).all() for value in repaired.state_dict().values())


@pytest.mark.parametrize("name", sorted(REMOVALS.keys() - {"unlearn_relearn"}))
def test_nothing_flagged_returns_the_victim_with_a_warning(view, victim, progress, rows, name):
    before = state(victim)
    returned = REMOVALS[name].remove(view, victim, Isolation(flagged=torch.zeros(128, dtype=torch.bool)))
    assert returned is victim
    assert same(state(victim), before)
    assert returned(torch.rand(2, 3, 16, 16)).shape == (2, 4)
    assert len(progress.warnings) == 1
    assert progress.warnings[0].startswith("nothing is flagged")
    assert "eps" not in progress.warnings[0]  # most isolations have no such key
    assert rows.rows == []


@every_removal
def test_the_transform_of_the_data_is_applied_to_every_image(view, isolation, victim, removal, monkeypatch):
    """An attack's own transform (``physical``): black here, so that is what the extractor must see in training."""
    turned, seen = [], []

    def camera(images, generator):
        turned.append(len(images))
        return torch.zeros_like(images)

    features = Classifier.features

    def noted(model, images):
        seen.append(float(images.abs().max()))
        return features(model, images)

    monkeypatch.setattr(Classifier, "features", noted)
    removal.remove(replace(view, train=replace(view.train, augment=camera)), victim, isolation)
    visited = {"hiding": 128, "unlearning": 22, "unlearn_relearn": 128, "mixed_ce": 128, "retrain": 106}
    name = next(name for name, other in REMOVALS.items() if other is removal)
    assert sum(turned) == 3 * visited[name]
    assert seen == [0.0] * len(turned)


@every_removal
def test_second_call_finds_the_cached_stage(view, isolation, victim, rows, removal, monkeypatch):
    seen = []
    monkeypatch.setattr(common, "fit", counting(seen, common.fit))
    first = removal.remove(view, victim, isolation)
    curve = list(rows.rows)
    assert [row["epoch"] for row in curve] == [1, 2, 3]
    rows.rows.clear()
    again = removal.remove(view, victim, isolation)
    assert len(seen) == 1
    assert same(state(first), state(again))
    images = torch.rand(40, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(first(images), again(images))
    assert rows.rows == curve
    assert not again.training

    other_split = Isolation(flagged=isolation.flagged, trusted=torch.arange(128) % 6 == 1)
    removal.remove(view, victim, other_split)
    assert len(seen) == 2


def counting(seen, fit):
    def counted(model, data, config, **options):
        seen.append(data)
        return fit(model, data, config, **options)

    return counted


@pytest.mark.parametrize("name", ["hiding", "unlearning", "unlearn_relearn", "mixed_ce"])
def test_another_value_is_another_stage(view, isolation, victim, name):
    one = REMOVALS[name].remove(view, victim, isolation)
    two = replace(REMOVALS[name], lr=REMOVALS[name].lr / 2).remove(view, victim, isolation)
    assert not same(state(one), state(two))


@every_removal
def test_another_recipe_of_the_victim_is_another_stage(view, isolation, victim, recipe, removal):
    one = removal.remove(view, victim, isolation)
    cropped = replace(recipe, augment=Augmentation(2, True, 0.0, 0))
    assert not same(state(one), state(removal.remove(replace(view, train_config=cropped), victim, isolation)))


class Stop(Exception):
    pass


@every_removal
def test_resumes_bit_for_bit(view, isolation, victim, rows, recipe, removal, tmp_path):
    view = replace(view, train_config=replace(recipe, augment=Augmentation(2, True, 0.0, 0)))
    elsewhere = Stages(tmp_path / "elsewhere", "scope", QuietProgress(), {}, rows)
    whole = removal.remove(replace(view, stages=elsewhere), victim, isolation)

    def killed_in_epoch_3(model=None, flagged=None, *, stage, epoch, detail=None):
        if epoch == 3:
            raise Stop

    with pytest.raises(Stop):
        removal.remove(replace(view, probe=killed_in_epoch_3), victim, isolation)
    rows.rows.clear()
    resumed = removal.remove(view, victim, isolation)
    assert [row["epoch"] for row in rows.rows] == [3]
    assert same(state(whole), state(resumed))


@pytest.mark.parametrize("name", ["hiding", "unlearning", "unlearn_relearn", "mixed_ce"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("epochs", 0), ("lr", 0), ("lr", float("nan")), ("momentum", 1), ("weight_decay", -1), ("batch_size", 0),
     ("batch_size", 2.5), ("schedule", "step"), ("augment", "yes")],
)  # fmt: skip
def test_a_bad_value_names_its_key(name, key, value):
    with pytest.raises(ConfigError, match=rf"defense\.removal\.{key}={value!r}"):
        replace(REMOVALS[name], **{key: value})


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("mixed_ce", "lambda_p", -0.1), ("mixed_ce", "lambda_p", float("inf")), ("unlearn_relearn", "rounds", "x"),
     ("unlearning", "nesterov", 1), ("hiding", "drop_dummy", 0), ("retrain", "rows", "clean")],
)  # fmt: skip
def test_a_bad_value_of_one_module_names_its_key(name, key, value):
    with pytest.raises(ConfigError, match=rf"defense\.removal\.{key}={value!r}"):
        replace(REMOVALS[name], **{key: value})


def test_recipe_keeps_nothing_of_the_victims_schedule(recipe):
    base = other_in_everything(recipe)
    assert not [
        name for name, value in vars(base).items()
        if value == getattr(recipe, name) and name not in ("hardware", "checkpoint_seconds")
    ]  # fmt: skip
    values = dict(epochs=7, lr=0.3, momentum=0.5, weight_decay=0.01, batch_size=9, schedule="constant")
    made = made_recipe(base, **values)
    assert [made.lr_at(epoch, 0, 3) for epoch in range(7)] == [0.3] * 7
    assert (made.optimizer, made.momentum, made.weight_decay, made.nesterov) == ("sgd", 0.5, 0.01, False)
    assert (made.epochs, made.batch_size, made.drop_last, made.label_smoothing) == (7, 9, False, 0.0)
    assert made.augment == base.augment
    assert made_recipe(base, **values, augment=False).augment == Augmentation(0, False, 0.0, 0)


@pytest.mark.parametrize("name", sorted(REMOVALS.keys() - {"retrain"}))
def test_nothing_of_the_victims_recipe_leaks(view, isolation, victim, recipe, rows, name, tmp_path):
    removal = replace(REMOVALS[name], augment=False, schedule="cosine")
    elsewhere = Stages(tmp_path / "elsewhere", "scope", QuietProgress(), {}, rows)
    other = replace(view, train_config=other_in_everything(recipe), stages=elsewhere)
    one, two = (removal.remove(given, victim, isolation) for given in (view, other))
    assert same(state(one), state(two))


# ------------------------------------------------------------------ hiding


def test_hiding_relabels_exactly_the_flagged_rows(view, isolation, victim, monkeypatch):
    seen = []
    monkeypatch.setattr(common, "fit", counting(seen, common.fit))
    given = view.train.labels.clone()
    REMOVALS["hiding"].remove(view, victim, isolation)
    (data,) = seen
    assert data.num_classes == 5
    assert data.images is view.train.images
    assert (data.labels[isolation.flagged] == 4).all()
    assert torch.equal(data.labels[~isolation.flagged], given[~isolation.flagged])
    assert torch.equal(view.train.labels, given)


def test_hiding_visits_every_row_once_an_epoch(logged, isolation, victim):
    REMOVALS["hiding"].remove(logged, victim, isolation)
    batches = logged.train.images.batches
    assert [len(batch) for batch in batches] == [32, 32, 32, 32] * 3
    for epoch in range(3):
        assert sorted(row for batch in batches[4 * epoch : 4 * epoch + 4] for row in batch) == list(range(128))


@pytest.mark.parametrize("name", EXTRACTOR_STAYS)
def test_all_but_the_head_is_bit_identical_to_the_victims(view, isolation, victim, name):
    repaired, before = state(REMOVALS[name].remove(view, victim, isolation)), state(victim)
    assert repaired.keys() == before.keys()
    for key, value in repaired.items():
        if key.startswith("head."):
            assert len(value) == (5 if name == "hiding" else 4)
        else:
            assert torch.equal(value, before[key]), key
    assert any(key.endswith("running_var") for key in before)
    assert not torch.equal(repaired["head.weight"][:4], before["head.weight"])


def test_hiding_sends_separable_flagged_samples_to_the_dummy_class(view):
    """Three classes are a colour each; the flagged samples are grey and carry label 0."""
    colours = torch.tensor([[240, 10, 10], [10, 240, 10], [10, 10, 240], [240, 240, 240]], dtype=torch.uint8)
    kind = torch.arange(96) % 4
    images = colours[kind][:, :, None, None].expand(96, 3, 8, 8).contiguous()
    labels = torch.where(kind == 3, 0, kind)
    view = replace(view, train=ImageSet(images, labels, 3), num_classes=3)
    victim = colour_means(3)
    hiding = Hiding(40, 1.0, 0.9, 0.0, 32, "cosine", False, False)
    repaired = hiding.remove(view, victim, Isolation(flagged=kind == 3))
    with torch.no_grad():
        logits = repaired(images.float() / 255)
        assert logits.shape == (96, 4)
        assert torch.equal(logits.argmax(1), kind)
    assert repaired.num_classes == 4

    # Without the dummy class the same model predicts among the real ones; nothing is trained for that.
    first = replace(hiding, drop_dummy=True).remove(view, victim, Isolation(flagged=kind == 3))
    assert first.num_classes == 3
    assert not first.training
    with torch.no_grad():
        torch.testing.assert_close(first(images.float() / 255), logits[:, :3])
    assert torch.equal(first.head.weight, repaired.head.weight[:3])


def test_drop_dummy_shares_the_cached_stage(view, isolation, victim, monkeypatch):
    seen = []
    monkeypatch.setattr(common, "fit", counting(seen, common.fit))
    REMOVALS["hiding"].remove(view, victim, isolation)
    replace(REMOVALS["hiding"], drop_dummy=True).remove(view, victim, isolation)
    assert len(seen) == 1


# ------------------------------------------------------------------ unlearning


def test_nesterov_without_momentum_is_refused_in_the_removals_own_keys():
    with pytest.raises(ConfigError, match=r"defense\.removal\.nesterov=true .* defense\.removal\.momentum=0"):
        replace(REMOVALS["unlearning"], momentum=0.0)
    replace(REMOVALS["unlearning"], momentum=0.0, nesterov=False)


@pytest.mark.parametrize("nesterov", [False, True])
def test_one_unlearning_step_is_gradient_ascent_by_hand(view, isolation, blobs, nesterov):
    """First step of SGD: w - lr * k * (wd * w - grad CE), k = 1 + momentum with Nesterov, else 1."""
    victim = colour_means(4)
    before = state(victim)
    x, y = features_of(blobs.images)[isolation.flagged], blobs.labels[isolation.flagged]
    weight, bias = before["head.weight"], before["head.bias"]
    error = (x @ weight.T + bias).softmax(1) - F.one_hot(y, 4)
    factor = 0.02 * (1.9 if nesterov else 1.0)
    wanted_weight = weight - factor * (0.1 * weight - error.T @ x / len(x))
    wanted_bias = bias - factor * (0.1 * bias - error.mean(0))

    unlearning = Unlearning(1, 0.02, 0.9, 0.1, nesterov, 64, "constant", False)
    after = state(unlearning.remove(view, victim, isolation))
    torch.testing.assert_close(after["head.weight"], wanted_weight)
    torch.testing.assert_close(after["head.bias"], wanted_bias)


def test_unlearning_visits_the_flagged_rows_only_and_raises_their_loss(logged, blobs, isolation, new_model):
    from backdoor_bench.training.fit import fit

    victim = new_model(4)
    fit(victim, blobs, logged.train_config, generator=torch.Generator(), stage="t", progress=QuietProgress())
    repaired = replace(REMOVALS["unlearning"], augment=False).remove(logged, victim, isolation)
    batches = logged.train.images.batches
    assert [len(batch) for batch in batches] == [8, 8, 6] * 3
    flagged = set(isolation.flagged.nonzero().flatten().tolist())
    for epoch in range(3):
        assert {row for batch in batches[3 * epoch : 3 * epoch + 3] for row in batch} == flagged
    images, labels = blobs.images[isolation.flagged].float() / 255, blobs.labels[isolation.flagged]
    with torch.no_grad():
        assert F.cross_entropy(repaired(images), labels) > F.cross_entropy(victim(images), labels)


# ------------------------------------------------------------------ unlearning and relearning


@pytest.mark.parametrize(("rounds", "passes"), [("both", "pc"), ("unlearn", "p"), ("relearn", "c")])
@pytest.mark.parametrize("trust", [False, True], ids=["complement", "trusted"])
def test_a_round_is_all_flagged_batches_then_all_clean_ones(logged, isolation, victim, rounds, passes, trust):
    trusted = (torch.arange(128) % 6 == 1) if trust else None
    given = Isolation(flagged=isolation.flagged, trusted=trusted)
    replace(REMOVALS["unlearn_relearn"], batch_size=10, rounds=rounds).remove(logged, victim, given)
    poisoned = sorted(isolation.flagged.nonzero().flatten().tolist())
    clean = sorted((trusted if trust else ~isolation.flagged).nonzero().flatten().tolist())
    batches, orders = list(logged.train.images.batches), []
    for _ in range(3):
        for kind in passes:
            wanted = poisoned if kind == "p" else clean
            count = -(-len(wanted) // 10)
            part, batches = [row for batch in batches[:count] for row in batch], batches[count:]
            assert sorted(part) == wanted
            orders.append(tuple(part))
    assert batches == []
    assert len(set(orders)) == len(orders)  # a new shuffle every time


@pytest.mark.parametrize("augment", [False, True])
def test_unlearn_relearn_is_one_optimiser_over_both_passes(logged, isolation, victim, blobs, augment):
    """A literal loop over the batches that were visited, ascending on flagged ones; momentum carries over."""
    method = UnlearnRelearn(2, 0.02, 0.9, 5e-4, 32, "constant", augment, "both")
    repaired = state(method.remove(logged, victim, isolation))

    def literal(shared):
        model = copy.deepcopy(victim).train()

        def sgd():
            return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)

        ascent = sgd()
        descent = ascent if shared else sgd()
        for batch in logged.train.images.batches:
            flagged = isolation.flagged[batch]
            assert flagged.all() or not flagged.any()
            optimizer, sign = (ascent, -1) if flagged.all() else (descent, 1)
            images = blobs.images[batch].float() / 255
            optimizer.zero_grad()
            (sign * F.cross_entropy(model(images), blobs.labels[batch])).backward()
            optimizer.step()
        return state(model)

    wanted, unshared = literal(True), literal(False)
    for name, value in repaired.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(repaired["head.weight"], unshared["head.weight"], rtol=1e-4, atol=1e-5)


NOBODY = torch.zeros(128, dtype=torch.bool)


@pytest.mark.parametrize(
    ("trusted", "says"),
    [(NOBODY, "no sample is trusted: the rounds are unlearning alone"),
     (~NOBODY, "nothing is flagged: the rounds are relearning alone")],
    ids=["unlearn", "relearn"],
)  # fmt: skip
def test_a_round_without_one_of_its_sets_is_the_other_pass(
    logged, isolation, victim, progress, trusted, says, rows, tmp_path
):
    """Where EBD's sweeps of alpha_c and alpha_p begin (Fig. 13)."""
    given = Isolation(NOBODY if trusted.any() else isolation.flagged, trusted)
    repaired = REMOVALS["unlearn_relearn"].remove(logged, victim, given)
    assert progress.warnings == [says]
    assert logged.train.images.visited == set((trusted | given.flagged).nonzero().flatten().tolist())
    alone = replace(REMOVALS["unlearn_relearn"], rounds="relearn" if trusted.any() else "unlearn")
    elsewhere = Stages(tmp_path / "elsewhere", "scope", QuietProgress(), {}, rows)
    assert same(state(repaired), state(alone.remove(replace(logged, stages=elsewhere), victim, given)))
    assert not same(state(repaired), state(victim))


@pytest.mark.parametrize("rounds", ["both", "unlearn", "relearn"])
def test_no_sample_at_all_returns_the_victim(view, victim, progress, rounds, rows):
    removal = replace(REMOVALS["unlearn_relearn"], rounds=rounds)
    assert removal.remove(view, victim, Isolation(NOBODY, NOBODY)) is victim
    says = {"both": "nothing is flagged and no sample is trusted", "unlearn": "nothing is flagged",
            "relearn": "no sample is trusted"}[rounds]  # fmt: skip
    assert progress.warnings == [f"{says}: the victim is returned as it is"]
    assert rows.rows == []


@pytest.mark.parametrize("rounds", ["unlearn", "relearn"])
def test_a_pass_alone_needs_its_own_samples_only(logged, isolation, victim, progress, rounds):
    none = torch.zeros(128, dtype=torch.bool)
    given = Isolation(isolation.flagged, none) if rounds == "unlearn" else Isolation(none)
    repaired = replace(REMOVALS["unlearn_relearn"], rounds=rounds).remove(logged, victim, given)
    assert not same(state(repaired), state(victim))
    wanted = isolation.flagged if rounds == "unlearn" else ~none
    assert logged.train.images.visited == set(wanted.nonzero().flatten().tolist())
    assert progress.warnings == []


# ------------------------------------------------------------------ mixed cross-entropy


@pytest.mark.parametrize("lambda_p", [0.0, 0.001, 1.0])
@pytest.mark.parametrize("flagged", [[0, 1, 0, 0, 1], [0] * 5, [1] * 5, [1, 0, 0, 0, 0]])
def test_mixed_cross_entropy_is_the_loop_over_samples(flagged, lambda_p):
    torch.manual_seed(0)
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 2, 0])
    sums, counts = {0: 0.0, 1: 0.0}, {0: 0, 1: 0}
    for row, label, group in zip(logits, labels, flagged, strict=True):
        sums[group] = sums[group] - (row[label] - row.exp().sum().log())
        counts[group] += 1
    wanted = torch.zeros((), dtype=torch.float64)
    if counts[0]:
        wanted = wanted + sums[0] / counts[0]
    if counts[1]:
        wanted = wanted - lambda_p * sums[1] / counts[1]
    (wanted_grad,) = torch.autograd.grad(wanted, logits, retain_graph=True, allow_unused=True)
    loss = mixed_cross_entropy(logits, labels, torch.tensor(flagged).bool(), lambda_p)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grad, wanted_grad)
    assert torch.isfinite(grad).all()


def test_mixed_ce_first_step_by_hand(view, isolation, blobs):
    """The new head's first step from its own start: one batch of all rows, clean mean minus lambda times flagged."""
    victim = colour_means(4)
    small = MixedCE(1, 1e-30, 0.0, 0.0, 128, "constant", False, 0.5)
    start = state(small.remove(view, victim, isolation))  # a step too short to be seen
    after = state(replace(small, lr=0.3).remove(view, victim, isolation))
    x, y = features_of(blobs.images), blobs.labels
    error = (x @ start["head.weight"].T + start["head.bias"]).softmax(1) - F.one_hot(y, 4)
    weight = torch.where(isolation.flagged, -0.5 / 22, 1 / 106)[:, None]
    torch.testing.assert_close(after["head.weight"], start["head.weight"] - 0.3 * (weight * error).T @ x)
    torch.testing.assert_close(after["head.bias"], start["head.bias"] - 0.3 * (weight * error).sum(0))


@pytest.mark.parametrize("trust", [False, True], ids=["complement", "trusted"])
def test_mixed_ce_visits_flagged_and_clean_rows_once_an_epoch(logged, isolation, victim, trust):
    trusted = (torch.arange(128) % 6 == 1) if trust else ~isolation.flagged
    REMOVALS["mixed_ce"].remove(logged, victim, Isolation(isolation.flagged, trusted if trust else None))
    visited = sorted(row for batch in logged.train.images.batches for row in batch)
    wanted = (trusted | isolation.flagged).nonzero().flatten().tolist()
    assert visited == sorted(wanted * 3)


@pytest.mark.parametrize(
    ("split", "says"),
    [(Isolation(~NOBODY), "every training sample is flagged"),
     (Isolation(torch.arange(128) % 6 == 0, NOBODY), r"trusts no sample .*defense\.isolation\.alpha_c")],
)  # fmt: skip
def test_mixed_ce_refuses_to_unlearn_alone(view, victim, split, says, rows):
    with pytest.raises(DataError, match=says):
        REMOVALS["mixed_ce"].remove(view, victim, split)
    assert rows.rows == []


# ------------------------------------------------------------------ retraining


@pytest.mark.parametrize(
    ("kept", "trust", "visits"),
    [("unflagged", False, "unflagged"), ("unflagged", True, "unflagged"), ("trusted", True, "trusted"),
     ("trusted", False, "unflagged")],
)  # fmt: skip
def test_retrain_visits_what_it_keeps(logged, isolation, victim, kept, trust, visits):
    """By default all but the flagged, also where an isolation trusts a few only."""
    trusted = torch.arange(128) % 6 == 1
    Retrain(kept).remove(logged, victim, Isolation(isolation.flagged, trusted if trust else None))
    wanted = ~isolation.flagged if visits == "unflagged" else trusted
    assert logged.train.images.visited == set(wanted.nonzero().flatten().tolist())
    assert len(logged.train.images.batches) == 3 * (4 if visits == "unflagged" else 1)


def test_retrain_on_trusted_rows_drops_the_others_though_nothing_is_flagged(logged, victim):
    trusted = torch.arange(128) % 6 == 1
    assert Retrain("trusted").remove(logged, victim, Isolation(NOBODY, trusted)) is not victim
    assert logged.train.images.visited == set(trusted.nonzero().flatten().tolist())


def test_retrain_has_the_loss_of_plain_training_with_rows_of_the_whole_set(view, isolation, victim):
    """An attacker that owns the loss knows its samples by their numbers in the training set."""
    asked = []

    def attackers_loss(model, batch):
        asked.append(batch.index)
        assert torch.equal(batch.labels, view.train.labels[batch.index])
        assert torch.equal(batch.pixels, view.train.images[batch.index].float() / 255)
        return 0 * cross_entropy()(model, batch)

    shrunk = Retrain("unflagged").remove(replace(view, train_loss=attackers_loss), victim, isolation)
    kept = (~isolation.flagged).nonzero().flatten().tolist()
    assert sorted(torch.cat(asked).tolist()) == sorted(kept * 3)
    start, end = view.new_model(4).head.weight, shrunk.head.weight
    torch.testing.assert_close(end / end.norm(), start / start.norm())  # only weight decay moved it


def test_retrain_owes_the_victim_nothing(view, isolation, victim, tmp_path, rows):
    broken = copy.deepcopy(victim)
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(float("nan"))
    elsewhere = Stages(tmp_path / "elsewhere", "scope", QuietProgress(), {}, rows)
    one = Retrain("unflagged").remove(view, victim, isolation)
    two = Retrain("unflagged").remove(replace(view, stages=elsewhere), broken, isolation)
    assert same(state(one), state(two))
    images = view.train.images.float() / 255
    with torch.no_grad():
        assert (one(images).argmax(1) == view.train.labels).double().mean() > 0.9


@pytest.mark.parametrize(
    ("kept", "split", "says"),
    [("unflagged", Isolation(~NOBODY), "every training sample is flagged"),
     ("trusted", Isolation(~NOBODY), "every training sample is flagged"),
     ("trusted", Isolation(NOBODY, NOBODY), r"trusts no sample, set defense\.removal\.rows=unflagged")],
)  # fmt: skip
def test_retrain_refuses_when_nothing_is_left(view, victim, kept, split, says):
    with pytest.raises(DataError, match=says):
        Retrain(kept).remove(view, victim, split)


def test_retrain_follows_the_victims_drop_last(logged, isolation, victim):
    view = replace(logged, train_config=replace(logged.train_config, drop_last=True))
    Retrain("unflagged").remove(view, victim, isolation)  # 106 clean rows in batches of 32
    assert [len(batch) for batch in logged.train.images.batches] == [32, 32, 32] * 3
