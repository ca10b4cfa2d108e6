"""The six transformations against torchvision's with the same parameters, and where their parameters come from."""

import math
from functools import partial

import pytest
import torch

import backdoor_bench._torchvision  # noqa: F401
from backdoor_bench.data.images import MappedImages
from backdoor_bench.detection.transforms import TRANSFORMS, Composition, Transformed
from backdoor_bench.triggers.rows import uniform_of_rows

EVERY = pytest.mark.parametrize("name", TRANSFORMS)


@pytest.fixture
def images():
    return torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reference():
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as tv

    return tv, InterpolationMode.NEAREST


def given(*columns):
    """A draw that gives these numbers, one list a column."""
    numbers = torch.tensor(columns, dtype=torch.float64).mT if columns else torch.empty(24, 0)
    return lambda count: numbers[:, :count]


def spread(count, seed=0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()


def test_rotate_is_torchvisions(images, reference):
    tv, nearest = reference
    numbers = spread(24)
    found = TRANSFORMS["rotate"](images, given(numbers))
    wrong = 0
    for image, number, turned in zip(images, numbers, found, strict=True):
        wanted = tv.rotate(image, 360 * number - 180, nearest)
        wrong += int((wanted != turned).any(0).sum())
    assert wrong <= 24 * 4  # nearest pixels of 1,024 a image where rounding decides
    straight = TRANSFORMS["rotate"](images, given([0.5] * 24))
    assert torch.equal(straight, images)
    quarter = TRANSFORMS["rotate"](images, given([0.75] * 24))
    assert torch.equal(quarter, images.rot90(1, (2, 3)))


def test_affine_is_torchvisions_with_whole_pixels(images, reference):
    tv, nearest = reference
    down, right = spread(24, 1), spread(24, 2)
    found = TRANSFORMS["affine"](images, given(down, right))
    seen = set()
    for image, y, x, moved in zip(images, down, right, found, strict=True):
        shift = [round((2 * x - 1) * 0.2 * 32), round((2 * y - 1) * 0.2 * 32)]
        seen.add(tuple(shift))
        assert torch.equal(moved, tv.affine(image, 0, shift, 1.0, [0.0], nearest))
    assert len(seen) > 15
    ends = TRANSFORMS["affine"](images[:2], given([0.0, 1 - 1e-12], [0.5, 0.5]))
    assert torch.equal(ends[0, :, :-6], images[0, :, 6:])  # 6.4 px, rounded
    assert not ends[0, :, -6:].any()
    assert torch.equal(ends[1, :, 6:], images[1, :, :-6])


def test_flip_is_always(images):
    assert torch.equal(TRANSFORMS["flip"](images, given()), images.flip(3))


def test_crop_is_torchvisions(images, reference):
    tv, _ = reference
    rows, columns = spread(24, 3), spread(24, 4)
    rows[:2], columns[:2] = [0.0, 1 - 1e-12], [1 - 1e-12, 0.0]
    found = TRANSFORMS["crop"](images, given(rows, columns))
    for image, row, column, cut in zip(images, rows, columns, found, strict=True):
        padded = tv.pad(image, [4, 4, 4, 4])
        assert torch.equal(cut, tv.crop(padded, math.floor(row * 9), math.floor(column * 9), 32, 32))


def test_blur_is_torchvisions_with_a_sigma_a_sample(images, reference):
    tv, _ = reference
    numbers = [0.0, 1.0, *spread(22, 5)]
    found = TRANSFORMS["blur"](images, given(numbers)).int()
    for image, number, smooth in zip(images, numbers, found, strict=True):
        wanted = tv.gaussian_blur(image, [15, 15], [0.1 + 1.9 * number] * 2).int()
        assert (wanted - smooth).abs().max() <= 1  # a half rounded up or down
        assert (wanted != smooth).float().mean() < 0.01
    assert torch.equal(found[0], images[0].int())


def test_erase_is_a_box_of_torchvisions_sizes_full_of_noise(images):
    count, pixels = 24, 3 * 32 * 32
    numbers = torch.rand(count, 4 + pixels, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    numbers[:2, :2] = torch.tensor([[0.0, 0.0], [1 - 1e-12, 1 - 1e-12]])
    numbers[0, 2:4], numbers[1, 2:4] = 0.0, 1 - 1e-12
    found = TRANSFORMS["erase"](images, lambda wanted: numbers[:, :wanted])
    normal = torch.distributions.Normal(torch.tensor(0.0).double(), 1.0)
    for place in range(count):
        area, ratio, top, left = numbers[place, :4].tolist()
        area = 1024 * (0.2 + 0.1 * area)
        ratio = math.exp(math.log(0.5) + ratio * (math.log(1.0) - math.log(0.5)))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        top, left = int(top * (32 - height + 1)), int(left * (32 - width + 1))
        wanted = images[place].clone()
        noise = normal.icdf(numbers[place, 4:]).view(3, 32, 32).mul(255).round().clamp(0, 255).to(torch.uint8)
        box = (slice(None), slice(top, top + height), slice(left, left + width))
        wanted[box] = noise[box]
        assert torch.equal(found[place], wanted)
        assert 0.4 < (found[place][box] == 0).float().mean() < 0.65  # the lower half is clipped
    assert (found[1, :, -1, -1] != images[1, :, -1, -1]).any()


@EVERY
def test_input_stays_and_shape_stays(images, name):
    before = images.clone()
    found = TRANSFORMS[name](images, partial(uniform_of_rows, 1, name, torch.arange(24)))
    assert torch.equal(images, before)
    assert found.shape == images.shape
    assert found.dtype == torch.uint8
    assert not torch.equal(found, images)


@EVERY
def test_a_row_has_the_same_draw_in_any_batch(images, name):
    compose = Composition((name, "affine"), 7)
    whole = compose(images, torch.arange(24))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    shuffled = torch.cat([compose(images[rows], rows) for rows in order.split(5)])
    assert torch.equal(shuffled, whole[order])
    if name != "flip":
        same = images[:1].expand(24, -1, -1, -1)
        first = Composition((name,), 7)(same, torch.arange(24))
        assert len({image.numpy().tobytes() for image in first}) > 15
        assert not torch.equal(first, Composition((name,), 8)(same, torch.arange(24)))


def test_composition_applies_in_order_with_draws_of_their_own(images):
    rows = torch.arange(24)
    pair = Composition(("rotate", "erase"), 3)(images, rows)
    turned = TRANSFORMS["rotate"](images, partial(uniform_of_rows, 3, "0 rotate", rows))
    assert torch.equal(pair, TRANSFORMS["erase"](turned, partial(uniform_of_rows, 3, "1 erase", rows)))
    twice = Composition(("crop", "crop"), 3)(images, rows)
    assert not torch.equal(twice, Composition(("crop",), 3)(Composition(("crop",), 3)(images, rows), rows))
    assert torch.equal(Composition(("flip", "flip"), 3)(images, rows), images)


@pytest.mark.parametrize("mapped", [False, True])
def test_transformed_images_know_their_rows(images, mapped, tmp_path):
    import numpy as np

    store = images
    if mapped:
        np.save(tmp_path / "images.npy", images.numpy())
        store = MappedImages(tmp_path / "images.npy")
    tau = Composition(("rotate", "affine"), 2)
    lazy = Transformed(store, tau)
    wanted = tau(images, torch.arange(24))
    assert len(lazy) == 24
    assert lazy.shape == images.shape
    assert torch.equal(lazy[5:17], wanted[5:17])
    assert torch.equal(lazy[20:99], wanted[20:])
    rows = torch.tensor([9, 3, 3])
    assert torch.equal(lazy[rows], wanted[rows])
