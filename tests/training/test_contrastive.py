"""Contrastive losses against the sums written out, and against cases done by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from backdoor_bench.training.contrastive import contrastive_loss, positive_mask
from backdoor_bench.training.precision import full_float32

T, BASE = 0.1, 0.07


def projections(count, width=6, seed=0):
    stream = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(2 * count, width, generator=stream, dtype=torch.float64), dim=1).float()


def literal(z, labels, attracts, temperature, base, asymmetric=False):
    """EBD Eqs. 9-11 view by view; views a and b belong to images a % B and b % B."""
    count = len(labels)
    z = z.double()
    total = 0.0
    for a in range(2 * count):
        image = a % count
        positives = []
        for p in range(2 * count):
            other = p % count
            if p == a:
                continue
            alike = labels[other] == labels[image] and attracts[image] and (asymmetric or attracts[other])
            if other == image or alike:
                positives.append(p)
        denominator = sum(math.exp(float(z[a] @ z[k]) / temperature) for k in range(2 * count) if k != a)
        terms = [float(z[a] @ z[p]) / temperature - math.log(denominator) for p in positives]
        total += -(temperature / base) * sum(terms) / len(terms)
    return total / (2 * count)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("case", ["mixed", "none", "all"])
def test_equals_the_double_loop(case, asymmetric):
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 0, 3])
    attracts = {
        "mixed": torch.tensor([True, True, False, True, False, True, True, False]),
        "none": torch.zeros(8, dtype=torch.bool),
        "all": torch.ones(8, dtype=torch.bool),
    }[case]
    z = projections(8)
    found = contrastive_loss(z, positive_mask(labels, attracts, asymmetric), T, BASE)
    assert float(found) == pytest.approx(literal(z, labels, attracts, T, BASE, asymmetric), rel=1e-5)


def test_strict_and_asymmetric_masks():
    """Images 0, 1 and 2 carry one label, 2 may not attract."""
    labels, attracts = torch.tensor([5, 5, 5, 1]), torch.tensor([True, True, False, True])
    strict = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    released = [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert positive_mask(labels, attracts).int().tolist() == strict
    assert positive_mask(labels, attracts, asymmetric=True).int().tolist() == released


def test_nothing_attracts_is_simclr():
    """NT-Xent as a cross-entropy whose right answer is the other view (times T / T0)."""
    z = projections(7)
    similarity = (z @ z.T / T).fill_diagonal_(-torch.inf)
    other_view = torch.arange(14).roll(7)
    mask = positive_mask(torch.zeros(7, dtype=torch.int64), torch.zeros(7, dtype=torch.bool))
    found = contrastive_loss(z, mask, T, T)
    assert torch.allclose(found, F.cross_entropy(similarity, other_view), rtol=1e-5)
    assert torch.allclose(contrastive_loss(z, mask, T, BASE), found * T / BASE)


def test_all_attract_with_distinct_labels_is_simclr_too():
    z = projections(7)
    supcon = positive_mask(torch.arange(7), torch.ones(7, dtype=torch.bool))
    assert torch.equal(supcon, torch.eye(7, dtype=torch.bool))
    assert float(contrastive_loss(z, supcon, T, BASE)) == pytest.approx(
        literal(z, torch.arange(7), torch.zeros(7, dtype=torch.bool), T, BASE), rel=1e-5
    )


def test_two_orthogonal_pairs_by_hand():
    """T = T0 = 1, similarity 1 within a pair, 0 else: -log(e / (e + 2)) for each view."""
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    loss = contrastive_loss(z, torch.eye(2, dtype=torch.bool), 1.0, 1.0)
    assert float(loss) == pytest.approx(-math.log(math.e / (math.e + 2)), rel=1e-6)


def test_the_order_of_the_batch_does_not_matter():
    labels, attracts = torch.arange(8) % 3, torch.arange(8) % 4 != 0
    z = projections(8)
    mixed = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    swapped = torch.cat([z[mixed + 8], z[mixed]])  # and first views for second ones
    one = contrastive_loss(z, positive_mask(labels, attracts), T, BASE)
    two = contrastive_loss(swapped, positive_mask(labels[mixed], attracts[mixed]), T, BASE)
    assert torch.allclose(one, two, rtol=1e-5)


def test_a_single_image_costs_nothing():
    z = projections(1).requires_grad_()
    loss = contrastive_loss(z, torch.ones(1, 1, dtype=torch.bool), T, BASE)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(z.grad).all()


def test_gradient_is_that_of_the_double_loop():
    labels, attracts = torch.tensor([0, 0, 1, 0]), torch.tensor([True, True, True, False])
    z = projections(4).requires_grad_()
    contrastive_loss(z, positive_mask(labels, attracts), T, BASE).backward()
    step = 1e-5
    for row, column in ((0, 0), (3, 2), (6, 5)):
        moved = [z.detach().double().clone(), z.detach().double().clone()]
        moved[0][row, column] += step
        moved[1][row, column] -= step
        slope = (literal(moved[0], labels, attracts, T, BASE) - literal(moved[1], labels, attracts, T, BASE)) / 2 / step
        assert float(z.grad[row, column]) == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_mixed_precision_is_left_outside():
    z, mask = projections(8), torch.eye(8, dtype=torch.bool)
    plain = contrastive_loss(z, mask, T, BASE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = contrastive_loss(z, mask, T, BASE)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, plain)


SWITCHES = (torch.backends.cuda.matmul, torch.backends.cudnn)


@pytest.fixture(params=[False, True])
def tf32(request):
    """Both switches set to this; put back afterwards."""
    before = [switch.allow_tf32 for switch in SWITCHES]
    for switch in SWITCHES:
        switch.allow_tf32 = request.param
    yield request.param
    for switch, value in zip(SWITCHES, before, strict=True):
        switch.allow_tf32 = value


class Products(TorchFunctionMode):
    """Notes at each matrix product whether TF32 is allowed."""

    def __init__(self):
        super().__init__()
        self.allowed = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if "matmul" in getattr(function, "__name__", ""):
            self.allowed.append(torch.backends.cuda.matmul.allow_tf32)
        return function(*args, **(kwargs or {}))


def test_similarities_are_computed_without_tf32(tf32):
    with Products() as products:
        contrastive_loss(projections(4), torch.eye(4, dtype=torch.bool), T, BASE)
    assert products.allowed == [False]
    assert [switch.allow_tf32 for switch in SWITCHES] == [tf32, tf32]


def test_full_float32_puts_everything_back_after_an_error_too(tf32):
    one, two = torch.rand(8, 8), torch.rand(8, 8)

    def failing():
        with full_float32("cpu"):
            assert (one @ two).dtype == torch.float32
            assert not any(switch.allow_tf32 for switch in SWITCHES)
            raise KeyError

    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(KeyError):
            failing()
        assert (one @ two).dtype == torch.bfloat16
    assert [switch.allow_tf32 for switch in SWITCHES] == [tf32, tf32]
