"""Unpacking archives that nobody vouches for."""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import IO

from backdoor_bench.errors import DataError, DiskError

MAX_BYTES = 200 * 2**30  # unpacked; ImageNet's training set has 150 GB
MAX_RATIO = 100.0  # unpacked : packed; photographs stay near 1, a bomb reaches 1,000 and more
MAX_MEMBERS = 5_000_000
_BLOCK = 1 << 20
# What the standard library raises for damaged, encrypted and unknown archives (RuntimeError: a password is needed).
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError)

Member = tuple[str, bool, int, "IO[bytes] | None"]  # name, is a folder, declared size, content of a file


def extract(archive: Path, into: Path, *, max_bytes: int = MAX_BYTES, max_ratio: float = MAX_RATIO) -> list[Path]:
    """Unpack a zip or tar (gz, bz2, xz) file into ``into``; returns the new top-level paths, sorted.

    Refused with DataError, leaving ``into`` as it was: members with an absolute path, ``..``, a drive letter or a
    backslash; links and devices; the same name twice; more than ``max_bytes`` or ``max_ratio`` times the archive's
    size in all (counted while reading, since headers lie); a top-level name that already exists; a damaged file. A
    full disk is a DiskError. Modes and owners are not taken over.
    """
    try:
        packed = archive.stat().st_size
    except OSError as error:
        raise DataError(f"{archive} cannot be read: {error.strerror}") from error
    limit = min(max_bytes, int(max_ratio * max(packed, 1)))
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=into) as scratch:
        try:
            with _members(archive) as members:
                _unpack(archive, members, Path(scratch), limit)
        except _DAMAGE as error:
            raise DataError(f"{archive} is damaged or of an unknown kind: {error}; fetch it again") from error
        except (FileExistsError, NotADirectoryError) as error:
            raise DataError(f"{archive} holds the same name twice ({error.filename}); it is not unpacked") from error
        except OSError as error:
            if error.errno is None:  # gzip and lzma report damage so
                raise DataError(f"{archive} is damaged: {error}; fetch it again") from error
            raise DiskError(f"could not unpack {archive} into {into}: {error.strerror}; free space") from error
        tops = sorted(path.name for path in Path(scratch).iterdir())
        for name in tops:
            if (into / name).exists():
                raise DataError(f"{into / name} already exists; move it away before {archive} is unpacked there")
        for name in tops:
            (Path(scratch) / name).rename(into / name)
    return [into / name for name in tops]


def _unpack(archive: Path, members: Iterator[Member], into: Path, limit: int) -> None:
    total = 0
    for number, (name, is_folder, declared, content) in enumerate(members):
        if number >= MAX_MEMBERS:
            raise DataError(f"{archive} has more than {MAX_MEMBERS} members; it is not unpacked")
        target = into / _safe_name(archive, name)
        if total + declared > limit:
            raise _too_large(archive, name, limit)
        if is_folder:
            target.mkdir(parents=True, exist_ok=True)
            continue
        assert content is not None
        target.parent.mkdir(parents=True, exist_ok=True)
        with content, target.open("xb") as file:
            while block := content.read(_BLOCK):
                total += len(block)
                if total > limit:
                    raise _too_large(archive, name, limit)
                file.write(block)


def _safe_name(archive: Path, name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    windows = PureWindowsPath(name)
    if name.startswith("/") or "\\" in name or "\0" in name or windows.drive or ".." in parts:
        raise DataError(f"{archive}: member {name!r} would be written outside the folder; it is not unpacked")
    return "/".join(parts)


def _too_large(archive: Path, name: str, limit: int) -> DataError:
    return DataError(
        f"{archive}: at member {name!r} the unpacked size passes {limit} bytes, the most allowed for an archive of "
        "this size; it is not unpacked (a zip bomb?)"
    )


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[Member]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            yield _zip_members(archive, file)
    else:
        with tarfile.open(archive) as tar:
            yield _tar_members(archive, tar)


def _zip_members(archive: Path, file: zipfile.ZipFile) -> Iterator[Member]:
    for info in file.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DataError(f"{archive}: member {info.filename!r} is a link or a device; it is not unpacked")
        if info.is_dir():
            yield info.filename, True, 0, None
        else:
            yield info.filename, False, info.file_size, file.open(info)


def _tar_members(archive: Path, tar: tarfile.TarFile) -> Iterator[Member]:
    for info in tar:
        if not (info.isfile() or info.isdir()):
            raise DataError(f"{archive}: member {info.name!r} is a link or a device; it is not unpacked")
        yield info.name, info.isdir(), info.size if info.isfile() else 0, tar.extractfile(info)


def remove_tree(path: Path) -> None:
    """Delete a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
