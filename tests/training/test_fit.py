"""The loop does what its recipe says, freezes what it must, resumes bit for bit."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from backdoor_bench.errors import Diverged
from backdoor_bench.storage import Checkpoints
from backdoor_bench.training.config import TrainConfig
from backdoor_bench.training.fit import epochs_for_steps, fit, shuffled


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def test_one_sgd_step_equals_the_formula(recipe, progress):
    """One linear layer, one batch of everything, one epoch: w - lr * (grad + wd * w)."""
    from backdoor_bench.types import ImageSet

    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 2, 2), dtype=torch.uint8)
    data = ImageSet(images, torch.tensor([0, 1, 0, 1, 1, 0]), 2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False))
    weight = model[1].weight.detach().clone().requires_grad_()
    loss = nn.functional.cross_entropy(images.float().div(255).flatten(1) @ weight.T, data.labels)
    loss.backward()
    expected = weight - 0.05 * (weight.grad + 5e-4 * weight)
    fit(model, data, replace(recipe, epochs=1, batch_size=6), generator=stream(), stage="t", progress=progress)
    assert torch.allclose(model[1].weight, expected, atol=1e-6)


def test_it_learns_and_leaves_eval_mode(recipe, blobs, new_model, progress):
    model = new_model(4)
    losses = []
    fit(
        model, blobs, recipe, generator=stream(), stage="t", progress=progress,
        on_epoch_end=lambda epoch, m, loss: losses.append((epoch, loss)),
    )  # fmt: skip
    assert [epoch for epoch, _ in losses] == [1, 2, 3]
    assert losses[-1][1] < 0.6 * losses[0][1]
    assert not model.training


def test_only_the_trainable_part_moves_buffers_included(recipe, blobs, new_model, progress):
    model = new_model(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, blobs, recipe, generator=stream(), stage="t", progress=progress, trainable=model.head)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("head.")), name
    assert all(parameter.requires_grad for parameter in model.parameters())


class Stop(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resume_is_bit_identical(recipe, blobs, new_model, progress, tmp_path, optimizer):
    from backdoor_bench.data.augment import Augmentation

    recipe = replace(recipe, optimizer=optimizer, augment=Augmentation(2, True, 5.0, 4), epochs=4)
    whole = new_model(4)
    fit(whole, blobs, recipe, generator=stream(), stage="t", progress=progress)

    def stop(epoch, model, loss):
        if epoch == 3:
            raise Stop

    broken = new_model(4)
    with pytest.raises(Stop):
        fit(
            broken, blobs, recipe, generator=stream(), stage="t", progress=progress, on_epoch_end=stop,
            checkpoints=Checkpoints(tmp_path, "k"),
        )  # fmt: skip
    resumed, epochs = new_model(4), []
    fit(
        resumed, blobs, recipe, generator=stream(99), stage="t", progress=progress,
        checkpoints=Checkpoints(tmp_path, "k"), on_epoch_end=lambda epoch, m, loss: epochs.append(epoch),
    )  # fmt: skip
    assert epochs == [3, 4]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_stop_after_is_a_prefix_of_the_whole_training(recipe, blobs, new_model, progress):
    states = {}
    fit(
        new_model(4), blobs, recipe, generator=stream(), stage="t", progress=progress,
        on_epoch_end=lambda epoch, m, loss: states.update({epoch: m.head.weight.clone()}),
    )  # fmt: skip
    part = new_model(4)
    fit(part, blobs, recipe, generator=stream(), stage="t", progress=progress, stop_after=2)
    assert torch.equal(part.head.weight, states[2])


def test_nan_names_epoch_step_and_rows_and_keeps_the_last_checkpoint(recipe, blobs, new_model, progress, tmp_path):
    def loss_fn(model, batch):
        loss = model(batch.images).mean()
        return loss * float("nan") if batch.epoch == 1 and 5 in batch.index else loss

    with pytest.raises(Diverged, match=r"epoch 2, step 1 of 4 \(training rows 0, 1, 2, 3, 4, 5"):
        fit(
            new_model(4), blobs, recipe, generator=stream(), stage="t", progress=progress, loss_fn=loss_fn,
            order=lambda epoch, generator: list(torch.arange(128).split(32)), checkpoints=Checkpoints(tmp_path, "k"),
        )  # fmt: skip
    assert Checkpoints(tmp_path, "k").load(print).meta["epoch"] == 1


def test_shuffled_covers_the_rows_once():
    order = shuffled(torch.tensor([3, 5, 7, 9, 11]), 2)
    batches = order(0, stream())
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert sorted(torch.cat(batches).tolist()) == [3, 5, 7, 9, 11]
    assert [len(batch) for batch in shuffled(torch.arange(5), 2, drop_last=True)(0, stream())] == [2, 2]


def test_schedules(recipe):
    cosine = replace(recipe, epochs=10, lr=1.0)
    assert cosine.lr_at(0, 0, 4) == 1
    assert cosine.lr_at(5, 0, 4) == pytest.approx(0.5)
    assert replace(cosine, schedule_unit="epoch").lr_at(5, 3, 4) == pytest.approx(0.5)
    assert cosine.lr_at(9, 3, 4) < 0.01
    steps = replace(cosine, schedule="multistep", milestones=(4, 8))
    assert [steps.lr_at(epoch, 0, 1) for epoch in (3, 4, 8)] == pytest.approx([1, 0.1, 0.01])
    warm = replace(cosine, schedule="constant", warmup_epochs=2.0)
    assert [warm.lr_at(epoch, 0, 1) for epoch in (0, 1, 2)] == pytest.approx([0, 0.5, 1])
    assert replace(warm, warmup_from=0.2).lr_at(1, 1, 2) == pytest.approx(0.2 + 0.8 * 1.5 / 2)
    low = replace(cosine, lr_min=0.2, schedule_unit="epoch_from_1")
    assert [low.lr_at(epoch, 1, 4) for epoch in (4, 9)] == pytest.approx([0.6, 0.2])
    assert replace(low, warmup_epochs=5.0).lr_at(2, 1, 2) == pytest.approx(0.6 / 2)  # half-way to the cosine at its end


def test_steps(recipe):
    assert recipe.steps_per_epoch(129) == 5
    assert replace(recipe, drop_last=True).steps_per_epoch(129) == 4
    assert epochs_for_steps(1500, 391) == 4
    assert epochs_for_steps(0, 391) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("epochs", 0), ("batch_size", 0), ("lr", float("nan")), ("lr", "fast"), ("momentum", 1.0), ("schedule", "cos")],
)
def test_bad_recipe_names_the_key(recipe, key, value):
    with pytest.raises(ValueError, match=rf"train\.{key}="):
        replace(recipe, **{key: value})


def test_recipe_key_ignores_how_often_it_saves(recipe):
    assert recipe.key() == replace(recipe, snapshots=9, checkpoint_seconds=3.0).key()
    assert recipe.key() != replace(recipe, lr=0.1).key()
    assert isinstance(recipe, TrainConfig)


def test_a_second_part_has_its_own_optimiser_and_resumes(blobs, new_model, recipe, progress, tmp_path):
    from backdoor_bench.storage import Checkpoints

    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = new_model(4)
            self.shift = torch.nn.Linear(1, 1)

        def forward(self, images):
            return self.classifier(images) * self.shift(images.new_ones(len(images), 1))

    slow = replace(recipe, optimizer="adam", betas=(0.5, 0.9), lr=0.01, schedule="multistep", milestones=(2,))
    still = replace(slow, lr=1e-9)

    def train(checkpoints=None, second=slow, **options):
        pair = Pair()
        with torch.no_grad():
            pair.shift.weight.fill_(1.0)
            pair.shift.bias.fill_(0.5)
        fit(pair, blobs, recipe, generator=torch.Generator().manual_seed(0), stage="pair", progress=progress,
            trainable=pair.classifier, also=[(pair.shift, second)], checkpoints=checkpoints, **options)  # fmt: skip
        return pair

    whole = train()
    # Adam moves by about its learning rate a step: 4 steps an epoch at 0.01, 0.01 and 0.001.
    assert 0.02 < abs(whole.shift.bias.item() - 0.5) < 0.09
    assert train(second=still).shift.bias.item() == pytest.approx(0.5, abs=1e-6)
    assert not torch.equal(whole.classifier.head.weight, new_model(4).head.weight)
    checkpoints = Checkpoints(tmp_path / "pair", "key")

    def stop(epoch, model, loss):
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(checkpoints, on_epoch_end=stop)
    resumed = train(Checkpoints(tmp_path / "pair", "key"))
    assert any("resuming" in said for said in progress.said)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_data_bring_their_own_transform(blobs, new_model, recipe, progress):
    seen = []

    def double(images, generator):
        assert isinstance(generator, torch.Generator)
        return images / 2

    def loss_fn(model, batch):
        seen.append((batch.images, batch.pixels))
        return torch.nn.functional.cross_entropy(model(batch.images), batch.labels)

    fit(new_model(4), replace(blobs, augment=double), recipe, generator=torch.Generator(), stage="x",
        progress=progress, loss_fn=loss_fn, stop_after=1)  # fmt: skip
    assert all(torch.equal(images, pixels / 2) for images, pixels in seen)


def test_other_images_get_the_crops_and_flips_of_their_places(blobs, new_model, recipe, progress):
    from backdoor_bench.data.augment import Augmentation

    def loss_fn(model, batch):
        places = torch.tensor([3, 0, 5])
        assert torch.equal(batch.augmented(batch.pixels[places], places), batch.images[places])
        assert not torch.equal(batch.pixels, batch.images)
        return torch.nn.functional.cross_entropy(model(batch.images), batch.labels)

    recipe = replace(recipe, augment=Augmentation(2, True, 5.0, 4))
    fit(new_model(4), blobs, recipe, generator=torch.Generator(), stage="x", progress=progress, loss_fn=loss_fn,
        stop_after=1)  # fmt: skip


def test_a_warm_up_of_part_of_an_epoch_never_exceeds_the_rate(recipe):
    config = replace(recipe, schedule="constant", schedule_unit="epoch", warmup_epochs=0.75, lr=0.4)
    assert [config.lr_at(0, step, 4) for step in range(4)] == pytest.approx([0, 0.4 / 3, 0.8 / 3, 0.4])
