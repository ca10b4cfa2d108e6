"""MeCa's training on the clean samples and its relearning: who is visited, with which labels, from which weights."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from omegaconf import OmegaConf

from backdoor_bench.cache import Stages
from backdoor_bench.data.augment import Augmentation
from backdoor_bench.defenses import meca
from backdoor_bench.defenses.meca import MeCa
from backdoor_bench.detection.kl import KLIsolation
from backdoor_bench.errors import ConfigError, DataError, Diverged
from backdoor_bench.progress import QuietProgress
from backdoor_bench.training.fit import cross_entropy
from backdoor_bench.training.recipes import NO_AUGMENTATION
from backdoor_bench.types import DefenderView, ImageSet, Isolation
from tests.conftest import CONF

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Split:
    """An isolation that was made before."""

    isolation: Isolation

    def check(self, facts):
        pass

    def isolate(self, view):
        return self.isolation


FLAGGED = torch.arange(128) % 6 == 0
METHOD = MeCa(Split(Isolation(FLAGGED)), 3, 0.05, 0.9, 5e-4, 32, "cosine", True, False, 2, 0.01, "victim")
RELABEL = replace(METHOD, relabel=True)
KL = KLIsolation(
    2, 0.2, 0.5, "untrusted", "all", 8 / 255, 0.25, "replace", "input", "forward", 0.02, 1e-3, 10.0, 0.9, 5e-4, 32,
    False,
)  # fmt: skip


def no_victim():
    raise AssertionError("MeCa needs no undefended model")


@pytest.fixture
def view(blobs, new_model, recipe, stages, rows, progress):
    return DefenderView(
        train=blobs, holdout=None, num_classes=4, new_model=new_model, victim=no_victim, train_config=recipe,
        train_loss=cross_entropy(), generator=torch.Generator().manual_seed(5), stages=stages, probe=rows, device=CPU,
        progress=progress,
    )  # fmt: skip


@pytest.fixture
def fits(monkeypatch):
    """What every training was given: (stage, labels, weights at the start, visited rows)."""
    seen = []
    fit = meca.fit

    def noted(model, data, config, **options):
        visited = []
        order = options["order"]

        def noting(epoch, stream):
            batches = order(epoch, stream)
            visited.append(sorted(row for batch in batches for row in batch.tolist()))
            return batches

        seen.append((options["stage"], data.labels.clone(), state(model), visited, config))
        return fit(model, data, config, **{**options, "order": noting})

    monkeypatch.setattr(meca, "fit", noted)
    return seen


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_yaml_has_the_specs_values():
    """specs/seed_defenses.md 4.6; E_s, learning rate and batch are the victim's."""
    node = OmegaConf.load(CONF / "defense" / "meca.yaml")
    values = OmegaConf.to_container(node, resolve=False)
    assert {key: value for key, value in values.items() if not key.startswith("_")} == {
        "defaults": [{"isolation": "kl"}], "epochs": "${train.epochs}", "lr": None, "momentum": 0.9,
        "weight_decay": 5e-4, "batch_size": "${train.batch_size}", "schedule": "cosine", "augment": True,
        "relabel": False, "relearn_epochs": 10, "relearn_lr": 0.01, "on_empty": "victim",
    }  # fmt: skip
    base = OmegaConf.load(CONF / "train" / "base.yaml")
    assert (base.epochs, base.lr, base.batch_size, base.optimizer) == (100, 0.1, 128, "sgd")
    assert (base.augment.crop_padding, base.augment.flip) == (4, True)
    assert meca.SGD_LR == 0.1


@pytest.mark.parametrize(
    ("lr", "optimizer", "wanted"), [(None, "sgd", 0.07), (None, "adam", 0.1), (0.02, "sgd", 0.02), (0.02, "adam", 0.02)]
)
def test_without_a_learning_rate_of_its_own_it_takes_the_victims_where_it_is_sgds(view, recipe, lr, optimizer, wanted):
    view = replace(view, train_config=replace(recipe, lr=0.07, optimizer=optimizer))
    config = replace(METHOD, lr=lr)._training(view)
    assert (config.lr, config.optimizer) == (wanted, "sgd")


@pytest.mark.parametrize("augment", [True, False])
def test_augment_is_that_of_the_trainings(view, recipe, fits, augment):
    drawn = Augmentation(2, True, 0.0, 0)
    replace(RELABEL, augment=augment).defend(replace(view, train_config=replace(recipe, augment=drawn)))
    assert [fit[4].augment for fit in fits] == [drawn if augment else NO_AUGMENTATION] * 2


def test_a_fresh_model_is_trained_on_the_clean_rows_alone(view, blobs, fits, new_model, rows):
    result = METHOD.defend(view)
    ((stage, labels, start, visited, config),) = fits
    assert stage == "retrain"
    assert torch.equal(labels, blobs.labels)
    assert same(start, state(new_model(4)))
    assert visited == [(~FLAGGED).nonzero().flatten().tolist()] * 3
    assert (config.epochs, config.lr, config.schedule, config.optimizer) == (3, 0.05, "cosine", "sgd")
    assert result.flagged is FLAGGED
    assert result.trusted is None
    assert result.extra["vanished_classes"] == []
    assert result.extra["clean_histogram"] == torch.bincount(blobs.labels[~FLAGGED], minlength=4).tolist()
    assert result.extra["outcome"] == "trained on the clean set"
    assert not result.model.training
    assert [(row["stage"], row["epoch"]) for row in rows.rows] == [("retrain", epoch) for epoch in (1, 2, 3)]


def test_what_an_isolation_trusts_is_the_clean_set(view, fits):
    trusted = torch.arange(128) % 6 == 1
    replace(RELABEL, isolation=Split(Isolation(FLAGGED, trusted))).defend(view)
    assert fits[0][3][0] == trusted.nonzero().flatten().tolist()
    assert fits[1][3][0] == (trusted | FLAGGED).nonzero().flatten().tolist()


def test_relearning_gives_the_flagged_rows_the_predicted_labels(view, blobs, fits):
    wrong = blobs.labels.clone()
    wrong[FLAGGED] = (wrong[FLAGGED] + 1) % 4
    view = replace(view, train=ImageSet(blobs.images, wrong, 4))
    trained = METHOD.defend(view).model
    before = state(trained)
    result = RELABEL.defend(view)
    assert [fit[0] for fit in fits] == ["retrain", "relearn"]  # the training is shared
    _, labels, start, visited, config = fits[1]
    with torch.no_grad():
        predicted = trained((blobs.images.float() / 255).contiguous(memory_format=torch.channels_last)).argmax(1)
    assert torch.equal(labels[FLAGGED], predicted[FLAGGED])
    assert torch.equal(labels[~FLAGGED], wrong[~FLAGGED])
    assert torch.equal(view.train.labels, wrong)
    assert (predicted[FLAGGED] == blobs.labels[FLAGGED]).double().mean() > 0.9  # the easy blobs get their class back
    assert result.extra["relabelled"] == int((labels != wrong).sum()) > 15
    assert same(start, before)
    assert same(state(trained), before)
    assert visited == [list(range(128))] * 2
    assert (config.epochs, config.lr, config.schedule) == (2, 0.01, "cosine")
    assert not same(state(result.model), before)


def test_an_empty_clean_set_returns_the_undefended_model(view, new_model, progress, fits):
    victim = new_model(4).eval()
    method = replace(RELABEL, isolation=Split(Isolation(torch.ones(128, dtype=torch.bool))))
    result = method.defend(replace(view, victim=lambda: victim))
    assert result.model is victim
    assert fits == []
    assert result.flagged.all()
    assert result.extra["outcome"] == "clean set empty: the undefended model"
    assert result.extra["clean_histogram"] == [0, 0, 0, 0]
    assert any("no sample is left to train on" in warning for warning in progress.warnings)


def test_an_empty_clean_set_can_stop_the_run(view, fits):
    method = replace(METHOD, on_empty="stop", isolation=Split(Isolation(torch.ones(128, dtype=torch.bool))))
    with pytest.raises(DataError, match="the clean set is empty: nothing is left to train on"):
        method.defend(view)
    assert fits == []


def test_a_class_that_vanished_is_told_and_trained_without(view, blobs, progress, fits):
    result = replace(METHOD, isolation=Split(Isolation(blobs.labels == 2))).defend(view)
    assert result.extra["vanished_classes"] == [2]
    assert "no sample of class 2 is left" in progress.warnings[0]
    assert fits[0][3][0] == (blobs.labels != 2).nonzero().flatten().tolist()


def test_nothing_flagged_trains_on_all_with_a_warning(view, progress, fits):
    result = replace(RELABEL, isolation=Split(Isolation(torch.zeros(128, dtype=torch.bool)))).defend(view)
    assert fits[0][3][0] == fits[1][3][0] == list(range(128))
    assert result.extra["relabelled"] == 0
    assert "nothing is flagged" in progress.warnings[0]


def test_whole_method_with_its_own_isolation(view, rows):
    result = replace(METHOD, isolation=KL).defend(view)
    assert result.score.dtype == torch.float32
    assert torch.equal(result.flagged, result.score >= 0)
    assert len(result.extra["enhancement"]) == 2
    assert dict.fromkeys(row["stage"] for row in rows.rows) == dict.fromkeys(["enhance", "retrain"])


class Stop(Exception):
    pass


@pytest.mark.parametrize("stage", ["enhance", "retrain", "relearn"])
def test_resumes_bit_for_bit_in_every_stage(view, rows, recipe, tmp_path, stage):
    view = replace(view, train_config=replace(recipe, augment=Augmentation(2, True, 0.0, 0)))
    method = replace(RELABEL, isolation=KL)
    elsewhere = Stages(tmp_path / "elsewhere", "scope", QuietProgress(), {}, rows)
    whole = method.defend(replace(view, stages=elsewhere))

    def stopping(model=None, flagged=None, **at):
        if at["stage"] == stage and at["epoch"] == 2:
            raise Stop

    with pytest.raises(Stop):
        method.defend(replace(view, probe=stopping))
    rows.rows.clear()
    resumed = method.defend(view)
    assert next(row["epoch"] for row in rows.rows if row["stage"] == stage) == 2
    assert same(state(whole.model), state(resumed.model))
    assert torch.equal(whole.score, resumed.score)
    assert whole.extra == resumed.extra


def test_second_call_trains_nothing(view, fits):
    first = RELABEL.defend(view)
    again = RELABEL.defend(view)
    assert len(fits) == 2
    assert same(state(first.model), state(again.model))
    images = torch.rand(40, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(first.model(images), again.model(images))
    replace(RELABEL, isolation=Split(Isolation(~FLAGGED))).defend(view)
    assert len(fits) == 4
    replace(RELABEL, lr=0.01).defend(view)
    assert len(fits) == 6
    replace(RELABEL, relearn_lr=0.02).defend(view)
    assert len(fits) == 7


def test_a_loss_that_is_not_finite_stops_the_run(view):
    with pytest.raises(Diverged, match="retrain"):
        replace(METHOD, lr=999.0, schedule="constant", epochs=60).defend(view)


def test_attacks_that_own_the_loss_are_refused():
    assert not getattr(METHOD, "honours_train_loss", False)


@pytest.mark.parametrize(
    ("key", "value"),
    [("epochs", 0), ("lr", 0), ("momentum", 1), ("weight_decay", -1), ("batch_size", 0), ("schedule", "step"),
     ("augment", "yes"), ("relabel", 1), ("relearn_epochs", 2.5), ("relearn_lr", float("nan")),
     ("on_empty", "go on")],
)  # fmt: skip
def test_a_bad_value_names_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"defense\.{key}={value!r}"):
        replace(copy.copy(METHOD), **{key: value})
