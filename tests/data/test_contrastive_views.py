"""The batched views against torchvision's functional transforms, image by image, with the same parameters."""

from dataclasses import replace

import pytest
import torch

import backdoor_bench._torchvision  # noqa: F401  (before torchvision)
from backdoor_bench.data.contrastive import RATIO, ViewAugmentation, ViewDraw, render
from backdoor_bench.errors import ConfigError

SIMCLR = ViewAugmentation(0.2, 0.5, 0.8, 0.4, 0.4, 0.4, 0.1, 0.2)


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count, height=32, width=32):
    """Smooth colours with grey, black and white patches, where hue and saturation are not defined."""
    images = torch.rand(count, 3, height, width, generator=stream(7))
    images[:, :, :4, :4] = images[:, :1, :4, :4]
    images[:, :, 4:6] = 0
    images[:, :, 6:8] = 1
    return images


def unchanged(count, height=32, width=32):
    """A draw that leaves every image as it is."""
    off = torch.zeros(count, dtype=torch.bool)
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None].repeat(1, count)
    box = torch.tensor([0, 0, height, width])[:, None].repeat(1, count)
    return ViewDraw(box, off, off, factors, off, (0, 1, 2, 3))


def expected(image, draw, row):
    """One image by torchvision."""
    from torchvision.transforms.v2 import functional as TF

    top, left, tall, broad = draw.box[:, row].tolist()
    image = TF.resized_crop(image, top, left, tall, broad, list(image.shape[-2:]), antialias=True)
    if draw.mirrored[row]:
        image = TF.horizontal_flip(image)
    if draw.jittered[row]:
        jitters = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
        for number in draw.order:
            image = jitters[number](image, float(draw.factors[number, row]))
    if draw.grey[row]:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    return image


def check_all(images, draw):
    views = render(images, draw)
    for row, image in enumerate(images):
        assert torch.allclose(views[row], expected(image, draw, row), atol=2e-5), row
    return views


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 33)])
@pytest.mark.parametrize("seed", range(4))
def test_whole_views_equal_torchvision(seed, height, width):
    images = pictures(24, height, width)
    given = images.clone()
    draw = SIMCLR.draw(24, height, width, stream(seed))
    views = check_all(images, draw)
    assert torch.equal(images, given)
    assert views.shape == images.shape
    assert views.min() >= 0
    assert views.max() <= 1


@pytest.mark.parametrize("box", [(0, 0, 32, 32), (0, 0, 16, 16), (13, 5, 19, 27), (31, 31, 1, 1), (7, 0, 2, 31)])
def test_crop_alone(box):
    images = pictures(4)
    draw = replace(unchanged(4), box=torch.tensor(box)[:, None].repeat(1, 4))
    check_all(images, draw)
    check_all(images, replace(draw, mirrored=torch.tensor([True, False, True, False])))


@pytest.mark.parametrize("number", range(4))
def test_each_jitter_alone(number):
    extremes = torch.tensor([-0.5, -0.07, 0.0, 0.21, 0.5] if number == 3 else [0.0, 0.6, 1.0, 1.4, 3.0])
    draw = unchanged(5)
    draw.factors[number] = extremes
    check_all(pictures(5), replace(draw, jittered=torch.ones(5, dtype=torch.bool)))


def test_the_order_of_the_jitters_is_that_of_the_draw():
    draw = replace(SIMCLR.draw(8, 32, 32, stream(1)), jittered=torch.ones(8, dtype=torch.bool))
    first, second = (check_all(pictures(8), replace(draw, order=order)) for order in ((3, 1, 0, 2), (0, 2, 1, 3)))
    assert not torch.allclose(first, second, atol=1e-3)


def test_nothing_drawn_nothing_changed():
    images = pictures(3)
    assert torch.allclose(render(images, unchanged(3)), images, atol=2e-5)


def test_draws_have_the_distribution_of_torchvision():
    draw = SIMCLR.draw(40_000, 32, 32, stream())
    top, left, tall, broad = draw.box
    assert ((draw.box[:2] >= 0).all() and (draw.box[2:] >= 1).all()).item()
    assert ((top + tall <= 32) & (left + broad <= 32)).all()
    area = (tall * broad / 32**2).double()
    assert 0.17 < area.min() < 0.23
    assert ((broad / tall) > RATIO[0] * 0.9).all()
    assert ((broad / tall) < RATIO[1] * 1.1).all()
    for values, mean in ((draw.mirrored, 0.5), (draw.jittered, 0.8), (draw.grey, 0.2)):
        assert values.double().mean() == pytest.approx(mean, abs=0.01)
    for number in range(3):
        assert 0.6 <= draw.factors[number].min() < 0.601
        assert 1.399 < draw.factors[number].max() <= 1.4001
    assert draw.factors[3].abs().max() == pytest.approx(0.1, abs=1e-3)

    from torchvision.transforms.v2 import RandomResizedCrop

    torch.manual_seed(0)
    theirs = RandomResizedCrop(32, scale=(0.2, 1.0))
    boxes = [theirs.make_params([torch.empty(3, 32, 32)]) for _ in range(4000)]
    sides = torch.tensor([[box["height"], box["width"], box["top"], box["left"]] for box in boxes]).double()
    ours = torch.stack([tall, broad, top, left], 1).double()
    assert torch.allclose(ours.mean(0), sides.mean(0), atol=0.35)
    assert torch.allclose(ours.std(0), sides.std(0), atol=0.35)


def test_where_no_box_fits_the_largest_central_one_is_taken():
    """A crop of all the area of a 40 x 10 image is at most 10 wide and 10 / (3/4) high."""
    draw = replace(SIMCLR, min_area=1.0).draw(5, 40, 10, stream())
    assert draw.box.T.tolist() == [[(40 - 13) // 2, 0, 13, 10]] * 5


def test_the_same_generator_gives_the_same_views():
    images = pictures(6)
    assert torch.equal(SIMCLR(images, stream(3)), SIMCLR(images, stream(3)))
    assert not torch.equal(SIMCLR(images, stream(3)), SIMCLR(images, stream(4)))
    memory = images.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(SIMCLR(memory, stream(3)), SIMCLR(images, stream(3)), atol=1e-6)


def test_parts_that_are_off_change_nothing():
    images = pictures(6)
    assert torch.allclose(ViewAugmentation(1.0, 0, 0, 0.4, 0.4, 0.4, 0.1, 0)(images, stream()).mean((2, 3)),
                          images.mean((2, 3)), atol=0.05)  # fmt: skip
    plain = ViewAugmentation(0.2, 0, 1.0, 0, 0, 0, 0, 0).draw(6, 32, 32, stream())
    assert torch.equal(plain.factors, torch.tensor([1.0, 1, 1, 0])[:, None].expand(4, 6))
    assert not plain.mirrored.any()
    assert not plain.grey.any()


@pytest.mark.parametrize(
    ("key", "value"),
    [("min_area", 0), ("min_area", 1.1), ("flip", 2), ("jitter", -0.1), ("grey", "x"), ("hue", 0.6),
     ("brightness", -1), ("contrast", float("inf")), ("saturation", float("nan"))],
)  # fmt: skip
def test_a_bad_value_names_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"defense\.views\.{key}={value!r}"):
        replace(SIMCLR, **{key: value})
