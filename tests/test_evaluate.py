"""Every metric against a counted example."""

import pytest
import torch
from torch import nn

from backdoor_bench.attacks.common import all2all, all2one
from backdoor_bench.evaluate import Evaluator, Truth, detection_metrics
from backdoor_bench.types import ImageSet, StoredCase, TestCase


class FirstPixel(nn.Module):
    """Predicts the class written in the top left pixel; a model whose answers are known."""

    def forward(self, images):
        return nn.functional.one_hot((images[:, 0, 0, 0] * 255).round().long(), 5).float()


def image_set(pixels, labels, num_classes=4):
    images = torch.zeros(len(pixels), 3, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(pixels, dtype=torch.uint8)
    return ImageSet(images, torch.tensor(labels), num_classes)


def stamp(value):
    def trigger(images, index=None):
        out = images.clone()
        # Images whose second pixel is set resist the trigger.
        out[:, 0, 0, 0] = torch.where(images[:, 0, 0, 1] > 0, images[:, 0, 0, 0], value)
        return out

    return trigger


def test_model_metrics_counted_by_hand(hardware):
    # truth 0 0 1 1 2 3, predicted 0 1 1 1 2 4 (4 = dummy): 4 of 6 right
    test = image_set([0, 1, 1, 1, 2, 4], [0, 0, 1, 1, 2, 3])
    test.images[2, 0, 0, 1] = 1  # one class-1 image resists
    case = TestCase("patch", stamp(0), all2one(0), lambda labels: labels != 0, target_class=0)
    evaluator = Evaluator(test, (case,), Truth(None, None), 4, hardware)
    metrics = evaluator.model_metrics(FirstPixel())
    assert metrics["acc"] == pytest.approx(4 / 6)
    assert metrics["acc_nontarget"] == pytest.approx(3 / 4)
    assert metrics["target_class_acc"] == pytest.approx(1 / 2)
    assert metrics["acc_per_class"] == [0.5, 1.0, 1.0, 0.0]
    assert metrics["dummy_clean"] == pytest.approx(1 / 6)
    # pool: the four images of classes 1, 1, 2, 3; one resists
    assert metrics["asr"] == pytest.approx(3 / 4)
    assert metrics["asr_per_trigger"] == {"patch": 0.75}
    assert metrics["dummy_triggered"] == 0


def test_several_triggers_are_averaged_and_have_no_single_target(hardware):
    test = image_set([0, 1, 2, 3], [0, 1, 2, 3])
    one = TestCase("a", stamp(0), all2one(0), lambda labels: labels != 0, target_class=0)
    two = TestCase("b", stamp(4), all2one(1), lambda labels: labels == 1, target_class=1)
    metrics = Evaluator(test, (one, two), Truth(None, None), 4, hardware).model_metrics(FirstPixel())
    # a: 3 of 3, b: 0 of 1, which goes to the dummy class
    assert metrics["asr"] == pytest.approx(1 / 2)
    assert metrics["asr_per_trigger"] == {"a": 1.0, "b": 0.0}
    assert metrics["dummy_triggered"] == pytest.approx(1 / 2)
    assert metrics["target_class_acc"] is None
    assert metrics["acc_nontarget"] is None


def test_all2all_uses_every_image_and_its_own_label(hardware):
    test = image_set([1, 1, 3, 0], [0, 1, 2, 3])
    case = TestCase("all", lambda images, index=None: images.clone(), all2all(4), torch.ones_like)
    metrics = Evaluator(test, (case,), Truth(None, None), 4, hardware).model_metrics(FirstPixel())
    assert metrics["asr"] == pytest.approx(3 / 4)


def test_without_test_set_everything_is_none(hardware):
    metrics = Evaluator(None, (), Truth(None, None), 4, hardware).model_metrics(FirstPixel())
    assert set(metrics.values()) == {None}


def test_triggers_get_the_row_numbers_of_the_test_set(hardware):
    seen = []

    def trigger(images, index=None):
        seen.append(index)
        return images.clone()

    test = image_set([0, 1, 2], [0, 1, 2])
    case = TestCase("x", trigger, all2one(0), lambda labels: labels != 0, 0)
    Evaluator(test, (case,), Truth(None, None), 4, hardware).stamped()
    assert seen[0].tolist() == [1, 2]


def bools(text):
    return torch.tensor([letter == "1" for letter in text])


def test_detection_counted_by_hand():
    poisoned, flagged, cover = bools("11100000"), bools("11011000"), bools("00010000")
    metrics = detection_metrics(flagged, poisoned, cover)
    assert metrics["precision"] == metrics["poison_precision"] == pytest.approx(2 / 4)
    assert metrics["recall"] == pytest.approx(2 / 3)
    assert metrics["fpr"] == pytest.approx(2 / 5)
    assert metrics["f1"] == pytest.approx(2 * 2 / (4 + 3))
    assert metrics["precision_with_cover"] == pytest.approx(3 / 4)
    assert metrics["cover_flagged"] == 1.0
    assert metrics["clean_precision"] == pytest.approx(3 / 4)


def test_trusted_defines_clean_precision():
    metrics = detection_metrics(bools("1000"), bools("1100"), trusted=bools("0011"))
    assert metrics["clean_precision"] == 1


def test_null_rules():
    nothing, some = bools("0000"), bools("0110")
    assert detection_metrics(nothing, some)["precision"] is None
    assert detection_metrics(nothing, some)["recall"] == 0
    assert detection_metrics(some, nothing)["recall"] is None
    assert detection_metrics(some, nothing)["precision"] == 0
    assert set(detection_metrics(some, None).values()) == {None}
    assert detection_metrics(None, some)["recall"] is None


def test_auroc_is_the_share_of_ordered_pairs():
    score = torch.tensor([0.9, 0.4, 0.5, 0.1])  # poisoned: first two; pairs won: 2 + 1 of 4
    assert detection_metrics(None, bools("1100"), score=score)["auroc"] == pytest.approx(3 / 4)


def test_the_best_of_a_group_counts_and_what_does_not_count_is_only_listed(hardware):
    test = image_set([0, 1, 2, 3], [0, 1, 2, 3])
    everyone = torch.ones_like
    best = TestCase("class 1", stamp(1), all2one(1), lambda labels: labels != 1, target_class=1, group="small")
    worse = TestCase("class 2", stamp(1), all2one(2), lambda labels: labels != 2, target_class=2, group="small")
    other = TestCase("large", stamp(4), all2one(1), everyone)
    aside = TestCase("aside", stamp(0), all2one(0), everyone, counts=False)
    metrics = Evaluator(test, (best, worse, other, aside), Truth(None, None), 4, hardware).model_metrics(FirstPixel())
    assert metrics["asr_per_trigger"] == {"class 1": 1.0, "class 2": 0.0, "large": 0.0, "aside": 1.0}
    assert metrics["asr"] == pytest.approx((1.0 + 0.0) / 2)


def test_stored_cases_bring_their_own_images(hardware):
    stored = StoredCase("theirs", image_set([0, 0, 3], [0, 0, 0]), target_class=0)
    metrics = Evaluator(image_set([0], [0]), (stored,), Truth(None, None), 4, hardware).model_metrics(FirstPixel())
    assert metrics["asr"] == pytest.approx(2 / 3)


def test_triggers_of_a_finished_model_are_looked_for_only_then(hardware):
    def tests_of(model):
        assert isinstance(model, FirstPixel)
        return (TestCase("found", stamp(0), all2one(0), lambda labels: labels != 0, target_class=0),)

    evaluator = Evaluator(image_set([0, 1], [0, 1]), (), Truth(None, None), 4, hardware, tests_of)
    assert evaluator.model_metrics(FirstPixel())["asr"] is None
    assert evaluator.model_metrics(FirstPixel(), final=True)["asr"] == 1.0
