"""Downloads over file:// addresses: hashes, torn transfers, two at once (F31-F33)."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from pathlib import Path

import pytest

from backdoor_bench.data import fetch as module
from backdoor_bench.data.fetch import Archive, fetch
from backdoor_bench.errors import DataError


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.0)


def publish(folder: Path, name: str, members: dict[str, bytes]) -> Archive:
    folder.mkdir(exist_ok=True)
    path = folder / name
    with tarfile.open(path, "w:gz") as tar:
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return Archive(path.as_uri(), hashlib.md5(path.read_bytes()).hexdigest())


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_an_archive_arrives_and_nothing_else_stays(tmp_path: Path) -> None:
    archive = publish(tmp_path / "site", "a.tgz", {"set/x": b"1"})
    assert fetch([archive], tmp_path / "data", "set") == tmp_path / "data/set"
    assert (tmp_path / "data/set/x").read_bytes() == b"1"
    assert visible(tmp_path / "data") == ["set"]


def test_several_archives_make_one_folder(tmp_path: Path) -> None:
    site = tmp_path / "site"
    parts = [
        publish(site, "a.tgz", {"GTSRB/Final_Training/x": b"1", "GTSRB/Readme": b"a"}),
        publish(site, "b.tgz", {"GTSRB/Final_Test/y": b"2", "GTSRB/Readme": b"b"}),
        publish(site, "c.tgz", {"truth.csv": b"3"}),
    ]
    folder = fetch(parts, tmp_path / "data", "gtsrb")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == ["GTSRB/Final_Test/y", "GTSRB/Final_Training/x", "GTSRB/Readme", "truth.csv"]


def test_a_wrong_hash_is_told_with_both(tmp_path: Path) -> None:
    """F31."""
    archive = publish(tmp_path / "site", "a.tgz", {"set/x": b"1"})
    with pytest.warns(UserWarning, match="trying again"), pytest.raises(DataError) as caught:
        fetch([Archive(archive.url, "0" * 32)], tmp_path / "data", "set")
    assert archive.md5 in str(caught.value)
    assert "0" * 32 in str(caught.value)
    assert visible(tmp_path / "data") == []


def test_a_torn_download_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F32: cut at half the first time."""
    archive = publish(tmp_path / "site", "a.tgz", {"set/x": b"1"})
    whole, calls = module._receive, []

    def cut(url: str, path: Path) -> None:
        whole(url, path)
        calls.append(url)
        if len(calls) == 1:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    monkeypatch.setattr(module, "_receive", cut)
    with pytest.warns(UserWarning, match="trying again"):
        fetch([archive], tmp_path / "data", "set")
    assert len(calls) == 2
    assert visible(tmp_path / "data") == ["set"]


def test_an_unreachable_source_is_a_data_error(tmp_path: Path) -> None:
    """F32, both attempts."""
    gone = Archive((tmp_path / "gone.tgz").as_uri(), "0" * 32)
    with pytest.warns(UserWarning, match="trying again"), pytest.raises(DataError, match="could not be downloaded"):
        fetch([gone], tmp_path / "data", "set")
    assert visible(tmp_path / "data") == []


def test_what_a_killed_download_left_is_removed(tmp_path: Path) -> None:
    archive = publish(tmp_path / "site", "a.tgz", {"set/x": b"1"})
    (tmp_path / "data/.set.part/tree").mkdir(parents=True)
    (tmp_path / "data/.set.part/a.tgz").write_bytes(b"half")
    fetch([archive], tmp_path / "data", "set")
    assert visible(tmp_path / "data") == ["set"]


def test_two_at_once_fetch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F33: the second waits and finds the folder."""
    archive = publish(tmp_path / "site", "a.tgz", {"set/x": b"1"})
    whole, calls = module._receive, []
    waiting = threading.Event()

    def slow(url: str, path: Path) -> None:
        calls.append(url)
        waiting.wait(0.3)
        whole(url, path)

    monkeypatch.setattr(module, "_receive", slow)
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(fetch([archive], tmp_path / "data", "set"))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [tmp_path / "data/set"] * 2
    assert len(calls) == 1
