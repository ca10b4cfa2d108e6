"""Pictures of methods: drawn where truth and test set allow it, and the numbers behind them."""

import contextlib
import math
import warnings
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from backdoor_bench.evaluate import Evaluator, Truth
from backdoor_bench.reporting import method_figures
from backdoor_bench.reporting.method_figures import draw, landscape, principal_components
from backdoor_bench.training.hardware import Hardware
from backdoor_bench.types import (
    FeatureScatter,
    ImageRows,
    ImageSet,
    Isolation,
    LossLandscape,
    Reconstructions,
    SampleMap,
    ScoreHistogram,
    SplitGrid,
    StoredCase,
    TestCase,
)

HARDWARE = Hardware("cpu", "fp32", True, False, 1, False, 4.0)
NAMES = ["$x^{$", "_hidden", "<script>", "a very long name " * 9]
POISONED = torch.arange(60) % 6 == 0
COVER = torch.arange(60) % 6 == 1


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def image_set(count=60):
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return ImageSet(images, torch.arange(count) % 4, 4)


def bright(images, index=None):
    return images.clamp(min=200)


def case(source=None, target=0):
    return TestCase(
        "t", bright, lambda labels, index=None: torch.full_like(labels, target),
        lambda labels: labels != target if source is None else labels == source, target_class=target,
    )  # fmt: skip


KNOWN, CASES, TEST = Truth(POISONED, COVER), (case(),), image_set()


def evaluator(truth=KNOWN, tests=CASES, test=TEST):
    return Evaluator(test, tests, truth, 4, HARDWARE)


def pixels(path):
    assert list(path.parent.iterdir()) == [path]
    return np.asarray(Image.open(path).convert("RGB"))


def has_colour(picture, colour):
    return bool((picture == np.array(colour, dtype=np.uint8)).all(axis=-1).any())


def split():
    return Isolation(POISONED | COVER)


SCORES = torch.linspace(0, 1, 60)
FIGURES = {
    "histogram": ScoreHistogram("n", "scores $x^{$", SCORES, "score"),
    "rows": ImageRows("n", "rows", {"one": torch.rand(3, 3, 8, 8), "$two": torch.rand(3, 3, 8, 8)}),
    "grid": SplitGrid("n", "grid", ("_a", "$b"), {("_a", "$b"): split(), ("$b", "$b"): split()}, ("first", "second")),
    "scatter": FeatureScatter("n", "features", lambda images: images.mean((2, 3))),
    "map": SampleMap(
        "n", "map $x^{$", torch.arange(9, 60, 5), {"_a": torch.rand(11, 2), "after $b": torch.rand(11, 2)}
    ),
    "reconstructions": Reconstructions("n", "made", lambda images: 1 - images),
    "landscape": LossLandscape("n", "loss", nn.Sequential(nn.Flatten(), nn.Linear(192, 4))),
}
UNKNOWN = Truth(None, None)


@pytest.mark.parametrize(
    ("name", "given", "drawn"),
    [
        *((name, evaluator(), True) for name in FIGURES),
        ("histogram", evaluator(UNKNOWN), True),
        ("rows", evaluator(UNKNOWN, (), None), True),
        ("grid", evaluator(UNKNOWN), False),
        ("landscape", evaluator(UNKNOWN), False),
        ("landscape", evaluator(Truth(torch.zeros(60, dtype=torch.bool), None)), False),
        ("landscape", evaluator(Truth(torch.ones(60, dtype=torch.bool), None)), True),
        ("scatter", evaluator(tests=()), False),
        ("scatter", evaluator(test=None), False),
        ("scatter", evaluator(tests=(StoredCase("s", image_set(20)),)), True),
        ("scatter", evaluator(UNKNOWN), True),
        ("reconstructions", evaluator(tests=()), True),
        ("reconstructions", evaluator(test=None), False),
        ("reconstructions", evaluator(test=None, tests=(StoredCase("s", image_set(20)),)), True),
        ("reconstructions", evaluator(UNKNOWN), True),
        ("map", evaluator(UNKNOWN, (), None), True),
    ],
)
def test_drawn_where_what_it_needs_is_known(name, given, drawn, tmp_path):
    path = tmp_path / "figures" / "f.png"
    found = draw(FIGURES[name], path, given, image_set(), NAMES)
    assert found == (path if drawn else None)
    assert path.exists() == drawn
    if drawn:
        assert pixels(path).std() > 0


# ------------------------------------------------------------------ scores


@pytest.mark.parametrize(
    "scores",
    [torch.zeros(60), torch.full((60,), float("nan")), SCORES.clone().index_fill_(0, torch.tensor([3]), float("inf"))],
    ids=["equal", "nan", "inf"],
)
def test_odd_scores_are_drawn(scores, tmp_path):
    draw(ScoreHistogram("n", "t", scores, "score"), tmp_path / "f.png", evaluator(), image_set(), NAMES)
    assert pixels(tmp_path / "f.png").std() > 0


def test_the_axis_leaves_out_a_tail_that_takes_most_of_it_and_says_so():
    scores = np.concatenate([np.linspace(0, 1, 999), [50.0]])
    low, high = method_figures._range(scores)
    assert low == 0
    assert 0.9 < high < 2
    notes = method_figures._left_out(np.append(scores, np.nan), low, high)
    assert notes == [f"{(scores > high).sum()} above in the last bin, 1 not finite"]
    assert method_figures._range(np.linspace(-3, 7, 50)) == (-3, 7)
    assert method_figures._left_out(np.linspace(-3, 7, 50), -3, 7) == []
    assert method_figures._range(np.full(4, 2.0)) == (1.5, 2.5)


def test_groups_are_disjoint_and_empty_ones_are_left_out():
    found = {name: mask for name, _, mask in method_figures._groups(evaluator(), 60)}
    assert (sum(mask.astype(int) for mask in found.values()) == 1).all()
    assert found["poisoned"].sum() == found["cover"].sum() == 10
    none = torch.zeros(60, dtype=torch.bool)
    assert [name for name, _, _ in method_figures._groups(evaluator(Truth(none, none)), 60)] == ["clean"]
    assert [name for name, _, _ in method_figures._groups(evaluator(UNKNOWN), 60)] == ["training samples"]


# ------------------------------------------------------------------ images and splits


def test_images_are_shown_as_they_are(tmp_path):
    rows = {"one": torch.zeros(12, 3, 4, 4), "two": torch.zeros(12, 3, 4, 4)}
    rows["one"][0, 1] = 150 / 255
    rows["two"][3, 2] = 250 / 255
    rows["two"][11, 0] = 130 / 255  # the eleventh is not shown
    draw(ImageRows("n", "t", rows), tmp_path / "f.png", evaluator(), image_set(), NAMES)
    picture = pixels(tmp_path / "f.png")
    assert has_colour(picture, (0, 150, 0))
    assert has_colour(picture, (0, 0, 250))
    assert not has_colour(picture, (130, 0, 0))
    draw(ImageRows("n", "t", {}), tmp_path / "f.png", evaluator(), image_set(), NAMES)


@pytest.mark.parametrize("kind", ["case", "stored", "none"])
def test_reconstructions_stand_below_the_images_they_are_made_of(tmp_path, monkeypatch, kind):
    test, stored = image_set(), image_set(20)
    cases = {"case": (case(2, 1),), "stored": (StoredCase("s", stored),), "none": ()}[kind]
    shown = []
    monkeypatch.setattr(method_figures, "_image_rows", lambda figure, path: shown.append(figure))
    given = evaluator(tests=cases)
    draw(Reconstructions("n", "t", lambda images: 1 - images), tmp_path / "f.png", given, image_set(), NAMES)
    rows = shown[0].rows
    assert list(rows) == ["clean", "clean, decoded", "triggered", "triggered, decoded"][: 2 if kind == "none" else 4]
    picked = torch.arange(2, 60, 4)[[0, 1, 3, 4, 6, 7, 9, 10, 12, 14]] if kind == "case" else None
    places = torch.tensor([0, 6, 13, 19, 26, 32, 39, 45, 52, 59]) if picked is None else picked
    assert torch.equal(rows["clean"], test.images[places].float() / 255)
    if kind == "case":
        assert torch.equal(rows["triggered"], bright(test.images[places]).float() / 255)
    if kind == "stored":
        assert torch.equal(rows["triggered"], stored.images[[0, 2, 4, 6, 8, 10, 12, 14, 16, 19]].float() / 255)
    for name in list(rows)[::2]:
        assert torch.equal(rows[f"{name}, decoded"], 1 - rows[name])


def test_the_grid_shows_the_evaluators_precisions(tmp_path, monkeypatch):
    drawn = []

    def canvas(*args):
        figure = method_figures_figure(*args)
        drawn.append(figure)
        return figure

    method_figures_figure = method_figures._figure
    monkeypatch.setattr(method_figures, "_figure", canvas)
    names = ("a", "b", "c")
    splits = {(a, b): Isolation(POISONED | (COVER & (a == "b"))) for a, b in product(names, names) if a != b}
    splits["a", "c"] = Isolation(torch.zeros(60, dtype=torch.bool), trusted=POISONED)
    draw(SplitGrid("n", "t", names, splits, ("one", "two")), tmp_path / "f.png", evaluator(), image_set(), NAMES)
    texts = [[text.get_text() for text in axis.texts] for axis in drawn[0].axes[:2]]
    assert texts[0] == ["–", "100", "0", "100", "–", "100", "100", "100", "–"]
    assert texts[1] == ["–", "100", "–", "50", "–", "50", "100", "100", "–"]
    assert [axis.get_title() for axis in drawn[0].axes[:2]] == ["clean precision (%)", "poison precision (%)"]


# ------------------------------------------------------------------ features


def test_principal_components_are_those_of_the_covariance():
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 1.0, 3.0, 0.1, 0.2])
    points, shares = principal_components(features)
    centred = features.numpy() - features.numpy().mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    wanted = centred @ vectors[:, [-1, -2]]
    np.testing.assert_allclose(np.abs(points), np.abs(wanted), atol=1e-4)
    np.testing.assert_allclose(shares, values[[-1, -2]] / values.sum(), rtol=1e-5)
    points, shares = principal_components(torch.ones(4, 1))
    assert (points == 0).all()
    assert shares == (0, 0)


@pytest.mark.parametrize(("source", "target", "true"), [(None, 0, 1), (None, 2, 0), (3, 1, 3)])
def test_the_triggered_images_are_those_of_one_class(source, target, true):
    test = image_set()
    (stamped,) = evaluator(tests=(case(source, target),)).stamped()
    found = method_figures._one_class(stamped, test.labels)
    assert (found.source, found.target) == (true, target)
    assert torch.equal(found.images, bright(test.images[test.labels == true]))


def test_a_stored_set_has_no_known_classes_but_a_target():
    stored = StoredCase("s", ImageSet(image_set(20).images, torch.full((20,), 3), 4))
    (stamped,) = evaluator(tests=(stored,)).stamped()
    found = method_figures._one_class(stamped, image_set().labels)
    assert (found.source, found.target, len(found.images)) == (None, 3, 20)


def test_a_sample_map_shows_the_truth_of_its_rows_on_common_axes(tmp_path, monkeypatch):
    drawn, canvas = [], method_figures._figure
    monkeypatch.setattr(method_figures, "_figure", lambda *args: drawn.append(canvas(*args)) or drawn[0])
    rows = torch.tensor([0, 1, 2, 3, 12, 59])  # 0 and 12 are poisoned, 1 is cover
    points = torch.tensor([[0.0, 0], [1, 0], [2, 0], [3, 0], [4, 0], [5, 0]])
    panels = {"one": points, "two": points + torch.tensor([[0.0, 7.0]])}
    draw(SampleMap("n", "t", rows, panels), tmp_path / "f.png", evaluator(), image_set(), NAMES)
    one, two = drawn[0].axes
    assert (one.get_xlim(), one.get_ylim()) == (two.get_xlim(), two.get_ylim())
    assert one.get_ylim()[0] < 0
    assert one.get_ylim()[1] > 7
    assert [axis.get_title() for axis in (one, two)] == ["one", "two"]
    black = [dots for dots in two.collections if dots.get_facecolors()[0].tolist() == [0, 0, 0, 1]]
    assert black[0].get_offsets().tolist() == [[0, 7], [4, 7]]
    assert sum(len(dots.get_offsets()) for dots in one.collections) == 6
    assert one.get_legend().get_texts()[-1].get_text() == "poisoned (2)"


# ------------------------------------------------------------------ loss


def test_the_landscape_is_the_loss_at_every_point():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    model[0].eval()
    image, label = torch.rand(1, 3, 4, 4), torch.tensor([2])
    found = landscape(model, image, label, contextlib.nullcontext)
    assert [module.training for module in model] == [False, True, True, True, True]
    model.eval()
    point = image.clone().requires_grad_()
    F.cross_entropy(model(point), label).backward()
    u = point.grad / point.grad.norm()
    random = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))[1:]
    v = random - (random * u).sum() * u
    v = v / v.norm()
    assert abs((u * v).sum()) < 1e-6
    reach = 16 / 255 * math.sqrt(48)
    assert found.shape == (25, 25)
    with torch.no_grad():
        for row, column in ((0, 0), (12, 12), (24, 3), (5, 24)):
            a, b = (column / 12 - 1) * reach, (row / 12 - 1) * reach
            wanted = F.cross_entropy(model(image + a * u + b * v), label).item()
            assert found[row, column] == pytest.approx(wanted, rel=1e-4)
    assert found[12, 24] > found[12, 12] > found[12, 0]  # uphill along the gradient


def test_a_flat_loss_has_a_landscape():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    found = landscape(model, torch.rand(1, 3, 4, 4), torch.tensor([0]), contextlib.nullcontext)
    np.testing.assert_allclose(found, math.log(3), rtol=1e-5)
