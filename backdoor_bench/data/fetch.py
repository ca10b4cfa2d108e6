"""Downloading published archives: under a lock, to a temporary name, checked, unpacked, then renamed into place."""

from __future__ import annotations

import errno
import hashlib
import http.client
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backdoor_bench.data.archives import extract, remove_tree
from backdoor_bench.data.common import warn
from backdoor_bench.errors import DataError, DiskError
from backdoor_bench.types import Progress

_ATTEMPTS = 2
_TIMEOUT = 30.0  # seconds without a byte
_PAUSE = 1.0  # seconds before the second attempt
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """A published file and its published MD5."""

    url: str
    md5: str


def md5_of(path: Path) -> str:
    """Hex MD5 of a file: the only checksum the publishers of these sets give."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def check_md5(path: Path, expected: str, advice: str) -> None:
    """Raise DataError with both hashes unless the file is the published one."""
    try:
        found = md5_of(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {advice}") from error
    if found != expected:
        raise DataError(f"{path} is not the published file: MD5 expected {expected}, found {found}; {advice}")


def fetch(archives: Sequence[Archive], root: Path, folder: str, progress: Progress | None = None) -> Path:
    """``root/folder`` as the archives hold it; already there, it is returned untouched.

    One process downloads, others wait for it. Each archive is tried twice; what does not arrive whole (DataError with
    the reason, or both hashes) leaves nothing behind. The folder appears only once all archives are unpacked.
    """
    from filelock import FileLock

    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"could not make {root}: {error.strerror}; choose another dataset.root") from error
    target = root / folder
    with FileLock(root / f".{folder}.lock"):
        if target.exists():
            return target
        scratch = root / f".{folder}.part"
        remove_tree(scratch)  # of a killed process: the lock is ours
        scratch.mkdir()
        try:
            for archive in archives:
                packed = scratch / archive.url.rsplit("/", 1)[-1]
                _download(archive, packed, progress)
                _merge(extract(packed, scratch / "unpacked" / packed.name), scratch / "tree")
                packed.unlink()
            tree = scratch / "tree"
            (tree / folder if folder in {top.name for top in tree.iterdir()} else tree).rename(target)
        finally:
            remove_tree(scratch)
    return target


def _merge(tops: Sequence[Path], tree: Path) -> None:
    """Move unpacked folders into ``tree``, joining those of the same name (GTSRB comes in three archives)."""
    tree.mkdir(exist_ok=True)
    for top in tops:
        target = tree / top.name
        if top.is_dir() and target.is_dir():
            _merge(sorted(top.iterdir()), target)
        elif not target.exists():
            top.rename(target)


def _download(archive: Archive, path: Path, progress: Progress | None) -> None:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _receive(archive.url, path)
            check_md5(path, archive.md5, f"{archive.url} sent something else; try later or put the data there by hand")
            return
        except (OSError, http.client.HTTPException, DataError) as error:
            remove_tree(path)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise DiskError(f"the disk is full while downloading to {path}; free space and retry") from error
            if attempt == _ATTEMPTS:
                if isinstance(error, DataError):
                    raise
                raise DataError(
                    f"{archive.url} could not be downloaded ({error}); try later, or put the data there by hand"
                ) from error
            warn(progress, f"download of {archive.url} failed ({error}); trying again")
            time.sleep(_PAUSE)


def _receive(url: str, path: Path) -> None:
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as source, path.open("wb") as file:
        while block := source.read(_BLOCK):
            file.write(block)
