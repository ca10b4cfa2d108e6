"""Image files of any kind -> uint8 arrays of one size, in memory or, for large sets, in a memory-mapped cache."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from backdoor_bench.data.common import warn
from backdoor_bench.data.images import MappedImages
from backdoor_bench.errors import DataError, DiskError, check_choice, check_range
from backdoor_bench.storage import digest, remove_stale_temporaries, write_json, write_text
from backdoor_bench.types import Images, Progress

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF")  # Pillow knows many more, some of them old and fragile
_CHUNK = 512  # images in flight: bounds memory, and the delay until the first bad file stops the run
_PILLOW_LIMIT = 178_956_970  # Pillow itself refuses more
_VERSION = 1  # raise when a rule below changes, so that cached arrays are made again


@dataclass(frozen=True)
class Decoder:
    """Turns image files into uint8 ``[N, 3, size, size]``.

    resize: ``squash`` scales both sides, ``crop`` scales the short side and cuts the centre out (both bilinear with
    antialiasing, as Pillow and torchvision do). max_pixels: larger images are refused by their header, before they are
    decoded. on_error: ``stop`` at the first bad file, or ``skip`` it, counted and listed. memory_limit_gib: a larger
    set goes to a memory-mapped file in cache_dir instead of memory.
    """

    size: int
    resize: str
    max_pixels: int
    on_error: str
    memory_limit_gib: float
    cache_dir: str

    def __post_init__(self) -> None:
        check_choice("dataset.resize", self.resize, ("squash", "crop"))
        check_range("dataset.max_pixels", self.max_pixels, 4, _PILLOW_LIMIT, integer=True)
        check_choice("dataset.on_error", self.on_error, ("stop", "skip"))
        check_range("dataset.memory_limit_gib", self.memory_limit_gib, 0, 2**20)

    def decode(self, root: Path, names: Sequence[str], progress: Progress | None = None) -> tuple[Images, list[int]]:
        """(images, kept): the files ``root/name`` in order and the positions in ``names`` that could be read.

        Raises DataError naming the first bad file unless on_error is ``skip``; then those are left out and the list is
        written to ``cache_dir``. Grayscale, palette, transparent (on white) and 16-bit images are converted, EXIF
        orientation is applied, of an animation the first frame is taken.
        """
        if len(names) * 3 * self.size**2 > self.memory_limit_gib * 2**30:
            images, problems = self._mapped(root, names, progress)
        else:
            array = np.empty((len(names), 3, self.size, self.size), dtype=np.uint8)
            problems = self._fill(array, root, names, progress)
            images = torch.from_numpy(array)
        if not problems:
            return images, list(range(len(names)))
        self._report(names, problems, progress)
        kept = [row for row in range(len(names)) if row not in problems]
        index = torch.tensor(kept, dtype=torch.int64)
        return images._subset(index) if isinstance(images, MappedImages) else images[index], kept

    def _fill(self, array: np.ndarray, root: Path, names: Sequence[str], progress: Progress | None) -> dict[int, str]:
        """Decode into ``array``; returns what went wrong by row (nothing goes wrong under on_error=stop: it raises)."""
        real_root = root.resolve()

        def one(row: int) -> str | None:
            try:
                array[row] = read_image(root / names[row], real_root, self.size, self.resize, self.max_pixels)
            except DataError as error:
                return str(error)
            return None

        problems: dict[int, str] = {}
        task = progress.task("decoding images", total=len(names)) if progress else nullcontext(lambda count: None)
        with warnings.catch_warnings(), task as advance, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is the limit here
            for start in range(0, len(names), _CHUNK):
                rows = range(start, min(start + _CHUNK, len(names)))
                for row, problem in zip(rows, pool.map(one, rows), strict=True):
                    if problem is not None:
                        if self.on_error == "stop":
                            raise DataError(f"{problem}; remove or repair it, or set dataset.on_error=skip")
                        problems[row] = problem
                advance(len(rows))
        return problems

    def _report(self, names: Sequence[str], problems: dict[int, str], progress: Progress | None) -> None:
        text = "".join(f"{problems[row]}\n" for row in sorted(problems))
        path = Path(self.cache_dir) / f"skipped-{digest(text)[:16]}.txt"
        write_text(path, text)
        first = ", ".join(printable(names[row]) for row in sorted(problems)[:5])
        warn(
            progress,
            f"skipped {len(problems)} of {len(names)} images that cannot be used ({first}"
            f"{', ...' if len(problems) > 5 else ''}); reasons in {path}",
        )

    def _mapped(self, root: Path, names: Sequence[str], progress: Progress | None) -> tuple[Images, dict[int, str]]:
        """As _fill, into a file that is found again by names, sizes and times of the images."""
        from filelock import FileLock

        folder = Path(self.cache_dir) / "decoded"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"could not make {folder}: {error.strerror}; choose another cache_root") from error
        stamps = [stamp(root, name) for name in names]
        where = printable(str(root.resolve()))
        key = digest([_VERSION, where, self.size, self.resize, self.max_pixels, stamps])[:32]
        path, record = folder / f"{key}.npy", folder / f"{key}.json"
        with FileLock(folder / f".{key}.lock"):
            remove_stale_temporaries(folder)
            problems = _stored_problems(path, record, progress)
            if problems is None:
                problems = self._write(path, record, root, names, progress)
        if problems and self.on_error == "stop":
            raise DataError(f"{problems[min(problems)]}; remove or repair it, or set dataset.on_error=skip")
        return MappedImages(path), problems

    def _write(
        self, path: Path, record: Path, root: Path, names: Sequence[str], progress: Progress | None
    ) -> dict[int, str]:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        shape = (len(names), 3, self.size, self.size)
        size = math.prod(shape)
        try:
            with temporary.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                if hasattr(os, "posix_fallocate"):  # writing to a mapped file on a full disk would kill the process
                    os.posix_fallocate(file.fileno(), file.tell(), size)
                else:  # macOS
                    file.truncate(file.tell() + size)
            array = np.load(temporary, mmap_mode="r+", allow_pickle=False)
            problems = self._fill(array, root, names, progress)
            array.flush()
            del array
            write_json(
                record, {"sha256": _sha256(temporary), "problems": [[k, v] for k, v in sorted(problems.items())]}
            )
            temporary.replace(path)
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
            raise DiskError(
                f"could not write {size} bytes to {path}: {reason}; free space or choose another cache_root"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        return problems


def read_image(path: Path, root: Path, size: int, resize: str, max_pixels: int) -> np.ndarray:
    """uint8 ``[3, size, size]``, RGB, from one image file; DataError naming the file when it cannot be used.

    root: resolved folder that the file, links followed, must lie in.
    """
    shown = printable(str(path))
    try:
        if not path.resolve().is_relative_to(root):
            raise DataError(f"{shown} is a link out of the data folder; copy the file into it")
        if shown != str(path):
            raise DataError(f"{shown} has a name that is not plain UTF-8 text; rename it")
        if not path.is_file():  # opening a named pipe would wait for ever
            raise DataError(f"{shown} is not a regular file")
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(f"{shown} has {width} x {height} pixels, more than dataset.max_pixels={max_pixels}")
            if min(width, height) < 2:
                raise DataError(f"{shown} has {width} x {height} pixels: too small to be an image")
            rgb = _to_rgb(shown, ImageOps.exif_transpose(image))
            return np.asarray(_fit(rgb, size, resize)).transpose(2, 0, 1)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{shown} has more pixels than dataset.max_pixels={max_pixels}: {error}") from error
    except Exception as error:  # decoders of damaged files raise almost anything
        raise DataError(f"{shown} cannot be decoded: {error}") from error


def printable(name: str) -> str:
    """``name`` with bytes that are no UTF-8 and control characters escaped, fit for messages and lists."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return "".join(letter if letter >= " " and letter != "\x7f" else f"\\x{ord(letter):02x}" for letter in text)


def _to_rgb(shown: str, image: Image.Image) -> Image.Image:
    """8-bit RGB: transparency on white, 16 bits scaled to 8, other colour spaces by Pillow's rules."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"{shown} has pixels beyond 16 bits; store it with 8 or 16 bits a channel")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        told = ", NaN among them" if np.isnan(np.asarray(image)).any() else ""
        raise DataError(f"{shown} has floating-point pixels{told}; store it with 8 or 16 bits a channel")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _fit(image: Image.Image, size: int, resize: str) -> Image.Image:
    if image.size == (size, size):
        return image
    if resize == "squash":
        return image.resize((size, size), Image.Resampling.BILINEAR)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def stamp(root: Path, name: str) -> list[object]:
    """(name, size, time of change) of a file: what tells that it was replaced without reading it."""
    try:
        stat = (root / name).stat()
    except OSError:  # told when the file is read
        return [printable(name), None, None]
    return [printable(name), stat.st_size, stat.st_mtime_ns]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stored_problems(path: Path, record: Path, progress: Progress | None) -> dict[int, str] | None:
    """The problems noted beside a sound cached array; None when it must be made (again)."""
    if not path.exists():
        return None
    try:
        noted = json.loads(record.read_text())
        if _sha256(path) == noted["sha256"]:
            return {int(row): str(problem) for row, problem in noted["problems"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    warn(progress, f"{path} is damaged (its SHA-256 differs from the recorded one): decoding the images again")
    return None
