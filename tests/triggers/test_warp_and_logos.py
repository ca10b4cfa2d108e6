"""Warps, logos, semi-transparent stamps, blends in pieces and the physical transform against worked-out values."""

import math

import pytest
import torch

from backdoor_bench.data.physical import PhysicalTransform, affine
from backdoor_bench.errors import ConfigError
from backdoor_bench.triggers.blend import Blend
from backdoor_bench.triggers.logos import LOGOS, QUARTERS, check_logo, logo
from backdoor_bench.triggers.overlay import InPieces, Overlay
from backdoor_bench.triggers.patch import Patch
from backdoor_bench.triggers.warp import NoiseWarp, Warp, field, mean_shift, noisy, warp_grid, warped

SIZES = (16, 32, 64, 160, 224)


def noise(count: int, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def still_grid(size: int) -> torch.Tensor:
    return warp_grid(torch.zeros(size, size, 2, dtype=torch.float64), 0.5, 1.0)


def a_grid(size: int = 32, strength: float = 0.5, seed: int = 0) -> torch.Tensor:
    return warp_grid(field(4, size, size, torch.Generator().manual_seed(seed)), strength, 1.0)


# --- warps ---


@pytest.mark.parametrize("size", SIZES)
def test_warp_that_moves_nothing_changes_nothing(size):
    images = noise(2, size)
    assert torch.equal(Warp(still_grid(size))(images), images)


def test_first_channel_of_the_grid_is_the_column():
    # One pixel is 2 / (W - 1) of the grid: every pixel takes its right neighbour, then its lower one.
    images = noise(2)
    for axis in (0, 1):
        grid = still_grid(32)
        grid[..., axis] += 2 / 31
        moved = Warp(grid.clamp(-1, 1))(images)
        if axis == 0:
            assert torch.equal(moved[..., :-1], images[..., 1:])
        else:
            assert torch.equal(moved[..., :-1, :], images[..., 1:, :])


def test_half_a_pixel_is_the_mean_of_two():
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    images[..., 5] = 101
    grid = still_grid(16)
    grid[..., 0] += 1 / 15
    moved = Warp(grid.clamp(-1, 1))(images)
    assert moved[0, 0, 0, 3:7].tolist() == [0, 50, 50, 0]  # 50.5, truncated


@pytest.mark.parametrize("size", SIZES)
def test_mean_shift_is_the_papers_at_every_size(size):
    shifts = [mean_shift(a_grid(size, seed=seed)) for seed in range(40)]
    assert sum(shifts) / 40 == pytest.approx(0.185, rel=0.1 if size > 16 else 0.2)
    assert all(0.1 < shift < 0.27 for shift in shifts)
    assert mean_shift(a_grid(size, 1.0)) == pytest.approx(2 * mean_shift(a_grid(size)), rel=0.03)


@pytest.mark.parametrize("value", [0, 1, 77, 128, 255])
def test_a_flat_image_stays_flat(value):
    flat = torch.full((2, 3, 32, 32), value, dtype=torch.uint8)
    assert torch.equal(Warp(a_grid())(flat), flat)
    assert torch.equal(NoiseWarp(a_grid(), 0)(flat, torch.arange(2)), flat)


def test_control_points_have_mean_magnitude_one_and_stay_where_they_are():
    shape = field(3, 3, 3, torch.Generator().manual_seed(0))
    assert shape.abs().mean().item() == pytest.approx(1.0)
    larger = field(3, 33, 33, torch.Generator().manual_seed(0))  # the same points, at rows and columns 0, 16, 32
    assert torch.allclose(larger[::16, ::16], shape)


def test_noise_moves_by_up_to_half_a_pixel():
    grid, size = still_grid(32), 32
    uniform = torch.rand(5, size, size, 2, dtype=torch.float64)
    shift = (noisy(grid, uniform) - grid) * (size - 1) / 2
    assert shift.abs().max() <= 0.5
    assert shift[:, 2:-2, 2:-2].abs().mean().item() == pytest.approx(0.25 * 31 / 32, rel=0.05)
    assert noisy(grid, uniform).abs().max() <= 1


def test_noise_belongs_to_the_row():
    images, grid = noise(6), a_grid()
    rows = torch.tensor([7, 0, 3, 100_000, 4, 5])
    together = NoiseWarp(grid, 0)(images, rows)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    assert torch.equal(NoiseWarp(grid, 0)(images[order], rows[order]), together[order])
    assert torch.equal(NoiseWarp(grid, 0)(images[1:2], rows[1:2]), together[1:2])
    assert not torch.equal(NoiseWarp(grid, 1)(images, rows), together)
    same = images[:1].expand(6, 3, 32, 32)
    assert len(NoiseWarp(grid, 0)(same, rows).unique(dim=0)) == 6


def test_warped_floats_agree_with_the_trigger():
    images, grid = noise(4), a_grid()
    floats = warped(images.float() / 255, grid)
    assert floats.dtype == torch.float32
    assert (floats * 255 - Warp(grid)(images).float() - 0.5).abs().max() <= 0.51


# --- logos ---


def test_phoenix_pixels():
    (patch,) = logo("phoenix", 32, 32, scale=True)
    assert (patch.top, patch.left, tuple(patch.mask.shape)) == (27, 27, (5, 5))
    assert patch.pattern[:, 0, 0].tolist() == [237, 243, 252]
    assert patch.pattern[:, 2, 2].tolist() == [255, 255, 255]
    assert patch.pattern[:, 2, 4].tolist() == [63, 124, 226]
    assert patch.pattern[:, 4].T.tolist()[:2] == [[226, 235, 251], [105, 153, 232]]
    assert patch.pattern.double().mean((1, 2)).tolist() == pytest.approx([179.6, 203.76, 243.52])
    right, left = logo("phoenix2", 32, 32, scale=True)
    assert torch.equal(left.pattern, right.pattern)
    assert (left.top, left.left) == (27, 0)


def test_firefox_has_the_silhouette_and_the_colours_of_the_real_one():
    (patch,) = logo("firefox", 32, 32, scale=True)
    assert (patch.top, patch.left) == (1, 18)
    spans = [(23, 27), (19, 29), (19, 29), (19, 30), *[(18, 30)] * 5, (19, 30), (20, 29), (21, 28), (22, 27)]
    for row, (first, last) in enumerate(spans):
        assert (patch.mask[row].nonzero().flatten() + 18).tolist() == list(range(first, last + 1))
    assert int(patch.mask.sum()) == 140
    assert patch.pattern[:, patch.mask].double().mean(1).round().tolist() == [192, 114, 82]
    assert patch.pattern[:, patch.mask].amax(0).min() > 0  # no black pixel
    assert len(patch.pattern[:, patch.mask].unique(dim=1)[0]) > 30
    known = ((41, (162, 82, 104)), (37, (170, 190, 111)), (32, (226, 57, 58)), (30, (222, 125, 41)))
    for name, (count, mean) in zip(QUARTERS, known, strict=True):
        (quarter,) = logo(name, 32, 32, scale=True)
        assert int(quarter.mask.sum()) == count
        assert quarter.pattern[:, quarter.mask].double().mean(1).round().tolist() == list(mean)


@pytest.mark.parametrize("size", SIZES)
def test_four_quarters_are_the_logo(size):
    images = noise(2, size)
    quarters = tuple(logo(name, size, size, scale=True)[0] for name in QUARTERS)
    assert torch.equal(Overlay(quarters, 1.0)(images), Overlay(logo("firefox", size, size, scale=True), 1.0)(images))


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [(32, (1, 13), (18, 30)), (64, (2, 27), (36, 61)), (160, (5, 69), (90, 154)), (224, (7, 97), (126, 216))],
)
def test_firefox_grows_with_the_image(size, rows, columns):
    (patch,) = logo("firefox", size, size, scale=True)
    assert (patch.top, patch.top + len(patch.mask) - 1) == rows
    assert (patch.left, patch.left + patch.mask.shape[1] - 1) == columns
    assert int(patch.mask.sum()) == 140 * (size // 32) ** 2
    (fixed,) = logo("firefox", size, size, scale=False)
    assert (fixed.top, fixed.left, len(fixed.mask)) == (1, size - 14, 13)


def test_trojan_square():
    (patch,) = logo("trojan8", 32, 32, scale=True)
    assert (patch.top, patch.left, tuple(patch.mask.shape)) == (21, 21, (8, 8))
    assert bool(patch.mask.all())
    assert patch.pattern.double().mean((1, 2)).round().tolist() == [125, 125, 132]
    assert (patch.pattern.double().std((1, 2)) > 60).all()


def test_checker_in_the_four_corners():
    black = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    stamped = Overlay(logo("checker", 32, 32, scale=True), 1.0)(black + 7)[0]
    shown = [[[stamped[0, r + i, c + j].item() for j in range(3)] for i in range(3)] for r in (0, 29) for c in (0, 29)]
    x = 255
    assert shown == [
        [[x, 0, x], [0, x, 0], [x, 0, 0]],
        [[x, 0, x], [0, x, 0], [0, 0, x]],
        [[x, 0, 0], [0, x, 0], [x, 0, x]],
        [[0, 0, x], [0, x, 0], [x, 0, x]],
    ]
    assert int((stamped[0] != 7).sum()) == 36
    assert torch.equal(stamped[0], stamped[2])


@pytest.mark.parametrize("name", LOGOS)
@pytest.mark.parametrize("size", SIZES)
def test_every_logo_fits_from_16_pixels_up(name, size):
    check_logo("attack.patch", name, size)
    images = noise(2, size)
    before = images.clone()
    stamped = Overlay(logo(name, size, size, scale=True), 1.0)(images)
    assert torch.equal(images, before)
    assert stamped.dtype == torch.uint8
    assert stamped.shape == images.shape
    assert not torch.equal(stamped, images)


def test_too_small_an_image_is_refused():
    with pytest.raises(ConfigError, match=r"attack\.patch=firefox needs images of at least 14 pixels.*have 12"):
        check_logo("attack.patch", "firefox", 12)


# --- overlays ---


def test_opacity_mixes_and_truncates():
    images = torch.full((2, 3, 4, 4), 10, dtype=torch.uint8)
    patch = Patch(torch.full((3, 1, 1), 255, dtype=torch.uint8), torch.ones(1, 1, dtype=torch.bool), 1, 2)
    stamped = Overlay((patch,), 0.5)(images)
    assert stamped[:, :, 1, 2].unique().tolist() == [132]  # 10 + 0.5 * 245 = 132.5
    assert int((stamped != 10).sum()) == 6
    assert Overlay((patch,), 0.2)(images)[0, 0, 1, 2] == 59
    assert images.unique().tolist() == [10]


def test_later_patches_cover_earlier_ones():
    images = noise(1)
    patches = (*logo("phoenix2", 32, 32, scale=True), *logo("checker", 32, 32, scale=True))
    stamped = Overlay(patches, 1.0)(images)[0]
    assert stamped[:, 29, 29].tolist() == [0, 0, 0]  # the checker's bottom right corner is 001/010/101
    assert stamped[:, 31, 31].tolist() == [255, 255, 255]
    assert stamped[:, 27, 27].tolist() == [237, 243, 252]


@pytest.mark.parametrize("size", [16, 32, 30, 64])
def test_pieces_are_switched_off_by_row(size):
    images = torch.zeros(50, 3, size, size, dtype=torch.uint8)
    white = Blend(torch.full((3, size, size), 255, dtype=torch.uint8), 1.0)
    rows = torch.arange(50)
    shown = InPieces(white, 16, 8, 0)(images, rows)
    assert set(shown.unique().tolist()) == {0, 255}
    centres = [(2 * place + 1) * size // 8 for place in range(4)]
    pieces = shown[:, 0][:, centres][:, :, centres].flatten(1)
    assert (pieces == 255).sum(1).tolist() == [8] * 50
    assert len(pieces.unique(dim=0)) > 45
    per_piece = (pieces == 255).sum(0)  # 25 of 50 on the mean, standard deviation 3.5
    assert per_piece.min() > 11
    assert per_piece.max() < 39
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(InPieces(white, 16, 8, 0)(images[order], rows[order]), shown[order])
    assert not torch.equal(InPieces(white, 16, 8, 1)(images, rows), shown)
    if size % 4 == 0:
        side = size // 4
        blocks = shown[:, 0].view(50, 4, side, 4, side)
        assert torch.equal(blocks.amax((2, 4)), blocks.amin((2, 4)))


# --- the physical transform ---


def test_physical_transform_is_reproducible_and_differs_by_image():
    transform = PhysicalTransform(10, 0.1, (0.8, 0.9), (0.2, 0.2), 0.5)
    images = noise(1).expand(20, 3, 32, 32).float() / 255
    before = images.clone()
    out = transform(images, torch.Generator().manual_seed(0))
    assert torch.equal(images, before)
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    assert out.min() >= 0
    assert out.max() <= 1
    assert torch.equal(out, transform(images, torch.Generator().manual_seed(0)))
    assert len(out.unique(dim=0)) == 20
    generator = torch.Generator().manual_seed(0)
    transform(images, generator)
    assert not torch.equal(transform(images, generator), out)


def test_physical_transform_off_changes_nothing():
    images = noise(5).float() / 255
    out = PhysicalTransform(0, 0, (1.0, 1.0), (0, 0), 0)(images, torch.Generator().manual_seed(0))
    assert torch.allclose(out, images, atol=1e-6)
    flipped = PhysicalTransform(0, 0, (1.0, 1.0), (0, 0), 1)(images, torch.Generator().manual_seed(0))
    assert torch.allclose(flipped, images.flip(-1), atol=1e-6)


def test_shrunken_images_get_a_black_frame():
    images = torch.ones(200, 3, 40, 40)
    out = PhysicalTransform(0, 0.1, (0.8, 0.8), (0, 0), 0)(images, torch.Generator().manual_seed(0))
    assert set(out.unique().tolist()) == {0.0, 1.0}
    assert (out[:, 0].sum((1, 2)) == 32 * 32).all()
    top = out[:, 0].amax(2).argmax(1)  # the frame is 4 pixels, shifted by -4..4
    assert (int(top.min()), int(top.max())) == (0, 8)


def test_jitter_factors():
    images = torch.full((400, 3, 8, 8), 0.5)
    out = PhysicalTransform(0, 0, (1.0, 1.0), (0.2, 0.0), 0)(images, torch.Generator().manual_seed(0))
    values = out[:, 0, 0, 0]
    assert 0.4 <= values.min() < 0.41
    assert 0.59 < values.max() <= 0.6
    halves = torch.zeros(400, 3, 8, 8)
    halves[..., 4:] = 0.5  # mean 0.25
    out = PhysicalTransform(0, 0, (1.0, 1.0), (0.0, 0.2), 0)(halves, torch.Generator().manual_seed(0))
    bright = out[..., 4:].flatten(1)
    assert torch.allclose(bright.amax(1), bright.amin(1))
    assert bright.max().item() == pytest.approx(0.25 + 1.2 * 0.25, abs=0.002)
    assert out[..., :4].max().item() == pytest.approx(0.25 - 0.8 * 0.25, abs=0.002)


@pytest.mark.parametrize("shape", [(32, 32), (24, 40)])
def test_affine_is_torchvisions(shape):
    import backdoor_bench._torchvision  # noqa: F401

    functional = pytest.importorskip("torchvision.transforms.functional")
    images = torch.rand(4, 3, *shape, generator=torch.Generator().manual_seed(0))
    angles, scales = torch.tensor([10.0, -7.3, 0.0, 3.0]), torch.tensor([0.85, 0.9, 0.8, 1.0])
    right, down = torch.tensor([3.0, -2.0, 1.0, 0.0]), torch.tensor([-1.0, 2.0, 0.0, 3.0])
    ours = affine(images, angles * math.pi / 180, scales, right, down)
    for i in range(4):
        theirs = functional.affine(
            images[i], float(angles[i]), [int(right[i]), int(down[i])], float(scales[i]), [0.0, 0.0]
        )
        assert (ours[i] == theirs).float().mean() > 0.99  # a pixel halfway between two may go either way
