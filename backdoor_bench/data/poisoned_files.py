"""The open format of a poisoned data set: an NPZ file, or a folder of images with CSV tables; no pickle, no code.

One vocabulary for both forms, array of the NPZ <-> column of the table:

====================  =================================================================================================
``train_images``      uint8 [N, H, W, 3] or [N, 3, H, W]; in a folder the column ``file`` of train.csv
``train_labels``      the labels as given; ``label``
``is_poisoned``       1 = trigger and attacker's label; ``is_poisoned``
``is_cover``          optional, 1 = trigger, true label; ``is_cover``
``true_labels``       optional, default the given labels; ``true_label``
``trigger_id``        optional, -1 = no trigger, default 0 where there is one; ``trigger_id``
``test_images``       optional: triggered test images; ``file`` of test.csv
``test_wanted``       the labels the attacker wants; ``wanted``
``test_true_labels``  optional; ``true_label``
``test_case``         optional: which case, a position in ``case_names``; ``case``, a name
``case_names``        optional; ``case`` of the optional cases.csv
``case_counts``       optional, 0 = the case is listed, but does not enter the ASR; ``counts``
``case_group``        optional: of the cases of a group the best one counts, "" = by itself; ``group``
``case_leave_out``    optional, 1 = leave out images whose true label is the wanted one; ``leave_out``
====================  =================================================================================================

Other arrays and columns are not read. A file ``SHA256SUMS`` beside them (``<hash>  <path>`` a line) is verified where
there is one.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
import zipfile
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backdoor_bench.data.archives import MAX_RATIO
from backdoor_bench.data.checks import validate
from backdoor_bench.data.decode import printable, read_image, stamp
from backdoor_bench.errors import DataError
from backdoor_bench.storage import digest
from backdoor_bench.types import Images, ImageSet, PoisonedSet, Progress, StoredCase

NPZ, SUMS = "poisoned.npz", "SHA256SUMS"
# Array of the NPZ -> (table, column) of the folder.
COLUMNS = {
    "train_labels": ("train", "label"),
    "true_labels": ("train", "true_label"),
    "is_poisoned": ("train", "is_poisoned"),
    "is_cover": ("train", "is_cover"),
    "trigger_id": ("train", "trigger_id"),
    "test_wanted": ("test", "wanted"),
    "test_true_labels": ("test", "true_label"),
    "test_case": ("test", "case"),
    "case_names": ("cases", "case"),
    "case_counts": ("cases", "counts"),
    "case_group": ("cases", "group"),
    "case_leave_out": ("cases", "leave_out"),
}
TEXTS = ("test_case", "case_names", "case_group")  # columns of names; all others are integers
MAX_PIXELS = 4096**2  # of one image file: the largest dataset.image_size
SMALL = 2**26  # bytes that an NPZ may hold unpacked however well it is packed
CHUNK = 512


@dataclass(frozen=True)
class PoisonedFiles:
    """What was read: the training set with masks bool [N], int64 [N] each, and the triggered test sets."""

    train: ImageSet
    is_poisoned: Tensor
    is_cover: Tensor
    true_labels: Tensor
    trigger_id: Tensor
    cases: tuple[StoredCase, ...]


# ---------------------------------------------------------------------- reading


def read(path: Path, image_size: int, num_classes: int, progress: Progress | None = None) -> PoisonedFiles:
    """The poisoned data set at ``path``: an NPZ file, a folder with one, or a folder with tables and images.

    All of it is held in memory. Raises DataError naming file and row where something is missing, damaged, or does not
    fit ``image_size`` and ``num_classes``.
    """
    path = _found(path)
    _verify(path)
    raw = _read_folder(path, image_size, progress) if path.is_dir() else _read_npz(path)
    return _checked(raw, image_size, num_classes)


def count_rows(path: Path) -> int:
    """The number of training rows, without reading their images."""
    path = _found(path)
    if path.is_dir():
        return len(_table(path / "train.csv"))
    labels = load_arrays(path, ("train_labels",)).get("train_labels")
    if labels is None or labels.ndim != 1:
        raise DataError(f"{path} has no train_labels, one integer an image")
    return len(labels)


def fingerprint(path: Path) -> str:
    """Another one means other data: of an NPZ the content's hash, of a folder names, sizes and times of its files."""
    path = _found(path)
    if not path.is_dir():
        return _sha256(path)
    names = []
    for folder, children, files in os.walk(path):
        children.sort()
        names += sorted((Path(folder) / file).relative_to(path).as_posix() for file in files)
    return digest([stamp(path, name) for name in names])


@dataclass(frozen=True)
class _Raw:
    """Arrays and images (uint8 [N, 3, H, W]; "train", "test") by their NPZ names, and where they came from."""

    path: Path
    arrays: Mapping[str, np.ndarray]
    images: Mapping[str, Tensor]

    def file(self, part: str) -> Path:
        return self.path / f"{part}.csv" if self.path.is_dir() else self.path

    def name(self, array: str) -> str:
        """As the user wrote it."""
        return COLUMNS[array][1] if self.path.is_dir() else array

    def row(self, part: str, row: int) -> str:
        return f"{self.file(part)}, " + (f"line {row + 2}" if self.path.is_dir() else f"{part} row {row}")


def _found(path: Path) -> Path:
    """The NPZ file or the folder of tables behind ``path``."""
    if path.is_dir() and (path / NPZ).is_file():  # reading a named pipe would wait for ever
        return path / NPZ
    if path.is_dir() and not (path / "train.csv").is_file():
        raise DataError(f"{path} holds neither {NPZ} nor train.csv; check attack.path")
    if not path.is_dir() and not path.is_file():
        raise DataError(f"{path} is neither a file nor a folder; check attack.path")
    return path


def _verify(path: Path) -> None:
    """Compare what SHA256SUMS lists of the files that will be read with its hashes."""
    folder = path if path.is_dir() else path.parent
    sums = folder / SUMS
    if not sums.is_file():
        return
    try:
        lines = sums.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{sums} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        expected, gap, name = line[:64].lower(), line[64:66], line[66:]
        target = folder / name
        outside = ".." in Path(name).parts or Path(name).is_absolute()
        if gap not in ("  ", " *") or set(expected) - set("0123456789abcdef") or outside:
            raise DataError(f"{sums}, line {number}: not of the form '<SHA-256>  <path>'")
        if not path.is_dir() and name != path.name:
            continue  # another file's
        if not target.is_file():
            raise DataError(f"{sums}, line {number}: {printable(name)} is missing; copy the whole folder again")
        if _sha256(target) != expected:
            raise DataError(f"{target} was altered: its SHA-256 differs from the one in {sums}; copy it again")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _read_npz(path: Path) -> _Raw:
    parts = ("train_images", "test_images")
    arrays = load_arrays(path, (*parts, *COLUMNS))
    images = {}
    for part in ("train", "test"):
        array = arrays.pop(f"{part}_images", None)
        if array is not None:
            images[part] = _channels_first(array, f"{path}: {part}_images")
    return _Raw(path, arrays, images)


def load_arrays(path: Path, wanted: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an NPZ (of those ``wanted`` the ones it has), none of objects, so that nothing is unpickled.

    DataError when it is damaged, or when its headings declare more than it holds or than an archive of its size can
    (then before anything is unpacked).
    """
    try:
        with path.open("rb") as file:
            if file.read(6) == b"\x93NUMPY":
                raise DataError(f"{path} is a single array, not an NPZ of named ones (the names: poisoned_files.py)")
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if wanted is not None:
                members = {name: info for name, info in members.items() if name in wanted}
            limit = max(SMALL, int(MAX_RATIO * path.stat().st_size))
            if sum(info.file_size for info in members.values()) > limit:
                raise DataError(f"{path}: its arrays pass {limit} bytes unpacked; it is not read (a zip bomb?)")
            return {name: _member(archive, info) for name, info in members.items()}
    except (DataError, MemoryError):
        raise
    except Exception as error:  # damaged archives and headings raise almost anything
        raise DataError(f"{path} cannot be read as an NPZ of plain arrays: {error}; export it again") from error


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One array; ValueError unless it has the size its heading says, which numpy would believe and allocate."""
    read = np.lib.format
    with archive.open(info) as file:
        headings = {(1, 0): read.read_array_header_1_0, (2, 0): read.read_array_header_2_0}
        heading = headings.get(read.read_magic(file))
        if heading is None:  # the third version is for records with names beyond ASCII
            raise ValueError(f"{info.filename} has an unknown version")
        shape, _, dtype = heading(file)
        if dtype.hasobject:
            raise ValueError(f"{info.filename} holds Python objects")
        if min(shape, default=0) < 0 or file.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
            raise ValueError(f"{info.filename} does not have the size that it declares")
    with archive.open(info) as file:
        found: np.ndarray = read.read_array(file, allow_pickle=False)
        return found


def _channels_first(array: np.ndarray, where: str) -> Tensor:
    if array.dtype != np.uint8:
        raise DataError(f"{where}: {array.dtype}; store pixels as uint8, 0..255")
    if array.ndim != 4 or 3 not in (array.shape[1], array.shape[3]):
        raise DataError(f"{where}: shape {array.shape}, expected [N, H, W, 3] or [N, 3, H, W]")
    return torch.from_numpy(array if array.shape[1] == 3 else np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def _read_folder(folder: Path, size: int, progress: Progress | None) -> _Raw:
    files = {table: folder / f"{table}.csv" for table in ("train", "test", "cases")}
    tables = {table: _table(file) for table, file in files.items() if file.is_file()}
    arrays: dict[str, np.ndarray] = {}
    for name, (table, column) in COLUMNS.items():
        rows = tables.get(table)
        if rows and column in rows[0]:
            texts = [row[column] for row in rows]
            arrays[name] = np.array(texts if name in TEXTS else _integers(files[table], column, texts))
    if "test_case" in arrays:
        names = arrays.setdefault("case_names", np.array(list(dict.fromkeys(arrays["test_case"].tolist())))).tolist()
        unknown = [row for row, case in enumerate(arrays["test_case"]) if case not in names]
        if unknown:
            case = arrays["test_case"][unknown[0]]
            raise DataError(f"{files['test']}, line {unknown[0] + 2}: case {str(case)!r} is not in cases.csv")
        arrays["test_case"] = np.array([names.index(case) for case in arrays["test_case"]])
    images = {
        part: _decoded(folder, part, tables[part], size, progress) for part in ("train", "test") if tables.get(part)
    }
    return _Raw(folder, arrays, images)


def _table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a heading; every row has every column."""
    if not path.resolve().is_relative_to(path.parent.resolve()):
        raise DataError(f"{path} is a link out of the data folder; copy the file into it")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{path}, line {reader.line_num}: not as many values as the heading has names")
                rows.append(row)
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}") from error


def _integers(path: Path, column: str, texts: Sequence[str]) -> list[int]:
    values = []
    for line, text in enumerate(texts, 2):
        try:
            values.append(int(text))
        except ValueError:
            raise DataError(f"{path}, line {line}: {column}={text!r} must be an integer") from None
    return values


def _decoded(
    folder: Path, part: str, rows: Sequence[Mapping[str, str]], size: int, progress: Progress | None
) -> Tensor:
    """The images a table lists, uint8 [N, 3, size, size]; one of another size is refused, as a resized trigger would be
    another trigger."""
    from PIL import Image

    if "file" not in rows[0]:
        raise DataError(f"{folder / part}.csv has no column file")
    array, root = np.empty((len(rows), 3, size, size), dtype=np.uint8), folder.resolve()

    def one(row: int) -> None:
        name, where = rows[row]["file"], f"{folder / part}.csv, line {row + 2}"
        try:
            array[row] = read_image(folder / name, root, size, "squash", MAX_PIXELS)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        with Image.open(folder / name) as image:
            width, height = image.size
        if (width, height) != (size, size):
            raise DataError(f"{where}: {printable(name)} has {width} x {height} pixels, {_asked(size)}")

    task = progress.task(f"reading {part} images", total=len(rows)) if progress else nullcontext(lambda count: None)
    with task as advance, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(rows), CHUNK):
            chunk = range(start, min(start + CHUNK, len(rows)))
            list(pool.map(one, chunk))
            advance(len(chunk))
    return torch.from_numpy(array)


def _asked(size: int) -> str:
    return f"but dataset.image_size={size}; choose the data set it was made from"


# ---------------------------------------------------------------------- checking


def _checked(raw: _Raw, image_size: int, num_classes: int) -> PoisonedFiles:
    if "train" not in raw.images:
        raise DataError(f"{raw.file('train')} has no training images")
    train = ImageSet(raw.images["train"], _whole(raw, "train_labels"), num_classes)
    _fit(train, image_size, f"{raw.file('train')} (train)")
    count = len(train)
    is_poisoned, is_cover = _flags(raw, "is_poisoned", count), _flags(raw, "is_cover", count, default=False)
    _refuse(raw, "train", is_poisoned & is_cover, "both poisoned and cover; a cover image keeps its true label")
    true_labels = _whole(raw, "true_labels", default=train.labels)
    wrong = (true_labels < 0) | (true_labels >= num_classes)
    _refuse(raw, "train", wrong, f"{raw.name('true_labels')} must lie in 0..{num_classes - 1}")
    stamped = is_poisoned | is_cover
    trigger_id = _whole(raw, "trigger_id", default=stamped.long() - 1)
    wrong = (trigger_id < -1) | (stamped != (trigger_id >= 0))
    _refuse(raw, "train", wrong, "trigger_id must be >= 0 for poisoned and cover images, and -1 for all others")
    return PoisonedFiles(train, is_poisoned, is_cover, true_labels, trigger_id, _cases(raw, image_size, num_classes))


def _cases(raw: _Raw, image_size: int, num_classes: int) -> tuple[StoredCase, ...]:
    if "test" not in raw.images:
        return ()
    images, wanted = raw.images["test"], _whole(raw, "test_wanted")
    _fit(ImageSet(images, wanted, num_classes), image_size, f"{raw.file('test')} (test)", every_class=False)
    names = _texts(raw, "case_names") or ["imported"]
    if len(set(names)) != len(names) or not all(names):
        raise DataError(f"{raw.file('cases')}: the names of the cases must differ and not be empty, they are {names}")
    owner = _whole(raw, "test_case", default=torch.zeros(len(wanted), dtype=torch.int64))
    wrong = (owner < 0) | (owner >= len(names))
    _refuse(raw, "test", wrong, f"test_case must lie in 0..{len(names) - 1}, there are {len(names)} case_names")
    groups = _texts(raw, "case_group", len(names)) or [""] * len(names)
    counts = _flags(raw, "case_counts", len(names), default=True)
    leave_out = _flags(raw, "case_leave_out", len(names), default=False)
    kept = torch.ones(len(wanted), dtype=torch.bool)
    if leave_out.any():
        kept = ~(leave_out[owner] & (_whole(raw, "test_true_labels") == wanted))
    cases = []
    for number, (name, counted, group) in enumerate(zip(names, counts.tolist(), groups, strict=True)):
        mine = (kept & (owner == number)).nonzero().flatten()
        targets = wanted[mine].unique().tolist()
        test = ImageSet(images[mine], wanted[mine], num_classes)
        cases.append(StoredCase(name, test, targets[0] if len(targets) == 1 else None, counted, group or None))
    return tuple(cases)


def _fit(images: ImageSet, size: int, name: str, every_class: bool = True) -> None:
    """Raise DataError unless the set can be used with images of ``size`` pixels."""
    validate(images, name, every_class=every_class)
    height, width = images.images.shape[-2:]
    if (height, width) != (size, size):
        raise DataError(f"{name}: images have {width} x {height} pixels, {_asked(size)}")


def _whole(raw: _Raw, name: str, default: Tensor | None = None) -> Tensor:
    """int64, one entry an image."""
    part = COLUMNS[name][0]
    values, count = raw.arrays.get(name), len(raw.images[part])
    if values is None and default is not None:
        return default
    if values is None:
        raise DataError(f"{raw.file(part)} has no {raw.name(name)}")
    if values.dtype.kind not in "iub" or values.shape != (count,):
        told = f"{raw.file(part)}: {raw.name(name)} is {values.dtype} {values.shape}"
        raise DataError(f"{told}, expected one integer for each of {count} images")
    return torch.from_numpy(values.astype(np.int64))


def _flags(raw: _Raw, name: str, count: int, default: bool | None = None) -> Tensor:
    """bool [count] from 0 and 1."""
    values, file = raw.arrays.get(name), raw.file(COLUMNS[name][0])
    if values is None and default is not None:
        return torch.full((count,), default)
    if values is None:
        raise DataError(f"{file} has no {raw.name(name)}")
    if values.shape != (count,) or values.dtype.kind not in "iub" or not np.isin(values, (0, 1)).all():
        raise DataError(f"{file}: {raw.name(name)} must be {count} values 0 or 1")
    return torch.from_numpy(values.astype(bool))


def _texts(raw: _Raw, name: str, count: int | None = None) -> list[str]:
    """Texts, ``count`` of them where it is given; empty when there are none."""
    values = raw.arrays.get(name, np.array([], dtype=str))
    if values.dtype.kind != "U" or values.ndim != 1 or (count is not None and len(values) not in (0, count)):
        expected = "texts in a row" if count is None else f"{count} texts"
        raise DataError(
            f"{raw.file(COLUMNS[name][0])}: {raw.name(name)} is {values.dtype} {values.shape}, expected {expected}"
        )
    return [printable(text) for text in values.tolist()]


def _refuse(raw: _Raw, part: str, wrong: Tensor, reason: str) -> None:
    """Raise DataError naming the first row of the mask ``wrong``."""
    rows = wrong.nonzero().flatten()
    if len(rows):
        more = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
        raise DataError(f"{raw.row(part, int(rows[0]))}{more}: {reason}")


# ---------------------------------------------------------------------- writing


@dataclass(frozen=True)
class TestImages:
    """A triggered test set to be written: true_labels int64 [M], -1 where nobody knows them."""

    __test__ = False  # not a pytest class

    case: StoredCase
    true_labels: Tensor


def write_npz(folder: Path, poisoned: PoisonedSet, tests: Sequence[TestImages]) -> None:
    """``folder/poisoned.npz``. Images go in a chunk at a time; the bytes depend on the data alone."""
    with zipfile.ZipFile(folder / NPZ, "w", zipfile.ZIP_STORED) as archive:
        _write_images(archive, "train_images", [poisoned.train.images])
        if tests:
            _write_images(archive, "test_images", [test.case.test.images for test in tests])
        for name, values in _arrays(poisoned, tests).items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, values, allow_pickle=False)


def write_folder(folder: Path, poisoned: PoisonedSet, tests: Sequence[TestImages], progress: Progress) -> None:
    """``folder/train.csv``, ``test.csv``, ``cases.csv`` and PNG files below ``train`` and ``test``."""
    arrays = _arrays(poisoned, tests)
    files = {"train": _write_pngs(folder, "train", poisoned.train.images, progress)}
    if tests:
        arrays["test_case"] = arrays["case_names"][arrays["test_case"]]
        parts = [_write_pngs(folder, f"test/{k}", test.case.test.images, progress) for k, test in enumerate(tests)]
        files["test"] = [name for names in parts for name in names]
    for table in ("train", "test", "cases") if tests else ("train",):
        columns: dict[str, Sequence[Any]] = {"file": files[table]} if table in files else {}
        columns |= {column: arrays[k].tolist() for k, (of, column) in COLUMNS.items() if of == table and k in arrays}
        with (folder / f"{table}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))


def write_sums(folder: Path) -> None:
    """``folder/SHA256SUMS`` over all other files in it."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in names if name != SUMS]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def _arrays(poisoned: PoisonedSet, tests: Sequence[TestImages]) -> dict[str, np.ndarray]:
    """All but the images, by their NPZ names."""
    tensors = {
        "train_labels": poisoned.train.labels,
        "true_labels": poisoned.true_labels,
        "is_poisoned": poisoned.is_poisoned.to(torch.uint8),
        "is_cover": poisoned.is_cover.to(torch.uint8),
        "trigger_id": poisoned.trigger_id,
    }
    if not tests:
        return {name: values.cpu().numpy() for name, values in tensors.items()}
    cases = [test.case for test in tests]
    tensors["test_wanted"] = torch.cat([case.test.labels.cpu() for case in cases])
    tensors["test_true_labels"] = torch.cat([test.true_labels.cpu() for test in tests])
    tensors["test_case"] = torch.cat([torch.full((len(case.test),), number) for number, case in enumerate(cases)])
    return {
        **{name: values.cpu().numpy() for name, values in tensors.items()},
        "case_names": np.array([case.name for case in cases]),
        "case_counts": np.array([int(case.counts) for case in cases]),
        "case_group": np.array([case.group or "" for case in cases]),
    }


def _write_images(archive: zipfile.ZipFile, name: str, parts: Sequence[Images]) -> None:
    height, width = parts[0].shape[-2:]
    header = {"descr": "|u1", "fortran_order": False, "shape": (sum(map(len, parts)), height, width, 3)}
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for images in parts:
            for start in range(0, len(images), CHUNK):
                file.write(images[start : start + CHUNK].cpu().permute(0, 2, 3, 1).contiguous().numpy().tobytes())


def _write_pngs(folder: Path, below: str, images: Images, progress: Progress) -> list[str]:
    """Names, relative to ``folder``, of one PNG file an image."""
    from PIL import Image

    (folder / below).mkdir(parents=True)
    names = [f"{below}/{row:06d}.png" for row in range(len(images))]

    def save(item: tuple[str, Tensor]) -> None:
        name, image = item
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)

    task = progress.task(f"writing {below}", total=len(images))
    with task as advance, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(images), CHUNK):
            chunk = images[start : start + CHUNK].cpu()
            list(pool.map(save, zip(names[start : start + CHUNK], chunk, strict=True)))
            advance(len(chunk))
    return names
