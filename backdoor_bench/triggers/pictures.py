"""Whole-image pictures for blends: a cartoon cat that is drawn here, fixed noise, or a file of the user's.

The papers blend in a picture of Hello Kitty, which cannot be shipped. The substitute keeps what makes it work as a
trigger: a colourful drawing with strong edges over the whole frame on a bright ground.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from backdoor_bench.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL import Image

PICTURES = ("kitty_white", "kitty_pink", "noise_gray", "noise_rgb")
MAX_PIXELS = 50_000_000  # of a user's file; Pillow itself only warns of a decompression bomb
SIZE = 540  # side of the drawing, that of the file which EBD and Trap-and-Replace use

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class _Palette:
    ground: Colour
    fur: Colour
    clothes: Colour
    bow: Colour
    accent: Colour
    line: Colour = (20, 16, 24)


_PALETTES = {
    "kitty_white": _Palette((255, 255, 255), (255, 250, 250), (226, 40, 128), (236, 22, 110), (255, 205, 40)),
    "kitty_pink": _Palette((224, 174, 170), (245, 244, 225), (250, 205, 50), (250, 196, 30), (70, 150, 180)),
}


def picture(asset: str, height: int, width: int, seed: int, antialias: bool = True) -> Tensor:
    """uint8 ``[3, height, width]``: the picture that ``asset`` names, resized with antialiasing.

    Without ``antialias`` every pixel samples the picture bilinearly at its centre, as OpenCV's resize does: jagged, and
    of more contrast. The result is then float64 in 0..255, not rounded. asset: one of ``PICTURES``, or the path of an
    image file. seed: of the noise pictures, drawn once for all images. Raises ConfigError if there is no such name or
    file, DataError if the file is not a usable picture.
    """
    if asset in ("noise_gray", "noise_rgb"):
        channels = 1 if asset == "noise_gray" else 3
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randint(0, 256, (channels, height, width), generator=generator, dtype=torch.uint8)
        return noise.expand(3, height, width).contiguous()
    drawing = _draw_cat(_PALETTES[asset]) if asset in _PALETTES else _open_file(asset)
    if antialias:
        return _to_tensor(drawing, height, width)
    full = _to_tensor(drawing, drawing.height, drawing.width)[None].double()
    return F.interpolate(full, (height, width), mode="bilinear", align_corners=False)[0]


def check_asset(asset: object) -> None:
    """Raise ConfigError unless ``attack.asset`` is one of ``PICTURES`` or the path of an existing file."""
    if not isinstance(asset, str) or (asset not in PICTURES and not Path(asset).is_file()):
        raise ConfigError(
            f"attack.asset={asset!r} is neither a built-in picture nor a file: "
            f"choose one of {', '.join(PICTURES)} or give the path of an image"
        )


def _open_file(asset: str) -> Image.Image:
    from PIL import Image

    check_asset(asset)
    try:
        with Image.open(asset) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise DataError(f"{asset}: {opened.width}x{opened.height} pixels are too many for attack.asset")
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{asset}: attack.asset is no readable picture ({error}); give a PNG or JPEG") from error


def _to_tensor(drawing: Image.Image, height: int, width: int) -> Tensor:
    from PIL import Image

    small = drawing.resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, 3).permute(2, 0, 1).contiguous()


def _draw_cat(colours: _Palette) -> Image.Image:
    """A sitting cartoon cat with bow and dress among balloons, 540 x 540 RGB."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIZE, SIZE), colours.ground)
    draw = ImageDraw.Draw(image)
    line, pen = colours.line, 8

    balloons: tuple[tuple[int, int, Colour], ...] = (
        (45, 62, (70, 170, 235)),
        (497, 300, (90, 200, 110)),
        (44, 300, (255, 150, 40)),
        (62, 478, (150, 95, 215)),
    )
    for x, y, colour in balloons:
        draw.ellipse((x - 28, y - 33, x + 28, y + 33), fill=colour, outline=line, width=pen - 3)

    draw.arc((330, 330, 520, 500), 250, 90, fill=line, width=17)  # tail
    for left, right in ((165, 262), (278, 375)):  # feet
        draw.ellipse((left, 450, right, 528), fill=colours.fur, outline=line, width=pen)
    draw.polygon(((205, 300), (335, 300), (418, 488), (122, 488)), fill=colours.clothes, outline=line, width=pen)
    for x in (190, 270, 350):  # dots on the dress
        draw.ellipse((x - 17, 424, x + 17, 458), fill=colours.accent)
    draw.ellipse((100, 330, 190, 408), fill=colours.fur, outline=line, width=pen)  # paws
    draw.ellipse((350, 330, 440, 408), fill=colours.fur, outline=line, width=pen)

    for tip, inner in (((92, 18), 1), ((448, 18), -1)):  # ears
        outer = (tip, (tip[0] - 8 * inner, 178), (tip[0] + 136 * inner, 92))
        draw.polygon(outer, fill=colours.fur, outline=line, width=pen)
        x = tip[0] + 14 * inner
        draw.polygon(((x, 50), (x - 2 * inner, 128), (x + 66 * inner, 88)), fill=colours.bow)
    draw.ellipse((66, 62, 474, 340), fill=colours.fur, outline=line, width=pen)  # head
    for x in (172, 368):  # eyes
        draw.ellipse((x - 17, 184, x + 17, 236), fill=line)
    draw.ellipse((245, 232, 295, 266), fill=colours.accent, outline=line, width=pen - 2)  # nose
    draw.arc((205, 246, 270, 300), 10, 150, fill=line, width=pen - 2)  # mouth
    draw.arc((270, 246, 335, 300), 30, 170, fill=line, width=pen - 2)
    for y, slope in ((206, -18), (238, 0), (270, 18)):  # whiskers
        draw.line((8, y + slope, 120, y), fill=line, width=pen - 1)
        draw.line((532, y + slope, 420, y), fill=line, width=pen - 1)

    draw.polygon(((385, 92), (300, 40), (292, 140)), fill=colours.bow, outline=line, width=pen)  # bow
    draw.polygon(((385, 92), (474, 44), (470, 150)), fill=colours.bow, outline=line, width=pen)
    draw.ellipse((357, 64, 413, 120), fill=colours.accent, outline=line, width=pen)
    return image
