"""What run.py hands around: a holdout that is clean, fixed and apart; truth that belongs to its rows."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from backdoor_bench import assemble, launch
from backdoor_bench.data.checks import holdout_count
from backdoor_bench.errors import ConfigError
from backdoor_bench.types import Dataset, DefenseResult, ImageSet, PoisonedSet
from tests.conftest import CONF, TOY


@pytest.fixture
def plan_of(tmp_path):
    """``plan_of("seed=1", ...)`` is the plan that this command line would run."""

    def make(*overrides):
        plans = []

        def task(plan):
            plans.append(plan)
            return Path("done")

        code = launch.main(task, CONF, [*TOY, f"output_root={tmp_path}/outputs", "defense=no_defense", *overrides])
        assert code == 0
        return plans[0]

    return make


def stub(dataset, size, source="reserved"):
    """As much of a plan as ``load`` and ``with_holdout`` look at."""
    return SimpleNamespace(
        dataset=SimpleNamespace(load=lambda progress=None: dataset),
        config={"holdout": {"size": size, "source": source}},
    )


def row_numbers(part, whole):
    """Which row of ``whole`` each image of ``part`` is (the noise makes every image unlike the others)."""
    matches = (part[:, None] == whole[None]).flatten(2).all(2)
    assert (matches.sum(1) == 1).all()
    return matches.int().argmax(1).tolist()


@pytest.fixture
def dataset(blobs):
    """128 files of which rows 0..31 are poisoned and 32..47 cover."""
    number = torch.arange(128)
    return Dataset(
        train=blobs, test=None, class_names=("a", "b", "c", "d"), file_names=tuple(f"{row}.png" for row in range(128)),
        known_poison=number < 32, known_cover=(number >= 32) & (number < 48), true_labels=(blobs.labels + 1) % 4,
        untrusted=True,
    )  # fmt: skip


@pytest.fixture
def unknown(dataset):
    """The same files when nobody knows which are poisoned."""
    return replace(dataset, known_poison=None, known_cover=None, true_labels=None)


# ------------------------------------------------------------------ the holdout


def test_no_holdout_leaves_the_data_alone(dataset, progress):
    loaded, holdout = assemble.load(stub(dataset, 0), progress)
    assert loaded is dataset
    assert holdout is None


@pytest.mark.parametrize("source", ["reserved", "seen"])
def test_holdout_is_apart_and_stratified(unknown, progress, source):
    rest, holdout = assemble.load(stub(unknown, 32, source), progress)
    kept = row_numbers(rest.train.images, unknown.train.images)
    held = row_numbers(holdout.images, unknown.train.images)
    assert sorted(kept + held) == list(range(128))
    assert (len(kept), len(held)) == (96, 32)
    assert holdout.labels.bincount().tolist() == [8, 8, 8, 8]
    assert rest.train.labels.bincount().tolist() == [24, 24, 24, 24]
    assert torch.equal(holdout.labels, unknown.train.labels[held])
    assert torch.equal(rest.train.labels, unknown.train.labels[kept])
    # Names: of the rows the defence will see, the held ones at the end where they come back.
    shown = kept + held if source == "seen" else kept
    assert rest.file_names == tuple(f"{row}.png" for row in shown)


def test_what_is_known_follows_its_rows(dataset, progress):
    rest, _ = assemble.load(stub(dataset, 32), progress)
    kept = torch.tensor(row_numbers(rest.train.images, dataset.train.images))
    assert torch.equal(rest.known_poison, kept < 32)
    assert torch.equal(rest.known_cover, (kept >= 32) & (kept < 48))
    assert torch.equal(rest.true_labels, (rest.train.labels + 1) % 4)


@pytest.mark.parametrize("source", ["reserved", "seen"])
def test_the_holdout_of_a_folder_has_no_row_known_to_be_poisoned(dataset, progress, source):
    _, holdout = assemble.load(stub(dataset, 32, source), progress)
    held = torch.tensor(row_numbers(holdout.images, dataset.train.images))
    assert (held >= 48).all()


@pytest.mark.parametrize("size", [128, 1000])
def test_a_holdout_as_large_as_the_data_is_refused(dataset, progress, size):
    with pytest.raises(ConfigError, match=rf"holdout\.size={size} is not allowed: .* 0\.\.127"):
        assemble.load(stub(dataset, size), progress)


def test_a_holdout_may_be_a_share(dataset, progress):
    assert len(assemble.load(stub(dataset, 0.25), progress)[1]) == len(dataset.train) // 4
    with pytest.raises(ConfigError, match=r"holdout\.size=0\.001 of 128 training images is none"):
        assemble.load(stub(dataset, 0.001), progress)
    # Of the papers: rounded down, and without the error of a binary fraction.
    assert [holdout_count(0.05, n) for n in (50_000, 39_209)] == [2_500, 1_960]
    assert (holdout_count(0.1, 15_600), holdout_count(0.29, 100), holdout_count(40, 100)) == (1_560, 29, 40)
    assert (holdout_count(0, None), holdout_count(0.05, None), holdout_count(7, None)) == (0, 1, 7)


@pytest.mark.parametrize("size", ["1.5", "-0.1", "nan", "many"])
def test_a_holdout_is_a_number_or_a_share(capsys, size):
    assert launch.main(lambda plan: Path("done"), CONF, [*TOY, "defense=no_defense", f"holdout.size={size}"]) == 2
    assert "it must be a number of images, or a share of them between 0 and 1" in capsys.readouterr().err


def test_the_holdout_is_the_same_for_a_whole_table(plan_of, progress):
    one = plan_of("holdout.size=40", "seed=1", "attack=badnets")
    two = plan_of("holdout.size=40", "seed=2", "attack=none", "holdout.source=seen")
    (_, first), (_, second) = assemble.load(one, progress), assemble.load(two, progress)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert first.labels.bincount().tolist() == [10, 10, 10, 10]


@pytest.mark.parametrize("source", ["reserved", "seen"])
def test_no_row_of_the_holdout_is_poisoned(plan_of, progress, source):
    """BadNets on half of all eligible rows: whatever it stamps, the holdout is as it was."""
    plan = plan_of("holdout.size=40", f"holdout.source={source}", "attack=badnets", "attack.poison_rate=0.5")
    clean = plan.dataset.load().train
    dataset, holdout = assemble.load(plan, progress)
    run = assemble.prepare_run(plan, dataset, progress, {})
    attacked = plan.attack.poison(assemble.attacker_view(run, dataset))
    assert len(attacked.train) == 472
    poisoned = assemble.with_holdout(plan, attacked, holdout)
    assert int(poisoned.is_poisoned.sum()) == int(attacked.is_poisoned.sum()) == 472 * 3 // 4 // 2
    row_numbers(holdout.images, clean.images)  # every one is an untouched image of the set
    if source == "reserved":
        assert poisoned is attacked
        return
    assert len(poisoned.train) == 512
    assert torch.equal(poisoned.train.images[472:], holdout.images)
    assert torch.equal(poisoned.train.labels[472:], holdout.labels)
    assert torch.equal(poisoned.true_labels[472:], holdout.labels)
    assert not poisoned.is_poisoned[472:].any()
    assert not poisoned.is_cover[472:].any()
    assert (poisoned.trigger_id[472:] == -1).all()
    for name in ("is_poisoned", "is_cover", "true_labels", "trigger_id"):
        assert torch.equal(getattr(poisoned, name)[:472], getattr(attacked, name)), name
        assert getattr(poisoned, name).dtype == getattr(attacked, name).dtype
    assert torch.equal(poisoned.train.images[:472], attacked.train.images)
    assert torch.equal(poisoned.train.images[poisoned.example_index], attacked.train.images[attacked.example_index])


def test_a_seen_holdout_needs_data_in_memory(blobs):
    mapped = SimpleNamespace(shape=blobs.images.shape)
    poisoned = poisoned_set(ImageSet(mapped, blobs.labels, 4))
    with pytest.raises(ConfigError, match=r"set holdout\.source=reserved"):
        assemble.with_holdout(stub(None, 8, "seen"), poisoned, blobs)


# ------------------------------------------------------------------ the truth


def poisoned_set(train):
    count = len(train)
    none = torch.zeros(count, dtype=torch.bool)
    return PoisonedSet(
        train=train, is_poisoned=torch.arange(count) % 2 == 0, is_cover=none, true_labels=train.labels,
        trigger_id=torch.full((count,), -1), tests=(), example_index=torch.empty(0, dtype=torch.int64),
        originals=torch.empty(0, 3, 16, 16, dtype=torch.uint8),
    )  # fmt: skip


def test_truth_of_an_attack_is_the_attacks(dataset, blobs):
    poisoned = poisoned_set(blobs)
    for given in (dataset, replace(dataset, untrusted=False)):
        truth = assemble.truth_of(given, poisoned, poisons=True)
        assert truth.is_poisoned is poisoned.is_poisoned
        assert truth.is_cover is poisoned.is_cover


def test_truth_of_a_clean_bundled_set_is_that_nothing_is_poisoned(dataset, blobs):
    """File names do not make a set untrusted: those of the image folders we know have them too."""
    bundled = replace(dataset, untrusted=False, known_poison=None)
    poisoned = poisoned_set(blobs)
    assert assemble.truth_of(bundled, poisoned, poisons=False).is_poisoned is poisoned.is_poisoned


def test_truth_of_an_untrusted_folder_is_unknown(unknown, blobs):
    truth = assemble.truth_of(unknown, poisoned_set(blobs), poisons=False)
    assert truth.is_poisoned is None
    assert truth.is_cover is None


def test_truth_of_a_folder_is_what_its_owner_says(dataset, blobs):
    truth = assemble.truth_of(dataset, poisoned_set(blobs), poisons=False)
    assert torch.equal(truth.is_poisoned, dataset.known_poison)
    assert torch.equal(truth.is_cover, dataset.known_cover)
    truth = assemble.truth_of(replace(dataset, known_cover=None), poisoned_set(blobs), poisons=False)
    assert not truth.is_cover.any()
    assert len(truth.is_cover) == 128


def test_truth_reaches_over_a_holdout_that_is_seen_again(unknown, blobs, progress):
    known = replace(unknown, known_poison=torch.zeros(128, dtype=torch.bool))
    plan = stub(known, 32, "seen")
    rest, holdout = assemble.load(plan, progress)
    rest = replace(rest, known_poison=torch.arange(96) == 5)
    whole = assemble.with_holdout(plan, poisoned_set(rest.train), holdout)
    truth = assemble.truth_of(rest, whole, poisons=False)
    assert truth.is_poisoned.nonzero().flatten().tolist() == [5]
    assert len(truth.is_poisoned) == len(truth.is_cover) == 128


# ------------------------------------------------------------------ models and views


def test_models_of_a_run_start_alike_and_disturb_nobody(plan_of, progress):
    plan = plan_of("attack=none", "seed=3")
    dataset, _ = assemble.load(plan, progress)
    run = assemble.prepare_run(plan, dataset, progress, {})
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    one = run.new_model(4)
    assert torch.equal(torch.rand(3), expected)
    two = run.new_model(4)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert run.new_model(5).num_classes == 5
    other = assemble.prepare_run(plan_of("attack=none", "seed=4"), dataset, progress, {}).new_model(4)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert torch.equal(one.normalise.mean.flatten(), torch.tensor(plan.dataset.mean))


def test_a_batch_larger_than_the_data_is_only_warned_of(plan_of, progress):
    plan = plan_of("attack=none", "train.batch_size=1000")
    assemble.prepare_run(plan, plan.dataset.load(), progress, {})
    assert progress.warnings == ["train.batch_size=1000 exceeds the 512 training images: one batch an epoch"]


def test_attack_seed_alone_decides_the_attackers_stream(plan_of, progress):
    drawn = []
    for overrides in (("seed=1", "attack.seed=7"), ("seed=2", "attack.seed=7"), ("seed=1", "attack.seed=8")):
        plan = plan_of("attack=badnets", *overrides)
        dataset, _ = assemble.load(plan, progress)
        view = assemble.attacker_view(assemble.prepare_run(plan, dataset, progress, {}), dataset)
        drawn.append(torch.randperm(100, generator=view.generator).tolist())
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_the_attackers_own_models_follow_the_attacks_seed(plan_of, progress):
    heads = []
    for overrides in (("seed=1", "attack.seed=7"), ("seed=2", "attack.seed=7"), ("seed=1", "attack.seed=8")):
        plan = plan_of("attack=badnets", *overrides)
        dataset, _ = assemble.load(plan, progress)
        view = assemble.attacker_view(assemble.prepare_run(plan, dataset, progress, {}), dataset)
        heads.append(view.new_model(4).head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_other_data_are_another_run(plan_of, progress):
    """One pixel or one label changes every cache key."""
    plan = plan_of("attack=none")
    dataset = plan.dataset.load()

    def hash_of(train):
        return assemble.prepare_run(plan, replace(dataset, train=train), progress, {}).data_hash

    train = dataset.train
    pixels, labels = train.images.clone(), train.labels.clone()
    pixels[511, 2, 15, 15] ^= 1
    labels[511] = (labels[511] + 1) % 4
    hashes = [hash_of(train), hash_of(replace(train, images=pixels)), hash_of(replace(train, labels=labels))]
    assert len(set(hashes)) == 3
    assert hash_of(ImageSet(train.images.clone(), train.labels.clone(), 4)) == hashes[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"flagged": torch.zeros(4, dtype=torch.int64)},
        {"flagged": torch.zeros(5, dtype=torch.bool)},
        {"trusted": torch.zeros(4)},
        {"score": torch.zeros(4, dtype=torch.float64)},
        {"score": torch.zeros(4, 1)},
    ],
)
def test_a_result_that_does_not_fit_the_set_is_a_bug(fields):
    with pytest.raises(AssertionError, match=f"DefenseResult.{next(iter(fields))} must be"):
        assemble.checked(DefenseResult(torch.nn.Identity(), **fields), 4)


def test_a_result_that_fits_passes():
    mask = torch.zeros(4, dtype=torch.bool)
    for result in (DefenseResult(torch.nn.Identity()), DefenseResult(torch.nn.Identity(), mask, mask, torch.zeros(4))):
        assert assemble.checked(result, 4) is result
