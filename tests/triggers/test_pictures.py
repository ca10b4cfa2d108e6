"""The drawn cat, noise and a user's picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from backdoor_bench.errors import ConfigError, DataError
from backdoor_bench.triggers import pictures
from backdoor_bench.triggers.pictures import check_asset, picture


@pytest.mark.parametrize("size", [32, 224])
def test_white_cat_looks_like_the_original(size: int) -> None:
    cat = picture("kitty_white", size, size, seed=0)
    assert cat.shape == (3, size, size)
    assert cat.dtype == torch.uint8
    means = cat.double().mean((1, 2))
    assert abs(float(means.mean()) - 202) < 3
    assert (means - torch.tensor([214.0, 192.0, 200.0])).abs().max() < 5
    assert float(cat.double().std()) > 50


def test_pink_cat_is_bright_and_warm() -> None:
    red, green, blue = picture("kitty_pink", 32, 32, seed=0).double().mean((1, 2)).tolist()
    assert 170 < (red + green + blue) / 3 < 205
    assert max(abs(red - 199), abs(green - 175), abs(blue - 149)) < 5  # those of the toolbox's file


def test_edges_cover_the_whole_frame() -> None:
    grey = picture("kitty_white", 224, 224, seed=0).double().mean(0)
    edges = (grey.diff(dim=0).abs()[:, :-1] + grey.diff(dim=1).abs()[:-1] > 60).double()
    tiles = torch.nn.functional.adaptive_avg_pool2d(edges[None], 4)
    assert (tiles > 0.005).all()


def test_drawing_does_not_depend_on_seed_or_call() -> None:
    assert torch.equal(picture("kitty_white", 64, 64, seed=0), picture("kitty_white", 64, 64, seed=1))


def test_height_comes_first() -> None:
    assert picture("kitty_white", 20, 30, seed=0).shape == (3, 20, 30)
    assert picture("noise_rgb", 20, 30, seed=0).shape == (3, 20, 30)


def test_noise_is_one_fixed_picture_a_seed() -> None:
    noise = picture("noise_rgb", 64, 64, seed=3)
    assert torch.equal(noise, picture("noise_rgb", 64, 64, seed=3))
    assert not torch.equal(noise, picture("noise_rgb", 64, 64, seed=4))
    assert abs(float(noise.double().mean()) - 127.5) < 3
    grey = picture("noise_gray", 64, 64, seed=3)
    assert torch.equal(grey[0], grey[2])


def test_own_file_is_read_and_resized(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    Image.new("RGB", (10, 10), (200, 10, 30)).save(path)
    own = picture(str(path), 4, 6, seed=0)
    assert own.shape == (3, 4, 6)
    assert own[:, 1, 2].tolist() == [200, 10, 30]


@pytest.mark.parametrize("asset", ["kitty", "/nowhere/cat.png", "", None, 3])
def test_unknown_asset_names_the_choices(asset: object) -> None:
    with pytest.raises(ConfigError, match=r"attack\.asset=.*kitty_white"):
        check_asset(asset)


def test_text_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("no picture")
    with pytest.raises(DataError, match=r"text\.png"):
        picture(str(path), 8, 8, seed=0)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match=r"cut\.png"):
        picture(str(path), 8, 8, seed=0)


def test_huge_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PIXELS", 99)
    path = tmp_path / "big.png"
    Image.new("RGB", (10, 10)).save(path)
    with pytest.raises(DataError, match="10x10"):
        picture(str(path), 8, 8, seed=0)


def test_without_antialiasing_each_pixel_samples_the_drawing_at_its_centre() -> None:
    jagged = picture("kitty_white", 32, 32, 0, antialias=False)
    full = picture("kitty_white", 540, 540, 0).double()
    # Output pixel i looks at (i + 0.5) 540 / 32 - 0.5: pixel 3 at 58.5625, pixel 17 at 294.8125.
    rows = full[:, 58] * (1 - 0.5625) + full[:, 59] * 0.5625
    value = rows[:, 294] * (1 - 0.8125) + rows[:, 295] * 0.8125
    assert torch.allclose(jagged[:, 3, 17], value)
    assert jagged.std() > picture("kitty_white", 32, 32, 0).double().std() + 5
