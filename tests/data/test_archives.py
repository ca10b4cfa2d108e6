"""Archives that must not be unpacked (B51-B53) and those that may."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from backdoor_bench.data.archives import extract
from backdoor_bench.errors import DataError


def make_tar(path: Path, members: dict[str, bytes | str], mode: str = "w:gz") -> Path:
    """A tar of files (bytes) and symbolic links (text)."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def left(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_is_unpacked(mode: str, tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "a.tar", {"set/a/1.png": b"one", "./set/b/2.png": b"two", "note": b""}, mode)
    tops = extract(archive, tmp_path / "out")
    assert tops == [tmp_path / "out" / "note", tmp_path / "out" / "set"]
    assert left(tmp_path / "out") == ["note", "set", "set/a", "set/a/1.png", "set/b", "set/b/2.png"]
    assert (tmp_path / "out/set/b/2.png").read_bytes() == b"two"


def test_a_zip_is_unpacked_and_modes_are_not_taken_over(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("set/run.png")
    info.external_attr = (stat.S_IFREG | 0o4777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(info, b"x")
        file.mkdir("set/empty")
    extract(tmp_path / "a.zip", tmp_path / "out")
    assert left(tmp_path / "out") == ["set", "set/empty", "set/run.png"]
    assert not (tmp_path / "out/set/run.png").stat().st_mode & 0o7111


@pytest.mark.parametrize(
    "name", ["../evil", "set/../../evil", "/tmp/evil", "..", "C:/evil", "set\\..\\evil"], ids=lambda name: repr(name)
)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_members_outside_are_refused_and_nothing_stays(kind: str, name: str, tmp_path: Path) -> None:
    """B51, B52."""
    make = make_tar if kind == "tar" else make_zip
    archive = make(tmp_path / "a", {"set/good": b"x", name: b"evil"})
    with pytest.raises(DataError, match="outside the folder"):
        extract(archive, tmp_path / "out" / "deep")
    assert left(tmp_path) == ["a", "out", "out/deep"]


@pytest.mark.parametrize("target", ["/etc/passwd", "../../x", "good"])
def test_links_are_refused_wherever_they_lead(target: str, tmp_path: Path) -> None:
    """B52."""
    archive = make_tar(tmp_path / "a.tar", {"set/good": b"x", "set/link": target})
    with pytest.raises(DataError, match="link or a device"):
        extract(archive, tmp_path / "out")
    assert left(tmp_path / "out") == []


def test_hard_links_and_pipes_are_refused(tmp_path: Path) -> None:
    for kind in (tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        info = tarfile.TarInfo("x")
        info.type, info.linkname = kind, "y"
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            tar.addfile(info)
        with pytest.raises(DataError, match="link or a device"):
            extract(tmp_path / "a.tar", tmp_path / "out")


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match="link or a device"):
        extract(tmp_path / "a.zip", tmp_path / "out")


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_bomb_is_refused_by_its_ratio(kind: str, tmp_path: Path) -> None:
    """B53: 8 MB of zeros pack to about 8 kB."""
    make = make_tar if kind == "tar" else make_zip
    archive = make(tmp_path / "bomb", {"a": b"\0" * 8_000_000})
    with pytest.raises(DataError, match="zip bomb"):
        extract(archive, tmp_path / "out")
    assert left(tmp_path / "out") == []


def test_sizes_are_counted_while_reading_because_headers_lie(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"a": b"\0" * 1_000_000})
    honest = archive.read_bytes()
    lying = honest.replace((1_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    assert lying != honest
    archive.write_bytes(lying)
    with pytest.raises(DataError):
        extract(archive, tmp_path / "out", max_ratio=10_000, max_bytes=1000)
    assert left(tmp_path / "out") == []


def test_total_size_is_bounded(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "a.tar", {"a": b"x" * 600, "b": b"y" * 600}, "w")
    with pytest.raises(DataError, match="passes 1000 bytes"):
        extract(archive, tmp_path / "out", max_bytes=1000)


def test_nothing_that_exists_is_overwritten(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "a.tar", {"set/a": b"new", "other": b"x"})
    (tmp_path / "out/set").mkdir(parents=True)
    (tmp_path / "out/set/a").write_bytes(b"old")
    with pytest.raises(DataError, match="already exists"):
        extract(archive, tmp_path / "out")
    assert left(tmp_path / "out") == ["set", "set/a"]
    assert (tmp_path / "out/set/a").read_bytes() == b"old"


@pytest.mark.parametrize("names", [("a", "./a"), ("a", "a/b")])
def test_a_name_twice_is_refused(names: tuple[str, str], tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {names[0]: b"1", names[1]: b"2"})
    with pytest.raises(DataError, match="same name twice"):
        extract(archive, tmp_path / "out")


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.95])
def test_torn_archives_are_refused(kind: str, keep: float, tmp_path: Path) -> None:
    make = make_tar if kind == "tar" else make_zip
    noise = bytes(range(256)) * 40
    archive = make(tmp_path / "a", {"a": noise[::-1], "b": noise + b"x"})
    archive.write_bytes(archive.read_bytes()[: int(keep * archive.stat().st_size)])
    with pytest.raises(DataError, match="fetch it again"):
        extract(archive, tmp_path / "out")
    assert left(tmp_path / "out") == []


def test_a_flipped_bit_in_a_zip_is_found(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a", b"content")
    content = bytearray(archive.read_bytes())
    content[content.index(b"content")] ^= 1
    archive.write_bytes(content)
    with pytest.raises(DataError, match="CRC"):
        extract(archive, tmp_path / "out")


def test_an_absent_archive_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        extract(tmp_path / "none", tmp_path / "out")
